"""One run at a time in OUT."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from beit3_dist.config import JobConfig, require
from beit3_dist.run.checkpointing import starting_point
from beit3_dist.run.endings import FolderInUse, Preempted, RunStopped

WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""The errors of a file system without locks, such as Lustre mounted without `flock`."""

LEASE_S = 180.0
"""Seconds after which a file server has released the locks of a node that has died (NFS: 90)."""

log = logging.getLogger(__name__)


class RunLock(AbstractContextManager["RunLock"]):
    """The first process's hold on OUT, by a lock on OUT/run.lock, which says who has it.

    Two runs in one folder would remove each other's checkpoints and cut back each other's records. The lock ends with
    its process, however that ends, so that a run which is started again gets it at once; where the node itself has
    died, as soon as the file server notices. It is a POSIX lock, as every lock on NFS is: forked loader processes,
    which may outlive the first process for a while, do not hold it.

    The lock is released at the end of the context; after an unexpected error only with the end of the process, whose
    threads may write until then.
    """

    def __init__(self, config: JobConfig, checkpoint: Path | None) -> None:
        """`checkpoint`: what the run has found to go on from. Collective. Raises FolderInUse on all ranks where
        another run has the folder, or has had it since."""
        self._file = -1
        mistake = [""]
        if dist.get_rank() == 0:
            try:
                self._take(config, checkpoint)
            except (ValueError, OSError) as error:
                self._give_back()
                mistake = [str(error) if isinstance(error, ValueError) else f"out: {error}"]
        dist.broadcast_object_list(mistake)
        if mistake[0]:
            raise FolderInUse(mistake[0])

    def _take(self, config: JobConfig, checkpoint: Path | None) -> None:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        self._file = os.open(out / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        restarted = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        try:
            while not _locked(self._file):
                in_use = f"out: {out} is in use by {_holder(self._file)}"
                require(bool(restarted), f"{in_use}: wait for its end, or end it")
                log.warning("%s; this job was put back into the queue, so that it waits for a while", in_use)
                time.sleep(LEASE_S)
                restarted = False
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            log.warning("out: %s is on a file system without locks: nothing keeps a second run out of it", out)
        me = {"job": os.environ.get("SLURM_JOB_ID"), "host": socket.gethostname(), "pid": os.getpid()}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, (json.dumps(me) + "\n").encode(), 0)
        if starting_point(config, trains=False)[0] != checkpoint:
            raise ValueError(f"out: another run has saved a checkpoint in {out} while this one started: start it again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (RunStopped, Preempted)):
            self._give_back()

    def _give_back(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _locked(file: int) -> bool:
    """Takes the lock; False where another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def _holder(file: int) -> str:
    """Who has the lock, as far as its file says."""
    try:
        holder = json.loads(os.pread(file, 1000, 0))
        job = f"job {holder['job']}" if holder["job"] else f"process {holder['pid']}"
        return f"{job} on host {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
