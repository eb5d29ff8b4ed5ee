"""BERT's weights as a start of words' layers: the state dict of Hugging Face's BertModel and of what stands above one.

BERT's layers have their norms behind, so that only a model with `post_norm` computes what they do. Its layers from the
first one on go to those that words pass, encoder and fusion alike (ALBEF, Li et al. 2021), and once more to a decoder's
(mPLUG, Li et al. 2022); cross-attention is new. A text has segment 0 throughout, whose vector goes into the positions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig, require
from beit3_dist.model.embedding import FIRST_POSITION
from beit3_dist.model.encoder import kind_of

_IN_BLOCK = {  # BERT's below `encoder.layer.N.` -> ours below `blocks.N.`; * is the side
    "attention.self.query": "attention.q.*",
    "attention.self.key": "attention.k.*",
    "attention.self.value": "attention.v.*",
    "attention.output.dense": "attention.out.*",
    "attention.output.LayerNorm": "attention_norm.*",
    "intermediate.dense": "ffn.*.fc1",
    "output.dense": "ffn.*.fc2",
    "output.LayerNorm": "ffn.*.norm",
}
_WORDS, _POSITIONS, _SEGMENTS = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type"))
_MARKS = {_WORDS, _POSITIONS, "encoder.layer.0.attention.self.query.weight"}
WITHOUT_BERT = {
    "images": r"vision_embedding\..*|(.*\.)?vision\..*",
    "cross-attention": r".*\.cross_(attention|norm)\..*",
    "the word vectors": r"(language_embedding|decoder\.embedding)\.words\..*",
}
"""Groups of weights that it gives a model none of."""
_UNUSED = re.compile(r"cls\.|pooler\.|embeddings\.position_ids$")
"""Heads, and numbers from 0 to 511."""

log = logging.getLogger(__name__)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the name of the model in a larger one, and with the present names of a norm's gain and shift."""
    names = {key: re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key.removeprefix("bert.")) for key in state}
    return {re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name): state[key] for key, name in names.items()}


def is_bert(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has BERT's keys."""
    return _MARKS <= {key.removeprefix("bert.") for key in state}


def weights_from_bert(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """What a model of this config takes of BERT, under our names. Raises ValueError for a key that is not known, and
    where the model is another kind of one."""
    require(
        config.post_norm,
        "BERT's layers have their norms behind the residual connections: give model.post_norm=true, in a model with "
        "model.fusion_layers",
    )
    theirs = _plain(state)
    layers = 1 + max(int(key.split(".")[2]) for key in theirs if key.startswith("encoder.layer."))
    words_pass = [layer for layer in range(config.layers) if kind_of(config, layer) != "images"]
    for name, needed in (("words pass", len(words_pass)), ("model.decoder_layers has", config.decoder_layers)):
        require(needed <= layers, f"{name} {needed} layers, but it has {layers}")
    table = theirs[_POSITIONS]
    require(
        config.max_text_length <= len(table),
        f"it has {len(table)} positions of words, fewer than model.max_text_length={config.max_text_length}",
    )
    if len(words_pass) < layers:
        log.warning("its layers from %d on are not used in the encoder", len(words_pass))
    table = table[: config.max_text_length] + (theirs[_SEGMENTS][0] if _SEGMENTS in theirs else 0)
    embedding = {"positions": torch.cat([table.new_zeros(FIRST_POSITION, table.shape[1]), table])}
    if len(theirs[_WORDS]) == config.vocab_size:
        log.warning("its word vectors are those of its own vocabulary: they need a text tokenizer with the same ids")
        embedding["words.weight"] = theirs[_WORDS]
    else:
        log.warning("its %d word vectors are not used: there are %d words", len(theirs[_WORDS]), config.vocab_size)
    places: list[list[tuple[str, str]]] = [[] for _ in range(layers)]
    """Of each of its layers, the blocks that begin as it is, and whose side of them does."""
    for number, layer in enumerate(words_pass):
        side = "shared" if kind_of(config, layer) == "connected" else "language"
        places[number].append((f"blocks.{layer}", side))
    for number in range(config.decoder_layers):
        places[number].append((f"decoder.blocks.{number}", "language"))
    weights: dict[str, Tensor] = {}
    for key, value in theirs.items():
        of_layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", key)
        if of_layer and of_layer[2] in _IN_BLOCK:
            for block, side in places[int(of_layer[1])]:
                weights[f"{block}.{_IN_BLOCK[of_layer[2]].replace('*', side)}.{of_layer[3]}"] = value
        elif norm := re.fullmatch(r"embeddings\.LayerNorm\.(weight|bias)", key):
            embedding[f"norm.{norm[1]}"] = value
        elif key not in (_WORDS, _POSITIONS, _SEGMENTS) and not _UNUSED.match(key):
            raise ValueError(f"{key} is no key of BERT")
    for owner in ("language_embedding", "decoder.embedding") if config.decoder_layers else ("language_embedding",):
        weights |= {f"{owner}.{name}": value for name, value in embedding.items()}
    return weights
