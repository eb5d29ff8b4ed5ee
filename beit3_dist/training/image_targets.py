"""Visual codes of pictures, the targets of masked image modelling."""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.model.vqkd import VQKD


def check_tokenizer(tokenizer: VQKD, path: str, model: ModelConfig) -> None:
    """Raises ValueError where the tokenizer's codes do not fit the model's patches."""
    codes, size = tokenizer.grid**2, tokenizer.geometry["codebook_size"]
    if codes != model.patches:
        raise ValueError(f"image_tokenizer: {path} gives {codes} codes per picture, the model has {model.patches} patches: "
                         "change model.image_size or model.patch_size, or train a tokenizer of that grid")
    if size != model.visual_vocab_size:
        raise ValueError(f"image_tokenizer: {path} has {size} codes, set model.visual_vocab_size={size}")


class ImageTargets:
    """Pictures uint8 [B, 3, S, S] -> codes int64 [B, patches], without gradients; bf16 on CUDA, fp32 on the CPU."""

    def __init__(self, tokenizer: VQKD, device: torch.device) -> None:
        self._tokenizer = tokenizer.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            return self._tokenizer.encode(pictures.float() / 255)
