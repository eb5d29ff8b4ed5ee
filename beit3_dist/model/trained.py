"""Which parameters a run trains, told by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from beit3_dist.config import require


def trained_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Those of the parameters' canonical names that `patterns` (`train_only`) leave trained; all where there are none.

    A pattern is fnmatch's. A name trains where it matches a plain pattern, or where there is no plain one, and no
    pattern behind a `!`. Raises ValueError for a pattern that matches nothing, and where nothing would train or
    nothing would be frozen.
    """
    names = set(names)
    if not patterns:
        return names
    matching = {p: {name for name in names if fnmatchcase(name, p.removeprefix("!"))} for p in patterns}
    for pattern, found in matching.items():
        require(
            bool(found),
            f"train_only: {pattern!r} matches no parameter; they are named as {min(names)} and {max(names)}",
        )
    plain = [found for pattern, found in matching.items() if not pattern.startswith("!")]
    chosen = names.intersection(set().union(*plain)) if plain else set(names)
    chosen -= set().union(*(found for pattern, found in matching.items() if pattern.startswith("!")))
    told = f"train_only={list(patterns)}"
    require(bool(chosen), f"{told} leaves nothing to train: what stands behind a ! freezes all that the others name")
    require(chosen != names, f"{told} freezes nothing: leave it out to train everything")
    return chosen


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leaves the parameters without gradient that `patterns` do not leave trained. Raises ValueError as
    `trained_names` does."""
    trained = trained_names((name for name, _ in model.named_parameters()), patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
