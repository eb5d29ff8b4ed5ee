"""NVIDIA Apex, when it is really there.

Apex is built from source; the package of that name on the public index is something else. A function counts as
present only if its module imports and has it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def apex_function(module: str, name: str) -> Callable[..., Any] | None:
    """`name` of an Apex module (e.g. "apex.optimizers", "FusedAdam"), or None where NVIDIA's Apex is not installed."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
