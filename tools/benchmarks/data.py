"""The `data` part of tools/benchmark.py: what the loader costs beside the bare decoding and cropping of its images.

Every contender reads the same JPEGs, of ImageNet's usual 500 x 375 pixels or as --image says, from the same tars, in
the loader's own worker processes. The bare decoding is of whole images; the loader decodes large ones smaller. They
take turns there, a micro-batch each: the speed of a machine that is shared changes within seconds by more than they
differ. A worker gets its next request when its last micro-batch has arrived in the main process. So the time from one
request to the next is what a micro-batch costs its worker, handing over included. The least time that each micro-batch
took in any round counts: whatever else the machine does only ever adds time.

A core's rate is images per second of the workers' CPU time, which other programs on the machine disturb least; the
wall-clock rate stands beside it. Colour jitter belongs to the device and is in none.
"""

from __future__ import annotations

import io
import itertools
import pydoc_data.topics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import sentencepiece
import webdataset
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from beit3_dist.config import SPECIAL_ROWS, STREAMS, BatchConfig, DataConfig, ModelConfig, RunConfig
from beit3_dist.data import transforms
from beit3_dist.data.batch import MixedBatches, Request, requests_from
from beit3_dist.data.loader import loader
from beit3_dist.data.order import Stream, generator, mix
from beit3_dist.data.streaming import SequentialStream
from beit3_dist.data.streams import Draw, Sample, SampleStream
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.tools.benchmarks.measure import check_positive

