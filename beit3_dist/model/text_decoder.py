"""A decoder above fusion: it writes words one after the other while it looks at a fused image and the words before
them, their prefix (mPLUG, Li et al. 2022).

Its layers are those in which words are fused with an image that rests (fusion.py): what rests here is all that the
encoder has made of a pair. It has word vectors and positions of its own; its words are told by the model's text head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import ModelConfig, Recompute
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model.embedding import LanguageEmbedding
from beit3_dist.model.fusion import CoAttention
from beit3_dist.model.token_layout import Group, TokenLayout


def decoder_group(read: Tensor, padding: Tensor) -> Group:
    """The group of B texts that are written after what is `read`, bool [B, N], True at its tokens, some of which may
    be padding. `padding`: bool [B, L], True where a text is, before or behind its words. A word sees all that is read,
    itself and the words before.

    Looks at the values, so call it on the host.
    """
    (samples, tokens), length = read.shape, padding.shape[1]
    itself = torch.eye(length, dtype=torch.bool)  # or padding would see nothing, which has no softmax
    causal = torch.ones_like(itself).tril() & ~padding[:, None] | itself
    mask = torch.cat([read[:, None, :].expand(-1, length, -1), causal], dim=2)[:, None]
    index = None if not bool(padding.any()) else (~padding).flatten().nonzero().squeeze(1)
    return Group(samples, tokens, length, index, mask, whole=False, fused=True)


def flops_per_word(config: ModelConfig) -> int:
    """Forward, of a decoder's products with its weights for a word that it writes."""
    d = config.width
    return config.decoder_layers * (12 * d * d + 4 * d * config.ffn_width)


def flops_of_reading(config: ModelConfig, read: Tensor, told: Tensor) -> int:
    """Forward, of what else a decoder has to do: keys and values of the memory, scores and mixtures. int64 [B]: tokens
    that are `read`, and words that are `told` after them."""
    d, seen = config.width, int((told * read + told * (told + 1) // 2).sum())
    return config.decoder_layers * (4 * d * d * int(read.sum()) + 4 * d * seen)


class TextDecoder(nn.Module):
    """Words [W] after a memory [B, N, D] -> hidden states [W, D], behind a final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = LanguageEmbedding(config)
        self.blocks = nn.ModuleDict({str(layer): CoAttention(config) for layer in range(config.decoder_layers)})
        self.norm = nn.Identity() if config.post_norm else LayerNorm(config.width, config.layer_norm_eps)
        self.recompute: Recompute = "none"
        self.recompute_every = 1

    def forward(self, memory_BND: Tensor, words: Tensor, positions: Tensor, group: Group) -> Tensor:
        """`words`, `positions`: int64 [W], packed, and where they stand in their texts. `group`: of `decoder_group`."""
        memory = memory_BND.flatten(0, 1)
        x_TD, layout = torch.cat([memory, self.embedding(words, positions)]), TokenLayout((group,))
        for layer, block in enumerate(self.blocks.values()):
            recompute = self.recompute if self.training and layer % self.recompute_every == 0 else "none"
            if recompute == "full":
                x_TD = checkpoint(block, x_TD, layout, None, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = block(x_TD, layout, None, None, recompute)
        return self.norm(x_TD[len(memory) :])
