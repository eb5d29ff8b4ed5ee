"""The run config decides; DeepSpeed's file completes it and may not contradict it."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from beit3_dist.config import BatchConfig, DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.parallel.deepspeed_config import deepspeed_config, read_deepspeed_file
from beit3_dist.recipe import read_sections

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def run_config(file: object = "", *, zero_stage: int = 2, precision: str = "bf16") -> RunConfig:
    """48 + 24 + 24 samples a step in 3 micro-batches; on 2 ranks a micro-batch has 8 + 4 + 4 = 16."""
    return RunConfig(
        out="out",
        text_tokenizer="text.spm",
        image_tokenizer="vqkd",
        data=DataConfig(images="i", texts="t", pairs="p"),
        precision=precision,
        batch=BatchConfig(images=48, texts=24, pairs=24, accumulation=3),
        parallel=ParallelConfig(zero_stage=zero_stage),
        optim=OptimConfig(clip_norm=2.5),
        deepspeed_config=str(file),
    )


@pytest.fixture
def written(tmp_path: Path):
    def write(settings: Any) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return path

    return write


def test_without_a_file_everything_comes_from_the_run() -> None:
    settings = deepspeed_config(run_config(), 2)
    assert settings["train_micro_batch_size_per_gpu"] == 16
    assert settings["gradient_clipping"] == 2.5
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": False}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    # The engine accumulates by itself: DeepSpeed sees one micro-batch per step.
    assert settings["gradient_accumulation_steps"] == 1 and settings["train_batch_size"] == 32


def test_fp32() -> None:
    settings = deepspeed_config(run_config(precision="fp32", zero_stage=0), 2)
    assert settings["bf16"] == {"enabled": False} and settings["data_types"] == {"grad_accum_dtype": None}


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "auto"},
    "zero_optimization": {"stage": "auto"},
}
EQUAL = {
    "train_batch_size": 96,
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 2.5,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 2},
}


@pytest.mark.parametrize("content", [{}, AUTO, EQUAL], ids=["empty", "auto", "equal"])
def test_absent_auto_and_equal_values_mean_the_same(content: dict, written) -> None:
    assert deepspeed_config(run_config(written(content)), 2) == deepspeed_config(run_config(), 2)


def test_other_settings_are_passed_on(written) -> None:
    file = {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    settings = deepspeed_config(run_config(written(file)), 2)
    assert settings["zero_optimization"] == {"overlap_comm": False, "reduce_bucket_size": 7, "stage": 2}
    assert settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_reductions_overlap_where_there_are_replicas(precision: str, written) -> None:
    def overlap(replicas: int, stage: int, file: str = "") -> Any:
        config = replace(run_config(zero_stage=stage, precision=precision), deepspeed_config=file)
        return deepspeed_config(config, replicas)["zero_optimization"].get("overlap_comm", "as DeepSpeed has it")

    stages = range(precision == "bf16", 4)
    assert [overlap(2, stage) for stage in stages] == [*[True] * (len(stages) - 1), "as DeepSpeed has it"]
    assert {overlap(1, stage) for stage in stages} == {"as DeepSpeed has it"}
    file = str(written({"zero_optimization": {"overlap_comm": False}}))
    assert {overlap(2, stage, file) for stage in stages} == {False}


def test_gradients_that_are_added_up_stay_in_memory(written) -> None:
    file = written({"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}})
    config = replace(run_config(zero_stage=3), deepspeed_config=str(file))
    deepspeed_config(config, 2)
    with pytest.raises(ValueError, match='does not go with parallel.sequence: use "device": "cpu"'):
        deepspeed_config(replace(config, parallel=ParallelConfig(zero_stage=3, tensor=2, sequence=True)), 2)


@pytest.mark.parametrize(
    ("content", "theirs", "ours"),
    [
        ({"train_batch_size": 48}, "train_batch_size=48", "batch of the run config means 96"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu=8", "means 16"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1", "batch.accumulation"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0", "optim.clip_norm"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3", "parallel.zero_stage"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=false", "precision"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype="bf16"', "precision"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_contradiction_names_both_fields(content: dict, theirs: str, ours: str, written) -> None:
    file = written(content)
    with pytest.raises(ValueError) as refusal:
        deepspeed_config(run_config(file), 2)
    line = str(refusal.value)
    assert "\n" not in line and str(file) in line and theirs in line and ours in line


@pytest.mark.parametrize("section", ["optimizer", "scheduler", "fp16", "amp", "activation_checkpointing"])
def test_sections_that_are_ours(section: str, written) -> None:
    with pytest.raises(ValueError, match=f"section '{section}'; .*(run config|precision)"):
        deepspeed_config(run_config(written({section: {}})), 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"wandb": {"enabled": True}}, r"section 'wandb'; .*metrics\.jsonl"),
        ({"tensorboard": {"enabled": True}}, r"section 'tensorboard'; .*metrics\.jsonl"),
        ({"checkpoint": {"tag_validation": "Fail"}}, "section 'checkpoint'; use checkpoint of the run config"),
        ({"gradient_cliping": 1.0}, "section 'gradient_cliping', which means nothing in a run: .*gradient_clipping"),
        ({"elasticity": {}}, "section 'elasticity', which means nothing in a run"),
        ({"curriculum_learning": {}}, "section 'curriculum_learning', which means nothing"),
        ({"zero_optimization": {"reduce_bucket": 5}}, "DeepSpeed refuses it: reduce_bucket: Extra inputs"),
        ({"zero_optimization": {"reduce_bucket_size": "much"}}, "DeepSpeed refuses it: reduce_bucket_size: .*integer"),
        ({"bf16": {"enabled": True, "loss_scale": 0}}, "DeepSpeed refuses it: loss_scale"),
        ({"communication_data_type": "fp23"}, "DeepSpeed refuses it: .*communication_data_type.*fp23"),
        ({"flops_profiler": True}, "DeepSpeed refuses it"),
        ({"zero_optimization": [3]}, r"'zero_optimization' must be an object, not \[3\]"),
        ({"data_types": "fp32"}, "'data_types' must be an object"),
    ],
    ids=lambda v: "-".join([*v]) if isinstance(v, dict) else "",
)
def test_what_deepspeed_would_ignore_or_refuse_later(content: dict, reason: str, written) -> None:
    with pytest.raises(ValueError, match=rf"deepspeed_config: .*ds\.json.*{reason}") as refusal:
        deepspeed_config(run_config(written(content)), 2)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_torchs_linear_stays_what_it_is(stage: int, written) -> None:
    """DeepSpeed replaces it in the whole process unless it is told not to (see tests/parallel/test_frozen_networks)."""
    for given in ({}, {"memory_efficient_linear": False}, {"memory_efficient_linear": "auto"}):
        settings = deepspeed_config(run_config(written({"zero_optimization": given}), zero_stage=stage), 2)
        told = {"memory_efficient_linear": False} if stage == 3 else {"overlap_comm": True}
        assert settings["zero_optimization"] == {"stage": stage} | told
    file = written({"zero_optimization": {"memory_efficient_linear": True}})
    with pytest.raises(ValueError, match=r"ds\.json sets zero_optimization\.memory_efficient_linear=true.*tokenizer"):
        deepspeed_config(run_config(file, zero_stage=stage), 2)


def test_unreadable_files(written, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"deepspeed_config: there is no file .*nowhere\.json"):
        deepspeed_config(run_config(tmp_path / "nowhere.json"), 2)
    with pytest.raises(ValueError, match=r"deepspeed_config: .*ds\.json is not JSON"):
        deepspeed_config(run_config(written("{")), 2)
    with pytest.raises(ValueError, match=r"deepspeed_config: .*ds\.json must hold a JSON object"):
        deepspeed_config(run_config(written([1])), 2)


def test_a_section_that_is_no_object(written) -> None:
    with pytest.raises(ValueError, match=r"deepspeed_config: .*ds\.json.*bf16"):
        deepspeed_config(run_config(written({"bf16": True})), 2)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"batch\.texts=24"):
        deepspeed_config(run_config(), 16)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files(file: Path) -> None:
    """Each loads with the run that its name promises, and with no other stage or precision."""
    stage = int(file.stem[len("zero")])
    settings = deepspeed_config(run_config(file, zero_stage=stage), 2)
    assert settings["zero_optimization"]["stage"] == stage and settings["bf16"]["enabled"] is True
    assert ("offload_optimizer" in settings["zero_optimization"]) == ("offload" in file.stem)
    for wrong in ({"zero_stage": 2}, {"zero_stage": stage, "precision": "fp32"}):
        with pytest.raises(ValueError, match=r"parallel\.zero_stage|precision"):
            deepspeed_config(run_config(file, **wrong), 2)


@pytest.mark.parametrize("recipe", ["base", "large", "giant"])
def test_recipes_find_their_files_from_any_folder(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the package lies elsewhere than the recipe, and a file of one's own of that name comes first."""
    monkeypatch.chdir(tmp_path)
    named = yaml.safe_load((REPOSITORY / f"launchers/recipes/{recipe}.yaml").read_text())["deepspeed_config"]
    content = json.loads((REPOSITORY / named).read_text())
    assert read_deepspeed_file(named) == content
    with pytest.raises(ValueError, match="there is no file ds_configs/nothing.json"):
        read_deepspeed_file("ds_configs/nothing.json")
    with pytest.raises(ValueError, match="there is no file elsewhere/zero1_bf16.json"):
        read_deepspeed_file("elsewhere/zero1_bf16.json")
    Path("ds_configs").mkdir()
    Path(named).write_text("{}")
    assert read_deepspeed_file(named) == {}


