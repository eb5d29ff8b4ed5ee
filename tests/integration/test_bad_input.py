"""Wrong input: one line that names the field and the remedy, exit code 2, before any process group starts."""

from __future__ import annotations

import importlib.util
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3_dist.config import CheckpointConfig, OptimConfig
from tests.integration.runs import metrics, run_config, save_random_tokenizer, train, write_recipe
from tests.parallel.workers import run_workers
from tests.unit.tar_fixtures import picture, sentences, train_tokenizer, write_tar

REPOSITORY = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("pretrain", REPOSITORY / "launchers" / "pretrain.py")
assert _spec and _spec.loader
launcher = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launcher)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, tokenizers, a finished run in `run`, and things that cannot be used."""
    folder = tmp_path_factory.mktemp("input")
    config = run_config(folder, steps=2, checkpoint=CheckpointConfig(every=2), optim=OptimConfig(warmup_steps=1))
    write_recipe(config, folder / "recipe.yaml")
    assert run_workers(1, train, config) == [""]
    tarfile.open(folder / "empty.tar", "w").close()
    write_tar(folder / "no-captions.tar", [{"__key__": "a", "png": picture(1)}])
    train_tokenizer(folder / "other.spm", pieces=250)
    save_random_tokenizer(folder / "many-codes.pth", codebook_size=64)
    (folder / "not-a-tokenizer").write_text("hello")
    (folder / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
    torch.save({"model": {"x": torch.zeros(1)}}, folder / "weights.pth")
    return folder


CASES = {  # name -> (arguments, what the line must say)
    "unknown key": ("--optim.learning_rate 1", ["optim.learning_rate"]),
    "wrong type": ("--steps many", ["steps", "many"]),
    "heads": ("--model.heads 5", ["model.heads=5", "model.width=32"]),
    "missing shards": ("--data.images {folder}/nowhere/*.tar", ["data.images", "nowhere"]),
    "empty stream": ("--data.images {folder}/empty.tar", ["data.images", "empty.tar"]),
    "pairs without captions": ("--data.pairs {folder}/no-captions.tar", ["data.pairs"]),
    "text tokenizer is missing": ("--text_tokenizer {folder}/nowhere.spm", ["text_tokenizer", "nowhere.spm"]),
    "text tokenizer is none": ("--text_tokenizer {folder}/not-a-tokenizer", ["text_tokenizer", "not-a-tokenizer"]),
    "text tokenizer's size": ("--text_tokenizer {folder}/other.spm", ["text_tokenizer", "model.vocab_size=260"]),
    "image tokenizer is missing": ("--image_tokenizer {folder}/nowhere.pth", ["image_tokenizer", "nowhere.pth"]),
    "image tokenizer is none": ("--image_tokenizer {folder}/not-a-tokenizer", ["image_tokenizer", "not-a-tokenizer"]),
    "image tokenizer of another size": (
        "--image_tokenizer {folder}/many-codes.pth", ["image_tokenizer", "model.visual_vocab_size=64"]),
    "batch does not divide": ("--batch.pairs 5", ["batch.pairs=5", "accumulation=2"]),
    "bf16 at ZeRO-0": ("--precision bf16 --parallel.zero_stage 0", ["parallel.zero_stage", "precision"]),
    "DeepSpeed file contradicts": (
        "--deepspeed_config {folder}/zero1.json", ["zero_optimization.stage", "parallel.zero_stage"]),
    "DeepSpeed file is missing": ("--deepspeed_config {folder}/nowhere.json", ["deepspeed_config", "nowhere.json"]),
    "run exists": ("--out {folder}/run", ["out", "checkpoint.resume auto"]),
    "checkpoint is missing": ("--checkpoint.resume {folder}/nowhere", ["checkpoint.resume", "nowhere"]),
    "checkpoint of another architecture": (
        "--checkpoint.resume {folder}/run/checkpoints/step_0000002 --model.width 64 --steps 9",
        ["checkpoint.resume", "model.width=32", "64"]),
    "nothing left to do": ("--out {folder}/run --checkpoint.resume auto", ["steps=2"]),
    "another seed on resume": (
        "--out {folder}/run --checkpoint.resume auto --steps 4 --seed 1",
        ["seed=0", "seed=1", "checkpoint.other_data"]),
    "other data on resume": (
        "--out {folder}/run --checkpoint.resume auto --steps 4 --data.images {folder}/images-0.tar",
        ["data.images", "shards=2, samples=11", "shards=1, samples=6", "--init_from", "checkpoint.other_data"]),
    "no initial weights": ("--init_from {folder}/nowhere.pth --model.attention per_modality --model.vl_expert_layers 0",
                           ["init_from", "nowhere.pth"]),
    "initial weights of something else": (
        "--init_from {folder}/weights.pth --model.attention per_modality --model.vl_expert_layers 0",
        ["init_from", "weights.pth"]),
    "evaluation without shards": ("--eval.every 1", ["eval.images"]),
    "tensor parallelism": ("--parallel.tensor 2", ["parallel.tensor"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_line_and_exit_code_2(case: tuple[str, list[str]], folder: Path, capfd: pytest.CaptureFixture,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    arguments, expected = case
    monkeypatch.setattr("beit3_dist.train.pretraining.pretrain", lambda *_: pytest.fail("the run was started"))
    given = [
        "--config",
        str(folder / "recipe.yaml"),
        "--out",
        str(folder / "new"),
        *arguments.format(folder=folder).split(),
    ]
    with pytest.raises(SystemExit) as exit_:
        launcher.main(given)
    errors = capfd.readouterr().err.strip()
    assert exit_.value.code == 2
    assert len(errors.splitlines()) == 1, errors
    assert all(word in errors for word in expected), errors
    assert not torch.distributed.is_initialized() and not (folder / "new").exists()


@pytest.mark.slow
def test_bad_samples_are_replaced_counted_and_listed(tmp_path: Path) -> None:
    """A picture that is none and a caption that is empty: the run goes on; with no tolerance at all it stops."""
    config = run_config(tmp_path, steps=6)
    broken = [{"__key__": f"{n}", "png": b"not a picture" if n % 3 == 0 else picture(n)} for n in range(6)]
    write_tar(tmp_path / "broken-images.tar", broken)
    words = sentences()
    pairs = [{"__key__": f"{n}", "png": picture(n), "txt": b"" if n == 2 else words[n].encode()} for n in range(6)]
    write_tar(tmp_path / "broken-pairs.tar", pairs)
    data = replace(config.data, images=str(tmp_path / "broken-images.tar"), pairs=str(tmp_path / "broken-pairs.tar"))
    assert run_workers(2, train, replace(config, data=data)) == ["", ""]
    records = metrics(config.out)
    faults = [json.loads(line) for line in Path(config.out, "quarantine.jsonl").read_text().splitlines()]
    assert len(faults) == sum(r["replaced_samples"] for r in records) > 0
    assert [f["step"] for f in faults] == sorted(f["step"] for f in faults), "one process writes them, step by step"
    assert {f["stream"] for f in faults} == {"images", "pairs"}
    assert {f["key"] for f in faults if f["stream"] == "images"} == {"0", "3"}
    assert all(f["shard"].endswith(".tar") and f["reason"] and 1 <= f["step"] <= 6 for f in faults)
    assert all(r["images"] == 4 and r["loss_image"] > 0 for r in records)

    strict = replace(config, out=str(tmp_path / "strict"), data=replace(data, max_bad_fraction=0.0))
    errors = run_workers(2, train, strict)
    assert all("data.max_bad_fraction" in error and "quarantine.jsonl" in error for error in errors)
