"""Files of weights from elsewhere, opened in one place: torch's, TorchScript's and safetensors'.

Only tensors and plain values are made from them. Sizes are checked against the file before memory is allocated, and
weights that are not finite are refused before anything is computed with them.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit3_dist.config import require
from beit3_dist.opening import regular_size

HOLDERS = ("state_dict", "model", "module", "teacher")
"""Where training programs keep the weights in their files."""
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
"""What DataParallel puts before a name, and torch.compile before each module's part of it."""
UNPACKED = 1 << 28
"""Bytes (256 MiB) by which an archive may be larger unpacked: torch compresses nothing, TorchScript only its code."""


class Ignored:
    """Stands in for what a training program has saved beside the weights and nobody needs: it takes anything, and does
    nothing. torch makes it in place of an object of the file's own class, so that numpy is handed no bytes from there.
    """

    def __init__(self, *parts: Any) -> None:
        """Takes whatever the object was made from."""

    def __setstate__(self, state: Any) -> None:
        """Takes whatever it held."""


IGNORED = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
)
"""Classes in the files of unilm's and others' training: numpy's, of learning rates and random states, and paths of the
command line. The command line's own object, argparse.Namespace, is harmless and is made as it is."""


def read_weights_file(path: str | os.PathLike[str], torchscript: bool = False) -> Any:
    """What a file of weights holds. `torchscript`: TorchScript archives too, whose code may run.

    Raises OSError where there is no regular file, ValueError for one that holds other things.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    size = regular_size(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        if "constants.pkl" in _records(path, size) and torchscript:
            # TorchScript has a reader of its own, which makes no Python objects.
            return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        with torch.serialization.safe_globals([argparse.Namespace, *((Ignored, name) for name in IGNORED)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise nearly anything, torch's with advice that opens the file to attacks
        reason = str(error) if isinstance(error, _TooLarge | SafetensorError) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a file of tensors ({reason}): it is damaged, or holds other things than weights"
        ) from error


class _TooLarge(Exception):
    """What an archive would unpack to is out of proportion."""


def _records(path: Path, size: int) -> set[str]:
    """Names in the archive that torch makes of weights, without its folder; none of a file of its former format."""
    if not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > size + UNPACKED:
            raise _TooLarge("its records would be larger than the file")
        return {name.partition("/")[2] for name in archive.namelist()}


def state_dict_in(content: Any, source: str) -> dict[str, Tensor]:
    """The tensors by name at the top of a file or under one of HOLDERS, without what a wrapper put before the names.

    Raises ValueError where there are none, or one that has more elements than the file gave it.
    """
    for name in HOLDERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = [item for item in content.items() if isinstance(item[1], Tensor)] if isinstance(content, Mapping) else []
    require(bool(tensors), f"{source} is not a state dict: it has no tensors by name, at the top or under `model`")
    state: dict[str, Tensor] = {}
    for key, tensor in tensors:
        name = WRAPPERS.sub("", str(key))
        require(name not in state, f"{source} has {name} twice, with and without a wrapper's prefix")
        held = tensor.untyped_storage().nbytes() if tensor.layout is torch.strided and not tensor.is_meta else 0
        if tensor.numel() * tensor.itemsize > held:
            raise ValueError(f"{source}: {name} has more elements than the file holds of it")
        state[name] = tensor
    return state


def require_finite(weights: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raises ValueError naming the first tensor that is not finite in float32: whatever is computed with it is worth
    nothing, and may not look it."""
    limit = torch.finfo(torch.float32).max
    for name, values in weights:
        if values.is_floating_point() and values.numel():
            numbers = values.detach().float() if values.itemsize == 1 else values.detach()
            least, most = (float(value) for value in numbers.aminmax())  # a NaN is both
            if not (-limit <= least and most <= limit):
                raise ValueError(
                    f"{source}: {name} is not finite (its values lie between {least:g} and {most:g}): it comes from a "
                    "training that failed, or the file is damaged"
                )
