"""Optimizers by name: what others' compute, what is refused, and what else knows of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from beit3_dist.checkpoint.positions import interpolate_positions
from beit3_dist.command_line import to_yaml
from beit3_dist.config import ModelConfig, OptimConfig
from beit3_dist.model import BEiT3
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.optimizers import registry
from beit3_dist.optimizers.base import PART, Place
from beit3_dist.optimizers.lion import Lion
from beit3_dist.optimizers.muon import HIDDEN, orthogonalized
from beit3_dist.optimizers.registry import OPTIMIZERS, check_optimizer, described
from beit3_dist.optimizers.whole import owners
from beit3_dist.parallel.memory import state_bytes
from beit3_dist.plugins import load_plugins
from beit3_dist.run.resumption import same_recipe
from beit3_dist.train.optimizer import build_optimizer, parameter_groups
from tests.parallel import training

MODEL = ModelConfig(
    layers=2, width=32, heads=2, ffn_width=48, patch_size=16, image_size=32, vocab_size=150, visual_vocab_size=40,
    max_text_length=20, vl_expert_layers=1, decoder_layers=0,
)  # fmt: skip
NO_OFFLOAD: dict[str, Any] = {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (12, 12)])
def test_muon_in_bf16_is_torchs_bit_for_bit(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    ours, theirs = (nn.ParameterDict({"blocks": nn.Parameter(torch.zeros(shape))}) for _ in range(2))
    ours["blocks"].data.normal_()
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(name="muon", lr=0.02, min_lr=0.0, weight_decay=0.1)
    groups = [{"params": [ours["blocks"]], "weight_decay": 0.1, PART: HIDDEN}]
    muon = OPTIMIZERS["muon"].build(groups, config, False, torch.bfloat16)
    torchs = torch.optim.Muon(theirs.values(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(shape)
        for parameter, optimizer in ((ours["blocks"], muon), (theirs["blocks"], torchs)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours["blocks"], theirs["blocks"])
    values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_takes_the_blocks_matrices_alone() -> None:
    model = BEiT3(MODEL, device="meta")
    groups = parameter_groups(model, 0.05, OPTIMIZERS["muon"])
    names = {p: n for n, p in model.named_parameters()}
    hidden = {names[p] for group in groups if group[PART] == HIDDEN for p in group["params"]}
    assert hidden == {n for n, p in model.named_parameters() if n.startswith("blocks.") and n.endswith("weight") and
                      "norm" not in n}  # fmt: skip
    assert {group["weight_decay"] for group in groups if group[PART] == HIDDEN} == {0.05}
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_describes_what_it_builds(name: str) -> None:
    model = BEiT3(MODEL, seed=0)
    optimizer = build_optimizer(model, False, OptimConfig(name=name))
    assert described(optimizer) is OPTIMIZERS[name]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for n, p in model.named_parameters():
        kept = {key for key, value in optimizer.state[p].items() if value.shape == p.shape and key != "step"}
        assert kept == set(OPTIMIZERS[name].moments(n, tuple(p.shape)))


def test_what_is_refused() -> None:
    offload = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    check_optimizer(OptimConfig(), offload)
    with pytest.raises(ValueError, match=r"^optim.name: there is no optimizer sgd, only adamw, lion, lamb, muon; "):
        check_optimizer(OptimConfig(name="sgd"), NO_OFFLOAD)
    with pytest.raises(ValueError, match=r"^deepspeed_config: offload_optimizer .* optim.name=muon does not step"):
        check_optimizer(OptimConfig(name="muon"), offload)
    with pytest.raises(ValueError, match=r"^optim.weight_decay=0: lamb adapts"):
        check_optimizer(OptimConfig(name="lamb", weight_decay=0.0), NO_OFFLOAD)


def test_a_former_checkpoints_optimizer_is_adamw(tmp_path: Path) -> None:
    config = training.run_config("shallow", zero_stage=1, accumulation=1, data_parallel=1)
    settings = yaml.safe_load(to_yaml(config))
    del settings["optim"]["name"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    same_recipe(config, tmp_path)
    with pytest.raises(ValueError, match=r"another network or optimizer \(optim.name: adamw -> lion\)"):
        same_recipe(replace(config, optim=replace(config.optim, name="lion")), tmp_path)


def test_a_plugin_registers_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "OPTIMIZERS", dict(OPTIMIZERS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    plugin = tmp_path / "my_lion.py"
    plugin.write_text(
        "from beit3_dist.optimizers.lion import Lion\n"
        "from beit3_dist.optimizers.registry import register\n\n\n"
        "@register\n"
        "class MyLion(Lion):\n"
        "    name = 'my_lion'\n"
    )
    load_plugins([str(plugin)])
    check_optimizer(OptimConfig(name="my_lion"), NO_OFFLOAD)
    assert issubclass(registry.chosen(OptimConfig(name="my_lion")), Lion)


def test_the_planner_counts_each_ones_state() -> None:
    config = training.run_config("shallow", zero_stage=2, accumulation=1, data_parallel=2)
    model, largest = BEiT3(config.model, device="meta"), objectives_of(config).largest
    held = {}
    for name in OPTIMIZERS:
        (held[name],) = state_bytes(
            replace(config, optim=replace(config.optim, name=name)), 2, model, largest, averages=1
        )
    adamw = held["adamw"].moments
    assert held["lion"].moments == adamw / 2 and held["lamb"].moments == adamw
    assert adamw / 2 < held["muon"].moments < adamw and held["muon"].products > 0 == held["adamw"].products
    assert held["adamw"].average == held["adamw"].masters


def test_whoever_holds_most_computes_and_equal_shares_are_shared_out() -> None:
    whole = Place((4, 5), None, 0, [(0, 0), (0, 20)], 0)
    shared = [Place((4, 5), None, 0, [(0, 10), (10, 10)], 0)] * 4
    assert owners([whole, *shared]) == [1, 0, 0, 1, 0] or owners([whole, *shared]) == [1, 0, 0, 1, 1]


def test_second_moments_stay_positive_at_another_resolution() -> None:
    table = torch.full((3 + 16, 8), 1e-12)
    table[7] = 1.0  # beside which a bicubic curve dips below 0
    assert interpolate_positions(table, 6).min() < 0
    resampled = interpolate_positions(table, 6, "bilinear")
    assert resampled.min() > 0 and torch.equal(resampled[:3], table[:3])
