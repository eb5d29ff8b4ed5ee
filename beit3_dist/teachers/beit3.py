"""BEiT-3 as a teacher of images, texts and pairs: a released one, a model folder, or a run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from beit3_dist.checkpoint.fitting import absent_groups, shapes_of
from beit3_dist.checkpoint.formats import read_source
from beit3_dist.checkpoint.model_folder import OBJECTIVE_HEADS
from beit3_dist.config import require
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.initialization import materialize
from beit3_dist.opening import blaming
from beit3_dist.teachers.vision import FeatureMap

HALF = (0.5, 0.5, 0.5)
"""Mean and deviation that BEiT-3 sees images by."""


class BEiT3Teacher(FeatureMap):
    """Its features are hidden states after the final norm. bf16 on CUDA, fp32 on the CPU."""

    def __init__(self, grid: int, path: str, classifier: str = "") -> None:
        """`classifier`: the objective whose head tells classes apart. Raises ValueError naming `teacher.weights`."""
        with blaming("teacher.weights", OSError):
            source = read_source(Path(path))
        super().__init__(grid, source.config.image_size, HALF, HALF)
        self.path, self.channels, self.text_tokenizer = path, source.config.width, source.text_tokenizer
        self.lacks = absent_groups(source.weights, shapes_of(source.config))
        """Groups of weights that its file does not have."""
        self.model = BEiT3(source.config, device="meta")
        materialize(self.model, lambda n, shape: source.weights.get(n, torch.zeros(shape)).float(), "cpu")
        self.classifier: nn.Module | None = None
        self.tells_apart = 0
        """Classes."""
        if classifier:
            head = f"{OBJECTIVE_HEADS}{classifier}."
            weights = {name.removeprefix(head): w for name, w in source.weights.items() if name.startswith(head)}
            require(weights.keys() == {"weight", "bias"}, f"teacher.weights: {path} has no head of {classifier}")
            self.tells_apart = len(weights["bias"])
            self.classifier = Linear(self.channels, self.tells_apart)
            self.classifier.load_state_dict({name: weight.float() for name, weight in weights.items()})
        self.requires_grad_(False).eval()

    def require_groups(self, *needed: str) -> None:
        """Raises ValueError where the file has no weights of one of these groups; see `absent_groups`."""
        for group in needed:
            require(group not in self.lacks, f"teacher.weights: {self.path} has no weights for {group}")

    def to(self, *arguments: Any, **named: Any) -> Self:
        super().to(*arguments, **named)
        if self.mean.is_cuda:
            self.model.to(torch.bfloat16)
        return self

    @torch.no_grad()
    def hidden(
        self, pixels: Tensor | None, text: Tensor | None, padding: Tensor | None, image_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states [n, 1 + its patches + L, D] of samples with images, texts or both; see `BEiT3.encode`."""
        dtype = next(self.model.parameters()).dtype
        images = None if pixels is None else self.seen(pixels).to(dtype)
        with torch.autocast(self.mean.device.type, enabled=False):
            return self.model.encode(images, text, padding, image_mask)

    def features_of(self, pixels: Tensor | None, text: Tensor | None, padding: Tensor | None) -> Tensor:
        """float32 [n, grid * grid + L, channels] of samples with images, texts or both; padding's are zero."""
        hidden_nND = self.hidden(pixels, text, padding).float()
        if pixels is None:
            return hidden_nND
        own = self.model.config.patches
        patches, words = hidden_nND[:, 1:].split([own, hidden_nND.shape[1] - 1 - own], dim=1)
        side = self.side // self.model.config.patch_size
        return torch.cat([self.on_grid(patches.transpose(1, 2).unflatten(2, (side, side))), words], dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features_of(pixels, None, None)

    def classes(self, pixels: Tensor) -> Tensor:
        """Logits float32 [n, classes] of images."""
        assert self.classifier is not None
        return self.classifier(self.hidden(pixels, None, None)[:, 0].float())
