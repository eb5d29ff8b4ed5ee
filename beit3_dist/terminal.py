"""What a program says to the person in front of it is not worth the program.

A terminal may be closed, a log's disk may fill up, the reader of a pipe may go: whatever cannot be said then is lost,
and the training goes on, ends with its own exit code, and is not told of it by Python's end either.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from typing import Any, TextIO


class Unfailing:
    """A text stream that loses what cannot be written, where it would raise OSError. In all else it is `stream`."""

    def __init__(self, stream: TextIO | None) -> None:
        """`stream`: None where the process was started without it."""
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115 (open as long as the process)

    def write(self, text: str) -> int:
        """Characters taken: all of them."""
        with suppress(OSError, ValueError):  # ValueError: it is closed, or has no such letters
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, where that can be written."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def columns(self) -> int:
        """Width of the terminal; 80 where it is gone or none."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            return shutil.get_terminal_size().columns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_output_unfailing() -> None:
    """Standard output and standard error of this process lose what they cannot write, whoever writes to them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unfailing):
            setattr(sys, name, Unfailing(stream))
