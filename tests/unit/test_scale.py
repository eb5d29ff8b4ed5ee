"""Ten million samples: a rank starts within a second and holds no object per sample."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from beit3_dist.data.cache import digest
from beit3_dist.data.index import FORMAT, ROW, Table, expand, fingerprint, open_table
from beit3_dist.data.order import Stream
from beit3_dist.data.text import TOKENS_FORMAT, TextTokenizer
from tests.unit.tar_fixtures import train_tokenizer

SHARDS, PER_SHARD, WIDTH = 1000, 10_000, 126
MEASURE = """
import sys, time
from beit3_dist.data.streams import ImageStream, TextStream, Origin
from beit3_dist.data.text import TextTokenizer
def anonymous_mb():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
pattern, cache, tokenizer, kind = sys.argv[1:]
words, memory, started = TextTokenizer(tokenizer), anonymous_mb(), time.perf_counter()
if kind == "images":
    stream = ImageStream(Origin(pattern, "data.images", 0, cache), 10**8)
else:
    stream = TextStream(Origin(pattern, "data.texts", 0, cache), words, 128)
seconds = time.perf_counter() - started
for position in range(0, 20_000):
    source, epoch, number = next(stream.candidates(position))
    stream.tables[0].rows[number] if kind == "images" else stream.windows[0].read(number)
print(len(stream), seconds, anonymous_mb() - memory)
"""


def sparse(path: Path, shape: tuple[int, ...], kind: np.dtype) -> None:
    """A .npy file of zeros that takes no space."""
    np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape).flush()


def table_of(folder: Path, stream: Stream, samples: int) -> Table:
    """A table as the index would write it, over empty shards."""
    pattern, cache = str(folder / "*.tar"), folder / "cache"
    paths = expand(pattern, "")
    marks = [fingerprint(path) for path in paths]
    file = cache / f"{digest(FORMAT, stream.name, *zip(paths, marks, strict=True))}.npy"
    file.with_suffix(".json").write_text(json.dumps({"damage": [], "left_out": []}))
    sparse(file, (samples,), ROW)
    return open_table(pattern, "", stream, str(cache))


@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.slow
def test_ten_million_samples(tmp_path: Path, kind: str) -> None:
    for shard in range(SHARDS):
        (tmp_path / f"{shard:04d}.tar").write_bytes(b"")
    (tmp_path / "cache").mkdir()
    spm = train_tokenizer(tmp_path / "text.spm")
    if kind == "images":
        table_of(tmp_path, Stream.IMAGES, SHARDS * PER_SHARD)
    else:
        table = table_of(tmp_path, Stream.TEXTS, SHARDS)
        mark = TextTokenizer(str(spm)).fingerprint
        for path, own in zip(table.paths, table.marks, strict=True):
            file = table.file.with_name(f"{digest(TOKENS_FORMAT, path, *own, mark)}.npy")
            sparse(file, (PER_SHARD * WIDTH,), np.dtype(np.uint16))
            file.with_suffix(".json").write_text("[]")
    arguments = [str(tmp_path / "*.tar"), str(tmp_path / "cache"), str(spm), kind]
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    samples, seconds, megabytes = map(float, run.stdout.split())
    print(f"{kind}: {seconds:.3f} s, {megabytes:.1f} MB")
    assert samples == SHARDS * PER_SHARD
    assert megabytes < 200
