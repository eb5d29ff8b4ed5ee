"""The table of what pretraining is worth."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tools.compare_tasks import compare, main


def write_run(folder: Path, name: str, score: float, **config: object) -> None:
    run = folder / name
    run.mkdir(parents=True)
    settings = {"out": name, "init_from": name, "checkpoint": {}, "steps": 5} | config
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "eval.jsonl").write_text(f'{{"step": 3, "top1": 0.1}}\n{{"step": 5, "top1": {score}}}\n')


def test_the_last_validations_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "shapes-pretrained", 0.75)
    write_run(tmp_path, "shapes-random", 0.5)
    assert compare(tmp_path) == [{"run": "shapes", "metric": "top1", "steps": 5, "pretrained": 0.75, "random": 0.5}]
    main([str(tmp_path)])
    assert "| shapes | top1 | 5 | 75.0 % | 50.0 % |" in capsys.readouterr().out


def test_runs_of_other_settings_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "shapes-pretrained", 0.75)
    write_run(tmp_path, "shapes-random", 0.5, steps=4)
    with pytest.raises(ValueError, match="compare equal runs"):
        compare(tmp_path)


@pytest.mark.parametrize("missing", ["everything", "the random run"])
def test_nothing_to_compare_is_one_line(tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    if missing == "the random run":
        write_run(tmp_path, "shapes-pretrained", 0.75)
    with pytest.raises(SystemExit) as exit_code:
        main([str(tmp_path)])
    assert exit_code.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_mistyped_task_is_found_before_anything_is_made(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "launchers" / "demo_tasks.sh"
    result = subprocess.run(
        ["bash", script, "vqa", "vq"], env=os.environ | {"BEIT3_VENV": str(tmp_path / "venv")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.startswith("demo_tasks.sh: there is no task vq, only shapes ")
    assert not result.stdout and not list(tmp_path.iterdir())
