"""Which of a client's images to look at next: likely anomalies of a band of scores, some by chance, neighbours of confirmed ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from hanse.errors import ConfigError, Refused
from hanse.finetuning.labelling.labels import ANOMALY, UNSURE, How, Label, Labels
from hanse.statistics.intervals import wilson

Array = np.ndarray[Any, np.dtype[Any]]
Mode = Literal["band", "similar", "spot"]
Band = tuple[float, float]

BAND: Band = (0.01, 0.3)
"""The band of scores that finds anomalies well: the model is neither sure that they are normal nor that they are not."""
SPOT_CHECKS = 50
"""So many spot checks a week let an exact binomial test see a new class; see hanse.finetuning.watch."""
_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
_RANDOM_EVERY = 10
_WINDOWS = 32


@dataclass(frozen=True, kw_only=True)
class Pool:
    """I images that may be labelled. names: of the files, no two alike. scores: float64 (I,), the probability of an anomaly.

    images: uint8 (I, height, width, channels), or one file an image, or None for rows of a table, which show their columns.
    embeddings: float32 (I, d), of the model that gave the scores, or None. columns: what else is known of each, such as its device.
    Raises ConfigError if they do not fit together.
    """

    names: Sequence[str]
    scores: Array
    images: Array | Sequence[Path] | None = None
    embeddings: Array | None = None
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = {"scores": self.scores, "images": self.images, "embeddings": self.embeddings, **self.columns}
        if wrong := [f"{len(part)} {name}" for name, part in parts.items() if part is not None and len(part) != len(self.names)]:
            raise ConfigError(f"there are {len(self.names)} names, but {', '.join(wrong)}")
        if len(set(self.names)) < len(self.names):
            raise ConfigError("two images have the same name: labels are kept by name")
        if not bool(np.all((self.scores >= 0) & (self.scores <= 1))):
            raise ConfigError("scores must be probabilities, from 0 to 1")

    def of(self, index: int) -> dict[str, str]:
        """What the columns say of an image."""
        return {name: values[index] for name, values in self.columns.items()}


class Tally(msgspec.Struct, frozen=True):
    """So many images were looked at, unsure ones included, and so many anomalies found."""

    looked: int
    found: int

    @classmethod
    def of(cls, labels: Sequence[Label]) -> Tally:
        return cls(len(labels), sum(each.label == ANOMALY for each in labels))


class Yield(msgspec.Struct, frozen=True, kw_only=True):
    """What labelling has brought. search: images that came up by band or likeness; bands: all by score, from low to high; how: by the way.

    chance: of images in an order drawn by lot, as far as all of them are labelled, whatever brought them up, so that it does not suffer
    from anomalies that the search has taken away. low, high: its 95 % interval (Wilson). expected: the mean score, a guess until then.
    """

    search: Tally
    bands: list[tuple[float, float, Tally]]
    how: dict[How, Tally]
    chance: Tally
    low: float
    high: float
    expected: float


@dataclass(frozen=True)
class Shown:
    """An image that a window shows, by its index in the pool, and how it came up."""

    index: int
    how: How


class Queue:
    """Hands out the images of a pool to label, none twice, and two windows different ones. seed: of what is left to chance.

    In the mode "band", of ten images five are those with the highest scores in the band, four are any of the band, and one is any at all.
    In "similar" the next is the nearest by cosine to any confirmed anomaly; in "spot" any at all, counted apart.
    """

    def __init__(self, pool: Pool, labels: Labels, *, seed: int = 0) -> None:
        self.pool, self.labels = pool, labels
        self.index = {name: i for i, name in enumerate(pool.names)}
        self._likely = -pool.scores
        self._lots: dict[str, Array] = {how: _lots(pool.names, seed, how) for how in ("member", "random", "spot")}
        self._orders: dict[How, Array] = {"random": np.argsort(self._lots["random"]), "spot": np.argsort(self._lots["spot"])}
        self._unit = None if pool.embeddings is None else _unit(pool.embeddings)
        self._nearest: tuple[frozenset[int], Array] = (frozenset(), np.full(len(pool.names), -np.inf, np.float32))
        self._shown: OrderedDict[str, Shown] = OrderedDict()

    def next(self, window: str, mode: Mode = "band", band: Band = BAND) -> Shown | None:
        """The image for a window to show: the one it shows until that is labelled, if it fits; None if none is left."""
        showing = self._shown.get(window)
        if showing and self._fits(showing, mode, band):
            return showing
        self._shown.pop(window, None)
        others = [each.index for each in self._shown.values()]
        found = self._draw(mode, band, without=others) or self._draw(mode, band, without=[])
        if found:
            self._show(window, found)
        return found

    def label(self, window: str, file: str, label: int) -> Label:
        """Label the image that a window shows. Raises Refused if it shows another one or the image has a label by now."""
        shown = self._shown.get(window)
        if shown is None or self.pool.names[shown.index] != file:
            raise Refused(f"{file} is not what this window shows")
        given = self.labels.give(
            file,
            label,
            how=shown.how,
            score=float(self.pool.scores[shown.index]),
            window=window,
            digest=digest(self.pool, shown.index) if label != UNSURE else "",  # what cannot be read can be skipped
            columns=self.pool.of(shown.index),
        )
        del self._shown[window]
        return given

    def undo(self, window: str, file: str | None = None) -> Shown:
        """Take back a file's label, or this window's last one, and show its image again. Raises Refused if there is no such label."""
        mine = [each.file for each in self.labels.given.values() if each.window == window and each.file in self.index]
        if not (file or mine):
            raise Refused("this window has no label to take back")
        if file and file not in self.index:
            raise Refused(f"{file} is not one of these images")
        taken = self.labels.undo(file or mine[-1])
        shown = Shown(self.index[taken.file], taken.how)
        self._show(window, shown)
        return shown

    def progress(self, mode: Mode, band: Band) -> tuple[int, int]:
        """How many are labelled of how many: of the images in the band, of a week's spot checks, or of all."""
        if mode == "spot":
            week = datetime.now(UTC) - timedelta(days=7)
            spot = [each for each in self.labels.given.values() if each.how == "spot" and datetime.fromisoformat(each.when) > week]
            return len(spot), SPOT_CHECKS
        left = int(self._open(mode, band).sum())
        total = int(self._in(band).sum()) if mode == "band" else len(self.pool.names)
        return total - left, total

    def found(self) -> list[int]:
        """The confirmed anomalies of this pool, in the order in which they were found."""
        return [self.index[each.file] for each in self.labels.given.values() if each.label == ANOMALY and each.file in self.index]

    def tally(self) -> Yield:
        """What the labels of this pool have brought so far."""
        given = {self.index[each.file]: each for each in self.labels.given.values() if each.file in self.index}
        by_how: dict[How, Tally] = {
            how: Tally.of([each for each in given.values() if each.how == how]) for how in ("band", "similar", "random", "spot")
        }
        below_one = np.minimum(self.pool.scores, np.nextafter(1.0, 0.0))
        bands = [(low, high, Tally.of([each for i, each in given.items() if low <= below_one[i] < high])) for low, high in pairwise(_EDGES)]
        drawn = {i for how in self._orders for i in self._sample(how, given)}
        chance = Tally.of([given[i] for i in drawn])
        low, high = wilson(chance.found, chance.looked) if chance.looked else (0.0, 1.0)
        return Yield(
            search=Tally(by_how["band"].looked + by_how["similar"].looked, by_how["band"].found + by_how["similar"].found),
            bands=bands,
            how=by_how,
            chance=chance,
            low=low,
            high=high,
            expected=float(self.pool.scores.mean()) if len(self.pool.scores) else 0.0,
        )

    def check(self) -> None:
        """Raises ConfigError if an image of the pool was labelled under the same name when it was another image."""
        for name, label in self.labels.given.items():
            if name in self.index and label.digest not in ("", digest(self.pool, self.index[name])):
                raise ConfigError(
                    f"{name} is not the image that was labelled {label.when[:10]} under this name.",
                    hint="Give images of other days other names, or a folder of their own within the one that is labelled.",
                )

    def _show(self, window: str, shown: Shown) -> None:
        self._shown[window] = shown
        while len(self._shown) > _WINDOWS:
            self._shown.popitem(last=False)

    def _fits(self, shown: Shown, mode: Mode, band: Band) -> bool:
        if shown.how == "random":
            return mode == "band" and bool(self._unlabelled()[shown.index])
        return shown.how == mode and bool(self._open(mode, band)[shown.index])

    def _draw(self, mode: Mode, band: Band, *, without: Sequence[int]) -> Shown | None:
        open_ = self._open(mode, band)
        open_[list(without)] = False
        if not open_.any():
            return None
        if mode == "spot":
            return Shown(_first(self._lots["spot"], open_), "spot")
        if mode == "similar":
            return Shown(_first(-self._similarity(), open_), "similar")
        turn = sum(each.how in ("band", "random") for each in self.labels.given.values())
        if turn % _RANDOM_EVERY == _RANDOM_EVERY - 1:
            anybody = self._unlabelled()
            anybody[list(without)] = False
            return Shown(_first(self._lots["random"], anybody), "random")
        return Shown(_first(self._likely if turn % 2 == 0 else self._lots["member"], open_), "band")

    def _unlabelled(self) -> Array:
        labelled = [self.index[name] for name in self.labels.given if name in self.index]
        unlabelled = np.ones(len(self.pool.names), bool)
        unlabelled[labelled] = False
        return unlabelled

    def _open(self, mode: Mode, band: Band) -> Array:
        """bool (I,): which images a mode may show."""
        unlabelled = self._unlabelled()
        if mode == "band":
            return unlabelled & self._in(band)
        if mode == "similar":
            return unlabelled & np.isfinite(self._similarity())
        return unlabelled

    def _in(self, band: Band) -> Array:
        return (self.pool.scores >= band[0]) & (self.pool.scores <= band[1])

    def _similarity(self) -> Array:
        """float32 (I,): the cosine between each image's embedding and that of the nearest confirmed anomaly; -inf while there is none."""
        known, nearest = self._nearest
        confirmed = frozenset(self.found())
        if self._unit is None:
            return nearest
        if not known <= confirmed:
            known, nearest = frozenset(), np.full_like(nearest, -np.inf)
        for i in sorted(confirmed - known):
            nearest = np.maximum(nearest, self._unit @ self._unit[i])
        self._nearest = confirmed, nearest
        return nearest

    def _sample(self, how: How, given: Mapping[int, Label]) -> list[int]:
        """The images of an order drawn by lot, as far as all are labelled and the queue has drawn from it."""
        known = list(takewhile(given.__contains__, map(int, self._orders[how])))
        drawn = [n for n, i in enumerate(known) if given[i].how == how]
        return known[: drawn[-1] + 1] if drawn else []


def digest(pool: Pool, index: int) -> str:
    """BLAKE3 of an image's pixels or its file, as `blake3:` and 64 hexadecimal digits; empty for rows of a table."""
    from blake3 import blake3

    if pool.images is None:
        return ""
    image = pool.images[index]
    try:
        data = image.read_bytes() if isinstance(image, Path) else np.ascontiguousarray(image).tobytes()
    except OSError as error:
        raise Refused(f"{image} cannot be read: {error.strerror}") from error
    return f"blake3:{blake3(data).hexdigest()}"


def _first(rank: Array, among: Array) -> int:
    """The index with the lowest rank, among those."""
    return int(np.where(among, rank, np.inf).argmin())


def _lots(names: Sequence[str], seed: int, purpose: str) -> Array:
    """float64 (I,): a number from 0 to 1 for each name, by lot; the same one when other names come or go."""
    key = f"{seed}\0{purpose}\0"
    drawn = [int.from_bytes(blake2b((key + name).encode(), digest_size=8).digest(), "little") for name in names]
    return np.array(drawn, np.uint64) / 2.0**64


def _unit(embeddings: Array) -> Array:
    """Each row scaled to length 1."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit: Array = (embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return unit
