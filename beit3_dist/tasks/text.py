"""Classes of sentences: the language encoder alone."""

from __future__ import annotations

from beit3_dist.config import ModelConfig
from beit3_dist.tasks.data.examples import Example, Record, Rules, integer
from beit3_dist.tasks.parts.classification import Classification
from beit3_dist.tasks.parts.heads import PooledHead, TaskHead
from beit3_dist.tasks.registry import register


@register("text")
class Sentences(Classification):
    images = 0
    reads_text = True

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        return Example(number, (), rules.words(record), integer(record, "label", rules.classes), str(number))

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead:
        return PooledHead(config.width, classes)
