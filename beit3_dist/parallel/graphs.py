"""Blocks as CUDA graphs: each block's forward and backward pass starts as one thing, not as some 25 kernels.

A graph repeats the kernels that it was recorded from, at the same addresses and for the same numbers of tokens. So the
blocks are recorded for one shape of micro-batches, the one that comes again and again (see `Objectives.filled_up`), and
compute all others as ever, the first one of each shape, too. What differs between micro-batches of a shape (tokens,
drop path, where samples begin) is copied to where the graphs read it; between recorded blocks nothing is: the next one
reads where the one before has written. The last block, whose tokens are selected, is not recorded.

The graphs share memory as the blocks did when they were recorded. So the backward pass of a micro-batch has to come
before the forward pass of the next one. Gradients of weights lie where the graphs leave them until somebody adds them
up, which ZeRO-1 in bf16 does after each backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from beit3_dist.config import Recompute, RunConfig, require
from beit3_dist.model.encoder import Encoder
from beit3_dist.model.token_layout import Packing, Segments, Selection, TokenLayout
from beit3_dist.parallel.fused import FusedForward, Unadded
from beit3_dist.parallel.kernels import chosen_attention, chosen_kernels

log = logging.getLogger(__name__)
LONGEST = 128
"""Samples are recorded as being as long as the longest one, rounded up to a multiple of this."""

LEAVE_OFF = "leave cuda_graphs off"

Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""(a computation) -> its result, and what repeats it, in the same memory."""


def check_graphs(config: RunConfig, objectives: Collection[str]) -> None:
    """Raises ValueError where the config asks for graphs of what cannot be recorded. `objectives`: names of those that
    take a second pass, or hide tokens from one another."""
    if not config.cuda_graphs:
        return
    parallel, recomputed = config.parallel, config.recompute(0)
    kernels, head_dim = chosen_kernels(config.kernels), config.model.width // config.model.heads
    attention = chosen_attention(config.attention_kernel, kernels, torch.bfloat16, head_dim)
    for found, wrong, remedy in (
        (parallel.zero_stage != 1, f"parallel.zero_stage={parallel.zero_stage}", "use parallel.zero_stage=1"),
        (parallel.pipeline != 1, f"parallel.pipeline={parallel.pipeline}", "use parallel.pipeline=1"),
        (parallel.tensor != 1, f"parallel.tensor={parallel.tensor}", "use parallel.tensor=1"),
        (not config.in_bf16, "precision=fp32", "use precision=bf16"),
        (recomputed == "full", "activation_checkpointing=full", "use activation_checkpointing=selective"),
        (config.model.fusion_layers, f"model.fusion_layers={config.model.fusion_layers}", LEAVE_OFF),
        (config.model.layers == 1, "model.layers=1, as the last layer is not recorded", LEAVE_OFF),
        (objectives, f"second passes and masks, as of {', '.join(objectives)}", LEAVE_OFF),
        (config.train_only, "train_only", LEAVE_OFF),
        (config.gradient_masking.every, "gradient_masking", LEAVE_OFF),
        (config.deterministic, "deterministic (a resumed run fills up captions to another length)", LEAVE_OFF),
        (not torch.cuda.is_available(), "a machine without a CUDA device", LEAVE_OFF),
        (kernels != "triton", f"kernels={kernels}", "use kernels=triton"),
        (attention == "padded", "attention_kernel=padded", "use attention_kernel=varlen or flash"),
    ):
        require(not found, f"cuda_graphs does not go with {wrong}: {remedy}")


class Recorder(Protocol):
    """Who records."""

    def recording(self) -> AbstractContextManager[Record]:
        """Inside, `Record` records. What it has recorded is repeated in the order of recording."""

    def free(self) -> None:
        """Gives back the memory of what was recorded and is known to nobody any more."""


