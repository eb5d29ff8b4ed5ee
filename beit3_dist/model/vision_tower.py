"""An image encoder of its own width below a model with fusion layers (mPLUG large: 1,024 beside words of 768)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import ModelConfig, Recompute
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.block import Block
from beit3_dist.model.embedding import VisionEmbedding
from beit3_dist.model.token_layout import Group, TokenLayout


class VisionTower(VisionEmbedding):
    """Images [B, 3, S, S] -> CLS and patches [B, 1 + patches, D]: embedded, encoded in `vision_width`, and brought to
    the model's width by a matrix and a norm (mPLUG's visn_fc and visn_layer_norm)."""

    def __init__(self, config: ModelConfig) -> None:
        own = config.of_vision
        super().__init__(own)
        self.blocks = nn.ModuleDict({str(n): Block(own, ("vision",), ("vision",)) for n in range(own.layers)})
        self.bridge = Linear(own.width, config.width)
        self.bridge_norm = LayerNorm(config.width, config.layer_norm_eps)
        self.recompute: Recompute = "none"
        self.recompute_every = 1

    def forward(self, images: Tensor, image_mask: Tensor | None = None, any_size: bool = False) -> Tensor:
        """As the embedding's."""
        x_BND = super().forward(images, image_mask, any_size)
        layout = TokenLayout((Group(x_BND.shape[0], x_BND.shape[1], 0),))
        x_TD = x_BND.flatten(0, 1)
        for layer, block in enumerate(self.blocks.values()):
            recompute = self.recompute if self.training and layer % self.recompute_every == 0 else "none"
            if recompute == "full":
                x_TD = checkpoint(block, x_TD, layout, None, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = block(x_TD, layout, None, None, recompute)
        return self.bridge_norm(self.bridge(x_TD)).unflatten(0, x_BND.shape[:2])
