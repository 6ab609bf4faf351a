"""Vendor–client fine-tuning: a vendor improves a model on data that never leaves its client, and proves that it got no worse.

The names below are loaded when they are first used. What `hanse finetune` does, they do too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hanse.finetuning.check import check_folder as check_folder
    from hanse.finetuning.contract import Gate as Gate
    from hanse.finetuning.contract import Learning as Learning
    from hanse.finetuning.contract import Model as Model
    from hanse.finetuning.contract import Party as Party
    from hanse.finetuning.contract import Project as Project
    from hanse.finetuning.contract import Schema as Schema
    from hanse.finetuning.contract import read_project as read_project
    from hanse.finetuning.contract import write_project as write_project
    from hanse.finetuning.history import History as History
    from hanse.finetuning.init import invite as invite
    from hanse.finetuning.recipe import DeliveryRecipe as DeliveryRecipe
    from hanse.finetuning.recipe import FinetuneRecipe as FinetuneRecipe
    from hanse.finetuning.report import write_report as write_report
    from hanse.finetuning.run import deliver as deliver
    from hanse.finetuning.run import fine_tune as fine_tune
    from hanse.finetuning.versions import Version as Version
    from hanse.finetuning.versions import Versions as Versions
    from hanse.finetuning.watch import Watch as Watch

_HOMES = {
    "check": ("check_folder",),
    "contract": ("Gate", "Learning", "Model", "Party", "Project", "Schema", "read_project", "write_project"),
    "history": ("History",),
    "init": ("invite",),
    "recipe": ("DeliveryRecipe", "FinetuneRecipe"),
    "report": ("write_report",),
    "run": ("deliver", "fine_tune"),
    "versions": ("Version", "Versions"),
    "watch": ("Watch",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
