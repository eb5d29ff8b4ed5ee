"""The loader's benchmark measures what it says, and its contenders do equal work. No rate is asserted here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3_dist.data import transforms
from beit3_dist.data.batch import MixedBatches, Request, requests_from
from beit3_dist.objectives.masked_data_modeling import NAME
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.tools.benchmarks import data
from tools import benchmark


class Idle(torch.utils.data.Dataset):
    """A contender without work."""

    def __getitem__(self, request: Request) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    data.build(folder, data.IMAGE)
    return folder


def test_contenders_make_equal_batches(folder: Path) -> None:
    """webdataset's samples come in another order, but a batch has the same tensors, and no picture is left over."""
    config = data.run_config(folder, 3)
    ours, theirs = (
        batches(config, 224, 0, 1, annotators=[*objectives_of(config)])[Request((0, 0, 0), 0)]
        for batches in (MixedBatches, data.ByWebdataset)
    )
    for name, samples in theirs.streams.items():
        assert len(samples) == len(ours.streams[name]) == 3
        for field, drawn in samples.annotations[NAME].items():
            assert drawn.dtype == ours.streams[name].annotations[NAME][field].dtype
    images, pairs, texts = (theirs.streams[name] for name in ("images", "pairs", "texts"))
    assert images.images.shape == ours.streams["images"].images.shape == (3, 3, 224, 224)
    assert images.annotations[NAME]["image_mask"].sum() == ours.streams["images"].annotations[NAME]["image_mask"].sum()
    assert (pairs.lengths > 4).all() and texts.annotations[NAME]["text_mask"].any(1).all()
    assert not torch.equal(images.images[0], images.images[1]) and theirs.faults == []


def test_the_limit_crops_our_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes are decoded, and the same boxes resized, in the same order."""
    config = data.run_config(folder, 3)
    ours = MixedBatches(config, 224, 0, 1)
    requests = list(itertools.islice(requests_from((0, 0, 0), config.batch), 2))
    bare = data.Bare(ours, requests)
    seen: list[object] = []
    decode, decode_for, resized = transforms.decode, transforms.decode_for, transforms.resized

    def spied(image: Image.Image, size: int, box: tuple[int, ...], flip: bool = False) -> np.ndarray:
        seen.append((size, box))
        return resized(image, size, box, flip)

    monkeypatch.setattr(transforms, "decode", lambda data, limit: seen.append(data) or decode(data, limit))
    monkeypatch.setattr(transforms, "decode_for", lambda data, *rest: seen.append(data) or decode_for(data, *rest))
    monkeypatch.setattr(transforms, "resized", spied)
    found = []
    for dataset in (bare, ours):
        seen.clear()
        for request in requests:
            dataset[request]
        found.append(list(seen))
    assert found[0] == found[1] and len(found[0]) == 2 * 2 * 6


def test_each_micro_batch_is_timed_in_each_round(folder: Path) -> None:
    """Two workers, a contender that works and one that does nothing: no time is taken for another's."""
    config = data.run_config(folder, 3)
    requests = list(itertools.islice(requests_from((0, 0, 0), config.batch), 4))
    bare = data.Bare(MixedBatches(config, 224, 0, 1), requests)
    spent = data.measure([bare, Idle()], requests, 2, 3)
    assert spent.shape == (2, 2, 3, 4) and (spent > 0).all()
    cpu = spent[0].min(axis=1)
    assert (cpu[0] > 3 * cpu[1]).all()  # six pictures of two milliseconds each; handing nothing over takes one


@pytest.mark.slow
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main("data --json --workers 1 --batch 2 --micro_batches 2 --rounds 1 --image 90 60".split()) == 0
    record = json.loads(capsys.readouterr().out)
    core = record["workers"]["1"]["per_core"]
    assert record["picture"] == [90, 60]
    assert record["fraction_of_decode_limit"] == core["ours"] / core["limit"] > 0
    assert record["ratio_vs_webdataset"] == core["ours"] / core["webdataset"] > 0


@pytest.mark.parametrize("option", ["--workers 0", "--batch 0", "--rounds 0", "--image 0 9"])
def test_mistakes(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["data", *option.split()]) == 2
    assert option.split()[0] in capsys.readouterr().err
