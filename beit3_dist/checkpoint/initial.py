"""What a run starts from: checked by one process, read by those that need it, a parameter at a time.

A checkpoint with an index is never read as a whole: neither its moments nor what other ranks hold, and what is read is
compared with its digests on the way. Other files, of which a program reads all or nothing, are kept until `values` are
given up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit3_dist.checkpoint.find import Damaged, checkpoint_of, damaged, read_index
from beit3_dist.checkpoint.fitting import PATCH, POSITIONS, check_whole
from beit3_dist.checkpoint.formats import fit_initial, read_initial_weights
from beit3_dist.checkpoint.model_folder import config_of
from beit3_dist.checkpoint.read import StoredShards
from beit3_dist.checkpoint.tensor_index import TensorIndex
from beit3_dist.config import ModelConfig
from beit3_dist.looking import of_node, of_run
from beit3_dist.opening import blaming, read_json
from beit3_dist.weights import require_finite


class UnreadableWeights(ValueError):
    """What a run was to start from is not what was saved."""


class InitialWeights:
    """Values of a run's parameters by name, float32 on the CPU: `name in weights`, `weights[name]`."""

    def __init__(self, paths: str | Sequence[str], config: ModelConfig, shapes: Mapping[str, torch.Size]) -> None:
        """`init_from` for the parameters in `shapes`, as `formats.read_initial_weights` takes it: one process checks it
        for all. Raises ValueError with one line that names init_from and the file."""
        self._config, self._shapes = config, shapes
        self._read: dict[Path, Mapping[str, Tensor]] = {}
        plans = of_run(lambda: [self._look(Path(path)) for path in ([paths] if isinstance(paths, str) else paths)])
        self._paths = [Path(plan["path"]) for plan in plans]
        self._indexed = {
            path: _Indexed(path, **plan["fitted"])
            for path, plan in zip(self._paths, plans, strict=True)
            if "fitted" in plan
        }
        self._source: dict[str, Path] = {}
        """Parameter -> the first source that has it."""
        for path, plan in zip(self._paths, plans, strict=True):
            for name in plan["fitted"]["sources"] if "fitted" in plan else plan["names"]:
                self._source.setdefault(name, path)
        with blaming("init_from", OSError):
            of_node(lambda: _see(self._paths))

    def _look(self, path: Path) -> dict[str, Any]:
        """Where the values of a source lie, and which there are."""
        with blaming("init_from", OSError):
            path = checkpoint_of(path)
            if (index := read_index(path)) is not None:
                return {"path": str(path), "fitted": _fitted(path, index, self._config, self._shapes)}
        self._read[path] = read_initial_weights(path, self._config, self._shapes)
        return {"path": str(path), "names": list(self._read[path])}

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def __getitem__(self, name: str) -> Tensor:
        """Raises UnreadableWeights where it is not what was saved, or not finite."""
        path = self._source[name]
        try:
            if path in self._indexed:
                return self._indexed[path][name]
            if path not in self._read:
                self._read[path] = read_initial_weights(path, self._config, self._shapes)
            return self._read[path][name]
        except (ValueError, OSError) as error:
            raise UnreadableWeights(f"init_from: {error}") from error


@dataclass
class _Indexed:
    """The weights of a checkpoint, read when they are asked for."""

    path: Path
    suffix: str
    """Of the weights' stored names."""
    sources: dict[str, str]
    """Parameter -> what it is called there."""
    made: dict[str, bytes]
    """Float32 values of those that are computed from what is there."""
    shapes: dict[str, list[int]]
    """Their shapes."""

    @cached_property
    def shards(self) -> StoredShards:
        return StoredShards(self.path, read_index(self.path), checked=True)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.made:
            return torch.from_numpy(np.frombuffer(self.made[name], "<f4").copy()).view(self.shapes[name])
        value = self.shards.whole(self.sources[name], self.suffix)
        require_finite([(name, value)], str(self.path))
        return value


def _fitted(path: Path, index: TensorIndex, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """What of a checkpoint goes where, found without its values: from their shapes. Raises ValueError where it is
    damaged, or another model's."""
    if damage := damaged(path):
        raise Damaged(damage)
    with blaming(f"{path / 'state.json'} describes no model of this version", TypeError):
        theirs = config_of(read_json(path / "state.json").get("model"))
    shards = StoredShards(path, index, checked=True)
    suffix = shards.of_weights(averaged=True)
    there = {name: torch.empty(shards.shape(name), device="meta") for name in shards.parameters}
    for name in {POSITIONS, PATCH} & there.keys():  # which may have to be interpolated
        there[name] = shards.whole(name, suffix)
    with blaming(str(path)):
        check_whole(there, theirs)
    names = {id(value): name for name, value in there.items()}
    fitted = fit_initial(there, theirs, config, shapes, str(path))
    made = {name: value for name, value in fitted.items() if id(value) not in names}
    return {
        "suffix": suffix,
        "sources": {name: names.get(id(value), "") for name, value in fitted.items()},
        "made": {name: value.contiguous().numpy().tobytes() for name, value in made.items()},
        "shapes": {name: list(value.shape) for name, value in made.items()},
    }


def _see(paths: list[Path]) -> None:
    """Raises OSError where this node does not see what the first one has looked at."""
    for path in paths:
        (path / "manifest.json" if (path / "manifest.json").is_file() else path).stat()
