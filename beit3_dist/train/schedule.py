"""The learning rate of a step: linear warm-up, then half a cosine or a line down to the floor."""

from __future__ import annotations

import math

from beit3_dist.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step 0 <= step < steps. No step is wasted on a rate of 0; the decay starts at the peak."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.decay == "linear":
        return config.min_lr + (config.lr - config.min_lr) * (1 - progress)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
