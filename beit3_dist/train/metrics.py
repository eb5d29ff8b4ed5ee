"""The fields of a step's record: losses, accuracies, speed."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch

from beit3_dist.config import TrainingConfig
from beit3_dist.objectives.base import Loss
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.train.feed import StepBatch
from beit3_dist.train.flops import peak_flops


def losses_and_accuracies(
    losses: Sequence[Loss], totals: list[float], correct: list[float], counts: list[int]
) -> dict[str, float]:
    """`loss` and each loss and accuracy of a step, from totals [K] and global counts [K] of targets. A data set of
    which the step has no target has no share in a loss."""
    of_losses = zip(losses, totals, correct, counts, strict=True)
    told = [each for each in of_losses if each[3] > 0 or not each[0].part_of]
    means = [(loss, total / max(count, 1)) for loss, total, _, count in told]
    accuracies = [(loss, right / max(count, 1)) for loss, _, right, count in told]
    return {
        "loss": sum(loss.weight * mean for loss, mean in means if not loss.part_of),
        **{f"loss_{loss.name}": mean for loss, mean in means},
        **{f"acc_{loss.name}": accuracy for loss, accuracy in accuracies if loss.has_accuracy},
    }


def pace(mesh: Mesh, samples: int, batch: StepBatch, step_s: float) -> dict[str, Any]:
    """The fields of a record that tell the pace, the memory and the identity of a step of `samples` samples that took
    `step_s` seconds."""
    return {
        "tokens_per_s": batch.known.tokens / step_s,
        "samples_per_s": samples / step_s,
        "data_wait_s": batch.data_wait_s,
        "step_s": step_s,
        "memory_gb": peak_memory_gb(mesh.device),
        "replaced_samples": batch.known.replaced,
        "sample_hash": batch.known.sample_hash,
    }


def speed(config: TrainingConfig, mesh: Mesh, samples: int, batch: StepBatch, step_s: float) -> dict[str, Any]:
    """As `pace`, and how fast the devices compute."""
    flops_per_device = batch.known.flops / mesh.world / step_s
    peak = peak_flops(mesh.device) if config.in_bf16 else None  # of fp8 too it is a share of the bf16 rate
    return {
        **pace(mesh, samples, batch, step_s),
        "tflops_per_device": flops_per_device / 1e12,
        "mfu": flops_per_device / peak if peak else None,
    }


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in 10^9 bytes: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
