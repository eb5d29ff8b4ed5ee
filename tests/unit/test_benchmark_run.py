"""The benchmark of launchers/pretrain.py: what it makes trains, and why there is no figure is told."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from beit3_dist.data.text import TextTokenizer
from beit3_dist.tools.benchmarks import run
from tests.conftest import REPOSITORY
from tools import benchmark

RECIPE = {
    "out": "unused",
    "seed": 0,
    "precision": "fp32",
    "steps": 9,
    "model": dict(layers=1, width=16, heads=2, ffn_width=24, patch_size=8, image_size=32, vl_expert_layers=0,
                  vocab_size=510, visual_vocab_size=12, max_text_length=20, drop_path=0.0),
    "data": dict(text_length=18, caption_length=12),
    "optim": dict(warmup_steps=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The arguments of `measure` for data that are there."""
    folder = tmp_path_factory.mktemp("benchmark")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    arguments = (str(folder / "data"), "--recipe", str(recipe))
    assert run.main(["make", *arguments, "--pictures", "9"]) == 0
    return arguments


def test_the_vocabulary_is_the_recipes(made: tuple[str, ...]) -> None:
    tokenizer = TextTokenizer(str(Path(made[0]) / "text.spm"))
    tokenizer.check_vocab(510)
    words = tokenizer.encode("aaaa aabc")
    assert len(words) == 2 and tokenizer.unk not in words


@pytest.mark.slow
def test_steps_are_timed_and_nothing_is_left(made: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("--samples", "2", "--steps", "3", "--last", "2", "--json")
    assert run.main(["measure", *made, *numbers, "--data.workers", "0"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] >= 3 and record["recipe"] == "tiny" and record["zero_stage"] == 1
    assert 0 < record["fastest_s"] <= record["step_s"] and record["tokens_per_s"] > 0 and "torch" in record["computes"]
    assert not [path for path in Path(made[0]).iterdir() if path.is_dir() and path.name.startswith("run")]


@pytest.mark.slow
def test_a_run_that_ends_says_why(made: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["measure", *made, "--samples", "2", "--model.heads", "3"]) == 1
    assert "left out: pretrain.py: error:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("step 1\ntorch.OutOfMemoryError: CUDA out of memory. Tried\nmore\n", "it does not fit"),
        ("Traceback\n  a.py\nRuntimeError: no such kernel\nrank 0 fails\n", "RuntimeError: no such kernel"),
        ("", "it said nothing"),
    ],
)
def test_reasons(output: str, why: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(output)
    assert run.reason(log) == why


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(REPOSITORY / "launchers" / "recipes" / "demo.yaml")
    assert run.main(["measure", str(tmp_path), "--recipe", recipe, "--samples", "2"]) == 2
    assert "call `make` first" in capsys.readouterr().err
    assert run.main(["make", str(tmp_path), "--recipe", "no.yaml"]) == 2
    assert "no.yaml cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {layers: 2, layers: 3}\ndata: {}\noptim: {}\n", "line 1: model.layers is given twice"),
        ("model:\n#  layers: 2\ndata: {}\n", "line 1: model has no value"),
        ("model: [1\n", "is no YAML"),
        ("steps: 3\n", "has no section model"),
        ("model: 3\ndata: {}\noptim: {}\n", "has no section model"),
    ],
)
@pytest.mark.parametrize("tool", ["run", "recipe", "traffic", "checkpoint"])
def test_recipes_are_checked_as_launchers_check_them(
    tool: str, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "odd.yaml"
    recipe.write_text(text)
    if tool == "run":
        assert run.main(["make", str(tmp_path / "data"), "--recipe", str(recipe)]) == 2
    else:
        arguments = ["--kernels", "torch", "--attention", "padded"] if tool == "traffic" else []
        assert benchmark.main([tool, "--recipe", str(recipe), *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and f"the recipe {recipe}" in printed and words in printed


def test_the_script_names_a_part_that_it_does_not_have(tmp_path: Path) -> None:
    script = ["bash", "tools/benchmark_gpu.sh", str(tmp_path), "kernels", "nothing"]
    done = subprocess.run(script, cwd=REPOSITORY, env=os.environ | {"TINY": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no part nothing" in done.stderr and done.stdout == ""
