"""The shipped batch script under a real Slurm: submitted, preempted, requeued, finished, as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from beit3_dist.checkpoint.read import read_weights
from beit3_dist.data.cache import cache_folder, digest, locked
from beit3_dist.data.index import expand
from beit3_dist.image_tokenizer.files import save_vqkd
from beit3_dist.image_tokenizer.network import VQKD
from tests.integration.runs import metrics, reproducible
from tests.unit.tar_fixtures import small_run

REPOSITORY = Path(__file__).parents[2]
CLUSTER = Path(__file__).parent / "local_cluster.sh"
STEPS = 16
SAID = (["scontrol", "show", "jobs"], ["scontrol", "show", "nodes"])
"""What Slurm says of itself, for the message of a wait that failed."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

missing = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
reason = ""
if os.geteuid() != 0:
    reason = "Slurm's daemons need root"
elif missing:
    reason = f"there is no {', '.join(missing)}: apt-get install slurm-wlm munge"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Three nodes of one process each on this machine; the environment in which Slurm's commands find them."""
    if reason and os.environ.get("BEIT3_REQUIRE_SLURM") == "1":
        pytest.fail(f"BEIT3_REQUIRE_SLURM=1, but {reason}")
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    subprocess.run([CLUSTER, "start", folder], check=True, timeout=200)
    try:
        yield os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "BEIT3_PROCESSES_PER_NODE": "1",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True, timeout=200)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The demo recipe on tiny data, for a few steps."""
    folder = tmp_path_factory.mktemp("data")
    data = small_run(folder).data
    tokenizer = VQKD(64, patch_size=8, width=16, layers=1, heads=2, codebook_size=256, code_dim=8, decoder_layers=1,
                     target_dim=8)  # fmt: skip
    tokenizer.initialize(0)
    save_vqkd(tokenizer, folder / "image_tokenizer.pth")
    fields = {
        "config": "launchers/recipes/demo.yaml", "steps": STEPS, "optim.warmup_steps": 4, "eval.every": 0,
        "checkpoint.every": 1000, "model.vocab_size": 310, "text_tokenizer": folder / "text.spm",
        "image_tokenizer": folder / "image_tokenizer.pth", "data.images": data.images, "data.texts": data.texts,
        "data.pairs": data.pairs, "data.cache": data.cache, "batch.images": 4, "batch.texts": 4, "batch.pairs": 4,
    }  # fmt: skip
    return [argument for name, value in fields.items() for argument in (f"--{name}", str(value))]


def slurm(cluster: dict[str, str], *command: str, timeout_s: float = 60) -> str:
    """What one of Slurm's commands prints."""
    result = subprocess.run(command, env=cluster, cwd=REPOSITORY, text=True, capture_output=True, timeout=timeout_s)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
    return result.stdout.strip()


def submit(cluster: dict[str, str], recipe: list[str], out: Path, nodes: str = "2") -> str:
    """A job on some nodes; its number. What it prints goes to OUT.txt."""
    script = "launchers/slurm/pretrain.sbatch"
    options = ["--parsable", f"--nodes={nodes}", "--overcommit", f"--output={out}.txt"]
    return slurm(cluster, "sbatch", *options, script, *recipe, "--out", str(out))


def state(cluster: dict[str, str], job: str) -> str:
    """RUNNING, PENDING, COMPLETED ..., as long as Slurm remembers the job: five minutes."""
    return slurm(cluster, "scontrol", "show", "job", job).partition("JobState=")[2].split()[0]


