"""BEiT-3 pretraining in the open."""

from typing import Any

__version__ = "0.1.0"

_PLACES = {"pretrain": "session", "read_config": "session", "RunConfig": "config", "Model": "inference"}
"""Public name -> its module, which is imported when the name is first used: torch takes seconds."""
__all__ = list(_PLACES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
