"""Python files of a user that add objectives, tasks or kernels to those of the package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from os.path import expanduser
from pathlib import Path


def load_plugins(plugins: Iterable[str]) -> None:
    """Imports each, a file or a module, once a process; it registers what it defines.

    It is a program of the user's, run as such: never load what a folder of somebody else's names. Raises ValueError
    naming `plugins` for what cannot be imported.
    """
    for plugin in plugins:
        try:
            _load_file(Path(expanduser(plugin))) if plugin.endswith(".py") else importlib.import_module(plugin)
        except Exception as error:  # whatever its code raises
            raise ValueError(f"plugins: {plugin} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> None:
    """Under the file's own name, by which other processes find its classes again: its folder is where they look."""
    name = path.stem
    known = sys.modules.get(name)
    if known is not None:
        if Path(known.__file__ or "").resolve() != path.resolve():
            raise ImportError(f"there is another module named {name}: rename the file")
        return
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
