"""AdamW with the decay groups of BEiT: matrices and word vectors decay; biases, norms, tokens and positions do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from beit3_dist.config import OptimConfig


def decays(name: str, shape: torch.Size) -> bool:
    """Whether weight decay applies to a parameter of this canonical name and (whole) shape."""
    return len(shape) > 1 and not name.endswith("positions")


def decays_in_fine_tuning(name: str, shape: torch.Size) -> bool:
    """As `decays`, but text positions decay too: unilm's fine-tuning spares only image positions. (It also decays the
    mask token, which no task shows to the model.)"""
    return decays(name, shape) or name == "language_embedding.positions"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The decayed and the undecayed parameters, in the model's order."""
    return _decayed_and_not(model.named_parameters(), weight_decay, decays)


def _decayed_and_not(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, decays: Callable[[str, torch.Size], bool]
) -> list[dict[str, Any]]:
    # Under ZeRO-3 a parameter is empty here; `ds_shape` is its whole shape.
    shape = lambda p: getattr(p, "ds_shape", p.shape)  # noqa: E731
    named = [(n, p) for n, p in named if p.requires_grad]
    both: list[dict[str, Any]] = [
        {"params": [p for n, p in named if decays(n, shape(p))], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, shape(p))], "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]


def layered_groups(
    model: nn.Module, weight_decay: float, layers: int, decay: float, head: float
) -> list[dict[str, Any]]:
    """Decayed and undecayed parameters per layer with an `lr_scale`: decay^(layers above it), times `head` in a head.

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
        both = _decayed_and_not(named, weight_decay, decays_in_fine_tuning)
        groups += [group | {"lr_scale": scale} for group in both]
    return groups


def build_optimizer(
    model: nn.Module, offload: bool, config: OptimConfig, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's CPU kernel where the state is offloaded, else torch's fused one, which reads and writes each
    number once. (Apex's counts steps per group, and ZeRO-3 steps a large group in several parts.) `groups`: None for
    `parameter_groups`."""
    groups = groups or parameter_groups(model, config.weight_decay)
    common: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=True, **common)
