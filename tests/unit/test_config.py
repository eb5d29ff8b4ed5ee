"""What cannot run is refused with one line that names the field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from beit3_dist.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    Source,
)
from beit3_dist.image_tokenizer.config import TokenizerConfig, TokenizerDataConfig
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.tasks.config import TaskDataConfig
from beit3_dist.teachers.config import TeacherConfig

STREAMS = {"images": "i.tar", "texts": "t.tar", "pairs": "p.tar"}

MASKED = f"objectives.{NAME}"


def run_config(**changes: Any) -> RunConfig:
    """A valid run, with changes."""
    files = {"out": "out", "text_tokenizer": "text.spm", "image_tokenizer": "vqkd.safetensors"}
    return RunConfig(**files | {"data": DataConfig(**STREAMS)} | changes)


SECTIONS = {
    "model": ModelConfig,
    MASKED: MaskedDataModelingConfig,
    "batch": BatchConfig,
    "parallel": ParallelConfig,
    "optim": OptimConfig,
    "checkpoint": CheckpointConfig,
    "eval": EvalConfig,
    "data": lambda **changes: DataConfig(**STREAMS | changes),
}

REFUSED = [  # (section, what is changed, what the one line must say)
    ("model", {"layers": 0}, "model.layers must be positive, not 0"),
    ("model", {"width": -8}, "model.width must be positive, not -8"),
    ("model", {"ffn_width": 0}, "model.ffn_width must be positive"),
    ("model", {"visual_vocab_size": 0}, "model.visual_vocab_size must be positive"),
    ("model", {"heads": 0}, "model.heads must be positive"),
    ("model", {"heads": 3}, "model.width=1408 is not divisible by model.heads=3"),
    ("model", {"patch_size": 15}, "model.image_size=224 is not divisible by model.patch_size=15"),
    ("model", {"vl_expert_layers": 41}, "model.vl_expert_layers=41 is not between 0 and model.layers=40"),
    ("model", {"vl_expert_layers": -1}, "model.vl_expert_layers=-1"),
    ("model", {"drop_path": 1.0}, "model.drop_path=1.0 is not in [0, 1)"),
    ("model", {"max_text_length": 2}, "model.max_text_length=2"),
    ("model", {"vocab_size": 10}, "model.vocab_size=10 leaves no room"),
    ("data", {"text_length": 2}, "data.text_length=2"),
    ("data", {"caption_length": 0}, "data.caption_length=0"),
    ("data", {"horizontal_flip": 1.1}, "data.horizontal_flip=1.1 is not in [0, 1]"),
    ("data", {"color_jitter": -0.1}, "data.color_jitter=-0.1"),
    ("data", {"max_bad_fraction": 2}, "data.max_bad_fraction=2"),
    ("data", {"min_crop_scale": 0}, "data.min_crop_scale=0 is not in (0, 1]"),
    ("data", {"workers": -1}, "data.workers=-1 is negative"),
    ("data", {"prefetch": 0}, "data.prefetch must be positive, not 0"),
    (
        MASKED,
        {"image_mask_ratio": 1.0},
        f"{MASKED}.image_mask_ratio=1.0 is not in [0, 1)",
    ),
    (MASKED, {"text_mask_ratio": -0.1}, f"{MASKED}.text_mask_ratio=-0.1"),
    (
        MASKED,
        {"caption_mask_ratio": -1},
        f"{MASKED}.caption_mask_ratio=-1",
    ),
    (
        MASKED,
        {"mask_token_share": 0.95},
        f"{MASKED}.mask_token_share + {MASKED}.random_token_share",
    ),
    (
        MASKED,
        {"random_token_share": -0.1},
        f"{MASKED}.mask_token_share + {MASKED}.random_token_share",
    ),
    (
        MASKED,
        {"pair_text_weight": -1},
        f"{MASKED}.pair_text_weight=-1 is negative",
    ),
    ("batch", {"texts": -1}, "batch.texts=-1 is negative"),
    ("batch", {"images": 0, "texts": 0, "pairs": 0}, "batch: images, texts and pairs are all 0"),
    ("batch", {"accumulation": 0}, "batch.accumulation must be positive, not 0"),
    ("parallel", {"tensor": 0}, "parallel.tensor must be positive, not 0"),
    ("parallel", {"chunks": 2}, "parallel.chunks=2 interleaves the stages of a pipeline"),
    ("parallel", {"sequence": True}, "parallel.sequence shards tokens over the tensor ranks"),
    ("optim", {"min_lr": 1e-2}, "optim.min_lr=0.01 is not between 0 and optim.lr=0.001"),
    ("optim", {"lr": -1.0}, "optim.lr=-1.0"),
    ("optim", {"warmup_steps": -1}, "optim.warmup_steps=-1 is negative"),
    ("optim", {"weight_decay": -0.1}, "optim.weight_decay=-0.1 is negative"),
    ("optim", {"clip_norm": -3}, "optim.clip_norm=-3 is negative"),
    ("optim", {"beta2": 1.0}, "optim.beta2=1.0 is not in [0, 1)"),
    ("checkpoint", {"every": 0}, "checkpoint.every must be positive, not 0"),
    ("checkpoint", {"keep": -1}, "checkpoint.keep=-1 is negative"),
    ("checkpoint", {"keep_every": -1}, "checkpoint.keep_every=-1 is negative"),
    ("checkpoint", {"every": 4, "keep_every": 6}, "checkpoint.keep_every=6 is not divisible by checkpoint.every=4"),
    ("batch", {"pairs": 10**23}, "batch.pairs=100000000000000000000000 samples a step: give 16777216 or fewer"),
    ("model", {"layers": 10**7}, "model.layers=10000000 modules"),
    ("eval", {"every": -1}, "eval.every=-1 is negative"),
    ("eval", {"batches": 0}, "eval.batches must be positive, not 0"),
]


@pytest.mark.parametrize(("section", "change", "words"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_refusals_of_a_section(section: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        SECTIONS[section](**change)
    line = str(refusal.value)
    assert words in line and "\n" not in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, ["steps must be positive, not 0"]),
        ({"steps": 10**13}, ["steps=10000000000000 are more"]),
        ({"steps": 100}, ["optim.warmup_steps=10000", "steps=100"]),
        (
            {"data": DataConfig(**STREAMS, text_length=2000)},
            ["data.text_length=2000", "model.max_text_length=1022"],
        ),
        ({"model": ModelConfig(max_text_length=60)}, ["model.max_text_length=60"]),
        ({"eval": EvalConfig(every=5, images="i", pairs="p")}, ["eval.texts is empty but eval.every=5"]),
        ({"data": DataConfig(images="i", pairs="p")}, ["data.texts is not given", "batch.texts=2048", "batch.texts=0"]),
        (
            {"parallel": ParallelConfig(zero_stage=0)},
            ["parallel.zero_stage=0", "parallel.zero_stage=1", "precision=fp32"],
        ),
    ],
    ids=lambda v: " ".join(v),
)
def test_refusals_of_the_whole(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        run_config(**change)
    line = str(refusal.value)
    assert all(word in line for word in words) and "\n" not in line


def test_an_unset_variable_is_no_run_folder() -> None:
    with pytest.raises(ValueError, match="^out is empty: name the run folder"):
        run_config(out="")
    with pytest.raises(ValueError, match="^out is empty: name the run folder"):
        TokenizerConfig(out="", data=TokenizerDataConfig(images="i"))


def test_a_source_needs_a_weight() -> None:
    with pytest.raises(ValueError, match=r"source 'a\.tar' must be positive, not 0"):
        Source(shards="a.tar", weight=0)


@pytest.mark.parametrize("stream", ["images", "texts", "pairs"])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "the list of sources is empty"),
        (["a.tar", Source(shards="b.tar")], r"lists patterns \(a.tar\) beside sources with weights"),
        (["a.tar", "pipe:cat b.tar"], "lists 'pipe:cat b.tar': commands and addresses are sources of their own"),
        (["s3://bucket/a.tar"], "lists 's3://bucket/a.tar': commands"),
    ],
    ids=["empty", "both kinds", "command", "address"],
)
def test_lists_that_are_no_source(stream: str, given: list, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^data.{stream}:? {reason}"):
        DataConfig(**{"images": "i", "texts": "t", "pairs": "p"} | {stream: given})


def test_the_defaults_are_the_papers_giant() -> None:
    config = run_config()
    model, optim, batch, objective = config.model, config.optim, config.batch, MaskedDataModelingConfig()
    assert (model.layers, model.width, model.ffn_width, model.heads, model.patch_size) == (40, 1408, 6144, 16, 14)
    assert (model.attention, model.sub_layernorm, model.vl_expert_layers, model.drop_path) == ("shared", False, 3, 0.1)
    assert (config.steps, optim.warmup_steps, optim.lr, optim.weight_decay) == (1_000_000, 10_000, 1e-3, 0.05)
    assert (optim.beta1, optim.beta2, optim.eps, optim.clip_norm) == (0.9, 0.98, 1e-6, 3.0)
    assert (batch.images, batch.texts, batch.pairs) == (2048, 2048, 2048)
    assert (objective.image_mask_ratio, objective.text_mask_ratio, objective.caption_mask_ratio) == (0.4, 0.15, 0.5)
    assert model.patches == 256


def test_something_has_to_be_learnt() -> None:
    none = dict.fromkeys(("image_weight", "text_weight", "pair_image_weight", "pair_text_weight"), 0.0)
    with pytest.raises(ValueError, match="objectives: all weights are 0, so that nothing would be learnt"):
        objectives_of(run_config(objectives={NAME: MaskedDataModelingConfig(**none)}))


def test_borders_are_allowed() -> None:
    ModelConfig(vl_expert_layers=0, drop_path=0.0, max_text_length=3, vocab_size=11)
    ModelConfig(vl_expert_layers=40)
    OptimConfig(min_lr=0.0, warmup_steps=0, weight_decay=0, clip_norm=0)
    run_config(steps=10_000)  # no longer than the warm-up
    run_config(precision="fp32", parallel=ParallelConfig(zero_stage=0))


def test_micro_batch() -> None:
    config = run_config(batch=BatchConfig(images=48, texts=24, pairs=36, accumulation=2))
    assert config.micro_batch(1) == (24, 12, 18)
    assert config.micro_batch(6) == (4, 2, 3)
    with pytest.raises(ValueError, match=r"batch\.pairs=36 .* 4 data-parallel ranks x batch\.accumulation=2 = 8"):
        config.micro_batch(4)


def test_every_field_says_what_it_is() -> None:
    """The docstring below a field is its line in --help, so none may lack one."""
    import ast
    import inspect

    from beit3_dist import config

    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef):
            for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert documented, f"{node.name}.{ast.unparse(field.target)} has no docstring"


def test_sections_are_keyword_only() -> None:
    for section in (*SECTIONS.values(), RunConfig, Source):
        if dataclasses.is_dataclass(section):
            with pytest.raises(TypeError, match="positional"):
                section(1)


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell reads a recipe: `out: ~/runs` made a folder of the name `~`."""
    monkeypatch.setenv("HOME", "/home/me")
    pretraining = RunConfig(
        out="~/runs", text_tokenizer="t", image_tokenizer="~/vqkd", image_codes="~/codes", init_from="~/weights",
        deepspeed_config="~/zero.json", checkpoint=CheckpointConfig(resume="~/step_0000001"),
        data=DataConfig(images="i", texts="t", pairs="p"), eval=EvalConfig(image_codes="~/held-out"),
    )  # fmt: skip
    found = [pretraining.out, pretraining.image_tokenizer, pretraining.image_codes, pretraining.init_from,
             pretraining.deepspeed_config, pretraining.checkpoint.resume, pretraining.eval.image_codes]  # fmt: skip
    names = ["runs", "vqkd", "codes", "weights", "zero.json", "step_0000001", "held-out"]
    assert found == [f"/home/me/{name}" for name in names]
    data = TaskDataConfig(train=["~/a.jsonl", "/b.jsonl"], validation="~/c.jsonl", images="~/coco")
    assert (data.train, data.validation) == (["/home/me/a.jsonl", "/b.jsonl"], "/home/me/c.jsonl")
    assert (data.images, data.answers) == ("/home/me/coco", "")
    teacher = TeacherConfig(kind="clip", weights="~/clip.pt")
    tokenizer = TokenizerConfig(out="~/runs", data=TokenizerDataConfig(images="i"), teacher=teacher)
    assert (tokenizer.out, tokenizer.teacher.weights) == ("/home/me/runs", "/home/me/clip.pt")
