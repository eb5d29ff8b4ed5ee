"""An image with hidden patches, as a model fills them in, drawn by what its visual codes look like.

BEiT v2's tokenizer decodes its codes into a teacher's features, not into pixels. What a code looks like is told by
images: the mean of their patches that carry it, as in the report of a run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3_dist.config import require
from beit3_dist.image_tokenizer.drawing import mean_patches, patches_of
from beit3_dist.image_tokenizer.files import load_vqkd
from beit3_dist.image_tokenizer.targets import ImageTargets, tokenizer_view_size
from beit3_dist.inference import IMAGES_AT_ONCE, ImageLike, Model, open_image
from beit3_dist.objectives.masking import block_masks, mask_count
from beit3_dist.tasks.data.augmentation import Views
from beit3_dist.train.guesses import Example, tiles

MOST_IMAGES = 1024
"""Images that tell what codes look like."""


class Reconstruction:
    """A pretrained model with its image tokenizer, and the looks of its codes."""

    def __init__(self, model: Model, image_tokenizer: str, images: Sequence[ImageLike]) -> None:
        """`image_tokenizer`: the file that the model was pretrained with. `images`: what tells how codes look, the
        first `MOST_IMAGES` of them; those that cannot be read are left out. Raises ValueError where the tokenizer does
        not fit the model, or no image can be read."""
        model._head("image_head", "visual codes")
        self.model, config = model, model.network.config
        vqkd = load_vqkd(image_tokenizer)
        self._size = tokenizer_view_size(vqkd, image_tokenizer, config)
        self._codes = ImageTargets(vqkd, torch.device(model.device))
        self._views = Views(evaluation="centre")
        codes, values = config.visual_vocab_size, 3 * config.patch_size**2
        sums, carriers = torch.zeros(codes, values, dtype=torch.float64), torch.zeros(codes, dtype=torch.int64)
        for first in range(0, min(len(images), MOST_IMAGES), IMAGES_AT_ONCE):
            opened = list(_readable(images[first : min(first + IMAGES_AT_ONCE, MOST_IMAGES)]))
            if opened:
                carried = self.codes(opened).flatten()
                seen = self._views.seen(opened, config.image_size)
                sums.index_add_(0, carried, patches_of(seen, config.patch_size).flatten(1).double())
                carriers += torch.bincount(carried, minlength=codes)
        require(bool(carriers.any()), "none of the images can be read that tell what codes look like")
        looks = mean_patches(sums, carriers, vqkd.quantize.embedding.weight.float().cpu())
        self.looks = looks.unflatten(1, (3, config.patch_size, config.patch_size))

    def codes(self, images: Sequence[ImageLike]) -> Tensor:
        """The true codes, int64 [N, patches] on the CPU."""
        seen = self._views.seen(map(open_image, images), self._size)
        return self._codes(seen.to(self.model.device).float()).cpu()

    def __call__(self, image: ImageLike, hidden: Tensor, text: str = "") -> Example:
        """What the model makes of the patches `hidden`, bool [patches], of an image; with a text, by both together."""
        opened, size = open_image(image), self.model.network.config.image_size
        true = self.codes([opened])[0]
        guessed = self.model.fill_patches([opened], hidden[None], [text] if text else None)[0]
        seen = self._views.seen([opened], size)[0]
        return Example(seen, hidden, true, torch.where(hidden, guessed, true))

    def pictures(self, example: Example) -> list[np.ndarray]:
        """The original, what the model sees, and the hidden patches from guessed and from true codes, uint8 [S, S, 3]
        each."""
        return tiles(example, self.looks)


def _readable(images: Sequence[ImageLike]) -> list[Image.Image]:
    found = []
    for image in images:
        try:
            found.append(open_image(image))
        except (OSError, ValueError):
            pass
    return found


def hidden_blocks(patches: int, share: float, seed: int) -> Tensor:
    """bool [patches]: a share of them in blocks, as pretraining hides them."""
    draw = np.random.default_rng(seed)

    def numbers(first: int, count: int) -> np.ndarray:
        return draw.random((1, count))

    count = np.array([mask_count(share, patches)])
    return torch.from_numpy(block_masks(int(patches**0.5), count, numbers)[0])
