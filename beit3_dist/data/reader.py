"""Bytes of tar members by offset, without ever moving a file position."""

from __future__ import annotations

import errno
import logging
import os
from collections import OrderedDict
from contextlib import suppress
from time import sleep

from beit3_dist.data.faults import BadSample, Unreadable
from beit3_dist.data.index import Table

log = logging.getLogger(__name__)

OPEN_FILES = 64
PAUSES = (0.1, 1.0, 10.0)
"""Seconds after which a read that failed is tried again: storage that moves to another server costs no samples."""
OF_THIS_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing of the shard."""


class ShardReader:
    """Reads members of a table's shards; files are opened when first needed, in each process by itself."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.files: OrderedDict[int, int] = OrderedDict()
        self.lost: set[int] = set()
        """Shards whose last read failed in spite of all pauses: the next one is tried once."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the shard with this number; Unreadable if it cannot be read, BadSample if it ends
        before them. After an error the file is opened anew, since the old descriptor may be void for ever (NFS:
        ESTALE). Raises RuntimeError where another file lies there now, OSError where this machine lacks descriptors or
        memory."""
        pauses = iter(() if shard in self.lost else PAUSES)
        while True:
            try:
                data = os.pread(self._file(shard), size, offset)
                break
            except OSError as error:
                if error.errno in OF_THIS_MACHINE:
                    raise
                self._close(shard)
                if not (pause := next(pauses, 0.0)):
                    self.lost.add(shard)
                    raise Unreadable(f"unreadable shard: {error.strerror}") from None
                log.warning("%s: %s; another try in %g s", self.table.files[shard], error.strerror, pause)
                sleep(pause)
        self.lost.discard(shard)
        if len(data) < size:
            raise BadSample(f"short read: {len(data)} of {size} bytes at {offset}")
        return data

    def expect(self, shard: int, start: int, end: int) -> None:
        """Tells the system that these bytes of a shard will be read soon, so that it fetches them in one go."""
        try:
            os.posix_fadvise(self._file(shard), start, end - start, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # Advice only; the read itself tells what is wrong.

    def _file(self, shard: int) -> int:
        if shard in self.files:
            self.files.move_to_end(shard)
            return self.files[shard]
        path = self.table.files[shard]
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not be waited for
        stat = os.fstat(file)
        if (stat.st_size, stat.st_mtime_ns) != self.table.marks[shard]:
            os.close(file)
            raise RuntimeError(f"{path} changed since it was indexed: its offsets are void; start the run again")
        self.files[shard] = file
        if len(self.files) > OPEN_FILES:
            os.close(self.files.popitem(last=False)[1])
        return file

    def _close(self, shard: int) -> None:
        if shard in self.files:
            with suppress(OSError):  # of a descriptor that is void
                os.close(self.files.pop(shard))

    def __getstate__(self) -> dict:
        return {"table": self.table, "files": OrderedDict(), "lost": set()}

    def __del__(self) -> None:
        for file in getattr(self, "files", {}).values():
            os.close(file)