def wait(cluster: dict[str, str], what: str, happened: Callable[[], bool], log: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            jobs = [subprocess.run(said, env=cluster, capture_output=True, text=True).stdout for said in SAID]
            pytest.fail("\n".join([f"no {what} in {seconds} s:", log.read_text() if log.exists() else "", *jobs]))
        time.sleep(0.5)


def restarted(cluster: dict[str, str], job: str, log: Path) -> None:
    """Waits until a requeued job runs again."""
    # A job that starts within seconds of its requeue meets its own revoked credential, and is killed by its nodes.
    time.sleep(5)

    def running() -> bool:
        """Asks Slurm not to wait for two minutes, once it says that this is all it waits for."""
        if "Reason=BeginTime" in slurm(cluster, "scontrol", "show", "job", job):
            now = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            subprocess.run(now, env=cluster, capture_output=True, timeout=60)  # it may just have begun by itself
        return state(cluster, job) == "RUNNING"

    wait(cluster, "second attempt", running, log)


def trained(out: Path, steps: int) -> bool:
    return (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_bytes().splitlines()) >= steps


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_preempted_and_requeued_is_the_undisturbed_run(
    cluster: dict[str, str], recipe: list[str], tmp_path: Path
) -> None:
    disturbed, undisturbed, plain = (tmp_path / name for name in ("disturbed", "undisturbed", "plain"))
    log = Path(f"{disturbed}.txt")
    job = submit(cluster, recipe, disturbed)
    wait(cluster, "fifth step", lambda: trained(disturbed, 5), log)
    slurm(cluster, "scancel", "--signal=USR1", "--batch", job)  # as --signal does before the time limit
    wait(cluster, "requeued job", lambda: state(cluster, job) == "PENDING", log)
    done = len(metrics(disturbed))
    assert done < STEPS and (disturbed / "checkpoints" / "latest").read_text().strip() == f"step_{done:07d}"

    restarted(cluster, job, log)
    reference = submit(cluster, recipe, undisturbed)
    # Without the batch script: what srun tells its tasks is enough.
    srun = ["srun", "--nodes=2", "--ntasks=2", "--overcommit", sys.executable, "launchers/pretrain.py", *recipe]
    by_srun = slurm(cluster, *srun, "--out", str(plain), timeout_s=200)
    assert f"step {STEPS}/{STEPS}" in by_srun, by_srun
    wait(
        cluster,
        "end of the undisturbed job",
        lambda: state(cluster, reference) == "COMPLETED",
        Path(f"{undisturbed}.txt"),
    )
    wait(cluster, "end of the requeued job", lambda: state(cluster, job) == "COMPLETED", log)

    output = log.read_text()
    assert "attempt 1:" in output and "attempt 2:" in output, "the second attempt must append to the first one's output"
    assert f"going on after step {done}" in output
    assert [record["step"] for record in metrics(disturbed)] == list(range(1, STEPS + 1))
    assert reproducible(disturbed) == reproducible(undisturbed) == reproducible(plain)  # losses, norms, sample hashes
    ours, theirs = (read_weights(out / "checkpoints" / f"step_{STEPS:07d}") for out in (disturbed, undisturbed))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert all((disturbed / "logs" / f"rank{rank:05d}.log").read_text() for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cancelled_saves_and_stays_cancelled(cluster: dict[str, str], recipe: list[str], tmp_path: Path) -> None:
    """scancel: Slurm sends SIGTERM to every process of the job at once."""
    out, log = tmp_path / "cancelled", tmp_path / "cancelled.txt"
    job = submit(cluster, [*recipe, "--steps", "1000"], out)
    wait(cluster, "third step", lambda: trained(out, 3), log)
    slurm(cluster, "scancel", job)
    wait(
        cluster, "end of the job", lambda: job not in slurm(cluster, "squeue", "--noheader", "--format=%i").split(), log
    )
    assert state(cluster, job) == "CANCELLED", log.read_text()
    done = len(metrics(out))
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{done:07d}", log.read_text()


def trainers(out: Path) -> list[psutil.Process]:
    """The processes that train into a folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(out) in (line := process.info["cmdline"] or []) and "launchers/pretrain.py" in line[:3]
    ]


def kill_node(cluster: dict[str, str], node: str) -> None:
    """Kills its daemon and all that Slurm runs on it, for good: no later test has it."""
    daemon = int((Path(cluster["SLURM_CONF"]).parent / f"{node}.pid").read_text())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == daemon or process.environ().get("SLURMD_NODENAME") == node:
                process.kill()


def end(cluster: dict[str, str], job: str, log: Path) -> None:
    """Leaves the next test an idle cluster."""
    slurm(cluster, "scancel", job)
    wait(cluster, "end of the job", lambda: not slurm(cluster, "squeue", "--noheader"), log)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_asked_while_the_data_are_indexed_it_goes_back_into_the_queue(
    cluster: dict[str, str], recipe: list[str], tmp_path: Path
) -> None:
    out, log, cache = tmp_path / "indexing", tmp_path / "indexing.txt", cache_folder(str(tmp_path / "cache"))
    images = recipe[recipe.index("--data.images") + 1]
    with locked(cache / digest(*expand(images, "data.images"))):  # another job builds this index, for hours
        job = submit(cluster, [*recipe, "--data.cache", str(cache)], out)
        wait(cluster, "trainers", lambda: len(trainers(out)) == 2, log)  # before, the signal ends what starts them
        slurm(cluster, "scancel", "--signal=USR1", "--batch", job)
        wait(cluster, "requeued job", lambda: state(cluster, job) == "PENDING", log)
    assert "pretrain.py: asked to go before the training has begun" in log.read_text()
    assert not (out / "checkpoints").exists()
    end(cluster, job, log)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_after_a_checkpoint_it_goes_back_into_the_queue(
    cluster: dict[str, str], recipe: list[str], tmp_path: Path
) -> None:
    out, log = tmp_path / "killed", tmp_path / "killed.txt"
    job = submit(cluster, [*recipe, "--steps", "1000", "--checkpoint.every", "2"], out)
    wait(cluster, "checkpoint", (out / "checkpoints" / "latest").exists, log)
    both = trainers(out)
    assert len(both) == 2, both
    both[1].kill()  # as the kernel does where memory runs out
    wait(cluster, "requeued job", lambda: state(cluster, job) == "PENDING", log)
    assert "to go on from the newest checkpoint" in log.read_text()
    end(cluster, job, log)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(
    cluster: dict[str, str], recipe: list[str], tmp_path: Path
) -> None:
    """The job goes on by itself on the nodes that are left, in another layout, with the samples of an undisturbed run,
    the steps since the last checkpoint once more."""
    out, undisturbed = tmp_path / "elastic", tmp_path / "undisturbed"
    log = Path(f"{out}.txt")
    auto = ["--parallel.zero_stage", "auto", "--batch.accumulation", "auto"]
    elastic = [*recipe, *auto, "--batch.images", "6", "--batch.texts", "6", "--batch.pairs", "6"]
    job = submit(cluster, [*elastic, "--checkpoint.every", "4"], out, "2-3")
    wait(cluster, "first checkpoint", (out / "checkpoints" / "latest").exists, log)
    assert "processes on each of 127.0.0.1 127.0.0.2 127.0.0.3" in log.read_text()
    kill_node(cluster, "127.0.0.3")  # first: one that lives would come back by itself
    slurm(cluster, "scontrol", "update", "NodeName=127.0.0.3", "State=DOWN", "Reason=test")
    restarted(cluster, job, log)
    wait(cluster, "end of the job", lambda: state(cluster, job) == "COMPLETED", log)
    output = log.read_text()
    assert "attempt 2: 1 processes on each of 127.0.0.1 127.0.0.2\n" in output, output
    assert [record["step"] for record in metrics(out)] == list(range(1, STEPS + 1))
    slurm(cluster, "srun", "--nodes=2", "--ntasks=2", "--overcommit", sys.executable, "launchers/pretrain.py", *elastic,
          "--out", str(undisturbed), timeout_s=200)  # fmt: skip
    ours, theirs = metrics(out), metrics(undisturbed)
    assert [record["sample_hash"] for record in ours] == [record["sample_hash"] for record in theirs]
    # Sums over three replicas and over two differ in their last bits; AdamW's first steps make more of that.
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=1e-4)
