"""Memory counted by allocation: the bytes of tensors, as operations make them and Python lets them go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class Allocations(TorchDispatchMode):
    """Follows the bytes of all tensors that operations make while it is active: the CPU allocator keeps no peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never counts these."""
        for tensor in tensors:
            self._known.setdefault(tensor.untyped_storage(), None)

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Counts these, too, which were there before, each storage once."""
        for tensor in tensors:
            self._found(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)

    def _found(self, storage: Any) -> None:
        if storage not in self._known:
            self._known[storage] = None
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):  # what was there before does not count
            self._known.setdefault(tensor.untyped_storage(), None)
        out = operation(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._found(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
