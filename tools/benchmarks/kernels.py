"""The `attention` and `kernels` parts of tools/benchmark.py: our operations against their definitions in plain torch.

Each pair computes the same first: results and all gradients are compared. Then forward and backward together are
timed in turns, and the bytes are counted that the forward pass keeps for the backward pass, and the peak of both.
"""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, Namespace
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from beit3_dist.kernels.registry import Case, Function, Sizes, operations
from beit3_dist.model.attention import attend
from beit3_dist.model.token_layout import Group, TokenLayout, group
from beit3_dist.plugins import load_plugins
from beit3_dist.tools.benchmarks.measure import check_positive, gpu_or_cpu, in_turns, kept_bytes, peak_bytes, threads

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative difference, by norms, of results and gradients, for each rounding on the way."""


@dataclass
class Pair:
    """An operation in two ways."""

    name: str
    case: Case
    ours: Function
    plain: Function
    roundings: int = 1


def plain_attention(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    """The definition, sample by sample: q, k, v [T, H, d] in the layout's order, no padding computed."""
    out, pieces, samples = torch.empty_like(q), [], layout.token_samples(q.device)
    for sample in samples.unique():
        rows = (samples == sample).nonzero().squeeze(1)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[rows]) * q.shape[-1] ** -0.5
        pieces.append((rows, torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[rows])))
    return out.index_copy(0, torch.cat([rows for rows, _ in pieces]), torch.cat([mixed for _, mixed in pieces]))


