"""The learning rate of a step: linear warm-up, then one of the forms that `optim.decay` names."""

from __future__ import annotations

import math

from beit3_dist.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step 0 <= step < steps. No step is wasted on a rate of 0; the decay starts at the peak."""
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.decay == "constant":
        return config.lr
    if config.decay == "inverse_sqrt":
        first = max(1, warmup)
        return max(config.min_lr, config.lr * math.sqrt(first / max(first, step)))
    if config.decay == "warmup_stable_decay":
        begin = max(warmup, steps - round(config.decay_share * steps))
        done = max(0, step - begin) / max(1, steps - begin)
        return config.min_lr + (config.lr - config.min_lr) * (1 - math.sqrt(done))
    progress = (step - warmup) / max(1, steps - warmup)
    if config.decay == "linear":
        return config.min_lr + (config.lr - config.min_lr) * (1 - progress)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
