"""Blocks that are recorded and repeated, by a stand-in for CUDA's graphs, which tests/gpu has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beit3_dist.config import ModelConfig, ParallelConfig, Recompute
from beit3_dist.model import BEiT3
from beit3_dist.model.token_layout import Selection, TokenLayout, fill, group
from beit3_dist.parallel import graphs
from beit3_dist.parallel.graphs import Graphs, _Static, check_graphs
from beit3_dist.run.computing import computed_by
from tests.graphs import StandIn, fuse
from tests.parallel.training import run_config


def model(attention: Any) -> BEiT3:
    config = ModelConfig(
        layers=4, width=16, heads=2, ffn_width=24, patch_size=2, image_size=4, attention=attention,
        sub_layernorm=attention == "per_modality", vl_expert_layers=2, vocab_size=20, visual_vocab_size=8,
    )  # fmt: skip
    made = BEiT3(config, seed=1)
    spread = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=spread))
    fuse(made)
    return made.train()


def layout(lengths: tuple[int, int, int], multiple: int = 8) -> TokenLayout:
    """Two images, three captions of these lengths with their images, two texts; captions filled up to a multiple."""
    captions = torch.arange(5) >= torch.tensor(lengths)[:, None]
    return TokenLayout(fill((group(2, 5, None), group(3, 5, captions, 5), group(2, 0, None, 6)), [1], multiple))


def step(of: BEiT3, tokens: TokenLayout, seed: int, recompute: Recompute) -> list[Tensor]:
    """What the encoder makes of random tokens under drop path, and all gradients."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(tokens.segments), 16, generator=draw).requires_grad_()
    keep = (torch.rand(4, 2, sum(g.samples for g in tokens.groups), generator=draw) > 0.3) * 1.4
    rows = torch.arange(1 + seed, sum(tokens.segments), 3)
    counts = torch.searchsorted(rows, torch.tensor(tokens.segments).cumsum(0)).diff(prepend=torch.zeros(1)).int()
    of.blocks.recompute = recompute
    entered = x * 1.0
    y = of.blocks(entered, tokens, keep, selection=Selection(rows, tuple(counts.tolist())))
    y.backward(torch.randn(y.shape, generator=draw))
    gradients = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in of.blocks.parameters()]
    for parameter in of.blocks.parameters():
        parameter.grad = None
    assert x.grad is not None
    return [y.detach().clone(), x.grad, *gradients]


PLANS = [
    ((3, 4, 1), 8), ((5, 2, 1), 8), ((1, 1, 3), 8), ((2, 5, 1), 8), ((5, 5, 5), 8), ((1, 2, 3), 16), ((4, 5, 4), 16),
]  # fmt: skip


@pytest.mark.parametrize(("attention", "recompute"), [("shared", "none"), ("per_modality", "selective")])
def test_repeated_blocks_compute_what_blocks_do(attention: str, recompute: Recompute) -> None:
    """Micro-batches of other lengths, tokens and drop path; where another shape comes the recording is given up."""
    plain, ours = model(attention), model(attention)
    recorder = StandIn(ours)
    Graphs(ours.blocks, recorder)
    recordings = []
    for seed, plan in enumerate(PLANS):
        for mine, its in zip(*(step(it, layout(*plan), seed, recompute) for it in (ours, plain)), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
        recordings.append(recorder.recordings)
    assert recordings == [0, 1, 1, 1, 1, 2, 2]


class Alive(TorchDispatchMode):
    """Counts what is left of the memory that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for made in tree_leaves(results):
            if isinstance(made, Tensor) and not function.is_view:  # else it may be a weight's
                storage = made.untyped_storage()
                self._made[StorageWeakRef(storage)] = storage.nbytes()
        return results

    def bytes(self) -> int:
        return sum(size for storage, size in self._made.items() if not storage.expired())


class Counted:
    """Records nothing; counts what is left after each computation that would be recorded."""

    def __init__(self) -> None:
        self.left: list[int] = []

    @contextmanager
    def recording(self) -> Iterator[Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]]:
        alive = Alive()

        def record(compute: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
            with alive:
                result = compute()
            self.left.append(alive.bytes())
            return result, lambda: None

        yield record

    def free(self) -> None:
        """Nothing else holds it."""


def test_graphs_take_no_more_memory_than_blocks() -> None:
    """What a block alone reads is free for the next one's graph; after the last of them the gradients are left."""
    ours, tokens, recorder = model("shared"), layout((3, 4, 1)), Counted()
    x = torch.randn(sum(tokens.segments), 16).requires_grad_()
    with Alive() as alive:
        left: Any = x
        for block in [*ours.blocks.values()][:-1]:
            left = block.forward(left, tokens, None)
        of_blocks = alive.bytes()
    ours_recorded = Graphs(ours.blocks, recorder)
    packing = tokens.packing(x.device)
    assert packing is not None
    ours_recorded._record(x, _Static(tokens, packing), None, "none")
    gradients = sum(p.nbytes for block in [*ours.blocks.values()][:-1] for p in block.parameters())
    activations = x.nbytes
    assert recorder.left[2] <= of_blocks + activations
    assert recorder.left[-1] <= gradients + 6 * activations


def test_what_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(
        run_config("paper", zero_stage=1, accumulation=1, data_parallel=1, precision="bf16"), cuda_graphs=True
    )
    with pytest.raises(ValueError, match="not go with a machine without a CUDA device: leave cuda_graphs off"):
        check_graphs(config, [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(graphs, "chosen_kernels", lambda kernels: "triton" if kernels == "auto" else kernels)
    monkeypatch.setattr(
        graphs, "chosen_attention", lambda attention, *_: "varlen" if attention == "auto" else attention
    )
    assert computed_by(config, torch.device("cpu")).endswith(", blocks as CUDA graphs")
    config = replace(config, kernels="auto")
    check_graphs(config, [])
    for changes, message in (
        ({"parallel": ParallelConfig(zero_stage=3)}, "use parallel.zero_stage=1"),
        ({"activation_checkpointing": "full"}, "use activation_checkpointing=selective"),
        ({"deterministic": True}, "leave cuda_graphs off"),
        ({"kernels": "torch"}, "use kernels=triton"),
        ({"attention_kernel": "padded"}, "use attention_kernel=varlen or flash"),
        ({"train_only": ["blocks.*"]}, "leave cuda_graphs off"),
    ):
        with pytest.raises(ValueError, match=message):
            check_graphs(replace(config, **changes), [])
    with pytest.raises(ValueError, match="second passes and masks, as of matching: leave cuda_graphs off"):
        check_graphs(config, ["matching"])
