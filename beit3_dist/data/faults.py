"""What can be wrong with a sample, and the record that is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class BadSample(Exception):
    """This sample cannot be used; another one takes its place. The message is the reason."""


class Unreadable(BadSample):
    """Storage does not give what it holds of this sample, which may well be good."""


def check_size(what: str, size: int, most: int) -> None:
    """Raises BadSample where something has more bytes than are read: before memory is taken for them."""
    if size > most:
        raise BadSample(f"{what} of {size:,} bytes: no more than {most:,} are read")


class StreamFailed(RuntimeError):
    """Nothing of a stream can be used, or not the one example that is needed: the run has to stop. The message says
    why, in one line."""

    def __init__(self, message: str, faults: list[Fault] | None = None) -> None:
        """`faults`: what was tried last. Both are its arguments, so that it comes whole out of a loader process."""
        self.faults = faults or []
        super().__init__(message, self.faults)

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Fault:
    """One line of quarantine.jsonl."""

    stream: str
    """images, texts or pairs."""
    shard: str
    key: str
    """Key of the sample, with the line number for a document of a text member; empty for a fault of the whole shard."""
    reason: str

    @staticmethod
    def of(bad: BadSample, stream: str, shard: str, key: str) -> Fault:
        """Of what was raised for a sample of the shard with this key."""
        return (OfStorage if isinstance(bad, Unreadable) else Fault)(stream, shard, key, str(bad))


class OfStorage(Fault):
    """The fault of a sample that is Unreadable."""


def of_storage(faults: Sequence[Fault]) -> bool:
    """Whether nothing of all that was tried could be read: at another time, or on another node, it may well be."""
    return bool(faults) and all(isinstance(fault, OfStorage) for fault in faults)
