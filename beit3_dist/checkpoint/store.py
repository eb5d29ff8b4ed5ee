"""Sharded checkpoints that are whole or absent, written while the training goes on.

    checkpoints/step_0000100/
        state.json                step, samples consumed, model, versions
        config.yaml               the resolved config of the run
        shard_00000.safetensors   shards of one rank: master weights NAME, moments NAME/exp_avg, ...
        tensors.json              which of these files holds what, and digests of their pieces (`tensor_index`)
        manifest.json             size and SHA-256 of every file above; written last
    checkpoints/latest            name of the newest checkpoint

A shard is elements of a flattened parameter, or of its part on a tensor rank, under its canonical name; its place
stands in the file's header (`fragments`). So a checkpoint loads in any layout: at another number of data-parallel or
tensor ranks, at another ZeRO stage. It is written in a folder named `*.partial`, which is renamed when every file of
every rank is synced; `latest` follows. Generators have no state in this project: what is drawn is a function of the
seed, which config.yaml holds, and of the samples consumed.

Training waits only for a copy to host memory. A thread of each rank writes its file; when all have, a thread of the
first rank makes the checkpoint whole. The threads do not communicate: the ranks agree on how far they are at the
boundaries of training steps.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from beit3_dist.checkpoint.files import as_json, sync, write_hashed, write_text
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.snapshot import Snapshot
from beit3_dist.checkpoint.tensor_index import INDEX, Held, index_text, runs_of
from beit3_dist.gathering import gather_objects, gather_to_first

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 1
INDEX_OF, INDEX_ENTRY = "state.json", "index"
"""Where the manifest has the entry of the index: in that of this file, under this name."""
LATEST = "latest"
"""File in a folder of checkpoints that holds the newest one's name."""

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What a run has to remember beside weights and moments."""

    step: int = 0
    """Optimizer steps taken."""
    consumed: dict[str, int] = field(default_factory=dict)
    """Stream -> samples consumed of it; a stream that is not named has none consumed."""
    bad_samples: int = 0
    """Samples that had to be replaced so far."""
    skipped_steps: int = 0
    """Steps that changed nothing, because their loss or gradient was not finite: the optimizer has not counted them."""
    skipped_in_a_row: int = 0
    """Those of them that no other step has followed yet."""
    readers: list[list[int]] = field(default_factory=list)
    """Where the virtual readers of streams without random access stand: `streaming.Row` of each."""
    sources: dict[str, Any] = field(default_factory=dict)
    """What the order of the samples depends on, by field of the config; empty in checkpoints of former versions."""

    @property
    def last_finite(self) -> int:
        """The last step that was not skipped; 0: none. It shows that the weights which it has met are good."""
        return self.step - self.skipped_in_a_row

    def advance(self, samples: Mapping[str, int], replaced: int, skipped: bool = False) -> None:
        """Counts one more step of so many `samples` of each stream."""
        self.consumed = self.consumed | {name: self.consumed.get(name, 0) + more for name, more in samples.items()}
        self.step += 1
        self.bad_samples += replaced
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


def step_name(step: int) -> str:
    return f"step_{step:07d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint is called after."""
    return int(path.name.removeprefix("step_"))


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint of a folder, the oldest first; finished ones only, which may have been damaged since."""
    paths = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return dict(sorted((step_of(path), path) for path in paths))


class SavingFailed(RuntimeError):
    """A checkpoint could not be written. What was saved before and the training are as they were."""


@dataclass
class _Written:
    """Files of a checkpoint."""

    entries: dict[str, dict[str, Any]]
    """Of the manifest, by name of the file."""
    pieces: dict[str, list[str]]
    """File of shards -> digests of its pieces."""

    @classmethod
    def of_all(cls, parts: list[_Written]) -> _Written:
        entries, pieces = (
            {k: v for part in parts for k, v in vars(part)[name].items()} for name in ("entries", "pieces")
        )
        return cls(entries, pieces)


@dataclass
class _Saving:
    """A checkpoint on its way."""

    step: int
    started: float
    """Of the clock, when it was begun."""
    pause_s: float
    """Seconds that the training stood still."""
    task: Future[Any]
    """Writes this rank's shards; afterwards, on the first rank, makes the checkpoint whole."""
    shards_written: bool = False


