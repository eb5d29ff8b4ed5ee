"""The `data` part of tools/benchmark.py: what the loader costs beside the bare decoding and cropping of its pictures.

Every contender runs in the loader's own worker processes and reads the same JPEGs of 500 x 375 pixels from the same
tars. A core's rate is pictures per second of the workers' CPU time, which other programs on the machine disturb least;
the wall-clock rate stands beside it. The contenders take turns, and the least time that each micro-batch took in any
round counts: whatever else the machine does only ever adds time. Colour jitter belongs to the device and is in none.
"""

from __future__ import annotations

import io
import itertools
import pydoc_data.topics
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import sentencepiece
import webdataset
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from beit3_dist.config import SPECIAL_ROWS, BatchConfig, DataConfig, ModelConfig, RunConfig
from beit3_dist.data import transforms
from beit3_dist.data.batch import MixedBatches, Request, loader, requests_from
from beit3_dist.data.order import Stream, generator, mix
from beit3_dist.data.streams import Sample, SampleStream

WIDTH, HEIGHT = 500, 375
"""Pixels of a picture: the usual size in ImageNet."""
JPEG_QUALITY = 90
PER_SHARD = 64
SHARDS = 4
PIECES = 2000
"""Pieces of the tokenizer that is trained for the benchmark."""
WARM_UP = 2
"""Micro-batches of each worker that are not timed."""


