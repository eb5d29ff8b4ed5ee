"""A run's optimizer with the decay groups of BEiT: matrices and word vectors decay; biases, norms, tokens and positions
do not. Where the optimizer has parts (optimizers/base.py), each group is one part's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from beit3_dist.config import OptimConfig, RunConfig
from beit3_dist.optimizers.adamw import AdamW
from beit3_dist.optimizers.base import PART, Optimizer
from beit3_dist.optimizers.registry import chosen


def decays(name: str, shape: torch.Size) -> bool:
    """Whether weight decay applies to a parameter of this canonical name and (whole) shape."""
    return len(shape) > 1 and not name.endswith("positions")


def decays_in_fine_tuning(name: str, shape: torch.Size) -> bool:
    """As `decays`, but text positions decay too: unilm's fine-tuning spares only image positions. (It also decays the
    mask token, which no task shows to the model.)"""
    return decays(name, shape) or name == "language_embedding.positions"


Decays = Callable[[str, torch.Size], bool]
"""Canonical name and whole shape of a parameter -> whether weight decay applies to it."""


def parameter_groups(model: nn.Module, weight_decay: float, optimizer: type[Optimizer] = AdamW) -> list[dict[str, Any]]:
    """The decayed and the undecayed parameters, in the model's order, of each part of the optimizer."""
    return _decayed_and_not(model.named_parameters(), weight_decay, optimizer, decays)


def _decayed_and_not(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, optimizer: type[Optimizer], decays: Decays
) -> list[dict[str, Any]]:
    # Under ZeRO-3 a parameter is empty here; `ds_shape` is its whole shape.
    shape = lambda p: getattr(p, "ds_shape", p.shape)  # noqa: E731
    parts: dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            both = parts.setdefault(optimizer.part(name, shape(parameter)), ([], []))
            both[not decays(name, shape(parameter))].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": own} | ({PART: part} if part else {})
        for part, both in parts.items()
        for parameters, own in zip(both, (weight_decay, 0.0), strict=True)
    ]
    return [group for group in groups if group["params"]]


def layered_groups(
    model: nn.Module,
    weight_decay: float,
    layers: int,
    decay: float,
    head: float = 1.0,
    optimizer: type[Optimizer] = AdamW,
    decays: Decays = decays_in_fine_tuning,
) -> list[dict[str, Any]]:
    """`parameter_groups` per layer with an `lr_scale`: decay^(layers above it), times `head` in a head.

    Embeddings are layer 0, block i is layer i + 1, the final norm and the heads are the last (BEiT; Bao et al. 2022).
    `head` is for what unilm calls head; what comes before it, VQA's pooler or ImageNet's norm, learns as the body.
    """
    by_layer: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        in_head = name.startswith("task_head.")
        layer = int(block[1]) + 1 if block else 0 if "embedding" in name and not in_head else layers + 1
        by_layer.setdefault((layer, name.startswith("task_head.head.")), []).append((name, parameter))
    groups: list[dict[str, Any]] = []
    for (layer, is_head), named in sorted(by_layer.items(), key=lambda item: item[0]):
        scale = decay ** (layers + 1 - layer) * (head if is_head else 1.0)
        both = _decayed_and_not(named, weight_decay, optimizer, decays)
        groups += [group | {"lr_scale": scale} for group in both]
    return groups


def build_optimizer(
    model: nn.Module, offload: bool, config: OptimConfig, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that `config` names. `offload`: its state is to lie on the CPU. `groups`: None for
    `parameter_groups`."""
    optimizer = chosen(config)
    groups = groups or parameter_groups(model, config.weight_decay, optimizer)
    return optimizer.build(groups, config, offload, next(model.parameters()).dtype)


def pretraining_optimizer(model: nn.Module, offload: bool, config: RunConfig) -> torch.optim.Optimizer:
    """Pretraining's, with a rate for each layer where `layer_decay` asks for it."""
    optim, groups = config.optim, None
    if config.layer_decay != 1:
        groups = layered_groups(
            model, optim.weight_decay, config.model.layers, config.layer_decay, optimizer=chosen(optim), decays=decays
        )
    return build_optimizer(model, offload, optim, groups)
