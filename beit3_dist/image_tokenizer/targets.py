"""Visual codes of images, the targets of masked image modelling."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.image_tokenizer.fused import fuse_encoder
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.model.token_layout import to_device
from beit3_dist.parallel.collectives import made_in_shares

log = logging.getLogger(__name__)


def tokenizer_view_size(tokenizer: VQKD, path: str, model: ModelConfig) -> int:
    """Side in pixels of the view that gives one code per patch of the model.

    A tokenizer may be used at another size than it was trained at: the released /16 ones at 224 pixels give the 256
    codes of a giant with patch 14 from a view of 256 pixels. Raises ValueError where the number of codes does not fit.
    """
    codes = tokenizer.geometry["codebook_size"]
    if codes != model.visual_vocab_size:
        raise ValueError(f"image_tokenizer: {path} has {codes} codes, set model.visual_vocab_size={codes}")
    size = model.image_size // model.patch_size * tokenizer.patch_size
    if size != tokenizer.image_size:
        log.info("image_tokenizer: trained at %d pixels, used at %d", tokenizer.image_size, size)
    return size


def target_flops(tokenizer: VQKD, images: int) -> float:
    """FLOPs of the codes of some images: two per weight of the encoder's matrices and token (attention's own products
    and the look-up are left out)."""
    weights = sum(p.numel() for p in tokenizer.encoder.blocks.parameters() if p.ndim == 2)
    return 2.0 * images * (1 + tokenizer.grid**2) * weights


class ImageTargets:
    """Images uint8 [B, 3, S, S] -> codes int64 [B, patches], without gradients; in bf16 and by `kernels` (the
    config's) on CUDA, in fp32 on the CPU.

    Where the processes of `group` all have the same images, each makes the codes of its share of them; collective then.
    """

    def __init__(
        self, tokenizer: VQKD, device: torch.device, group: dist.ProcessGroup | None = None, kernels: str = "auto"
    ) -> None:
        self._tokenizer = tokenizer.to(device).eval().requires_grad_(False)
        self._device, self._group = device, group
        if device.type == "cuda":
            fuse_encoder(self._tokenizer, kernels)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        def codes(rows: Tensor) -> Tensor:
            return self._codes(images[to_device(rows, images.device)])

        return made_in_shares(codes, len(images), self._group)

    def _codes(self, images: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            return self._tokenizer.encode(images / 255)
