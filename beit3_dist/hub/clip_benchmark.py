"""Our models in CLIP_benchmark, LAION's measures of CLIP's kind of models on many data sets (tried with 1.6.2).

    python -m beit3_dist.hub.clip_benchmark eval --model_type beit3 --model beit3 --pretrained FOLDER --dataset ...

All other options are its own; `pip install clip-benchmark` brings it. From Python, `register()` adds the model type
`beit3` to it, or its loader may be called by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from beit3_dist.data.text import TextTokenizer
from beit3_dist.inference import Model
from beit3_dist.optional import optional_module

MODEL_TYPE = "beit3"


class Encoders(nn.Module):
    """A model that has learnt contrast, as CLIP_benchmark asks for its vectors."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._task, self.network = model._task_for("embed_images", "vectors"), model.network

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of what `Transform` made, [B, 3, S, S]."""
        return self._task.embed_images(self.network, images)

    def encode_text(self, words: Tensor) -> Tensor:
        """Unit vectors [B, D] of what `Tokenizer` made, int64 [B, L]."""
        return self._task.embed_texts(self.network, words, (words == TextTokenizer.pad).cpu())


class Transform:
    """An image as the model sees it, [3, S, S]."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, image: Image.Image) -> Tensor:
        return self._model._pixels([image])[0].cpu()


class Tokenizer:
    """Texts -> token ids with <s> and </s>, int64 [B, L], padded to the longest."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        return self._model._words([texts] if isinstance(texts, str) else list(texts))[0].cpu()


def load_beit3(
    model_name: str = MODEL_TYPE, pretrained: str = "", cache_dir: str | None = None, device: Any = "cpu"
) -> tuple[Encoders, Transform, Tokenizer]:
    """The model of a folder that was fine-tuned for retrieval or pretrained by contrast, as CLIP_benchmark's loaders
    give theirs. `model_name`, `cache_dir`: what it gives them all; nothing here depends on these. Raises ValueError or
    OSError as `Model.load` does, and where contrast was not learnt."""
    model = Model.load(pretrained, device)
    if isinstance(model._task, str):  # of several the one that is meant here
        model = Model.load(pretrained, device, "retrieval")
    return Encoders(model), Transform(model), Tokenizer(model)


def register() -> None:
    """Adds the model type to CLIP_benchmark. Raises ValueError where that cannot be imported."""
    models = optional_module("clip_benchmark.models", "this", "pip install clip-benchmark")
    models.TYPE2FUNC[MODEL_TYPE] = load_beit3
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def main() -> None:
    """CLIP_benchmark's own command line, with the model type."""
    from beit3_dist.command_line import refusing

    with refusing("beit3_dist.hub.clip_benchmark"):
        register()
        cli = optional_module("clip_benchmark.cli", "this", "pip install clip-benchmark")
        torch.set_grad_enabled(False)
        cli.main()


if __name__ == "__main__":
    main()
