"""Runs of images only, texts only or pairs only: the same in every layout, validated, resumed, reported, verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint.read import read_weights
from beit3_dist.config import STREAMS, BatchConfig, CheckpointConfig, DataConfig, EvalConfig, ParallelConfig, RunConfig
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.reports import targets
from beit3_dist.reports.opened import SAMPLES_AT_ONCE
from beit3_dist.run.preflight import prepare_run
from tests.integration.runs import evaluations, metrics, reproducible, run_config, second_half, train_in_turn
from tests.parallel.workers import Workers
from tools import report, verify_order

STEPS = 4
ALONE = Mesh(0, 1, 0, 1, torch.device("cpu"))
LAYOUTS = {
    "one": ParallelConfig(zero_stage=1),
    "dp2": ParallelConfig(zero_stage=3),
    "tp2": ParallelConfig(zero_stage=1, tensor=2, sequence=True),
    "pp2": ParallelConfig(zero_stage=1, pipeline=2),
}
PIPED = "pairs"
"""The stream whose shards come out of commands, too."""
LOSSES = {"images": {"image"}, "texts": {"text"}, "pairs": {"pair_image", "pair_text"}}


def only(folder: Path, stream: str, layout: str, piped: bool = False) -> RunConfig:
    """A run that has one stream, and names no shards of the others. `piped`: its shards come out of commands."""
    config = run_config(folder)
    tars = getattr(config.data, stream)
    shards = f"pipe:cat {folder}/{stream}-{{0..1}}.tar" if piped else tars
    data = DataConfig(
        **{stream: shards},
        cache=config.data.cache,
        text_length=18,
        caption_length=12,
        workers=0,
        virtual_readers=2,
    )
    return replace(
        config,
        out=str(folder / f"{stream}-{'piped-' * piped}{layout}"),
        steps=STEPS,
        data=data,
        image_tokenizer="" if stream == "texts" else config.image_tokenizer,
        batch=BatchConfig(**{name: 4 * (name == stream) for name in STREAMS}, accumulation=2),
        parallel=LAYOUTS[layout],
        checkpoint=CheckpointConfig(every=2),
        eval=EvalConfig(every=2, batches=1, **{stream: tars}),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, those of one layout in the same processes."""
    folder = tmp_path_factory.mktemp("absent")
    for layout, parallel in LAYOUTS.items():
        configs = [only(folder, stream, layout) for stream in STREAMS]
        if layout in ("one", "dp2"):
            configs.append(only(folder, PIPED, layout, piped=True))
        if layout == "one":
            configs += [second_half(config) for config in configs]
        with Workers(1 if layout == "one" else 2, parallel.tensor, parallel.pipeline) as workers:
            workers.run(train_in_turn, configs)
    return folder


Records = Callable[[Path], list[dict[str, Any]]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "layout"),
    [*((stream, layout) for layout in ("dp2", "tp2", "pp2") for stream in STREAMS), (PIPED, "piped-dp2")],
)
@pytest.mark.parametrize(("read", "number"), [(metrics, STEPS), (evaluations, 2)], ids=["steps", "validations"])
def test_every_layout_learns_the_same(folder: Path, stream: str, layout: str, read: Records, number: int) -> None:
    reference = read(folder / f"{stream}-{'piped-' * layout.startswith('piped')}one")
    ours = read(folder / f"{stream}-{layout}")
    assert len(ours) == len(reference) == number
    for record, expected in zip(ours, reference, strict=True):
        assert record.get("sample_hash") == expected.get("sample_hash")
        losses = {name: value for name, value in expected.items() if name.startswith("loss")}
        assert set(losses) == {"loss", *(f"loss_{name}" for name in LOSSES[stream])}
        assert {name: record[name] for name in losses} == pytest.approx(losses, rel=1e-5)
        if "images" in record:
            assert [record[name] for name in STREAMS] == [4 * (name == stream) for name in STREAMS]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [*STREAMS, f"{PIPED}-piped"])
def test_resumed_bit_for_bit(folder: Path, stream: str) -> None:
    undisturbed, found = folder / f"{stream}-one", folder / f"{stream}-one-resumed"
    assert reproducible(found) == reproducible(undisturbed)[2:]
    last = Path("checkpoints", f"step_{STEPS:07d}")
    weights = read_weights(found / last)
    assert all(torch.equal(value, weights[name]) for name, value in read_weights(undisturbed / last).items())


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_tools_take_its_run(
    folder: Path, stream: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "SAMPLES", SAMPLES_AT_ONCE)  # enough for what this test looks at
    out = folder / f"{stream}-one"
    report.main([str(out), "--pictures", "1"])
    content = json.loads((out / "report.json").read_text())
    assert set(content["losses"]) == set(content["entropies"]) == LOSSES[stream]
    assert content["pictures"] == "held-out" and content["samples"] == {name: 16 * (name == stream) for name in STREAMS}
    assert set(content["codes_right"]) == LOSSES[stream] & {"image", "pair_image"}
    assert verify_order.main([str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"of {SAMPLES_AT_ONCE} training samples" in printed and "4 steps, 16 samples" in printed


def test_images_need_an_image_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_tokenizer is not given, but visual codes"):
        prepare_run(replace(only(tmp_path, "pairs", "one"), image_tokenizer=""), ALONE)


def test_shards_of_a_stream_that_the_batch_has_are_needed(tmp_path: Path) -> None:
    for stream in STREAMS:
        config = only(tmp_path, stream, "one")
        with pytest.raises(ValueError, match=f"data.{stream} is not given, but batch.{stream}=4: .* batch.{stream}=0"):
            replace(config, data=DataConfig())
        with pytest.raises(ValueError, match=f"eval.{stream} is empty but eval.every=2"):
            replace(config, eval=EvalConfig(every=2))
