"""AdamW (Loshchilov and Hutter 2019): kernels/adamw has its formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_dist.config import OptimConfig
from beit3_dist.optimizers.base import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Running means of the gradient and of its square."""


class AdamW(Optimizer):
    """DeepSpeed's CPU kernel where the state is offloaded, else torch's fused one, which reads and writes each number
    once. (Apex's counts steps per group, and ZeRO-3 steps a large group in several parts.)"""

    name = "adamw"
    offloads = True

    @classmethod
    def moments(cls, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        return MOMENTS

    @classmethod
    def build(
        cls, groups: list[dict[str, Any]], config: OptimConfig, offload: bool, dtype: torch.dtype
    ) -> torch.optim.Optimizer:
        common: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        if offload:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
        return torch.optim.AdamW(groups, fused=True, **common)

    @classmethod
    def made(cls, optimizer: torch.optim.Optimizer) -> bool:
        return isinstance(optimizer, torch.optim.AdamW) or type(optimizer).__name__ == "DeepSpeedCPUAdam"

    @classmethod
    def set_steps(cls, optimizer: torch.optim.Optimizer, state: dict[str, Any], flat: Tensor, steps: int) -> None:
        if isinstance(optimizer, torch.optim.AdamW):
            on_device = optimizer.defaults.get("fused")
            state["step"] = torch.tensor(float(steps), device=flat.device if on_device else "cpu")
        else:  # DeepSpeed's
            state["step"] = steps
