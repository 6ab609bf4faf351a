"""What a site keeps of its gradient, so that many local steps do not pull it to its own optimum: SCAFFOLD's control variate and FedDyn's
gradient memory. The functions take arrays, or tensors of any framework, all of one shape, and change none of them."""

from __future__ import annotations

from typing import TypeVar

V = TypeVar("V")  # whatever can be added and scaled


def next_control(c_i: V, c: V, x: V, y: V, *, way: float) -> V:
    """The site's next control variate cᵢ⁺ = cᵢ − c + (x − yᵢ) / (K ηₗ): SCAFFOLD, Karimireddy et al., ICML 2020, Algorithm 1, option II.

    c_i, c: the site's and the server's control variates. x, y: the parameters received, and those after K local steps.
    way: K ηₗ, the sum of the learning rates of the local steps; above 0.
    """
    return c_i - c + (x - y) / way  # type: ignore[operator, no-any-return]


def next_memory(memory: V, received: V, trained: V, *, alpha: float) -> V:
    """The site's next gradient memory ∇Lₖ(θₖᵗ) = ∇Lₖ(θₖᵗ⁻¹) − α (θₖᵗ − θᵗ⁻¹): FedDyn, Acar et al., ICLR 2021, Algorithm 1."""
    return memory - alpha * (trained - received)  # type: ignore[operator, no-any-return]