class CudaRecorder:
    """CUDA's own graphs."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Of one pool of memory."""
        torch.cuda.synchronize()
        self.free()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield partial(self._record, torch.cuda.graph_pool_handle())
        torch.cuda.current_stream().wait_stream(self._stream)

    def free(self) -> None:
        torch.cuda.empty_cache()

    @staticmethod
    def _record(pool: Any, compute: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, as those that watch NCCL or fetch data, may go on with what a capture forbids.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = compute()
        finally:
            graph.capture_end()
        return result, graph.replay


class _Static(Segments):
    """The layout of all micro-batches of a shape, whose samples lie where the last one's do."""

    def __init__(self, layout: TokenLayout, packing: Packing) -> None:
        self._segments = layout.segments
        longest = -(-packing.longest // LONGEST) * LONGEST
        self._packing = Packing(packing.place.clone(), packing.order.clone(), packing.cumulative.clone(), longest)

    @property
    def segments(self) -> tuple[int, int, int, int]:
        return self._segments

    def packing(self, device: torch.device) -> Packing:
        """As `TokenLayout.packing`."""
        return self._packing

    def take(self, packing: Packing) -> None:
        """The samples of a micro-batch."""
        own = self._packing
        for mine, its in ((own.place, packing.place), (own.order, packing.order), (own.cumulative, packing.cumulative)):
            mine.copy_(its)


@dataclass
class _Recorded:
    """A block. What it takes from the block before and leaves to the next one is known to their graphs alone: in
    autograd an empty tensor stands for it."""

    keep_2T: Tensor | None
    forward: Callable[[], None]
    backward: Callable[[], None]
    parameters: list[Tensor]
    """Those that it has a gradient of."""
    of_parameters: list[Tensor | None]
    first: tuple[Tensor, Tensor | None] | None
    """Of the first block: its tokens and their gradient."""
    last: tuple[Unadded, list[Tensor]] | None
    """Of the last one: what it leaves, and the gradients of that."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: Graphs, recorded: _Recorded, x: Tensor, *parameters: Tensor) -> Any:
        ctx.graphs, ctx.recorded = graphs, recorded
        if recorded.first is not None:
            recorded.first[0].detach().copy_(x)
        recorded.forward()
        if recorded.last is None:
            return x.new_empty(0)
        return tuple(part.detach() for part in _parts(recorded.last[0]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        recorded: _Recorded = ctx.recorded
        if recorded.last is not None:
            for mine, its in zip(recorded.last[1], gradients, strict=True):
                mine.copy_(its)
        recorded.backward()
        of_x: Tensor | None = gradients[0].new_empty(0)
        if recorded.first is not None:
            of_x, ctx.graphs.under_way = recorded.first[1], False
        given = (of_x, *recorded.of_parameters)
        return None, None, *(None if gradient is None else gradient.detach() for gradient in given)


class Graphs:
    """Takes over the blocks of an encoder, which `FusedForward` computes, but its last one."""

    def __init__(self, encoder: Encoder, recorder: Recorder) -> None:
        self._recorder = recorder
        *blocks, _ = encoder.values()
        self._forwards: list[Any] = [block.forward for block in blocks]
        self._parameters = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
        self._recorded: list[_Recorded] = []
        self._static: _Static | None = None
        self._shape: Any = None
        """Of the micro-batch before."""
        self._repeats = False
        self.under_way = False
        """Whether a forward pass was repeated whose backward pass is to come."""
        for number, block in enumerate(blocks):
            assert isinstance(block.forward, FusedForward)
            block.forward = partial(self._run, number)

    def _run(
        self,
        number: int,
        x: Any,
        layout: TokenLayout,
        keep_2T: Tensor | None,
        selection: Selection | None = None,
        recompute: Recompute = "none",
    ) -> Any:
        """`Block.forward`."""
        if number == 0:
            self._repeats = torch.is_grad_enabled() and self._prepare(x, layout, keep_2T, recompute)
        if not self._repeats:
            return self._forwards[number](x, layout, keep_2T, selection, recompute)
        recorded = self._recorded[number]
        if recorded.keep_2T is not None and keep_2T is not None:
            recorded.keep_2T.copy_(keep_2T)
        outputs = _Replay.apply(self, recorded, x, *recorded.parameters)
        if recorded.last is None:
            return outputs
        left = recorded.last[0]
        assert left.branch is not None
        return Unadded(outputs[0], replace(left.branch, slices=[*outputs[1:]]), left.keep_T)

    def _prepare(self, x: Tensor, layout: TokenLayout, keep_2T: Tensor | None, recompute: Recompute) -> bool:
        """Whether the blocks are recorded for this micro-batch; then the graphs know where its samples are. They are
        recorded for a shape that comes a second time in a row, and kept until another one comes."""
        packing = layout.packing(x.device)
        if packing is None:
            return False
        shape = (layout.segments, len(packing.cumulative), x.dtype, x.requires_grad, keep_2T is None, recompute)
        again, self._shape = shape == self._shape, shape
        fits = self._static is not None and packing.longest <= self._static.packing(x.device).longest
        if not (again and fits) and self._recorded:
            self._recorded, self._static = [], None
            self._recorder.free()
        if not again:
            return False
        if self.under_way:
            raise RuntimeError("cuda_graphs: a forward pass came before the backward pass of the one before it")
        if self._static is None:
            self._static = _Static(layout, packing)
            self._record(x, self._static, keep_2T, recompute)
            log.info("CUDA graphs: recorded %d blocks for %d tokens", len(self._recorded), sum(layout.segments))
        self._static.take(packing)
        self.under_way = True
        return True

    def _record(self, x: Tensor, static: Any, keep_2T: Tensor | None, recompute: Recompute) -> None:
        tokens = x.detach().clone().requires_grad_(x.requires_grad)
        keeps = [None if keep_2T is None else keep_2T.clone() for _ in self._forwards]
        before: Any = tokens
        edges, repeats, taken = [_edges([tokens])], [], []
        with self._recorder.recording() as record:
            for forward, keep, own in zip(self._forwards, keeps, self._parameters, strict=True):
                # Biases that a block leaves to be added are the next block's, and so are their gradients.
                biases = [] if before is tokens else [bias for bias in before.branch.biases if bias.requires_grad]
                before, repeat = record(partial(_bordered, forward, before, static, keep, None, recompute))
                left = {id(bias) for bias in before.branch.biases}
                edges.append(_edges(_parts(before)))
                repeats.append(repeat)
                taken.append([*biases, *(parameter for parameter in own if id(parameter) not in left)])
            left_TD = [part.detach() for part in _parts(before)]
            last = Unadded(left_TD[0], replace(before.branch, slices=left_TD[1:]), before.keep_T)
            of_outputs: list[Any] = [torch.zeros_like(part) for part in left_TD]
            of_last = last, [*of_outputs]
            del before  # else nothing that the blocks keep for the backward pass could be freed in it
            for number in reversed(range(len(repeats))):
                backward = partial(_gradients, edges[number + 1], of_outputs, edges[number], taken[number])
                (of_outputs, of_parameters), repeat = record(backward)
                self._recorded.insert(
                    0,
                    _Recorded(
                        keeps[number], repeats[number], repeat, taken[number], of_parameters,
                        first=(tokens, of_outputs[0]) if number == 0 else None,
                        last=of_last if number == len(repeats) - 1 else None,
                    ),
                )  # fmt: skip


class _Border(torch.autograd.Function):
    """One node of autograd's behind all that a block leaves, of which some was made of the rest: the backward pass of
    the next block ends at it."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def _bordered(forward: Callable[..., Unadded], *inputs: Any) -> Unadded:
    """What a block leaves, behind its border."""
    left = forward(*inputs)
    x_TD, *slices = _Border.apply(*_parts(left))
    return Unadded(x_TD, replace(left.branch, slices=slices), left.keep_T)  # type: ignore[type-var]


def _parts(x: Unadded) -> list[Tensor]:
    """What blocks leave."""
    assert x.branch is not None
    return [x.x_TD, *x.branch.slices]


def _edges(tensors: list[Tensor]) -> list[Any]:
    """Where the gradients of tensors arrive, which keeps no values; None for those that have none."""
    return [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in tensors]


def _gradients(
    outputs: list[Any], of_outputs: list[Tensor | None], inputs: list[Any], parameters: list[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Those of inputs and of parameters."""
    ends = [(out, of) for out, of in zip(outputs, of_outputs, strict=True) if out is not None and of is not None]
    leaves = [leaf for leaf in inputs if leaf is not None]
    found = torch.autograd.grad(
        [out for out, _ in ends], [*leaves, *parameters], [of for _, of in ends], allow_unused=True
    )
    of_leaves = iter(found[: len(leaves)])
    return [None if leaf is None else next(of_leaves) for leaf in inputs], [*found[len(leaves) :]]
