"""The optimizers by their names."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from beit3_dist.config import OptimConfig, require
from beit3_dist.optimizers.adamw import AdamW
from beit3_dist.optimizers.base import Optimizer
from beit3_dist.optimizers.lamb import Lamb
from beit3_dist.optimizers.lion import Lion
from beit3_dist.optimizers.muon import Muon

BUILT_IN: list[type[Optimizer]] = [AdamW, Lion, Lamb, Muon]
OPTIMIZERS: dict[str, type[Optimizer]] = {optimizer.name: optimizer for optimizer in BUILT_IN}
"""By name: what `optim.name` may be."""

Kind = TypeVar("Kind", bound=type[Optimizer])


def register(optimizer: Kind) -> Kind:
    """Makes an optimizer known; to be used as a decorator. Raises ValueError where its name is taken."""
    require(optimizer.name not in OPTIMIZERS, f"there are two optimizers named {optimizer.name}")
    OPTIMIZERS[optimizer.name] = optimizer
    return optimizer


def chosen(config: OptimConfig) -> type[Optimizer]:
    """The optimizer of a config. Raises ValueError where there is none of its name."""
    known = f"only {', '.join(OPTIMIZERS)}; the file that defines another one is named by plugins"
    require(config.name in OPTIMIZERS, f"optim.name: there is no optimizer {config.name}, {known}")
    return OPTIMIZERS[config.name]


def described(optimizer: torch.optim.Optimizer) -> type[Optimizer]:
    """What describes an optimizer that has been built."""
    return next(kind for kind in OPTIMIZERS.values() if kind.made(optimizer))


def check_optimizer(config: OptimConfig, deepspeed: dict[str, Any]) -> None:
    """Raises ValueError where there is no such optimizer, or where it cannot do what the config or DeepSpeed's settings
    want of it."""
    optimizer = chosen(config)
    optimizer.check(config)
    require(
        optimizer.offloads or "offload_optimizer" not in deepspeed["zero_optimization"],
        f"deepspeed_config: offload_optimizer moves the optimizer's state to the CPU, where optim.name={config.name} "
        "does not step: leave it out, or use optim.name=adamw",
    )
