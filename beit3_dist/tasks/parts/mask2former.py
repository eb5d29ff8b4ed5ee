"""Mask2Former (Cheng et al. 2022) for classes of pixels: a pixel decoder of deformable attention, a decoder whose
queries see where their mask is, matching, and losses.

Each query says a class, or none, and a mask; a pixel's score of a class is the sum over queries of both probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, prod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    grid_sample,
    relu,
    scaled_dot_product_attention,
    softplus,
)

from beit3_dist.hashing import hash64_tensor, right_shift
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.deformable import DeformableAttention, Grid, centres
from beit3_dist.tasks.parts.upernet import convolution, resized_to

ENCODER_LAYERS, DECODER_LAYERS = 6, 9
HEADS = 8
OF_CLASS, OF_MASK, OF_DICE, OF_NONE = 2.0, 5.0, 5.0, 0.1
"""Weights of the losses, and in the first of the class none."""
POINTS, OVERSAMPLED, UNCERTAIN = 12_544, 3, 0.75
"""Places that a mask's losses look at; so many times more are drawn, of which this share is the most uncertain ones."""


def position_vectors(grid: Grid, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of the cells' places, half of y and half of x: [h * w, width] (DETR, Carion et al. 2020)."""
    each = width // 2
    speeds = 10_000 ** (2 * (torch.arange(each, device=device) // 2) / each)
    angles = centres([grid], device)[:, [1, 0], None] * 2 * pi / speeds  # [cells, 2, each]
    waves = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1)
    return waves.flatten(1)


class Attention(nn.Module):
    """Multi-head attention whose queries and keys have positions added: queries [B, Q, D], tokens [B, N, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
        """`seen`: bool [B, Q, N], where each query may look."""
        parts = (self.q(queries), self.k(keys), self.v(values))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = scaled_dot_product_attention(q, k, v, None if seen is None else seen[:, None])
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = Linear(width, inner), Linear(inner, width), LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fc2(relu(self.fc1(x))))


class PixelLayer(nn.Module):
    """Deformable attention among three levels, then a feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.norm = DeformableAttention(width, HEADS, 3), LayerNorm(width)
        self.ffn = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, positions: Tensor, references: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self.ffn(self.norm(x + self.attention(x + positions, references, x, grids)))


class Levels(nn.Module):
    """Adds to tokens which of three levels they are of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(3, width))

    def forward(self, positions: Sequence[Tensor]) -> list[Tensor]:
        return [one + vector for one, vector in zip(positions, self.vectors, strict=True)]


class PixelDecoder(nn.Module):
    """Four maps [B, C, ...], finest first -> features of the finest [B, D, h, w], and tokens of the others, coarsest
    first, with their grids."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.given = nn.ModuleList([convolution(channels, width, 1) for _ in range(4)])
        self.levels = Levels(width)
        self.layers = nn.ModuleList([PixelLayer(width) for _ in range(ENCODER_LAYERS)])
        self.smoothed = convolution(width, width, 3)
        self.features = nn.Conv2d(width, width, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Grid]]:
        finest, *coarser = [of(one) for of, one in zip(self.given, maps, strict=True)]
        coarser = coarser[::-1]
        grids = [(one.shape[2], one.shape[3]) for one in coarser]
        own = [position_vectors(grid, finest.shape[1], finest.device).to(finest.dtype) for grid in grids]
        positions, references = torch.cat(self.levels(own)), centres(grids, finest.device)
        x = torch.cat([one.flatten(2).transpose(1, 2) for one in coarser], 1)
        for layer in self.layers:
            x = layer(x, positions, references, grids)
        tokens = list(x.split([prod(grid) for grid in grids], 1))
        last = tokens[-1].transpose(1, 2).unflatten(2, grids[-1])
        return self.features(self.smoothed(finest + resized_to(last, finest))), tokens, grids


class QueryLayer(nn.Module):
    """Queries look at a level within their masks, at one another, and pass a feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cross, self.cross_norm = Attention(width), LayerNorm(width)
        self.own, self.own_norm = Attention(width), LayerNorm(width)
        self.ffn = FeedForward(width, 8 * width)

    def forward(self, q: Tensor, of_query: Tensor, tokens: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        q = self.cross_norm(q + self.cross(q + of_query, tokens + positions, tokens, seen))
        q = self.own_norm(q + self.own(q + of_query, q + of_query, q))
        return self.ffn(q)


class Predictor(nn.Module):
    """Queries [B, Q, D] and features [B, D, h, w] -> logits of the classes and of none, [B, Q, classes + 1], and of the
    masks [B, Q, h, w]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.head = Linear(width, classes + 1)
        self.mask = nn.Sequential(
            Linear(width, width), nn.ReLU(), Linear(width, width), nn.ReLU(), Linear(width, width)
        )

    def forward(self, q: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        q = self.norm(q)
        return self.head(q), torch.einsum("bqd,bdhw->bqhw", self.mask(q), features)


class Queries(nn.Module):
    """What queries are at first, and what tells them apart: [Q, D] each."""

    def __init__(self, queries: int, width: int) -> None:
        super().__init__()
        self.first, self.own = (nn.Parameter(torch.empty(queries, width)) for _ in range(2))

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.first.expand(batch, -1, -1), self.own.expand(batch, -1, -1)


Predictions = list[tuple[Tensor, Tensor]]
"""Of the queries themselves and of every layer: logits of classes [B, Q, classes + 1] and masks [B, Q, h, w]."""


class Mask2Former(nn.Module):
    """Four maps -> the predictions of every layer, the last one's last."""

    def __init__(self, channels: int, width: int, queries: int, classes: int) -> None:
        super().__init__()
        self.pixels = PixelDecoder(channels, width)
        self.queries, self.levels = Queries(queries, width), Levels(width)
        self.layers = nn.ModuleList([QueryLayer(width) for _ in range(DECODER_LAYERS)])
        self.predictor = Predictor(width, classes)

    def forward(self, maps: Sequence[Tensor]) -> Predictions:
        features, tokens, grids = self.pixels(maps)
        positions = self.levels(
            [position_vectors(g, features.shape[1], features.device).to(features.dtype) for g in grids]
        )
        q, of_query = self.queries(len(features))
        predictions = [self.predictor(q, features)]
        for number, layer in enumerate(self.layers):
            level = number % 3
            seen = resized_to(predictions[-1][1].detach(), grids[level]).flatten(2) >= 0
            seen = seen | ~seen.any(-1, keepdim=True)  # a query that would see nothing sees all
            q = layer(q, of_query, tokens[level], positions[level], seen)
            predictions.append(self.predictor(q, features))
        return predictions


def scores_of(predictions: Predictions) -> Tensor:
    """[B, classes, h, w]: how far each class has each pixel, by the last layer."""
    classes, masks = predictions[-1]
    return torch.einsum("bqc,bqhw->bchw", classes.float().softmax(-1)[..., :-1], masks.float().sigmoid())


# -------------------------------------------------------------------------------------------------- matching and losses


def assigned(costs: np.ndarray) -> np.ndarray:
    """The columns of a matrix [rows, columns], rows <= columns, that rows take, one each, at the least sum of costs
    (the Hungarian method with potentials, Jonker and Volgenant 1987): int64 [rows]."""
    rows, columns = costs.shape
    of_row, of_column = np.zeros(rows + 1), np.zeros(columns + 1)
    taken_by = np.zeros(columns + 1, np.int64)  # 0: nobody; rows count from 1 here
    for row in range(1, rows + 1):
        taken_by[0], column = row, 0
        least, before = np.full(columns + 1, np.inf), np.zeros(columns + 1, np.int64)
        used = np.zeros(columns + 1, bool)
        while taken_by[column]:
            used[column] = True
            owner = taken_by[column]
            slack = costs[owner - 1] - of_row[owner] - of_column[1:]
            better = ~used[1:] & (slack < least[1:])
            least[1:][better], before[1:][better] = slack[better], column
            following = 1 + int(np.where(used[1:], np.inf, least[1:]).argmin())
            step = least[following]
            of_row[taken_by[used]] += step
            of_column[used] -= step
            least[~used] -= step
            column = following
        while column:
            taken_by[column] = taken_by[before[column]]
            column = before[column]
    places = np.empty(rows, np.int64)
    held = taken_by[1:] > 0
    places[taken_by[1:][held] - 1] = np.flatnonzero(held)
    return places


def drawn_places(key: Tensor, number: int, salt: int) -> Tensor:
    """Places in (0, 1), [number, 2], by a hash of an integer `key` []: the same in any layout."""
    counter = torch.arange(2 * number, device=key.device) + (salt << 40)
    return (right_shift(hash64_tensor(hash64_tensor(counter) ^ key), 40).float() / (1 << 24)).view(number, 2)


def at_places(maps: Tensor, places: Tensor) -> Tensor:
    """Maps [N, h, w] at places [P, 2] or [N, P, 2], bilinear: [N, P]."""
    places = places.expand(len(maps), -1, -1) if places.ndim == 2 else places
    return grid_sample(maps[:, None], (2 * places - 1)[:, None], align_corners=False)[:, 0, 0]


def mask_terms(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice loss of masks [N, P]: [N] each."""
    found = logits.sigmoid()
    dice = 1 - (2 * (found * truth).sum(1) + 1) / (found.sum(1) + truth.sum(1) + 1)
    return binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1), dice


@torch.no_grad()
def matched(classes: Tensor, masks: Tensor, labels: Tensor, truth: Tensor, places: Tensor) -> Tensor:
    """The query of each true mask, int64 [M], of an image: logits [Q, classes + 1] and [Q, h, w], labels int64 [M],
    masks [M, H, W], all looked at at the same places [P, 2]."""
    ours, theirs = at_places(masks.float(), places), at_places(truth, places)
    of_class = -classes.float().softmax(-1)[:, labels]
    positive, negative, points = softplus(-ours), softplus(ours), ours.shape[1]
    of_mask = (positive @ theirs.T + negative @ (1 - theirs).T) / points
    found = ours.sigmoid()
    dice = 1 - (2 * found @ theirs.T + 1) / (found.sum(1)[:, None] + theirs.sum(1) + 1)
    costs = OF_CLASS * of_class + OF_MASK * of_mask + OF_DICE * dice
    finite = costs.nan_to_num(1e9, 1e9, -1e9).T.double()  # a loss that is not finite is told later
    return torch.from_numpy(assigned(finite.cpu().numpy())).to(labels.device)


def uncertain_places(masks: Tensor, key: Tensor, points: int, salt: int) -> Tensor:
    """[N, P, 2]: three quarters where the masks [N, h, w] are closest to undecided, of three times as many drawn ones,
    the others anywhere (PointRend, Kirillov et al. 2020)."""
    drawn = drawn_places(key, len(masks) * points * OVERSAMPLED, salt).view(len(masks), -1, 2)
    chosen = at_places(masks, drawn).abs().topk(int(UNCERTAIN * points), 1, largest=False).indices
    others = drawn_places(key, len(masks) * (points - chosen.shape[1]), salt + 1).view(len(masks), -1, 2)
    return torch.cat([drawn.gather(1, chosen[..., None].expand(-1, -1, 2)), others], 1)


def image_loss(predictions: Predictions, image: int, labels_HW: Tensor, key: Tensor, points: int = POINTS) -> Tensor:
    """The loss of one image of the batch over all layers, each with a matching of its own, in fp32: the classes' mean
    over queries, weighted, and the masks' over this image's masks, where the released code takes the batch's and all
    ranks': so an image's loss is the same in any layout. labels: int [H, W], below 0 where nothing is known."""
    present = labels_HW[labels_HW >= 0].unique().long()
    truth = (labels_HW == present[:, None, None]).float()
    total = torch.zeros((), device=labels_HW.device)
    for layer, (classes, masks) in enumerate(predictions):
        logits, masks = classes[image].float(), masks[image].float()
        wanted = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
        weights = logits.new_ones(logits.shape[1])
        weights[-1] = OF_NONE
        if len(present):
            query = matched(logits, masks, present, truth, drawn_places(key, points, 3 * layer))
            wanted[query] = present
            places = uncertain_places(masks[query].detach(), key, points, 3 * layer + 1)
            cross, dice = mask_terms(at_places(masks[query], places), at_places(truth, places))
            total = total + OF_MASK * cross.mean() + OF_DICE * dice.mean()
        else:  # every parameter takes part in every step
            total = total + 0 * masks.sum()
        total = total + OF_CLASS * cross_entropy(logits, wanted, weights)
    return total
