"""The `traffic` part of tools/benchmark.py: kernel launches of a training step on a GPU and the bytes that they move.

What is neither a matrix product nor attention's core waits for memory, or for its launch. This counts it without a GPU:
one step as launchers/pretrain.py takes it on one device under ZeRO-1 in bf16 (image tokenizer, forward, backward, sums
of gradients, norm, clipping, AdamW, working parameters) runs at a recipe's real size on tensors without memory (torch's
meta device), and a dispatch mode writes down every operation.

How it counts: beit3_dist/plan/traffic.py. What other ranks would cost is left out.
"""

from __future__ import annotations

import os
from argparse import Namespace
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from beit3_dist.config import ModelConfig, OptimConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.image_tokenizer.fused import fuse_encoder
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import ImageTargets
from beit3_dist.kernels.varlen_attention import VARLEN_ATTENTION
from beit3_dist.model import BEiT3
from beit3_dist.objectives.together import ROUNDED, PretrainingModule
from beit3_dist.parallel.fragments import tell_places
from beit3_dist.parallel.kernels import chosen_function, sizes_of, use_kernels
from beit3_dist.parallel.mesh import Groups, connect, read_mesh
from beit3_dist.parallel.tensor import mark_model_parallel
from beit3_dist.plan.traffic import ATTENTION, META, PRODUCTS, Autocast, Core, Traffic, on_meta
from beit3_dist.recipe import read_sections
from beit3_dist.tools.benchmarks.measure import check_positive
from beit3_dist.tools.benchmarks.recipe import RECIPES, SECTIONS, micro_batch
from beit3_dist.tools.benchmarks.step import objectives_for
from beit3_dist.train.optimizer import build_optimizer


class _Engine:
    """What `Accumulation` asks of a DeepSpeed engine, over an optimizer that needs no other."""

    def __init__(self, objective: nn.Module, optimizer: Any) -> None:
        self._objective, self._optimizer = objective, optimizer
        self._boundary = True

    def __call__(self, *arguments: Any) -> Any:
        return self._objective(*arguments)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._boundary = is_boundary

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        """As DeepSpeedEngine.backward."""
        self._optimizer.backward_prologue()
        self._optimizer.set_gradient_accumulation_boundary(self._boundary)
        loss.backward()
        self._optimizer.update_hp_grads()
        if self._boundary:
            self._optimizer.reduce_gradients()

    def zero_reduce_bucket_size(self) -> int:
        return 10**8

    def zero_overlap_comm(self) -> bool:
        return True


def account(
    groups: Groups,
    model: ModelConfig,
    batches: list[MicroBatch],
    optim: OptimConfig,
    kernels: str = "torch",
    attention: str = "padded",
    tokenizer: VQKD | None = None,
) -> Traffic:
    """The traffic of the second step of a model over these micro-batches; the moments exist then.

    groups: those of the only process. tokenizer: on the meta device; None where the codes are there already.
    """
    from beit3_dist.parallel.engine import Accumulation  # imports DeepSpeed, as no other part of benchmark.py does

    traffic, objectives = Traffic(), objectives_for(model)
    objectives.multiple = ROUNDED
    meta_groups = SimpleNamespace(mesh=SimpleNamespace(device=META, data=1))
    with on_meta(traffic), redirect_stdout(StringIO()):
        network = BEiT3(model, device="meta").to(torch.bfloat16)
        mark_model_parallel(network, 0, ())
        _use_kernels(traffic, network, kernels, attention)
        optimizer = _optimizer(network, optim, groups)
        engine = _Engine(PretrainingModule(network, objectives, seed=0), optimizer)
        with patch("torch.cuda.is_available", lambda: True):
            tell_places(network, optimizer, {}, groups, zero_stage=0)
            optimizer.take_over(engine, chosen_function("adamw", kernels, torch.bfloat16, sizes_of(model)))
            fused = tokenizer is not None and fuse_encoder(tokenizer, kernels)
        schedule = Accumulation(len(batches), meta_groups, engine, len(objectives.losses))
        counts = torch.tensor([sum(c) for c in zip(*map(objectives.counts, batches), strict=True)], device=META)

        def tokenize(pictures: Tensor) -> Tensor:
            if tokenizer is None:
                return torch.empty(len(pictures), model.patches, dtype=torch.int64, device=META)
            side = tokenizer.image_size
            views = torch.empty(len(pictures), 3, side, side, dtype=torch.uint8, device=META)
            with nullcontext() if fused else Autocast():
                return ImageTargets(tokenizer, META)(views)

        for _ in range(2):
            traffic.clear()
            schedule.train((objectives.prepare(batch, META, tokenize) for batch in batches), counts, 0).to("cpu")
            optimizer.step()
            optimizer.zero_grad()
    return traffic


