"""Does a model err more than it did? Tests on the errors that labels show, one after the other or in a lot."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PageHinkley:
    """The test of Page and Hinkley for a rise of a mean, as far as it has come; `after` takes the next value.

    Page, Continuous Inspection Schemes, Biometrika 41, 1954; in this form Gama et al., A Survey on Concept Drift Adaptation, ACM Computing
    Surveys 46, 2014, §3.2: m_t = Σ (x_i − mean_i − delta), and a rise is found when m_t − min m exceeds `limit`.

    delta: a rise of the mean that does not matter. limit: λ; larger is later and surer. count, mean: of the values so far.
    total: m_t. lowest: min m.
    """

    delta: float = 0.01
    limit: float = 5.0
    count: int = 0
    mean: float = 0.0
    total: float = 0.0
    lowest: float = 0.0

    def after(self, value: float) -> PageHinkley:
        """With one value more: 1 for an error and 0 for none, or any other number."""
        count = self.count + 1
        mean = self.mean + (value - self.mean) / count
        total = self.total + value - mean - self.delta
        lowest = min(self.lowest, total)
        return PageHinkley(delta=self.delta, limit=self.limit, count=count, mean=mean, total=total, lowest=lowest)

    @property
    def height(self) -> float:
        """m_t − min m, what `limit` is for."""
        return self.total - self.lowest

    @property
    def rose(self) -> bool:
        return self.height > self.limit


def binomial_upper(errors: int, n: int, rate: float) -> float:
    """P(X ≥ errors) for X ~ Binomial(n, rate): the exact p-value of so many errors or more if the rate is not above `rate`."""
    if errors <= 0:
        return 1.0
    if rate <= 0:
        return 0.0
    if rate >= 1:
        return 1.0
    whole, hit, miss = math.lgamma(n + 1), math.log(rate), math.log1p(-rate)
    terms = (math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * hit + (n - k) * miss) for k in range(errors, n + 1))
    return min(1.0, math.fsum(terms))
