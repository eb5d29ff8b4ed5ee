"""Pairs in tar shards, as pretraining reads them, as examples of the contrastive step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beit3_dist.data.captions import read_captions
from beit3_dist.data.faults import BadSample
from beit3_dist.data.index import open_table
from beit3_dist.data.order import Stream
from beit3_dist.data.reader import ShardReader
from beit3_dist.data.streams import caption_ids
from beit3_dist.data.text import TextTokenizer
from beit3_dist.tasks.data.examples import Example, TarMember


class PairShards(Sequence[Example]):
    """The pairs of all shards of a pattern. Of several captions of an image the first is taken."""

    def __init__(
        self, pattern: str, cache: str, tokenizer: TextTokenizer, caption_key: str, named: bool = False
    ) -> None:
        """Builds the shards' index where the cache has none. `named`: examples are called after their keys, which are
        looked up; training, in whose order each comes from another shard, does without. Raises ValueError where there
        are no pairs."""
        self.table = open_table(pattern, "data.train", Stream.PAIRS, cache)
        self.reader = ShardReader(self.table)
        self.tokenizer, self.caption_key, self.named = tokenizer, caption_key, named

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, place: Any) -> Any:
        """Raises BadSample for a pair whose caption is empty or cannot be read, naming its tar and key."""
        row = self.table.rows[int(place)]
        tar = self.table.files[int(row["shard"])]
        try:
            caption = read_captions(row, self.reader, self.caption_key).first
            words = tuple(caption_ids(caption, self.tokenizer))
        except BadSample as bad:
            raise BadSample(f"{tar}, {self.table.key(int(place))}: {bad}") from None
        name = self.table.key(int(place)) if self.named else f"number {place}"
        return Example(int(place), (TarMember(tar, *map(int, row["image"])),), words, int(place), name)
