"""Momentum distillation: queues and averages are the same in any layout, and go on bitwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3_dist.checkpoint.model_folder import save_model_folder
from beit3_dist.checkpoint.neutral import write_neutral
from beit3_dist.checkpoint.read import OBJECTIVE_STATE, TEACHER, StoredShards, read_weights
from beit3_dist.config import RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.objectives.contrastive import ContrastiveConfig
from beit3_dist.objectives.matching import MatchingConfig
from beit3_dist.objectives.momentum_distillation import NAME, MomentumDistillationConfig
from beit3_dist.objectives.prefix_language_modeling import PrefixLanguageModelingConfig
from beit3_dist.objectives.registry import objectives_of
from tests.equality import assert_tensors_close
from tests.integration.runs import metrics, named, reproducible, same_losses, second_half, train_in_turn
from tests.parallel.test_contrastive_runs import FIRST, LAST, STEPS, config_of, first_gradients
from tests.parallel.workers import Workers

RUNS = ("one", "accumulated", "dp2", "dp2-accumulated", "tp2")
QUEUE = f"{OBJECTIVE_STATE}contrastive.queue"
SIZE = 20
"""Of the queue: two and a half steps' pairs."""


def with_momentum(folder: Path, name: str) -> RunConfig:
    """The average is far enough from the weights, and alpha grows over the first steps."""
    config = config_of(folder, "softmax", name)
    momentum = MomentumDistillationConfig(decay=0.5, alpha=0.6, ramp_steps=2, queue=SIZE)
    return replace(config, out=str(folder / name), objectives=config.objectives | {NAME: momentum})


def albef(folder: Path, name: str) -> RunConfig:
    """All of ALBEF's objectives."""
    config = with_momentum(folder, name)
    matching = {"matching": MatchingConfig(head="linear", weight=0.5)}
    return replace(config, out=str(folder / f"albef-{name}"), objectives=config.objectives | matching)


