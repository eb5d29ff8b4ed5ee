"""What a micro-batch costs on one rank, counted by running the model's own code on tensors without memory.

Forward and backward of a rank's part of the model (cut over tensor ranks, recomputing what it is told to) run once at
the real size with few layers and once with one more: layers below the vision-language experts are alike, so that the
difference is one of them, and any depth and any pipeline stage follows. A model with fusion layers runs whole, since
its layers differ. Counted are products by shape, bytes and launches of all else (plan/traffic.py), collectives of the
tensor ranks, attention's core by its FLOPs, and memory by allocation (plan/allocations.py), gradients left out.

Texts are full, captions of all lengths from 8 words to the longest, as in tools/benchmark.py. What an objective other
than masked data modelling does with its hidden states is counted by its FLOPs alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from beit3_dist.config import STREAMS, Recompute, RunConfig, require
from beit3_dist.image_tokenizer.fused import fuse_encoder
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import ImageTargets
from beit3_dist.kernels.varlen_attention import VARLEN_ATTENTION
from beit3_dist.model.beit3 import BEiT3, MixedInputs
from beit3_dist.model.token_layout import Group, Selection, TokenLayout, group
from beit3_dist.objectives.base import View, normalized
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling, Targets
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import ROUNDED, Objectives, PretrainingModule
from beit3_dist.parallel.kernels import use_kernels
from beit3_dist.parallel.tensor import apply_tensor_parallelism
from beit3_dist.plan.allocations import Allocations
from beit3_dist.plan.traffic import ATTENTION, META, PRODUCTS, Autocast, Core, Traffic, on_meta

SHORTEST_CAPTION = 8
IMAGES = 64
"""Whose targets are counted; those of others are in proportion."""
SEGMENT_OF_LOSS = {"image": 0, "pair_image": 1, "pair_text": 2, "text": 3}
"""Of masked data modelling: which segment of the tokens holds the targets."""
SEGMENT_OF_KIND = (0, 1, 3)
"""Of other objectives, by the kind of their view."""


@dataclass(frozen=True)
class Work:
    """What a device has to do. Sums and differences are those of all its numbers."""

    products: Mapping[tuple[int, int, int, int], float] = field(default_factory=dict)
    """(b, m, k, n) -> how often b products of [m, k] and [k, n]."""
    operations: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of what is no product and not attention's core: name -> bytes read and written, launches."""
    launches: float = 0
    """Of products and the core, too."""
    core_flops: float = 0
    """Of attention's core, all passes over it together."""
    collectives: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """Of the tensor ranks: (name, bytes) -> calls."""
    head_flops: float = 0
    """Of products whose shapes are not known."""

    @property
    def bytes(self) -> float:
        return sum(moved for moved, _ in self.operations.values())

    @property
    def flops(self) -> float:
        """Of all products, the core's left out."""
        return self.head_flops + sum(2 * b * m * k * n * often for (b, m, k, n), often in self.products.items())

    def times(self, factor: float) -> Work:
        return _joined([(self, factor)])

    def __add__(self, other: Work) -> Work:
        return _joined([(self, 1), (other, 1)])

    def __sub__(self, other: Work) -> Work:
        return _joined([(self, 1), (other, -1)])


def _joined(parts: list[tuple[Work, float]]) -> Work:
    products: Counter[Any] = Counter()
    collectives: Counter[Any] = Counter()
    operations: dict[str, tuple[float, float]] = {}
    for work, factor in parts:
        for shape, often in work.products.items():
            products[shape] += often * factor  # type: ignore[assignment]
        for call, often in work.collectives.items():
            collectives[call] += often * factor  # type: ignore[assignment]
        for name, (moved, launches) in work.operations.items():
            before = operations.get(name, (0.0, 0.0))
            operations[name] = before[0] + moved * factor, before[1] + launches * factor
    return Work(
        {shape: often for shape, often in products.items() if often},
        {name: both for name, both in operations.items() if any(both)},
        sum(work.launches * factor for work, factor in parts),
        sum(work.core_flops * factor for work, factor in parts),
        {call: often for call, often in collectives.items() if often},
        sum(work.head_flops * factor for work, factor in parts),
    )


@dataclass(frozen=True)
class Passed:
    """Forward and backward of a micro-batch through some layers."""

    work: Work
    peak: float
    """Bytes that exist at most, without gradients of parameters."""
    kept: float
    """Bytes that exist between forward and backward."""


@dataclass(frozen=True)
class Pieces:
    """What makes up a micro-batch's passes in any number of layers."""

    layer: Passed
    """One of the layers that are alike; its peak is of no use."""
    around: Passed
    """All but `layers` of these: embedding, other layers, heads."""
    bottom: Passed
    """Embedding and the first layer, as the end of a backward pass sees them."""
    layers: int
    """How many of the layers are alike; 0: the model ran whole."""
    tokens: int
    """Of the micro-batch."""
    inputs: float
    """Bytes of its images, as the embedding takes them."""


