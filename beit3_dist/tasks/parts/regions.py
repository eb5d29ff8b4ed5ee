"""Boxes, and what detectors do with them: overlaps, offsets, suppression, pooling, matching, sampling.

A box is (x0, y0, x1, y1) in pixels. torchvision's C++ operators suppress and pool where they can be used; where they
cannot, as beside a CPU build of torch, plain torch computes the same, and a line of the log says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from beit3_dist.hashing import hash64, hash64_tensor, right_shift, signed
from beit3_dist.opening import one_line

LARGEST_GROWTH = math.log(1000 / 16)
"""Of a side, by one offset (Faster R-CNN)."""
BACKGROUND, BETWEEN = -1, -2
"""What `matched` gives a box that is none's, and one that is neither."""
CELLS = 14
"""A box whose side has so many cells of a level is pooled from it (224 pixels at stride 16: Lin et al. 2017)."""

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------- geometry


def areas(boxes_N4: Tensor) -> Tensor:
    """[N]; 0 of a box that is turned inside out."""
    sides = (boxes_N4[:, 2:] - boxes_N4[:, :2]).clamp(min=0)
    return sides[:, 0] * sides[:, 1]


def overlaps(some_N4: Tensor, others_M4: Tensor) -> Tensor:
    """Intersection over union, [N, M]; 0 where both are empty."""
    low = torch.maximum(some_N4[:, None, :2], others_M4[None, :, :2])
    high = torch.minimum(some_N4[:, None, 2:], others_M4[None, :, 2:])
    sides = (high - low).clamp(min=0)
    common = sides[..., 0] * sides[..., 1]
    union = areas(some_N4)[:, None] + areas(others_M4) - common
    return torch.where(common > 0, common / union, 0)


def offsets(starts_N4: Tensor, boxes_N4: Tensor, weights: Sequence[float]) -> Tensor:
    """What leads from boxes to others, [N, 4]: shifts of the centre in sides of the start, logarithms of the growth,
    times `weights` (Faster R-CNN, Ren et al. 2015)."""
    sides, wanted = (boxes[:, 2:] - boxes[:, :2] for boxes in (starts_N4, boxes_N4))
    centres, wanted_centres = (boxes[:, :2] + side / 2 for boxes, side in ((starts_N4, sides), (boxes_N4, wanted)))
    shifts = (wanted_centres - centres) / sides
    return torch.cat([shifts, (wanted / sides).log()], 1) * starts_N4.new_tensor(weights)


def moved(starts_N4: Tensor, offsets_NK4: Tensor, weights: Sequence[float]) -> Tensor:
    """The reverse of `offsets` for K offsets a box, [N, K, 4], in fp32."""
    change = offsets_NK4.float() / starts_N4.new_tensor(weights)
    sides = (starts_N4[:, 2:] - starts_N4[:, :2])[:, None]
    centres = starts_N4[:, None, :2] + sides / 2 + change[..., :2] * sides
    half = change[..., 2:].clamp(max=LARGEST_GROWTH).exp() * sides / 2
    return torch.cat([centres - half, centres + half], -1)


