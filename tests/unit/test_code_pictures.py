"""Pictures of codes against plain loops over patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_dist.image_tokenizer.drawing import GAP, mosaic, nearest_patches, patches_of, sheet
from beit3_dist.image_tokenizer.network import VQKD

P, GRID = 4, 3


def pictures(count: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, GRID * P, GRID * P), dtype=torch.uint8, generator=draw)


def plain_patches(batch: Tensor) -> list[Tensor]:
    cells = [(row * P, column * P) for row in range(GRID) for column in range(GRID)]
    return [picture[:, top : top + P, left : left + P] for picture in batch for top, left in cells]


def test_patches_are_cut_row_by_row() -> None:
    batch = pictures(2)
    for ours, plain in zip(patches_of(batch, P), plain_patches(batch), strict=True):
        assert torch.equal(ours, plain)


def test_a_mosaic_of_a_pictures_own_patches_is_the_picture() -> None:
    batch = pictures(2)
    codes = torch.arange(2 * GRID * GRID).view(2, -1)
    assert torch.equal(mosaic(codes, patches_of(batch, P)), batch)


def test_each_code_looks_like_the_patch_with_the_nearest_vector() -> None:
    """Over several batches, one patch after the other; codes and patches of a network with large random weights."""
    model = VQKD(GRID * P, patch_size=P, width=16, layers=1, heads=2, codebook_size=12, code_dim=4, decoder_layers=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    batches = [pictures(3, seed) for seed in range(3)]
    looks = nearest_patches(model, iter(batches))
    with torch.no_grad():
        vectors = torch.cat([model.embed(batch.float() / 255).flatten(0, 1) for batch in batches])
    patches = [patch for batch in batches for patch in plain_patches(batch)]
    chosen = set()
    for code, look in zip(model.quantize.embedding.weight, looks, strict=True):
        nearest = max(range(len(patches)), key=lambda i: float(F.cosine_similarity(vectors[i], code, dim=0)))
        assert torch.equal(look, patches[nearest])
        chosen.add(nearest)
    assert len(chosen) > 4 and max(chosen) >= 2 * 3 * GRID * GRID > min(chosen), "one batch alone shows nothing"


def test_a_sheet_has_rows_of_pictures_with_gaps() -> None:
    first, second = pictures(4), pictures(4, seed=1)
    page = sheet([first, second])
    side = GRID * P + GAP
    assert page.shape == (3, 2 * side, 4 * side)
    assert torch.equal(page[:, side : side + GRID * P, 2 * side : 2 * side + GRID * P], second[2])
    assert (page[:, :, GRID * P : side] == 255).all()
