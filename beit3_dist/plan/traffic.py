"""What a training step does on a device, written down without one: kernel launches, bytes, products, collectives.

The step runs at its real size on tensors without memory (torch's meta device), and a dispatch mode writes down every
operation.

- A launch is a kernel that torch starts for an operation on CUDA. An operation on a list of tensors takes as many as
  torch's multi-tensor kernels do (65,536 elements a block, 320 blocks a launch); a few others take several.
- bytes: what the kernels read and write. floor_bytes: each input of an operation once and each output once. They differ
  where an operation goes over its input twice.
- Triton kernels are counted where they would be launched: the tensors that their source loads and stores.
- Transfers from and to the host are left out.

Numbers that the host reads are unknown on the way: it is told 1000, so that the gradient is clipped.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
PROCESSORS = 132
"""Multiprocessors of an H100 and an H200: some kernels start as many programs as run at a time."""
UNKNOWN = 1000.0
"""What the host reads from a tensor without memory."""
PRODUCTS, ATTENTION = "matrix products", "attention's core"
BLOCK_ELEMENTS, BLOCKS, CAT_TENSORS = 65_536, 320, 128
"""Of torch's kernels for lists: elements of a block, blocks of a launch; tensors that one launch joins."""
LIST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors of a launch of such a kernel, by how many lists it takes."""
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "set_"}
"""Operations, beside views, that compute nothing."""
PRODUCT = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
"""Operations that do not read what they change."""
MAKERS = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "rand_like"}
"""Operations that read nothing of the tensor that shows them a type."""
GATHERS = {"index_select", "embedding", "index", "gather"}
SCATTERS = {"index_put_", "_index_put_impl_", "index_copy_", "index_add_"}
SEVERAL = {
    "embedding_dense_backward": 6,  # sorts the words first
    "index_put_": 4,
    "_index_put_impl_": 4,
    "native_layer_norm_backward": 3,
    "slice_backward": 2,
    "select_backward": 2,
    "nonzero": 4,
}
"""Launches of operations that take more than one, from profiles."""
REDUCTIONS = {"sum", "mean", "linalg_vector_norm", "argmin", "max", "amax", "amin"}
BLOCK_VALUES = 8192
"""Of a reduction: a sum over more is made by several blocks, whose counter is set to zero first, a launch too."""
TWICE = {"native_layer_norm_backward": 2}
"""Inputs that an operation reads a second time: so many of the first ones."""


@dataclass
class Row:
    """All calls of one operation."""

    launches: int = 0
    bytes: int = 0
    floor_bytes: int = 0


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: a dimension of stride 0 repeats them."""
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.itemsize


