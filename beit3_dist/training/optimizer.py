"""AdamW with the decay groups of BEiT: matrices and word vectors decay; biases, norms, tokens and positions do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from beit3_dist.config import OptimConfig
from beit3_dist.kernels.apex import apex_function


def decays(name: str, shape: torch.Size) -> bool:
    """Whether weight decay applies to a parameter of this canonical name and (whole) shape."""
    return len(shape) > 1 and not name.endswith("positions")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The decayed and the undecayed parameters, in the model's order."""
    # Under ZeRO-3 a parameter is empty here; `ds_shape` is its whole shape.
    shape = lambda p: getattr(p, "ds_shape", p.shape)  # noqa: E731
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if decays(n, shape(p))], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, shape(p))], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, offload: bool, config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW for this device: DeepSpeed's CPU kernel when the state is offloaded, on CUDA Apex's fused kernel if NVIDIA
    Apex is installed and torch's fused one otherwise, on the CPU torch's."""
    groups = parameter_groups(model, config.weight_decay)
    common: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    apex_adam = apex_function("apex.optimizers", "FusedAdam") if device.type == "cuda" else None
    if apex_adam is not None:
        return apex_adam(groups, adam_w_mode=True, **common)
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **common)
