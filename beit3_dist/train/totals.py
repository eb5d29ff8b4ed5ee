"""What the host knows of a step's samples without having computed anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """Of some samples of a step. Sums over micro-batches and ranks are the step's own; those of int64 wrap."""

    counts: list[int]
    """[K]: what each of the K losses is divided by, masked positions or samples."""
    tokens: int
    """Without padding."""
    flops: int
    """Of forward and backward."""
    replaced: int
    """Samples that had to be replaced."""
    hash_terms: int
    """Sum of the terms of the sample hash, as an int64."""

    def pack(self) -> Tensor:
        """int64 [K + 4]."""
        return torch.tensor([*self.counts, self.tokens, self.flops, self.replaced, self.hash_terms])

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """From what `pack` gives, or a sum of such. Waits for the device."""
        *counts, tokens, flops, replaced, hash_terms = packed.tolist()
        return cls(counts, tokens, flops, replaced, hash_terms)

    @staticmethod
    def counts_in(packed: Tensor) -> Tensor:
        """The counts int64 [K] in what `pack` gives, where it lies: the device is not waited for."""
        return packed[:-4]

    @classmethod
    def summed(cls, parts: Iterable[Self], losses: int) -> Self:
        """The sum of any number of parts, each with `losses` counts."""
        return cls.unpack(sum((part.pack() for part in parts), torch.zeros(losses + 4, dtype=torch.int64)))
