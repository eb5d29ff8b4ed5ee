"""Image-text contrast: which caption is an image's, and which image a caption's, by unit vectors of both.

Used in pretraining (contrastive.py) and in fine-tuning (tasks/retrieval.py). A replica computes the losses of its own
pairs, in both directions, against the candidates of all replicas, whose vectors are gathered with their gradients; the
sum over the replicas then has one process's value and gradients. Shape letters: n pairs of this replica, N of all, E
the vectors' length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, softplus

from beit3_dist.kernels.linear import Linear
from beit3_dist.parallel.replicas import ALONE, Replicas

FIRST_TEMPERATURE = 0.07
"""Temperature that the softmax starts from (CLIP, Radford et al. 2021, 2.5)."""
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0
"""What the sigmoid starts from (SigLIP, Zhai et al. 2023, 3.2)."""
LARGEST_SCALE = 100.0
"""The inverse temperature stays in [1, LARGEST_SCALE] (CLIP, 2.5; open_clip after each step)."""


class ContrastHead(nn.Module):
    """Projections of CLS and <s> to unit vectors, the logarithm of the inverse temperature and, for the sigmoid, a
    bias. Their names are the released ones."""

    constants: Mapping[str, float]
    """Names of the parameters that start from a number."""
    bounds: Mapping[str, tuple[float, float]] = {"logit_scale": (0.0, math.log(LARGEST_SCALE))}
    """Names of the parameters that every step leaves in an interval."""

    def __init__(self, width: int, length: int = 0, bias: bool = False) -> None:
        """`length` E of the vectors; 0: the width."""
        super().__init__()
        self.language_head = Linear(width, length or width, bias=False)
        self.vision_head = Linear(width, length or width, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if bias else None
        first = SIGMOID_SCALE if bias else 1 / FIRST_TEMPERATURE
        self.constants = {"logit_scale": math.log(first)} | ({"logit_bias": SIGMOID_BIAS} if bias else {})

    def forward(self, cls_ND: Tensor | None, start_ND: Tensor | None) -> tuple[Any, Any, Tensor, Tensor | None]:
        """In fp32: unit vectors of images and of texts (None where none are given), exp(logit_scale), and the bias."""
        images = None if cls_ND is None else normalize(self.vision_head(cls_ND).float(), dim=-1)
        texts = None if start_ND is None else normalize(self.language_head(start_ND).float(), dim=-1)
        bias = None if self.logit_bias is None else self.logit_bias.float()
        return images, texts, self.logit_scale.float().exp(), bias


@dataclass(frozen=True)
class Vectors:
    """What is contrasted of some pairs, in fp32."""

    images: Tensor
    """Unit vectors [n, E]."""
    texts: Tensor
    """Unit vectors [n, E]."""
    scale: Tensor
    """The inverse temperature, [1]."""
    bias: Tensor | None = None
    """[1]; of the sigmoid alone."""
    labels: Tensor | None = None
    """int64 [n, k]: pairs with one of their k labels in common are right for one another. None: a pair is right for
    itself alone."""


Contrast = Callable[[Vectors, Replicas], Tensor]
"""-> [2, n]: the loss of each own pair, and the mean of its two hits."""


def softmax_contrast(pairs: Vectors, replicas: Replicas = ALONE, smoothing: float = 0.0) -> Tensor:
    """The mean of the two cross-entropies of telling a pair's text from all texts and its image from all images (CLIP).

    With labels all that have one in common with a pair are right for it, with equal shares (UniCL, Yang et al. 2022).
    `smoothing`: share of a target that all candidates have alike (Szegedy et al. 2016).
    """
    texts, images = replicas.gather(pairs.texts), replicas.gather(pairs.images)
    if pairs.labels is None:
        right = torch.arange(len(pairs.images), device=images.device) + replicas.rank * len(pairs.images)
    else:
        right = in_common(pairs.labels, replicas.gather_constant(pairs.labels))
    by_image, by_text = pairs.scale * pairs.images @ texts.T, pairs.scale * pairs.texts @ images.T
    return (_told(by_image, right, smoothing) + _told(by_text, right, smoothing)) / 2


def _told(logits: Tensor, right: Tensor, smoothing: float) -> Tensor:
    """[2, n]: cross-entropies of [n, N], and whether the largest is right. `right`: which one is, int64 [n], or which
    ones are, bool [n, N]."""
    if right.ndim == 1:
        targets, hits = right, logits.argmax(1) == right
    else:
        targets, hits = right / right.sum(1, keepdim=True), right.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    losses = cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return torch.stack([losses, hits.float()])


def in_common(mine: Tensor, theirs: Tensor) -> Tensor:
    """bool [n, m]: which of `theirs`, int64 [m, k], have one of their labels in common with which of `mine` [n, k]."""
    same = [a[:, None] == b for a, b in zip(mine.T, theirs.T, strict=True)]
    return torch.stack(same).any(0)


def sigmoid_contrast(pairs: Vectors, replicas: Replicas = ALONE) -> Tensor:
    """-sum_j log sigmoid(z_ij (scale v_i . t_j + bias)) over all texts j for each own image i, where z_ij is 1 for its
    own text and -1 for all others (SigLIP, Zhai et al. 2023). Texts go round the ring of the replicas, so that none
    holds more than n x n similarities at a time.

    Everyone has to go backward from the same multiple of its losses' sum, as everyone does.
    """
    assert pairs.bias is not None
    return _Sigmoid.apply(pairs.images, pairs.texts, pairs.scale, pairs.bias, replicas)


class _Sigmoid(torch.autograd.Function):
    """Gradients are made in the forward pass, while the texts are here: those of a text travel on with it, and are
    complete when it comes home."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, replicas: Replicas) -> Tensor:
        n = len(images)
        losses, of_images = images.new_zeros(n), torch.zeros_like(images)
        of_scale, of_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        # The best candidate of each image so far, and of the text that is here: its similarity, and whose it is.
        best_text, best_image = images.new_full((2, n), -torch.inf), images.new_full((2, n), -torch.inf)
        visitor, of_visitor = texts, torch.zeros_like(texts)
        for turn in range(replicas.size):
            owner = (replicas.rank - turn) % replicas.size
            similarity = images @ visitor.T
            sign = images.new_full((n, n), -1.0)
            if owner == replicas.rank:
                sign.fill_diagonal_(1.0)
            logits = sign * (scale * similarity + bias)
            losses += softplus(-logits).sum(1)
            gradient = -sign * torch.sigmoid(-logits)
            of_images += scale * gradient @ visitor
            of_visitor = of_visitor + scale * gradient.T @ images
            of_scale, of_bias = of_scale + (gradient * similarity).sum(), of_bias + gradient.sum()
            best_text = _better(best_text, similarity, owner * n)
            best_image = _better(best_image, similarity.T, replicas.rank * n)
            if replicas.size > 1:
                visitor, of_visitor, best_image = replicas.pass_on(visitor, of_visitor, best_image)
        ctx.save_for_backward(of_images, of_visitor, of_scale, of_bias)
        place = torch.arange(n, device=images.device) + replicas.rank * n
        hits = (best_text[1] == place).float() + (best_image[1] == place).float()
        return torch.stack([losses, hits / 2])

    @staticmethod
    def backward(ctx: Any, gradient_2n: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradient_2n[0, 0]
        return *(factor * part for part in ctx.saved_tensors), None


def _better(best: Tensor, similarity: Tensor, first: int) -> Tensor:
    """The best candidates, [2, n], also among those of `similarity` [n, m], the first of which has number `first`."""
    found = similarity.max(1)
    return torch.where(found.values > best[0], torch.stack([found.values, (found.indices + first).float()]), best)


@dataclass(frozen=True)
class Kept:
    """The contrast of a whole step, as the micro-batch takes part in it."""

    sums: Tensor
    """[2]: of the step's losses and hits on this replica in its first micro-batch, zeros in all others."""
    each: Tensor
    """[2, n]: those of this micro-batch's pairs."""
    images: Tensor
    """[n, E]: gradient of the sum of the step's losses with respect to the images' vectors."""
    texts: Tensor
    """[n, E]."""
    scale: Tensor
    """[1]; zero but in the first micro-batch."""
    bias: Tensor | None
    """Likewise."""

    def sums_of(self, pairs: Vectors) -> Tensor:
        """[2]: `sums`, with the gradient that the vectors have as a part of the step's."""
        towards = [(pairs.images, self.images), (pairs.texts, self.texts), (pairs.scale, self.scale)]
        if pairs.bias is not None and self.bias is not None:
            towards.append((pairs.bias, self.bias))
        along = torch.stack([(vectors * gradient).sum() for vectors, gradient in towards]).sum()
        return torch.stack([self.sums[0] + (along - along.detach()), self.sums[1]])


def joined(parts: Sequence[Vectors]) -> Vectors:
    """The pairs of all parts, without a gradient."""
    labels = [part.labels for part in parts if part.labels is not None]
    return Vectors(
        torch.cat([part.images.detach() for part in parts]),
        torch.cat([part.texts.detach() for part in parts]),
        parts[0].scale.detach(),
        None if parts[0].bias is None else parts[0].bias.detach(),
        torch.cat(labels) if labels else None,
    )


def contrast_step(contrast: Contrast, parts: Sequence[Vectors], replicas: Replicas = ALONE) -> list[Kept]:
    """The contrast over the micro-batches of a step, from vectors that were made without their encoder's gradient: what
    each micro-batch's losses are to be when it is encoded anew with its gradient (GradCache, Gao et al. 2021).

    Exact, since an encoder here drops the same paths again.
    """
    whole, sizes = joined(parts), [len(part.images) for part in parts]
    names = ["images", "texts", "scale"] if whole.bias is None else ["images", "texts", "scale", "bias"]
    leaves = {name: getattr(whole, name).requires_grad_() for name in names}
    with torch.enable_grad():
        each = contrast(replace(whole, **leaves), replicas)
        sums = each.sum(1)
        images, texts, *of_head = torch.autograd.grad(sums[0], [*leaves.values()])
    kept = []
    of_parts = zip(each.detach().split(sizes, dim=1), images.split(sizes), texts.split(sizes), strict=True)
    for number, (own, of_images, of_texts) in enumerate(of_parts):
        once = float(number == 0)
        scale, *bias = (once * gradient for gradient in of_head)
        kept.append(Kept(once * sums.detach(), own, of_images, of_texts, scale, bias[0] if bias else None))
    return kept
