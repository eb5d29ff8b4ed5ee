"""The description of a training run of the image tokenizer. The defaults are BEiT v2's (base network, ImageNet-1k)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from beit3_dist.config import (
    JobConfig,
    LoadingConfig,
    OptimConfig,
    Patterns,
    require_divides,
    require_not_negative,
    require_positive,
    require_within,
    sources_of,
)
from beit3_dist.teachers.config import TeacherConfig


@dataclass(kw_only=True)
class TokenizerModelConfig:
    """The VQ-KD network."""

    image_size: int = 224
    """Side of the square image in pixels."""
    patch_size: int = 16
    """Side of a patch; (image_size / patch_size)^2 codes per image."""
    width: int = 768
    """Hidden size of encoder and decoder."""
    layers: int = 12
    """Blocks of the encoder."""
    heads: int = 12
    """Attention heads."""
    codebook_size: int = 8192
    """Codes."""
    code_dim: int = 32
    """Dimension of a code's vector."""
    decoder_layers: int = 3
    """Blocks of the decoder."""
    codebook_decay: float = 0.99
    """Decay per step of the codebook's moving averages; its horizon, 1 / (1 - decay), must be short beside `steps`."""

    @property
    def grid(self) -> int:
        """Codes along a side of the image."""
        return self.image_size // self.patch_size

    def __post_init__(self) -> None:
        require_positive("model.", self, *(name for name in vars(self) if name != "codebook_decay"))
        require_divides("model.patch_size", self.patch_size, "model.image_size", self.image_size)
        require_divides("model.heads", self.heads, "model.width", self.width)
        require_within("[0, 1)", "model.", self, "codebook_decay")


@dataclass(kw_only=True)
class TokenizerDataConfig(LoadingConfig):
    """The images."""

    images: Patterns
    """Tars with images: a brace or glob pattern, a list of patterns that are one source together, or a list of
    weighted sources."""
    min_crop_scale: float = 0.08
    """Smallest area of the random crop as a share of the image."""
    scaled_decoding: bool = True
    """Whether large JPEGs are decoded smaller, as in pretraining (config.py)."""
    max_bad_fraction: float = 0.01
    """The run stops with a report when more than this share of all images, or of those of 1,000 steps, had to be
    replaced. The share is taken of at least 10,000 images: 0.01 stops no run before its 101st bad image."""
    prefetch: int = 2
    """Batches that each worker prepares ahead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sources_of(self.images, "data.images")
        require_within("(0, 1]", "data.", self, "min_crop_scale")
        require_within("[0, 1]", "data.", self, "max_bad_fraction")


def _beit_v2() -> OptimConfig:
    """10 of 100 epochs of warm-up; 5e-5 per 128 images; no clipping."""
    return OptimConfig(
        lr=2e-4, min_lr=1e-5, warmup_steps=25_020, weight_decay=1e-4, beta1=0.9, beta2=0.99, eps=1e-8, clip_norm=0.0
    )


@dataclass(kw_only=True)
class TokenizerConfig(JobConfig):
    """A training run of the image tokenizer."""

    data: TokenizerDataConfig
    """The images."""
    steps: int = 250_200
    """Optimizer steps (100 epochs of ImageNet-1k at batch 512)."""
    batch: int = 512
    """Images per step over all ranks."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: matrix products in bf16 (autocast), everything else and the quantisation in fp32. fp32: everything."""
    pictures_every: int = 1000
    """Steps between pictures of the codes in TensorBoard, the last step included; 0 draws none."""
    model: TokenizerModelConfig = field(default_factory=TokenizerModelConfig)
    """The VQ-KD network."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen network whose features are rebuilt from the codes."""
    optim: OptimConfig = field(default_factory=_beit_v2)
    """AdamW and its schedule. The defaults are BEiT v2's tokenizer recipe, not the pretraining's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("", self, "batch")
        require_not_negative("", self, "pictures_every")
