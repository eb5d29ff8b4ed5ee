"""The training steps that tools/benchmark.py times: a batch, who takes them, and that all compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beit3_dist.config import SPECIAL_ROWS, ModelConfig, ObjectiveConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.model import BEiT3
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.objectives.masking import Numbers, block_masks, mask_count, mask_words
from beit3_dist.objectives.three_passes import three_passes
from beit3_dist.parallel.kernels import use_kernels
from beit3_dist.train.inputs import host_totals, masked_counts, prepare
from tools.benchmarks.measure import MatrixProducts, peak_bytes

PADDING = 1
"""Id of <pad>."""
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Largest relative difference of losses that counts as equal: fp32 noise at base width is ten times smaller; bf16 has 8
bits."""


def random_micro_batch(
    model: ModelConfig, images: int, texts: int, pairs: int, text_length: int, caption_lengths: tuple[int, int]
) -> MicroBatch:
    """Random pixels and words under the paper's masks; texts are full, captions have uniformly drawn lengths."""
    rng, objective = np.random.default_rng(0), ObjectiveConfig()
    grid = model.image_size // model.patch_size
    last_word = model.vocab_size - SPECIAL_ROWS

    def numbers(samples: int) -> Numbers:
        return lambda first, count: rng.random((samples, count))

    def words(lengths: np.ndarray, ratio: float) -> list[Tensor]:
        targets = np.full((len(lengths), int(lengths.max())), PADDING)
        for row, length in enumerate(lengths):
            targets[row, :length] = 0, *rng.integers(4, last_word + 1, length - 2), 2
        inputs, predict = mask_words(
            targets,
            numbers(len(lengths)),
            ratio=ratio,
            specials=(0, PADDING, 2),
            mask_id=last_word + 1,
            words=range(4, last_word + 1),
            mask_token_share=objective.mask_token_share,
            random_token_share=objective.random_token_share,
        )
        return [torch.from_numpy(array) for array in (inputs, targets, predict, lengths)]

    captions = words(rng.integers(caption_lengths[0], caption_lengths[1] + 1, pairs), objective.caption_mask_ratio)
    full = words(np.full(texts, text_length), objective.text_mask_ratio)
    counts = np.full(images + pairs, mask_count(objective.image_mask_ratio, grid**2))
    masks = block_masks(grid, counts, numbers(images + pairs))
    pixels = rng.integers(0, 256, (images + pairs, 3, model.image_size, model.image_size), dtype=np.uint8)
    samples = images + pairs + texts
    return MicroBatch(
        images=torch.from_numpy(pixels),
        tokenizer_images=None,
        image_mask=torch.from_numpy(masks),
        captions=captions[0],
        caption_targets=captions[1],
        caption_mask=captions[2],
        caption_lengths=captions[3],
        texts=full[0],
        text_targets=full[1],
        text_mask=full[2],
        text_lengths=full[3],
        sample_ids=torch.arange(samples),
        positions=torch.arange(samples),
        streams=torch.tensor([0] * images + [2] * pairs + [1] * texts),
        faults=[],
    )


class OurStep:
    """A micro-batch on the device and how our model computes its losses. Codes are drawn: no image tokenizer runs."""

    def __init__(self, model: BEiT3, batch: MicroBatch, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.codes = torch.randint(model.config.visual_vocab_size, batch.image_mask.shape, generator=draw).to(device)
        self.model, self.objective = model, MaskedDataModeling(model, ObjectiveConfig(), seed=0)
        self.counts = torch.tensor(masked_counts(batch), device=device)
        self.arguments = (*prepare(batch, device, lambda _: self.codes), self.counts, 0)
        self.flops = host_totals([batch], model.config).flops
        """Of forward and backward."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """One pass: the loss, and the losses [4] that it is the sum of."""
        return self.by(self.objective)

    def three_passes(self) -> tuple[Tensor, Tensor]:
        """As `forward`, stream by stream."""
        return self.by(partial(three_passes, self.objective))

    def by(self, compute: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What `compute` makes of the micro-batch."""
        loss, statistics = compute(*self.arguments)
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
