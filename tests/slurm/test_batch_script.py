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
        [[ $* != *--overlap* ]] || { shift 6; exec "$@"; }  # a program in a container on this node
        [[ -z $SAVED ]] || { mkdir -p "$OUT/checkpoints"; echo "$SAVED" >"$OUT/checkpoints/latest"; }
        if [[ -n $SIGNAL ]]; then
            kill -s "$SIGNAL" $PPID
            for ((n = 0; n < 100; n++)); do [[ -e $CALLS.asked ]] && break; command -p sleep 0.1; done
        fi
        exit "$TRAINERS_EXIT" """,
    # Each fails as often as it is told to.
    "squeue": '[[ $(grep -c squeue "$CALLS") -gt $SQUEUE_FAILS ]] && echo "$JOB_STATE"',
    "scontrol": """
        [[ $1 == requeue ]] || { printf "%s\\n" $NODES; exit; }
        [[ $(grep -c requeue "$CALLS") -gt $REQUEUE_FAILS ]]""",
}
RUN = [
    *("--text_tokenizer", "text.spm", "--image_tokenizer", "vqkd.pth"),
    *("--data.images", "images.tar", "--data.texts", "texts.tar", "--data.pairs", "pairs.tar"),
]
OF_PROGRAM = {
    "finetune.py": ("--text_tokenizer", "text.spm", "--data.train", "train.jsonl", "--data.validation", "val.jsonl"),
    "train_image_tokenizer.py": (
        "--data.images",
        "images.tar",
        "--teacher.kind",
        "clip",
        "--teacher.weights",
        "clip.pt",
    ),
}


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
            "NODES": "node1",
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
        return subprocess.run(script, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=300)

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
    assert cluster.count("apptainer exec --nv beit3.sif python launchers/slurm/job.py") == 1
    (trained,) = (line for line in cluster.calls.read_text().splitlines() if line.startswith("srun"))
    assert "apptainer exec --nv beit3.sif bash -c" in trained


def test_all_of_it_runs_in_a_container_of_slurms_own(cluster: Cluster) -> None:
    job = cluster.job(0, BEIT3_PYXIS="/shared/beit3.sqsh", BEIT3_MOUNTS="/data:/data")
    assert job.returncode == 0, job.stderr
    *before, trained = (line for line in cluster.calls.read_text().splitlines() if line.startswith("srun"))
    container = f"--container-image=/shared/beit3.sqsh --container-mounts={REPOSITORY},/data:/data --container-workdir"
    assert all(container in line for line in (*before, trained)) and "launchers/slurm/job.py 1 1 1" in before[1]
    both = cluster.job(0, BEIT3_PYXIS="a.sqsh", BEIT3_CONTAINER="a.sif")
    assert both.returncode == 2 and "set one of them" in both.stderr


@pytest.mark.parametrize(
    ("nodes", "least", "fields", "used"),
    [
        (3, "2", (), 2),  # batches of 2,048 do not divide by 3
        (3, "3", (), 3),  # the run itself says what does not divide
        (3, "", (), 3),
        (3, "2", ("--batch.images", "12", "--batch.texts", "6", "--batch.pairs", "3"), 3),
        (6, "1", ("--parallel.tensor", "3", "--batch.accumulation", "2048"), 3),
        (6, "1", ("--parallel.tensor", "auto", "--batch.accumulation", "auto"), 4),
    ],
)
def test_nodes_that_the_batch_does_not_divide_by_stay_idle_where_they_may(
    nodes: int, least: str, fields: tuple[str, ...], used: int, cluster: Cluster
) -> None:
    names = [f"node{number}" for number in range(nodes)]
    model = ("--model.heads", "12", "--model.width", "768")
    job = cluster.job(0, *model, *fields, NODES=" ".join(names), BEIT3_LEAST_NODES=least)
    assert job.returncode == 0, job.stderr
    (trained,) = (line for line in cluster.calls.read_text().splitlines() if line.startswith("srun"))
    assert f"--nodes={used} --nodelist={','.join(names[:used])} --ntasks={used} " in trained
    assert (f"does not divide by {nodes} nodes: {used} are at work" in job.stdout) == (used < nodes)


def test_a_number_of_nodes_that_cannot_be_is_refused(cluster: Cluster) -> None:
    for least, nodes, told in (("2", "a", "BEIT3_LEAST_NODES=2 of the 1 nodes"), ("0", "a", "=0 of"), ("x", "a", "no")):
        job = cluster.job(0, NODES=nodes, BEIT3_LEAST_NODES=least)
        assert job.returncode == 2 and told in job.stderr and cluster.count("srun") == 0, job.stderr
    job = cluster.job(0, "--batch.images", "7", "--batch.texts", "7", "--batch.pairs", "7", NODES="a b c",
                      BEIT3_LEAST_NODES="2")  # fmt: skip
    assert job.returncode == 2 and "each of 2 to 3 nodes no batch of this run divides" in job.stderr


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("finetune.py", ("--config", "launchers/recipes/finetune/vqa_base.yaml", "--init_from", "model.pth")),
        ("train_image_tokenizer.py", ("--config", "launchers/recipes/image_tokenizer_base.yaml")),
    ],
)
def test_other_programs_go_back_into_the_queue_alike(
    program: str, arguments: tuple[str, ...], cluster: Cluster
) -> None:
    own = [*arguments, "--out", str(cluster.out), *OF_PROGRAM[program]]
    environment = cluster.environment | {
        "BEIT3_PROGRAM": f"launchers/{program}",
        "TRAINERS_EXIT": "1",
        "SAVED": "step_1",
    }
    script = ["bash", "launchers/slurm/pretrain.sbatch", *own]
    job = subprocess.run(script, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=300)
    assert job.returncode == 1 and cluster.count("scontrol requeue") == 1, job.stderr
    assert f"launchers/{program} --config" in cluster.calls.read_text()


def test_a_program_that_trains_nothing_is_refused(cluster: Cluster) -> None:
    job = cluster.job(0, BEIT3_PROGRAM="tools/report.py")
    assert job.returncode == 2 and "BEIT3_PROGRAM=tools/report.py is none of launchers/" in job.stderr


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
