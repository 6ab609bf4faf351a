"""A model version as a function from inputs to scores and decisions. An input that breaks the schema is refused, with the reason."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from hanse.errors import ConfigError, NotInstalled
from hanse.finetuning.contract import Schema
from hanse.finetuning.data import FORMATS, UNKNOWN, Dataset, Unfit, fitted, prepared

logger = logging.getLogger(__name__)
Array: TypeAlias = npt.NDArray[Any]
Scores: TypeAlias = npt.NDArray[np.float64]
Content: TypeAlias = bytes | Path | Sequence[float] | Mapping[str, Any]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Item:
    """One input as it came in. content: an image file's bytes or path, or a table's row: numbers in the schema's order, or by column.

    columns: its slices (such as device) by name. label: 0 or 1 where it is known.
    """

    name: str
    content: Content
    columns: Mapping[str, str] = field(default_factory=dict)
    label: int | None = None


class Input(NamedTuple):
    """An item that fits the schema. array: uint8 (height, width, channels) or float32 (columns,). digest: of the array, not of the file."""

    item: Item
    array: Array
    digest: bytes


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """An answer. score: the probability of the positive class. decision: 1 if score ≥ the version's threshold, else 0."""

    name: str
    score: float
    decision: int
    version: str


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why an input got no score, and what to do."""

    name: str
    error: str
    hint: str = ""


Answer: TypeAlias = Scored | Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A version that is loaded. module: with the version's parameters. version: its digest.

    rows: so many the model computes at a time, always, filled up where there are fewer: so a score's bits do not depend on what is scored
    beside it. Few make one input quick, many make many inputs quick; other rows may give other last bits.
    """

    module: Any
    schema: Schema
    threshold: float
    version: str
    rows: int = 64

    def scores(self, inputs: Sequence[Input]) -> Scores:
        """float64, shape (n,); NaN where the model fails on an input: it spoils no other's score."""
        if not inputs:
            return np.empty(0)
        try:
            return self._together(inputs)
        except Exception as error:  # the model is the vendor's code
            logger.warning("%s failed on %d inputs, which now go one by one: %r", self.version, len(inputs), error)
            return np.array([self._alone(each) for each in inputs])

    def _together(self, inputs: Sequence[Input]) -> Scores:
        from hanse.finetuning.models import score

        names = [each.item.name for each in inputs]
        dataset = Dataset(np.stack([each.array for each in inputs]), np.full(len(names), UNKNOWN), names)
        return score(self.module, prepared(dataset, self.schema), self.rows)

    def _alone(self, one: Input) -> float:
        try:
            return float(self._together([one])[0])
        except Exception:
            return math.nan

    def answer(self, item: Item, score: float) -> Answer:
        if not 0 <= score <= 1:
            return Refusal(name=item.name, error="the model gave no probability for this input", hint="Are its values in the usual range?")
        return Scored(name=item.name, score=score, decision=int(score >= self.threshold), version=self.version)

    def answers(self, items: Sequence[Item], *, resize: bool = False) -> list[Answer]:
        """One answer an item, in order."""
        read = [as_input(item, self.schema, resize=resize) for item in items]
        inputs = [each for each in read if isinstance(each, Input)]
        scores = iter(self.scores(inputs).tolist())
        return [each if isinstance(each, Refusal) else self.answer(each.item, next(scores)) for each in read]


def as_input(item: Item, schema: Schema, *, resize: bool = False) -> Input | Refusal:
    """The item decoded, or why it breaks the schema."""
    try:
        array = decode(item.content, schema, resize=resize)
    except ConfigError as error:
        return Refusal(name=item.name, error=error.message, hint=error.hint)
    return Input(item, array, blake3(array.tobytes()).digest())


def decode(content: Content, schema: Schema, *, resize: bool = False) -> Array:
    """uint8 (height, width, channels) of an image; float32 (columns,) of a table's row. Raises ConfigError if it breaks the schema.

    resize: scale images of another size, and convert those of other channels, as data.yaml may ask for.
    """
    if schema.kind == "table":
        return _row(content, schema.columns)
    if isinstance(content, bytes | Path):
        return _image(content, schema, resize=resize)
    raise ConfigError("this is a row of numbers, and the model takes images", hint="Send the bytes of an image file.")


def _image(content: bytes | Path, schema: Schema, *, resize: bool) -> Array:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise NotInstalled("images need the package pillow", hint="Install it with: pip install 'hanse[finetuning]'") from error
    height, width, channels = (*schema.shape, 1)[:3]
    try:
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            return fitted(image, (width, height), channels, resize=resize)
    except Unfit as error:
        raise ConfigError(f"the image {error}", hint="Send it as the model's schema wants it.") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of many kinds on broken files
        raise ConfigError("this is no image that can be read", hint=f"Send {', '.join(FORMATS)}; is the file whole?") from error


def _row(content: Content, columns: Sequence[str]) -> Array:
    if isinstance(content, bytes | Path):
        raise ConfigError("this is a file, and the model takes rows of numbers", hint=f"Send {len(columns)} numbers: {', '.join(columns)}.")
    if isinstance(content, Mapping):
        if missing := [name for name in columns if name not in content]:
            raise ConfigError(f"column {missing[0]!r} is missing, one of {len(missing)}")
        content = [content[name] for name in columns]
    if len(content) != len(columns):
        raise ConfigError(f"the row has {len(content)} numbers, and the model takes {len(columns)}: {', '.join(columns)}")
    for name, value in zip(columns, content, strict=True):
        if not math.isfinite(number := _number(value)) or abs(number) > _LARGEST:
            raise ConfigError(f"column {name!r} is {str(value)[:40]!r}: it must be a finite number")
    return np.array([_number(value) for value in content], np.float32)


def _number(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
