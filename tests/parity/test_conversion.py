"""Converted weights compute the same elsewhere: in torchscale's BEiT3 and in timm's beit3_base_patch16_224."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from beit3_dist.checkpoint.model_folder import read_model_folder, save_model_folder
from beit3_dist.checkpoint.positions import interpolate_positions
from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.beit3 import MixedInputs
from beit3_dist.model.token_layout import TokenLayout, group
from tests.equality import assert_close
from tests.parity import test_torchscale
from tests.parity.oracle import torchscale_beit3
from tools.convert_checkpoint import main

TINY = ModelConfig(**test_torchscale.TINY, **test_torchscale.RELEASED)
BASE = replace(
    TINY, layers=12, width=768, heads=12, ffn_width=3072, patch_size=16, image_size=224, vocab_size=1000
)  # fmt: skip
PAPER = replace(TINY, attention="shared", sub_layernorm=False)


def ordinary_weights(config: ModelConfig) -> BEiT3:
    """A model whose biases and tokens are not zero, as initial ones are."""
    model = BEiT3(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.02)
    return model.eval()


def model_folder(config: ModelConfig, folder: Path, **more: Tensor) -> BEiT3:
    """Saves a model, with more weights, in a folder."""
    model = ordinary_weights(config)
    save_model_folder(folder, {**dict(model.named_parameters()), **more}, config)
    return model


def pictures(config: ModelConfig, count: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, config.image_size, config.image_size, generator=draw)


def assert_identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


# -------------------------------------------------------------------------------------------------------- torchscale


@pytest.mark.parametrize("config", [TINY, replace(BASE, layers=2), PAPER], ids=["tiny", "base", "shared attention"])
@pytest.mark.parametrize("form", ["released", "torchscale"])
def test_torchscale_computes_our_hidden_states(form: str, config: ModelConfig, tmp_path: Path) -> None:
    """Shared attention is expanded to two equal branches, for a model without sub-LayerNorm."""
    model = model_folder(config, tmp_path / "ours")
    main([str(tmp_path / "ours"), str(tmp_path / "theirs.pth"), "--to", form])
    state = torch.load(tmp_path / "theirs.pth", weights_only=True)
    theirs = torchscale_beit3(config).eval()
    if form == "released":
        theirs.load_state_dict(state["model"], strict=True)
    else:
        theirs.beit3.load_state_dict(state, strict=True)
    draw = torch.Generator().manual_seed(2)
    images, text = pictures(config, 2), torch.randint(4, config.vocab_size, (2, 9), generator=draw)
    for visual, words in ((images, None), (None, text), (images, text)):
        with torch.no_grad():
            reference = theirs.beit3(textual_tokens=words, visual_tokens=visual)["encoder_out"]
            assert_close(model.encode(visual, words), reference, "hidden states", 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["released", "torchscale"])
def test_torchscales_file_returns_identical(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = torchscale_beit3(TINY).to(dtype)
    state = theirs.state_dict() if form == "released" else theirs.beit3.state_dict()
    source, between, back = (str(tmp_path / name) for name in ("theirs.pth", "ours", "back.pth"))
    torch.save({"model": state} if form == "released" else state, source)
    main([source, between, "--to", "safetensors", "--attention_heads", "4"])
    main([between, back, "--to", form])
    returned = torch.load(back, weights_only=True)
    assert_identical(returned["model"] if form == "released" else returned, state)
    read = read_model_folder(Path(between))
    expected = TINY if form == "released" else replace(TINY, visual_vocab_size=8192)  # it has no head to tell
    assert read.config == replace(expected, drop_path=read.config.drop_path), "the geometry is read off the weights"


# -------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.slow
def test_timms_base_model_gives_our_vision_features(tmp_path: Path) -> None:
    import timm

    model = model_folder(BASE, tmp_path / "ours")
    main([str(tmp_path / "ours"), str(tmp_path / "vision.safetensors"), "--to", "timm"])
    path = str(tmp_path / "vision.safetensors")
    theirs = timm.create_model("beit3_base_patch16_224", num_classes=0, global_pool="", checkpoint_path=path).eval()
    images = pictures(BASE, 1)
    with torch.no_grad():
        features = model.encode(images)
        assert features.shape == (1, 197, 768)
        assert_close(theirs(images), features, "features", 1e-5)


@pytest.mark.parametrize(
    "config",
    [TINY, PAPER, replace(PAPER, vl_expert_layers=2), replace(TINY, image_size=48)],
    ids=["released", "shared attention", "VL experts", "other size"],
)
def test_timms_classifier_gives_our_logits(config: ModelConfig, tmp_path: Path) -> None:
    """ImageNet's head: `fc_norm` on the mean of the patches before the final norm. It also comes back as it was."""
    import timm

    draw = torch.Generator().manual_seed(3)
    scale, shift, bias, weight = (torch.randn(n, generator=draw) for n in (32, 32, 7, 7 * 32))
    head = {"fc_norm.weight": scale, "fc_norm.bias": shift, "head.weight": weight.view(7, 32), "head.bias": bias}
    model = model_folder(config, tmp_path / "ours", **{f"task_head.{name}": value for name, value in head.items()})
    path = tmp_path / "vision.pth"
    main([str(tmp_path / "ours"), str(path), "--to", "timm"])
    theirs = timm.create_model(
        "beit3_base_patch16_224", depth=3, embed_dim=32, num_heads=4, mlp_ratio=2, patch_size=8, num_classes=7,
        img_size=config.image_size, scale_attn_norm=config.sub_layernorm, scale_mlp_norm=config.sub_layernorm,
    ).eval()  # fmt: skip
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    images = pictures(config, 2)
    only_images = TokenLayout((group(2, 1 + config.patches, None),))
    with torch.no_grad():
        no_words = torch.zeros(0, dtype=torch.int64)
        hidden = model.hidden(MixedInputs(images, no_words, only_images)).view(2, -1, config.width)
        mean = torch.nn.functional.layer_norm(hidden[:, 1:].mean(1), (32,), scale, shift, config.layer_norm_eps)
        assert_close(theirs(images), mean @ head["head.weight"].T + bias, "logits", 1e-5)
    main([str(path), str(tmp_path / "back"), "--to", "safetensors", "--attention_heads", "4"])
    main([str(tmp_path / "back"), str(tmp_path / "again.pth"), "--to", "timm"])
    returned, given = (torch.load(tmp_path / name, weights_only=True) for name in ("again.pth", "vision.pth"))
    assert_identical(returned, given)
    assert read_model_folder(tmp_path / "back").task == {"name": "imagenet", "classes": 7}


