"""Faster, Mask and Cascade R-CNN's heads on a pyramid of maps, as ViTDet has them (Li et al. 2022).

Proposals of boxes come from every cell of the maps; heads tell the classes of the best ones, move them, and draw masks
in them. Norms are LayerNorms over channels. Losses are sums of each image: whoever calls divides them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, max_pool2d, relu

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.pyramid import ChannelNorm, SimplePyramid, Windows
from beit3_dist.tasks.config import DenseConfig
from beit3_dist.tasks.data.object_views import Objects, unpacked
from beit3_dist.tasks.parts import regions
from beit3_dist.tasks.parts.heads import TaskHead
from beit3_dist.tasks.parts.regions import BACKGROUND

ANCHORS = 3
"""Boxes around a cell."""
ANCHORS_LEARNT, ANCHORS_OF_OBJECTS = 256, 128
"""Of each image, the latter at most (Faster R-CNN)."""
OBJECTS_SHARE = 4
"""At most a fourth of the regions that heads learn from show objects."""
BOX_SIZE, MASK_SIZE = 7, 14
"""Cells that a region is pooled to."""
MASK_SIDE = 2 * MASK_SIZE
PLAIN = ((0.5, (10.0, 10.0, 5.0, 5.0)),)
CASCADE = (
    (0.5, (10.0, 10.0, 5.0, 5.0)),
    (0.6, (20.0, 20.0, 10.0, 10.0)),
    (0.7, (30.0, 30.0, 15.0, 15.0)),
)  # fmt: skip
"""Overlap from which a region is an object's, and weights of its offsets, of each head for boxes (Cai and Vasconcelos
2018)."""
SUPPRESSED_PROPOSALS, SUPPRESSED_BOXES = 0.7, 0.5
"""Overlap from which the better one stays."""
ANCHOR_DRAW, REGION_DRAW = 1, 2
"""Uses of a sample's draws."""


Choose = Callable[[Tensor, Tensor], Tensor]
"""Boxes [n, K, 4] and scores [n, classes] of an image -> detections [m, 6], best first."""


@dataclass
class Regions:
    """Boxes of a micro-batch's images."""

    boxes: Tensor
    """float32 [N, 4]."""
    images: Tensor
    """int64 [N]: whose each is, ascending."""
    ids: Tensor
    """int64 [N]: what tells the boxes of an image apart, whatever their order."""


@dataclass
class Truth:
    """What regions show."""

    labels: Tensor
    """int64 [N]; the number of classes where there is no object."""
    objects: Tensor
    """int64 [N]: number of the object in its image's row; 0 where there is none."""
    boxes: Tensor
    """float32 [N, 4] of the object."""


@dataclass(frozen=True)
class Look:
    """Maps of images at one of the sizes at which they are seen."""

    maps: Sequence[Tensor]
    side: int
    """Pixels of the images' sides."""
    mirrored: bool = False
    """Left is right."""

    def boxes(self, own_NK4: Tensor, side: int) -> Tensor:
        """Boxes in the images as they are, of this side."""
        return (self._turned(own_NK4) if self.mirrored else own_NK4) * (side / self.side)

    def own_boxes(self, boxes_NK4: Tensor, side: int) -> Tensor:
        """The reverse of `boxes`."""
        own_NK4 = boxes_NK4 * (self.side / side)
        return self._turned(own_NK4) if self.mirrored else own_NK4

    def _turned(self, own_NK4: Tensor) -> Tensor:
        x0, y0, x1, y1 = own_NK4.unbind(-1)
        return torch.stack([self.side - x1, y0, self.side - x0, y1], -1)


@dataclass
class Sums:
    """Sums over the regions of each image [B], and how many regions it had."""

    losses: dict[str, Tensor]
    regions: Tensor
    objects: Tensor
    right: Tensor
    """Regions whose class was the likeliest."""


