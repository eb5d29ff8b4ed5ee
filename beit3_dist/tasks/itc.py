"""Image-text contrast on many pairs, the step between pretraining and retrieval."""

from __future__ import annotations

from collections.abc import Sequence

from beit3_dist.data.kinds import is_jsonl
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.data.pair_shards import PairShards
from beit3_dist.tasks.registry import register
from beit3_dist.tasks.retrieval import Retrieval


@register("itc")
class ImageTextContrast(Retrieval):
    """Retrieval that also reads pairs from tars, as pretraining does."""

    def examples(self, train: bool) -> Sequence[Example]:
        data = self.config.data
        if all(map(is_jsonl, data.files(train))):
            return super().examples(train)
        pattern, _ = data.pattern(train)
        return PairShards(pattern, data.cache, self.tokenizer, data.caption_key, named=not train)
