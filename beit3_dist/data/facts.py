"""What a card of shards and a deduplication know of each sample: numbers, some 250 bytes a picture, 150 a text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from beit3_dist.data.fingerprints import PICTURE, REMEDY, TEXT, content_hash, joined, picture_print, text_print
from beit3_dist.optional import optional_module

LANGUAGES_OF = 1000
"""Texts of a shard whose languages are guessed, the first ones: guessing takes longer than all else."""
SHORTEST, LETTERS = 4, 400
"""Words of a text whose language is guessed, and how much of it is looked at."""


@dataclass
class Facts:
    """Of a shard, or of several. A sample is one of the index, or a document of a text member."""

    keys: list[str] = field(default_factory=list)
    """Of the samples."""
    shards: list[str] = field(default_factory=list)
    """Those that they are of."""
    shard: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 [samples]: number of each one's shard."""
    files: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """uint64 [samples with a picture]: hashes of the files."""
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    """int32 [pictures, 2]: width and height."""
    pictures: np.ndarray = field(default_factory=lambda: np.zeros(0, PICTURE))
    texts: np.ndarray = field(default_factory=lambda: np.zeros(0, TEXT))
    """Of all captions or documents."""
    text_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 [texts]: the sample of each."""
    words: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 [texts]: words of each, by spaces."""
    languages: Counter[str] = field(default_factory=Counter)
    """Of those that were looked at, as py3langid guesses."""


class Gatherer:
    """Gathers a shard's facts. Where there are pictures, each sample has one."""

    def __init__(self, shard: str) -> None:
        self._facts = Facts(shards=[shard])
        self._files: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._pictures: list[np.ndarray] = []
        self._texts: list[np.ndarray] = []
        self._text_of: list[int] = []
        self._words: list[int] = []

    def sample(self, key: str, data: bytes | None, image: Image.Image | None, texts: list[str]) -> None:
        number = len(self._facts.keys)
        self._facts.keys.append(key)
        if data is not None and image is not None:
            self._files.append(content_hash(data))
            self._sizes.append(image.size)
            self._pictures.append(picture_print(image))
        for text in texts:
            if len(self._texts) < LANGUAGES_OF and len(text.split(None, SHORTEST)) >= SHORTEST:
                self._facts.languages[_languages().classify(text[:LETTERS])[0]] += 1
            self._texts.append(text_print(text))
            self._text_of.append(number)
            self._words.append(len(text.split()))

    def facts(self) -> Facts:
        facts = self._facts
        facts.shard = np.zeros(len(facts.keys), np.int32)
        facts.files = np.array(self._files, np.uint64)
        facts.sizes = np.array(self._sizes, np.int32).reshape(-1, 2)
        facts.pictures, facts.texts = joined(self._pictures, PICTURE), joined(self._texts, TEXT)
        facts.text_of, facts.words = np.array(self._text_of, np.int32), np.array(self._words, np.int32)
        return facts


@cache
def _languages() -> Any:
    return optional_module("py3langid", "the guess of languages", REMEDY)


def together(parts: list[Facts]) -> Facts:
    """The facts of several shards."""
    starts = np.cumsum([0, *(len(part.keys) for part in parts)])
    shards = np.cumsum([0, *(len(part.shards) for part in parts)])

    def all_of(name: str, shift: np.ndarray | None = None) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        if shift is not None:
            arrays = [array + int(by) for array, by in zip(arrays, shift[:-1], strict=True)]
        return np.concatenate([getattr(Facts(), name), *arrays])

    return Facts(
        keys=[key for part in parts for key in part.keys],
        shards=[shard for part in parts for shard in part.shards],
        shard=all_of("shard", shards).astype(np.int32),
        files=all_of("files"),
        sizes=all_of("sizes"),
        pictures=all_of("pictures"),
        texts=all_of("texts"),
        text_of=all_of("text_of", starts).astype(np.int32),
        words=all_of("words"),
        languages=sum((part.languages for part in parts), Counter()),
    )
