"""torchscale 0.3.0's BEiT3 for tools/benchmark.py: three forward passes, eager, and compiled with fused attention."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from beit3_dist.checkpoint.formats import to_released
from beit3_dist.config import ModelConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.model import BEiT3
from beit3_dist.objectives.base import normalized
from beit3_dist.objectives.masked_data_modeling import NAME
from beit3_dist.tools.benchmarks.step import PADDING, Contender, adamw

THEIRS, THEIRS_FUSED = "torchscale, three passes", "torchscale, fused AdamW"
THEIRS_COMPILED = "torchscale, compiled, SDPA"


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    return module


def _identity(module: Any, *_: Any, **__: Any) -> Any:
    return module


# torchscale is installed without its dependencies, whose versions are years old. These stand for what it imports of
# them, only while it is imported; drop path is off in every comparison with it.
_STUBS = {
    "timm": _module("timm"),
    "timm.models": _module("timm.models"),
    "timm.models.layers": _module("timm.models.layers", drop_path=_identity),
    "fairscale": _module("fairscale"),
    "fairscale.nn": _module("fairscale.nn", checkpoint_wrapper=_identity, wrap=_identity),
}


def torchscale_beit3(config: ModelConfig) -> nn.Module:
    """torchscale's BEiT3 of the same geometry, drop path off, with `mim_head` and `mlm_head` added as the released
    wrapper has them. Without sub-LayerNorm it stands for the shared architecture (its two sides given equal values)."""
    with mock.patch.dict(sys.modules, _STUBS):
        encoder_config = importlib.import_module("torchscale.architecture.config").EncoderConfig
        beit3 = importlib.import_module("torchscale.model.BEiT3").BEiT3
        imported = {name: module for name, module in sys.modules.items() if name not in _STUBS}
    sys.modules.update(imported)  # the compiler looks torchscale's up by name
    arguments = encoder_config(
        img_size=config.image_size,
        patch_size=config.patch_size,
        vocab_size=config.vocab_size,
        multiway=True,
        layernorm_embedding=False,
        normalize_output=True,
        no_output_layer=True,
        drop_path_rate=0.0,
        encoder_embed_dim=config.width,
        encoder_attention_heads=config.heads,
        encoder_ffn_embed_dim=config.ffn_width,
        encoder_layers=config.layers,
        subln=config.sub_layernorm,
        encoder_normalize_before=True,
        max_source_positions=config.max_text_length + 2,
        checkpoint_activations=False,
    )
    model = nn.Module()
    model.beit3 = beit3(arguments)
    model.mim_head = nn.Linear(config.width, config.visual_vocab_size)
    model.mlm_head = nn.Linear(config.width, config.vocab_size)
    return model


def fused_attention(self: Any, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, None]:
    """torchscale's MultiheadAttention with torch's fused attention; without a mask where there is no padding."""
    q, k, v = (
        project(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
    )
    padding = given.get("key_padding_mask")
    mask = None if padding is None else ~padding[:, None, None, :].bool()
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return self.out_proj(mixed if self.inner_attn_ln is None else self.inner_attn_ln(mixed)), None


class CompiledLayers:
    """torchscale's BEiT3 called with each encoder layer compiled and its attention fused. All layers share their code,
    which differs with the modality alone: a graph of forty layers would take many minutes to compile, and no less to
    run."""

    def __init__(self, beit3: Any) -> None:
        self._beit3, self._layers = beit3, list(beit3.encoder.layers)
        self._compiled = [torch.compile(layer.forward) for layer in self._layers]
        self._set_split = importlib.import_module("torchscale.component.multiway_network").set_split_position

    def __call__(self, **inputs: Tensor) -> Any:
        """Where no text is padded the layers get no mask; torchscale makes one of zeros."""
        padded = inputs.get("text_padding_position") is not None
        attention = type(self._layers[0].self_attn)
        with mock.patch.object(attention, "forward", fused_attention):
            for layer, compiled in zip(self._layers, self._compiled, strict=True):
                layer.forward = partial(self._run, layer, compiled, padded)
            try:
                return self._beit3(**inputs)
            finally:
                for layer in self._layers:
                    del layer.forward

    def _run(
        self,
        layer: nn.Module,
        compiled: Callable[..., Any],
        padded: bool,
        x: Tensor,
        *,
        encoder_padding_mask: Tensor,
        multiway_split_position: int,
        **rest: Any,
    ) -> Any:
        layer.apply(self._set_split(multiway_split_position))  # not inside, where the former one would be part of it
        return compiled(x, encoder_padding_mask=encoder_padding_mask if padded else None, **rest)


def torchscale_losses(model: Any, batch: MicroBatch, codes: Tensor, beit3: Any = None) -> Tensor:
    """The losses [4] of masked data modelling, by three forward passes and heads at masked positions only. `batch` lies
    on the model's device. `codes`: int64 [I + P, patches]. `beit3`: what runs in place of `model.beit3`."""
    beit3 = model.beit3 if beit3 is None else beit3
    images, pairs, texts = (batch.streams[name] for name in ("images", "pairs", "texts"))
    masked, of_pairs, of_texts = (samples.annotations[NAME] for samples in (images, pairs, texts))
    codes_of_images, codes_of_pairs = codes.split([len(images), len(pairs)])
    patches = 1 + codes.shape[1]

    def at_patches(hidden: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        return cross_entropy(model.mim_head(hidden[:, 1:patches][mask]), codes[mask])

    def at_words(hidden: Tensor, mask: Tensor, words: Tensor) -> Tensor:
        return cross_entropy(model.mlm_head(hidden[mask]), words[mask])

    def encode(**inputs: Tensor) -> Tensor:
        return beit3(**inputs)["encoder_out"]

    image = encode(visual_tokens=normalized(images.images), vision_masked_position=masked["image_mask"])
    text = encode(textual_tokens=of_texts["text"])  # texts are full: no padding
    captions = {"textual_tokens": of_pairs["text"], "text_padding_position": of_pairs["text"] == PADDING}
    pair = encode(visual_tokens=normalized(pairs.images), vision_masked_position=of_pairs["image_mask"], **captions)
    losses = [
        at_patches(image, masked["image_mask"], codes_of_images),
        at_words(text, of_texts["text_mask"], texts.text),
        at_patches(pair, of_pairs["image_mask"], codes_of_pairs),
        at_words(pair[:, patches:], of_pairs["text_mask"], pairs.text),
    ]
    return torch.stack(losses)


def torchscale_contenders(ours: BEiT3, batch: MicroBatch, codes: Tensor, bf16: bool, compiled: bool) -> list[Contender]:
    """torchscale in three passes, with ours' weights: with torch's AdamW as it comes (not on a GPU, where two of them
    would take the room of activations), with the fused AdamW, and where `compiled` also with compiled layers, fused
    attention and the fused AdamW. `bf16`: training steps in autocast."""
    try:
        theirs = torchscale_beit3(ours.config)
    except ModuleNotFoundError as error:
        raise ValueError(f"torchscale cannot be imported ({error}); launchers/environment.sh installs it") from error
    theirs.load_state_dict(to_released(ours), strict=True)
    theirs = theirs.to(codes.device)

    def forward(beit3: Any = None) -> tuple[Tensor, Tensor]:
        # Losses are compared without gradients, and in fp32.
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=bf16 and torch.is_grad_enabled()):
            losses = torchscale_losses(theirs, batch, codes, beit3)
        return losses.sum(), losses.detach()

    fused = adamw(theirs, fused=True)
    contenders = [Contender(THEIRS_FUSED, theirs, forward, fused)]
    if codes.device.type == "cpu":
        contenders.insert(0, Contender(THEIRS, theirs, forward, adamw(theirs)))
    if compiled:
        contenders.append(Contender(THEIRS_COMPILED, theirs, partial(forward, CompiledLayers(theirs.beit3)), fused))
    return contenders