def photograph(seed: int) -> bytes:
    """A JPEG with broad shapes, fine texture and noise: about 80 KB, as heavy to decode as a photograph."""
    rng = np.random.default_rng(seed)
    shapes = cv2.resize(
        rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC
    )
    noisy = np.clip(shapes + rng.normal(0, 12, shapes.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def build(folder: Path) -> None:
    """Shards of pictures, pairs and documents (one a member, as webdataset reads them), and a tokenizer."""
    topics = "\n".join(pydoc_data.topics.topics.values()).split("\n\n")
    words = [" ".join(text.split()) for text in topics if len(text) > 80]
    for shard in range(SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        with (
            webdataset.TarWriter(str(folder / f"images-{shard}.tar"), encoder=False) as images,
            webdataset.TarWriter(str(folder / f"pairs-{shard}.tar"), encoder=False) as pairs,
            webdataset.TarWriter(str(folder / f"texts-{shard}.tar"), encoder=False) as texts,
        ):
            for number in numbers:
                key, picture, text = f"{number:05d}", photograph(number), words[number % len(words)].encode()
                images.write({"__key__": key, "jpg": picture})
                pairs.write({"__key__": key, "jpg": picture, "txt": text[:120]})
                texts.write({"__key__": key, "txt": text})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=PIECES, model_type="unigram", minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "text.spm").write_bytes(model.getvalue())


def run_config(folder: Path, batch: int) -> RunConfig:
    """Pictures of 14 x 14 patches over the shards in `folder`, `batch` samples of each stream per micro-batch."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "text.spm")).get_piece_size()
    return RunConfig(
        out=str(folder / "out"),
        data=DataConfig(
            images=str(folder / "images-*.tar"),
            texts=str(folder / "texts-*.tar"),
            pairs=str(folder / "pairs-*.tar"),
            cache=str(folder / "cache"),
            text_length=128,
        ),
        text_tokenizer=str(folder / "text.spm"),
        image_tokenizer="none",
        model=ModelConfig(patch_size=16, vocab_size=pieces + SPECIAL_ROWS),
        batch=BatchConfig(images=batch, texts=batch, pairs=batch),
    )


# ------------------------------------------------------------------------------------------------------- contenders


class Bare(Dataset):
    """The limit: the pictures of a micro-batch decoded and cropped from bytes in memory, and nothing else."""

    def __init__(self, batches: MixedBatches) -> None:
        self.config = batches.config
        self.data: list[bytes] = [
            stream.readers[0].read(int(row["shard"]), *map(int, row["image"]))
            for stream in (batches.images, batches.pairs)
            for row in stream.tables[0].rows
        ]

    def __getitem__(self, request: Request) -> None:
        size, scale = self.config.model.image_size, self.config.data.min_crop_scale
        for number in range(self.config.batch.images + self.config.batch.pairs):
            place = request.consumed[0] * 2 + number
            picture = transforms.decode(self.data[place % len(self.data)], self.config.data.max_pixels)
            transforms.cropped_view(picture, generator(place), size, scale, flip=0)


class ByWebdataset(MixedBatches):
    """Our batches, but that webdataset reads the samples: its shuffle buffer, its splitting by worker, its order."""

    def _pipeline(self, pattern: str) -> Iterator[dict[str, Any]]:
        return iter(
            webdataset.WebDataset(
                [str(path) for path in sorted(Path(pattern).parent.glob(Path(pattern).name))],
                resampled=True,
                shardshuffle=False,
                nodesplitter=None,
            ).shuffle(100)
        )

    def _sample(self, stream: SampleStream, position: int) -> Sample:
        if not hasattr(self, "pipelines"):
            data = self.config.data
            self.pipelines = [self._pipeline(str(getattr(data, name))) for name in ("images", "texts", "pairs")]
        members = next(self.pipelines[stream.stream])
        sample = Sample(stream.stream, 0, position, mix(0, stream.stream, 0, position), [])
        if stream.stream is not Stream.TEXTS:
            sample.picture = transforms.decode(members["jpg"], self.config.data.max_pixels)
        if stream.stream is not Stream.IMAGES:
            data, tokenizer = self.config.data, self.tokenizer
            length = data.text_length if stream.stream is Stream.TEXTS else data.caption_length
            ids = tokenizer.encode(members["txt"].decode())[: length - 2]
            sample.words = np.array([tokenizer.bos, *ids, tokenizer.eos], dtype=np.int64)
        return sample


class Metered(Dataset):
    """A dataset's items with the worker that made them and its CPU time so far."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, request: Request) -> tuple[Any, int, float]:
        item, worker = self.dataset[request], get_worker_info()
        assert worker is not None, "a core's rate is that of a worker"
        return item, worker.id, time.process_time()


# ------------------------------------------------------------------------------------------------------ measurement


def measure(dataset: Dataset, config: RunConfig, workers: int, micro_batches: int) -> tuple[np.ndarray, float]:
    """CPU seconds of each of the workers' `micro_batches`, after WARM_UP others, and seconds of all by the clock."""
    total = workers * (micro_batches + WARM_UP)
    requests = itertools.islice(requests_from((0, 0, 0), config.batch), total)
    before: dict[int, float] = {}
    spent, started = [], 0.0
    for number, (_, worker, cpu) in enumerate(loader(Metered(dataset), requests, workers, 2, pin=False)):
        if number < workers * WARM_UP:
            started = time.perf_counter()
        else:
            spent.append(cpu - before[worker])
        before[worker] = cpu
    return np.array(spent), time.perf_counter() - started


def benchmark_data(options: Namespace) -> dict[str, Any]:
    """What `data` was asked to compare, and the figures."""
    with tempfile.TemporaryDirectory(prefix="beit3-benchmark-") as name:
        folder = Path(name)
        build(folder)
        config = run_config(folder, options.batch)
        ours = MixedBatches(config, config.model.image_size, 0, 1)
        theirs = ByWebdataset(config, config.model.image_size, 0, 1)
        contenders = {"limit": Bare(ours), "ours": ours, "webdataset": theirs}
        record: dict[str, Any] = {"workers": {}}
        for workers in options.workers:
            rounds: dict[str, list[tuple[np.ndarray, float]]] = {contender: [] for contender in contenders}
            for _ in range(options.rounds):
                for contender, dataset in contenders.items():
                    rounds[contender].append(measure(dataset, config, workers, options.micro_batches))
            pictures = workers * options.micro_batches * (config.batch.images + config.batch.pairs)
            per_core, wall = {}, {}
            for contender, found in rounds.items():
                spent, clock = zip(*found, strict=True)
                per_core[contender] = pictures / float(np.min(spent, axis=0).sum())
                wall[contender] = pictures / min(clock)
            record["workers"][str(workers)] = {
                "fraction_of_decode_limit": per_core["ours"] / per_core["limit"],
                "ratio_vs_webdataset": per_core["ours"] / per_core["webdataset"],
                "per_core": per_core,
                "wall": wall,
            }
    figures = record["workers"].values()
    for name in ("fraction_of_decode_limit", "ratio_vs_webdataset"):
        record[name] = min(figure[name] for figure in figures)
    record["picture"] = [WIDTH, HEIGHT]
    record["webdataset"] = webdataset.__version__
    return record


def data_table(record: dict[str, Any]) -> str:
    """`benchmark_data`'s record for people."""
    width, height = record["picture"]
    lines = [
        f"pictures per second and core, JPEGs of {width} x {height}; webdataset {record['webdataset']}",
        "",
        f"{'workers':>8}{'decode + crop':>15}{'ours':>9}{'webdataset':>12}{'ours / limit':>14}{'ours / its':>12}",
    ]
    for workers, figures in record["workers"].items():
        core = figures["per_core"]
        lines.append(
            f"{workers:>8}{core['limit']:15.0f}{core['ours']:9.0f}{core['webdataset']:12.0f}"
            f"{figures['fraction_of_decode_limit']:14.3f}{figures['ratio_vs_webdataset']:12.3f}"
        )
    return "\n".join(lines)


def add_command(commands: Any) -> None:
    """Adds `data` to the benchmark's commands."""
    data = commands.add_parser("data", help="the loader", formatter_class=ArgumentDefaultsHelpFormatter)
    data.set_defaults(measure=benchmark_data, table=data_table)
    data.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of loader processes")
    data.add_argument("--batch", type=int, default=32, help="images, texts and pairs of a micro-batch, each")
    data.add_argument("--micro_batches", type=int, default=6, help="timed micro-batches per worker and round")
    data.add_argument("--rounds", type=int, default=5, help="rounds in which the contenders take turns")
    data.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def check(options: Namespace) -> None:
    """Raises ValueError for options of `data` that cannot be measured."""
    for name in ("batch", "micro_batches", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} is less than 1")
    if min(options.workers) < 1:
        raise ValueError(f"--workers {min(options.workers)} is less than 1")
