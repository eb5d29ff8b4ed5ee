"""The Multiway idea: each token passes the expert of its kind, and an expert's tokens are one contiguous slice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.gelu_layer_norm import GeluLayerNorm
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model.layout import Layout


class Multiway(nn.ModuleDict):
    """One module per expert, applied to the expert's slice of the tokens.

    `experts` are names in the order of their slices (see `Layout.sizes`). Every expert runs in every pass, on zero
    rows too, so that all ranks of a ZeRO-3 group run the same modules.
    """

    def __init__(self, experts: tuple[str, ...], build: Callable[[], nn.Module]) -> None:
        super().__init__({name: build() for name in experts})
        self.experts = experts

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        return join(self.each(self.slices(x_TD, layout)))

    def slices(self, x_TD: Tensor, layout: Layout) -> list[Tensor]:
        """Each expert's tokens."""
        return [x_TD] if len(self.experts) == 1 else list(x_TD.split(layout.sizes(self.experts)))

    def each(self, slices: list[Tensor]) -> list[Tensor]:
        """Each expert's output for its tokens."""
        return [self[name](part) for name, part in zip(self.experts, slices, strict=True)]


def join(slices: list[Tensor]) -> Tensor:
    """One matrix of all tokens again."""
    return slices[0] if len(slices) == 1 else torch.cat(slices)


class FeedForward(nn.Module):
    """One expert: LayerNorm, fc1 [F, D], GELU, (sub-LayerNorm,) fc2 [D, F]. The norm belongs to the expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.width, config.layer_norm_eps)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.inner_norm = GeluLayerNorm(config.ffn_width, config.layer_norm_eps) if config.sub_layernorm else None
        self.fc2 = nn.Linear(config.ffn_width, config.width)

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden_TF = self.fc1(self.norm(x_TD))
        return self.fc2(gelu(hidden_TF) if self.inner_norm is None else self.inner_norm(hidden_TF))
