"""Which samples of shards are there twice, or nearly: among themselves, or of those that are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from beit3_dist.data.facts import Facts, together
from beit3_dist.data.fingerprints import alike_pictures, alike_texts, same


@dataclass(frozen=True)
class Found:
    """Of the samples of a stream; numbers are those of `facts`, which has the held-out ones first."""

    facts: Facts
    held_out: int
    """Samples that are held out."""
    like: np.ndarray
    """int64 [samples]: the sample that each is a duplicate of; itself where it is none. Of pictures by these alone."""
    counts: dict[str, int]
    """same file, pictures alike, same text, texts alike: how many have an earlier one that is so, in the shards."""
    leaks: dict[str, int]
    """How many of the shards' are like a held-out one, by the same."""

    def duplicates(self) -> np.ndarray:
        """Numbers of the samples that are to be left out; none is held out."""
        own = np.arange(self.held_out, len(self.like))
        return own[self.like[own] != own]

    def place(self, number: int) -> tuple[str, str]:
        """Shard and key of a sample."""
        return self.facts.shards[self.facts.shard[number]], self.facts.keys[number]

    def listed(self, stream: str) -> list[dict[str, Any]]:
        """What build_shards.py leaves out."""
        found = []
        for number in self.duplicates().tolist():
            (shard, key), (like_shard, like_key) = self.place(number), self.place(int(self.like[number]))
            found.append({"stream": stream, "shard": shard, "key": key, "like": {"shard": like_shard, "key": like_key}})
        return found


def duplicates_in(own: list[Facts], held_out: list[Facts]) -> Found:
    """The duplicates in the shards of a stream, and those of held-out ones."""
    facts = together([*held_out, *own])
    samples, first = len(facts.keys), sum(len(part.keys) for part in held_out)
    counts: dict[str, int] = {}
    leaks: dict[str, int] = {}

    def count(name: str, like: np.ndarray, before: int) -> None:
        rest = np.arange(before, len(like))
        leaks[name] = int((like[before:] < before).sum())
        counts[name] = int((like[before:] != rest).sum()) - leaks[name]

    like = np.arange(samples)
    if len(facts.pictures):
        of_files, of_pictures = same(facts.files), alike_pictures(facts.pictures)
        of_pictures = np.minimum(of_pictures, of_pictures[of_files])
        count("same file", of_files, first)
        count("pictures alike", of_pictures, first)
        like = of_pictures
    if len(facts.texts):
        texts_before = int(np.searchsorted(facts.text_of, first))
        of_texts = alike_texts(facts.texts)
        count("same text", same(facts.texts["hash"]), texts_before)
        count("texts alike", of_texts, texts_before)
        if not len(facts.pictures):
            like = facts.text_of[of_texts].astype(np.int64)
    return Found(facts, first, like, counts, leaks)
