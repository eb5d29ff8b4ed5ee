"""BEiT-3: one Multiway Transformer for images, texts and pairs, with a head for visual codes and one for words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model.embedding import LanguageEmbedding, VisionEmbedding
from beit3_dist.model.encoder import Encoder
from beit3_dist.model.head import Head
from beit3_dist.model.initialization import initial_value, materialize
from beit3_dist.model.multiway import Multiway, modules_of
from beit3_dist.model.text_decoder import TextDecoder
from beit3_dist.model.token_layout import Selection, TokenLayout, group
from beit3_dist.model.vision_tower import VisionTower


@dataclass(frozen=True)
class MixedInputs:
    """What the model reads of a micro-batch: I images and W real words, group by group."""

    images: Tensor
    """[I, 3, S, S], normalised to [-1, 1]."""
    words: Tensor
    """int64 [W], packed."""
    layout: TokenLayout
    """Where the tokens lie."""
    image_mask: Tensor | None = None
    """bool [I, patches], True where a patch is hidden."""
    keep: Tensor | None = None
    """Drop-path factors [layers, 2, samples of all groups]; None keeps all branches."""


class BEiT3(nn.Module):
    """The model. `device="meta"` builds it without memory; else its values are a function of (seed, name)."""

    decoder: TextDecoder
    """What writes the words after a prefix, in a model with `decoder_layers`."""
    objective_heads: nn.ModuleDict
    """Layers of objectives by their names, in pretraining with such that have some of their own."""

    def __init__(self, config: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.vision_embedding = VisionTower(config) if config.vision_layers else VisionEmbedding(config)
            self.language_embedding = LanguageEmbedding(config)
            self.blocks = Encoder(config)
            self.norm = Multiway(modules_of(config.attention), lambda: LayerNorm(config.width, config.layer_norm_eps))
            if config.post_norm:
                self.norm["language"] = nn.Identity()  # the last layer's is the final one
            self.image_head = Head(config.width, config.visual_vocab_size)
            self.text_head = Head(config.width, config.vocab_size)
            if config.decoder_layers:
                self.decoder = TextDecoder(config)
        if torch.device(device).type != "meta":
            materialize(self, lambda name, shape: initial_value(name, shape, config, seed), device)

    @property
    def image_norm(self) -> nn.Module:
        """The final norm of patches and CLS."""
        return self.norm[self.norm.experts[0]]

    @property
    def text_norm(self) -> nn.Module:
        """The final norm of words."""
        return self.norm[self.norm.experts[-1]]

    def embed(self, inputs: MixedInputs) -> Tensor:
        """Patches and words as vectors, [T, D] in the layout's order."""
        patches = self.vision_embedding(inputs.images, inputs.image_mask).flatten(0, 1)
        words = self.language_embedding(inputs.words, inputs.layout.word_positions(inputs.words.device))
        return torch.cat([patches, words])

    def hidden(self, inputs: MixedInputs, selection: Selection | None = None) -> Tensor:
        """Hidden states before the final norm, [T, D] in the layout's order, or [M, D] for the tokens of `selection`,
        which spares the last block the others."""
        return self.blocks(self.embed(inputs), inputs.layout, inputs.keep, None, selection)

    def image_logits(self, hidden_MD: Tensor) -> Tensor:
        """Logits of the visual codes for some patches' hidden states, [M, codes]."""
        return self.image_head(self.image_norm(hidden_MD))

    def text_logits(self, hidden_MD: Tensor) -> Tensor:
        """Logits of the words for some words' hidden states, [M, vocabulary]."""
        return self.text_head(self.text_norm(hidden_MD))

    def image_losses(self, hidden_MD: Tensor, codes: Tensor) -> Tensor:
        """Cross-entropies and correct predictions, [2, M], of some patches' hidden states and their codes [M]."""
        return self.image_head(self.image_norm(hidden_MD), codes)

    def text_losses(self, hidden_MD: Tensor, words: Tensor) -> Tensor:
        """Cross-entropies and correct predictions, [2, M], of some words' hidden states and their ids [M]."""
        return self.text_head(self.text_norm(hidden_MD), words)

    def encode(
        self,
        images: Tensor | None = None,
        text: Tensor | None = None,
        text_padding: Tensor | None = None,
        image_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, N, D], N in the order [CLS, patches, words].

        One kind of samples at a time: images alone (vision encoder), text alone (language encoder) or both (fusion).
        images: [B, 3, S, S] in [-1, 1]. text: int64 [B, L]. text_padding: bool [B, L], True at padding, whose rows of
        the result are zero; on the host it costs no wait for the device. image_mask: bool [B, patches].
        attention_mask: bool [N, N] or [B, N, N], True where a query may attend to a key (sequence-to-sequence use).
        keep: drop-path factors [layers, 2, B].
        """
        given = images if images is not None else text
        if given is None:
            raise ValueError("encode needs images, text, or both")
        batch, device = len(given), given.device
        patches = 0 if images is None else 1 + self.config.patches
        length = 0 if text is None else text.shape[1]
        one_group = group(batch, patches, text_padding if text is not None else None, length, attention_mask)
        layout = TokenLayout((one_group,)).to(device)
        size = self.config.image_size
        images = torch.zeros(0, 3, size, size, device=device) if images is None else images
        words = torch.zeros(0, dtype=torch.int64, device=device) if text is None else text.flatten()
        real = layout.groups[0].index
        if real is not None:
            words = words[real]
        hidden_TD = self.norm(self.hidden(MixedInputs(images, words, layout, image_mask, keep)), layout)
        return layout.groups[0].by_sample(hidden_TD)


def parameter_counts(model: BEiT3) -> dict[str, int]:
    """Parameters by role: vision, language, vl (the experts' matrices, as the paper's table 2 counts them) or shared,
    attention, embeddings, heads, norms, decoder."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "decoder":
            role = "decoder"
        elif any("norm" in part for part in parts):
            role = "norms"
        elif "ffn" in parts:
            role = parts[parts.index("ffn") + 1]
        else:
            heads = ("image_head", "text_head")
            role = "attention" if "blocks" in parts else "heads" if parts[0] in heads else "embeddings"
        counts[role] += parameter.numel()
    return dict(counts)
