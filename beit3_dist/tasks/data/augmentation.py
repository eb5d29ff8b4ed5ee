"""Views of images for downstream tasks: random ones for training, fixed ones for evaluation, mixed ones in batches.

Everything random comes from a generator that the caller keys by sample. timm's operations draw from the global
generators of Python and numpy; these are set from that generator for the time of a call, and put back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from beit3_dist.config import require_within
from beit3_dist.data.transforms import cropped_view, resized
from beit3_dist.optional import optional_module

if TYPE_CHECKING:
    from beit3_dist.tasks.data.examples import Example

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the channels of ImageNet's images, in [0, 1]."""
GREY = (128, 128, 128)
"""What shows where an image was moved away."""
BEIT3_OPERATIONS = "AutoContrast Equalize Brightness Sharpness ShearX ShearY TranslateX TranslateY Rotate".split()
"""What `RandAugment(2, 7)` of the released vision-language recipes draws from; its tenth is to do nothing."""
BEIT3_RAND_AUGMENT = "rand-m7-n2-p0.45"
"""The same two draws of strength 7. There a draw is one of the ten and made with probability 1/2; here it is one of the
nine and made with probability 0.45 = 1/2 x 9/10."""
BEIT3_TRANSLATION = 10
"""Pixels of a translation at strength 10."""
ERASED_AREA, ERASED_RATIO, ERASE_ATTEMPTS = (0.02, 1 / 3), 0.3, 10
"""Share of the image that is erased, the least ratio of the sides (the greatest is its inverse), boxes tried."""


