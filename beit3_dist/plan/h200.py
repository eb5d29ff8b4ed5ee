"""Steps that were measured on an H200, beside what the planner's rates make of their counts.

The steps ran at commit 53685b0, whose code took several times as many launches and bytes as today's, so that its own
counts stand here: those of plan/traffic.py and plan/allocations.py over that commit's `tools/benchmark.py recipe`
(masters with gradients of their own, no image tokenizer) and its ZeRO-1 step with DeepSpeed's loops and a tokenizer of
base size.

Of the time two constants were fitted to these seven rows (`devices.MEMORY_SHARE`, `LAUNCH_S`) and two come from
profiles of the same runs (`PRODUCT_SHARE`, `CORE_SHARE`, at head dimension 88; base's 64 is taken to be alike). Nothing
of the memory was fitted. One benchmark ran both kinds of kernels in one process, torch's first: the second kind's rows
hold the first model's weights, 3.9 GB, which is inferred from the two rows' equal difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from beit3_dist.plan.counting import Work
from beit3_dist.plan.devices import Device

LEFT_GB = 3.898
"""Weights of the giant in bf16."""


@dataclass(frozen=True)
class Measured:
    """A row of the H200's."""

    name: str
    step_s: float
    memory_gb: float
    products_tflop: float
    core_tflop: float
    bytes_gb: float
    """Of all else."""
    launches: int
    counted_gb: float
    """Peak by allocation."""

    def predicted_s(self, device: Device) -> float:
        """Its step by the device's rates."""
        work = Work(
            operations={"all": (self.bytes_gb * 1e9, 0)},
            launches=self.launches,
            core_flops=self.core_tflop * 1e12,
            head_flops=self.products_tflop * 1e12,
        )
        return device.seconds(work)


ROWS = (
    Measured("giant, recipe, torch, 3 x 16", 0.2747, 71.5, 102.57, 5.43, 266.3, 7260, 70.94),
    Measured("giant, recipe, torch, 3 x 32", 0.5126, 107.5, 205.39, 10.86, 431.5, 7415, 106.69),
    Measured("giant, recipe, triton, 3 x 16", 0.2833, 75.5, 102.57, 5.43, 252.8, 7120, 70.94 + LEFT_GB),
    Measured("giant, recipe, triton, 3 x 32", 0.4989, 111.4, 205.39, 10.86, 404.5, 7135, 106.69 + LEFT_GB),
    Measured("giant, pretrain.py, torch, 3 x 16", 0.330, 72.8, 103.99, 5.70, 315.7, 9274, 71.53),
    Measured("giant, pretrain.py, triton, 3 x 32", 0.535, 110.1, 208.23, 11.41, 460.0, 9149, 107.26),
    Measured("base, recipe, torch, 3 x 128", 0.2600, 48.0, 63.06, 6.10, 335.1, 4283, 47.71),
)


def lines(device: Device) -> Iterator[str]:
    """The rows, measured and predicted, for people."""
    yield f"{'H200, commit 53685b0':36}{'s/step':>8}{'planned':>9}{'off by':>8}{'GB':>8}{'counted':>9}{'off by':>8}"
    for row in ROWS:
        seconds = row.predicted_s(device)
        yield (
            f"{row.name:36}{row.step_s:8.4f}{seconds:9.4f}{seconds / row.step_s - 1:+8.1%}{row.memory_gb:8.1f}"
            f"{row.counted_gb:9.1f}{row.counted_gb / row.memory_gb - 1:+8.1%}"
        )