def convolved(channels: int) -> nn.Sequential:
    """Four 3 x 3 convolutions with norms."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), ChannelNorm(channels), nn.ReLU()]
    return nn.Sequential(*layers)


class ProposalHead(nn.Module):
    """Maps [B, C, h, w] -> logits of whether a cell's anchors hold an object, [B, N], and offsets, [B, N, 4], where N =
    h * w * 3. Two convolutions before, as in ViTDet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)))
        self.objectness = nn.Conv2d(channels, ANCHORS, 1)
        self.offsets = nn.Conv2d(channels, 4 * ANCHORS, 1)

    def forward(self, map_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.conv:
            map_BCHW = relu(layer(map_BCHW))
        scores = self.objectness(map_BCHW).movedim(1, -1).flatten(1)
        offsets = self.offsets(map_BCHW).movedim(1, -1).unflatten(-1, (ANCHORS, 4)).flatten(1, 3)
        return scores.float(), offsets.float()


class BoxHead(nn.Module):
    """Regions [N, C, 7, 7] -> logits [N, classes + 1], the last of them no object, and offsets [N, K, 4], of all
    classes together (K = 1) or each."""

    def __init__(self, channels: int, classes: int, together: bool) -> None:
        super().__init__()
        self.conv = convolved(channels)
        self.dense = Linear(channels * BOX_SIZE**2, 4 * channels)
        self.score = Linear(4 * channels, classes + 1)
        self.offset = Linear(4 * channels, 4 if together else 4 * classes)

    def forward(self, x_NC77: Tensor) -> tuple[Tensor, Tensor]:
        hidden = relu(self.dense(self.conv(x_NC77).flatten(1)))
        return self.score(hidden).float(), self.offset(hidden).float().unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Regions [N, C, 14, 14] -> logits of each class's mask, [N, classes, 28, 28]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = convolved(channels)
        self.finer = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.draw = nn.Conv2d(channels, classes, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.draw(relu(self.finer(self.conv(x_NCHW)))).float()


class Detector(TaskHead):
    """The pyramid and the heads on it."""

    begins_with_norm = True

    def __init__(self, config: ModelConfig, classes: int, dense: DenseConfig, masks: bool) -> None:
        super().__init__()
        self.classes, self.settings = classes, dense
        windows = Windows(dense.window, dense.global_blocks)
        self.pyramid = SimplePyramid(config, dense.channels, windows)
        self.strides = [*self.pyramid.strides, 2 * self.pyramid.strides[-1]]
        self.proposals = ProposalHead(dense.channels)
        self.stages = CASCADE if dense.cascade else PLAIN
        self.boxes = nn.ModuleList(BoxHead(dense.channels, classes, dense.cascade) for _ in self.stages)
        self.masks = MaskHead(dense.channels, classes) if masks else None
        # Faster R-CNN's; Mask R-CNN's
        matrices = {f"proposals.{name}": 0.01 for name in ("conv.0", "conv.1", "objectness", "offsets")}
        for number in range(len(self.stages)):
            matrices |= {f"boxes.{number}.score": 0.01, f"boxes.{number}.offset": 0.001}
        matrices |= {"masks.draw": 0.001} if masks else {}
        self.deviations = {f"{name}.weight": deviation for name, deviation in matrices.items()}

    # -------------------------------------------------------------------------------------------------------- proposals

    def propose(self, maps: Sequence[Tensor], side: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of each level the anchors [N, 4], their scores [B, N] and offsets [B, N, 4]."""
        levels = [*maps, max_pool2d(maps[-1], 1, 2)]
        found = [self.proposals(level) for level in levels]
        around = [
            regions.anchors(level.shape[2], level.shape[3], stride, level.device)
            for level, stride in zip(levels, self.strides, strict=True)
        ]
        return around, [scores for scores, _ in found], [offsets for _, offsets in found]

    @torch.no_grad()
    def best(
        self, around: list[Tensor], scores: list[Tensor], offsets: list[Tensor], side: int, most: int, before: int
    ) -> Regions:
        """The `most` best proposals of each image, of the `before` best of each level those that no better one
        covers."""
        first = [0]
        for level in around:
            first.append(first[-1] + len(level))
        boxes, images, ids = [], [], []
        for image in range(len(scores[0])):
            of_levels: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
            for number, level in enumerate(around):
                top = scores[number][image].topk(min(before, len(level)))
                moved = regions.moved(level[top.indices], offsets[number][image, top.indices][:, None], (1.0,) * 4)
                of_levels.append((
                    moved[:, 0].clamp(0, side), top.values, top.indices + first[number],
                    torch.full_like(top.indices, number),
                ))  # fmt: skip
            moved, values, places, groups = (torch.cat(parts) for parts in zip(*of_levels, strict=True))
            real = torch.nonzero(regions.areas(moved) > 0)[:, 0]
            kept = regions.suppressed(moved[real], values[real], groups[real], SUPPRESSED_PROPOSALS)[:most]
            boxes.append(moved[real][kept])
            ids.append(places[real][kept])
            images.append(torch.full_like(kept, image))
        return Regions(torch.cat(boxes), torch.cat(images), torch.cat(ids))

    def proposal_losses(
        self, around: list[Tensor], scores: list[Tensor], offsets: list[Tensor], objects: Objects, keys: Tensor
    ) -> dict[str, Tensor]:
        """Sums [B] over anchors that are drawn of each image, divided by the number that is."""
        anchors = torch.cat(around)
        ids = torch.arange(len(anchors), device=anchors.device)
        objectness, places = [], []
        for image, (told, moved) in enumerate(zip(torch.cat(scores, 1), torch.cat(offsets, 1), strict=True)):
            truths = objects.boxes[image][objects.labels[image] >= 0]
            whose = regions.matched(anchors, truths, 0.3, 0.7, weak=True)
            draws = regions.draws(keys[image], ANCHOR_DRAW, ids)
            ours = regions.chosen(whose >= 0, draws, ANCHORS_OF_OBJECTS)
            others = regions.chosen(whose == BACKGROUND, draws, ANCHORS_LEARNT - len(ours))
            both = torch.cat([ours, others])
            targets = (whose[both] >= 0).float()
            objectness.append(binary_cross_entropy_with_logits(told[both], targets, reduction="sum"))
            if len(truths):
                wanted = regions.offsets(anchors[ours], truths[whose[ours]], (1.0,) * 4)
                places.append((moved[ours] - wanted).abs().sum())
            else:
                places.append(moved[:0].sum())
        sums = {"proposal": torch.stack(objectness), "proposal_box": torch.stack(places)}
        return {name: value / ANCHORS_LEARNT for name, value in sums.items()}

    # ------------------------------------------------------------------------------------------------ what regions show

    def truth(self, boxes_N4: Tensor, images_N: Tensor, objects: Objects, overlap: float) -> Truth:
        whose = torch.full_like(images_N, BACKGROUND)
        for image in range(len(objects.labels)):
            mine = images_N == image
            truths = objects.boxes[image][objects.labels[image] >= 0]
            whose[mine] = regions.matched(boxes_N4[mine], truths, overlap, overlap)
        numbers = whose.clamp(min=0)
        if objects.labels.shape[1] == 0:
            return Truth(torch.full_like(whose, self.classes), numbers, torch.zeros_like(boxes_N4))
        labels = torch.where(whose >= 0, objects.labels[images_N, numbers], self.classes)
        return Truth(labels, numbers, objects.boxes[images_N, numbers])

    @torch.no_grad()
    def drawn(self, proposals: Regions, objects: Objects, keys: Tensor) -> Regions:
        """Regions to learn from: of each image's proposals and objects, at most `regions`, of which a fourth show
        objects."""
        most = self.settings.regions
        boxes, images, ids = [], [], []
        for image in range(len(objects.labels)):
            mine = proposals.images == image
            truths = objects.boxes[image][objects.labels[image] >= 0]
            own = torch.cat([proposals.boxes[mine], truths])
            named = torch.cat([proposals.ids[mine], -1 - torch.arange(len(truths), device=own.device)])
            whose = regions.matched(own, truths, self.stages[0][0], self.stages[0][0])
            draws = regions.draws(keys[image], REGION_DRAW, named)
            ours = regions.chosen(whose >= 0, draws, most // OBJECTS_SHARE)
            both = torch.cat([ours, regions.chosen(whose == BACKGROUND, draws, most - len(ours))])
            boxes.append(own[both])
            ids.append(named[both])
            images.append(torch.full_like(both, image))
        return Regions(torch.cat(boxes), torch.cat(images), torch.cat(ids))

    # ----------------------------------------------------------------------------------------------------------- losses

    def losses(
        self, maps: Sequence[Tensor], objects: Objects, side: int, keys: Tensor
    ) -> tuple[dict[str, Tensor], Sums]:
        """Losses of proposals [B], and sums of what regions are told."""
        around, scores, offsets = self.propose(maps, side)
        of_proposals = self.proposal_losses(around, scores, offsets, objects, keys)
        kept = self.settings.proposals
        proposals = self.best(around, scores, offsets, side, kept, 2 * kept)
        learnt = self.drawn(proposals, objects, keys)
        return of_proposals, self.region_losses(maps, learnt, objects, side)

    def region_losses(self, maps: Sequence[Tensor], learnt: Regions, objects: Objects, side: int) -> Sums:
        batch, images = len(objects.labels), learnt.images
        per_image = lambda values: values.new_zeros(batch).index_add(0, images, values)  # noqa: E731
        losses: dict[str, Tensor] = {}
        boxes = learnt.boxes
        right = torch.zeros(batch, device=boxes.device)
        first: Truth | None = None
        for number, (head, (overlap, weights)) in enumerate(zip(self.boxes, self.stages, strict=True)):
            truth = self.truth(boxes, images, objects, overlap)
            first = first or truth
            real = (regions.areas(boxes) > 0).float()  # a head may have moved a box out of the image
            x = _scaled_gradient(regions.pooled(maps, self.strides[:4], boxes, images, BOX_SIZE), 1 / len(self.stages))
            logits, moves = head(x)
            told = cross_entropy(logits, truth.labels, reduction="none") * real
            is_object = (truth.labels < self.classes) & (real > 0)
            rows = torch.nonzero(is_object)[:, 0]
            column = truth.labels[rows] if moves.shape[1] > 1 else torch.zeros_like(rows)
            wanted = regions.offsets(boxes[rows], truth.boxes[rows], weights)
            away = (moves[rows, column] - wanted).abs().sum(1)
            losses[f"class_{number}"] = per_image(told)
            losses[f"box_{number}"] = moves.new_zeros(batch).index_add(0, images[rows], away)
            right = right + per_image((logits.argmax(1) == truth.labels).float()) / len(self.stages)
            if number + 1 < len(self.stages):
                boxes = regions.moved(boxes, moves.detach(), weights)[:, 0].clamp(0, side)
        assert first is not None
        objects_N = first.labels < self.classes
        if self.masks is not None:
            losses["mask"] = self._mask_losses(maps, learnt, first, objects, side)
        ones = torch.ones_like(images, dtype=torch.float32)
        return Sums(losses, per_image(ones), per_image(objects_N.float()), right)

    def _mask_losses(
        self, maps: Sequence[Tensor], learnt: Regions, truth: Truth, objects: Objects, side: int
    ) -> Tensor:
        """Sums [B] of the mean over the mask's places, of the regions that show objects."""
        assert self.masks is not None
        rows = torch.nonzero(truth.labels < self.classes)[:, 0]
        none = len(rows) == 0
        if none:  # all ranks pass through all modules, or ZeRO-3 would wait for ever
            rows = rows.new_zeros(1)
        boxes, images = learnt.boxes[rows], learnt.images[rows]
        logits = self.masks(regions.pooled(maps, self.strides[:4], boxes, images, MASK_SIZE))
        of_class = logits[torch.arange(len(rows), device=rows.device), truth.labels[rows].clamp(max=self.classes - 1)]
        if none:
            return torch.zeros(len(objects.labels), device=rows.device) + 0 * of_class.sum()
        targets = torch.cat([
            _mask_targets(objects.masks[image], truth.objects[rows[images == image]], boxes[images == image], side)
            for image in images.unique().tolist()
        ])  # fmt: skip
        means = binary_cross_entropy_with_logits(of_class, targets, reduction="none").mean((1, 2))
        return means.new_zeros(len(objects.labels)).index_add(0, images, means)

    # -------------------------------------------------------------------------------------------------------- detection

    @torch.no_grad()
    def detect(self, looks: Sequence[Look], side: int, choose: Choose) -> tuple[list[Tensor], Tensor | None]:
        """Of each image, of this side, the boxes that are chosen, float32 [n, 6]: x0, y0, x1, y1, score, label; and of
        all of them the probabilities of their masks, [N, 28, 28]. One choice is made of what all looks at the images
        have found, and a mask is the mean of what is drawn in each."""
        found = [self._candidates(look) for look in looks]
        boxes, scores, images = (torch.cat(parts) for parts in zip(*found, strict=True))
        boxes = torch.cat([look.boxes(some, side) for look, (some, _, _) in zip(looks, found, strict=True)])
        detections = []
        for image in range(len(looks[0].maps[0])):
            mine = images == image
            detections.append(choose(boxes[mine], scores[mine]))
        if self.masks is None:
            return detections, None
        together = torch.cat(detections)
        owners = torch.cat([torch.full((len(some),), n, device=boxes.device) for n, some in enumerate(detections)])
        rows, labels = torch.arange(len(together), device=boxes.device), together[:, 5].long()
        sums = boxes.new_zeros(len(together), MASK_SIDE, MASK_SIDE)
        for look in looks:
            under = look.own_boxes(together[:, None, :4], side)[:, 0]
            drawn = self.masks(regions.pooled(look.maps, self.strides[:4], under, owners, MASK_SIZE))[rows, labels]
            sums = sums + (drawn.flip(-1) if look.mirrored else drawn).sigmoid()
        return detections, sums / len(looks)

    def _candidates(self, look: Look) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [N, K, 4], their scores [N, classes], and whose they are [N]."""
        maps, side = look.maps, look.side
        around, scores, offsets = self.propose(maps, side)
        kept = self.settings.proposals
        found = self.best(around, scores, offsets, side, kept, kept)
        boxes, images = found.boxes, found.images
        sums = boxes.new_zeros(len(boxes), self.classes + 1)
        of_classes = boxes[:, None]
        for head, (_, weights) in zip(self.boxes, self.stages, strict=True):
            logits, moves = head(regions.pooled(maps, self.strides[:4], boxes, images, BOX_SIZE))
            sums = sums + logits.softmax(1)
            of_classes = regions.moved(boxes, moves, weights).clamp(0, side)
            boxes = of_classes[:, 0] if len(self.stages) > 1 else boxes
        return of_classes, sums[:, : self.classes] / len(self.stages), images


@dataclass(frozen=True)
class Choice:
    """Which boxes an image's detections are."""

    most: int
    least_score: float
    soft: float
    """Overlap from which Soft-NMS lowers scores; 0: what is overlapped by more than half is left out."""

    def __call__(self, boxes_NK4: Tensor, scores_NC: Tensor) -> Tensor:
        rows, labels = torch.nonzero(scores_NC > self.least_score, as_tuple=True)
        boxes = boxes_NK4[rows, labels if boxes_NK4.shape[1] > 1 else 0]
        scores = scores_NC[rows, labels]
        real = regions.areas(boxes) > 0
        boxes, scores, labels = boxes[real], scores[real], labels[real]
        if self.soft:
            kept, given = regions.softly_suppressed(boxes, scores, labels, self.soft, self.most)
        else:
            kept = regions.suppressed(boxes, scores, labels, SUPPRESSED_BOXES)[: self.most]
            given = scores[kept]
        return torch.cat([boxes[kept], given[:, None], labels[kept][:, None].float()], 1)


def _mask_targets(packed: Tensor, objects: Tensor, boxes: Tensor, side: int) -> Tensor:
    """The objects' masks under boxes, {0, 1} float [n, 28, 28]."""
    some, places = objects.unique(return_inverse=True)
    whole = unpacked(packed[some], side)[:, None]
    return (regions.roi_align(whole, boxes, places, 1, MASK_SIDE)[:, 0] >= 0.5).float()


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is `factor` times as large: the heads of a cascade share one of the maps."""
    return x if factor == 1 else x * factor + (x * (1 - factor)).detach()
