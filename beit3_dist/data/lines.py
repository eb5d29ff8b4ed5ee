"""Lines of texts from elsewhere, of whatever length: none takes more memory than a document may."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

LONGEST_LINE = 1 << 26
"""Bytes of the longest document (64 MiB)."""
CHUNK = 1 << 20
"""Bytes of a longer one that are skipped at a time."""


def lines_of(readline: Callable[[int], bytes], size: float = math.inf) -> Iterator[bytes]:
    """The lines of the next `size` bytes; of one longer than LONGEST_LINE, the beginning that is just longer."""
    left = size
    while left > 0 and (line := readline(int(min(left, LONGEST_LINE + 1)))):
        left -= len(line)
        rest = line
        while len(line) > LONGEST_LINE and rest and not rest.endswith(b"\n") and left > 0:
            rest = readline(int(min(left, CHUNK)))
            left -= len(rest)
        yield line
