"""Matching beside contrast and masking: one process's losses in any layout and accumulation; its second pass."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from beit3_dist.checkpoint.read import read_weights
from beit3_dist.config import RunConfig
from beit3_dist.data.batch import Request
from beit3_dist.objectives.contrast import Vectors
from beit3_dist.objectives.matching import Matching, MatchingConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.parallel.mesh import Groups, Mesh
from beit3_dist.parallel.replicas import Replicas
from beit3_dist.run.preflight import prepare_run
from tests.equality import assert_tensors_close
from tests.integration.runs import metrics, named, reproducible, same_losses, second_half, train_in_turn
from tests.parallel.test_contrastive_runs import LAST, STEPS, config_of, first_gradients
from tests.parallel.workers import Workers, run_workers

ONE, TWO_STAGES = (Mesh(0, world, 0, world, torch.device("cpu"), pipeline=world) for world in (1, 2))
RUNS = ("one", "accumulated", "dp2", "dp2-accumulated", "tp2")
HEAD = "objective_heads.matching"


def with_matching(folder: Path, name: str, **section: Any) -> RunConfig:
    """Matching comes first in the recipe, and second in every step."""
    config = config_of(folder, "softmax", name)
    matching = MatchingConfig(weight=0.5, **section)
    out = folder / f"{name}{section.get('negatives', '')}"
    return replace(config, out=str(out), objectives={"matching": matching} | config.objectives)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs; those of one process and of two replicas are resumed in their middle, too."""
    folder = tmp_path_factory.mktemp("matching")
    one, accumulated, dp2, both, tp2 = (with_matching(folder, name) for name in RUNS)
    near = with_matching(folder, "dp2", negatives="rank", head="linear")
    micro, micro_dp2 = (with_matching(folder, name, head="two_layers") for name in ("micro", "micro-dp2"))
    for layout, configs in {
        (1, 1): [one, second_half(one), accumulated, micro],
        (2, 1): [dp2, both, second_half(both), near, micro_dp2],
        (2, 2): [tp2],
    }.items():
        with Workers(*layout) as workers:
            workers.run(train_in_turn, configs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "same"), [*((name, "one") for name in RUNS[1:]), ("micro-dp2", "micro")])
def test_losses_and_gradients_are_those_of_one_process(folder: Path, name: str, same: str) -> None:
    assert_tensors_close(first_gradients(folder / name), first_gradients(folder / same))
    weights = {"loss_contrastive": 0.5, "loss_matching": 0.5, "loss_matches": 0.0}
    for record, expected in same_losses(folder / name, folder / same, STEPS, weights):
        assert named(record, "loss") > {"loss_matching", "loss_contrastive", "loss_pair_image"}
        assert record["acc_matching"] == pytest.approx(expected["acc_matching"], abs=1 / 24)
        assert record["acc_matches"] == pytest.approx(expected["acc_matches"], abs=1 / 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "dp2-accumulated"])