IMAGE = (500, 375)
"""Width and height: the usual ones in ImageNet."""
JPEG_QUALITY = 90
PER_SHARD = 64
SHARDS = 4
PIECES = 2000
WARM_UP = 2
"""Micro-batches of each worker that are not timed."""


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG of this width and height with broad shapes, fine texture and noise: 80 KB at 500 x 375, as heavy to decode
    as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    shapes = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(shapes + rng.normal(0, 12, shapes.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def build(folder: Path, size: tuple[int, int]) -> None:
    """Shards of images of this width and height, of pairs and of documents (one a member, as webdataset reads them),
    and a tokenizer."""
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
                key, image, text = f"{number:05d}", photograph(number, size), words[number % len(words)].encode()
                images.write({"__key__": key, "jpg": image})
                pairs.write({"__key__": key, "jpg": image, "txt": text[:120]})
                texts.write({"__key__": key, "txt": text})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=PIECES, model_type="unigram", minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "text.spm").write_bytes(model.getvalue())


def run_config(folder: Path, batch: int) -> RunConfig:
    """Images of 14 x 14 patches over the shards in `folder`, `batch` samples of each stream per micro-batch."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "text.spm")).get_piece_size()
    shards = {name: str(folder / f"{name}-*.tar") for name in STREAMS}
    return RunConfig(
        out=str(folder / "out"),
        data=DataConfig(**shards, cache=str(folder / "cache"), text_length=128),
        text_tokenizer=str(folder / "text.spm"),
        image_tokenizer="none",
        model=ModelConfig(patch_size=16, vocab_size=pieces + SPECIAL_ROWS),
        batch=BatchConfig(images=batch, texts=batch, pairs=batch),
    )


# ------------------------------------------------------------------------------------------------------- contenders


class Bare(Dataset):
    """The limit: our micro-batches' images, decoded whole from bytes in memory, the same boxes drawn and cropped, and
    nothing else."""

    def __init__(self, batches: MixedBatches, requests: list[Request]) -> None:
        """Looks the images of `requests` up, which are all that can be asked for."""
        self.config = batches.config
        self.images: dict[Request, list[tuple[bytes, int]]] = {request: [] for request in requests}
        files: dict[tuple[Stream, int], bytes] = {}
        for stream in (batches.indexed(Stream.IMAGES), batches.indexed(Stream.PAIRS)):
            for request, images in self.images.items():
                first = request.consumed[stream.stream]
                for sample in stream.read_all(range(first, first + batches.micro_batch[stream.stream])):
                    row, name = stream.tables[0].rows[sample.index], (stream.stream, sample.index)
                    files.setdefault(name, stream.readers[0].read(int(row["shard"]), *map(int, row["image"])))
                    images.append((files[name], sample.key))

    def __getitem__(self, request: Request) -> None:
        size, scale = self.config.model.image_size, self.config.data.min_crop_scale
        for data, key in self.images[request]:
            image = transforms.decode(data, self.config.data.max_pixels)
            transforms.cropped_view(image, generator(key, Draw.VIEW), size, scale, flip=0)


class ByWebdataset(MixedBatches):
    """Our batches, but that webdataset reads the samples: its shuffle buffer, its splitting by worker, its order."""

    def _pipeline(self, pattern: str) -> Iterator[dict[str, Any]]:
        paths = [str(path) for path in sorted(Path(pattern).parent.glob(Path(pattern).name))]
        return iter(webdataset.WebDataset(paths, resampled=True, shardshuffle=False, nodesplitter=None).shuffle(100))

    def _samples(self, stream: SampleStream | SequentialStream, positions: list[int]) -> Iterator[Sample]:
        if not hasattr(self, "pipelines"):
            data = self.config.data
            self.pipelines = [self._pipeline(str(getattr(data, name))) for name in ("images", "texts", "pairs")]
        return (self._sample(stream.stream, position) for position in positions)

    def _sample(self, stream: Stream, position: int) -> Sample:
        members = next(self.pipelines[stream])
        sample = Sample(stream, 0, position, mix(0, stream, 0, position), [])
        if stream is not Stream.TEXTS:
            sample.decode(members["jpg"], self.config.data.max_pixels, self.crops)
        if stream is not Stream.IMAGES:
            data, tokenizer = self.config.data, self.tokenizer
            length = data.text_length if stream is Stream.TEXTS else data.caption_length
            ids = tokenizer.encode(members["txt"].decode())[: length - 2]
            sample.words = np.array([tokenizer.bos, *ids, tokenizer.eos], dtype=np.int64)
        return sample


class TakingTurns(Dataset):
    """The contenders' micro-batches, each with the worker that is asked for it and its clocks at that moment."""

    def __init__(self, contenders: list[Dataset]) -> None:
        self.contenders = contenders

    def __getitem__(self, turn: tuple[int, Request]) -> tuple[int, float, float, Any]:
        contender, request = turn
        worker = get_worker_info()
        assert worker is not None, "a core's rate is that of a worker"
        return worker.id, time.process_time(), time.perf_counter(), self.contenders[contender][request]


# ------------------------------------------------------------------------------------------------------ measurement


def measure(contenders: list[Dataset], requests: list[Request], workers: int, rounds: int) -> np.ndarray:
    """Seconds of CPU and by the clock, [2, contenders, rounds, requests], of the micro-batches that the workers are
    asked for in each round, after WARM_UP others of each worker."""
    shares = [requests[start : start + workers] for start in range(0, len(requests), workers)]
    asked = shares[:1] * WARM_UP + shares * rounds
    turns = [
        (contender, request) for share in asked for contender in range(len(contenders)) for request in share
    ]  # Workers are asked in turn: each gets the contenders one after the other.
    last = [(0, request) for request in shares[0]]  # Whose start is the end of the others.
    starts = np.empty((len(turns) + workers, 2))
    for number, item in enumerate(loader(TakingTurns(contenders), turns + last, workers, 1, pin=False)):
        worker, *starts[number], _ = item
        assert worker == number % workers
        del item, _  # The main process holds no images while the next ones are made.
    spent = (starts[workers:] - starts[:-workers]).reshape(len(asked), len(contenders), workers, 2)
    timed = spent[WARM_UP:].reshape(rounds, len(shares), len(contenders), workers, 2)
    return timed.transpose(4, 2, 0, 1, 3).reshape(2, len(contenders), rounds, len(requests))


def benchmark_data(options: Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="beit3-benchmark-") as name:
        folder = Path(name)
        build(folder, tuple(options.image))
        config = run_config(folder, options.batch)
        ours = MixedBatches(config, config.model.image_size, 0, 1, annotators=[*objectives_of(config)])
        theirs = ByWebdataset(config, config.model.image_size, 0, 1, annotators=[*objectives_of(config)])
        record: dict[str, Any] = {"workers": {}}
        for workers in options.workers:
            requests = list(itertools.islice(requests_from((0, 0, 0), config.batch), workers * options.micro_batches))
            contenders = {"limit": Bare(ours, requests), "ours": ours, "webdataset": theirs}
            spent = measure(list(contenders.values()), requests, workers, options.rounds)
            cpu, clock = spent.min(axis=2).mean(axis=2)  # each [contenders], of a micro-batch
            images = config.batch.images + config.batch.pairs
            per_core = dict(zip(contenders, (images / cpu).tolist(), strict=True))
            wall = dict(zip(contenders, (workers * images / clock).tolist(), strict=True))
            record["workers"][str(workers)] = {
                "fraction_of_decode_limit": per_core["ours"] / per_core["limit"],
                "ratio_vs_webdataset": per_core["ours"] / per_core["webdataset"],
                "per_core": per_core,
                "wall": wall,
            }
    figures = record["workers"].values()
    for name in ("fraction_of_decode_limit", "ratio_vs_webdataset"):
        record[name] = min(figure[name] for figure in figures)
    record["picture"] = options.image
    record["webdataset"] = webdataset.__version__
    return record


def data_table(record: dict[str, Any]) -> str:
    width, height = record["picture"]
    lines = [
        f"images per second and core, JPEGs of {width} x {height}; webdataset {record['webdataset']}",
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
    data = commands.add_parser("data", help="the loader")
    check = partial(check_positive, ("batch", "micro_batches", "rounds", "workers", "image"))
    data.set_defaults(measure=benchmark_data, table=data_table, check=check)
    data.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of loader processes")
    data.add_argument("--batch", type=int, default=32, help="images, texts and pairs of a micro-batch, each")
    data.add_argument("--micro_batches", type=int, default=6, help="timed micro-batches per worker and round")
    data.add_argument("--rounds", type=int, default=10, help="times that each micro-batch is read")
    data.add_argument("--image", type=int, nargs=2, default=list(IMAGE), metavar=("WIDTH", "HEIGHT"), help="pixels")
