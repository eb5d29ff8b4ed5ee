"""What a run starts from: the same values as by reading all of it, and no more read than is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit3_dist.checkpoint.fitting import POSITIONS, shapes_of
from beit3_dist.checkpoint.formats import read_initial_weights
from beit3_dist.checkpoint.initial import InitialWeights, UnreadableWeights
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.tensor_index import chunk_digests
from beit3_dist.config import ModelConfig
from beit3_dist.looking import Looks, together
from beit3_dist.model import BEiT3
from tests.scale.counting import counting
from tests.unit.damages import flip
from tests.unit.small_checkpoints import STATE, open_store
from tests.unit.small_checkpoints import one_process as one_process
from tests.unit.test_looking import Memory

pytestmark = pytest.mark.usefixtures("one_process")

TINY = ModelConfig(
    layers=1, width=8, heads=2, ffn_width=12, patch_size=4, image_size=16, vocab_size=30, visual_vocab_size=10,
    max_text_length=6, vl_expert_layers=1,
)  # fmt: skip
PIECE = 64
"""Bytes that have a digest each."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with an index of pieces as small as its parameters."""
    monkeypatch.setattr("beit3_dist.checkpoint.snapshot.chunk_digests", lambda parts: chunk_digests(parts, PIECE))
    monkeypatch.setattr("beit3_dist.checkpoint.tensor_index.CHUNK", PIECE)
    state = BEiT3(TINY).state_dict()
    moments = {"/exp_avg": 3.25, "/exp_avg_sq": 5.25}

    def shard(name: str, value: Tensor) -> Shard:
        constant = {suffix: torch.full((value.numel(),), number) for suffix, number in moments.items()}
        return Shard(name, value.shape, 0, {"": value.flatten()} | constant)

    to = open_store(tmp_path / "run/checkpoints", start=6)
    shards = [shard(name, value) for name, value in state.items()]
    to.save(shards, replace(STATE, step=7), TINY, "out: x\n", {"torch": "1"})
    to.wait()
    return tmp_path / "run"


def shard_file(run: Path) -> Path:
    return run / "checkpoints" / "step_0000007" / "shard_00000.safetensors"


@pytest.mark.parametrize("change", [{}, {"image_size": 24}, {"vl_expert_layers": 0}], ids=str)
def test_values_are_those_of_reading_all(change: dict[str, int], run: Path) -> None:
    """Interpolated where the images are of another size."""
    config = replace(TINY, **change)
    if change == {"vl_expert_layers": 0}:
        for read in (InitialWeights, read_initial_weights):
            with pytest.raises(ValueError, match=r"^init_from: .*is no weight of a model with"):
                read(str(run), config, shapes_of(config))
        return
    expected = read_initial_weights(str(run), config)
    found = InitialWeights(str(run), config, shapes_of(config))
    assert expected[POSITIONS].shape == (config.patches + 3, 8) or change == {}
    for name, value in expected.items():
        assert name in found and found[name].dtype == torch.float32 and torch.equal(found[name], value), name
    assert "another" not in found


def test_only_the_one_that_looks_opens_anything(run: Path) -> None:
    store = Memory()
    for is_first in (True, False):
        looks = Looks(lambda: store, "run", is_first), Looks(lambda: store, "node", is_first)
        with counting(run) as count:
            with together(*looks):
                found = InitialWeights(str(run), TINY, shapes_of(TINY))
            costs = count.mark()
            assert (costs.opened > 0) == (costs.looked > 0) == is_first
            assert found[POSITIONS].shape == shapes_of(TINY)[POSITIONS]


def test_a_damage_is_told_where_it_is_read(run: Path) -> None:
    """Of a moment nobody is told: nobody reads it."""
    file = shard_file(run)
    content = file.read_bytes()
    head = BEiT3(TINY).state_dict()["image_head.weight"]
    place = content.index(torch.full((head.numel(),), 5.25).numpy().tobytes(), content.index(b'"image_head.weight"'))
    flip(file, place + 2 * PIECE)
    names = shapes_of(TINY)
    found = InitialWeights(str(run), TINY, names)
    assert all(torch.isfinite(found[name]).all() for name in names)
    found = InitialWeights(str(run), TINY, names)
    at = content.index(found["image_head.weight"].numpy().tobytes())
    flip(file, at + 1)
    fresh = InitialWeights(str(run), TINY, names)
    with pytest.raises(UnreadableWeights, match=r"^init_from: .*shard_00000.safetensors: the SHA-256 is not the one"):
        fresh["image_head.weight"]


def test_of_several_sources_the_first_that_has_it_gives_a_value(run: Path, tmp_path: Path) -> None:
    expected = read_initial_weights(str(run), TINY)
    torch.save({"model": expected}, tmp_path / "unreadable.pth")
    with pytest.raises(ValueError, match="^init_from"):
        InitialWeights([str(run), str(tmp_path / "unreadable.pth")], TINY, shapes_of(TINY))
    twice = InitialWeights([str(run), str(run)], TINY, shapes_of(TINY))
    assert all(torch.equal(twice[name], value) for name, value in expected.items())
