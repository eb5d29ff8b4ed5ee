"""The part of `tools/benchmark.py model` about objectives: each alone and all of them in one pass, and contrast beside
open_clip's model and loss of the same size.

A pass over all of them should cost what its parts cost: its time per FLOP over that of them one after the other.
AdamW is left out, since every part would take it once. Contrast alone has open_clip's CLIP beside it, whose two towers
have our depth, widths and patches. It pads captions to the longest, and its text tower is causal; ours reads what
captions there are, so that figures are also given per FLOP.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from beit3_dist.config import BatchConfig, DataConfig, ModelConfig, RunConfig, require
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.order import Stream
from beit3_dist.data.streams import Sample
from beit3_dist.model import BEiT3
from beit3_dist.model.initialization import materialize
from beit3_dist.objectives.base import Objective, normalized
from beit3_dist.objectives.contrastive import NAME as CONTRASTIVE
from beit3_dist.objectives.masked_data_modeling import NAME as MASKED
from beit3_dist.objectives.registry import OBJECTIVES, objectives_of
from beit3_dist.objectives.together import Objectives, PretrainingModule
from beit3_dist.optional import optional_module
from beit3_dist.parallel.kernels import use_kernels
from beit3_dist.tools.benchmarks.measure import in_turns, machine
from beit3_dist.tools.benchmarks.step import PADDING, Contender, products_of

TOGETHER, THEIRS = "all in one pass", "open_clip, contrast"


def check(options: Namespace) -> None:
    """Raises ValueError for objectives that cannot be measured so."""
    for name in options.objectives:
        known = ", ".join(sorted(OBJECTIVES))
        require(name in OBJECTIVES, f"--objectives: there is no objective {name!r}; there are {known}")
        require(not OBJECTIVES[name].second_pass, f"--objectives {name}: it has a second pass; one alone is measured")
    if options.objectives:
        require(options.precision == "fp32", "--objectives are measured with --precision fp32")


def measured(options: Namespace, config: ModelConfig, batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    """Seconds and FLOPs (of the matrix products) of forward and backward of each objective, of all, and of open_clip
    where contrast is among them and not only ours is asked for (`--alone`)."""
    chosen = {name: _objectives(config, batch, [name]) for name in options.objectives}
    together = _objectives(config, batch, options.objectives)
    for each in together:
        _annotate(batch, each)
    model = together.build()
    materialize(model, lambda name, shape: together.first_value(name, shape, 0), device)
    use_kernels(model, options.kernels)
    sets = {TOGETHER: together} | (chosen if len(chosen) > 1 else {})
    contenders = [Contender(name, model, _forward(model, some, batch, device), None) for name, some in sets.items()]
    if CONTRASTIVE in options.objectives and not options.alone:
        contenders.append(open_clip_contender(config, batch, device))
    flops = {contender.name: products_of(contender).flops() for contender in contenders}
    taken = in_turns([partial(_step, contender) for contender in contenders], options.repeats, device)
    rows = {
        contender.name: seconds.record() | {"flops": flops[contender.name]}
        for contender, seconds in zip(contenders, taken, strict=True)
    }
    return {
        "rows": rows,
        "ratio_to_parts": {clock: _ratio(rows, [*chosen], clock) for clock in ("median_s", "fastest_s", "cpu_s")},
        "options": {name: getattr(options, name) for name in ("objectives", "images", "texts", "pairs", "repeats")},
        "machine": machine(device),
    }


def _ratio(rows: Mapping[str, Mapping[str, float]], parts: list[str], clock: str) -> float | None:
    """Time per FLOP of all in one pass, over that of its parts."""
    if len(parts) < 2:
        return None
    seconds, flops = (sum(rows[name][key] for name in parts) for key in (clock, "flops"))
    return rows[TOGETHER][clock] / rows[TOGETHER]["flops"] * flops / seconds


def _step(contender: Contender) -> None:
    contender.forward()[0].backward()
    contender.model.zero_grad()


def _objectives(config: ModelConfig, batch: MicroBatch, names: list[str]) -> Objectives:
    sizes = BatchConfig(**{name: len(samples) for name, samples in batch.streams.items()})
    data = DataConfig(images="unused", texts="unused", pairs="unused", text_length=3, caption_length=3)
    run = RunConfig(out="unused", text_tokenizer="unused", data=data, model=config)
    return objectives_of(replace(run, batch=sizes, objectives={name: OBJECTIVES[name].Config() for name in names}))


def _annotate(batch: MicroBatch, objective: Objective) -> None:
    """Gives the samples what the objective draws for them, where `random_micro_batch` has not."""
    for stream in (stream for stream in Stream if objective.name != MASKED):
        samples = batch.streams[stream.field]
        listed = [Sample(stream, 0, row, key, []) for row, key in enumerate(samples.ids.tolist())]
        text = None if samples.text is None else samples.text.numpy()
        for sample, words in zip(listed, [] if text is None else text, strict=False):
            sample.words = words[words != PADDING]
        unused: Any = None  # only masking reads the tokenizer
        samples.annotations[objective.name] = objective.annotate(stream, listed, text, unused)


def _forward(model: BEiT3, objectives: Objectives, batch: MicroBatch, device: torch.device) -> Any:
    """Forward of the objectives: -> the loss, and the losses [K] that it is the sum of."""
    images, draw = sum(map(len, batch.with_images)), torch.Generator().manual_seed(0)
    codes = torch.randint(model.config.visual_vocab_size, (images, model.config.patches), generator=draw).to(device)
    module = PretrainingModule(model, objectives, seed=0)
    counts = torch.tensor(objectives.counts(batch), device=device)
    prepared = objectives.prepare(batch, device, lambda _: codes)

    def forward() -> tuple[Tensor, Tensor]:
        loss, statistics = module(*prepared, counts, 0)
        return loss, statistics[0] / counts

    return forward


def open_clip_contender(config: ModelConfig, batch: MicroBatch, device: torch.device) -> Contender:
    """open_clip's CLIP with our geometry, and its loss, over the batch's pairs. Raises ValueError where it lacks."""
    remedy = "pip install 'open_clip_torch>=3,<4', or measure ours only: --alone"
    clip = optional_module("open_clip", "the comparison of contrast", remedy)
    pairs = batch.streams["pairs"]
    assert pairs.images is not None and pairs.text is not None
    shape = {"layers": config.layers, "width": config.width, "mlp_ratio": config.ffn_width / config.width}
    vision = {"head_width": config.width // config.heads, "patch_size": config.patch_size}
    words = {"context_length": pairs.text.shape[1], "vocab_size": config.vocab_size, "heads": config.heads}
    model: nn.Module = clip.model.CLIP(
        config.width, shape | vision | {"image_size": config.image_size}, shape | words
    ).to(device)
    loss = clip.loss.ClipLoss()
    images, text = normalized(pairs.images).to(device), pairs.text.to(device)

    def forward() -> tuple[Tensor, Tensor]:
        value = loss(*model(images, text))
        return value, value.detach()[None]

    return Contender(THEIRS, model, forward, None)


def table(record: dict[str, Any]) -> str:
    rows, options = record["rows"], record["options"]
    lines = [
        f"{options['images']} images, {options['texts']} texts, {options['pairs']} pairs; forward and backward, "
        f"{options['repeats']} repeats; {record['machine']['device']}, {record['machine']['threads']} threads",
        f"{'':34}{'median s':>10}{'fastest':>9}{'CPU s':>9}{'GFLOP':>10}{'GFLOP/CPU s':>13}",
    ]
    for name, row in rows.items():
        giga = row["flops"] / 1e9
        lines.append(
            f"{name:34}{row['median_s']:10.3f}{row['fastest_s']:9.3f}{row['cpu_s']:9.3f}{giga:10.1f}"
            f"{giga / row['cpu_s']:13.1f}"
        )
    ratio = record["ratio_to_parts"]
    if ratio["cpu_s"] is not None:
        lines.append(
            f"per FLOP, all in one pass over the sum of its parts: {ratio['median_s']:.3f} in time (medians), "
            f"{ratio['fastest_s']:.3f} (fastest), {ratio['cpu_s']:.3f} in CPU time"
        )
    return "\n".join(lines)
