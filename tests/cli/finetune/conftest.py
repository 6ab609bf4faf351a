"""A vendor and a client, and their people's kits, as the tests of `hanse.finetuning` have them."""

from __future__ import annotations

from tests.finetuning.conftest import kits
from tests.finetuning.run.conftest import base_weights, pair

__all__ = ["base_weights", "kits", "pair"]
