"""Which dimension of which parameter the tensor ranks share. One table for the layers and for checkpoints."""

from __future__ import annotations

import re

from torch import Tensor
from torch.nn.functional import pad

SHARDED = [  # canonical name -> dimension that is cut; everything else is replicated
    (r"blocks\.\d+\.attention\.[qkv]\.\w+\.(weight|bias)", 0),  # whole heads
    (r"blocks\.\d+\.attention\.inner_norm\.\w+\.(weight|bias)", 0),
    (r"blocks\.\d+\.attention\.out\.\w+\.weight", 1),
    (r"blocks\.\d+\.ffn\.\w+\.fc1\.(weight|bias)", 0),
    (r"blocks\.\d+\.ffn\.\w+\.inner_norm\.(weight|bias)", 0),
    (r"blocks\.\d+\.ffn\.\w+\.fc2\.weight", 1),
    (r"language_embedding\.words\.weight", 0),  # these rows are padded to a multiple of the tensor ranks
    (r"(image|text)_head\.(weight|bias)", 0),
]


def sharded_dimension(name: str) -> int | None:
    """The dimension of the parameter that is cut over the tensor ranks; None: every rank holds all of it."""
    return next((dimension for pattern, dimension in SHARDED if re.fullmatch(pattern, name)), None)


def shard(name: str, value: Tensor, ranks: int, rank: int) -> Tensor:
    """The rank's slice of a whole parameter; the last slices of vocabularies are padded with zeros."""
    dimension = sharded_dimension(name)
    if dimension is None or ranks == 1:
        return value
    missing = -value.shape[dimension] % ranks
    if missing:
        value = pad(value, (0, 0) * (value.ndim - 1 - dimension) + (0, missing))
    return value.chunk(ranks, dim=dimension)[rank].contiguous()
