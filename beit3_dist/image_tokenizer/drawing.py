"""Pictures of visual codes: what each code stands for, shown by the patch that lies nearest to it.

Shapes: B images of side S, N patches of side P, K codes. All images are uint8.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from beit3_dist.image_tokenizer.network import VQKD

GAP = 2
"""White pixels between the images of a sheet."""


def patches_of(images: Tensor, size: int) -> Tensor:
    """[B, 3, S, S] -> [B * N, 3, P, P], row by row."""
    rows = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, S / P, S / P, P, P]
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


@torch.no_grad()
def nearest_patches(tokenizer: VQKD, batches: Iterable[Tensor]) -> Tensor:
    """[K, 3, P, P]: for each code the patch, of all images in the batches [B, 3, S, S], nearest to its vector."""
    weight = tokenizer.quantize.embedding.weight
    best = torch.full((len(weight),), -torch.inf, device=weight.device)
    chosen = weight.new_zeros(len(weight), 3, tokenizer.patch_size, tokenizer.patch_size, dtype=torch.uint8)
    for images in batches:
        z = tokenizer.embed(images.to(weight.device).float() / 255).flatten(0, 1)
        cosine, place = (weight @ z.t()).max(dim=1)
        better = cosine > best
        best = torch.where(better, cosine, best)
        chosen[better] = patches_of(images.to(weight.device), tokenizer.patch_size)[place[better]]
    return chosen


def mean_patches(sums: Tensor, carriers: Tensor, codebook: Tensor) -> Tensor:
    """The mean patch of each code: uint8 [K, values] from sums [K, values], numbers of patches [K], codebook [K, C]. A
    code without a patch looks like the code with patches that is nearest to it in the codebook."""
    used = carriers.nonzero().squeeze(1)
    nearest = used[torch.cdist(codebook, codebook[used]).argmin(1)]
    looks = torch.where(carriers > 0, torch.arange(len(carriers)), nearest)
    return (sums / carriers.clamp(min=1)[:, None]).round().byte()[looks]


def mosaic(codes: Tensor, patches: Tensor) -> Tensor:
    """[B, N] codes, [K, 3, P, P] a patch for each -> images [B, 3, S, S] put together from them."""
    grid = int(codes.shape[1] ** 0.5)
    tiles = patches[codes].unflatten(1, (grid, grid))  # [B, rows, columns, 3, P, P]
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def sheet(rows: list[Tensor]) -> Tensor:
    """Rows [B, 3, S, S] of images, one below the other -> one image [3, H, W]."""
    lines = [torch.nn.functional.pad(row, (0, GAP, 0, GAP), value=255).permute(1, 2, 0, 3).flatten(2) for row in rows]
    return torch.cat(lines, dim=1)