def list_launches(lists: list[list[Tensor]]) -> int:
    """Launches of a multi-tensor kernel over lists of tensors of equal sizes."""
    first = lists[0]
    blocks = sum(-(-t.numel() // BLOCK_ELEMENTS) for t in first)
    return max(-(-blocks // BLOCKS), -(-len(first) // LIST_TENSORS[min(5, len(lists))]))


@cache
def pointers(function: Callable[..., Any]) -> tuple[set[str], set[str]]:
    """Parameters of a Triton kernel that its source loads from, and those that it stores to."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    of_name: dict[str, list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        of_name.setdefault(name.id, []).append(node.value)

    def names(node: ast.AST, seen: set[str]) -> set[str]:
        """Names that an address is made of; not those of what was loaded to compute it."""
        if isinstance(node, ast.Name) and node.id not in seen:
            seen.add(node.id)
            for value in of_name.get(node.id, []):
                names(value, seen)
        elif not (isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"):
            for child in ast.iter_child_nodes(node):
                names(child, seen)
        return seen

    def used_by(what: str) -> set[str]:
        calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == f"tl.{what}")
        return set().union(*(names(call.args[0], set()) for call in calls))

    return used_by("load"), used_by("store")


class Traffic(TorchDispatchMode):
    """Writes down what operations on the meta device would launch, read and write on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Row] = {}
        self.products: Counter[tuple[int, int, int, int]] = Counter()
        """(count b, m, k, n) of the products of [m, k] and [k, n], b at a time -> calls."""
        self.collectives: Counter[tuple[str, int]] = Counter()
        """(name, bytes of what each rank has when it is done) -> calls."""

    def clear(self) -> None:
        """Forgets what was written down."""
        self.rows.clear()
        self.products.clear()
        self.collectives.clear()

    def record(self, name: str, launches: int, moved: int, floor: int) -> None:
        """Adds to a row."""
        row = self.rows.setdefault(name, Row())
        row.launches += launches
        row.bytes += moved
        row.floor_bytes += floor

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        from_device = any(t.device == META for t in tensors)
        if name == "_local_scalar_dense" and from_device:
            return UNKNOWN
        if name == "_to_copy" and from_device and kwargs.get("device") == torch.device("cpu"):
            return torch.full(tensors[0].shape, UNKNOWN, dtype=kwargs.get("dtype") or tensors[0].dtype)
        # The meta device has no kernel of the fused optimizer, and nothing to compute.
        result = None if name == "_fused_adamw_" else function(*args, **kwargs)
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        to_device = name in ("_to_copy", "copy_") and not all(t.device == META for t in tensors)
        if (from_device or any(t.device == META for t in results)) and not to_device:
            if not function.is_view and name not in FREE:
                self._count(function, name, args, kwargs, results)
        return result

    def _count(self, function: Any, name: str, args: Any, kwargs: dict[str, Any], results: list[Tensor]) -> None:
        read: list[Tensor] = []
        written: list[Tensor] = []
        lists: list[list[Tensor]] = []
        for number, argument in enumerate(function._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
            if isinstance(value, list | tuple) and tensors:
                lists.append(tensors)
            changed = argument.alias_info is not None and argument.alias_info.is_write
            changed &= (name, argument.name) != ("_fused_adamw_", "grads")  # it does so only where it unscales them
            if changed:
                written += tensors
            if not changed or not (name in OVERWRITES or argument.name == "out"):
                read += tensors
        known = {id(t) for t in written}
        written += [t for t in results if id(t) not in known]
        if name in MAKERS:
            read = []
        elif name in GATHERS:
            read = [*results, *read[1:]]  # of the table only the rows that are taken
        elif name in SCATTERS:
            read, written = read[1:], read[-1:]
        floor = sum(map(size_of, read)) + sum(map(size_of, written))
        moved = floor + sum(map(size_of, read[: TWICE.get(name, 0)]))
        if name.startswith("_foreach") or name == "_fused_adamw_":
            launches = list_launches(lists) + (name == "_foreach_norm")  # the norm adds up its blocks at the end
        elif name in ("cat", "stack"):
            launches = -(-len(lists[0]) // CAT_TENSORS)
        elif name in REDUCTIONS and results:
            values = read[0].numel() // max(1, results[0].numel())
            launches = 1 + (values > BLOCK_VALUES)  # several blocks make one sum, and count how many are done
        else:
            launches = SEVERAL.get(name, 1)
        if name in PRODUCT:
            self._product(name, args, results)
        name = name.strip("_")
        self.record(PRODUCTS if name in PRODUCT else name, launches, moved, floor)

    def _product(self, name: str, args: Any, results: list[Tensor]) -> None:
        """The shapes of a product; a convolution is one of its windows and its filters."""
        if name.startswith("convolution"):
            of_filter = args[2 if name.endswith("backward") else 1]
            places = (args[0] if name.endswith("backward") else results[0]).numel() // of_filter.shape[0]
            shape = 1, places, of_filter[0].numel(), of_filter.shape[0]
            self.products[shape] += sum(args[10][:2]) if name.endswith("backward") else 1
            return
        left, right = args[1:3] if name.startswith(("addmm", "baddbmm")) else args[:2]
        batches = left.shape[0] if left.ndim == 3 else 1
        self.products[batches, left.shape[-2], left.shape[-1], right.shape[-1]] += 1

    def collective(self, name: str, result: Tensor) -> None:
        """Stands in for a collective."""
        self.collectives[name, size_of(result)] += 1

    def launch(self, kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        """Stands in for the launch of a Triton kernel."""
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        loaded, stored = pointers(kernel.fn)
        read = {id(t): t for name, t in tensors.items() if name not in stored}
        # A tensor in a second place, only stored there, stands for one that this launch does not have.
        written = {id(t): t for n, t in tensors.items() if n in stored and (n in loaded or id(t) not in read)}
        again = [t for name, t in tensors.items() if name in stored & loaded and id(t) not in read]
        moved = sum(map(size_of, [*read.values(), *written.values(), *again]))
        module = kernel.fn.__module__.removesuffix(".triton").rsplit(".", 1)[-1]
        self.record(f"{module}{kernel.fn.__name__.removesuffix('_kernel')}", 1, moved, moved)

    def addresses(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Stands in for the table by which AdamW's kernel reads gradients."""
        read = sum(size_of(gradient) for gradient in gradients if gradient is not None)
        self.record("adamw_step", 0, read, read)
        return torch.empty(len(gradients), dtype=torch.int64, device=device)


class Core(torch.autograd.Function):
    """Attention's core, of q, k and v or of all three packed [T, 3, H, d]: one launch forward; backward one and two
    helpers."""

    @staticmethod
    def forward(ctx: Any, traffic: Traffic, *qkv: Tensor) -> Tensor:
        q = qkv[0] if len(qkv) == 3 else qkv[0][:, 0]
        ctx.traffic, ctx.moved = traffic, sum(map(size_of, (*qkv, q)))
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)  # the softmax's, by row
        ctx.save_for_backward(*qkv, out, sums)
        traffic.record(ATTENTION, 1, ctx.moved, ctx.moved)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.traffic.record(ATTENTION, 3, 2 * ctx.moved, 2 * ctx.moved)
        return None, *map(torch.empty_like, ctx.saved_tensors[:-2])


class Autocast(TorchFunctionMode):
    """Autocast to bf16, which torch does not have for the meta device: of what the image tokenizer calls. Weights are
    cast once."""

    LOWER = (F.linear, F.conv2d, F.scaled_dot_product_attention)

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self._enabled = enabled
        self._weights: dict[int, Tensor] = {}

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype == dtype or not value.is_floating_point():
            return value
        if isinstance(value, nn.Parameter):
            return self._weights.setdefault(id(value), value.to(dtype))
        return value.to(dtype)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._enabled and (function in self.LOWER or function is F.layer_norm):
            dtype = torch.float32 if function is F.layer_norm else torch.bfloat16
            args = tuple(self._cast(a, dtype) for a in args)
            kwargs = {name: self._cast(a, dtype) for name, a in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


@contextmanager
def on_meta(traffic: Traffic) -> Iterator[None]:
    """Inside, operations on the meta device are counted, and what needs a device is a stand-in."""

    def core(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        return Core.apply(traffic, q, k, v)

    def collective(name: str) -> Callable[..., None]:
        # What a scatter leaves on a rank is a part of what it sends: counted is the larger of both.
        larger = 1 if name == "reduce_scatter_tensor" else 0
        return lambda *tensors, **named: traffic.collective(name, [*tensors, *named.values()][larger])

    with ExitStack() as stack:
        for place in ("torch.nn.functional", "beit3_dist.model.attention"):
            stack.enter_context(patch(f"{place}.scaled_dot_product_attention", core))
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            stack.enter_context(patch(f"torch.distributed.{name}", collective(name)))
        stack.enter_context(patch("torch.autocast", lambda *_, **__: nullcontext()))
        fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
        stack.enter_context(patch(fused, lambda: ["meta", "cuda"]))
        if find_spec("triton") is not None:
            triton = import_module("triton")
            run = lambda kernel, *args, **kwargs: traffic.launch(kernel, *args, **kwargs)  # noqa: E731
            stack.enter_context(patch.object(triton.JITFunction, "run", run))
            for module in ("launch", "sums"):
                stack.enter_context(patch(f"beit3_dist.kernels.triton.{module}.processors", lambda _: PROCESSORS))
            stack.enter_context(patch("beit3_dist.kernels.adamw.triton.addresses", traffic.addresses))
        stack.enter_context(traffic)
        yield
