"""The loader's benchmark measures what it says, and its contenders do equal work. No time is asserted here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from beit3_dist.data.batch import MixedBatches, Request
from tools import benchmark, benchmark_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    benchmark_data.build(folder)
    return folder


def test_contenders_make_equal_batches(folder: Path) -> None:
    """webdataset's samples come in another order, but a batch has the same tensors, and no picture is left over."""
    config = benchmark_data.run_config(folder, 3)
    ours = MixedBatches(config, 224, 0, 1)[Request((0, 0, 0), 0)]
    theirs = benchmark_data.ByWebdataset(config, 224, 0, 1)[Request((0, 0, 0), 0)]
    assert ours.images.shape == theirs.images.shape == (6, 3, 224, 224)
    assert ours.image_mask.sum() == theirs.image_mask.sum() and ours.num_texts == theirs.num_texts == 3
    assert (theirs.caption_lengths > 4).all() and theirs.text_mask.any(1).all()
    assert not torch.equal(theirs.images[0], theirs.images[1]) and theirs.faults == []


def test_the_limit_decodes_every_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = benchmark_data.run_config(folder, 3)
    bare = benchmark_data.Bare(MixedBatches(config, 224, 0, 1))
    assert len(bare.data) == 2 * benchmark_data.SHARDS * benchmark_data.PER_SHARD
    seen: list[bytes] = []
    decode = benchmark_data.transforms.decode
    monkeypatch.setattr(
        benchmark_data.transforms, "decode", lambda data, limit: seen.append(data) or decode(data, limit)
    )
    bare[Request((0, 0, 0), 0)]
    bare[Request((3, 3, 3), 0)]
    assert seen == bare.data[:12]


@pytest.mark.slow
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main("data --json --workers 1 --batch 2 --micro_batches 2 --rounds 1".split()) == 0
    record = json.loads(capsys.readouterr().out)
    core = record["workers"]["1"]["per_core"]
    assert record["fraction_of_decode_limit"] == core["ours"] / core["limit"] > 0
    assert record["ratio_vs_webdataset"] == core["ours"] / core["webdataset"] > 0


@pytest.mark.parametrize("option", ["--workers 0", "--batch 0", "--rounds 0"])
def test_mistakes(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["data", *option.split()]) == 2
    assert option.split()[0] in capsys.readouterr().err