# ----------------------------------------------------------------------------------------------------- interpolation


def bicubic(old: int, new: int) -> np.ndarray:
    """[new, old]: Keys' cubic convolution with a = -0.75 between pixel centres, the border's values repeated. This is
    what `bicubic, align_corners=False` means."""
    a, matrix = -0.75, np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - tap)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, min(max(tap, 0), old - 1)] += near if d <= 1 else far
    return matrix


def released_interpolation(table: np.ndarray, grid: int) -> np.ndarray:
    """The first three rows (two unused, CLS) stay, the others are a picture of one pixel per patch."""
    old = round((len(table) - 3) ** 0.5)
    columns = bicubic(old, grid)
    patches = table[3:].reshape(old, old, -1).astype(np.float64)
    resampled = np.einsum("yY,xX,YXd->yxd", columns, columns, patches)
    return np.concatenate([table[:3], resampled.reshape(grid * grid, -1)])


@pytest.mark.parametrize(("old", "new"), [(224, 384), (384, 224), (224, 480)])
def test_interpolation_is_the_released_method(old: int, new: int) -> None:
    table = torch.randn(3 + (old // 16) ** 2, 5, generator=torch.Generator().manual_seed(4))
    expected = torch.from_numpy(released_interpolation(table.numpy(), new // 16))
    assert_close(interpolate_positions(table, new // 16), expected, "positions", 1e-5)
    half = interpolate_positions(table.half(), new // 16)
    assert half.dtype == torch.float16 and torch.equal(half[:3], table[:3].half())
    assert_close(half, expected, "positions in half precision", 2e-3)


def test_converting_to_384(tmp_path: Path) -> None:
    """The tool changes the table and the config, and nothing else."""
    config = replace(TINY, patch_size=16, image_size=224, layers=1)
    model = model_folder(config, tmp_path / "ours")
    main([str(tmp_path / "ours"), str(tmp_path / "larger"), "--to", "safetensors", "--image_size", "384"])
    larger = read_model_folder(tmp_path / "larger")
    assert larger.config == replace(config, image_size=384)
    positions = larger.weights.pop("vision_embedding.positions")
    table = model.vision_embedding.positions.detach()
    assert positions.shape == (579, 32)
    assert_close(positions, torch.from_numpy(released_interpolation(table.numpy(), 24)), "positions", 1e-5)
    others = {name: p.detach() for name, p in model.named_parameters() if name != "vision_embedding.positions"}
    assert_identical(larger.weights, others)
    main([str(tmp_path / "ours"), str(tmp_path / "larger.pth"), "--to", "released", "--image_size", "384"])
    released = torch.load(tmp_path / "larger.pth", weights_only=True)["model"]
    assert torch.equal(released["beit3.encoder.embed_positions.A.weight"], positions)
    assert torch.equal(load_file(tmp_path / "larger" / "model.safetensors")["vision_embedding.positions"], positions)
