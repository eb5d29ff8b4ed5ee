"""Counts where the host waits for the device: by torch's own debug mode on a GPU. On the CPU, where nothing waits, by
following the tensors that would lie on a device: those that were brought there, and whatever is computed of them."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beit3_dist.model import token_layout
from tests.device import ON_GPU

READ = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount")
"""Operations whose result, or its shape, the host has to know."""
TO_HOST = ("cpu", "tolist", "numpy", "item")
"""Methods that bring a tensor to the host."""
HOUSES = ("/beit3_dist/", "/deepspeed/")


def place() -> str:
    """The innermost function of ours, else of DeepSpeed, that runs."""
    for house in HOUSES:
        for frame in reversed(traceback.extract_stack()):
            if house in frame.filename:
                return f"{frame.filename.partition(house)[2]}:{frame.name}"
    return "elsewhere"


@contextmanager
def waits(on_device: list[Tensor]) -> Iterator[Counter[str]]:
    """Where the host waited, and how often. `on_device`: what lies there from the beginning."""
    counted: Counter[str] = Counter()
    with _of_cuda(counted) if ON_GPU else _of_followed(counted, on_device):
        yield counted


@contextmanager
def _of_cuda(counted: Counter[str]) -> Iterator[None]:
    def shown(message: Warning | str, *rest: Any, **more: Any) -> None:
        if "synchroniz" in str(message):
            counted[place()] += 1

    torch.cuda.synchronize()
    with warnings.catch_warnings(), patch("warnings.showwarning", shown):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _of_followed(counted: Counter[str], on_device: list[Tensor]) -> Iterator[None]:
    mode = _Followed(counted)
    mode.follow(on_device)
    with mode:
        with mode.methods(), mode.moves():
            yield


class _Followed(TorchDispatchMode):
    """Tensors count by their memory, which is kept, so that none is used again."""

    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self._counted = counted
        self._kept: dict[int, Any] = {}

    def follow(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr():
                self._kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    def follows(self, values: Any) -> bool:
        tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
        return any(tensor.untyped_storage().data_ptr() in self._kept for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, followed = func.overloadpacket.__name__, self.follows((args, kwargs))
        if followed:
            masks = args[1] if name in ("index", "index_put", "index_put_") else ()
            by_mask = any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks)
            if name in READ or by_mask or (name == "repeat_interleave" and kwargs.get("output_size") is None):
                self._counted[place()] += 1
        results = func(*args, **kwargs)
        if followed and name != "_local_scalar_dense":
            self.follow(results)
            self.follow([arg for arg, said in zip(args, func._schema.arguments, strict=False) if said.is_write])
            self.follow([kwargs.get(said.name) for said in func._schema.arguments if said.is_write])
        return results

    @contextmanager
    def methods(self) -> Iterator[None]:
        """What brings a tensor to the host gives a copy that is not followed."""

        def counting(method: Callable[..., Any], is_move: Callable[..., bool]) -> Callable[..., Any]:
            def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                if not (is_move(*args, **kwargs) and self.follows(tensor)):
                    return method(tensor, *args, **kwargs)
                if not kwargs.get("non_blocking"):
                    self._counted[place()] += 1
                with torch.utils._python_dispatch._disable_current_modes():
                    return method(tensor.detach().clone(), *args, **kwargs)

            return counted

        def to_host(*args: Any, **kwargs: Any) -> bool:
            devices = [a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))]
            return any(str(device) == "cpu" for device in devices) and bool(kwargs.get("non_blocking"))

        changed = {name: counting(getattr(Tensor, name), lambda *args, **kwargs: True) for name in TO_HOST}
        changed["to"] = counting(Tensor.to, to_host)  # a device is the CPU here, so that only the copy beside counts
        with patch.multiple(Tensor, **changed):
            yield

    @contextmanager
    def moves(self) -> Iterator[None]:
        """What is brought to the device is followed from there on, in memory of its own."""
        to_device = token_layout.to_device

        def followed(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            moved = to_device(tensor, *args, **kwargs).clone()
            self.follow(moved)
            return moved

        users = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith("beit3_dist") and getattr(module, "to_device", None) is to_device
        ]
        for module in users:
            module.to_device = followed  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module in users:
                module.to_device = to_device  # type: ignore[attr-defined]