def test_resumed_bit_for_bit(folder: Path, name: str) -> None:
    assert reproducible(folder / f"{name}-resumed") == reproducible(folder / name)[STEPS // 2 :]
    undisturbed, found = (read_weights(folder / out / LAST) for out in (name, f"{name}-resumed"))
    assert {f"{HEAD}.{part}" for part in ("pooler.weight", "pooler.bias", "score.weight", "score.bias")} < found.keys()
    assert all(torch.equal(value, found[name]) for name, value in undisturbed.items())


@pytest.mark.slow
def test_negatives_of_the_own_rank_and_the_plain_head(folder: Path) -> None:
    weights = read_weights(folder / "dp2rank" / LAST)
    assert {name for name in weights if name.startswith(HEAD)} == {f"{HEAD}.score.weight", f"{HEAD}.score.bias"}
    assert all(0 < record["loss_matching"] < 2 for record in metrics(folder / "dp2rank"))


def test_pairs_that_match_are_told_apart_without_weight() -> None:
    """Whoever says no to all has two of three cases right, and none of these."""
    objective = object.__new__(Matching)
    logits = torch.tensor([[1.0, 0.0]] * 6, requires_grad=True)
    model = SimpleNamespace(objective_heads={"matching": lambda hidden: hidden}, text_norm=lambda hidden: hidden)
    losses, hits = objective.sums(cast(Any, model), logits, torch.ones(6, dtype=torch.bool))
    assert hits.tolist() == [4, 0] and losses[1].item() == pytest.approx(2 * math.log(1 + math.e))
    assert not torch.autograd.grad(losses[1], logits)[0].any()


def fetched(groups: Groups) -> list[bool]:
    """Whether rows come as they were asked for, from wherever they are."""
    replicas, held = Replicas(groups.data), 5
    everything = torch.arange(replicas.size * held * 3, dtype=torch.uint8).view(-1, 3)

    def give(rows: torch.Tensor) -> list[torch.Tensor]:
        mine = everything[replicas.rank * held :][:held][rows]
        return [mine, mine[:, 0].long() * 1000]

    draw = torch.Generator().manual_seed(replicas.rank)
    alike = []
    for wanted in (torch.randint(replicas.size * held, (7,), generator=draw), torch.zeros(4, dtype=torch.int64)):
        rows, numbers = replicas.fetch(wanted, held, give)
        alike.append(
            torch.equal(rows, everything[wanted]) and torch.equal(numbers, everything[wanted, 0].long() * 1000)
        )
    return alike


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_are_fetched_from_their_owners(world: int) -> None:
    assert run_workers(world, fetched) == [[True, True]] * world


def test_the_second_pass_shows_no_true_match(tmp_path: Path) -> None:
    """The pairs themselves, their captions with other images and their images with other captions, words and all."""
    config = with_matching(tmp_path, "one")
    ready = prepare_run(config, ONE)
    objectives = ready.objectives.connected(Replicas())
    contrast, matching = (next(o for o in objectives if o.name == name) for name in ("contrastive", "matching"))
    assert isinstance(matching, Matching)
    batch = ready.train[Request((0, 0, 0), 0)]
    n, pairs = 8, batch.streams["pairs"]
    draw = torch.Generator().manual_seed(0)
    unit = [torch.nn.functional.normalize(torch.randn(n, 24, generator=draw), dim=1) for _ in range(2)]
    contrast.compared = Vectors(*unit, torch.tensor([14.0]))
    second = matching.second([batch], 0, 3, torch.device("cpu"))
    shown = second.inputs.images.view(3, n, -1)
    assert torch.equal(shown[0], shown[2]) and not (shown[0] == shown[1]).all(1).any()
    texts = [text[:length].tolist() for text, length in zip(pairs.text, pairs.lengths, strict=True)]
    words = [some.tolist() for some in second.inputs.words.split(second.captions.tolist())]
    assert words[: 2 * n] == texts * 2
    assert all(drawn in texts and drawn != own for drawn, own in zip(words[2 * n :], texts, strict=True))
    assert second.targets.all() and len(set(second.ids.tolist())) == 3 * n
    again = matching.second([batch], 0, 3, torch.device("cpu"))
    assert torch.equal(again.inputs.words, second.inputs.words)


def test_negatives_that_are_drawn_alike_need_no_contrast(tmp_path: Path) -> None:
    """Other ones in every step and micro-batch, and never an own image or caption."""
    config = with_matching(tmp_path, "accumulated", negatives="random")
    sections = {name: section for name, section in config.objectives.items() if name != "contrastive"}
    ready = prepare_run(replace(config, objectives=sections), ONE)
    matching = next(o for o in ready.objectives.connected(Replicas()) if o.name == "matching")
    batches = [ready.train[Request((0, 0, 0), number)] for number in range(2)]
    shown = [
        matching.second(batches, number, step, torch.device("cpu")).inputs.images.view(3, 2, -1)
        for number, step in ((0, 3), (0, 4), (1, 3))
    ]
    for images, number in zip(shown, (0, 0, 1), strict=True):
        own = torch.equal(images[0], images[2]) and not (images[0] == images[1]).all(1).any()
        assert own and len(batches[number].streams["pairs"]) == 2
    assert not torch.equal(shown[0][0], shown[2][0])


def test_with_fusion_layers_the_first_words_tell(tmp_path: Path) -> None:
    """CLS rests there and knows no words."""
    config = with_matching(tmp_path, "one", negatives="random")
    model = replace(config.model, layers=3, attention="per_modality", vl_expert_layers=0, fusion_layers=1)
    sections = {name: section for name, section in config.objectives.items() if name != "contrastive"}
    ready = prepare_run(replace(config, objectives=sections, model=model), ONE)
    matching = next(o for o in ready.objectives.connected(Replicas()) if o.name == "matching")
    second = matching.second([ready.train[Request((0, 0, 0), 0)]], 0, 3, torch.device("cpu"))
    _, patches, words, _ = second.inputs.layout.segments
    assert second.selection.counts == (0, 0, 24, 0) and words == len(second.inputs.words)
    assert (second.inputs.words[second.selection.rows - patches] == 0).all()  # <s>


def test_what_it_lacks_is_named(tmp_path: Path) -> None:
    config = with_matching(tmp_path, "one")
    with pytest.raises(ValueError, match="objectives.matching draws .* give the section objectives.contrastive, too"):
        objectives_of(replace(config, objectives={"matching": MatchingConfig()}))
    piped = with_matching(tmp_path, "micro-pp2")
    with pytest.raises(ValueError, match="parallel.pipeline=2: the objective matching takes a second pass"):
        prepare_run(piped, TWO_STAGES)
