"""Boxes around objects: Faster R-CNN or Cascade R-CNN on ViTDet's pyramid, judged by COCO's average precision."""

from __future__ import annotations

from beit3_dist.tasks.parts.detecting import Detection
from beit3_dist.tasks.registry import register


@register("detection")
class Boxes(Detection):
    """See `Detection`."""
