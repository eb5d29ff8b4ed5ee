"""Validations show trackers the same guesses in every layout, and change nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from beit3_dist.config import ParallelConfig, RunConfig
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.preflight import prepare_run
from beit3_dist.train.guesses import Example
from beit3_dist.train.pictures import confusion
from tests.integration.runs import evaluations, reproducible, run_config, train_in_turn, validated
from tests.parallel.workers import Workers


def config_of(folder: Path, out: str, pictures: int = 3, **parallel: Any) -> RunConfig:
    config = run_config(folder, steps=4, out=str(folder / out), parallel=ParallelConfig(**parallel))
    return replace(config, eval=replace(validated(config, every=2), pictures=pictures))


def shown(out: str) -> tuple[dict[str, list[bytes]], dict[str, list[bytes]]]:
    """Images and texts of a run's TensorBoard."""
    events = EventAccumulator(str(Path(out) / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    images = {tag: [event.encoded_image_string for event in events.Images(tag)] for tag in events.Tags()["images"]}
    texts = {tag: [e.tensor_proto.string_val[0] for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    return images, {tag: texts[tag] for tag in texts if tag.startswith("captions")}


@pytest.mark.slow
def test_every_layout_shows_the_same_guesses(tmp_path: Path) -> None:
    one, plain = config_of(tmp_path, "one", zero_stage=1), config_of(tmp_path, "plain", 0, zero_stage=1)
    with Workers(1) as workers:
        workers.run(train_in_turn, [one, plain])
    images, texts = shown(one.out)
    assert {*images} == {"pictures/image", "pictures/pair_image", "pictures/confusion"}
    assert all(len(of_validations) == 2 for of_validations in (*images.values(), *texts.values()))
    (captions,) = texts.values()
    for text in captions:
        assert len(text.decode().splitlines()) == 3 and "→" in text.decode() and "[" in text.decode()
    assert shown(plain.out) == ({}, {})
    assert reproducible(one.out) == reproducible(plain.out) and evaluations(one.out) == evaluations(plain.out)
    for name, tensor, layout in (("dp2", 1, {"zero_stage": 3}), ("tp2", 2, {"zero_stage": 1, "tensor": 2})):
        config = config_of(tmp_path, name, **layout)
        with Workers(2, tensor) as workers:
            workers.run(train_in_turn, [config])
        assert shown(config.out) == (images, texts), name


@pytest.mark.parametrize(("changes", "words"), [
    ({"parallel": ParallelConfig(pipeline=2, zero_stage=1)}, "eval.pictures=3: a pipeline guesses nothing"),
    ({"image_codes": "codes"}, "eval.pictures=3 draws what an image tokenizer says"),
    ({"every": 0}, "eval.pictures=3: give eval.every"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    config = config_of(tmp_path, "run")
    if "every" in changes:
        config = replace(config, eval=replace(config.eval, **changes))
    else:
        config = replace(config, **changes)
    mesh = Mesh(0, 2, 0, config.parallel.tensor, torch.device("cpu"), pipeline=config.parallel.pipeline)
    with pytest.raises(ValueError, match=words):
        prepare_run(config, mesh if config.parallel.pipeline > 1 else Mesh(0, 1, 0, 1, torch.device("cpu")))


def test_the_confusion_has_its_shares_between_the_codes_patches() -> None:
    looks = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2)
    codes, guesses = torch.tensor([1, 1, 2, 1, 0]), torch.tensor([1, 3, 3, 1, 0])
    hidden, image = torch.tensor([True, True, True, True, False]), torch.zeros(3, 4, 4, dtype=torch.uint8)
    levels = np.asarray(confusion([Example(image, hidden, codes, guesses)], looks))[0]
    cells = levels[::4, ::4]  # of the grid, whose lines are two pixels wide
    assert cells.tolist() == [[255, 1, 3], [1, 85, 170], [2, 255, 0]]
