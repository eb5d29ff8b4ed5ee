"""Between the engine's fragments and the checkpoint store."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from beit3_dist.checkpoint import store
from beit3_dist.command_line import to_yaml
from beit3_dist.config import TrainingConfig
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.fragments import create_optimizer_state, fragments, optimizer_state, refresh_parameters
from beit3_dist.parallel.sharding import sharded_dimension


def _pieces(engine: Engine) -> Iterator[store.Piece]:
    """What this rank holds, replicated parameters included."""
    mesh = engine.mesh
    for fragment in fragments(engine.model, engine.optimizer):
        moments = optimizer_state(engine.optimizer, fragment)
        tensors = {"": fragment.slice_of(fragment.flat.detach())} | {f"/{key}": view for key, view in moments.items()}
        dimension = sharded_dimension(fragment.name) if mesh.tensor > 1 else None
        cut = None if dimension is None else store.Cut(dimension, mesh.tensor_rank, mesh.tensor)
        yield store.Piece(fragment.name, engine.whole_shapes[fragment.name], fragment.start, tensors, cut)


def _contribution(engine: Engine) -> Iterator[store.Piece]:
    """What this rank saves, so that over all ranks every element is saved once."""
    mesh = engine.mesh
    if engine.zero_stage > 0 or mesh.data_rank == 0:  # at ZeRO-0 all replicas hold the same
        yield from (piece for piece in _pieces(engine) if piece.cut is not None or mesh.tensor_rank == 0)


def save_checkpoint(config: TrainingConfig, engine: Engine, state: store.TrainState) -> Path:
    """Saves everything that a run needs to go on. Collective."""
    versions = {name: version(name) for name in ("torch", "deepspeed", "beit3-dist")}
    return store.save(
        Path(config.out) / "checkpoints",
        _contribution(engine),
        state,
        config.model,
        to_yaml(config),
        versions,
        config.checkpoint.keep,
    )


def load_checkpoint(path: Path, engine: Engine, state: store.TrainState) -> None:
    """Fills the engine from a checkpoint of any layout. Collective."""
    held = list(fragments(engine.model, engine.optimizer))
    create_optimizer_state(engine.optimizer, held, state.step)
    store.load(path, _pieces(engine))
    refresh_parameters(engine.model, engine.optimizer, held, engine.groups.data)
