"""The configuration of a BEiT-3 in transformers: the geometry under this project's names, and what its heads are for.

This file and its neighbours need torch, transformers and, for words, sentencepiece. They are part of the package, and
lie in each folder that `tools/convert_checkpoint.py --to hub` writes, where `trust_remote_code=True` finds them.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig


class Beit3Config(PretrainedConfig):
    """Fields and defaults are those of `beit3_dist.config.ModelConfig`, which describes them, but for the defaults of
    attention, ffn, sub_layernorm and vl_expert_layers and the sizes, which are the released base model's."""

    model_type = "beit3"
    attribute_map = {
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn_width",
        "max_position_embeddings": "max_text_length",
    }

    def __init__(
        self,
        *,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        ffn_width: int = 3072,
        patch_size: int = 16,
        image_size: int = 224,
        attention: str = "per_modality",
        ffn: str = "per_modality",
        sub_layernorm: bool = True,
        vl_expert_layers: int = 0,
        vocab_size: int = 64010,
        visual_vocab_size: int = 8192,
        max_text_length: int = 1022,
        drop_path: float = 0.1,
        layer_norm_eps: float = 1e-5,
        final_norm: bool = True,
        task: str | None = None,
        text_length: int | None = None,
        objectives: list[str] | None = None,
        projection_dim: int | None = None,
        contrast_bias: bool = False,
        **others: Any,
    ) -> None:
        """final_norm: whether the encoder ends with a norm; heads that begin with one of their own replace it. task: of
        the fine-tuned head, by the project's name; None after pretraining. text_length: longest text of the task, <s>
        and </s> counted. objectives: of pretraining. projection_dim, contrast_bias: of the contrast's head.

        Raises ValueError for a model with fusion layers.
        """
        if others.pop("fusion_layers", 0):
            raise ValueError("fusion_layers: models with fusion layers (ALBEF, mPLUG) are not in this form")
        others = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False} | others
        # Before what is common, which attribute_map may set by its other name.
        self.layers, self.width, self.heads, self.ffn_width = layers, width, heads, ffn_width
        self.patch_size, self.image_size = patch_size, image_size
        self.attention, self.ffn, self.sub_layernorm = attention, ffn, sub_layernorm
        self.vl_expert_layers = vl_expert_layers
        self.vocab_size, self.visual_vocab_size, self.max_text_length = vocab_size, visual_vocab_size, max_text_length
        self.drop_path, self.layer_norm_eps = drop_path, layer_norm_eps
        self.final_norm, self.task, self.text_length = final_norm, task, text_length
        self.objectives = objectives or []
        self.projection_dim, self.contrast_bias = projection_dim or width, contrast_bias
        super().__init__(**others)

    @property
    def num_patches(self) -> int:
        """Patches of one image, CLS not counted."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def mask_token_id(self) -> int:
        """Of <mask>, which follows the pieces; eight spare rows follow it."""
        return self.vocab_size - 9

    def of_task(self, task: str, final_norm: bool) -> Beit3Config:
        """A copy for a model whose head is for `task`."""
        config = copy.deepcopy(self)
        config.task, config.final_norm, config.objectives = task, final_norm, []
        return config