def assert_equal(pair: Pair, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the results, for what is timed afterwards. Raises AssertionError where results or gradients differ:
    there would be nothing to compare."""
    given = [torch.randn_like(result) for result in pair.case.call(pair.plain, *leaves)]
    results = (pair.case.train(function, leaves, given) for function in (pair.ours, pair.plain))
    for ours, plain in zip(*results, strict=True):
        difference, scale = (ours - plain).norm().item(), plain.norm().item()
        if not difference <= pair.roundings * TOLERANCE[leaves[0].dtype] * scale:
            raise AssertionError(f"{pair.name} differs from its definition by {difference / (scale or 1.0):.1e}")
    return given


def attention_pairs(options: Namespace, device: torch.device) -> list[Pair]:
    """Our attention over a mixed micro-batch, for the head width of base and large, and of the giant."""
    draw, pairs = torch.Generator().manual_seed(0), []
    captions = torch.randint(8, 65, (options.samples,), generator=draw)
    padding = torch.arange(64) >= captions[:, None]
    layout = TokenLayout(
        (
            Group(options.samples, options.patches, 0),
            group(options.samples, options.patches, padding, 64),
            Group(options.samples, 0, options.text_length),
        )
    ).to(device)
    for width in (64, 88):
        case = Case([(sum(layout.segments), options.heads, width)] * 3, lambda compute, *qkv: [compute(*qkv, layout)])
        ours = lambda q, k, v, layout: attend([q], [k], [v], layout)[0]  # noqa: E731
        pairs.append(Pair(f"attention, heads of {width}", case, ours, plain_attention))
    return pairs


def kernel_pairs(options: Namespace, device: torch.device) -> list[Pair]:
    """Every version of every operation that may serve here."""
    load_plugins(options.plugins)
    sizes, dtype = Sizes(**{size: getattr(options, size) for size in asdict(Sizes())}), DTYPES[options.precision]
    pairs, left_out = [], defaultdict[str, list[str]](list)
    for operation in operations().values():
        for case, version in product(operation.cases(sizes), operation.versions):
            name = f"{operation.name} {version.name}"
            lacking = version.lacks(case.place(device.type, dtype))
            if lacking:
                left_out[lacking] += [name] * (name not in left_out[lacking])
                continue
            name = f"{name}, {case.label}".removesuffix(", ")
            pairs.append(Pair(name, case, operation.function(version), operation.definition, version.roundings))
    for lacking, names in left_out.items():
        print(f"benchmark.py: without {lacking}, left out: {', '.join(names)}", file=sys.stderr)
    return pairs


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def benchmark_pairs(options: Namespace) -> dict[str, Any]:
    """Compares and times the pairs of a command."""
    device = gpu_or_cpu()
    rows = []
    with threads(options.threads):
        copy_rate = bytes_per_second_of_a_copy(device)
        for pair in options.pairs(options, device):
            leaves = pair.case.leaves(device, DTYPES[options.precision])
            given, functions = assert_equal(pair, leaves), (pair.ours, pair.plain)
            actions = [partial(pair.case.train, function, leaves, given) for function in functions]
            ours, plain = in_turns(actions, options.repeats, device)
            kept = [kept_bytes(partial(pair.case.call, function, *leaves), device) for function in functions]
            peak = [peak_bytes(action, device) for action in actions]
            floor = sum(3 * leaf.nbytes for leaf in leaves) + sum(2 * gradient.nbytes for gradient in given)
            rows.append(
                {
                    "name": pair.name,
                    "ours": ours.record() | {"kept_mb": kept[0] / 1e6, "peak_mb": peak[0] / 1e6},
                    "plain": plain.record() | {"kept_mb": kept[1] / 1e6, "peak_mb": peak[1] / 1e6},
                    "ratio": median(plain.wall) / median(ours.wall),
                    "cpu_ratio": median(plain.process) / median(ours.process),
                    "kept_ratio": kept[0] / max(1, kept[1]),
                    "peak_ratio": peak[0] / peak[1],
                    "copy_share": floor / median(ours.wall) / copy_rate,
                }
            )
    return {
        "device": str(device),
        "precision": options.precision,
        "copy_gb_per_s": copy_rate / 1e9,
        "rows": rows,
    }


def bytes_per_second_of_a_copy(device: torch.device) -> float:
    """Bytes read and written by a copy that no cache holds: what moves memory cannot be faster."""
    count = 1 << (28 if device.type == "cuda" else 24)
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    return 2 * 4 * count / median(in_turns([lambda: target.copy_(source)], 5, device)[0].wall)


def table(record: dict[str, Any]) -> str:
    """`benchmark_pairs`'s record for people."""
    lines = [
        f"forward and backward, {record['device']}, {record['precision']}; "
        f"a copy moves {record['copy_gb_per_s']:,.0f} GB/s",
        f"{'':44}{'ours ms':>9}{'fastest':>9}{'slowest':>9}{'plain ms':>10}{'fastest':>9}{'slowest':>9}"
        f"{'plain / ours':>14}{'CPU':>7}{'kept, ours / plain':>20}{'peak':>7}{'of a copy':>11}",
    ]
    for row in record["rows"]:
        times = [row[who][key] * 1e3 for who in ("ours", "plain") for key in ("median_s", "fastest_s", "slowest_s")]
        lines.append(
            f"{row['name']:44}{times[0]:9.2f}{times[1]:9.2f}{times[2]:9.2f}{times[3]:10.2f}{times[4]:9.2f}"
            f"{times[5]:9.2f}{row['ratio']:14.2f}{row['cpu_ratio']:7.2f}{row['kept_ratio']:20.2f}{row['peak_ratio']:7.2f}"
            f"{row['copy_share']:11.0%}"
        )
    return "\n".join(lines)


def add_commands(commands: Any) -> None:
    """`attention` and `kernels`."""
    sizes = {
        "attention": {"samples": 4, "patches": 197, "text_length": 128, "heads": 12},
        "kernels": asdict(Sizes()),
    }
    for name, pairs in (("attention", attention_pairs), ("kernels", kernel_pairs)):
        command = commands.add_parser(
            name, help="against plain torch definitions", formatter_class=ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(measure=benchmark_pairs, table=table, pairs=pairs, check=check)
        for size, default in sizes[name].items():
            command.add_argument(f"--{size}", type=int, default=default, help=f"{size.replace('_', ' ')} of the inputs")
        command.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="of inputs and results")
        command.add_argument("--repeats", type=int, default=9, help="timed rounds, after one that warms up")
        command.add_argument("--threads", type=int, help="processor threads; torch's choice if not given")
    command.add_argument("--plugins", nargs="*", default=[], metavar="FILE", help="files that define kernels")


def check(options: Namespace) -> None:
    """Raises ValueError for what cannot be measured."""
    check_positive([name for name, value in vars(options).items() if type(value) is int], options)