def anchors(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Boxes around the corners of a map's cells, row by row, [height * width * 3, 4]: of 8 strides squared, with ratios
    of height to width of .5, 1 and 2 (Lin et al. 2017; 32 to 512 pixels at strides 4 to 64)."""
    ratios = torch.tensor([0.5, 1.0, 2.0], device=device)
    across = 8 * stride / ratios.sqrt()
    half = torch.stack([across, across * ratios], 1) / 2
    y, x = torch.meshgrid(*(torch.arange(n, device=device) * float(stride) for n in (height, width)), indexing="ij")
    centres = torch.stack([x, y], -1).view(-1, 1, 2)
    return torch.cat([centres - half, centres + half], -1).view(-1, 4)


# ---------------------------------------------------------------------------------------- torchvision or plain torch


@cache
def torchvision_operators(device: str) -> Any:
    """The module torchvision.ops, whose C++ operators work on a kind of device; None where they do not."""
    try:
        operators = import_module("torchvision.ops")
        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
        operators.nms(box, box[:, 2], 0.5)
        return operators
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = one_line(error, 100)
        log.warning("torchvision's C++ operators cannot be used (%s): plain torch suppresses and pools boxes", reason)
        return None


def suppressed(boxes_N4: Tensor, scores_N: Tensor, groups_N: Tensor, threshold: float) -> Tensor:
    """Numbers of the boxes that no better one of the same group overlaps by more than `threshold`, best first."""
    operators = torchvision_operators(boxes_N4.device.type)
    if operators is not None:
        return operators.batched_nms(boxes_N4, scores_N, groups_N, threshold)
    kept = [
        rows[plain_nms(boxes_N4[rows], scores_N[rows], threshold)]
        for rows in (torch.nonzero(groups_N == group)[:, 0] for group in groups_N.unique())
    ]
    found = torch.cat([groups_N.new_empty(0, dtype=torch.int64), *kept])
    return found[scores_N[found].argsort(descending=True, stable=True)]


def plain_nms(boxes_N4: Tensor, scores_N: Tensor, threshold: float) -> Tensor:
    """As torchvision's: the greedy choice, found as the fixed point of "kept is what no kept better one overlaps"; each
    turn settles at least one more box in the order of scores."""
    order = scores_N.argsort(descending=True, stable=True)
    boxes_N4 = boxes_N4[order]
    covers = (overlaps(boxes_N4, boxes_N4) > threshold).triu(1)
    kept = torch.ones(len(order), dtype=torch.bool, device=order.device)
    while True:
        now = ~(covers & kept[:, None]).any(0)
        if torch.equal(now, kept):
            return order[kept]
        kept = now


def softly_suppressed(
    boxes_N4: Tensor, scores_N: Tensor, groups_N: Tensor, threshold: float, most: int
) -> tuple[Tensor, Tensor]:
    """Numbers and scores of the `most` best boxes where each that is taken lowers those of its group which it overlaps
    by more than `threshold`, times 1 - overlap (Soft-NMS, linear: Bodla et al. 2017)."""
    left, taken, given = scores_N.clone(), [], []
    for _ in range(min(most, len(scores_N))):
        best = left.argmax()
        taken.append(best)
        given.append(left[best])
        shared = overlaps(boxes_N4[best][None], boxes_N4)[0]
        lowered = (groups_N == groups_N[best]) & (shared > threshold)
        left = torch.where(lowered, left * (1 - shared), left)
        left[best] = -1
    if not taken:
        return groups_N.new_empty(0, dtype=torch.int64), scores_N
    return torch.stack(taken), torch.stack(given)


def roi_align(map_BCHW: Tensor, boxes_K4: Tensor, images_K: Tensor, stride: float, size: int) -> Tensor:
    """The map under boxes of images as squares [K, C, size, size], in fp32: means of bilinear samples, about one for
    each cell that a bin covers (RoIAlign, He et al. 2017; the aligned form)."""
    map_BCHW, boxes_K4 = map_BCHW.float(), boxes_K4.float()
    operators = torchvision_operators(map_BCHW.device.type)
    exactly = torch.are_deterministic_algorithms_enabled() and map_BCHW.is_cuda  # torchvision's sums by atomics there
    if operators is None or exactly:
        return plain_roi_align(map_BCHW, boxes_K4, images_K, stride, size)
    rows = torch.cat([images_K[:, None].float(), boxes_K4], 1)
    return operators.roi_align(map_BCHW, rows, size, 1 / stride, 0, True)


def plain_roi_align(map_BCHW: Tensor, boxes_K4: Tensor, images_K: Tensor, stride: float, size: int) -> Tensor:
    """A bin's mean of bilinear samples on a grid is a product of what it takes of the rows and of the columns."""
    boxes_K4 = boxes_K4 / stride - 0.5
    columns_KsW, rows_KsH = (
        _shares(boxes_K4[:, side], boxes_K4[:, side + 2] - boxes_K4[:, side], size, map_BCHW.shape[3 - side])
        for side in (0, 1)
    )
    parts, places = [map_BCHW.new_empty(0, map_BCHW.shape[1], size, size)], [images_K[:0]]
    for image in images_K.unique().tolist():
        of_image = torch.nonzero(images_K == image)[:, 0]
        lines = torch.einsum("kph,chw->kcpw", rows_KsH[of_image], map_BCHW[image])
        parts.append(torch.einsum("kcpw,kqw->kcpq", lines, columns_KsW[of_image]))
        places.append(of_image)
    return torch.cat(parts)[torch.cat(places).argsort()]


def _shares(starts_K: Tensor, lengths_K: Tensor, bins: int, cells: int) -> Tensor:
    """What each bin of stretches takes of a line's cells, [K, bins, cells]."""
    bin_K = lengths_K / bins
    points_K = bin_K.ceil().clamp(min=0)  # samples of a bin
    numbers = torch.arange(int(points_K.max()) if len(points_K) else 0, device=starts_K.device)
    within = (numbers + 0.5) / points_K.clamp(min=1)[:, None]  # [K, points]
    at = (
        starts_K[:, None, None]
        + (torch.arange(bins, device=starts_K.device)[:, None] + within[:, None]) * bin_K[:, None, None]
    )
    counts = (numbers < points_K[:, None])[:, None] & (at >= -1) & (at <= cells)  # further out is nothing
    share = counts / points_K.clamp(min=1)[:, None, None]
    at = at.clamp(0, cells - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=cells - 1)
    beyond = at - low
    shares = starts_K.new_zeros(len(starts_K), bins, cells)
    return shares.scatter_add_(2, low, share * (1 - beyond)).scatter_add_(2, high, share * beyond)


def pooled(maps: Sequence[Tensor], strides: Sequence[int], boxes_K4: Tensor, images_K: Tensor, size: int) -> Tensor:
    """`roi_align` of each box from the level that fits its size, [K, C, size, size] in the maps' precision."""
    sides = areas(boxes_K4).sqrt() / (CELLS * strides[0])
    levels_K = (sides + 1e-8).log2().floor().clamp(0, len(maps) - 1)
    rows = [torch.nonzero(levels_K == level)[:, 0] for level in range(len(maps))]
    parts = [
        roi_align(level, boxes_K4[some], images_K[some], stride, size)
        for level, stride, some in zip(maps, strides, rows, strict=True)
    ]
    return torch.cat(parts)[torch.cat(rows).argsort()].to(maps[0].dtype)


# --------------------------------------------------------------------------------------------------- matching, sampling


def matched(boxes_N4: Tensor, truths_G4: Tensor, low: float, high: float, weak: bool = False) -> Tensor:
    """int64 [N]: the truth that each box overlaps most, if by `high` or more; BACKGROUND if by less than `low`; else
    BETWEEN. `weak`: those that overlap a truth most of all are its, however little."""
    if not len(truths_G4):
        return torch.full((len(boxes_N4),), BACKGROUND, device=boxes_N4.device)
    shared_GN = overlaps(truths_G4, boxes_N4)
    most, whose = shared_GN.max(0)
    if weak:
        best_G1 = shared_GN.max(1, keepdim=True).values
        best = ((shared_GN == best_G1) & (best_G1 > 0)).any(0)
    else:
        best = torch.zeros_like(most, dtype=torch.bool)
    whose = torch.where(most >= high, whose, torch.where(best, whose, BETWEEN))
    return torch.where((most < low) & ~best, BACKGROUND, whose)


def draws(key: Tensor, use: int, ids: Tensor) -> Tensor:
    """Whole numbers >= 0 that are a function of (key, use, id) alone, int64 [N]: at any layout, and again after a
    resume. `key`: int64 scalar of a sample."""
    return right_shift(hash64_tensor(hash64_tensor(key ^ signed(hash64(use))) ^ ids), 1)


def chosen(among_N: Tensor, draws_N: Tensor, most: int) -> Tensor:
    """Numbers of at most so many of those in `among` bool [N], the ones with the least draws."""
    last = torch.iinfo(torch.int64).max
    least = torch.where(among_N, draws_N, last).topk(min(most, len(among_N)), largest=False)
    return least.indices[least.values < last]
