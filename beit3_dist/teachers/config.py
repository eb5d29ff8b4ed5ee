"""Which network is the teacher, as a section of a run's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from beit3_dist.config import expand_home, require, require_positive


@dataclass(kw_only=True)
class TeacherConfig:
    """A frozen network that is learnt from."""

    kind: Literal["efficientnet_lite0", "clip", "timm", "beit3"] = "efficientnet_lite0"
    """efficientnet_lite0: comes with its weights in a package. clip: the visual tower of an OpenAI-CLIP or open_clip
    file (BEiT v2's teacher is CLIP ViT-B/16). timm: a model of timm. beit3: a released BEiT-3, or one of ours."""
    weights: str = ""
    """clip, timm: local file with the weights. clip reads OpenAI's archives, .pt/.pth/.bin and .safetensors. beit3:
    what init_from takes."""
    name: str = ""
    """timm: name of the model, e.g. vit_base_patch16_224.dino."""
    quick_gelu: bool = True
    """clip: x * sigmoid(1.702 x) as in OpenAI's models; false for open_clip's models without -quickgelu in the name."""
    head_dim: int = 64
    """clip: width of an attention head (64; 80 in ViT-H-14, 88 in ViT-g-14, 104 in ViT-bigG-14)."""

    def __post_init__(self) -> None:
        expand_home(self, "weights")
        require_positive("teacher.", self, "head_dim")
        require(
            bool(self.weights) == (self.kind != "efficientnet_lite0"),
            f"teacher.weights={self.weights!r} does not fit teacher.kind={self.kind}: "
            "clip, timm and beit3 need a local file, efficientnet_lite0 brings its own",
        )
        require(
            bool(self.name) == (self.kind == "timm"),
            f"teacher.name={self.name!r} does not fit teacher.kind={self.kind}: timm, and only timm, needs a name",
        )
