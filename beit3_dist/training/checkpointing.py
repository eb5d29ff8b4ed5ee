"""Between the engine's fragments and the checkpoint store."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from beit3_dist.checkpoint import store
from beit3_dist.command_line import to_yaml
from beit3_dist.config import RunConfig
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.fragments import create_optimizer_state, fragments, optimizer_state, refresh_parameters


def _pieces(engine: Engine) -> Iterator[store.Piece]:
    for fragment in fragments(engine.model, engine.optimizer):
        moments = optimizer_state(engine.optimizer, fragment)
        tensors = {"": fragment.slice_of(fragment.flat.detach())} | {f"/{key}": view for key, view in moments.items()}
        yield store.Piece(fragment.name, fragment.shape, fragment.start, tensors)


def save_checkpoint(config: RunConfig, engine: Engine, state: store.TrainState) -> Path:
    """Saves everything that a run needs to go on. Collective."""
    pieces = _pieces(engine) if engine.owns_state else ()
    versions = {name: version(name) for name in ("torch", "deepspeed", "beit3-dist")}
    return store.save(
        Path(config.out) / "checkpoints", pieces, state, config.model, to_yaml(config), versions, config.checkpoint.keep
    )


def load_checkpoint(path: Path, engine: Engine, state: store.TrainState) -> None:
    """Fills the engine from a checkpoint of any ZeRO stage and number of data-parallel ranks. Collective."""
    held = list(fragments(engine.model, engine.optimizer))
    create_optimizer_state(engine.optimizer, held, state.step)
    store.load(path, _pieces(engine))
    refresh_parameters(engine.model, engine.optimizer, held)
