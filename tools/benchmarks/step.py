"""The training steps that tools/benchmark.py times: a batch, who takes them, and that all compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beit3_dist.config import SPECIAL_ROWS, DataConfig, ModelConfig, RunConfig
from beit3_dist.data.batch import MicroBatch, Samples
from beit3_dist.model import BEiT3
from beit3_dist.objectives.base import grid_of
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.objectives.masking import Numbers, block_masks, mask_count, mask_words
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.three_passes import prepare_passes, three_passes
from beit3_dist.objectives.together import Objectives, PretrainingModule
from beit3_dist.parallel.kernels import use_kernels
from beit3_dist.tools.benchmarks.measure import MatrixProducts, peak_bytes
from beit3_dist.train.totals import host_totals

PADDING = 1
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Largest relative difference of losses that counts as equal: fp32 noise at base width is ten times smaller; bf16 has 8
bits."""


def objectives_for(model: ModelConfig, **section: Any) -> Objectives:
    """Masked data modelling of a model, with these fields of its section."""
    streams = DataConfig(images="unused", texts="unused", pairs="unused", text_length=3, caption_length=3)
    run = RunConfig(out="unused", text_tokenizer="unused", data=streams, model=model)
    return objectives_of(replace(run, objectives={NAME: MaskedDataModelingConfig(**section)}))


def random_micro_batch(
    model: ModelConfig, images: int, texts: int, pairs: int, text_length: int, caption_lengths: tuple[int, int]
) -> MicroBatch:
    """Random pixels and words under the paper's masks; texts are full, captions have uniformly drawn lengths."""
    rng, section = np.random.default_rng(0), MaskedDataModelingConfig()
    last_word = model.vocab_size - SPECIAL_ROWS
    ids: dict[str, Any] = {"specials": (0, PADDING, 2), "mask_id": last_word + 1, "words": range(4, last_word + 1)}
    shares = {name: getattr(section, name) for name in ("mask_token_share", "random_token_share")}

    def numbers(samples: int) -> Numbers:
        return lambda first, count: rng.random((samples, count))

    def words(lengths: np.ndarray, ratio: float) -> dict[str, Tensor]:
        text = np.full((len(lengths), int(lengths.max())), PADDING)
        for row, length in enumerate(lengths):
            text[row, :length] = 0, *rng.integers(4, last_word + 1, length - 2), 2
        shown, predict = mask_words(text, numbers(len(lengths)), ratio=ratio, **ids, **shares)
        arrays = {"text": text, "lengths": lengths, "shown": shown, "predict": predict}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    captions = words(rng.integers(caption_lengths[0], caption_lengths[1] + 1, pairs), section.caption_mask_ratio)
    full = words(np.full(texts, text_length), section.text_mask_ratio)
    counts = np.full(images + pairs, mask_count(section.image_mask_ratio, model.patches))
    masks = torch.from_numpy(block_masks(grid_of(model), counts, numbers(images + pairs))).split([images, pairs])
    side = model.image_size
    pixels = rng.integers(0, 256, (images + pairs, 3, side, side), dtype=np.uint8)
    of_streams = torch.from_numpy(pixels).split([images, pairs])
    ids = torch.arange(images + pairs + texts).split([images, pairs, texts])

    def samples(number: int, image: int | None, text: dict[str, Tensor]) -> Samples:
        drawn = {} if image is None else {"image_mask": masks[image]}
        drawn |= {"text": text["shown"], "text_mask": text["predict"]} if text else {}
        own = ids[number], torch.arange(len(ids[number]))
        shown = None if image is None else of_streams[image]
        return Samples(*own, shown, text=text.get("text"), lengths=text.get("lengths"), annotations={NAME: drawn})

    return MicroBatch({"images": samples(0, 0, {}), "pairs": samples(1, 1, captions), "texts": samples(2, None, full)})


