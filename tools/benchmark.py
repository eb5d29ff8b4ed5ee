#!/usr/bin/env python3
"""Measures this project against others, in one process and interleaved, after showing that both compute the same.

    python tools/benchmark.py model [--json] [--profile] [--layers 12 ...]
    python tools/benchmark.py model --objectives masked_data_modeling,contrastive [--json] [--pairs 16 ...]
    python tools/benchmark.py attention [--json]
    python tools/benchmark.py kernels [--json]
    python tools/benchmark.py growth [--json]
    python tools/benchmark.py recipe [--json] [--profile] --recipe RECIPE.yaml --samples 8 16
    python tools/benchmark.py traffic [--json] [--recipe RECIPE.yaml] [--samples 32] [--kernels triton]
    python tools/benchmark.py data [--json] [--workers 1 2 ...]
    python tools/benchmark.py checkpoint [--json] [--recipe RECIPE.yaml]

`model`: a whole training step (forward, backward, AdamW) of the masked data modelling of images, texts and pairs by
our one pass over the mixed batch, by our model in three passes, and by torchscale's BEiT3 in three passes. Ours has
torch's fused AdamW, as in training; torchscale has torch's AdamW as it comes, and in a second row the fused one too.
With `--objectives`: forward and backward of each alone and of all in one pass, and of open_clip's model and loss.
`recipe`: training steps of a recipe's model on one device, as more samples fill it, by each kind of kernels.
`traffic`: kernel launches of a recipe's training step on a GPU and the bytes that they move, counted without a GPU.
`attention`, `kernels`: our operations against their definitions in plain torch.
`growth`: the step's time against its FLOPs, as depth, width, batch and sequence length grow.
`checkpoint`: the pause of a training that saves, and how soon what it saved is on the disk.
`data`: images per second and core of bare decoding and cropping, of our loader, and of webdataset beneath our
transforms.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from beit3_dist.config import ModelConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.leaving import interrupted
from beit3_dist.model import BEiT3
from beit3_dist.parallel.host_memory import keep_freed_memory
from beit3_dist.parallel.kernels import check_kernels
from beit3_dist.tools.benchmarks import checkpoint, data, growth, kernels, objectives, recipe, torchscale, traffic
from beit3_dist.tools.benchmarks.measure import check_positive, gpu_or_cpu, in_turns, machine, profile_table, threads
from beit3_dist.tools.benchmarks.step import (
    Contender,
    MasterAdamW,
    OurStep,
    activation_bytes,
    adamw,
    assert_equal_losses,
    objectives_for,
    products_of,
    random_micro_batch,
    switch,
)
from beit3_dist.tools.benchmarks.torchscale import THEIRS, THEIRS_COMPILED, THEIRS_FUSED
from beit3_dist.train.flops import peak_flops
from beit3_dist.train.totals import host_totals

PROGRAM = "benchmark.py"
GEOMETRY = {
    "layers": 6,
    "width": 768,
    "heads": 12,
    "ffn_width": 3072,
    "patch_size": 16,
    "image_size": 224,
    "vocab_size": 64010,
    "visual_vocab_size": 8192,
}
"""Fields of the model that `model` takes, and its defaults: base at half its depth, for a step of seconds on a CPU."""


def model_contenders(
    config: ModelConfig,
    batch: MicroBatch,
    device: torch.device,
    bf16: bool = False,
    compiled: bool = False,
    alone: bool = False,
    kernels: str = "torch",
) -> list[Contender]:
    """Ours in one pass; unless `alone`, also ours in three and torchscale's (`torchscale_contenders`). The losses of
    all are compared, in fp32, those of our compiled blocks with our plain ones too. `kernels`: who computes our blocks,
    as in a run's config. `bf16`: then ours has bf16 weights with fp32 masters, torchscale autocast."""
    ours = BEiT3(config).to(device)
    step, optimizer = OurStep(ours, batch, device), adamw(ours, fused=True)
    name = "ours, one pass" if kernels == "torch" else f"ours, one pass, {kernels}"
    contenders = [Contender(name, ours, step.forward, optimizer)]
    switch(step, kernels)
    if not alone:
        contenders.append(Contender("ours, three passes", ours, step.three_passes, optimizer))
        contenders += torchscale.torchscale_contenders(ours, batch.to(device), step.codes, bf16, compiled)
        assert_equal_losses(contenders)
    if bf16:
        ours.bfloat16()
        of_masters = MasterAdamW(ours)
        for contender in contenders:
            if contender.model is ours:
                contender.optimizer = of_masters
    return contenders


