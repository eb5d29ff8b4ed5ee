"""Bytes of tar members by offset, without ever moving a file position."""

from __future__ import annotations

import os
from collections import OrderedDict

from beit3_dist.data.faults import BadSample
from beit3_dist.data.index import Table

OPEN_FILES = 64
"""Shards that a process keeps open at a time."""


class ShardReader:
    """Reads members of a table's shards; files are opened when first needed, in each process by itself."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.files: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the shard with this number; BadSample if it cannot be read."""
        try:
            data = os.pread(self._file(shard), size, offset)
        except OSError as error:  # The shard is gone, or its storage fails.
            raise BadSample(f"unreadable shard: {error.strerror}") from None
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
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(file)
        if (stat.st_size, stat.st_mtime_ns) != self.table.marks[shard]:
            os.close(file)
            raise RuntimeError(f"{path} changed since it was indexed: its offsets are void; start the run again")
        self.files[shard] = file
        if len(self.files) > OPEN_FILES:
            os.close(self.files.popitem(last=False)[1])
        return file

    def __getstate__(self) -> dict:
        return {"table": self.table, "files": OrderedDict()}

    def __del__(self) -> None:
        for file in getattr(self, "files", {}).values():
            os.close(file)
