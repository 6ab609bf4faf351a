"""Where a recipe runs: `SimEnv` simulates, `PocEnv` starts a federation on this machine, `ProdEnv` uses a real one.

The names are loaded when they are first used: a simulation loads nothing of the network, and no certificates.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hanse.environments.poc import PocEnv as PocEnv
    from hanse.environments.production import ProdEnv as ProdEnv
    from hanse.environments.simulation import SimEnv as SimEnv
    from hanse.environments.simulation import resume as resume

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # what its core notes of each connection is for a server's log, not for a person's screen

_HOME_OF = {"PocEnv": "poc", "ProdEnv": "production", "SimEnv": "simulation", "resume": "simulation"}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hanse.environments' has no attribute {name!r}")
    return getattr(import_module(f"hanse.environments.{_HOME_OF[name]}"), name)