def _use_kernels(traffic: Traffic, network: BEiT3, kernels: str, attention: str) -> None:
    """`use_kernels` as on a GPU that has all kernels."""
    with ExitStack() as stack:
        for version in VARLEN_ATTENTION.versions:
            core = lambda qkv, cumulative, longest: Core.apply(traffic, qkv)  # noqa: E731
            stack.enter_context(patch(f"{version.module}.{VARLEN_ATTENTION.name}", core))
        stack.enter_context(patch("torch.cuda.is_available", lambda: True))
        use_kernels(network, kernels, attention)


def _optimizer(network: BEiT3, optim: OptimConfig, groups: Groups) -> Any:
    """What DeepSpeed's engine makes at ZeRO-1 in bf16 with fp32 sums, without loops over parameters."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.utils.timer import NoopTimer

    from beit3_dist.parallel.flat_step import FlatBF16

    names = {parameter: name for name, parameter in network.named_parameters()}
    settings = SimpleNamespace(enabled=True, immediate_grad_update=False)
    make = partial(BF16_Optimizer, mpu=groups, dp_process_group=groups.data, timers=NoopTimer())
    adamw = build_optimizer(network, False, optim)
    optimizer: Any = make(adamw, names, settings, clip_grad=optim.clip_norm, grad_acc_dtype=torch.float32)
    optimizer.__class__ = FlatBF16
    return optimizer


def benchmark_traffic(options: Namespace) -> dict[str, Any]:
    """The account of a recipe's model."""
    recipe = read_sections(options.recipe, *SECTIONS)
    model = ModelConfig(**recipe["model"])
    batches = [micro_batch(model, recipe["data"], options.samples)] * options.accumulation
    tokenizer = None
    if not options.codes:
        side = 16 * (model.image_size // model.patch_size)  # a view that gives one code for each patch
        with META:
            tokenizer = VQKD(image_size=side, codebook_size=model.visual_vocab_size)
    optim = OptimConfig(**recipe["optim"])
    traffic = account(connect(read_mesh()), model, batches, optim, options.kernels, options.attention, tokenizer)
    rows = sorted(traffic.rows.items(), key=lambda item: item[1].bytes, reverse=True)
    counted = [row for name, row in rows if name not in (PRODUCTS, ATTENTION)]
    return {
        "recipe": options.recipe.stem,
        "options": {name: getattr(options, name) for name in ("samples", "accumulation", "kernels", "attention")},
        "launches": sum(row.launches for row in counted),
        "bytes": sum(row.bytes for row in counted),
        "floor_bytes": sum(row.floor_bytes for row in counted),
        "all_launches": sum(row.launches for _, row in rows),
        "operations": {name: asdict(row) for name, row in rows},
    }


def table(record: dict[str, Any]) -> str:
    """`benchmark_traffic`'s record for people."""
    options = record["options"]
    lines = [
        f"{record['recipe']}, {options['accumulation']} x 3 x {options['samples']} samples, {options['kernels']} "
        f"kernels, {options['attention']} attention; ZeRO-1 in bf16 on one GPU",
        f"{'operation':>36}{'launches':>10}{'GB':>9}{'floor':>9}",
    ]
    lines += [
        f"{name:>36}{row['launches']:10,}{row['bytes'] / 1e9:9.2f}{row['floor_bytes'] / 1e9:9.2f}"
        for name, row in (record["operations"] | {"all but products and core": record}).items()
    ]
    return "\n".join(lines) + f"   ({record['all_launches']:,} launches with them)"


def check(options: Namespace) -> None:
    """Raises ValueError for what cannot be counted."""
    read_sections(options.recipe, *SECTIONS)
    check_positive(("samples", "accumulation"), options)
    if options.kernels == "triton":
        if find_spec("triton") is None:
            raise ValueError("--kernels triton needs the package triton: use --kernels torch")
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise ValueError("--kernels triton counts launches, which TRITON_INTERPRET=1 replaces: unset it")
    elif options.attention != "padded":
        raise ValueError(f"--attention {options.attention} needs --kernels triton")


def add_command(commands: Any) -> None:
    """`traffic`."""
    text = "kernel launches and bytes of a training step on a GPU, counted without one"
    command = commands.add_parser("traffic", help=text)
    command.set_defaults(measure=benchmark_traffic, table=table, check=check)
    text = "whose model, lengths and clipping"
    command.add_argument("--recipe", type=Path, default=RECIPES / "giant.yaml", help=text)
    command.add_argument("--samples", type=int, default=32, help="images, texts and pairs of a micro-batch, each")
    command.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    command.add_argument("--kernels", choices=("torch", "triton"), default="triton", help="as in a run's config")
    attentions = ("padded", *(version.name for version in VARLEN_ATTENTION.versions))
    command.add_argument("--attention", choices=attentions, default="varlen", help="who computes attention's core")
    command.add_argument("--codes", action="store_true", help="visual codes are there already: no image tokenizer runs")
