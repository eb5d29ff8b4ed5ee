"""The planner's choice of what a recipe leaves open."""

from __future__ import annotations

from dataclasses import replace

import pytest

from beit3_dist.command_line import configured, to_yaml
from beit3_dist.config import ParallelConfig, RunConfig, is_auto, require_laid_out
from beit3_dist.looking import ALONE, Looks, together
from beit3_dist.objectives import SECTIONS
from beit3_dist.plan import auto
from tests.unit.test_looking import Memory
from tests.unit.test_plan import run_config

STREAMS = [f"--data.{name}=unused" for name in ("images", "texts", "pairs")]
OPTIONS = ["--out=unused", "--text_tokenizer=unused", *STREAMS]


def parsed(*options: str) -> RunConfig:
    return configured(RunConfig, "test", "", [*OPTIONS, *options], SECTIONS)


def test_auto_is_a_word_of_these_fields_alone() -> None:
    config = parsed("--parallel.tensor", "auto", "--batch.accumulation", "auto", "--parallel.pipeline=2")
    assert is_auto(config.parallel.tensor) and is_auto(config.batch.accumulation) and config.parallel.pipeline == 2
    for option, words in (("--parallel.tensor=some", "some"), ("--parallel.zero_stage=4", "zero_stage=4"),
                          ("--parallel.tensor=0", "must be positive"), ("--steps=auto", "auto")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            parsed(option)


def test_few_devices_get_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As memory shrinks: more micro-batches, then more ranks to a replica, then a refusal that says the least."""
    config = run_config(precision="fp32")
    batch = replace(config.batch, accumulation=auto_of("batch.accumulation"))
    parallel = replace(config.parallel, tensor=auto_of("parallel.tensor"), zero_stage=1)
    config = replace(config, batch=batch, parallel=parallel)
    chosen = []
    for megabytes in (1000.0, 2.5, 1.6):
        device = replace(auto.CPU, memory_gb=megabytes / 1e3, node=8)
        monkeypatch.setattr(auto, "this_device", lambda world, device=device: device)
        run = auto.with_layout(config, 4)
        assert "accumulation: auto" not in to_yaml(run) and run.micro_batch(4 // run.parallel.tensor)
        chosen.append((run.parallel.tensor, run.batch.accumulation))
    assert chosen[0] == (1, 1) and chosen == sorted(chosen) and chosen[1][1] > 1 and chosen[2][0] > 1
    monkeypatch.setattr(auto, "this_device", lambda world: replace(auto.CPU, memory_gb=1e-4, node=8))
    with pytest.raises(ValueError, match="parallel.tensor=auto: no layout of 4 processes fits .* the least takes"):
        auto.with_layout(config, 4)


def auto_of(field: str) -> int:
    return auto._fields(parsed(f"--{field}=auto"))[field]


def test_other_programs_want_numbers() -> None:
    with pytest.raises(ValueError, match="parallel.tensor=auto is for pretrain.py"):
        require_laid_out(parsed("--parallel.tensor=auto"))
    require_laid_out(parsed())


def test_what_the_planner_does_not_count_wants_numbers() -> None:
    parallel = ParallelConfig(tensor=auto_of("parallel.tensor"), pipeline=2, chunks=2)
    with pytest.raises(ValueError, match="parallel.chunks=2: the planner knows no interleaved .*parallel.tensor=auto"):
        auto.with_layout(run_config(parallel=parallel), 4)
    own = {"learns": "masked_logits", "teacher.kind": "beit3", "teacher.weights": "unused"}
    distilled = [
        "--objectives.masked_data_modeling.pair_image_weight=1",
        *(f"--objectives.distillation.pairs.{name}={value}" for name, value in own.items()),
    ]
    with pytest.raises(ValueError, match="objectives.distillation: the planner does not count teachers, but parallel"):
        auto.with_layout(parsed("--parallel.tensor=auto", "--image_codes=unused", "--kernels=torch", *distilled), 2)
    for option in ("--parallel.sequence=auto", "--parallel.chunks=auto"):
        with pytest.raises(ValueError, match=option[2:-5]):
            parsed(option)


def test_one_process_finds_it_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others take what it says, and count nothing."""
    config = run_config(precision="fp32", parallel=ParallelConfig(zero_stage=auto_of("parallel.zero_stage")))
    store = Memory()
    first, other = (Looks(lambda: store, "run", looks) for looks in (True, False))
    with together(first, ALONE):
        found = auto.with_layout(config, 2)
    monkeypatch.setattr(auto, "Planner", None)
    with together(other, ALONE):
        assert auto.with_layout(config, 2) == found and not is_auto(found.parallel.zero_stage)


def test_numbers_stay_as_they_are() -> None:
    config = run_config()
    assert auto.with_layout(config, 3) is config
