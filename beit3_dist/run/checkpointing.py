"""What a run does with the checkpoint store: finds where to go on, loads, and saves while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor

import beit3_dist
from beit3_dist.checkpoint import read
from beit3_dist.checkpoint.find import find, newest_whole, read_state, verified
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.store import SavingFailed, Store, TrainState, checkpoints, step_of
from beit3_dist.command_line import to_yaml
from beit3_dist.config import JobConfig, require
from beit3_dist.looking import of_node, of_run
from beit3_dist.model.cut import cut_for
from beit3_dist.opening import blaming, check_writable
from beit3_dist.optimizers.registry import described
from beit3_dist.parallel.fragments import (
    Fragment,
    create_optimizer_state,
    fragments,
    inner_optimizer,
    optimizer_state,
    refresh_parameters,
)
from beit3_dist.parallel.mesh import Groups, Mesh
from beit3_dist.run.callbacks import Callbacks
from beit3_dist.run.endings import AskedToGo, RunStopped
from beit3_dist.run.folder import RunFolder


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """Saves a run beside its training. Every method is collective, and raises RunStopped, on all ranks at the same
    step, where a checkpoint cannot be written.

    At the end of the context the last checkpoint is whole. So it is where the run stops itself, which all ranks do, the
    samples that it ends for being in the quarantine; and where it was asked to go, which ends the context without an
    error after one more checkpoint, if a step is new. After any other error the other ranks may be gone, and a
    checkpoint on its way is left unfinished.

    state: of the run, after its last step; it begins as it is in `origin`, the checkpoint that the run goes on from
    (None: a new run).
    shards: what this rank contributes, at the moment of the call.
    export: writes what else is to lie there before a checkpoint is whole: once the last one is, nobody goes on from it.
    Completes `state`, too.
    on_save: called on the first rank with each whole checkpoint.
    """

    def __init__(
        self,
        config: JobConfig,
        run: RunFolder,
        mesh: Mesh,
        state: TrainState,
        origin: Path | None,
        shards: Callable[[], Iterable[Shard]],
        export: Callable[[], None],
        on_save: Callable[[Path], None],
    ) -> None:
        self._config, self._run, self._state, self._versions = config, run, state, _versions()
        self._shards, self._export = shards, export
        self._origin, self._start = origin, state.step
        settings = config.checkpoint
        keep = settings.keep, settings.keep_every
        self._store = Store(run.folder / "checkpoints", mesh.device, *keep, state.step, on_save)
        self._newest = state.step
        """The step that was saved last."""

    def save(self) -> None:
        """Begins to save everything that the run needs to go on after the last step, its records first: whoever goes on
        from there never writes them again."""
        self._export()
        self._run.sync()
        with _ending_the_run():
            self._store.save(self._shards(), self._state, self._config.model, to_yaml(self._config), self._versions)
        self._newest = self._state.step

    def check(self) -> None:
        """After every step that does not save: finishes a checkpoint that is on its way, without waiting for it."""
        self._store.vouch(self._state)
        with _ending_the_run():
            self._store.check()

    def last_good(self) -> Path | None:
        """The newest whole checkpoint that a finite step has followed, so that training goes on from it; None where
        there is none."""
        self.wait()
        self._store.vouch(self._state)
        good = [(step_of(path), path) for path in self._store.good()]
        if self._origin is not None and self._start < self._state.last_finite:
            good.append((self._start, self._origin))  # which may lie in another run's folder
        return newest_whole(path for _, path in sorted(good))

    def wait(self) -> None:
        with _ending_the_run():
            self._store.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, RunStopped):
            self._run.quarantine(self._state.step + 1, error.faults)
            self._run.sync()
        elif isinstance(error, AskedToGo) and self._state.step > self._newest:
            self.save()
        if error is None or isinstance(error, RunStopped | AskedToGo):
            self.wait()
        return isinstance(error, AskedToGo)


@contextmanager
def _ending_the_run() -> Iterator[None]:
    try:
        yield
    except SavingFailed as failure:
        raise RunStopped(str(failure)) from failure


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "beit3-dist": beit3_dist.__version__}


@dataclass
class ReadyToTrain:
    """What every run starts from, checked and opened before any process group."""

    config: Any
    mesh: Mesh
    state: TrainState
    """Where the run goes on."""
    checkpoint: Path | None
    """The checkpoint that holds its weights; None: a new run."""


def starting_point(config: JobConfig, trains: bool = True) -> tuple[Path | None, TrainState]:
    """The checkpoint that `checkpoint.resume` means (None: a new run) and the state to go on from.

    Raises ValueError where a new run would write into the folder of another one, where it cannot write into its own,
    where a run that `trains` has no step left, or where there is none of its callbacks.
    """
    out = Path(config.out)

    def look() -> dict[str, Any] | None:
        """The checkpoint and its state."""
        checkpoint = find(config.checkpoint.resume, out / "checkpoints")
        require(
            config.checkpoint.resume != "none" or not (out / "metrics.jsonl").exists(),
            f"out: {out} already holds a run; pass --checkpoint.resume auto to go on with it, or choose another folder",
        )
        state = read_state(checkpoint, config.model, _may_differ(config)) if checkpoint else TrainState()
        require(
            state.step < config.steps or not trains,
            f"steps={config.steps}: {checkpoint} has already taken {state.step} steps",
        )
        return {"path": str(checkpoint), "state": asdict(state)} if checkpoint else None

    found = of_run(look)
    of_node(lambda: _check_node(out, config.checkpoint.resume, found["path"] if found else None))
    Callbacks(config.callbacks)
    return (Path(found["path"]), TrainState(**found["state"])) if found else (None, TrainState())


def _check_node(out: Path, resume: str, found: str | None) -> None:
    """Raises ValueError where this node can neither write into `out` nor make it, or does not see what the first one
    has `found` there."""
    with blaming("out"):
        check_writable(out)
    here = found if found is None or Path(found, "manifest.json").is_file() else None
    if found is None and resume == "auto":
        here = next(map(str, checkpoints(out / "checkpoints").values()), None)
    require(
        here == found,
        f"checkpoint.resume: rank 0 finds {found}, this node {here}: `out` must be on a file system that all share",
    )


def whole_checkpoint(config: JobConfig, checkpoint: Path | None, state: TrainState) -> tuple[Path | None, TrainState]:
    """What a run goes on from: the checkpoint that was found and its state, or, where the content of a file is damaged
    and `checkpoint.resume` is auto, the newest whole one before it. Collective; raises Damaged on all ranks."""
    whole = verified(checkpoint, config.checkpoint.resume, Path(config.out) / "checkpoints")
    if whole is None or whole == checkpoint:
        return whole, state
    found = read_state(whole, config.model, _may_differ(config))
    return whole, replace(found, sources=state.sources)  # as checked at the beginning


def _may_differ(config: JobConfig) -> tuple[str, ...]:
    """Fields of the network in which it may be another than the checkpoint's."""
    return ("image_size",) if config.checkpoint.other_resolution else ()


