"""The experiment with random kills on a program that only pretends to train."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from beit3_dist.tools.plans.killed import experiment, lines

PROGRAM = """
import json, sys, time
from pathlib import Path
out, every, step_s = Path(sys.argv[1]), int(sys.argv[2]), 0.02
(out / "checkpoints").mkdir(parents=True, exist_ok=True)
time.sleep(0.15)
saved = max([int(p.name[5:]) for p in out.glob("checkpoints/step_*")], default=0)
log = out / "metrics.jsonl"
kept = log.read_text().splitlines()[:saved] if log.exists() else []
log.write_text("".join(line + "\\n" for line in kept))
for step in range(saved + 1, int(sys.argv[3])):
    time.sleep(step_s)
    with open(log, "a") as file:
        file.write(json.dumps({"step": step, "step_s": step_s}) + "\\n")
    if step % every == 0:
        (out / "checkpoints" / f"step_{step:07}").mkdir(exist_ok=True)
"""


def test_measured_and_predicted(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(tmp_path / "run"), "10", "100000"]
    said: list[str] = []
    found = experiment(command, tmp_path / "run", seconds=8, mtbf_s=1.2, every=10, tell=said.append)
    print("\n".join([*said, *lines(found)]))
    assert found.ends == 0 and len(said) == found.kills and all("killed behind step" in line for line in said)
    assert found.kills >= 3 and found.run.step_s == 0.02 and 0.1 < found.run.restart_s < 5
    assert found.steps > 10
    assert 0 < found.predicted < 1 and found.predicted == pytest.approx(found.measured, abs=0.3)  # of a busy machine
    with pytest.raises(ValueError, match="is there already"):
        experiment(command, tmp_path / "run", 1, 1, 1)


def test_an_attempt_that_ends_by_itself_is_told_and_started_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("step % every == 0:", "step % 40 == 0 and 1 / 0 or step % every == 0:"))
    command = [sys.executable, str(program), str(tmp_path / "run"), "10", "100000"]
    said: list[str] = []
    with pytest.raises(ValueError, match="the run ended by itself"):  # for good, behind the same step
        experiment(command, tmp_path / "run", seconds=60, mtbf_s=1e6, every=10, tell=said.append)
    assert len(said) >= 2 and all("ended by itself behind step 40" in line for line in said)


def test_a_run_that_ends_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the run ended by itself"):
        experiment([sys.executable, "-c", "pass"], tmp_path / "run", 1, 1, 1)
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        experiment(["no-such-command"], tmp_path / "run", 1, 1, 1)
