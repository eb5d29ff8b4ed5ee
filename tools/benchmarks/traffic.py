"""The `traffic` part of tools/benchmark.py: kernel launches of a training step on a GPU and the bytes that they move.

What is neither a matrix product nor attention's core waits for memory, or for its launch. This counts it without a GPU:
one step as launchers/pretrain.py takes it on one device under ZeRO-1 in bf16 (image tokenizer, forward, backward, sums
of gradients, norm, clipping, AdamW, working parameters) runs at a recipe's real size on tensors without memory (torch's
meta device), and a dispatch mode writes down every operation.

- A launch is a kernel that torch starts for an operation on CUDA. An operation on a list of tensors takes as many as
  torch's multi-tensor kernels do (65,536 elements a block, 320 blocks a launch); a few others take several.
- bytes: what the kernels read and write. floor_bytes: each input of an operation once and each output once. They differ
  where an operation goes over its input twice.
- Triton kernels are counted where they would be launched: the tensors that their source loads and stores.
- Transfers from and to the host are left out, and so is what other ranks would cost.

Numbers that the host reads are unknown on the way: it is told 1000, so that the gradient is clipped.
"""

from __future__ import annotations

import ast
import inspect
import math
import os
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beit3_dist.config import ModelConfig, OptimConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.image_tokenizer.fused import fuse_encoder
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import ImageTargets
from beit3_dist.kernels.varlen_attention import VARLEN_ATTENTION
from beit3_dist.model import BEiT3
from beit3_dist.objectives.together import ROUNDED, PretrainingModule
from beit3_dist.parallel.kernels import chosen_function, sizes_of, use_kernels
from beit3_dist.parallel.mesh import Groups, connect, read_mesh
from beit3_dist.parallel.tensor import mark_model_parallel
from beit3_dist.recipe import read_sections
from beit3_dist.tools.benchmarks.measure import check_positive
from beit3_dist.tools.benchmarks.recipe import RECIPES, SECTIONS, micro_batch
from beit3_dist.tools.benchmarks.step import objectives_for
from beit3_dist.train.optimizer import build_optimizer

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
        name = name.strip("_")
        self.record(PRODUCTS if name in PRODUCT else name, launches, moved, floor)

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


class _Core(torch.autograd.Function):
    """Attention's core, of q, k and v or of all three packed [T, 3, H, d]: one launch forward; backward one and two
    helpers."""

    @staticmethod
    def forward(ctx: Any, traffic: Traffic, *qkv: Tensor) -> Tensor:
        q = qkv[0] if len(qkv) == 3 else qkv[0][:, 0]
        ctx.traffic, ctx.moved = traffic, sum(map(size_of, (*qkv, q)))
        ctx.save_for_backward(*qkv)
        traffic.record(ATTENTION, 1, ctx.moved, ctx.moved)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.traffic.record(ATTENTION, 3, 2 * ctx.moved, 2 * ctx.moved)
        return None, *map(torch.empty_like, ctx.saved_tensors)


