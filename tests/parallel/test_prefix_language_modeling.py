"""Next words and classes of images beside masking, and the words that a decoder writes above fusion: the same training
in any layout, resumed bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint.read import read_weights
from beit3_dist.config import BatchConfig, CheckpointConfig, ParallelConfig, RunConfig
from beit3_dist.objectives.image_classification import ImageClassificationConfig
from beit3_dist.objectives.masked_data_modeling import MaskedDataModelingConfig
from beit3_dist.objectives.prefix_language_modeling import PrefixLanguageModelingConfig
from tests.equality import assert_tensors_close
from tests.integration.runs import (
    metrics,
    named,
    reproducible,
    run_config,
    same_losses,
    second_half,
    train_in_turn,
    validated,
)
from tests.launching import launch
from tests.parallel.test_contrastive_runs import first_gradients
from tests.parallel.workers import Workers
from tests.unit.tar_fixtures import picture, write_tar

STEPS = 4
LAYOUTS = {
    "one": ParallelConfig(zero_stage=1),
    "dp2": ParallelConfig(zero_stage=3),
    "tp2": ParallelConfig(zero_stage=1, tensor=2, sequence=True),
    "pp3": ParallelConfig(zero_stage=1, pipeline=3),  # the stage between knows no sample, but needs its prefix
}


def with_next_words(folder: Path, out: str, **changes: Any) -> RunConfig:
    """A run that learns masked and next words of captions and texts, and classes of images, validated twice."""
    config = run_config(folder)
    labelled = write_tar(folder / "labelled.tar", [{"__key__": str(n), "png": picture(n), "cls": b"%d" % (n % 3)}
                                                   for n in range(11)])  # fmt: skip
    config = replace(config, data=replace(config.data, images=str(labelled)))
    objectives = {
        "masked_data_modeling": MaskedDataModelingConfig(),
        "prefix_language_modeling": PrefixLanguageModelingConfig(texts=True, pair_weight=2.0),
        "image_classification": ImageClassificationConfig(classes=3),
    }
    settings: dict[str, Any] = {
        "out": str(folder / out), "steps": STEPS, "objectives": objectives, "parallel": LAYOUTS["one"],
        "model": replace(config.model, layers=3), "batch": BatchConfig(images=6, texts=6, pairs=6, accumulation=3),
        "checkpoint": CheckpointConfig(every=1, keep=0), "eval": validated(config, every=2),
    }  # fmt: skip
    return replace(config, **settings | changes)


def with_decoder(folder: Path, out: str, **changes: Any) -> RunConfig:
    """All of mPLUG's kinds of layers, under masked and written words of captions."""
    config = with_next_words(folder, f"decoder-{out}", **changes)
    model = replace(config.model, layers=4, attention="per_modality", vl_expert_layers=0, fusion_layers=3,
                    connected_every=1, vision_layers=2, vision_width=48, vision_heads=6, decoder_layers=2,
                    word_norm=True, post_norm=True)  # fmt: skip
    names = ("masked_data_modeling", "prefix_language_modeling")
    objectives = {name: config.objectives[name] for name in names}
    objectives[names[1]] = replace(objectives[names[1]], texts=False)
    checkpointing = "full" if out == "tp2" else "none"
    batch = BatchConfig(images=0, texts=0, pairs=6, accumulation=3)
    return replace(config, model=model, objectives=objectives, activation_checkpointing=checkpointing, batch=batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all layouts; those of two replicas are resumed in their middle, too."""
    folder = tmp_path_factory.mktemp("next_words")
    for layout, parallel in LAYOUTS.items():
        without_sequence = replace(parallel, sequence=False)  # which fusion layers refuse
        configs = [with_next_words(folder, layout, parallel=parallel),
                   with_decoder(folder, layout, parallel=without_sequence)]  # fmt: skip
        ranks = {"one": 1, "pp3": 3}.get(layout, 2)
        with Workers(ranks, parallel.tensor, parallel.pipeline) as workers:
            workers.run(train_in_turn, configs + [second_half(c) for c in configs if layout == "dp2"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp3"])
def test_losses_are_those_of_one_process(folder: Path, layout: str) -> None:
    learnt = {"loss_pair_text", "loss_pair_next_word", "loss_text_next_word", "loss_image_class"}
    for record, _ in same_losses(folder / layout, folder / "one", STEPS, {"loss_pair_next_word": 2}):
        assert named(record, "loss") > learnt
        assert named(record, "acc") > {"acc_pair_next_word", "acc_text_next_word"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp3"])
def test_a_decoder_learns_as_in_one_process(folder: Path, layout: str) -> None:
    pairs = same_losses(folder / f"decoder-{layout}", folder / "decoder-one", STEPS, {"loss_pair_next_word": 2})
    for record, _ in pairs:
        assert named(record, "loss") > {"loss_pair_text", "loss_pair_next_word"}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["", "decoder-"])
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp3"])
def test_first_gradients_are_those_of_one_process(folder: Path, layout: str, run: str) -> None:
    """All of them; of the decoder, whose fusion layers hardly see at the start, their norm (see the runs of all of
    mPLUG, from weights of ordinary size)."""
    ours, expected = (metrics(folder / f"{run}{name}")[0]["grad_norm"] for name in (layout, "one"))
    assert ours == pytest.approx(expected, rel=1e-5)
    if not run:
        assert_tensors_close(first_gradients(folder / layout), first_gradients(folder / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["dp2", "decoder-dp2"])
def test_resumed_bit_for_bit(folder: Path, run: str) -> None:
    assert reproducible(folder / f"{run}-resumed") == reproducible(folder / run)[STEPS // 2 :]
    last = Path("checkpoints", f"step_{STEPS:07d}")
    undisturbed, found = read_weights(folder / run / last), read_weights(folder / f"{run}-resumed" / last)
    assert all(torch.equal(value, found[name]) for name, value in undisturbed.items())


@pytest.mark.slow
def test_it_is_reported(folder: Path) -> None:
    done = launch("tools.report", str(folder / "one"))
    assert done.returncode == 0, done.stderr
    assert "pair_next_word" in (folder / "one" / "report.json").read_text()
