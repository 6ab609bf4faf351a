"""What a drift watch compares with: statistics of the vendor's holdout under one version, and nothing else of it.

The vendor makes one for each version and hands it to the client, who needs no row of the holdout then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import blake3
import msgspec
import numpy as np

from hanse.errors import ConfigError, WireError
from hanse.messages.codec import encode, write
from hanse.messages.codec import read as read_frame
from hanse.messages.flmodel import FLModel
from hanse.seeds import generator
from hanse.statistics import drift

Array = np.ndarray[Any, np.dtype[Any]]

REFERENCE = "reference.safetensors"
SIZES = (50, 100, 200, 500)
LEVELS = (0.05, 0.02, 0.01, 0.005, 0.0025, 0.001)
RESAMPLES = 2000
LARGEST_HOLDOUT = 10_000
FEWEST = 100
"""So many rows each class, and each slice that is described by itself, must have."""

_ARRAYS = ("sketch", "scores", "embeddings", "ks", "mmd", "slices")


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """Statistics of a holdout under a version; about 2,300 numbers (18 kB) and 401 for each slice. c = 401 cells, f = 512 features.

    threshold: the version's. model: the version's digest, or empty. seed: of the frequencies and of the calibration.
    confusion: counts; row: what was decided, column: the true class.
    bandwidth: of the kernel on embeddings. dimension: numbers in an embedding; 0: there are none.
    sizes, levels: of windows and of false alarms, for which `ks` and `mmd` hold the thresholds, float64, shape (sizes, levels).
    sketch: 200 quantiles of the scores. scores: float64, shape (2, c), each class's distribution function on the sketch's cells.
    embeddings: float32, shape (2, f), each class's mean of Fourier features. slices: by column and value the distribution function, (c,).
    """

    threshold: float
    seed: int
    confusion: tuple[tuple[int, int], tuple[int, int]]
    sizes: tuple[int, ...]
    levels: tuple[float, ...]
    bandwidth: float = 1.0
    dimension: int = 0
    model: str = ""
    sketch: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    embeddings: np.ndarray[Any, Any]
    ks: np.ndarray[Any, Any]
    mmd: np.ndarray[Any, Any]
    slices: dict[str, dict[str, np.ndarray[Any, Any]]] = {}

    def __post_init__(self) -> None:
        cells = 2 * self.sketch.size + 1
        grid = (len(self.sizes), len(self.levels))
        expected = {"scores": (2, cells), "embeddings": (2, drift.FEATURES if self.dimension else 0), "ks": grid, "mmd": grid}
        if wrong := [name for name, shape in expected.items() if getattr(self, name).shape != shape]:
            raise ValueError(f"{wrong[0]} has the shape {getattr(self, wrong[0]).shape}, not {expected[wrong[0]]}")
        if any(function.shape != (cells,) for values in self.slices.values() for function in values.values()):
            raise ValueError(f"a slice's distribution function does not have {cells} numbers")
        if list(self.sizes) != sorted(set(self.sizes)) or not self.sizes or self.sizes[0] < 1:
            raise ValueError("sizes must rise")
        if any(not np.isfinite(array).all() for array in (self.sketch, self.scores, self.embeddings, self.ks, self.mmd)):
            raise ValueError("a statistic is not finite")

    def __repr__(self) -> str:
        return f"Reference({self.digest})"

    @property
    def positives(self) -> float:
        """The share of the positive class."""
        (_, missed), (_, found) = self.confusion
        return (missed + found) / sum(map(sum, self.confusion))

    @property
    def errors(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Wrong decisions and rows, of the negative class (FPR) and of the positive (FNR)."""
        (right, missed), (wrong, found) = self.confusion
        return (wrong, right + wrong), (missed, missed + found)

    @cached_property
    def frequencies(self) -> Array:
        return drift.frequencies(self.seed, self.dimension, self.bandwidth)

    @cached_property
    def digest(self) -> str:
        return f"blake3:{blake3.blake3(b''.join(encode(*self._frame()))).hexdigest()}"

    def mixture(self, of: Array, positives: float | None = None) -> Array:
        """`scores` or `embeddings` of data with that share of positives, by default the holdout's own."""
        share = self.positives if positives is None else positives
        return np.asarray((1 - share) * of[0].astype(np.float64) + share * of[1])

    def write(self, path: Path) -> None:
        """Write it as one safetensors file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, *self._frame())

    def _frame(self) -> tuple[FLModel, dict[str, Any]]:
        about = {name: getattr(self, name) for name in self.__struct_fields__ if name not in _ARRAYS}
        return FLModel(params={name: getattr(self, name) for name in _ARRAYS}), {"reference": msgspec.to_builtins(about)}


def read_reference(path: Path) -> Reference:
    """Raises ConfigError that names the file, if there is none or it is something else."""
    try:
        model, fields = read_frame(path)
        about: Any = fields["reference"]
        return msgspec.convert({**about, **model.params, "confusion": tuple(map(tuple, about["confusion"]))}, Reference)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", hint="The vendor makes it with `hanse finetune watch-reference`."
        ) from error
    except (WireError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no reference for a drift watch: {error}") from error


def reference(
    scores: Array,
    labels: Array,
    embeddings: Array | None,
    threshold: float,
    *,
    seed: int,
    slices: Mapping[str, Sequence[str]] | None = None,
    model: str = "",
    sizes: Sequence[int] = SIZES,
    resamples: int = RESAMPLES,
) -> Reference:
    """The reference of a holdout, at the vendor. Of more than 10,000 rows, 10,000 are drawn.

    scores: float64, shape (n,), in 0…1. labels: shape (n,), 0 or 1. embeddings: float, shape (n, d), or None. slices: column names to n
    values each; a value with fewer than 100 rows is left out, so that no row can be read off. model: digest of the version.
    Raises: ConfigError if the arrays do not fit, a class has fewer than 100 rows, or decisions tell nothing about the class.
    """
    rng = generator(seed, "drift", "calibration")
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    _check(scores, labels, embeddings, slices or {})
    if len(scores) > LARGEST_HOLDOUT:
        drawn = rng.choice(len(scores), LARGEST_HOLDOUT, replace=False)
        scores, labels, embeddings = scores[drawn], labels[drawn], None if embeddings is None else np.asarray(embeddings)[drawn]
        slices = {column: [values[row] for row in drawn] for column, values in (slices or {}).items()}
    decided, true = scores >= threshold, labels == 1
    confusion = (
        (int((~decided & ~true).sum()), int((~decided & true).sum())),
        (int((decided & ~true).sum()), int((decided & true).sum())),
    )
    if decided[true].mean() - decided[~true].mean() < 0.05:
        raise ConfigError(
            f"at the threshold {threshold:g} the model does not tell the holdout's classes apart: nothing can be watched with it"
        )

    sketch = drift.quantile_sketch(scores)
    steps = drift.steps(scores, sketch)
    features, bandwidth, dimension = None, 1.0, 0
    if embeddings is not None:
        dimension, bandwidth = np.shape(embeddings)[1], drift.median_distance(embeddings, rng=rng)
        features = drift.fourier_features(embeddings, drift.frequencies(seed, dimension, bandwidth))
    ks, mmd = drift.calibrate(steps, features, sizes=sizes, levels=LEVELS, resamples=resamples, rng=rng)
    by_class = [~true, true]
    return Reference(
        threshold=float(threshold),
        seed=seed,
        confusion=confusion,
        sizes=tuple(sizes),
        levels=LEVELS,
        bandwidth=bandwidth,
        dimension=dimension,
        model=model,
        sketch=sketch,
        scores=np.stack([steps[rows].mean(0, dtype=np.float64) for rows in by_class]),
        embeddings=np.stack([np.zeros(0, np.float32) if features is None else features[rows].mean(0) for rows in by_class]),
        ks=ks,
        mmd=mmd,
        slices={column: _by_value(values, steps) for column, values in (slices or {}).items()},
    )


def _by_value(values: Sequence[str], steps: Array) -> dict[str, Array]:
    """Each value's distribution function, where enough rows have it."""
    found, counts = np.unique(np.asarray(values), return_counts=True)
    enough = [str(value) for value, count in zip(found, counts, strict=True) if count >= FEWEST]
    return {value: steps[np.asarray(values) == value].mean(0, dtype=np.float64) for value in enough}


def _check(scores: Array, labels: Array, embeddings: Array | None, slices: Mapping[str, Sequence[str]]) -> None:
    lengths = {"labels": labels, **slices} | ({} if embeddings is None else {"embeddings": embeddings})
    if scores.ndim != 1 or (wrong := next((name for name, values in lengths.items() if len(values) != len(scores)), "")):
        raise ConfigError(f"there are {scores.shape} scores, and not as many {wrong or 'in one row'}")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ConfigError("a score of the holdout is not in 0…1")
    if embeddings is not None and (np.ndim(embeddings) != 2 or not np.isfinite(embeddings).all()):
        raise ConfigError("the embeddings are not one row of finite numbers for each score")
    for label in (0, 1):
        if (count := int((labels == label).sum())) < FEWEST:
            raise ConfigError(f"{count} rows of the holdout have the label {label}: a reference needs {FEWEST} of each class")
    if not np.isin(labels, (0, 1)).all():
        raise ConfigError("a label of the holdout is neither 0 nor 1")
