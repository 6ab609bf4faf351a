"""A window of inputs as sums alone, and what it comes to when it is held against a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from hanse.finetuning.reference import Reference
from hanse.statistics import drift
from hanse.statistics.label_shift import new_shares, standard_error
from hanse.statistics.paired import holm

Array = np.ndarray[Any, np.dtype[Any]]

_NAMED = 3  # slices
_VALUES = 50  # of a slice column, in a window


class Sums(msgspec.Struct, kw_only=True):
    """Inputs, as sums. embedded, decided_positive: how many. cells: counts, shape (c,). features: sum of Fourier features, shape (f,).

    slices: the same for the inputs of each slice, by column and value; of more than 50 values in a column, the first that came.
    """

    inputs: int = 0
    embedded: int = 0
    decided_positive: int = 0
    cells: np.ndarray[Any, Any]
    features: np.ndarray[Any, Any]
    slices: dict[str, dict[str, Sums]] = msgspec.field(default_factory=dict)

    def add(self, other: Sums) -> None:
        self.inputs += other.inputs
        self.embedded += other.embedded
        self.decided_positive += other.decided_positive
        self.cells = self.cells + other.cells
        self.features = self.features + other.features
        for column, values in other.slices.items():
            mine = self.slices.setdefault(column, {})
            for value, sums in values.items():
                if value in mine:
                    mine[value].add(sums)
                elif len(mine) < _VALUES:
                    mine[value] = msgspec.structs.replace(sums)

    @property
    def distribution(self) -> Array:
        """Of the scores on the reference's cells."""
        return np.asarray(np.cumsum(self.cells) / self.inputs)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a window comes to; it stays here.

    ks, mmd2: the distances to the reference (mmd2 None without embeddings), with the smallest calibrated level that each reaches.
    psi: over ten bins; nothing depends on it. mean_decided: share decided positive. positives: share of positives by black box shift
    estimation, with its standard error. differs: whether it counts towards an alarm.
    """

    window: int
    inputs: int
    ks: float
    ks_level: float
    mmd2: float | None
    mmd2_level: float | None
    psi: float
    decided_positive: float
    positives: float
    positives_error: float
    differs: bool


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """A slice of the inputs behind an alarm, such as one device, with its distances to the reference: `ks` to the same slice of the holdout
    if that is known. mmd2 is None without embeddings."""

    column: str
    value: str
    inputs: int
    ks: float
    mmd2: float | None


def nothing(known: Reference) -> Sums:
    """The sums of no inputs."""
    return Sums(cells=np.zeros(known.scores.shape[1]), features=np.zeros(known.embeddings.shape[1]))


def sums_of(known: Reference, scores: Array, embeddings: Array | None, columns: Mapping[str, Sequence[str]]) -> Sums:
    """The sums of these inputs. scores: shape (n,). embeddings: shape (n, d), or None. columns: slices, n values each."""
    sums = nothing(known)
    sums.inputs = len(scores)
    sums.decided_positive = int((scores >= known.threshold).sum())
    sums.cells = np.bincount(drift.cells(scores, known.sketch), minlength=sums.cells.size).astype(np.float64)
    if embeddings is not None and known.dimension:
        sums.embedded = len(scores)
        sums.features = drift.fourier_features(embeddings, known.frequencies).sum(0, dtype=np.float64)
    for column, values in columns.items():
        places = {value: np.flatnonzero(np.asarray(values) == value) for value in list(dict.fromkeys(values))[:_VALUES]}
        sums.slices[column] = {
            value: sums_of(known, scores[rows], None if embeddings is None else embeddings[rows], {}) for value, rows in places.items()
        }
    return sums


def figures(known: Reference, sums: Sums, *, positives: float | None, level: float, window: int = 0) -> Figures:
    """What the sums come to, held against the reference with that share of positives (None: its own). level: for `differs`."""
    observed, expected = sums.distribution, known.mixture(known.scores, positives)
    ks, mmd2 = drift.kolmogorov_smirnov(observed, expected), _mmd2(known, sums, positives)
    levels = {"ks": drift.reached_level(ks, sums.inputs, known.sizes, known.ks, known.levels)}
    if mmd2 is not None:
        levels["mmd2"] = drift.reached_level(mmd2, sums.inputs, known.sizes, known.mmd, known.levels)
    decided, confusion = np.array([sums.inputs - sums.decided_positive, sums.decided_positive]), np.array(known.confusion)
    ends = np.linspace(0, observed.size - 1, 11).astype(int)[1:]
    bins = [np.diff(function[ends], prepend=0) for function in (expected, observed)]
    return Figures(
        window=window,
        inputs=sums.inputs,
        ks=ks,
        ks_level=levels["ks"],
        mmd2=mmd2,
        mmd2_level=levels.get("mmd2"),
        psi=drift.psi(*bins),
        decided_positive=sums.decided_positive / sums.inputs,
        positives=float(new_shares(confusion, decided)[1]),
        positives_error=standard_error(confusion, decided),
        differs=min(holm(levels).values()) <= level,
    )


def moved(known: Reference, sums: Sums, *, positives: float | None) -> list[Moved]:
    """The three slices that moved most: by √inputs · ks or inputs · mmd2, each in units of its threshold for the smallest window."""
    found = []
    for column, values in sums.slices.items():
        for value, part in values.items():
            before = known.slices.get(column, {}).get(value, known.mixture(known.scores, positives))
            ks, mmd2 = drift.kolmogorov_smirnov(part.distribution, before), _mmd2(known, part, positives)
            share = part.inputs / known.sizes[0]
            far = max(ks * math.sqrt(share) / known.ks[0, -1], 0.0 if mmd2 is None else mmd2 * share / known.mmd[0, -1])
            found.append((far, Moved(column=column, value=value, inputs=part.inputs, ks=ks, mmd2=mmd2)))
    return [each for _, each in sorted(found, key=lambda pair: -pair[0])[:_NAMED]]


def _mmd2(known: Reference, sums: Sums, positives: float | None) -> float | None:
    """None unless all inputs have embeddings."""
    if not known.dimension or sums.embedded < sums.inputs:
        return None
    return drift.mmd2(sums.features / sums.inputs, known.mixture(known.embeddings, positives))


def encode_arrays(value: Any) -> Any:
    """For msgspec's encoders: arrays as lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise NotImplementedError


def decode_arrays(kind: Any, value: Any) -> Any:
    """For msgspec's decoders: lists of numbers as float64 arrays."""
    if getattr(kind, "__origin__", kind) is np.ndarray:
        return np.asarray(value, np.float64)
    raise NotImplementedError