def benchmark_model(options: Namespace) -> dict[str, Any]:
    device = gpu_or_cpu()
    released = {"attention": "per_modality", "sub_layernorm": True, "vl_expert_layers": 0, "drop_path": 0.0}
    config = ModelConfig(**{name: getattr(options, name) for name in GEOMETRY}, **released)
    batch = random_micro_batch(
        config, options.images, options.texts, options.pairs, options.text_length, tuple(options.caption_lengths)
    )
    with threads(options.threads):
        if options.objectives:
            return objectives.measured(options, config, batch, device)
        return _measure(options, config, batch, device)


def _measure(options: Namespace, config: ModelConfig, batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    contenders = model_contenders(
        config, batch, device, options.precision == "bf16", options.compile, options.alone, options.kernels
    )
    with torch.no_grad():
        losses = contenders[0].forward()[1].tolist()
    names = [contender.name for contender in contenders]
    products = products_of(contenders[0])
    contenders[0].optimizer.zero_grad()
    actions = [*(contender.step for contender in contenders), products.alone(device)]
    *seconds, alone = in_turns(actions, options.repeats, device)
    theirs = THEIRS if THEIRS in names else THEIRS_FUSED  # as it comes; not there on a GPU
    unseen = [] if theirs == THEIRS_FUSED else [THEIRS_FUSED]  # the same model
    if device.type == "cpu" and options.kernels == "compiled":  # the CPU's peak is that of a dispatch mode
        unseen += [contender.name for contender in contenders if contender.model is contenders[0].model]
    memory = {c.name: activation_bytes(c, device) / 1e9 for c in contenders if c.name not in unseen}
    wall = {name: median(taken.wall) for name, taken in zip(names, seconds, strict=True)}
    process = {name: median(taken.process) for name, taken in zip(names, seconds, strict=True)}
    ours = names[0]
    ratio = lambda of, name: of[name] / of[ours] if name in of else None  # noqa: E731
    masked = objectives_for(config)
    totals = host_totals([batch], masked)
    peak = peak_flops(device) if options.precision == "bf16" else None
    compared = {ours, theirs} <= memory.keys()
    left_out = ("measure", "table", "check", "json")
    record = {
        "ratio_vs_torchscale": ratio(wall, THEIRS),
        "ratio_vs_torchscale_fused_adamw": ratio(wall, THEIRS_FUSED),
        "ratio_vs_torchscale_compiled": ratio(wall, THEIRS_COMPILED),
        "ratio_vs_three_passes": ratio(wall, "ours, three passes"),
        "cpu_ratio_vs_torchscale": ratio(process, THEIRS),
        "cpu_ratio_vs_torchscale_fused_adamw": ratio(process, THEIRS_FUSED),
        "activation_memory_ratio_vs_torchscale": memory[ours] / memory[theirs] if compared else None,
        "matmul_share": median(alone.wall) / wall[ours],
        "cpu_matmul_share": median(alone.process) / process[ours],
        "matmul_tflops": products.flops() / median(alone.wall) / 1e12,
        "model_tflops": totals.flops / wall[ours] / 1e12,
        "mfu": None if peak is None else totals.flops / wall[ours] / peak,
        "losses": dict(zip((loss.name for loss in masked.losses), losses, strict=True)),
        "contenders": [
            {"name": name, **taken.record(), "step_s": median(taken.wall), "activation_gb": memory.get(name)}
            for name, taken in zip(names, seconds, strict=True)
        ],
        "tokens": totals.tokens,
        "options": {name: value for name, value in vars(options).items() if name not in left_out},
        "machine": machine(device) | {"precision": options.precision, "torchscale": torchscale_version()},
    }
    if options.profile:
        record["profile"] = profile_table(contenders[0].step, device)
    return record


def torchscale_version() -> str:
    """Of the installed package; a copy on the PYTHONPATH has none."""
    try:
        return version("torchscale")
    except PackageNotFoundError:
        return "unknown"


def model_table(record: dict[str, Any]) -> str:
    if "rows" in record:
        return objectives.table(record)
    options, machine, contenders = record["options"], record["machine"], record["contenders"]
    shortest, longest = options["caption_lengths"]
    lines = [
        f"width {options['width']}, {options['layers']} layers, {machine['precision']}; {options['images']} images, "
        f"{options['texts']} texts of {options['text_length']} words, {options['pairs']} pairs with captions of "
        f"{shortest} to {longest} words: {record['tokens']} tokens",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"torchscale {machine['torchscale']}, {options['repeats']} repeats",
        "equal losses: " + ", ".join(f"{name} {loss:.5f}" for name, loss in record["losses"].items()),
        "",
        f"{'':27}{'s/step':>8}{'fastest':>9}{'slowest':>9}{'CPU s':>8}{'its time / ours':>17}{'CPU':>7}"
        f"{'activations':>14}{'ours / its':>12}",
    ]
    ours = contenders[0]
    for it in contenders:
        kept = it["activation_gb"]
        lines.append(
            f"{it['name']:27}{it['step_s']:8.3f}{it['fastest_s']:9.3f}{it['slowest_s']:9.3f}{it['cpu_s']:8.3f}"
            f"{it['step_s'] / ours['step_s']:17.3f}{it['cpu_s'] / ours['cpu_s']:7.3f}"
            + (f"{kept:11.3f} GB" if kept else "")
            + (f"{ours['activation_gb'] / kept:12.3f}" if kept and ours["activation_gb"] else "")
        )
    mfu = "unknown peak" if record["mfu"] is None else f"{record['mfu']:.1%} of the device's peak"
    lines += [
        "",
        f"our matrix products alone take {record['matmul_share']:.1%} of our step ({record['cpu_matmul_share']:.1%} in "
        f"CPU time): {record['matmul_tflops']:.3f} TFLOP/s",
        f"our step: {record['model_tflops']:.3f} TFLOP/s of the model; {mfu}",
    ]
    return "\n".join(lines + (["", record["profile"]] if "profile" in record else []))


# ----------------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None) -> Namespace:
    """The options. Raises ValueError for what cannot be measured; argparse ends the process for what it does not
    know, with exit code 2 as well."""
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    common = ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    with_defaults: Any = partial(ArgumentParser, formatter_class=ArgumentDefaultsHelpFormatter, parents=[common])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=with_defaults)
    model = commands.add_parser("model", help="a training step")
    model.set_defaults(measure=benchmark_model, table=model_table, check=check)
    for name, default in GEOMETRY.items():
        model.add_argument(f"--{name}", type=int, default=default, help="as in a recipe's model section")
    model.add_argument("--images", type=int, default=4, help="image-only samples of the batch")
    model.add_argument("--texts", type=int, default=4, help="text-only samples")
    model.add_argument("--pairs", type=int, default=4, help="image-text pairs")
    model.add_argument("--text_length", type=int, default=128, help="words of every text")
    text = "fewest and most words of a caption"
    model.add_argument("--caption_lengths", type=int, nargs=2, default=(8, 64), metavar="N", help=text)
    model.add_argument("--repeats", type=int, default=7, help="timed steps of each, in turns, after one to warm up")
    model.add_argument("--threads", type=int, help="processor threads; torch's choice if not given")
    model.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: torchscale in autocast")
    text = "who computes our blocks, as in a run's config"
    model.add_argument("--kernels", choices=recipe.KERNELS, default="torch", help=text)
    model.add_argument("--compile", action="store_true", help="also torchscale compiled and with fused attention")
    model.add_argument("--alone", action="store_true", help="only ours: for sizes at which torchscale does not fit")
    text = "names joined by commas: instead, each of them alone and all in one pass, and open_clip beside contrastive"
    model.add_argument("--objectives", type=lambda names: names.split(","), default=[], help=text)
    model.add_argument("--profile", action="store_true", help="also the operations that our step spends its time in")
    data.add_command(commands)
    checkpoint.add_command(commands)
    kernels.add_commands(commands)
    growth.add_command(commands)
    recipe.add_command(commands)
    traffic.add_command(commands)
    options = parser.parse_args(arguments)
    options.check(options)
    return options


def check(options: Namespace) -> None:
    check_kernels(options.kernels)
    objectives.check(options)
    check_positive(("images", "texts", "pairs", "repeats"), options)
    lengths = {"text_length": [options.text_length] * 2, "caption_lengths": options.caption_lengths}
    for name, (shortest, longest) in lengths.items():
        if not 3 <= shortest <= longest <= ModelConfig.max_text_length:
            raise ValueError(f"--{name} must lie between 3 and {ModelConfig.max_text_length} words and rise")


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        if not torch.cuda.is_available():
            keep_freed_memory()  # as training does
        record = options.measure(options)
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted(PROGRAM)
    print(json.dumps(record) if options.json else options.table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
