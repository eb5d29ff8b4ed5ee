"""Optimizers by name: in every layout what other libraries' compute in one process; they resume bit for bit, in other
layouts, and at another resolution."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from beit3_dist.checkpoint.read import AVERAGE, StoredShards, read_weights
from beit3_dist.config import BatchConfig, CheckpointConfig, ParallelConfig, RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.optimizers.muon import is_hidden
from beit3_dist.optimizers.registry import chosen
from beit3_dist.run.checkpointing import starting_point
from beit3_dist.train.optimizer import decays, parameter_groups
from tests.equality import BOUND, assert_close, assert_tensors_close
from tests.integration.runs import evaluations, metrics, reproducible, run_config, second_half, train_in_turn, validated
from tests.parallel import training
from tests.parallel.test_train_only import TEXTS
from tests.parallel.training import Trace, assemble, engine_run, plain_run
from tests.parallel.workers import KeptWorkers

STEPS = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"dp2-zero{zero}": {"data_parallel": 2, "zero_stage": zero} for zero in range(4)},
    "tp2-zero3": {"tensor": 2, "zero_stage": 3, "data_parallel": 1, "accumulation": 2},
    "pp2-zero1": {"pipeline": 2, "zero_stage": 1, "data_parallel": 1, "accumulation": 2},
    "dp2tp2-zero2": {"tensor": 2, "zero_stage": 2, "data_parallel": 2},
}
OPTIM: dict[str, dict[str, Any]] = {
    "lion": {"lr": 2e-4, "weight_decay": 0.3, "beta2": 0.99},
    "lamb": {"lr": 1e-2},
    "muon": {"lr": 2e-3},
    "adamw": {},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lion": ("lion", {}),
    "lamb": ("lamb", {}),
    "muon": ("muon", {}),
    "frozen": ("muon", {"train_only": ["blocks.1.*", "norm.*", "*_head.*"]}),
    **{f"texts, {name}": (name, {"train_only": TEXTS}) for name in ("lion", "lamb", "muon")},
    "layers": ("adamw", {"layer_decay": 0.5}),
}
"""What is tested: the optimizer, and fields of the run."""
IN_ALL = ("lion", "lamb", "muon")
IN_SOME = {"dp2-zero3": ("frozen", "layers"), "pp2-zero1": tuple(f"texts, {name}" for name in IN_ALL)}


def config_of(case: str, **layout: Any) -> RunConfig:
    name, fields = CASES[case]
    settings = {"accumulation": 1, "steps": STEPS, "clip_norm": 1.0, "layers": 2} | layout
    config = training.run_config("paper", **settings)
    return replace(config, optim=replace(config.optim, name=name, **OPTIM[name]), **fields)


class TimmsLion:
    """timm's Lion, which notes the elements whose direction is the sign of no more than gradients may differ by
    (tests/equality.py): rounding decides there."""

    def __new__(cls, model: BEiT3, config: RunConfig, undecided: dict[str, Tensor]) -> Any:
        from timm.optim.lion import Lion

        names = {p: n for n, p in model.named_parameters() if p.requires_grad}

        class Watched(Lion):
            def step(self, closure: None = None) -> None:
                of_model = torch.stack([p.grad.norm() for p in names]).norm()
                for p in names:
                    mean = self.state[p].get("exp_avg", torch.zeros_like(p))
                    update = mean.lerp(p.grad, 1 - self.defaults["betas"][0]).abs()
                    scale = max(update.norm(), 1e-3 * of_model / len(names) ** 0.5) / p.numel() ** 0.5
                    near = (update <= BOUND * scale) & (update > 0)
                    undecided[names[p]] = undecided.get(names[p], torch.zeros_like(near)) | near
                super().step(closure)

        optim = config.optim
        return Watched(parameter_groups(model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2))


class TorchsMuon:
    """torch's Muon for matrices between hidden states and its AdamW for the rest, as one optimizer."""

    def __init__(self, model: BEiT3, config: RunConfig) -> None:
        optim, named = config.optim, {n: p for n, p in model.named_parameters() if p.requires_grad}
        hidden = {p for n, p in named.items() if is_hidden(n, tuple(p.shape))}
        groups = parameter_groups(model, optim.weight_decay)
        others = [group | {"params": [p for p in group["params"] if p not in hidden]} for group in groups]
        muon: Any = functools.partial(torch.optim.Muon, momentum=optim.momentum, adjust_lr_fn="match_rms_adamw")
        self._both = [
            muon([p for p in named.values() if p in hidden], lr=optim.lr, weight_decay=optim.weight_decay),
            torch.optim.AdamW(others, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps),
        ]
        self.param_groups = [group for one in self._both for group in one.param_groups]

    def step(self) -> None:
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):  # as a run in fp32 has it
            for one in self._both:
                one.step()

    def zero_grad(self) -> None:
        for one in self._both:
            one.zero_grad()


