"""Model FLOPs of a step, and the peak rates of devices.

A product of [m, k] and [k, n] counts 2 m k n. Counted are the matrix products of the model at real tokens: experts,
projections, attention scores and mixtures, patch embedding, and heads at masked positions; in pretraining the last
block's experts and output projection run at masked positions too. Under a prefix's mask scores and mixtures count where
a query sees a key, although a kernel that takes any mask computes the others, too; fine-tuning counts all of them.
Recomputation, norms, softmax, padding, the image tokenizer, teachers and the heads of fine-tuning but captioning's are
not. The
backward pass costs twice the forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig

PEAK_BF16 = {  # dense bf16 tensor FLOP/s, from NVIDIA's data sheets, without sparsity
    "H200 NVL": 835.5e12,
    "H100 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 rate of the device, or None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "PCIe" in name and ("H100" in name or "H800" in name):  # 114 instead of 132 multiprocessors at lower clocks
        return 756e12
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


def encoder_flops(
    config: ModelConfig,
    images: int,
    caption_lengths: Tensor,
    text_lengths: Tensor,
    read: int | None = None,
    unseen: int = 0,
) -> int:
    """FLOPs of forward and backward of one micro-batch on one rank, heads left out.

    caption_lengths [P], text_lengths [T]: int64, words of the pairs and texts; `images`: those alone. `read`: tokens
    that are read after the last block, which computes no others; None: all, as in fine-tuning. `unseen`: pairs of a
    query and a later key of its sample that a mask parts.
    """
    d, f = config.width, config.ffn_width
    pairs, patches = len(caption_lengths), 1 + config.patches
    tokens = (images + pairs) * patches + int(caption_lengths.sum()) + int(text_lengths.sum())
    lengths = torch.cat([torch.full((images,), patches), patches + caption_lengths, text_lengths])
    attention = 4 * d * (int(lengths.square().sum()) - unseen)
    block = tokens * (8 * d * d + 4 * d * f) + attention
    last = tokens * 6 * d * d + attention + (tokens if read is None else read) * (2 * d * d + 4 * d * f)
    embedding = 2 * (images + pairs) * config.patches * 3 * config.patch_size**2 * d
    return 3 * ((config.layers - 1) * block + last + embedding)
