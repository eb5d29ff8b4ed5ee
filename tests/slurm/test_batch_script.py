"""What the batch script makes of a job's end, with small programs in the place of Slurm's and of the trainers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit3_dist.leaving import ExitCode

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = {
    "deepspeed": "",
    "apptainer": 'shift 3; exec "$@"',
    "scancel": 'touch "$CALLS.asked"',
    "sleep": "",
    "srun": """
        [[ -z $SAVED ]] || { mkdir -p "$OUT/checkpoints"; echo "$SAVED" >"$OUT/checkpoints/latest"; }
        if [[ -n $SIGNAL ]]; then
            kill -s "$SIGNAL" $PPID
            for ((n = 0; n < 100; n++)); do [[ -e $CALLS.asked ]] && break; command -p sleep 0.1; done
        fi
        exit "$TRAINERS_EXIT" """,
    # Each fails as often as it is told to.
    "squeue": '[[ $(grep -c squeue "$CALLS") -gt $SQUEUE_FAILS ]] && echo "$JOB_STATE"',
    "scontrol": '[[ $1 == requeue ]] || { echo node1; exit; }; [[ $(grep -c requeue "$CALLS") -gt $REQUEUE_FAILS ]]',
}
RUN = [
    *("--text_tokenizer", "text.spm", "--image_tokenizer", "vqkd.pth"),
    *("--data.images", "images.tar", "--data.texts", "texts.tar", "--data.pairs", "pairs.tar"),
]


class Cluster:
    """Programs that write their calls down."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "run"
        self.calls = folder / "calls"
        self.calls.touch()
        programs = folder / "programs"
        programs.mkdir()
        for name, body in PROGRAMS.items():
            file = programs / name
            file.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
            file.chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_ID": f"{os.getpid()}",
            "SLURM_JOB_NODELIST": "node1",
            "BEIT3_PROCESSES_PER_NODE": "1",
            "OUT": str(self.out),
            "SAVED": "",  # the checkpoint that the trainers save
            "SIGNAL": "",  # what Slurm sends to the batch script
            "JOB_STATE": "RUNNING",
            "SQUEUE_FAILS": "0",
            "REQUEUE_FAILS": "0",
        }

    def job(self, trainers_exit: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The batch script, to its end."""
        script = ["bash", "launchers/slurm/pretrain.sbatch", *RUN, "--out", str(self.out), *arguments]
        environment = self.environment | environment | {"TRAINERS_EXIT": str(trainers_exit)}
        return subprocess.run(script, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=120)

    def count(self, call: str) -> int:
        """How often a program was called so."""
        return sum(line.startswith(call) for line in self.calls.read_text().splitlines())


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_a_busy_controller_is_asked_again(cluster: Cluster) -> None:
    job = cluster.job(ExitCode.PREEMPTED, SQUEUE_FAILS="2", REQUEUE_FAILS="3")
    assert job.returncode == ExitCode.PREEMPTED and "error" not in job.stderr
    assert (cluster.count("squeue"), cluster.count("scontrol requeue")) == (6, 4), "the last one was taken"


def test_a_controller_that_never_answers_is_given_up(cluster: Cluster) -> None:
    job = cluster.job(ExitCode.PREEMPTED, REQUEUE_FAILS="1000")
    assert job.returncode == ExitCode.PREEMPTED and "sbatch it again" in job.stderr.splitlines()[-1]
    assert cluster.count("scontrol requeue") == 30


def test_a_job_that_is_being_cancelled_stays_so(cluster: Cluster) -> None:
    assert cluster.job(ExitCode.PREEMPTED, JOB_STATE="COMPLETING").returncode == ExitCode.PREEMPTED
    assert cluster.count("scontrol requeue") == 0


def test_a_checkpoint_to_go_back_to_is_refused_not_overridden(cluster: Cluster) -> None:
    """`--checkpoint.resume auto`, which the script adds, is the last to be heard."""
    job = cluster.job(0, "--checkpoint.resume", "old/step_0001000")
    assert job.returncode == 2 and cluster.count("srun") == 0
    (line,) = job.stderr.splitlines()
    assert "checkpoint.resume=old/step_0001000" in line
    assert f"the newest checkpoint in {cluster.out}/checkpoints: leave checkpoint.resume out" in line
    assert cluster.job(0, "--checkpoint.resume", "auto").returncode == 0 and cluster.count("srun") == 1


def test_all_of_it_runs_in_a_container(cluster: Cluster) -> None:
    assert cluster.job(0, BEIT3_CONTAINER="beit3.sif").returncode == 0
    assert cluster.count("apptainer exec --nv beit3.sif python launchers/slurm/latest.py") == 1
    (trained,) = (line for line in cluster.calls.read_text().splitlines() if line.startswith("srun"))
    assert "apptainer exec --nv beit3.sif bash -c" in trained


KILLED = 128 + 9
"""What srun exits with when it had to kill the trainers of a node."""


@pytest.mark.parametrize(
    ("code", "saved", "signal", "requeued"),
    [
        (0, "step_0002000", "", False),
        (ExitCode.PREEMPTED, "", "", True),
        (ExitCode.MISTAKE, "step_0002000", "", False),
        (ExitCode.STOPPED, "step_0002000", "", False),
        (ExitCode.STOPPED, "step_0002000", "USR1", False),
        (ExitCode.FAILED, "step_0002000", "", True),
        (KILLED, "step_0002000", "", True),
        (ExitCode.FAILED, "", "", False),
        (ExitCode.FAILED, "step_0001000", "", False),  # as before
        (KILLED, "", "USR1", True),  # some ended before the others knew
    ],
)
def test_who_goes_back_into_the_queue(code: int, saved: str, signal: str, requeued: bool, cluster: Cluster) -> None:
    """Whoever was asked to go, and who failed after a new checkpoint: so nobody goes round in a circle."""
    (cluster.out / "checkpoints").mkdir(parents=True)
    (cluster.out / "checkpoints" / "latest").write_text("step_0001000\n")
    job = cluster.job(code, SAVED=saved, SIGNAL=signal)
    assert job.returncode == code and cluster.count("scontrol requeue") == requeued, job.stdout + job.stderr


def test_a_new_checkpoint_of_any_stage_is_one(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("images", "pairs"):
        (tmp_path / f"{name}.yaml").write_text("steps: 20000\n")
    (tmp_path / "stages.yaml").write_text("stages: {images: images.yaml, run: pairs.yaml}\n")
    stages = ("--config", str(tmp_path / "stages.yaml"), "--out", str(tmp_path))
    program = {"BEIT3_PROGRAM": "launchers/stages.py"}
    job = cluster.job(ExitCode.FAILED, *stages, **program, SAVED="step_0001000")
    assert job.returncode == ExitCode.FAILED and cluster.count("scontrol requeue") == 1, job.stderr
    assert "launchers/stages.py --text_tokenizer" in cluster.calls.read_text()
    job = cluster.job(ExitCode.FAILED, *stages, **program, SAVED="step_0001000")
    assert cluster.count("scontrol requeue") == 1, "as before"
    job = cluster.job(0, *stages, "--run.stepps", "3", **program)
    assert job.returncode == 2 and "stage run: error" in job.stderr


def test_the_first_checkpoint_is_a_new_one(cluster: Cluster) -> None:
    assert cluster.job(ExitCode.FAILED, SAVED="step_0001000").returncode == ExitCode.FAILED
    assert cluster.count("scontrol requeue") == 1
