"""Packages that only some uses need, and that may be missing."""

from __future__ import annotations

import importlib
from typing import Any

from beit3_dist.opening import one_line


def optional_module(name: str, use: str, remedy: str) -> Any:
    """Imports a module of such a package. Where that fails, raises ValueError that says which `use` needs it, and the
    `remedy`."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # torchvision raises RuntimeError beside another torch
        package, reason = name.partition(".")[0], one_line(error, 200)
        raise ValueError(f"{use} needs {package}, which cannot be imported ({reason}): {remedy}") from None
