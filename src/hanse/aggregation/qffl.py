"""q-FedAvg, which solves q-FFL (Li et al., Fair Resource Allocation in Federated Learning, ICLR 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hanse.aggregation.form import LEAST, Array
from hanse.aggregation.rescaled import RescaledMean, squared_norm
from hanse.errors import ConfigError, UpdateRejected
from hanse.messages.params import flatten
from hanse.messages.update import Update


class QFFL(RescaledMean):
    """Sites where the model does badly count for more (Li et al., ICLR 2020, Algorithm 2, q-FedAvg).

    q: how much more; 0 is the plain mean of the sites.
    learning_rate: of the sites' local training, 1 / L in the paper.
    metric: the name of the loss in an update's metrics, F in the paper: of the model the site received, on its training data.

    The result changes the model by Σ L F^q Δ / Σ h with h = q F^(q-1) ‖L Δ‖² + L F^q. Every site counts the same, whatever its examples;
    so do its metrics. The loss is taken to be 1e-10 above what the site says, as 0 has no power below 0.
    FULL needs the task's model. Integers and booleans are averaged with weights F^q.
    """

    def __init__(self, q: float = 1.0, learning_rate: float = 0.1, metric: str = "loss") -> None:
        if not 0 <= q < np.inf:
            raise ConfigError(f"q is {q!r}: it must be a finite number of at least 0")
        if not 0 < learning_rate < np.inf:
            raise ConfigError(f"learning_rate is {learning_rate!r}: it must be a finite number above 0")
        self.q = q
        self.learning_rate = learning_rate
        self.metric = metric
        super().__init__()

    def _weigh(self, update: Update, where: str, origin: Mapping[str, Array]) -> tuple[float, tuple[float, ...]]:
        loss = update.model.metrics.get(self.metric)
        if loss is None or not 0 <= float(loss) < np.inf:
            raise UpdateRejected(
                f"{where}: its metric {self.metric!r} is {loss!r}: q-FFL needs the loss, a finite number of at least 0.",
                hint=f'Send FLModel(..., metrics={{"{self.metric}": loss of the model received}}).',
            )
        F, L = float(loss) + 1e-10, 1 / self.learning_rate
        params = update.model.params
        square = 0.0 if params is None else squared_norm(flatten(params)[0], origin)
        weight = max(LEAST, F**self.q)
        return weight, (weight, self.q * F ** (self.q - 1) * L * square + weight)

    def _factor(self, sums: tuple[float, ...]) -> float:
        weights, h = sums
        return weights / h
