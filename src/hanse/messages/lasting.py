"""Files that are never written again: what is read from them may be kept as long as one likes, and takes no memory of its own."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np


class LastingMap(mmap.mmap):
    """The mapping of a file that stays as it is while the mapping lives, such as a blob's."""


def lasting_map(array: np.ndarray[Any, np.dtype[Any]]) -> LastingMap | None:
    """The mapping that the array is a view of; None if it is a view of something else."""
    owner: Any = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    return owner if isinstance(owner, LastingMap) else None
