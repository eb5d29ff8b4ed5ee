"""What can be wrong with a sample, and the record that is kept of it."""

from __future__ import annotations

from dataclasses import dataclass


class BadSample(Exception):
    """This sample cannot be used; another one takes its place. The message is the reason."""


def check_size(what: str, size: int, most: int) -> None:
    """Raises BadSample where something has more bytes than are read: before memory is taken for them."""
    if size > most:
        raise BadSample(f"{what} of {size:,} bytes: no more than {most:,} are read")


@dataclass(frozen=True)
class Fault:
    """One line of quarantine.jsonl."""

    stream: str
    """images, texts or pairs."""
    shard: str
    """Path of the tar."""
    key: str
    """Key of the sample, with the line number for a document of a text member; empty for a fault of the whole shard."""
    reason: str
    """What is wrong."""