def mplug(folder: Path, name: str) -> RunConfig:
    """All of mPLUG's objectives, layers and norms, from weights of ordinary size: with initial ones all images are
    alike, and the gradient of their projection, 1e-4 of the model's, strays from itself by its noise."""
    config = albef(folder, name)
    model = replace(config.model, layers=4, attention="per_modality", vl_expert_layers=0, fusion_layers=3,
                    connected_every=1, decoder_layers=1, vision_layers=1, vision_width=48, vision_heads=4,
                    word_norm=True, post_norm=True)  # fmt: skip
    objectives = config.objectives | {"prefix_language_modeling": PrefixLanguageModelingConfig()}
    batch = replace(config.batch, images=0, texts=0)
    start = folder / "mplug-start"
    if not start.exists():
        draw = torch.Generator().manual_seed(0)
        values = {n: p.detach() for n, p in BEiT3(model).named_parameters()}
        spread = {n: value + 0.1 * torch.randn(value.shape, generator=draw) for n, value in values.items()}
        save_model_folder(start, spread, model)
    changes = {"out": str(folder / f"mplug-{name}"), "init_from": str(start)}
    return replace(config, model=model, objectives=objectives, batch=batch, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs; those of one process and of two replicas are resumed in their middle, too, the latter by one."""
    folder = tmp_path_factory.mktemp("momentum")
    one, accumulated, dp2, both, tp2 = (with_momentum(folder, name) for name in RUNS)
    for layout, configs in {
        (2, 1): [
            dp2,
            both,
            second_half(both),
            albef(folder, "dp2"),
            mplug(folder, "dp2"),
            second_half(mplug(folder, "dp2")),
        ],
        (2, 2): [tp2, mplug(folder, "tp2")],
        (1, 1): [
            one,
            second_half(one),
            accumulated,
            replace(second_half(dp2), parallel=one.parallel),
            albef(folder, "one"),
            mplug(folder, "one"),
        ],
    }.items():
        with Workers(*layout) as workers:
            workers.run(train_in_turn, configs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS[1:])
def test_losses_gradients_and_queues_are_those_of_one_process(folder: Path, name: str) -> None:
    assert_tensors_close(first_gradients(folder / name), first_gradients(folder / "one"))
    for record, _ in same_losses(folder / name, folder / "one", STEPS, {"loss_contrastive": 0.5}):
        assert named(record, "loss") > {"loss_contrastive", "loss_text", "loss_pair_text"}
    for step in (FIRST, LAST):
        ours, theirs = (StoredShards(folder / run / step).whole(QUEUE, "") for run in (name, "one"))
        filled = ours[:, -1] == 1
        assert filled.sum() == (8 if step is FIRST else SIZE) and torch.equal(filled, theirs[:, -1] == 1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert torch.equal(ours[:, -9:], theirs[:, -9:])  # hashes, exactly


@pytest.mark.slow
def test_matching_beside_it_draws_alike(folder: Path) -> None:
    for name in ("dp2", "one"):
        assert all(0 < record["loss_matching"] < 2 for record in metrics(folder / f"albef-{name}"))
    assert_tensors_close(first_gradients(folder / "albef-dp2"), first_gradients(folder / "albef-one"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp2", "tp2"])
def test_all_of_mplug_is_one_processes(folder: Path, name: str) -> None:
    assert_tensors_close(first_gradients(folder / f"mplug-{name}"), first_gradients(folder / "mplug-one"))
    weights = {"loss_contrastive": 0.5, "loss_matching": 0.5, "loss_matches": 0.0}
    for record, _ in same_losses(folder / f"mplug-{name}", folder / "mplug-one", STEPS, weights):
        assert named(record, "loss") > {"loss_contrastive", "loss_matching", "loss_pair_text", "loss_pair_next_word"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "dp2-accumulated", "mplug-dp2"])
def test_resumed_bit_for_bit(folder: Path, name: str) -> None:
    assert reproducible(folder / f"{name}-resumed") == reproducible(folder / name)[STEPS // 2 :]
    undisturbed, found = (StoredShards(folder / run / LAST) for run in (name, f"{name}-resumed"))
    assert QUEUE in found.names and found.suffixes("text_head.weight") >= {TEACHER, "/exp_avg"}
    for stored in found.names:
        for suffix in found.suffixes(stored):
            assert torch.equal(found.whole(stored, suffix), undisturbed.whole(stored, suffix)), stored + suffix


@pytest.mark.slow
def test_another_layout_goes_on_with_queues_and_averages(folder: Path, tmp_path: Path) -> None:
    """Two replicas' checkpoint in one process; the neutral form keeps all; others see the weights alone."""
    for record, expected in zip(metrics(folder / "dp2-resumed"), metrics(folder / "one")[STEPS // 2 :], strict=True):
        losses = named(expected, "loss")
        assert {n: record[n] for n in losses} == pytest.approx({n: expected[n] for n in losses}, rel=1e-5)
    write_neutral(folder / "dp2" / LAST, tmp_path / "neutral")
    neutral, stored = StoredShards(tmp_path / "neutral"), StoredShards(folder / "dp2" / LAST)
    assert torch.equal(neutral.whole(QUEUE, ""), stored.whole(QUEUE, ""))
    weights = read_weights(folder / "dp2" / LAST, averaged=True)
    assert not any(name.startswith(OBJECTIVE_STATE) for name in weights)
    assert torch.equal(weights["text_head.weight"], stored.whole("text_head.weight", ""))


@pytest.mark.slow
def test_the_average_is_the_closed_form_of_the_weights(folder: Path) -> None:
    """From the second step on, which is the first that a checkpoint lies before."""
    steps = [StoredShards(folder / "one" / "checkpoints" / f"step_{n:07d}") for n in range(1, STEPS + 1)]
    for name in ("text_head.weight", "blocks.0.attention.q.shared.weight"):
        average = steps[0].whole(name, TEACHER)
        for stored in steps[1:]:
            average = 0.5 * average + 0.5 * stored.whole(name, "")
        torch.testing.assert_close(steps[-1].whole(name, TEACHER), average)
        assert not torch.equal(average, steps[-1].whole(name, ""))


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    config = with_momentum(tmp_path, "one")
    piped = with_momentum(tmp_path, "micro-pp2")
    step = piped.objectives | {"contrastive": ContrastiveConfig()}
    with pytest.raises(ValueError, match="momentum_distillation: .* which parallel.pipeline=2 cannot"):
        objectives_of(replace(piped, objectives=step))
    for wrong in (ContrastiveConfig(form="sigmoid"), ContrastiveConfig(negatives="micro_batch")):
        with pytest.raises(ValueError, match="momentum_distillation needs .*form=softmax and .*negatives=step"):
            objectives_of(replace(config, objectives=config.objectives | {"contrastive": wrong}))
    with pytest.raises(ValueError, match="momentum_distillation teaches .* and the run has none of them"):
        objectives_of(replace(config, objectives={NAME: MomentumDistillationConfig()}))
    with pytest.raises(ValueError, match="objectives.momentum_distillation.decay=1.0 is not in"):
        MomentumDistillationConfig(decay=1.0)