def by_layer(model: BEiT3, config: RunConfig) -> torch.optim.Optimizer:
    """torch's AdamW with a group for each parameter."""
    optim, groups = config.optim, []
    for name, parameter in model.named_parameters():
        block = re.search(r"blocks\.(\d+)", name)
        above = config.model.layers + 1 if "embedding" in name else config.model.layers - int(block[1]) if block else 0
        decay = optim.weight_decay if decays(name, parameter.shape) else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "lr_scale": config.layer_decay**above})
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


@functools.cache
def reference(case: str) -> tuple[Trace, dict[str, Tensor]]:
    """The run by others' optimizers, and where rounding decides."""
    torch.set_num_threads(1)
    config, undecided = config_of(case, data_parallel=2, zero_stage=0), dict[str, Tensor]()
    optim = config.optim

    def make(model: BEiT3) -> Any:
        if optim.name == "lion":
            return TimmsLion(model, config, undecided)
        if optim.name == "muon":
            return TorchsMuon(model, config)
        if optim.name == "adamw":
            return by_layer(model, config)
        from timm.optim.lamb import Lamb

        groups = parameter_groups(model, optim.weight_decay)
        return Lamb(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, max_grad_norm=None)

    return plain_run(config, parts=2, make=make), undecided


@pytest.fixture(scope="module")
def workers() -> Iterator[KeptWorkers]:
    kept = KeptWorkers()
    yield kept
    kept.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_one_process(layout: str, workers: KeptWorkers) -> None:
    for case in (*IN_ALL, *IN_SOME.get(layout, ())):
        config = config_of(case, **LAYOUTS[layout])
        parallel = config.parallel
        world = LAYOUTS[layout]["data_parallel"] * parallel.tensor * parallel.pipeline
        ours = assemble(workers.of(world, parallel.tensor, parallel.pipeline).run(engine_run, config), config)
        plain, undecided = reference(case)
        assert_close(torch.tensor(ours.losses), torch.tensor(plain.losses), f"{case}: losses")
        assert_close(torch.tensor(ours.grad_norms), torch.tensor(plain.grad_norms), f"{case}: gradient norms")
        for name, mask in undecided.items():
            assert mask.float().mean() < 2e-2 or name.endswith("k.shared.bias"), name
            ours.weights[name] = ours.weights[name].where(~mask, plain.weights[name])
        assert_tensors_close(ours.weights, plain.weights)
        matrix = "blocks.1.ffn.language.fc1.weight"
        assert (ours.weights[matrix] - plain.initial[matrix]).norm() > 1e-3 * plain.initial[matrix].norm()


RUNS: dict[str, tuple[int, str]] = {"lion": (2, "fp32"), "lamb": (1, "bf16"), "muon": (3, "fp32")}
"""Optimizer -> ZeRO stage and precision of a run of two replicas."""
OTHER = ParallelConfig(tensor=2, zero_stage=1)
"""Where it goes on then."""


