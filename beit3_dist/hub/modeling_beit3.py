"""BEiT-3 for transformers: the Multiway Transformer, and a model for each of its uses.

Parameters have the names of this project's model folders, so that weights go over as they are. A sample's tokens are
its patches, CLS first, and its words, <s> first, each padded: experts and, where attention has them, projections are
chosen by the side. Shape letters: B samples, P CLS + patches, L words, N = P + L, D width, H heads, d a head's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, normalize
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutput,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_beit3 import Beit3Config

FIRST_POSITION = 2
"""Rows 0 and 1 of the tables of positions are unused, as in the released models."""
SMALL = 1e-3
"""Factor of a new classifier's matrix, so that fine-tuning starts from even predictions."""
RETRIEVAL_TASKS = ("retrieval", "itc", "imagenet_retrieval")
SENTENCE_TASKS = ("text", "text_classification")
IGNORED = -100
"""Label of what is not predicted, as everywhere in transformers."""

Tokens = tuple[Tensor | None, Tensor | None]
"""Patches [B, P, D] and words [B, L, D] of samples; None where they have none."""


def joined(tokens: Tokens) -> Tensor:
    """[B, N, D] in the order [CLS, patches, words]."""
    parts = [part for part in tokens if part is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """softmax(q k' / sqrt(d)) v, [B, N, H, d], and the weights [B, H, N, N], which other attention does not tell."""
    scores = query @ key.transpose(2, 3) * settings["scaling"]
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class Beit3Multiway(nn.ModuleDict):
    """One module for all tokens (`shared`), or one for each side, and one for both sides of a pair (`vl`)."""

    def __init__(self, names: tuple[str, ...], build: Callable[[], nn.Module]) -> None:
        super().__init__({name: build() for name in names})

    def forward(self, tokens: Tokens, fused: bool) -> Tokens:
        """`fused`: whether these are tokens of pairs."""
        patches, words = tokens
        return (
            None if patches is None else self._expert("vision", fused)(patches),
            None if words is None else self._expert("language", fused)(words),
        )

    def _expert(self, side: str, fused: bool) -> nn.Module:
        if "shared" in self:
            return self["shared"]
        return self["vl"] if fused and "vl" in self else self[side]


def modules_of(sharing: str) -> tuple[str, ...]:
    return ("shared",) if sharing == "shared" else ("vision", "language")


class Beit3VisionEmbedding(nn.Module):
    """Images [B, 3, S, S] -> CLS and patches [B, P, D]."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.patch_size, self.image_size = config.patch_size, config.image_size
        self.projection = nn.Linear(3 * config.patch_size**2, config.width)
        self.cls_token = nn.Parameter(torch.empty(config.width))
        self.mask_token = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(FIRST_POSITION + 1 + config.num_patches, config.width))

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """`masked`: bool [B, patches], True where a patch is hidden."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            height, width = images.shape[-2:]
            raise ValueError(f"pixel_values of {height} x {width}: the model's images are {self.image_size} square")
        p, grid = self.patch_size, self.image_size // self.patch_size
        pixels = images.reshape(-1, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches = self.projection(pixels.to(self.projection.weight.dtype))
        if masked is not None:
            patches = torch.where(masked[..., None].bool(), self.mask_token, patches)
        cls = self.cls_token.expand(patches.shape[0], 1, -1)
        return torch.cat([cls, patches], dim=1) + self.positions[FIRST_POSITION:]


class Beit3LanguageEmbedding(nn.Module):
    """Words int64 [B, L] -> [B, L, D]."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(FIRST_POSITION + config.max_text_length, config.width))

    def forward(self, words: Tensor, positions: Tensor | None = None) -> Tensor:
        """`positions`: int64 [B, L] of the words in their texts; None: from 0 on."""
        if positions is None:
            positions = torch.arange(words.shape[1], device=words.device)
        return self.words(words) + nn.functional.embedding(FIRST_POSITION + positions, self.positions)


class Beit3Attention(nn.Module):
    """Projections around one softmax over all of a sample's tokens."""

    is_causal = False

    def __init__(self, config: Beit3Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.head_dim = config.width // config.heads
        names, width = modules_of(config.attention), config.width
        self.q = Beit3Multiway(names, lambda: nn.Linear(width, width))
        self.k = Beit3Multiway(names, lambda: nn.Linear(width, width))
        self.v = Beit3Multiway(names, lambda: nn.Linear(width, width))
        norm = Beit3Multiway(names, lambda: nn.LayerNorm(width, config.layer_norm_eps))
        self.inner_norm = norm if config.sub_layernorm else None
        self.out = Beit3Multiway(names, lambda: nn.Linear(width, width))

    def forward(
        self, tokens: Tokens, fused: bool, mask: Tensor | None, cache: Any, passing: int
    ) -> tuple[Tokens, Tensor | None]:
        """The tokens that attention makes, and its weights where they are told. `cache`: holds keys and values of
        former tokens and takes those of these, but for the last `passing`, which are gone after this step."""
        query, key, value = (
            joined(project(tokens, fused)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        if cache is not None:
            stay = key.shape[2] - passing
            key, value = (
                torch.cat([kept, new[:, :, stay:]], dim=2)
                for kept, new in zip(
                    cache.update(key[:, :, :stay], value[:, :, :stay], self.layer), (key, value), strict=True
                )
            )
        kind = self.config._attn_implementation
        attend = eager_attention if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        mixed, weights = attend(self, query, key, value, mask, dropout=0.0, scaling=self.head_dim**-0.5)
        mixed = mixed.flatten(2)
        patches, words = tokens
        if patches is None:
            parts: Tokens = (None, mixed)
        elif words is None:
            parts = (mixed, None)
        else:
            parts = (mixed[:, : patches.shape[1]], mixed[:, patches.shape[1] :])
        if self.inner_norm is not None:
            parts = self.inner_norm(parts, fused)
        return self.out(parts, fused), weights


class Beit3FeedForward(nn.Module):
    """One expert: LayerNorm, fc1, GELU, (sub-LayerNorm,) fc2."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.inner_norm = nn.LayerNorm(config.ffn_width, config.layer_norm_eps) if config.sub_layernorm else None
        self.fc2 = nn.Linear(config.ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.fc1(self.norm(x)))
        return self.fc2(hidden if self.inner_norm is None else self.inner_norm(hidden))


class Beit3Layer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + expert(x), with stochastic depth per sample on both branches."""

    def __init__(self, config: Beit3Config, layer: int) -> None:
        super().__init__()
        names = modules_of(config.attention)
        self.attention_norm = Beit3Multiway(names, lambda: nn.LayerNorm(config.width, config.layer_norm_eps))
        self.attention = Beit3Attention(config, layer)
        has_vl = layer >= config.layers - config.vl_expert_layers
        experts = ("vision", "vl", "language") if has_vl else modules_of(config.ffn)
        self.ffn = Beit3Multiway(experts, lambda: Beit3FeedForward(config))
        self.drop = config.drop_path * layer / max(config.layers - 1, 1)

    def forward(
        self, tokens: Tokens, fused: bool, mask: Tensor | None, passing: int = 0, cache: Any = None
    ) -> tuple[Tokens, Tensor | None]:
        branch, weights = self.attention(self.attention_norm(tokens, fused), fused, mask, cache, passing)
        tokens = self._added(tokens, branch)
        return self._added(tokens, self.ffn(tokens, fused)), weights

    def _added(self, tokens: Tokens, branch: Tokens) -> Tokens:
        keep: Any = 1.0
        if self.training and self.drop > 0:
            x = next(part for part in tokens if part is not None)
            keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop) / (1 - self.drop)
        patches, words = (
            None if x is None or own is None else x + own * keep for x, own in zip(tokens, branch, strict=True)
        )
        return patches, words


class Beit3PreTrainedModel(PreTrainedModel):
    config_class = Beit3Config
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the Trainer then divides the loss where it accumulates gradients
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Beit3Layer"]
    # One folder holds the heads of all that pretraining taught; a model takes its own.
    _keys_to_ignore_on_load_unexpected = [r"^(task_head|objective_heads|image_head|text_head|norm)\."]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            small = SMALL if getattr(module, "starts_small", False) else 1.0
            nn.init.trunc_normal_(module.weight, std=0.02 * small)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, Beit3VisionEmbedding | Beit3LanguageEmbedding):
            for parameter in module.parameters(recurse=False):
                nn.init.trunc_normal_(parameter, std=0.02)
        elif isinstance(module, Beit3ContrastHead):
            nn.init.constant_(module.logit_scale, math.log(1 / 0.07))
            if module.logit_bias is not None:
                nn.init.constant_(module.logit_scale, math.log(10.0))
                nn.init.constant_(module.logit_bias, -10.0)


class Beit3Model(Beit3PreTrainedModel):
    """The encoder: of images, of texts, or of pairs."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config)
        self.vision_embedding = Beit3VisionEmbedding(config)
        self.language_embedding = Beit3LanguageEmbedding(config)
        self.blocks = nn.ModuleList(Beit3Layer(config, layer) for layer in range(config.layers))
        norms = Beit3Multiway(modules_of(config.attention), lambda: nn.LayerNorm(config.width, config.layer_norm_eps))
        self.norm = norms if config.final_norm else None
        self.build_head(config)
        self.post_init()

    def build_head(self, config: Beit3Config) -> None:
        """Adds the modules of a model with a head."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_embedding.words

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_embedding.words = value

    def visible(self, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask for attention, [B, 1, 1 or N, N], of where a query may look, bool."""
        if self.config._attn_implementation != "eager":
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    def encode(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        **kept: Any,
    ) -> BaseModelOutputWithPooling:
        """What `forward` gives, always as an object."""
        if pixel_values is None and input_ids is None:
            raise ValueError("give pixel_values, input_ids, or both")
        patches = None if pixel_values is None else self.vision_embedding(pixel_values, bool_masked_pos)
        words = None if input_ids is None else self.language_embedding(input_ids)
        mask = None
        if words is not None and attention_mask is not None:
            keys = attention_mask.bool()
            if patches is not None:
                keys = torch.cat([keys.new_ones(patches.shape[:2]), keys], dim=1)
            mask = self.visible(keys[:, None, None, :], words.dtype)
        return self.through((patches, words), patches is not None and words is not None, mask, **kept)

    def through(
        self,
        tokens: Tokens,
        fused: bool,
        mask: Tensor | None,
        passing: int = 0,
        cache: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **ignored: Any,
    ) -> BaseModelOutputWithPooling:
        """The blocks and the final norm."""
        told = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weighed = self.config.output_attentions if output_attentions is None else output_attentions
        states, attentions = [], []
        for block in self.blocks:
            states.append(joined(tokens)) if told else None
            tokens, weights = block(tokens, fused, mask, passing, cache=cache)
            attentions.append(weights)
        if self.norm is not None:
            tokens = self.norm(tokens, fused)
        last = joined(tokens)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=last[:, 0],
            hidden_states=(*states, last) if told else None,
            attentions=tuple(attentions) if weighed else None,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        **kept: Any,
    ) -> Any:
        """pixel_values [B, 3, S, S], input_ids int64 [B, L], attention_mask [B, L] (0 at padding), bool_masked_pos
        [B, patches] (True: hidden). last_hidden_state [B, N, D] is in the order [CLS, patches, words]; pooler_output is
        its first token. output_hidden_states and output_attentions are as everywhere in transformers."""
        return self.encode(pixel_values, input_ids, attention_mask, bool_masked_pos, **kept)


def _small(inputs: int, outputs: int) -> nn.Linear:
    """A matrix that a new head begins with `SMALL` times as large."""
    matrix = nn.Linear(inputs, outputs)
    matrix.starts_small = True  # type: ignore[assignment]
    return matrix


class Beit3ClassHead(nn.Module):
    """Mean of the patches, CLS left out -> LayerNorm -> classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc_norm = nn.LayerNorm(width)
        self.head = _small(width, classes)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.fc_norm(hidden[:, 1:].mean(1)))


class Beit3Pooler(nn.Module):
    """LayerNorm, matrix and tanh of the first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(hidden[:, 0])))


class Beit3PooledHead(nn.Module):
    """The pooled first token -> two matrices with LayerNorm and GELU between."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.pooler = Beit3Pooler(width)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, classes)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.pooler(hidden))


class Beit3TwoLayers(nn.Module):
    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs)
        self.dense1 = _small(inputs, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.dense2 = _small(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(nn.functional.gelu(self.norm2(self.dense1(self.norm1(x)))))


class Beit3ContrastHead(nn.Module):
    """Unit vectors of CLS and of <s>, the logarithm of the inverse temperature, and the sigmoid's bias."""

    def __init__(self, width: int, length: int, bias: bool) -> None:
        super().__init__()
        self.language_head = nn.Linear(width, length, bias=False)
        self.vision_head = nn.Linear(width, length, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if bias else None

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """[images, texts]."""
        products = self.logit_scale.float().exp() * images @ texts.T
        return products if self.logit_bias is None else products + self.logit_bias.float()


class Beit3ForImageClassification(Beit3Model):
    """Classes of images."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config.of_task("imagenet", final_norm=False))

    def build_head(self, config: Beit3Config) -> None:
        self.task_head = Beit3ClassHead(config.width, config.num_labels)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kept: Any) -> Any:
        """labels: int64 [B], or probabilities [B, classes]. -> logits [B, classes]."""
        found = self.encode(pixel_values, **kept)
        logits = self.task_head(found.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss, logits, found.hidden_states, found.attentions)


class Beit3ForVisualQuestionAnswering(Beit3Model):
    """Answers to questions about images, out of a list (`config.id2label`)."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config.of_task("vqa", final_norm=False))

    def build_head(self, config: Beit3Config) -> None:
        self.task_head = Beit3PooledHead(config.width, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kept: Any,
    ) -> Any:
        """labels: scores of the answers, [B, answers] in [0, 1]. -> logits [B, answers]; the loss is the binary
        cross-entropy summed over the answers."""
        found = self.encode(pixel_values, input_ids, attention_mask, **kept)
        logits = self.task_head(found.last_hidden_state)
        loss = None
        if labels is not None:
            loss = binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").sum(1).mean()
        return SequenceClassifierOutput(loss, logits, found.hidden_states, found.attentions)


class Beit3ForVisualReasoning(Beit3Model):
    """Whether a sentence is true of two images (NLVR2); each image is encoded with the sentence."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config.of_task("nlvr2", final_norm=True))

    def build_head(self, config: Beit3Config) -> None:
        self.task_head = nn.ModuleDict({"head": Beit3TwoLayers(4 * config.width, 2 * config.width, 2)})

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kept: Any,
    ) -> Any:
        """pixel_values [B, 2, 3, S, S]; labels int64 [B], 1 for true. -> logits [B, 2]; hidden states and attention are
        those of the first images, then of the second ones."""
        images = pixel_values.transpose(0, 1).flatten(0, 1)
        twice = None if attention_mask is None else attention_mask.repeat(2, 1)
        found = self.encode(images, input_ids.repeat(2, 1), twice, **kept)
        hidden = found.last_hidden_state
        starts = torch.cat([hidden[:, 0], hidden[:, 1 + self.config.num_patches]], dim=1)  # CLS and <s>, [2 B, 2 D]
        logits = self.task_head["head"](torch.cat(starts.chunk(2), dim=1))
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss, logits, found.hidden_states, found.attentions)


class Beit3ForSequenceClassification(Beit3Model):
    """Classes of sentences or of pairs of them, or with one label a number, by the language encoder alone."""

    main_input_name = "input_ids"

    def __init__(self, config: Beit3Config) -> None:
        task = config.task if config.task in SENTENCE_TASKS else SENTENCE_TASKS[1]
        super().__init__(config.of_task(str(task), final_norm=False))

    def build_head(self, config: Beit3Config) -> None:
        self.task_head = Beit3PooledHead(config.width, config.num_labels)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kept: Any
    ) -> Any:
        """labels: int64 [B]; of a number float [B]. -> logits [B, classes]."""
        found = self.encode(None, input_ids, attention_mask, **kept)
        logits = self.task_head(found.last_hidden_state)
        loss = None
        if labels is not None:
            is_number = logits.shape[1] == 1
            told = logits.float()
            loss = mse_loss(told[:, 0], labels.float()) if is_number else cross_entropy(told, labels)
        return SequenceClassifierOutput(loss, logits, found.hidden_states, found.attentions)


@dataclass
class Beit3RetrievalOutput(ModelOutput):
    """What `Beit3ForRetrieval` finds of I images and T texts."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    """[I, T]."""
    logits_per_text: Tensor | None = None
    """[T, I]."""
    image_embeds: Tensor | None = None
    """Unit vectors [I, E]."""
    text_embeds: Tensor | None = None
    """Unit vectors [T, E]."""


class Beit3ForRetrieval(Beit3Model):
    """Unit vectors of images and of texts, each encoded alone, that lie close where they belong together.

    Its head is that of fine-tuning, or of a model that pretraining has taught contrast.
    """

    def __init__(self, config: Beit3Config) -> None:
        if config.task is not None or "contrastive" not in config.objectives:
            task = config.task if config.task in RETRIEVAL_TASKS else "retrieval"
            config = config.of_task(str(task), final_norm=True)
        super().__init__(config)

    def build_head(self, config: Beit3Config) -> None:
        head = Beit3ContrastHead(config.width, config.projection_dim, config.contrast_bias)
        if config.task is None:
            self.objective_heads = nn.ModuleDict({"contrastive": head})
        else:
            self.task_head = head

    @property
    def contrast_head(self) -> Any:
        return self.objective_heads["contrastive"] if self.config.task is None else self.task_head

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors [I, E], fp32."""
        cls = self.encode(pixel_values).last_hidden_state[:, 0]
        return normalize(self.contrast_head.vision_head(cls).float(), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit vectors [T, E], fp32."""
        start = self.encode(None, input_ids, attention_mask).last_hidden_state[:, 0]
        return normalize(self.contrast_head.language_head(start).float(), dim=-1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """Images [I, 3, S, S], texts [T, L] or both. return_loss: image i and text i belong together, all others do
        not."""
        images = None if pixel_values is None else self.get_image_features(pixel_values)
        texts = None if input_ids is None else self.get_text_features(input_ids, attention_mask)
        logits = loss = None
        if images is not None and texts is not None:
            logits = self.contrast_head.logits(images, texts)
        if return_loss and logits is not None:
            own = torch.arange(len(logits), device=logits.device)
            loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        turned = None if logits is None else logits.T
        return Beit3RetrievalOutput(loss, logits, turned, images, texts)


@dataclass
class Beit3PreTrainingOutput(ModelOutput):
    """What `Beit3ForPreTraining` predicts."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    """Of the words, [B, L, vocabulary]; None without input_ids."""
    image_logits: Tensor | None = None
    """Of the patches' visual codes, [B, patches, codes]; None without pixel_values."""
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Beit3ForPreTraining(Beit3Model):
    """Masked words and masked patches, of images, texts or pairs."""

    def build_head(self, config: Beit3Config) -> None:
        self.image_head = nn.Linear(config.width, config.visual_vocab_size)
        self.text_head = nn.Linear(config.width, config.vocab_size)

    def get_output_embeddings(self) -> nn.Module:
        return self.text_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.text_head = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        labels: Tensor | None = None,
        image_labels: Tensor | None = None,
        **kept: Any,
    ) -> Any:
        """labels: words int64 [B, L]; image_labels: codes int64 [B, patches]; -100 where nothing is predicted. The loss
        is the sum of both mean cross-entropies."""
        found = self.encode(pixel_values, input_ids, attention_mask, bool_masked_pos, **kept)
        hidden, patches = found.last_hidden_state, 0 if pixel_values is None else 1 + self.config.num_patches
        image_logits = None if pixel_values is None else self.image_head(hidden[:, 1:patches])
        logits = None if input_ids is None else self.text_head(hidden[:, patches:])
        losses = [
            cross_entropy(scores.float().flatten(0, 1), given.flatten(), ignore_index=IGNORED)
            for scores, given in ((logits, labels), (image_logits, image_labels))
            if scores is not None and given is not None
        ]
        loss = torch.stack(losses).sum() if losses else None
        return Beit3PreTrainingOutput(loss, logits, image_logits, found.hidden_states, found.attentions)


class Beit3ForCaptioning(Beit3Model, GenerationMixin):
    """Words for an image, in UniLM's order: patches see no words, and a word no later ones.

    A fine-tuned model was taught to tell a word at a <mask> in its place; one that pretraining taught by prefix
    language modelling, at the word before it. `generate` asks either as it was taught, and keeps the keys and values of
    what is written.
    """

    main_input_name = "input_ids"

    def __init__(self, config: Beit3Config) -> None:
        if config.task is not None or "prefix_language_modeling" not in config.objectives:
            config = config.of_task("captioning", final_norm=True)
        super().__init__(config)

    def build_head(self, config: Beit3Config) -> None:
        self.text_head = nn.Linear(config.width, config.vocab_size)

    @property
    def at_mask(self) -> bool:
        """Whether a word is told at a <mask> in its place."""
        return self.config.task is not None

    def get_output_embeddings(self) -> nn.Module:
        return self.text_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.text_head = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any = None,
        ask: bool = False,
        **kept: Any,
    ) -> Any:
        """pixel_values [B, 3, S, S]; None once the cache holds them. input_ids [B, l]: the words that are new.
        attention_mask [B, L]: of all words, 0 at padding. labels [B, l], -100 where nothing is learnt: the words under
        <mask> for a model that is asked there (`DataCollatorForLanguageModeling` hides them), else the words
        themselves. ask: the next word is asked for after the last one. -> logits [B, l or with ask 1, vocabulary]."""
        if input_ids is None or pixel_values is None and cache is None:
            raise ValueError("captions are of images: give pixel_values, and input_ids that begin with <s>")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        passing = int(ask and self.at_mask)
        if passing:
            asked = torch.full_like(input_ids[:, :1], self.config.mask_token_id)
            input_ids, attention_mask = (
                torch.cat([input_ids, asked], dim=1),
                torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1),
            )
        new, total = input_ids.shape[1], attention_mask.shape[1]
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, total - new :]
        words = self.language_embedding(input_ids, positions)
        patches = None if pixel_values is None else self.vision_embedding(pixel_values)
        mask = self.visible(self._order(attention_mask.bool(), new, patches is not None), words.dtype)
        found = self.through((patches, words), True, mask, passing, cache, **kept)
        logits = self.text_head(found.last_hidden_state[:, -1:] if ask else found.last_hidden_state[:, -new:])
        loss = None
        if labels is not None:
            told, truth = (logits, labels) if self.at_mask else (logits[:, :-1], labels[:, 1:])
            loss = cross_entropy(told.float().flatten(0, 1), truth.flatten(), ignore_index=IGNORED)
        return CausalLMOutput(loss, logits, found.hidden_states, found.attentions)

    def _order(self, real: Tensor, new: int, with_patches: bool) -> Tensor:
        """Where queries may look, bool [B, 1, queries, P + L], of the patches, where they are new, and the last `new`
        words. `real`: bool [B, L], False at padding."""
        batch, total = real.shape
        patches = 1 + self.config.num_patches
        place = torch.arange(total, device=real.device)
        earlier = (place <= place[total - new :, None]) & real[:, None, :]  # [B, new, L]
        words = torch.cat([real.new_ones(batch, new, patches), earlier], dim=2)
        if not with_patches:
            return words[:, None]
        of_patches = torch.cat([real.new_ones(batch, patches, patches), real.new_zeros(batch, patches, total)], dim=2)
        return torch.cat([of_patches, words], dim=1)[:, None]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        """`past_key_values`: what versions before 5.2x call the cache."""
        cache = past_key_values if cache is None else cache
        begun = cache is not None and cache.get_seq_length() > 0
        return {
            "input_ids": input_ids[:, -1:] if begun else input_ids,
            "pixel_values": None if begun else pixel_values,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            "cache": cache,
            "ask": True,
        }

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **settings: Any) -> Any:
        """`transformers`' generate. `inputs` or `input_ids` [B, L]: the beginning of the captions, as the tokenizer
        makes it; its </s> and padding are taken out. None: <s>."""
        words = settings.pop("input_ids", inputs)
        if words is not None:
            real = (words != self.config.eos_token_id) & (words != self.config.pad_token_id)
            order = real.long().argsort(dim=1, stable=True)  # words come last
            longest = int(real.sum(1).max())
            settings["attention_mask"] = real.gather(1, order)[:, -longest:].long()
            words = words.gather(1, order)[:, -longest:]
        return super().generate(words, **settings)