class _Autocast(TorchFunctionMode):
    """Autocast to bf16, which torch does not have for the meta device: of what the image tokenizer calls. Weights are
    cast once."""

    LOWER = (F.linear, F.conv2d, F.scaled_dot_product_attention)

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, Tensor] = {}

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype == dtype or not value.is_floating_point():
            return value
        if isinstance(value, nn.Parameter):
            return self._weights.setdefault(id(value), value.to(dtype))
        return value.to(dtype)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.LOWER or function is F.layer_norm:
            dtype = torch.float32 if function is F.layer_norm else torch.bfloat16
            args = tuple(self._cast(a, dtype) for a in args)
            kwargs = {name: self._cast(a, dtype) for name, a in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


class _Engine:
    """What `Accumulation` asks of a DeepSpeed engine, over an optimizer that needs no other."""

    def __init__(self, objective: nn.Module, optimizer: Any) -> None:
        self._objective, self._optimizer = objective, optimizer
        self._boundary = True

    def __call__(self, *arguments: Any) -> Any:
        return self._objective(*arguments)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._boundary = is_boundary

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        """As DeepSpeedEngine.backward."""
        self._optimizer.backward_prologue()
        self._optimizer.set_gradient_accumulation_boundary(self._boundary)
        loss.backward()
        self._optimizer.update_hp_grads()
        if self._boundary:
            self._optimizer.reduce_gradients()

    def zero_reduce_bucket_size(self) -> int:
        return 10**8

    def zero_overlap_comm(self) -> bool:
        return True


@contextmanager
def on_meta(traffic: Traffic) -> Iterator[None]:
    """Inside, operations on the meta device are counted, and what needs a device is a stand-in."""

    def core(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        return _Core.apply(traffic, q, k, v)

    with ExitStack() as stack:
        for place in ("torch.nn.functional", "beit3_dist.model.attention"):
            stack.enter_context(patch(f"{place}.scaled_dot_product_attention", core))
        stack.enter_context(patch("torch.distributed.all_reduce", lambda *_, **__: None))
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


def account(
    groups: Groups,
    model: ModelConfig,
    batches: list[MicroBatch],
    optim: OptimConfig,
    kernels: str = "torch",
    attention: str = "padded",
    tokenizer: VQKD | None = None,
) -> Traffic:
    """The traffic of the second step of a model over these micro-batches; the moments exist then.

    groups: those of the only process. tokenizer: on the meta device; None where the codes are there already.
    """
    from beit3_dist.parallel.engine import Accumulation  # imports DeepSpeed, as no other part of benchmark.py does

    traffic, objectives = Traffic(), objectives_for(model)
    objectives.multiple = ROUNDED
    meta_groups = SimpleNamespace(mesh=SimpleNamespace(device=META, data=1))
    with on_meta(traffic), redirect_stdout(StringIO()):
        network = BEiT3(model, device="meta").to(torch.bfloat16)
        mark_model_parallel(network, 0, ())
        _use_kernels(traffic, network, kernels, attention)
        optimizer = _optimizer(network, optim, groups)
        engine = _Engine(PretrainingModule(network, objectives, seed=0), optimizer)
        with patch("torch.cuda.is_available", lambda: True):
            optimizer.take_over(engine, chosen_function("adamw", kernels, torch.bfloat16, sizes_of(model)))
            fused = tokenizer is not None and fuse_encoder(tokenizer, kernels)
        schedule = Accumulation(len(batches), meta_groups, engine, len(objectives.losses))
        counts = torch.tensor([sum(c) for c in zip(*map(objectives.counts, batches), strict=True)], device=META)

        def tokenize(pictures: Tensor) -> Tensor:
            if tokenizer is None:
                return torch.empty(len(pictures), model.patches, dtype=torch.int64, device=META)
            side = tokenizer.image_size
            views = torch.empty(len(pictures), 3, side, side, dtype=torch.uint8, device=META)
            with nullcontext() if fused else _Autocast():
                return ImageTargets(tokenizer, META)(views)

        for _ in range(2):
            traffic.rows.clear()
            schedule.train((objectives.prepare(batch, META, tokenize) for batch in batches), counts, 0).to("cpu")
            optimizer.step()
            optimizer.zero_grad()
    return traffic


def _use_kernels(traffic: Traffic, network: BEiT3, kernels: str, attention: str) -> None:
    """`use_kernels` as on a GPU that has all kernels."""
    with ExitStack() as stack:
        for version in VARLEN_ATTENTION.versions:
            core = lambda qkv, cumulative, longest: _Core.apply(traffic, qkv)  # noqa: E731
            stack.enter_context(patch(f"{version.module}.{VARLEN_ATTENTION.name}", core))
        stack.enter_context(patch("torch.cuda.is_available", lambda: True))
        use_kernels(network, kernels, attention)


def _optimizer(network: BEiT3, optim: OptimConfig, groups: Groups) -> Any:
    """What DeepSpeed's engine makes at ZeRO-1 in bf16 with fp32 sums, without loops over parameters."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.utils.timer import NoopTimer

    from beit3_dist.parallel.flat_step import FlatBF16

    names = {parameter: name for name, parameter in network.named_parameters()}
    settings = SimpleNamespace(enabled=True, immediate_grad_update=False)
    make = partial(BF16_Optimizer, mpu=groups, dp_process_group=groups.data, timers=NoopTimer())
    adamw = build_optimizer(network, False, optim)
    optimizer: Any = make(adamw, names, settings, clip_grad=optim.clip_norm, grad_acc_dtype=torch.float32)
    optimizer.__class__ = FlatBF16
    return optimizer


def benchmark_traffic(options: Namespace) -> dict[str, Any]:
    """The account of a recipe's model."""
    recipe = read_sections(options.recipe, *SECTIONS)
    model = ModelConfig(**recipe["model"])
    batches = [micro_batch(model, recipe["data"], options.samples)] * options.accumulation
    tokenizer = None
    if not options.codes:
        side = 16 * (model.image_size // model.patch_size)  # a view that gives one code for each patch
        with META:
            tokenizer = VQKD(image_size=side, codebook_size=model.visual_vocab_size)
    optim = OptimConfig(**recipe["optim"])
    traffic = account(connect(read_mesh()), model, batches, optim, options.kernels, options.attention, tokenizer)
    rows = sorted(traffic.rows.items(), key=lambda item: item[1].bytes, reverse=True)
    counted = [row for name, row in rows if name not in (PRODUCTS, ATTENTION)]
    return {
        "recipe": options.recipe.stem,
        "options": {name: getattr(options, name) for name in ("samples", "accumulation", "kernels", "attention")},
        "launches": sum(row.launches for row in counted),
        "bytes": sum(row.bytes for row in counted),
        "floor_bytes": sum(row.floor_bytes for row in counted),
        "all_launches": sum(row.launches for _, row in rows),
        "operations": {name: asdict(row) for name, row in rows},
    }


def table(record: dict[str, Any]) -> str:
    """`benchmark_traffic`'s record for people."""
    options = record["options"]
    lines = [
        f"{record['recipe']}, {options['accumulation']} x 3 x {options['samples']} samples, {options['kernels']} "
        f"kernels, {options['attention']} attention; ZeRO-1 in bf16 on one GPU",
        f"{'operation':>36}{'launches':>10}{'GB':>9}{'floor':>9}",
    ]
    lines += [
        f"{name:>36}{row['launches']:10,}{row['bytes'] / 1e9:9.2f}{row['floor_bytes'] / 1e9:9.2f}"
        for name, row in (record["operations"] | {"all but products and core": record}).items()
    ]
    return "\n".join(lines) + f"   ({record['all_launches']:,} launches with them)"


def check(options: Namespace) -> None:
    """Raises ValueError for what cannot be counted."""
    read_sections(options.recipe, *SECTIONS)
    check_positive(("samples", "accumulation"), options)
    if options.kernels == "triton":
        if find_spec("triton") is None:
            raise ValueError("--kernels triton needs the package triton: use --kernels torch")
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise ValueError("--kernels triton counts launches, which TRITON_INTERPRET=1 replaces: unset it")
    elif options.attention != "padded":
        raise ValueError(f"--attention {options.attention} needs --kernels triton")


def add_command(commands: Any) -> None:
    """`traffic`."""
    text = "kernel launches and bytes of a training step on a GPU, counted without one"
    command = commands.add_parser("traffic", help=text)
    command.set_defaults(measure=benchmark_traffic, table=table, check=check)
    text = "whose model, lengths and clipping"
    command.add_argument("--recipe", type=Path, default=RECIPES / "giant.yaml", help=text)
    command.add_argument("--samples", type=int, default=32, help="images, texts and pairs of a micro-batch, each")
    command.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    command.add_argument("--kernels", choices=("torch", "triton"), default="triton", help="as in a run's config")
    attentions = ("padded", *(version.name for version in VARLEN_ATTENTION.versions))
    command.add_argument("--attention", choices=attentions, default="varlen", help="who computes attention's core")
    command.add_argument("--codes", action="store_true", help="visual codes are there already: no image tokenizer runs")