def test_shipped_files_lie_in_the_package() -> None:
    """And so they are installed with it (pyproject.toml names them as its data)."""
    package = REPOSITORY / "beit3_dist"
    data = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "beit3_dist"
    ]
    patterns = [pattern for pattern in data if pattern.startswith("ds_configs/")]
    assert {file.name for pattern in patterns for file in package.glob(pattern)} == {file.name for file in SHIPPED}


def test_three_files_are_shipped() -> None:
    assert [file.stem for file in SHIPPED] == ["zero1_bf16", "zero3_bf16", "zero3_bf16_offload"]


@pytest.mark.parametrize("file", ["zero1_bf16", "zero3_bf16", "zero3_bf16_offload"])
def test_shipped_buckets_fit_the_giant(file: str) -> None:
    """The last bucket is the words' table, and one prefetch holds a layer: see docs/layouts.md."""
    recipe = read_sections(REPOSITORY / "launchers" / "recipes" / "giant.yaml", "model")
    giant = BEiT3(ModelConfig(**recipe["model"]), device="meta")
    largest = max(parameter.numel() for parameter in giant.parameters())
    layer = max(sum(parameter.numel() for parameter in block.parameters()) for block in giant.blocks.values())
    zero = json.loads((REPOSITORY / "ds_configs" / f"{file}.json").read_text())["zero_optimization"]
    assert largest <= zero["reduce_bucket_size"] <= 1.2 * largest
    if zero["stage"] == 3:
        assert layer <= zero["stage3_prefetch_bucket_size"] < 2.5 * layer and zero["contiguous_gradients"] is False
