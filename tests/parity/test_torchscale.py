"""Our model against torchscale's BEiT3: weights copied over, hidden states and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beit3_dist.checkpoint.formats import load_released, to_released
from beit3_dist.checkpoint.released import released_name
from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from tests.equality import assert_close, assert_tensors_close
from tests.parity.oracle import torchscale_beit3

TINY = dict(
    layers=3,
    width=32,
    heads=4,
    ffn_width=64,
    patch_size=8,
    image_size=32,
    vocab_size=100,
    visual_vocab_size=50,
    max_text_length=40,
    vl_expert_layers=0,
    drop_path=0.0,
)
BASE = dict(
    layers=2,
    width=768,
    heads=12,
    ffn_width=3072,
    patch_size=16,
    image_size=224,
    vocab_size=1000,
    visual_vocab_size=64,
    max_text_length=70,
    vl_expert_layers=0,
    drop_path=0.0,
)
RELEASED = dict(attention="per_modality", sub_layernorm=True)
PAPER = dict(attention="shared", sub_layernorm=False)


def ours_and_theirs(config: ModelConfig) -> tuple[BEiT3, torch.nn.Module, dict[str, str]]:
    """Both models with equal weights of ordinary size (initial biases are zero and would hide mistakes), and the
    released names of ours. A shared tensor has two released names, joined by a blank."""
    per_modality = ModelConfig(**{**vars(config), "attention": "per_modality"})
    model = BEiT3(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.02)
    theirs = torchscale_beit3(config)
    names = {}
    for name, _ in model.named_parameters():
        sides = [name.replace(".shared.", f".{side}.") for side in ("vision", "language")]
        names[name] = " ".join(sorted({released_name(side) for side in sides}))
    if config.attention == "per_modality":
        released = to_released(model)
    else:
        ours = dict(model.named_parameters())
        twin = BEiT3(per_modality)
        twin.load_state_dict(
            {
                n: ours[n if n in ours else n.replace(".vision.", ".shared.").replace(".language.", ".shared.")]
                for n, _ in twin.named_parameters()
            }
        )
        released = to_released(twin)
    theirs.load_state_dict(released, strict=True)
    return model, theirs, names


def inputs(config: ModelConfig, kind: str) -> dict[str, Tensor | None]:
    """Two to four samples of a kind, with masked patches; padding where the name says so."""
    draw = torch.Generator().manual_seed(1)
    batch, length = 3, 12
    images = torch.randn(batch, 3, config.image_size, config.image_size, generator=draw)
    text = torch.randint(4, config.vocab_size, (batch, length), generator=draw)
    mask = torch.rand(batch, config.patches, generator=draw) < 0.4
    padding = torch.arange(length) >= torch.tensor([length, 7, 3])[:, None]
    return {
        "images": images if kind != "text" and kind != "padded text" else None,
        "text": text if kind != "image" else None,
        "text_padding": padding if "padded" in kind else None,
        "image_mask": mask if "text" not in kind else None,
    }


Both = tuple[BEiT3, torch.nn.Module, dict[str, str]]


@pytest.fixture(
    scope="module",
    params=[size | architecture for size in (TINY, BASE) for architecture in (RELEASED, PAPER)],
    ids=["tiny-released", "tiny-paper", "base-released", "base-paper"],
)
def both(request: pytest.FixtureRequest) -> Both:
    """`ours_and_theirs`, for all kinds of inputs."""
    return ours_and_theirs(ModelConfig(**request.param))


@pytest.mark.parametrize("kind", ["image", "text", "padded text", "pair", "padded pair"])
def test_hidden_states_and_gradients(both: Both, kind: str) -> None:
    model, theirs, names = both
    model.zero_grad()
    theirs.zero_grad()
    given = inputs(model.config, kind)
    hidden = model.encode(**given)
    reference = theirs.beit3(
        textual_tokens=given["text"],
        visual_tokens=given["images"],
        text_padding_position=given["text_padding"],
        vision_masked_position=given["image_mask"],
    )["encoder_out"]
    if given["text_padding"] is not None:  # what stands at padding is nobody's business
        words = (~given["text_padding"]).float()[..., None]
        patches = torch.ones(len(words), reference.shape[1] - words.shape[1], 1)
        reference = reference * torch.cat([patches, words], dim=1)
    assert_close(hidden, reference, "hidden states")

    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weight).sum().backward()
    (reference * weight).sum().backward()
    their_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    ours, expected = {}, {}
    for name, parameter in model.named_parameters():
        # A shared tensor's gradient is the sum of the gradients of torchscale's two copies.
        parts = [their_gradients[n].reshape(parameter.shape) for n in names[name].split() if n in their_gradients]
        if parts:
            ours[name], expected[name] = parameter.grad, sum(parts)
        else:  # torchscale did not run this expert; ours ran it on zero rows
            assert parameter.grad is None or not parameter.grad.any(), f"{name} has a gradient, torchscale's has none"
    assert_tensors_close(ours, expected)


def test_attention_mask_is_torchscales() -> None:
    """A sequence-to-sequence mask: words see pictures and earlier words, pictures see pictures."""
    config = ModelConfig(**TINY, **RELEASED)
    model, theirs, _ = ours_and_theirs(config)
    given = inputs(config, "pair")
    patches, total = 1 + config.patches, 1 + config.patches + 12
    may_attend = torch.ones(total, total).tril().bool()
    may_attend[:patches, :patches] = True
    reference = theirs.beit3(
        textual_tokens=given["text"],
        visual_tokens=given["images"],
        vision_masked_position=given["image_mask"],
        attn_mask=(~may_attend).float(),
    )["encoder_out"]
    assert_close(model.encode(**given, attention_mask=may_attend), reference, "hidden states")


def test_released_weights_round_trip() -> None:
    config = ModelConfig(**TINY, **RELEASED)
    _, theirs, _ = ours_and_theirs(config)
    weights = theirs.state_dict()
    back = to_released(load_released({"model": weights}, config))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_released_weights_of_another_shape_are_refused() -> None:
    config = ModelConfig(**TINY, **RELEASED)
    weights = to_released(BEiT3(config))
    with pytest.raises(ValueError, match=r"beit3\.text_embed\.weight.*\[100, 32\].*\[90, 32\]"):
        load_released(weights, ModelConfig(**{**TINY, "vocab_size": 90}, **RELEASED))
    del weights["mim_head.bias"]
    with pytest.raises(ValueError, match=r"no mim_head\.bias"):
        load_released(weights, config)
