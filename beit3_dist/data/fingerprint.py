"""What tells a stream's order and shards from others, wherever the shards lie."""

from __future__ import annotations

import os

from beit3_dist.config import DataConfig
from beit3_dist.data.streams import SampleStream


def shuffle_of(data: DataConfig) -> str:
    if data.shuffle != "blocks":
        return data.shuffle
    return f"blocks of {data.shuffle_block} in windows of {data.shuffle_window}"


def names_and_sizes(stream: SampleStream) -> list[list[tuple[str, int]]]:
    """Of the shards of each source of a stream, wherever they lie."""
    return [
        [(os.path.basename(path), size) for path, (size, _) in zip(table.paths, table.marks, strict=True)]
        for table in stream.tables
    ]
