"""A mixture of named data sets: shares by weight and temperature, losses and counts told apart, in any layout."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beit3_dist.config import EvalConfig, RunConfig, Source, TemperatureConfig
from beit3_dist.objectives.contrastive import ContrastiveConfig
from beit3_dist.objectives.masked_data_modeling import MaskedDataModelingConfig
from beit3_dist.objectives.matching import MatchingConfig
from beit3_dist.objectives.prefix_language_modeling import PrefixLanguageModelingConfig
from tests.integration.runs import run_config, second_half, train, train_in_turn
from tests.parallel.workers import run_workers
from tests.unit.tar_fixtures import image_tar, pair_tar, picture, sentences, text_tar, write_tar
from tools import report

WEIGHTS = {"images": {"photos": 3, "drawings": 1}, "pairs": {"coco": 1, "laion": 1}}


def mixture(folder: Path) -> RunConfig:
    """Two sets of images with weights, two of texts by their size, two of pairs; masked data modelling and contrast."""
    config = run_config(folder, steps=4)
    image_tar(folder / "more.tar", 5)
    pair_tar(folder / "more-pairs.tar", 3)
    text_tar(folder / "long.tar", sentences()[:60])
    images = [
        Source(name="photos", shards=str(folder / "images-*.tar"), weight=3),
        Source(name="drawings", shards=str(folder / "more.tar")),
    ]
    texts = [
        Source(name="books", shards=str(folder / "long.tar"), weight="samples"),
        Source(name="notes", shards=str(folder / "texts-0.tar"), weight="samples"),
    ]
    pairs = [
        Source(name="coco", shards=str(folder / "pairs-*.tar")),
        Source(name="laion", shards=str(folder / "more-pairs.tar")),
    ]
    unseen = Source(name="unseen", shards=str(folder / "more.tar"))
    data = replace(config.data, images=images, texts=texts, pairs=pairs, temperature=TemperatureConfig(texts=2))
    held_out = EvalConfig(every=4, batches=1, images=[images[0], unseen], texts=str(folder / "long.tar"), pairs=pairs)
    return replace(
        config, data=data, eval=held_out, checkpoint=replace(config.checkpoint, every=2),
        objectives={
            "masked_data_modeling": MaskedDataModelingConfig(),
            "contrastive": ContrastiveConfig(),
            "matching": MatchingConfig(),
            "prefix_language_modeling": PrefixLanguageModelingConfig(),
        },
    )  # fmt: skip


def lines(out: str, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """The same run on two ranks with two micro-batches each, from its half on, and on one rank at once."""
    config = mixture(tmp_path_factory.mktemp("mixture"))
    alone = replace(config, out=f"{config.out}-alone", batch=replace(config.batch, accumulation=1))
    made = {"two": config, "resumed": second_half(config), "alone": alone}
    run_workers(2, train_in_turn, [made["two"], made["resumed"]])
    assert run_workers(1, train, alone) == [""]
    return made


def test_counts_and_losses_are_told_apart(runs: dict[str, RunConfig]) -> None:
    total: Counter[str] = Counter()
    for record in lines(runs["two"].out):
        for stream, sets in {**WEIGHTS, "texts": {"books": 0, "notes": 0}}.items():
            counts = {name: record[f"{stream}.{name}"] for name in sets}
            assert sum(counts.values()) == record[stream]
            total.update({f"{stream}.{name}": count for name, count in counts.items()})
        # All images have as many masked patches, so that the whole is the mean over the sets' samples.
        of_pairs = [(loss, "pairs") for loss in ("pair_image", "contrastive", "matches")]
        for loss, stream in [("image", "images"), *of_pairs]:
            for kind in ("loss", "acc"):
                parts = [(record[f"{stream}.{name}"], record.get(f"{kind}_{loss}.{name}")) for name in WEIGHTS[stream]]
                assert all((part is None) == (count == 0) for count, part in parts)
                mean = sum(count * part for count, part in parts if part is not None) / record[stream]
                assert mean == pytest.approx(record[f"{kind}_{loss}"], rel=1e-5, abs=1e-6), (loss, kind)
        assert any(f"loss_text.{name}" in record for name in ("books", "notes"))
        assert {"loss_pair_next_word.coco", "loss_pair_text.laion"} <= record.keys()
    assert (total["images.photos"], total["images.drawings"]) == (12, 4) and total["pairs.coco"] == 8
    assert total["texts.notes"] >= 3  # of which there are far fewer
    [held_out] = lines(runs["two"].out, "eval")
    assert {"loss_image.photos", "loss_image.unseen", "acc_pair_text.coco"} <= held_out.keys()
    assert not held_out.keys() & {"loss_image.drawings", "loss_text.books"}


def test_layouts_and_resumed_runs_tell_the_same(runs: dict[str, RunConfig]) -> None:
    two, resumed, alone = (lines(runs[name].out) for name in ("two", "resumed", "alone"))
    timed = {"tokens_per_s", "samples_per_s", "data_wait_s", "step_s", "memory_gb", "tflops_per_device", "mfu"}
    for before, after in zip(two[2:], resumed, strict=True):
        assert {k: v for k, v in before.items() if k not in timed} == {k: v for k, v in after.items() if k not in timed}
    for one, other in zip(alone, two, strict=True):
        assert one.keys() == other.keys() and one["sample_hash"] == other["sample_hash"]
        for name in one:
            if name.startswith("loss"):
                assert one[name] == pytest.approx(other[name], rel=1e-4), name
            elif "." in name and not name.startswith("acc"):
                assert one[name] == other[name], name


def test_report_shows_the_sets(runs: dict[str, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    report.main([runs["alone"].out])
    shown = capsys.readouterr().out
    assert "12 images.photos" in shown and "images: photos" in shown and "captions of pairs: laion" in shown
    told = json.loads(Path(runs["alone"].out, "report.json").read_text())
    assert told["sets"]["images.drawings"] == 4 and told["losses"]["image.photos"]["held_out"] is not None


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "png": picture(0)}])
    command = Source(shards=f"pipe:cat {tmp_path}/a.tar", weight="samples", name="a")
    data = replace(config.data, images=[command], virtual_readers=1)
    [error] = run_workers(1, refused, replace(config, data=data))
    assert error == (
        "data.images: how many samples commands and addresses give is unknown: give a number in place of weight: "
        "samples"
    )


def refused(groups: Any, config: RunConfig) -> str:
    try:
        return train(groups, config)
    except ValueError as error:
        return str(error)
