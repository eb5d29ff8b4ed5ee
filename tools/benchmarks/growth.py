"""The `growth` part of tools/benchmark.py: step time against FLOPs, as one size of the model or batch grows at a time.

A step that is bound by its matrix products takes a time proportional to its FLOPs. Every series is fitted by
time = c * FLOPs^p; p = 1 is proportional. Seconds per FLOP are also given relative to the series' largest step.

Two things keep even a perfect step from p = 1: small matrices are multiplied at a lower rate, and AdamW passes over all
parameters however small the batch is. Both are timed alone at every size; what a step takes beyond their sum is ours.
"""

from __future__ import annotations

import math
from argparse import Namespace
from functools import partial
from statistics import linear_regression, median
from typing import Any

import torch

from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.tools.benchmarks.measure import check_positive, gpu_or_cpu, in_turns, threads
from beit3_dist.tools.benchmarks.step import Contender, OurStep, adamw, products_of, random_micro_batch

BASE = {"layers": 4, "width": 512, "batch": 2, "text_length": 128}
SERIES = {
    "layers": (2, 4, 8, 16, 24),
    "width": (256, 512, 768, 1024, 1408, 2048),
    "batch": (1, 2, 4, 8, 16),
    "text_length": (128, 256, 512, 1020),
}


def growing_step(layers: int, width: int, batch: int, text_length: int, device: torch.device) -> tuple[Contender, int]:
    """Ours in the paper's architecture, `batch` samples of each stream, and the FLOPs of a training step."""
    sizes = {"layers": layers, "width": width, "heads": width // 64, "ffn_width": 4 * width}
    config = ModelConfig(**sizes, patch_size=16, vl_expert_layers=0, drop_path=0.0, vocab_size=8010)
    micro_batch = random_micro_batch(config, batch, batch, batch, text_length, (8, 64))
    step = OurStep(BEiT3(config).to(device), micro_batch, device)
    return Contender("ours", step.model, step.forward, adamw(step.model, fused=True)), step.totals.flops


def benchmark_growth(options: Namespace) -> dict[str, Any]:
    device = gpu_or_cpu()
    series = {}
    with threads(options.threads):
        for axis in options.axes:
            points = []
            for value in SERIES[axis]:
                contender, flops = growing_step(**(BASE | {axis: value}), device=device)
                points.append({axis: value, "flops": flops} | measure(contender, options.repeats, device))
            series[axis] = {"points": points} | {
                f"exponent_{clock}": exponent([p["flops"] for p in points], [p[clock] for p in points])
                for clock in ("step_s", "cpu_s")
            }
    return {"device": str(device), "threads": options.threads or torch.get_num_threads(), "series": series}


def measure(contender: Contender, repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of a step, on the clock and of processors, and of processors for its matrix products and AdamW alone.
    Where a GPU computes, its time stands for the processors'."""
    spent = lambda taken: median(taken.wall if device.type == "cuda" else taken.process)  # noqa: E731
    products = products_of(contender)
    optimizer = in_turns([contender.optimizer.step], repeats, device)[0]
    contender.optimizer.zero_grad()
    taken, alone = in_turns([contender.step, products.alone(device)], repeats, device)
    parts = {"products_cpu_s": spent(alone), "optimizer_cpu_s": spent(optimizer)}
    return {"step_s": median(taken.wall), "cpu_s": spent(taken)} | parts


def exponent(flops: list[float], seconds: list[float]) -> float:
    """p of time = c * FLOPs^p, by least squares of the logarithms."""
    return linear_regression([math.log(x) for x in flops], [math.log(x) for x in seconds]).slope


def table(record: dict[str, Any]) -> str:
    lines = [
        f"{record['device']}, {record['threads']} threads; time per FLOP relative to the largest step of a series",
        "products + AdamW: their share of the step's CPU time, each timed alone",
        f"{'':>20}{'TFLOP':>9}{'s/step':>9}{'per FLOP':>10}{'CPU s':>9}{'per FLOP':>10}{'products':>10}{'+ AdamW':>9}",
    ]
    for axis, series in record["series"].items():
        largest = max(series["points"], key=lambda point: point["flops"])
        for point in series["points"]:
            cells = f"{axis + ' ' + str(point[axis]):>20}{point['flops'] / 1e12:9.3f}"
            for clock in ("step_s", "cpu_s"):
                relative = point[clock] / point["flops"] / (largest[clock] / largest["flops"])
                cells += f"{point[clock]:9.3f}{relative:10.3f}"
            products, optimizer = (point[f"{part}_cpu_s"] / point["cpu_s"] for part in ("products", "optimizer"))
            lines.append(f"{cells}{products:10.1%}{products + optimizer:9.1%}")
        exponents = f"{series['exponent_step_s']:.3f}; CPU time {series['exponent_cpu_s']:.3f}"
        lines.append(f"{'':>20}time = c * FLOPs^{exponents}")
    return "\n".join(lines)


def add_command(commands: Any) -> None:
    command = commands.add_parser("growth", help="step time against FLOPs")
    command.set_defaults(measure=benchmark_growth, table=table, check=partial(check_positive, ["repeats"]))
    command.add_argument("--axes", nargs="+", choices=tuple(SERIES), default=tuple(SERIES), help="what grows")
    command.add_argument("--repeats", type=int, default=3, help="timed steps of each size, after one that warms up")
    command.add_argument("--threads", type=int, help="processor threads; torch's choice if not given")
