"""Which samples are held out: a property of each sample alone, so that it keeps its side when the data set grows."""

from __future__ import annotations

import hashlib


def side(identity: bytes, held_out: float) -> str:
    """held_out for the given share of all identities, else train. Equal identities lie on the same side."""
    position = int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") / 2**64
    return "held_out" if position < held_out else "train"