class _TensorRanks:
    """What the model asks of the group of its tensor ranks while it is counted."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def size(self) -> int:
        return self._ranks

    def rank(self) -> int:
        return 0


class Counting:
    """Counts for one recipe on one kind of device; each count is made once."""

    def __init__(self, config: RunConfig, gpu: bool) -> None:
        """`gpu`: the kernels of a GPU run, of which Triton's have to be there to be read. Raises ValueError where they
        are not."""
        self._config, self._gpu = config, gpu
        self.kernels: str = config.kernels
        if config.kernels == "auto":
            self.kernels = "triton" if gpu else "torch"
        require(self.kernels != "compiled", "kernels=compiled cannot be counted: plan with kernels=triton or torch")
        require(
            self.kernels != "triton" or find_spec("triton") is not None,
            "kernels=triton is counted by reading the kernels, which needs the package triton: install it, or plan "
            "with --kernels torch",
        )
        self.attention: str = config.attention_kernel
        if self.attention == "auto":
            self.attention = "varlen" if self.kernels == "triton" else "padded"
        self._counted: dict[Any, Any] = {}

    @property
    def objectives(self) -> Objectives:
        return objectives_of(self._config)

    def pieces(self, samples: tuple[int, ...], recompute: Recompute, tensor: int = 1, sequence: bool = False) -> Pieces:
        """`samples`: of each of STREAMS in a micro-batch."""
        key = samples, recompute, tensor, sequence
        if key not in self._counted:
            self._counted[key] = self._pieces(*key)
        return self._counted[key]

    def _pieces(self, samples: tuple[int, ...], recompute: Recompute, tensor: int, sequence: bool) -> Pieces:
        model = self._config.model
        passed = lambda layers, bottom=False: self._passed(layers, samples, recompute, tensor, sequence, bottom)  # noqa: E731
        few = model.vl_expert_layers + 1
        if model.fusion_layers or model.layers <= few:
            whole, tokens = passed(model.layers)
            none = Passed(Work(), 0, 0)
            return Pieces(none, whole, whole, 0, tokens, self._inputs_bytes(samples))
        (less, tokens), (more, _), (bottom, _) = passed(few), passed(few + 1), passed(1, bottom=True)
        layer = Passed(more.work - less.work, more.peak - less.peak, more.kept - less.kept)
        around = Passed(less.work - layer.work, less.peak - layer.peak, less.kept - layer.kept)
        alike = model.layers - model.vl_expert_layers
        return Pieces(layer, around, bottom, alike, tokens, self._inputs_bytes(samples))

    def _inputs_bytes(self, samples: tuple[int, ...]) -> float:
        counts = dict(zip(STREAMS, samples, strict=True))
        images = sum(counts[view.stream] for view in self.objectives.views if view.image)
        return images * 3 * self._config.model.image_size**2 * 4.0

    def _passed(
        self, layers: int, samples: tuple[int, ...], recompute: Recompute, tensor: int, sequence: bool, bottom: bool
    ) -> tuple[Passed, int]:
        """Through a model of so many layers, or with `bottom` through its embedding and layers without head; and the
        tokens of the micro-batch."""
        experts = 0 if bottom else min(self._config.model.vl_expert_layers, layers)
        model = replace(self._config.model, layers=layers, vl_expert_layers=experts)
        config = replace(self._config, model=model)
        if bottom and config.train_only:
            config = replace(config, train_only=[])
        objectives = objectives_of(config)
        objectives.multiple = ROUNDED if self._gpu else 1
        network = objectives.build().to(torch.bfloat16 if config.in_bf16 else torch.float32)
        if tensor > 1:
            apply_tensor_parallelism(network, _TensorRanks(tensor), sequence)  # type: ignore[arg-type]
        network.blocks.recompute = recompute
        network.blocks.recompute_every = config.activation_checkpointing_every if recompute != "none" else 1
        counts = dict(zip(STREAMS, samples, strict=True))
        layouts = [layout := _layout(objectives, counts)]
        traffic, allocations = Traffic(), Allocations()
        with on_meta(traffic):
            self._use_kernels(traffic, network)
            module = PretrainingModule(network, objectives, seed=0).train()
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_let_go)
            traffic.clear()
            with allocations:
                inputs, ids = _inputs(objectives, layout, counts)
                inputs = module.with_drop_path(inputs, ids, 0)
                if bottom:
                    hidden = network.blocks(network.embed(inputs), inputs.layout, inputs.keep, range(layers), None)
                    kept = allocations.now
                    hidden.backward(torch.empty_like(hidden))
                    del hidden
                else:
                    selection, of_masked = _selection(objectives, counts)
                    hidden = network.hidden(inputs, selection)
                    kept = allocations.now
                    loss = _loss(objectives, network, hidden, of_masked)
                    if fused := sum(each.second_pairs(counts) for each in objectives):
                        layouts.append(_fused(objectives, fused))
                        inputs, selection, ids = _second(objectives, layouts[-1])
                        hidden = network.hidden(module.with_drop_path(inputs, ids, 0), selection)
                        loss, kept = loss + hidden.float().sum(), allocations.now
                    del hidden
                    loss.backward()
        core_flops = sum(_core_flops(model, own, self.attention, recompute, tensor) for own in layouts)
        work = _work(traffic, core_flops)
        if not bottom:
            others = sum(
                3 * each.head_flops(each.expected_counts(counts, config))
                for each in objectives
                if not isinstance(each, MaskedDataModeling)
            )
            work = replace(work, head_flops=others)
        return Passed(work, allocations.peak, kept), sum(sum(own.segments) for own in layouts)

    def _use_kernels(self, traffic: Traffic, network: BEiT3) -> None:
        if not self._gpu:
            return
        with patch("torch.cuda.is_available", lambda: True):
            version = VARLEN_ATTENTION.versions[0]
            core = lambda qkv, cumulative, longest: Core.apply(traffic, qkv)  # noqa: E731
            with patch(f"{version.module}.{VARLEN_ATTENTION.name}", core):
                use_kernels(network, self.kernels, version.name if self.attention != "padded" else "padded")

    def tokenizer(self) -> VQKD:
        """An image tokenizer of base size, as the released ones are, without memory."""
        model = self._config.model
        side = 16 * (model.image_size // model.patch_size)  # a view that gives one code for each patch
        with META:
            return VQKD(image_size=side, codebook_size=model.visual_vocab_size)

    @cached_property
    def tokenizer_bytes(self) -> float:
        """Of its encoder, in fp32; on a GPU a copy in bf16 stays beside it."""
        return (6.0 if self._gpu else 4.0) * sum(p.numel() for p in self.tokenizer().encoder.parameters())

    def targets(self, images: int) -> Passed:
        """Visual codes of some images by the image tokenizer."""
        many = self._targets
        return Passed(many.work.times(images / IMAGES), many.peak * images / IMAGES, 0)

    @cached_property
    def _targets(self) -> Passed:
        traffic, allocations, tokenizer = Traffic(), Allocations(), self.tokenizer()
        side = tokenizer.image_size
        with on_meta(traffic):
            with patch("torch.cuda.is_available", lambda: self._gpu):
                fused = self._gpu and fuse_encoder(tokenizer, self.kernels)
            traffic.clear()
            with allocations, Autocast(enabled=self._gpu and not fused):
                views = torch.empty(IMAGES, 3, side, side, dtype=torch.uint8, device=META)
                ImageTargets(tokenizer, META)(views)
        blocks, tokens = len(tokenizer.encoder.blocks), 1 + tokenizer.grid**2
        core = 4.0 * IMAGES * tokens**2 * tokenizer.geometry["width"] * blocks
        return Passed(_work(traffic, core), allocations.peak, 0)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _work(traffic: Traffic, core_flops: float) -> Work:
    operations = {
        name: (float(row.bytes), float(row.launches))
        for name, row in traffic.rows.items()
        if name not in (PRODUCTS, ATTENTION)
    }
    launches = sum(row.launches for row in traffic.rows.values())
    return Work(dict(traffic.products), operations, launches, core_flops, dict(traffic.collectives))


def caption_lengths(count: int, longest: int) -> Tensor:
    """int64 [count]: lengths of captions, evenly spread from SHORTEST_CAPTION on; one has the longest."""
    shortest = min(SHORTEST_CAPTION, longest)
    lengths = shortest + (torch.arange(count) * 2 + 1) * (longest - shortest + 1) // (2 * max(count, 1))
    lengths[-1:] = longest
    return lengths


def _layout(objectives: Objectives, samples: Mapping[str, int]) -> TokenLayout:
    """That of a micro-batch, on the host."""
    data = objectives.run.data

    def of_view(view: View) -> Group:
        count, patches = samples[view.stream], view.image * (1 + objectives.model.patches)
        if not view.text or view.stream == "texts":
            return group(count, patches, None, data.text_length if view.text else 0)
        longest, lengths = data.caption_length, caption_lengths(count, data.caption_length)
        return group(count, patches, torch.arange(longest) >= lengths[:, None], longest)

    return objectives.laid_out([of_view(view) for view in objectives.views])


def _inputs(objectives: Objectives, layout: TokenLayout, counts: Mapping[str, int]) -> tuple[MixedInputs, Tensor]:
    """A micro-batch on the device, and the ids of its samples."""
    side, patches = objectives.model.image_size, objectives.model.patches
    images = sum(counts[view.stream] for view in objectives.views if view.image)
    words = sum(layout.segments[2:])
    masked = any(view.masked_by for view in objectives.views if view.image)
    inputs = MixedInputs(
        images=normalized(torch.empty(images, 3, side, side, dtype=torch.uint8, device=META)),
        words=torch.empty(words, dtype=torch.int64, device=META),
        layout=layout.to(META),
        image_mask=torch.empty(images, patches, dtype=torch.bool, device=META) if masked and images else None,
    )
    ids = torch.empty(sum(g.samples for g in layout.groups), dtype=torch.int64, device=META)
    return inputs, ids


def _fused(objectives: Objectives, samples: int) -> TokenLayout:
    """That of a second pass over so many fused samples, on the host."""
    longest = objectives.run.data.caption_length
    padding = torch.arange(longest) >= caption_lengths(samples, longest)[:, None]
    return TokenLayout((group(samples, 1 + objectives.model.patches, padding, longest),))


def _second(objectives: Objectives, layout: TokenLayout) -> tuple[MixedInputs, Selection, Tensor]:
    """A second pass on the device: its inputs, the tokens that are read of them, and the ids of its samples."""
    samples, side = layout.groups[0].samples, objectives.model.image_size
    images = normalized(torch.empty(samples, 3, side, side, dtype=torch.uint8, device=META))
    words = torch.empty(layout.segments[2], dtype=torch.int64, device=META)
    rows = torch.empty(samples, dtype=torch.int64, device=META)
    return MixedInputs(images, words, layout.to(META)), Selection(rows, (0, 0, samples, 0)), rows


def read_tokens(
    objectives: Objectives, samples: Mapping[str, int]
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """How many tokens of each segment are read by any objective, and how many of them by masked data modelling."""
    of_masked, read = [0, 0, 0, 0], [0, 0, 0, 0]
    for objective in objectives:
        if isinstance(objective, MaskedDataModeling):
            expected = objective.expected_counts(dict(samples), objectives.run)
            for loss, targets in zip(objective.losses, expected, strict=True):
                of_masked[SEGMENT_OF_LOSS[loss.name]] += round(targets)
        else:
            for view in objective.views:
                read[SEGMENT_OF_KIND[view.kind]] += samples[view.stream]
    a, b, c, d = (own + other for own, other in zip(read, of_masked, strict=True))
    e, f, g, h = of_masked
    return (a, b, c, d), (e, f, g, h)


def _selection(objectives: Objectives, samples: Mapping[str, int]) -> tuple[Selection, Targets]:
    """The tokens that are read, and the targets of masked data modelling."""
    read, of_masked = read_tokens(objectives, samples)
    selection = Selection(torch.empty(sum(read), dtype=torch.int64, device=META), read)
    patches, words = of_masked[:2], of_masked[2:]
    targets = Targets(
        codes=torch.empty(sum(patches), dtype=torch.int64, device=META),
        words=torch.empty(sum(words), dtype=torch.int64, device=META),
        patch_counts=[*patches],
        word_counts=[*words],
    )
    return selection, targets


def _loss(objectives: Objectives, network: BEiT3, hidden_MD: Tensor, targets: Targets) -> Tensor:
    """Something to go backward from. Of masked data modelling its own losses."""
    images, words = len(targets.codes), len(targets.words)
    masked, others = hidden_MD.split([images + words, len(hidden_MD) - images - words])
    patches, of_words = masked.split([images, words])
    losses = [others.float().sum()] if len(others) else []
    if images:
        losses.append(network.image_losses(patches, targets.codes)[0].sum())
    if words:
        losses.append(network.text_losses(of_words, targets.words)[0].sum())
    total: Any = sum(losses)
    return total


def _core_flops(model: Any, layout: TokenLayout, attention: str, recompute: Recompute, tensor: int) -> float:
    """Of a micro-batch through all layers of `model`: the scores and mixtures of a sample of n tokens take 4 n^2 D
    forward, and 2.5 times as much backward, where FlashAttention computes the scores anew (Dao et al. 2022)."""
    squares = 0.0
    for own in layout.groups:
        if own.index is None or attention == "padded":
            squares += own.samples * (own.patches + own.words) ** 2
        else:
            words = torch.bincount(own.index // own.words, minlength=own.samples)
            squares += float((words + own.patches).square().sum())
    passes = 3.5 + (recompute != "none")
    return passes * 4.0 * squares * model.width * model.layers / tensor
