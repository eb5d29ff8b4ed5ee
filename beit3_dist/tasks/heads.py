"""BEiT-3 with the head of a downstream task.

The heads and their names below `task_head.` are those of unilm's released fine-tuned models, so that its checkpoints
fit. What a task does not use is left out: the head for visual codes always, the head for words but in captioning, the
final norm where the task's head begins with one of its own.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.initialization import initial_value, materialize
from beit3_dist.model.layout import Layout
from beit3_dist.tasks.config import TaskName

FIRST_TEMPERATURE = 0.07
"""Temperature that contrastive training starts from (CLIP, Radford et al. 2021)."""

CLASSIFIERS = ("task_head.head.weight", "task_head.head.dense1.weight", "task_head.head.dense2.weight")
"""The matrices of ImageNet's and NLVR2's classifiers."""

CLASSIFIER_SCALE = 1e-3
"""Factor of these matrices, so that fine-tuning starts from even predictions (BEiT; unilm)."""


class ClassHead(nn.Module):
    """Mean of the patches (CLS left out) -> LayerNorm -> classes. Patches [B, 1 + P, D] -> logits [B, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc_norm = LayerNorm(width)
        self.head = Linear(width, classes)

    def forward(self, patches_BND: Tensor) -> Tensor:
        return self.head(self.fc_norm(patches_BND[:, 1:].mean(1)))


class TokenPooler(nn.Module):
    """LayerNorm, matrix and tanh of the first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.dense = Linear(width, width)

    def forward(self, hidden_BND: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(hidden_BND[:, 0])))


class PooledHead(nn.Module):
    """The pooled first token -> two matrices with LayerNorm and GELU between. Hidden [B, N, D] -> [B, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.pooler = TokenPooler(width)
        self.head = nn.Sequential(Linear(width, 2 * width), LayerNorm(2 * width), nn.GELU(), Linear(2 * width, classes))

    def forward(self, hidden_BND: Tensor) -> Tensor:
        return self.head(self.pooler(hidden_BND))


class _TwoLayers(nn.Module):
    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(inputs)
        self.dense1 = Linear(inputs, hidden)
        self.norm2 = LayerNorm(hidden)
        self.act = nn.GELU()
        self.dense2 = Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(self.act(self.norm2(self.dense1(self.norm1(x)))))


class PairOfPicturesHead(nn.Module):
    """CLS and <s> of two pictures with the same sentence, [B, 4 D] -> false or true, [B, 2]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = _TwoLayers(4 * width, 2 * width, 2)

    def forward(self, tokens_B4D: Tensor) -> Tensor:
        return self.head(tokens_B4D)


class ContrastiveHead(nn.Module):
    """Projections of CLS and <s> to unit vectors, and the logarithm of the inverse temperature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.language_head = Linear(width, width, bias=False)
        self.vision_head = Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))

    def forward(self, cls_BD: Tensor | None, start_BD: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Unit vectors of pictures and of texts (None where none are given), and exp(logit_scale)."""
        images = None if cls_BD is None else normalize(self.vision_head(cls_BD), dim=-1)
        texts = None if start_BD is None else normalize(self.language_head(start_BD), dim=-1)
        return images, texts, self.logit_scale.exp()


class NoNorm(nn.Module):
    """Stands where a task leaves out the final norm."""

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        return x_TD


class FineTuned(BEiT3):
    """BEiT-3 with one task's head. `classes`: answers of vqa, classes of imagenet and text; else of no meaning.

    Built like BEiT3: `device="meta"` takes no memory, else values are a function of (seed, name).
    """

    def __init__(
        self, config: ModelConfig, task: str, classes: int = 0, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(config, device="meta")
        self.task, self.classes = task, classes
        del self.image_head
        if task != "captioning":
            del self.text_head
        with torch.device("meta"):
            match task:
                case "imagenet":
                    self.task_head: nn.Module = ClassHead(config.width, classes)
                case "vqa" | "text":
                    self.task_head = PooledHead(config.width, classes)
                case "nlvr2":
                    self.task_head = PairOfPicturesHead(config.width)
                case "retrieval" | "itc" | "imagenet_retrieval":
                    self.task_head = ContrastiveHead(config.width)
                case "captioning":
                    pass  # the words' own head
                case _:
                    raise ValueError(f"task={task!r} is not one of {', '.join(get_args(TaskName))}")
        if task in ("imagenet", "vqa", "text"):
            self.norm: nn.Module = NoNorm()  # type: ignore[assignment]
        if torch.device(device).type != "meta":
            materialize(self, lambda name, shape: task_value(name, shape, config, seed), device)

    def class_logits(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """imagenet: pictures [B, 3, S, S] -> logits [B, classes]."""
        return self.task_head(self.encode(images, keep=keep))

    def answer_logits(self, images: Tensor, words: Tensor, padding: Tensor, keep: Tensor | None = None) -> Tensor:
        """vqa: pictures and questions (words int64 [B, L], padding bool [B, L]) -> logits of the answers."""
        return self.task_head(self.encode(images, words, padding, keep=keep))

    def sentence_logits(self, words: Tensor, padding: Tensor, keep: Tensor | None = None) -> Tensor:
        """text: sentences -> logits [B, classes]."""
        return self.task_head(self.encode(None, words, padding, keep=keep))

    def truth_logits(self, images: Tensor, words: Tensor, padding: Tensor, keep: Tensor | None = None) -> Tensor:
        """nlvr2: two pictures each [B, 2, 3, S, S] and a sentence -> logits of false and true [B, 2]. The factors of
        `keep` belong to the first pictures' pairs, then to the second ones'."""
        first_then_second = images.transpose(0, 1).flatten(0, 1)
        hidden = self.encode(first_then_second, words.repeat(2, 1), padding.repeat(2, 1), keep=keep)
        tokens_2B2D = hidden[:, [0, 1 + self.config.patches]].flatten(1)
        return self.task_head(torch.cat(tokens_2B2D.chunk(2), dim=1))

    def embeddings(
        self,
        images: Tensor | None = None,
        words: Tensor | None = None,
        padding: Tensor | None = None,
        keep: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """retrieval, itc: unit vectors [B, D] of pictures and of texts, each encoded by itself, and the inverse
        temperature."""
        cls = None if images is None else self.encode(images, keep=keep[0])[:, 0]
        start = None if words is None else self.encode(None, words, padding, keep=keep[1])[:, 0]
        return self.task_head(cls, start)

    def embed_images(self, images: Tensor) -> Tensor:
        """retrieval: unit vectors [B, D]."""
        return self.embeddings(images)[0]  # type: ignore[return-value]

    def embed_texts(self, words: Tensor, padding: Tensor) -> Tensor:
        """retrieval: unit vectors [B, D]."""
        return self.embeddings(None, words, padding)[1]  # type: ignore[return-value]


def build(config: ModelConfig, task: dict[str, Any], device: torch.device | str = "meta") -> FineTuned:
    """The model of a model folder's `task` entry: {"name": ..., "classes": ...} and whatever else the task wrote."""
    return FineTuned(config, task["name"], task.get("classes", 0), device=device)


def task_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial value of a parameter: that of pretraining outside `task_head`, there small and even."""
    if not name.startswith("task_head."):
        return initial_value(name, shape, config, seed)
    if name.endswith("logit_scale"):
        return torch.full(shape, math.log(1 / FIRST_TEMPERATURE))
    if len(shape) == 1 and name.endswith("weight"):
        return torch.ones(shape)  # of a LayerNorm
    value = initial_value(name, shape, config, seed)
    return value * CLASSIFIER_SCALE if name in CLASSIFIERS else value