class SavedEngine(Protocol):
    """What checkpoints need to know of an engine: parallel.engine's or the image tokenizer's."""

    mesh: Mesh
    groups: Groups
    model: Any
    optimizer: Any
    whole_shapes: dict[str, torch.Size]
    """Shapes of the whole model's parameters."""
    cuts: dict[str, int]
    """How tensor ranks cut them; see `model.cut`."""
    zero_stage: int


More = Callable[[Fragment], dict[str, Tensor]]
"""What a job keeps of a fragment beside weights and moments: suffix of the parameter's name -> view, 1-D."""


def _shards(engine: SavedEngine, more: More | None) -> Iterator[Shard]:
    """What this rank holds, replicated parameters included."""
    mesh, held = engine.mesh, list(fragments(engine.model, engine.optimizer))
    create_optimizer_state(engine.optimizer, held, 0)  # there is none yet where every step so far was skipped
    for fragment in held:
        moments = optimizer_state(engine.optimizer, fragment)
        tensors = {"": fragment.slice_of(fragment.flat.detach())} | {f"/{key}": view for key, view in moments.items()}
        tensors |= more(fragment) if more else {}
        cut = cut_for(engine.cuts, fragment.name, mesh.tensor_rank, mesh.tensor)
        yield Shard(fragment.name, engine.whole_shapes[fragment.name], fragment.start, tensors, cut)


def contribution(engine: SavedEngine, more: More | None = None) -> Iterator[Shard]:
    """What this rank saves, so that over all ranks every element is saved once."""
    mesh = engine.mesh
    if engine.zero_stage > 0 or mesh.data_rank == 0:  # at ZeRO-0 all replicas hold the same
        yield from (shard for shard in _shards(engine, more) if shard.cut is not None or mesh.tensor_rank == 0)


def load_checkpoint(path: Path, engine: SavedEngine, state: TrainState, more: More | None = None) -> None:
    """Fills the engine from a checkpoint of any layout. Collective."""
    held = list(fragments(engine.model, engine.optimizer))
    create_optimizer_state(engine.optimizer, held, state.step - state.skipped_steps)
    positive = described(inner_optimizer(engine.optimizer)).positive
    read.load(path, _shards(engine, more), {f"/{moment}" for moment in positive})
    refresh_parameters(engine.model, engine.optimizer, held, engine.groups.data)