def test_goes_on_bit_for_bit_and_in_another_layout(tmp_path: Path, workers: KeptWorkers) -> None:
    """With a moving average of the weights, whose definition is torch's, and which validations see."""
    whole, resumed, moved, averaged = {}, {}, {}, {}
    for name, (zero_stage, precision) in RUNS.items():
        config = run_config(tmp_path, steps=4, precision=precision, parallel=ParallelConfig(zero_stage=zero_stage))
        optim = replace(config.optim, name=name, **OPTIM[name])
        config = replace(config, out=str(tmp_path / name), ema_decay=0.7, layer_decay=0.9, optim=optim,
                         checkpoint=CheckpointConfig(every=1, keep=0), eval=validated(config, 4))  # fmt: skip
        whole[name], resumed[name] = config, second_half(config)
        moved[name] = replace(resumed[name], out=f"{config.out}-moved", parallel=OTHER, precision="fp32")
        still = replace(optim, lr=0.0, min_lr=0.0, warmup_steps=0)
        averaged[name] = replace(config, out=f"{config.out}-averaged", init_from=config.out, steps=1, optim=still,
                                 ema_decay=0.0, eval=validated(config, 1))  # fmt: skip
    order = [run for name in RUNS for run in (whole[name], resumed[name], averaged[name])]
    workers.of(2, 1, 1).run(train_in_turn, order, timeout_s=400)
    in_fp32 = [name for name, (_, precision) in RUNS.items() if precision == "fp32"]
    workers.of(2, 2, 1).run(train_in_turn, [moved[name] for name in in_fp32])
    for name, config in whole.items():
        assert reproducible(resumed[name].out) == reproducible(config.out)[2:]
        paths = [Path(config.out, f"checkpoints/step_{step:07d}") for step in range(1, 5)]
        stored, again = StoredShards(paths[-1]), StoredShards(Path(resumed[name].out, "checkpoints/step_0000004"))
        shapes = {parameter: stored.shape(parameter) for parameter in stored.names}
        average = get_ema_avg_fn(0.7)
        weights = [read_weights(path) for path in paths]
        for parameter, shape in shapes.items():
            moments = [f"/{moment}" for moment in chosen(config.optim).moments(parameter, shape)]
            assert stored.suffixes(parameter) == {"", AVERAGE, *moments}
            for suffix in stored.suffixes(parameter):
                assert torch.equal(stored.whole(parameter, suffix), again.whole(parameter, suffix)), parameter + suffix
            expected = functools.reduce(lambda mean, one: average(mean, one, 1), (w[parameter] for w in weights))
            torch.testing.assert_close(stored.whole(parameter, AVERAGE), expected, rtol=1e-5, atol=1e-7)
        (score,), (of_average,) = evaluations(config.out), evaluations(averaged[name].out)
        assert score["loss"] == of_average["loss"] != metrics(config.out)[-1]["loss"]
    for name in in_fp32:
        ours, expected = metrics(moved[name].out), metrics(whole[name].out)[2:]
        for field in ("loss", "grad_norm"):
            values = (torch.tensor([record[field] for record in records]) for records in (ours, expected))
            assert_close(*values, f"{field} of {name}")


def test_goes_on_at_another_resolution(tmp_path: Path, workers: KeptWorkers) -> None:
    """From 4 x 4 to 6 x 6 patches: what is not of positions is kept bit for bit, and the run resumes bit for bit."""
    config = run_config(tmp_path, batch=BatchConfig(images=4, texts=4, pairs=4, accumulation=1), ema_decay=0.7)
    first = replace(config, steps=2, out=str(tmp_path / "small"), optim=replace(config.optim, warmup_steps=2))
    model = replace(config.model, image_size=48)
    still = replace(first.optim, lr=0.0, min_lr=0.0, warmup_steps=0)
    settings = CheckpointConfig(every=1, resume=f"{first.out}/checkpoints/step_0000002", other_resolution=True)
    second = replace(first, steps=4, out=str(tmp_path / "large"), model=model, checkpoint=settings)
    third = replace(second_half(replace(second, steps=6)), steps=4)
    unmoved = replace(second, steps=3, out=str(tmp_path / "unmoved"), optim=still)
    workers.of(2, 1, 1).run(train_in_turn, [first, second, third, unmoved])
    assert reproducible(third.out) == reproducible(second.out)[1:]
    before, after = (
        read_weights(Path(run.out, f"checkpoints/step_000000{n}")) for run, n in ((first, 2), (unmoved, 3))
    )
    table = "vision_embedding.positions"
    assert {name for name in before if not torch.equal(before[name], after[name])} == {table}
    assert after[table].shape == (3 + 36, config.model.width) and torch.equal(before[table][:3], after[table][:3])
    log = Path(second.out, "logs/rank00000.log").read_text()
    assert "16 vision positions are resampled to 36" in log
    with pytest.raises(ValueError, match=r"model.image_size=32, this run has 48: .*other_resolution true"):
        starting_point(replace(second, out=str(tmp_path / "new"), checkpoint=replace(settings, other_resolution=False)))