@dataclass(frozen=True)
class Views:
    """How images become square views of bytes."""

    min_crop_scale: float = 0.5
    horizontal_flip: float = 0.5
    rand_augment: str = ""
    """A policy of timm's RandAugment, such as rand-m9-mstd0.5-inc1, or beit3: two draws of nine changes at strength 7,
    each made with probability 0.45, as in the released vision-language recipes; empty: none."""
    erase: float = 0.0
    """Probability that a box of the training view is replaced by noise."""
    evaluation: Literal["squash", "centre"] = "squash"
    """The fixed view: the whole image, squashed to a square, or its largest centred square."""

    def __post_init__(self) -> None:
        require_within("(0, 1]", "", self, "min_crop_scale")
        require_within("[0, 1]", "", self, "horizontal_flip", "erase")
        if self.rand_augment:
            _rand_augment(self.rand_augment)

    def train(self, image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
        """A random view: crop, mirroring, changes, erasing -> uint8 [size, size, 3]."""
        view = cropped_view(image, rng, size, self.min_crop_scale, self.horizontal_flip)
        if self.rand_augment:
            change = _rand_augment(self.rand_augment)
            with globals_from(rng):
                view = np.asarray(change(Image.fromarray(view)))
        if rng.random() < self.erase:
            view = erased(view, rng)
        return view

    def evaluate(self, image: Image.Image, size: int) -> np.ndarray:
        """The fixed view -> uint8 [size, size, 3]."""
        if self.evaluation == "squash":
            return resized(image, size)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return resized(image, size, (left, top, left + side, top + side))

    def of_training(
        self, example: Example, images: Sequence[Image.Image], size: int, rngs: Iterable[np.random.Generator]
    ) -> tuple[Example, list[np.ndarray]]:
        """Random views of an example's images, and the example, whose label a task may change with them."""
        return example, [self.train(image, size, rng) for image, rng in zip(images, rngs, strict=True)]

    def of_evaluation(
        self, example: Example, images: Sequence[Image.Image], size: int
    ) -> tuple[Example, list[np.ndarray]]:
        """As `of_training`, the fixed views."""
        return example, [self.evaluate(image, size) for image in images]

    def seen(self, images: Iterable[Image.Image], size: int) -> torch.Tensor:
        """The fixed views of images, uint8 [B, 3, size, size]."""
        return stacked([self.evaluate(image, size) for image in images], size)


def stacked(views: Sequence[np.ndarray], size: int) -> torch.Tensor:
    """Views uint8 [H, W, 3] as one tensor [B, 3, H, W], smaller ones filled up by zeros; of none H and W are `size`."""
    height, width = (max((view.shape[side] for view in views), default=size) for side in (0, 1))
    pixels = np.zeros((len(views), height, width, 3), dtype=np.uint8)
    for row, view in zip(pixels, views, strict=True):
        row[: view.shape[0], : view.shape[1]] = view
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


@contextmanager
def globals_from(rng: np.random.Generator) -> Iterator[None]:
    """Python's and numpy's global generators give what `rng` decides inside, and go on as if nothing was after."""
    python, numpy = random.getstate(), np.random.get_state()
    seed = int(rng.integers(1 << 32))
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _timm(module: str) -> Any:
    """A module of timm, which takes seconds to import. Raises ValueError where it cannot be imported."""
    remedy = "install the torchvision that belongs to this torch, or switch them off"
    return optional_module(f"timm.data.{module}", "RandAugment or mixing", remedy)


@lru_cache
def _rand_augment(policy: str) -> Callable[[Image.Image], Image.Image]:
    """What a policy does to an image. Raises ValueError where timm knows no such policy."""
    make = _timm("auto_augment").rand_augment_transform
    if policy == "beit3":
        settings = {"img_mean": GREY, "translate_const": BEIT3_TRANSLATION}
        return make(BEIT3_RAND_AUGMENT, settings, transforms=BEIT3_OPERATIONS)
    try:
        return make(policy, {"img_mean": GREY})
    except (AssertionError, ValueError, KeyError):
        raise ValueError(
            f"rand_augment={policy!r} is neither beit3 nor a policy such as rand-m9-mstd0.5-inc1"
        ) from None


def erased(view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A view with one box of noise, in the sizes of Zhong et al. 2017: uint8 [H, W, 3] -> a new array. The noise is
    that of standard normal values after ImageNet's normalisation, but cut to what bytes can hold."""
    height, width, channels = view.shape
    for _ in range(ERASE_ATTEMPTS):
        area = rng.uniform(*ERASED_AREA) * height * width
        ratio = math.exp(rng.uniform(math.log(ERASED_RATIO), -math.log(ERASED_RATIO)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            mean, deviation = (255 * np.array(levels) for levels in IMAGENET)
            noise = mean + deviation * rng.standard_normal((h, w, channels))
            view = view.copy()
            view[top : top + h, left : left + w] = np.rint(noise).clip(0, 255)
            return view
    return view


@dataclass(frozen=True)
class Mixing:
    """Mixup and CutMix: neighbours of the global batch, two by two, exchange or blend parts and labels. timm mixes the
    samples of a device's batch; by neighbours the mix is the same at any number of devices."""

    classes: int
    mixup: float = 0.8
    """Alpha of the beta distribution that images are blended by; 0 never blends."""
    cutmix: float = 1.0
    """Alpha of the beta distribution that boxes are exchanged by; 0 never exchanges."""
    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes."""

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0 or self.mixup + self.cutmix == 0:
            raise ValueError(f"mixup={self.mixup} and cutmix={self.cutmix} must be at least 0, and one of them above 0")
        _timm("mixup")  # a run that cannot import it should not start

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, generators: list[np.random.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, 3, S, S] and int64 [B], a generator for each two neighbours -> the mixed images, and float [B,
        classes]. Levels are rounded: normalising is affine, so mixing before it changes nothing else."""
        mixup = _timm("mixup").Mixup(
            self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=self.classes
        )
        mixed, targets = [], []
        for number, rng in enumerate(generators):
            two = slice(2 * number, 2 * number + 2)
            with globals_from(rng):
                pixels, target = mixup(images[two].float(), labels[two])
            mixed.append(pixels.round_().to(torch.uint8))
            targets.append(target)
        return torch.cat(mixed), torch.cat(targets)
