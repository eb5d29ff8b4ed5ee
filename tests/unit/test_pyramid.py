"""The vision side as a backbone: its maps against `encode` and plain definitions, positions against others' methods."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from beit3_dist.checkpoint.fitting import fit, shapes_of
from beit3_dist.checkpoint.positions import interpolate_patch
from beit3_dist.config import ModelConfig
from beit3_dist.model.adapter import INTERACTIONS, Adapter
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.deformable import DeformableAttention, centres, sampled
from beit3_dist.model.drop_path import drop_path_factors
from beit3_dist.model.embedding import FIRST_POSITION, resampled_positions
from beit3_dist.model.pyramid import GLOBAL, LayerPyramid, Pyramid, SimplePyramid, Windows, padded, vision_maps
from beit3_dist.model.token_layout import TokenLayout, group
from beit3_dist.tasks.parts.heads import FineTuned, TaskHead
from beit3_dist.train.optimizer import layered_groups
from tests.equality import assert_close

CONFIG = ModelConfig(
    layers=4, width=16, heads=2, ffn_width=32, patch_size=4, image_size=16, vl_expert_layers=1, vocab_size=64,
    visual_vocab_size=16, max_text_length=8,
)  # fmt: skip
RELEASED = replace(CONFIG, attention="per_modality", sub_layernorm=True, vl_expert_layers=0)


class Head(TaskHead):
    begins_with_norm = True

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.constants = {f"pyramid.{name}": value for name, value in pyramid.constants.items()}
        self.embedding_of_level = torch.nn.Parameter(torch.empty(3))


def network(
    config: ModelConfig = CONFIG, windows: Windows = GLOBAL, pyramid: Callable[..., Pyramid] | None = None
) -> FineTuned:
    with torch.device("meta"):
        head = Head(pyramid(config, windows) if pyramid else SimplePyramid(config, 8, windows))
    model = FineTuned(config, head, seed=1)
    for block in model.blocks.values():  # small initial values would leave little to compare
        for parameter in block.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("config", [CONFIG, RELEASED])
def test_the_last_map_is_what_encode_gives(config: ModelConfig) -> None:
    model = BEiT3(config, seed=1)
    maps = vision_maps(model, images(16, 16), [1, 3])
    assert [tuple(one.shape) for one in maps] == [(2, 16, 4, 4)] * 2
    normed = model.image_norm(maps[1].flatten(2).transpose(1, 2))
    assert_close(normed, model.encode(images(16, 16))[:, 1:], "map", 1e-5)


def test_images_of_another_size_and_shape_have_resampled_positions() -> None:
    model = network()
    larger = FineTuned(replace(CONFIG, image_size=24), None, seed=1)
    weights = fit(dict(model.state_dict()), larger.config, {n: p.shape for n, p in model.named_parameters()}
                  | {"vision_embedding.positions": larger.vision_embedding.positions.shape}, "it")  # fmt: skip
    larger.load_state_dict(weights, strict=False)
    expected = vision_maps(larger, images(24, 24), [3])[0]
    assert_close(vision_maps(model, images(24, 24), [3])[0], expected, "as fitted weights have it")
    assert vision_maps(model, images(8, 20), [3])[0].shape == (2, 16, 2, 5)
    with pytest.raises(ValueError, match="8 x 20"):
        model.encode(images(8, 20))


def test_positions_are_resampled_as_in_timm() -> None:
    timm = pytest.importorskip("timm.layers.pos_embed", exc_type=(ImportError, RuntimeError))
    table = torch.randn(1, 1 + 14 * 14, 6, generator=torch.Generator().manual_seed(4))
    for size in ([20, 11], [37, 37], [7, 14]):
        theirs = timm.resample_abs_pos_embed(table, size, antialias=False)[0, 1:]
        assert_close(resampled_positions(table[0, 1:], *size), theirs, "positions")


@pytest.mark.parametrize("side", [2, 3, 9])
def test_windows_are_attention_under_a_mask(side: int) -> None:
    """Also where they do not divide the image, with stochastic depth and recomputed blocks."""
    windows, pictures, (h, w) = Windows(side, 2), images(20, 28), (5, 7)
    model = network(RELEASED).train()
    keep = drop_path_factors(torch.tensor([5, 9]), seed=0, step=1, layers=4, rate=0.5)
    assert windows.everywhere(4) == {1, 3} and 0 < (keep == 0).sum() < keep.numel()
    x_BND = model.vision_embedding(pictures, any_size=True)[:, 1:]
    cell = torch.arange(h)[:, None] // side * w + torch.arange(w) // side
    seen = cell.flatten()[:, None] == cell.flatten()
    x_TD = x_BND.flatten(0, 1)
    for layer in range(4):
        mask = torch.ones_like(seen) if layer in (1, 3) else seen
        layout = TokenLayout((group(2, h * w, None, attention_mask=mask),))
        x_TD = model.blocks(x_TD, layout, keep, range(layer, layer + 1))
    expected = x_TD.view(2, h, w, 16).movedim(-1, 1)
    ours = vision_maps(model, pictures, [3], keep, windows)[0]
    assert_close(ours, expected, "windows")
    gradient = torch.autograd.grad(ours.square().sum(), model.blocks["0"].ffn["vision"].fc1.weight)[0]
    model.blocks.recompute = "full"
    again = vision_maps(model, pictures, [3], keep, windows)[0].square().sum()
    assert torch.equal(torch.autograd.grad(again, model.blocks["0"].ffn["vision"].fc1.weight)[0], gradient)


def test_global_blocks_are_those_of_the_papers() -> None:
    assert Windows(14).everywhere(12) == {2, 5, 8, 11} and Windows(14).everywhere(32) == {7, 15, 23, 31}
    assert Windows(16, 10).everywhere(40) == set(range(3, 40, 4)) and Windows().everywhere(3) == {0, 1, 2}


def test_the_pyramid_has_four_levels_of_the_padded_image() -> None:
    model = network(windows=Windows(2, 2))
    pyramid = model.task_head.pyramid
    assert pyramid.strides == [1, 2, 4, 8] and padded(images(13, 20), 8).shape == (2, 3, 16, 24)
    maps = pyramid.maps(model, images(13, 20))
    assert [tuple(one.shape) for one in maps] == [(2, 8, 16 // s, 24 // s) for s in pyramid.strides]
    last = vision_maps(model, padded(images(13, 20), 8), [3], None, Windows(2, 2))[0]
    assert torch.equal(maps[3], pyramid.lateral[3](max_pool2d(last, 2)))
    assert all(one.std() > 0.1 for one in maps)


def test_beits_levels_come_from_four_blocks() -> None:
    config = replace(CONFIG, layers=12)
    model = network(config, pyramid=LayerPyramid)
    pyramid = model.task_head.pyramid
    assert pyramid.after == [3, 5, 7, 11] and LayerPyramid(replace(config, layers=24)).after == [7, 11, 15, 23]
    maps = pyramid.maps(model, images(13, 20))
    assert [tuple(one.shape) for one in maps] == [(2, 16, 16 // s, 24 // s) for s in pyramid.strides]
    assert torch.equal(maps[2], vision_maps(model, padded(images(13, 20), 8), [7])[0])


def test_deformable_attention_is_its_definition() -> None:
    """Zhu et al.'s equation 3, place by place, with bilinear weights written out; some lie outside."""
    draw = torch.Generator().manual_seed(6)
    grids, heads, points, d = [(3, 4), (2, 2)], 2, 3, 5
    values = torch.randn(2, 16, heads, d, generator=draw)
    places = torch.rand(2, 7, heads, 2, points, 2, generator=draw) * 1.6 - 0.3
    weights = torch.rand(2, 7, heads, 2, points, generator=draw)
    expected = torch.zeros(2, 7, heads, d)
    for b, q, h, level, p in torch.cartesian_prod(*map(torch.arange, (2, 7, heads, 2, points))).tolist():
        (height, width), first = grids[level], 12 * level
        x, y = places[b, q, h, level, p].tolist()
        x, y = x * width - 0.5, y * height - 0.5
        for row in range(height):
            for column in range(width):
                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                value = values[b, first + row * width + column, h]
                expected[b, q, h] += weights[b, q, h, level, p] * share * value
    assert_close(sampled(values, grids, places, weights), expected.flatten(2), "sampled")


