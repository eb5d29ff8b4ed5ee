"""torchscale 0.3.0 as an outside reference. It is installed without its dependencies (old pins); its imports of
fairscale and timm are stubbed here, only while it is imported. Drop path is off in every comparison with it."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any
from unittest import mock

import torch

from beit3_dist.config import ModelConfig


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    return module


def _identity(module: Any, *_: Any, **__: Any) -> Any:
    return module


STUBS = {
    "timm": _module("timm"),
    "timm.models": _module("timm.models"),
    "timm.models.layers": _module("timm.models.layers", drop_path=_identity),
    "fairscale": _module("fairscale"),
    "fairscale.nn": _module("fairscale.nn", checkpoint_wrapper=_identity, wrap=_identity),
}


def torchscale_beit3(config: ModelConfig) -> torch.nn.Module:
    """torchscale's BEiT3 of the same geometry, drop path off, with `mim_head` and `mlm_head` added as the released
    wrapper has them. Without sub-LayerNorm it stands for the shared architecture (its two sides given equal values)."""
    with mock.patch.dict(sys.modules, STUBS):
        encoder_config = importlib.import_module("torchscale.architecture.config").EncoderConfig
        beit3 = importlib.import_module("torchscale.model.BEiT3").BEiT3
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
    model = torch.nn.Module()
    model.beit3 = beit3(arguments)
    model.mim_head = torch.nn.Linear(config.width, config.visual_vocab_size)
    model.mlm_head = torch.nn.Linear(config.width, config.vocab_size)
    return model
