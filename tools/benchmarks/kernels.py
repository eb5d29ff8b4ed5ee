"""The `attention` and `kernels` parts of tools/benchmark.py: our operations against their definitions in plain torch.

Each pair computes the same first: results and all gradients are compared. Then forward and backward together are
timed in turns, and the bytes are counted that the forward pass keeps for the backward pass, and the peak of both.
"""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from beit3_dist.kernels.cross_entropy import cross_entropy_in_place, plain_cross_entropy
from beit3_dist.kernels.gelu_layer_norm import gelu_layer_norm, plain_gelu_layer_norm
from beit3_dist.kernels.layer_norm import apex_layer_norm
from beit3_dist.kernels.residual_norm import Branch, Norms, plain_residual_norm
from beit3_dist.model.attention import attend
from beit3_dist.model.layout import Group, Layout, group
from tools.benchmarks.measure import in_turns, kept_bytes, peak_bytes, threads

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative difference, by norms, of results and gradients."""


@dataclass
class Pair:
    """One operation in two ways. Both take the same leaves and return one tensor."""

    name: str
    leaves: list[Tensor]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The definition, sample by sample: q, k, v [T, H, d] in the layout's order, no padding computed."""
    out, pieces, samples = torch.empty_like(q), [], layout.token_samples(q.device)
    for sample in samples.unique():
        rows = (samples == sample).nonzero().squeeze(1)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[rows]) * q.shape[-1] ** -0.5
        pieces.append((rows, torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[rows])))
    return out.index_copy(0, torch.cat([rows for rows, _ in pieces]), torch.cat([mixed for _, mixed in pieces]))


def assert_equal(pair: Pair) -> None:
    """Raises AssertionError where results or gradients differ: there would be nothing to compare."""
    results = []
    for compute in (pair.ours, pair.plain):
        out = compute(*pair.leaves)
        draw = torch.Generator(out.device).manual_seed(1)
        gradient = torch.randn(out.shape, generator=draw, device=out.device, dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, pair.leaves, gradient)])
    for ours, plain in zip(*results, strict=True):
        difference = ((ours - plain).norm() / plain.norm()).item()
        if not difference <= TOLERANCE[pair.leaves[0].dtype]:
            raise AssertionError(f"{pair.name} differs from its definition by {difference:.1e}")


def attention_pairs(options: Namespace, device: torch.device) -> list[Pair]:
    """Our attention over a mixed micro-batch, for the head width of base and large, and of the giant."""
    draw, pairs = torch.Generator().manual_seed(0), []
    captions = torch.randint(8, 65, (options.samples,), generator=draw)
    padding = torch.arange(64) >= captions[:, None]
    layout = Layout(
        (
            Group(options.samples, options.patches, 0),
            group(options.samples, options.patches, padding, 64),
            Group(options.samples, 0, options.text_length),
        )
    ).to(device)
    for width in (64, 88):
        q, k, v = (torch.randn(sum(layout.segments), options.heads, width, generator=draw) for _ in range(3))
        leaves = [t.to(device, DTYPES[options.precision]).requires_grad_() for t in (q, k, v)]
        pairs.append(
            Pair(
                f"attention, heads of {width}",
                leaves,
                lambda q, k, v: attend([q], [k], [v], layout)[0],
                lambda q, k, v: plain_attention(q, k, v, layout),
            )
        )
    return pairs


def kernel_pairs(options: Namespace, device: torch.device) -> list[Pair]:
    """Our kernels at the shapes of base; on a GPU also those in Triton and, where it is installed, Apex's LayerNorm."""
    on_gpu = device.type == "cuda"
    if not on_gpu:
        print("benchmark.py: no CUDA device, so the Triton kernels are left out", file=sys.stderr)
    return norms_and_losses(options, device, on_gpu)


def norms_and_losses(options: Namespace, device: torch.device, on_gpu: bool) -> list[Pair]:
    """Each operation by each contender, all against plain torch and from the same leaves."""
    draw, dtype = torch.Generator().manual_seed(0), DTYPES[options.precision]
    normal = lambda *shape: torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()  # noqa: E731
    affine = lambda width: [normal(options.tokens, width), normal(width), normal(width)]  # noqa: E731
    targets = torch.randint(options.classes, (options.masked,), generator=draw).to(device)
    wide, logits = affine(options.ffn_width), [normal(options.masked, options.classes)]

    def norm(name: str, ours: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: list[Tensor]) -> Pair:
        return Pair(name, leaves, lambda *tensors: ours(*tensors, 1e-5), lambda *tensors: plain(*tensors, 1e-5))

    def entropy(name: str, ours: Callable[..., Tensor]) -> Pair:
        # The copy that keeps the leaf is made for both.
        either = lambda compute: lambda logits: compute(logits * 1, targets)[0]  # noqa: E731
        return Pair(name, logits, either(ours), either(plain_cross_entropy))

    pairs = [
        norm("GELU + LayerNorm", gelu_layer_norm, plain_gelu_layer_norm, wide),
        entropy("cross-entropy", cross_entropy_in_place),
    ]
    if on_gpu:
        from beit3_dist.kernels.triton import cross_entropy as triton_cross_entropy
        from beit3_dist.kernels.triton import gelu_layer_norm as triton_gelu_layer_norm
        from beit3_dist.kernels.triton import layer_norm as triton_layer_norm
        from beit3_dist.kernels.triton import residual_norm as triton_residual_norm

        narrow = affine(options.width)
        pairs += [
            norm("GELU + LayerNorm, Triton", triton_gelu_layer_norm.gelu_layer_norm, plain_gelu_layer_norm, wide),
            entropy("cross-entropy, Triton", triton_cross_entropy.cross_entropy_in_place),
            norm("LayerNorm, Triton", triton_layer_norm.layer_norm, plain_layer_norm, narrow),
            Pair(
                "residual, drop path, norm",
                [*narrow, normal(options.tokens, options.width), normal(options.width)],
                partial(residual_and_norm, triton_residual_norm.residual_norm),
                partial(residual_and_norm, plain_residual_norm),
            ),
        ]
        fused = apex_layer_norm()
        if fused is not None:
            by_apex = lambda x, weight, bias, eps: fused(x, weight, bias, weight.shape, eps)  # noqa: E731
            pairs.append(norm("LayerNorm, Apex", by_apex, plain_layer_norm, narrow))
    return pairs


