"""SIGKILL at random moments of two processes that do nothing but save: what `latest` names always loads."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from beit3_dist.checkpoint.find import damaged, find, read_manifest, read_state, wrong_digests
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.store import Store, TrainState
from tests.parallel.workers import PRELOAD
from tests.unit.small_checkpoints import MODEL

KILLS = 30
ELEMENTS = 1 << 18
"""Elements of the parameter, 1 MiB, of which each process saves half."""


def save_for_ever(rank: int, folder: str, meeting: str, step: int) -> None:
    """One of two ranks: a checkpoint after every step, full of the step's number."""
    torch.set_num_threads(1)
    group = dist.FileStore(meeting, 2)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    to = Store(Path(folder), torch.device("cpu"), keep=2, keep_every=7, start=step)
    half, start = ELEMENTS // 2, rank * (ELEMENTS // 2)
    while True:
        step += 1
        values = {suffix: torch.full((half,), float(step)) for suffix in ("", "/exp_avg", "/exp_avg_sq")}
        to.save([Shard("w", (ELEMENTS,), start, values)], TrainState(step=step), MODEL, "", {})
        for _ in range(step % 4):  # sometimes the next save finds the former one on its way
            to.vouch(TrainState(step=step + 1))
            to.check()
            time.sleep(0.002)


def start(folder: Path, meeting: Path, step: int) -> list[BaseProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes: list[BaseProcess] = []
    for rank in range(2):
        processes.append(context.Process(target=save_for_ever, args=(rank, str(folder), str(meeting), step)))
        processes[-1].daemon = True
        processes[-1].start()
    return processes


def assert_loads(path: Path) -> int:
    """The checkpoint's step, which all its values are."""
    assert damaged(path) == "" and wrong_digests(path, read_manifest(path)) == []
    step = read_state(path, MODEL).step
    assert path.name == f"step_{step:07d}"
    assert torch.equal(read_weights(path)["w"], torch.full((ELEMENTS,), float(step)))
    return step


@pytest.mark.slow
def test_latest_always_loads(tmp_path: Path) -> None:
    """Every third time the run has gone back some steps, over checkpoints that it saves anew."""
    rng, folder = random.Random(0), tmp_path / "checkpoints"
    latest, newest, seen, moments = folder / "latest", 0, [], []
    for kill in range(KILLS):
        processes = start(folder, tmp_path / f"meeting-{kill}", max(0, newest - 2 * (kill % 3 == 0)))
        deadline = time.monotonic() + 120
        for _ in range(1 + (kill % 3 == 1)):  # a busy machine saves no more than it is waited for
            before = latest.stat().st_mtime_ns if latest.exists() else 0
            while not latest.exists() or latest.stat().st_mtime_ns == before:
                assert all(p.is_alive() for p in processes) and time.monotonic() < deadline
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        rng.shuffle(processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

        step = assert_loads(folder / latest.read_text().strip())
        found = find("auto", folder)
        assert found is not None
        newest = assert_loads(found)
        assert newest >= step
        seen.append(newest)
        moments.append(sorted(p.name for p in next(iter(folder.glob("*.partial")), Path("nothing")).glob("*")))
    print(json.dumps({"newest": seen, "left": moments}))
    assert len(set(seen)) > KILLS / 2, f"hardly anything was saved: {seen}"
    unfinished = [left for left in moments if left]
    assert len(unfinished) > KILLS / 4, f"hardly a kill hit a checkpoint on its way: {moments}"
