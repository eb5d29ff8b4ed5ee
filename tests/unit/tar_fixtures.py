"""Small shards, a small tokenizer and a small run for the tests of the data pipeline."""

from __future__ import annotations

import io
import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import webdataset
from PIL import Image

from beit3_dist.config import BatchConfig, DataConfig, ModelConfig, RunConfig


def exit_code(main: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """What a tool's process would end with."""
    try:
        return main(arguments) or 0
    except SystemExit as end:
        return int(end.code or 0)


def picture(seed: int, width: int = 40, height: int = 30, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded picture of smooth colours that differ by seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """A shard of samples: extension -> content, with the key under `__key__`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def image_tar(path: Path, count: int, seed: int = 0) -> Path:
    """A shard of `count` pictures."""
    return write_tar(path, [{"__key__": f"{number:04d}", "png": picture(seed + number)} for number in range(count)])


def pair_tar(path: Path, count: int, seed: int = 0) -> Path:
    """A shard of `count` pairs."""
    words = sentences()
    return write_tar(
        path,
        [
            {
                "__key__": f"{number:04d}",
                "jpg": picture(seed + number, kind="JPEG"),
                "txt": words[seed + number].encode(),
            }
            for number in range(count)
        ],
    )


def text_tar(path: Path, documents: list[str]) -> Path:
    """A shard of documents: the first half as lines of a .txt, the second as records of a .jsonl."""
    half = len(documents) // 2
    return write_tar(
        path,
        [
            {"__key__": "lines", "txt": "\n".join(documents[:half]).encode()},
            {
                "__key__": "records",
                "jsonl": "\n".join(json.dumps({"text": text}) for text in documents[half:]).encode(),
            },
        ],
    )


def sentences() -> list[str]:
    """English lines of some length from the standard library's documentation."""
    lines = "\n".join(pydoc_data.topics.topics.values()).split("\n")
    return [line.strip() for line in lines if len(line.strip()) > 30]


def train_tokenizer(path: Path, pieces: int = 300, **changes: object) -> Path:
    """A SentencePiece model with the control ids of tools/train_text_tokenizer.py."""
    file = io.BytesIO()
    settings: dict[str, object] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1} | changes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()[:1500]),
        model_writer=file,
        vocab_size=pieces,
        model_type="bpe",
        minloglevel=2,
        **settings,
    )
    path.write_bytes(file.getvalue())
    return path


def small_run(folder: Path, **changes: object) -> RunConfig:
    """A run over small shards in `folder`: 11 images and 13 pairs in two shards each, texts, a tokenizer, a cache."""
    words = sentences()
    if not (folder / "text.spm").exists():
        image_tar(folder / "images-0.tar", 6)
        image_tar(folder / "images-1.tar", 5, seed=100)
        pair_tar(folder / "pairs-0.tar", 7)
        pair_tar(folder / "pairs-1.tar", 6, seed=200)
        text_tar(folder / "texts-0.tar", words[:12])
        text_tar(folder / "texts-1.tar", words[12:20])
        train_tokenizer(folder / "text.spm")
    data = DataConfig(
        images=str(folder / "images-{0,1}.tar"),
        texts=str(folder / "texts-*.tar"),
        pairs=str(folder / "pairs-*.tar"),
        cache=str(folder / "cache"),
        text_length=18,
        caption_length=12,
    )
    settings: dict[str, object] = {"batch": BatchConfig(images=8, texts=8, pairs=8)} | changes
    model = ModelConfig(
        layers=1, width=8, heads=1, ffn_width=8, patch_size=8, image_size=32, vocab_size=310, vl_expert_layers=0
    )
    return RunConfig(
        out=str(folder / "out"),
        data=data,
        text_tokenizer=str(folder / "text.spm"),
        image_tokenizer="none",
        model=model,
        **settings,
    )
