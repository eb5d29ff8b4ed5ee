"""Boxes and masks of objects: Mask R-CNN or Cascade Mask R-CNN on ViTDet's pyramid, judged as COCO judges them."""

from __future__ import annotations

from beit3_dist.tasks.parts.detecting import Detection
from beit3_dist.tasks.registry import register


@register("instance_segmentation")
class BoxesAndMasks(Detection):
    """See `Detection`."""

    draws_masks = True