class OurStep:
    """A micro-batch on the device and how our model computes its losses. Codes are drawn: no image tokenizer runs."""

    def __init__(self, model: BEiT3, batch: MicroBatch, device: torch.device) -> None:
        draw, images = torch.Generator().manual_seed(0), sum(map(len, batch.with_images))
        shape = images, model.config.patches
        self.codes = torch.randint(model.config.visual_vocab_size, shape, generator=draw).to(device)
        objectives = objectives_for(model.config)
        self.model, self.module = model, PretrainingModule(model, objectives, seed=0)
        self.counts = torch.tensor(objectives.counts(batch), device=device)
        self._prepared = objectives.prepare(batch, device, lambda _: self.codes)
        codes = iter(self.codes.split([len(samples) for samples in batch.with_images]))
        self._passes = prepare_passes(self.module, batch, device, lambda _: next(codes))
        self.totals = host_totals([batch], objectives)

    def forward(self) -> tuple[Tensor, Tensor]:
        """One pass: the loss, and the losses [4] that it is the sum of."""
        loss, statistics = self.module(*self._prepared, self.counts, 0)
        return loss, statistics[0] / self.counts

    def three_passes(self) -> tuple[Tensor, Tensor]:
        loss, statistics = three_passes(self._passes, self.counts, 0)
        return loss, statistics[0] / self.counts


@dataclass
class Contender:
    """One way to take the same training step."""

    name: str
    model: nn.Module
    forward: Callable[[], tuple[Tensor, Tensor]]
    """-> the loss to go backward from, and the losses [n] that it is the sum of."""
    optimizer: Any
    """What takes the steps; None where there are none."""

    def step(self) -> None:
        """Forward, one backward from the sum of the losses, AdamW."""
        self.forward()[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW of the paper; options: which of torch's implementations."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, **options)


class MasterAdamW:
    """Fused AdamW of fp32 masters, with gradients of their own, of a bf16 model, as training in bf16 has it."""

    def __init__(self, model: nn.Module, clip_norm: float = 0.0) -> None:
        self.parameters = list(model.parameters())
        self.masters = nn.ParameterList([p.detach().to(torch.float32, copy=True) for p in self.parameters])
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.adamw = adamw(self.masters, fused=True)
        self.clip_norm = clip_norm

    def step(self) -> None:
        torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.parameters])
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.masters, self.clip_norm)
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, list(self.masters))

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def assert_equal_losses(contenders: list[Contender], precision: str = "fp32") -> list[float]:
    """The first contender's losses. Raises AssertionError where another's differ."""
    with torch.no_grad():
        losses = [contender.forward()[1].double() for contender in contenders]
    for contender, theirs in zip(contenders[1:], losses[1:], strict=True):
        difference = ((theirs - losses[0]) / losses[0]).abs().max().item()
        if not difference <= TOLERANCE[precision]:
            raise AssertionError(f"the losses of {contender.name} differ by {difference:.1e}: nothing to compare")
    return losses[0].tolist()


def activation_bytes(contender: Contender, device: torch.device) -> int:
    """Peak memory of forward and backward above parameters, gradients and moments, which all are there before."""
    for parameter in contender.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peak = peak_bytes(lambda: contender.forward()[0].backward(), device)
    contender.optimizer.zero_grad()
    return peak


def switch(step: OurStep, kernels: str, precision: str = "fp32") -> None:
    """Makes the model compute by `kernels`. Raises AssertionError where the losses are others then."""
    if kernels == "torch":
        return
    with torch.no_grad():
        of_plain = step.forward()
    use_kernels(step.model, kernels)
    pair = [(kernels, step.forward), ("torch", lambda: of_plain)]
    assert_equal_losses([Contender(name, step.model, forward, None) for name, forward in pair], precision)


def products_of(contender: Contender) -> MatrixProducts:
    """The matrix products of a forward and a backward pass, whose gradients stay."""
    # A dispatch mode sees nothing of compiled code, which has the same products.
    with torch.compiler.set_stance("force_eager"), MatrixProducts() as products:
        contender.forward()[0].backward()
    return products
