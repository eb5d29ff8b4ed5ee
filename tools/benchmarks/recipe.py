"""The `recipe` part of tools/benchmark.py: training steps of a recipe's model on one device, as more samples fill it.

A step is a run's without recomputation: forward and backward of one micro-batch under the recipe's drop path and masks,
the gradient clipped, AdamW on fp32 masters whose gradients have memory of their own, as DeepSpeed's have. Sizes that do
not fit are said and left out. Each row is also printed to the error output as soon as it is measured.
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from beit3_dist.config import DataConfig, ModelConfig, OptimConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.model import BEiT3
from beit3_dist.recipe import read_sections
from beit3_dist.tools.benchmarks.measure import (
    check_positive,
    gpu_or_cpu,
    in_turns,
    profile_table,
    synchronize,
    threads,
)
from beit3_dist.tools.benchmarks.step import Contender, MasterAdamW, OurStep, products_of, random_micro_batch, switch
from beit3_dist.train.flops import peak_flops
from beit3_dist.train.totals import Totals

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes"
SHORTEST_CAPTION = 8
KERNELS = ("torch", "triton", "compiled")
SECTIONS = ("model", "data", "optim")


def benchmark_recipe(options: Namespace) -> dict[str, Any]:
    recipe = read_sections(options.recipe, *SECTIONS)
    device = gpu_or_cpu()
    rows: list[dict[str, Any]] = []
    with threads(options.threads):
        drawn = BEiT3(ModelConfig(**recipe["model"]))
        for kernels in options.kernels:
            for row in _rows(copy.deepcopy(drawn).to(device), kernels, recipe, options, device):
                print(line(row), file=sys.stderr, flush=True)
                rows.append(row)
    return {"recipe": options.recipe.stem, "device": str(device), "precision": options.precision, "rows": rows}


def _rows(
    model: BEiT3, kernels: str, recipe: dict[str, Any], options: Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A row for each number of samples, until one does not fit; with the last one the profile of its step."""
    if options.precision == "bf16":
        model.bfloat16()
    row: dict[str, Any] = {}
    optimizer: MasterAdamW | None = None
    for samples in options.samples:
        name = {"kernels": kernels, "samples": samples}
        try:
            batch = micro_batch(model.config, recipe["data"], samples)
            step = OurStep(model, batch, device)
            if optimizer is None:
                switch(step, kernels, options.precision)
                optimizer = MasterAdamW(model, OptimConfig(**recipe["optim"]).clip_norm)
            contender = Contender(kernels, model, step.forward, optimizer)
            row = name | {"tokens": step.totals.tokens} | _measure(contender, step.totals, options, device)
        except torch.OutOfMemoryError:
            yield name | {"left_out": "it does not fit"}
            return
        except (RuntimeError, AttributeError, ImportError, TypeError) as error:  # what this torch lacks
            yield name | {"left_out": " ".join(str(error).split())[:200]}
            return
        if samples == options.samples[-1] and options.profile:
            row["profile"] = profile_table(contender.step, device)
        yield row


def micro_batch(config: ModelConfig, data: dict[str, Any], samples: int) -> MicroBatch:
    """Of so many images, texts and pairs each, as long as the recipe's section `data` allows."""
    captions = (SHORTEST_CAPTION, data.get("caption_length", DataConfig.caption_length))
    text_length = data.get("text_length", DataConfig.text_length)
    return random_micro_batch(config, samples, samples, samples, text_length, captions)


def _measure(contender: Contender, totals: Totals, options: Namespace, device: torch.device) -> dict[str, float | None]:
    products = products_of(contender)
    contender.optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step_s = median(in_turns([contender.step], options.repeats, device)[0].wall)
    synchronize(device)
    products_s = median(in_turns([products.alone(device)], options.repeats, device)[0].wall)
    peak = peak_flops(device) if options.precision == "bf16" else None
    return {
        "step_s": step_s,
        "tokens_per_s": totals.tokens / step_s,
        "model_tflops": totals.flops / step_s / 1e12,
        "mfu": totals.flops / step_s / peak if peak else None,
        "products_tflops": products.flops() / products_s / 1e12,
        "products_share": products_s / step_s,
        "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }


HEAD = (
    f"{'kernels':>10}{'samples':>9}{'tokens':>9}{'s/step':>9}{'tokens/s':>11}{'TFLOP/s':>9}{'of peak':>9}"
    f"{'of products':>13}{'products':>10}{'GB':>7}"
)


def line(row: dict[str, Any]) -> str:
    """A row for people. of products: the model's FLOP/s over those of its matrix products alone; products: the share of
    the step that these take alone; GB: peak memory of all."""
    name = f"{row['kernels']:>10}{row['samples']:9}"
    if "left_out" in row:
        return f"{name}  left out: {row['left_out']}"
    peak, memory = row["mfu"], row["memory_gb"]
    return (
        f"{name}{row['tokens']:9}{row['step_s']:9.4f}{row['tokens_per_s']:11,.0f}{row['model_tflops']:9.1f}"
        f"{'-' if peak is None else f'{peak:.1%}':>9}{row['model_tflops'] / row['products_tflops']:13.1%}"
        f"{row['products_share']:10.1%}{'-' if memory is None else f'{memory:.1f}':>7}"
    )


def table(record: dict[str, Any]) -> str:
    lines = [f"{record['recipe']}, {record['device']}, {record['precision']}; samples: of images, texts and pairs each"]
    lines += [HEAD, *map(line, record["rows"])]
    for row in record["rows"]:
        if "profile" in row:
            lines += ["", f"{row['kernels']}, {row['samples']} samples", row["profile"]]
    return "\n".join(lines)


def check(options: Namespace) -> None:
    read_sections(options.recipe, *SECTIONS)
    check_positive(("repeats", "samples"), options)


def add_command(commands: Any) -> None:
    command = commands.add_parser("recipe", help="training steps of a recipe's model")
    command.set_defaults(measure=benchmark_recipe, table=table, check=check)
    command.add_argument("--recipe", type=Path, default=RECIPES / "demo.yaml", help="whose model, lengths and clipping")
    command.add_argument("--samples", type=int, nargs="+", default=[4], help="images, texts and pairs of a step, each")
    command.add_argument("--kernels", nargs="+", choices=KERNELS, default=["torch"], help="as in a run's config")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")
    command.add_argument("--repeats", type=int, default=5, help="timed steps of each size, after one that warms up")
    command.add_argument("--threads", type=int, help="processor threads; torch's choice if not given")
    command.add_argument("--profile", action="store_true", help="also the operations that the largest step consists of")
