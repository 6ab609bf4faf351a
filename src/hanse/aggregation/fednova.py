"""FedNova (Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Mapping

from hanse.aggregation.form import Array, weight_of
from hanse.aggregation.rescaled import RescaledMean
from hanse.errors import ConfigError
from hanse.messages.update import Update


class FedNova(RescaledMean):
    """Sites that took more local steps do not count for more: each change is divided by its steps first (Wang et al., 2020, eq. 6 and 7).

    momentum: of the sites' local SGD, ρ in the paper: then an update's length grows faster than its steps, and it is divided by
        ‖a‖ = (τ - ρ (1 - ρ^τ) / (1 - ρ)) / (1 - ρ) instead of τ (section 4).

    An update's meta must have `steps`, τ, and `examples`, from which p = examples / all examples. The result is Σ p ‖a‖ · Σ p Δ / ‖a‖. With
    the same steps everywhere that is FedAvg. FULL needs the task's model. Integers and booleans are averaged with weights p / ‖a‖.
    Metrics are averaged by examples. A tensor that some sites left out is stretched like the others.
    """

    metrics_by = "examples"

    def __init__(self, momentum: float = 0.0) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum is {momentum!r}: it must be at least 0 and below 1")
        self.momentum = momentum
        super().__init__()

    def _weigh(self, update: Update, where: str, origin: Mapping[str, Array]) -> tuple[float, tuple[float, ...]]:
        _, examples = weight_of(update, "examples", where)
        _, steps = weight_of(update, "steps", where)
        rho = self.momentum
        norm = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)  # ‖a‖₁ in the paper
        return examples / norm, (examples, examples * norm, examples / norm)

    def _factor(self, sums: tuple[float, ...]) -> float:
        examples, lengths, weights = sums
        return lengths / examples * (weights / examples)  # τ_eff, and from the mean by n / ‖a‖ to the sum of p / ‖a‖
