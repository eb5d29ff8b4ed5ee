"""Classes of images from the mean of the patches, as in ImageNet-1k."""

from __future__ import annotations

from collections.abc import Sequence

from beit3_dist.config import ModelConfig
from beit3_dist.data.kinds import is_jsonl
from beit3_dist.tasks.data.augmentation import IMAGENET
from beit3_dist.tasks.data.class_shards import read_class_shards
from beit3_dist.tasks.data.examples import Example, Record, Rules, integer
from beit3_dist.tasks.parts.classification import Classification
from beit3_dist.tasks.parts.heads import ClassHead, TaskHead
from beit3_dist.tasks.registry import register


@register("imagenet")
class ImageNet(Classification):
    statistics = IMAGENET
    evaluation = "centre"
    mixes = True
    ranked = 5

    def examples(self, train: bool) -> Sequence[Example]:
        if all(map(is_jsonl, self.config.data.files(train))):
            return super().examples(train)
        pattern, field = self.config.data.pattern(train)
        return read_class_shards(pattern, field, self.config.data.cache, len(self.classes))

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        (path,) = rules.paths(record, "image_path")
        return Example(number, (path,), None, integer(record, "label", rules.classes), path.name)

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead:
        return ClassHead(config.width, classes)