def residual_and_norm(
    compute: Callable[..., tuple[Tensor, list[Tensor]]],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch: Tensor,
    added: Tensor,
) -> Tensor:
    """The residual stream behind a branch, with drop path, and its norm, added up so that both are read."""
    keep = (torch.arange(len(x), device=x.device) % 10 > 0).to(x.dtype)
    r, (y,) = compute(x, Branch([branch], [added]), keep, Norms([len(x)], [weight], [bias], 1e-5))
    return torch.cat([r, y])


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch's."""
    return layer_norm(x, weight.shape, weight, bias, eps)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def benchmark_pairs(options: Namespace) -> dict[str, Any]:
    """Compares and times the pairs of a command."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with threads(options.threads):
        copy_rate = bytes_per_second_of_a_copy(device)
        for pair in options.pairs(options, device):
            assert_equal(pair)

            def train(compute: Callable[..., Tensor], leaves: list[Tensor] = pair.leaves) -> None:
                torch.autograd.grad(compute(*leaves).sum(), leaves)

            actions = [lambda p=pair, t=train: t(p.ours), lambda p=pair, t=train: t(p.plain)]
            ours, plain = in_turns(actions, options.repeats, device)
            kept = [kept_bytes(partial(compute, *pair.leaves), device) for compute in (pair.ours, pair.plain)]
            peak = [peak_bytes(action, device) for action in actions]
            rows.append(
                {
                    "name": pair.name,
                    "ours": ours.record() | {"kept_mb": kept[0] / 1e6, "peak_mb": peak[0] / 1e6},
                    "plain": plain.record() | {"kept_mb": kept[1] / 1e6, "peak_mb": peak[1] / 1e6},
                    "ratio": median(plain.wall) / median(ours.wall),
                    "cpu_ratio": median(plain.process) / median(ours.process),
                    "kept_ratio": kept[0] / kept[1],
                    "peak_ratio": peak[0] / peak[1],
                    "copy_share": floor_bytes(pair) / median(ours.wall) / copy_rate,
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


def floor_bytes(pair: Pair) -> int:
    """The fewest bytes that forward and backward can move: leaves are read twice and their gradients written, the
    result is written and its gradient read."""
    with torch.no_grad():
        out = pair.ours(*pair.leaves)
    return sum(3 * leaf.nbytes for leaf in pair.leaves) + 2 * out.nbytes


def table(record: dict[str, Any]) -> str:
    """`benchmark_pairs`'s record for people."""
    lines = [
        f"forward and backward, {record['device']}, {record['precision']}; "
        f"a copy moves {record['copy_gb_per_s']:,.0f} GB/s",
        f"{'':26}{'ours ms':>9}{'fastest':>9}{'slowest':>9}{'plain ms':>10}{'fastest':>9}{'slowest':>9}"
        f"{'plain / ours':>14}{'CPU':>7}{'kept, ours / plain':>20}{'peak':>7}{'of a copy':>11}",
    ]
    for row in record["rows"]:
        times = [row[who][key] * 1e3 for who in ("ours", "plain") for key in ("median_s", "fastest_s", "slowest_s")]
        lines.append(
            f"{row['name']:26}{times[0]:9.2f}{times[1]:9.2f}{times[2]:9.2f}{times[3]:10.2f}{times[4]:9.2f}"
            f"{times[5]:9.2f}{row['ratio']:14.2f}{row['cpu_ratio']:7.2f}{row['kept_ratio']:20.2f}{row['peak_ratio']:7.2f}"
            f"{row['copy_share']:11.0%}"
        )
    return "\n".join(lines)


def add_commands(commands: Any) -> None:
    """`attention` and `kernels`."""
    sizes = {
        "attention": {"samples": 4, "patches": 197, "text_length": 128, "heads": 12},
        "kernels": {"tokens": 1536, "width": 768, "ffn_width": 3072, "masked": 152, "classes": 64010},
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
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def check(options: Namespace) -> None:
    """Raises ValueError for what cannot be measured."""
    for name, value in vars(options).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"--{name} {value} is less than 1")