class Store:
    """Writes a run's checkpoints. Every method is collective and communicates in the calling thread.

    keep: newest good checkpoints that stay; 0: all. keep_every: multiples of so many steps stay for ever; 0: none.
    start: the step that the run goes on after.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        keep: int,
        keep_every: int,
        start: int,
        on_save: Callable[[Path], None] = lambda checkpoint: None,
    ) -> None:
        """`on_save`: called on the first rank with each checkpoint that has become whole."""
        self._folder, self._device = folder, device
        self._keep, self._keep_every, self._on_save = keep, keep_every, on_save
        self._newest = start
        """Step of the run's newest checkpoint: later ones come from before the run went back behind them."""
        self._last_finite = 0
        """See `TrainState.last_finite`."""
        self._prunes = False
        """Whether older checkpoints wait for the newest one to prove good."""
        self._is_first = dist.get_rank() == 0
        self._file = f"shard_{dist.get_rank():05d}.safetensors"
        self._snapshot = Snapshot(device)
        self._told: list[Held] | None = None
        """What the first rank knows that this rank's file holds."""
        self._held: dict[int, list[Held]] = {}
        """On the first rank: what each rank's file holds."""
        # Handing a task to a waiting thread takes no time; the start of a new one waits for Python's lock.
        self._thread = ThreadPoolExecutor(1)
        self._saving: _Saving | None = None
        if self._is_first:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_partial()  # what a run that was killed has left
        dist.barrier()

    def save(
        self,
        shards: Iterable[Shard],
        state: TrainState,
        model: DataclassInstance,
        config_yaml: str,
        versions: dict[str, str],
    ) -> None:
        """Begins a checkpoint `step_NNNNNNN`, after the former one is finished; returns when all may change again.

        `shards`: what this rank contributes; over all ranks every element once. Raises SavingFailed for the former.
        """
        started = time.perf_counter()
        self.wait()
        self._last_finite = state.last_finite
        self._snapshot.take(shards)
        content = {"format": FORMAT, **asdict(state), "model": asdict(model), "versions": versions}
        partial = self._partial(state.step)

        def write() -> _Written:
            partial.mkdir(parents=True, exist_ok=True)
            entry, pieces = self._snapshot.write(partial / self._file)
            entries = {self._file: entry}
            for name, text in {"state.json": as_json(content), "config.yaml": config_yaml}.items():
                if self._is_first:
                    entries[name] = write_hashed(partial / name, [text.encode()])
            return _Written(entries, {self._file: pieces})

        task = self._thread.submit(write)
        self._saving = _Saving(state.step, started, time.perf_counter() - started, task)

    def vouch(self, state: TrainState) -> None:
        """At the boundary of a step: that it was finite shows that the weights before it are good, and a good
        checkpoint lets older ones go."""
        self._last_finite = state.last_finite
        if self._prunes and self._saving is None and self._newest < self._last_finite:
            self._prunes = False
            if self._is_first:
                self._thread.submit(self._prune)

    def good(self) -> list[Path]:
        """The run's checkpoints that a finite step has followed, the oldest first. An error that destroys the weights
        shows in the steps after it, and so in none of these."""
        last = min(self._newest, self._last_finite - 1)
        return [path for step, path in checkpoints(self._folder).items() if step <= last]

    def check(self) -> None:
        """At the boundary of a step: does what is due for a checkpoint on its way, without waiting for it.

        Raises SavingFailed on every rank if any could not write.
        """
        if self._saving is None:
            return
        task = self._saving.task
        busy = not task.done()
        flags = torch.tensor([busy, not busy and task.exception() is not None], dtype=torch.int32, device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        someone_busy, someone_failed = flags.tolist()
        if someone_failed:
            self._fail(self._saving)
        elif not someone_busy:
            self._go_on(self._saving)

    def wait(self) -> None:
        """Returns when no checkpoint is on its way any more. Raises SavingFailed as `check` does."""
        while self._saving is not None:
            wait([self._saving.task])
            self.check()

    def _go_on(self, saving: _Saving) -> None:
        """All ranks have done what they had to."""
        if saving.shards_written:
            self._saving, self._newest, self._prunes = None, saving.step, True
            if self._is_first:
                self._on_save(self._folder / step_name(saving.step))
            return
        # What a file holds is the same at every save, and a thousand times more than its entry.
        changed, self._told = (
            self._snapshot.held if self._told is not self._snapshot.held else None,
            self._snapshot.held,
        )
        everyones = gather_to_first((saving.task.result(), changed))
        self._held |= {rank: held for rank, (_, held) in enumerate(everyones) if held is not None}
        written = _Written.of_all([written for written, _ in everyones])
        saving.shards_written = True
        saving.task = self._thread.submit(lambda: self._finish(saving, written) if self._is_first else None)

    def _finish(self, saving: _Saving, written: _Written) -> None:
        """Makes the checkpoint whole, points `latest` to it and removes what is not kept."""
        partial, final = self._partial(saving.step), self._folder / step_name(saving.step)
        entries = written.entries
        index = index_text(runs_of(sorted(self._held.items())), written.pieces)
        entries[INDEX_OF][INDEX_ENTRY] = write_hashed(partial / INDEX, [index.encode()])
        write_hashed(partial / "manifest.json", [as_json(entries).encode()])
        sync(partial)
        self._make_way(saving.step)
        partial.rename(final)
        sync(self._folder)
        write_text(self._folder / LATEST, final.name + "\n")
        self._remove_partial()
        self._prune()
        log.info(
            "%s: %.1f MB saved; the training stood still for %.3f s, the rest took %.3f s beside it",
            final,
            sum(entry["bytes"] for entry in entries.values()) / 1e6,
            saving.pause_s,
            time.perf_counter() - saving.started - saving.pause_s,
        )

    def _fail(self, saving: _Saving) -> None:
        error = saving.task.exception()  # waits for the end of what this rank writes
        if error is not None:
            log.error("%s could not be written", step_name(saving.step), exc_info=error)
        everyones = gather_objects(_in_words(error, self._partial(saving.step) / self._file))
        self._saving = None
        if self._is_first:
            shutil.rmtree(self._partial(saving.step), ignore_errors=True)
        dist.barrier()
        last = next(reversed(checkpoints(self._folder).values()), "none")
        reasons = [f"rank {rank}: {words}" for rank, words in enumerate(everyones) if words]
        raise SavingFailed(
            f"the checkpoint of step {saving.step} could not be written ({'; '.join(reasons[:3])}); "
            f"the last whole one is {last}: make room or repair the disk, then go on with --checkpoint.resume auto"
        )

    def _make_way(self, step: int) -> None:
        """Moves checkpoints aside that are later than the run's own, or of this step: they come from before the run
        went back to an older step, and nothing shall go on from them by accident. `latest` names a whole checkpoint
        all the while."""
        present, own = checkpoints(self._folder), min(self._newest, step - 1)
        ahead, before = ([s for s in present if (s > own) is late] for late in (True, False))
        if ahead and before:
            write_text(self._folder / LATEST, present[before[-1]].name + "\n")
        for path in (present[s] for s in ahead):
            aside = path.with_name(f"abandoned_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def _prune(self) -> None:
        """Removes what is older than the newest good ones and not kept for ever; renamed first, so that no half
        remains. While no step shows that a checkpoint is good, it lets no other one go."""
        present, last_finite = checkpoints(self._folder), self._last_finite
        good = [step for step in present if step < last_finite]
        for step in good[: -self._keep] if self._keep else []:
            if not self._keep_every or step % self._keep_every:
                with _tried_again(self._partial(step)):
                    shutil.rmtree(present[step].rename(self._partial(step)))

    def _remove_partial(self) -> None:
        """Removes all `*.partial`, none of which is being written now."""
        for path in self._folder.glob("step_*.partial"):
            with _tried_again(path):
                shutil.rmtree(path)

    def _partial(self, step: int) -> Path:
        return self._folder / f"{step_name(step)}.partial"


@contextmanager
def _tried_again(path: Path) -> Iterator[None]:
    """What the disk refuses to remove costs room, not the run: the new checkpoint is whole already. NFS, for one, keeps
    a folder until the last process has closed the last file in it."""
    try:
        yield
    except OSError as error:
        log.warning("%s could not be removed (%s); tried again with the next checkpoint", path, error)


def _in_words(error: BaseException | None, path: Path) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or path}: {error.strerror}"
    return f"{path}: {error!r}" if error else ""
