"""Weighted means of the sites' changes that are then made longer or shorter: the form of FedNova and q-FedAvg. Summed as updates come."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import numpy as np

from hanse.aggregation.form import (
    BLOCK,
    GREATEST,
    LEAST,
    Array,
    Form,
    as_real,
    is_float,
    is_weight,
    pieces,
    term_of,
    usable_metrics,
    where_of,
)
from hanse.aggregation.mean import WeightedMean
from hanse.errors import UpdateRejected
from hanse.messages.flmodel import FLModel, ParamsType
from hanse.messages.params import flatten, unflatten
from hanse.messages.update import Update


class RescaledMean:
    """Implements all of `Aggregator` but what a rule says: an update's weight, what to sum of it, and how long the mean becomes.

    Sums, checks and what an update must be are those of `WeightedMean`. FULL needs the task's model: the change is measured from there.
    """

    metrics_by: str = "equal"  # how metrics are weighed

    def __init__(self) -> None:
        self._begin(None)

    def _weigh(self, update: Update, where: str, origin: Mapping[str, Array]) -> tuple[float, tuple[float, ...]]:
        """The update's weight in the mean, and what is summed over the updates. Raises UpdateRejected if something is missing."""
        raise NotImplementedError

    def _factor(self, sums: tuple[float, ...]) -> float:
        """What the mean is multiplied by."""
        raise NotImplementedError

    def fresh(self, reference: FLModel | None = None) -> Self:
        new = copy.copy(self)
        new._begin(reference)
        return new

    def _begin(self, reference: FLModel | None) -> None:
        self._form: Form | None = None
        self._reference: dict[str, Array] = {}
        if reference is not None and reference.params is not None:
            self._form = Form.of(reference)
            self._reference = flatten(reference.params)[0]
        self._mean = WeightedMean("examples").fresh(reference)
        self._metrics = WeightedMean("examples" if self.metrics_by == "examples" else "equal")
        self._light: dict[str, tuple[Update, tuple[float, ...]]] = {}  # added and not folded: without params, and what to sum
        self._sums: tuple[float, ...] = ()
        self._result: FLModel | None = None

    def add(self, update: Update) -> None:
        where = where_of(update)
        origin: Mapping[str, Array] = {}
        if update.model.params is not None:
            term = term_of(update, where, "", 1.0)
            if self._form is not None:
                self._form.check(term)
            if update.model.params_type is ParamsType.FULL:
                if self._form is None:
                    raise UpdateRejected(
                        f"{where}: it sent FULL, and the model it started from is not known.",
                        hint="Give the recipe a first model, or send DIFF.",
                    )
                origin = self._reference
        weight, summed = self._weigh(update, where, origin)
        if not is_weight(weight):
            raise UpdateRejected(f"{where}: its weight is {weight!r}: it must lie between {LEAST} and {GREATEST}.")
        usable_metrics(update.model, 1.0, where)
        self._mean.add(replace(update, model=replace(update.model, metrics={}, meta={**update.model.meta, "examples": weight})))
        self._light[update.site] = (
            replace(update, model=replace(update.model, params=None)),
            summed if update.model.params is not None else (),
        )

    def fold(self) -> dict[str, UpdateRejected]:
        rejected = self._mean.fold()
        for site, (light, summed) in sorted(self._light.items()):
            if site not in rejected:
                self._metrics.add(light)
                self._add_sums(summed)
        self._light = {}
        self._metrics.fold()
        return rejected

    def _add_sums(self, summed: tuple[float, ...]) -> None:
        if summed:
            before = self._sums or (0.0,) * len(summed)
            self._sums = tuple(one + other for one, other in zip(before, summed, strict=True))

    def partial(self) -> FLModel:
        mean, metrics = self._mean.partial(), self._metrics.partial()
        return replace(mean, meta={"mean": mean.meta, "metrics": metrics.meta, "sums": list(self._sums)})

    def merge(self, partial: FLModel) -> None:
        self._mean.merge(replace(partial, meta=partial.meta["mean"]))
        self._metrics.merge(FLModel(meta=partial.meta["metrics"]))
        self._add_sums(tuple(partial.meta["sums"]))

    def result(self) -> FLModel:
        if self._result is not None:
            return self._result
        for rejected in self.fold().values():
            raise rejected
        mean, metrics = self._mean.result(), self._metrics.result().metrics
        params = mean.params
        if params is not None:
            arrays, structure = flatten(params)
            rescale(arrays, self._factor(self._sums), self._reference if mean.params_type is ParamsType.FULL else {})
            params = unflatten(arrays, structure)
        self._result = FLModel(params, mean.params_type, metrics=metrics)
        return self._result


def rescale(means: Mapping[str, Array], factor: float, origin: Mapping[str, Array]) -> None:
    """Make the floating-point tensors of `means` origin + factor · (mean - origin), in place; where there is no origin it is 0.

    Raises UpdateRejected if one overflows.
    """
    if factor == 1:
        return
    for name, mean in means.items():
        if not (is_float(mean.dtype) or mean.dtype.kind == "c"):
            continue
        wide = np.result_type(np.float32, mean.dtype) if mean.dtype.kind in "fc" else np.dtype(np.float32)
        flat = mean.reshape(-1)
        start = origin[name].reshape(-1) if name in origin else None
        with np.errstate(all="ignore"):
            for block in pieces(flat, BLOCK):
                change = flat[block].astype(wide)
                if start is not None:
                    change -= start[block].astype(wide)
                change *= wide.type(factor)
                if start is not None:
                    change += start[block].astype(wide)
                flat[block] = change
                if not np.isfinite(flat[block]).all():
                    raise UpdateRejected(f"tensor {name!r} overflows {mean.dtype} when its mean change is multiplied by {factor:.3g}")


def squared_norm(arrays: Mapping[str, Array], origin: Mapping[str, Array]) -> float:
    """‖array - origin‖² over the floating-point tensors, in float64; where there is no origin it is 0."""
    total = 0.0
    for name, array in arrays.items():
        if not (is_float(array.dtype) or array.dtype.kind == "c"):
            continue
        flat = array.reshape(-1)
        start = origin[name].reshape(-1) if name in origin else None
        wide = np.complex128 if array.dtype.kind == "c" else np.float64
        with np.errstate(all="ignore"):
            for block in pieces(flat, BLOCK):
                change = flat[block].astype(wide)
                if start is not None:
                    change -= start[block].astype(wide)
                total += float(np.square(as_real(change)).sum())
    return total