def test_first_places_are_around_the_query() -> None:
    """Before it has learnt anything a head's points are 1, 2, ... cells away in its direction, with even weights."""
    attention = DeformableAttention(8, 4, 1, 2)
    for layer in (attention.offsets, attention.shares):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    assert torch.allclose(attention._first_offsets(torch.device("cpu"))[:, 0, 0],
                          torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6)  # fmt: skip
    torch.nn.init.eye_(attention.values.weight), torch.nn.init.eye_(attention.out.weight)
    torch.nn.init.zeros_(attention.values.bias), torch.nn.init.zeros_(attention.out.bias)
    tokens = torch.arange(25.0).view(1, 25, 1).expand(1, 25, 8)
    at = centres([(5, 5)], torch.device("cpu"))
    found = attention(torch.randn(1, 25, 8), at, tokens, [(5, 5)])[0, 12]  # the middle: 12
    assert_close(found, torch.tensor([13.5, 13.5, 19.5, 19.5, 10.5, 10.5, 4.5, 4.5]), "two steps' means")


@pytest.mark.parametrize("windows", [GLOBAL, Windows(2, 2)])
def test_the_adapter_gives_four_levels_and_hardly_changes_the_vit_at_first(windows: Windows) -> None:
    model = network(RELEASED, windows, Adapter)
    pyramid, pictures = model.task_head.pyramid, padded(images(13, 20), 8)
    maps = pyramid.maps(model, images(13, 20))
    assert [tuple(one.shape) for one in maps] == [(2, 16, 16 // s, 24 // s) for s in pyramid.strides]
    assert all(one.std() > 0.1 for one in maps)
    # The last level's norm is of the prior's coarsest map and the half-sized map of the ViT, nearly as it is alone.
    seen: list[Tensor] = []
    pyramid.norms[3].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    before: list[Tensor] = []
    pyramid.extractors[INTERACTIONS + 1].register_forward_hook(lambda _, __, made: before.append(made))
    pyramid.maps(model, images(13, 20))
    own = before[0][:, -6:].transpose(1, 2).unflatten(2, (2, 3))
    vit = vision_maps(model, pictures, [3], None, windows)[0]
    halved = torch.nn.functional.interpolate(vit, size=(2, 3), mode="bilinear", align_corners=False)
    assert_close(seen[0] - own, halved, "the ViT's", 1e-4)
    model.zero_grad()
    sum(one.square().mean() for one in pyramid.maps(model, images(13, 20))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pyramid.parameters())


def test_what_has_no_pyramid_is_refused() -> None:
    for change, field in (({"patch_size": 2}, "patch_size"), ({"fusion_layers": 1, "vl_expert_layers": 0,
                          "attention": "per_modality"}, "fusion_layers")):  # fmt: skip
        with pytest.raises(ValueError, match=f"model.{field}"):
            SimplePyramid(replace(CONFIG, **change), 8)


def test_patches_of_other_sides_are_interpolated(caplog: pytest.LogCaptureFixture) -> None:
    """As EVA brings patches of 14 to 16."""
    kernel = torch.randn(5, 3 * 14 * 14, generator=torch.Generator().manual_seed(5))
    flat = torch.ones(1, 3 * 14 * 14)
    assert interpolate_patch(kernel, 16).shape == (5, 3 * 16 * 16) and interpolate_patch(kernel, 14) is kernel
    assert_close(interpolate_patch(flat, 16), torch.ones(1, 3 * 16 * 16), "values as they are")
    smaller = BEiT3(replace(CONFIG, patch_size=2, image_size=8), seed=1)
    with caplog.at_level(logging.WARNING):
        weights = fit(dict(smaller.state_dict()), CONFIG, shapes_of(CONFIG), "it")
    assert "patches of 2 pixels are interpolated to model.patch_size=4" in caplog.text
    table = "vision_embedding.positions"
    assert torch.equal(weights[table], smaller.state_dict()[table]) and len(weights[table]) == FIRST_POSITION + 17


def test_a_heads_own_embeddings_learn_at_its_rate() -> None:
    """ViT-Adapter's layer decay takes such names for the model's and gives them the lowest rate."""
    model = network()
    scales = {id(p): g["lr_scale"] for g in layered_groups(model, 0.1, 4, 0.5, 1.0) for p in g["params"]}
    assert scales[id(model.task_head.embedding_of_level)] == 1 == scales[id(model.task_head.pyramid.finer[1].weight)]
    assert scales[id(model.vision_embedding.positions)] == 0.5**5
    assert scales[id(model.blocks["3"].ffn["vision"].fc1.weight)] == 0.5
