"""Output that cannot be written does not end the program.

A terminal may be closed, a log's disk may fill up, the reader of a pipe may go away. Then the output is lost, and the
training goes on and ends with its own exit code; Python's clean-up raises nothing either.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from typing import Any, TextIO


class Unfailing:
    """`stream`, but for writing: what cannot be written is lost, where `stream` would raise OSError."""

    def __init__(self, stream: TextIO | None) -> None:
        """`stream`: None where the process was started without one."""
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
    """From here on standard output and standard error lose what cannot be written, whoever writes to them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Unfailing):
            setattr(sys, name, Unfailing(stream))
