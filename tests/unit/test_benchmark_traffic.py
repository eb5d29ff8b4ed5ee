"""The traffic account: numbers counted by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from beit3_dist.config import ModelConfig, OptimConfig
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.model import BEiT3
from beit3_dist.parallel.mesh import Groups
from beit3_dist.plan import traffic as counting
from beit3_dist.tools.benchmarks import traffic as benchmark_traffic
from beit3_dist.tools.benchmarks.step import random_micro_batch
from beit3_dist.train.optimizer import parameter_groups
from tests.parallel.workers import run_workers
from tools import benchmark

META = torch.device("meta")
MODEL = ModelConfig(
    layers=2,
    vl_expert_layers=1,
    width=16,
    heads=2,
    ffn_width=24,
    patch_size=8,
    image_size=32,
    vocab_size=60,
    visual_vocab_size=20,
)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def many(count: int, elements: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [empty(elements, dtype=dtype) for _ in range(count)]


FP32 = torch.float32
OPERATIONS = {  # what is done -> (name, launches, bytes, floor)
    "add": (lambda: empty(1000) + empty(1000), ("add", 1, 6000, 6000)),
    "a repeated row": (lambda: empty(10, 100) + empty(1, 100).expand(10, 100), ("add", 1, 4200, 4200)),
    "in place": (lambda: empty(1000).add_(empty(1000)), ("add", 1, 6000, 6000)),
    "overwritten": (lambda: empty(1000, dtype=FP32).copy_(empty(1000)), ("copy", 1, 6000, 6000)),
    "zeroed": (lambda: empty(1000).zero_(), ("zero", 1, 2000, 2000)),
    "converted": (lambda: empty(1000).float(), ("to_copy", 1, 6000, 6000)),
    "130 joined": (lambda: torch.cat(many(130, 10)), ("cat", 2, 5200, 5200)),
    "rows taken": (
        lambda: empty(100, 10).index_select(0, empty(3, dtype=torch.int64)),
        ("index_select", 1, 2 * 60 + 24, 2 * 60 + 24),
    ),
    "rows put": (
        lambda: empty(100, 10).index_copy_(0, empty(3, dtype=torch.int64), empty(3, 10)),
        ("index_copy", 1, 2 * 60 + 24, 2 * 60 + 24),
    ),
    "sum by one block": (lambda: empty(1000, 10).sum(0), ("sum", 1, 20_020, 20_020)),
    "sum by several": (lambda: empty(10_000, 10).sum(0), ("sum", 2, 200_020, 200_020)),
    "65 tensors": (lambda: torch._foreach_copy_(many(65, 10, FP32), many(65, 10)), ("foreach_copy", 2, 3900, 3900)),
    "a large tensor": (
        lambda: torch._foreach_zero_(many(1, 321 * 65_536)),
        ("foreach_zero", 2, 2 * 321 * 65_536, 2 * 321 * 65_536),
    ),
    "product": (lambda: empty(10, 20) @ empty(20, 30), ("matrix products", 1, 2200, 2200)),
    "read twice": (
        lambda: torch.ops.aten.native_layer_norm_backward(
            empty(8, 10), empty(8, 10), [10], *many(2, 8, FP32), *many(2, 10), [True] * 3
        ),
        ("native_layer_norm_backward", 3, 3 * 160 + 64 + 4 * 20 + 2 * 160, 3 * 160 + 64 + 4 * 20),
    ),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_operations(case: str) -> None:
    compute, (name, launches, moved, floor) = OPERATIONS[case]
    with counting.Traffic() as traffic:
        compute()
    assert traffic.rows == {name: counting.Row(launches, moved, floor)}


def test_views_memory_and_the_host_are_free() -> None:
    with counting.Traffic() as traffic:
        empty(4, 6).view(2, 12).t()[:3].detach()
        torch.zeros(5) + 1  # on the host
        torch.ones(5).to(META)
        assert empty(dtype=FP32).item() == empty(dtype=FP32).cpu() == counting.UNKNOWN
    assert traffic.rows == {}


class tl:  # noqa: N801
    """Stands for triton.language in a kernel that only is read."""

    load = store = staticmethod(lambda *_: None)


def kernel_function(x_ptr: Any, place_ptr: Any, y_ptr: Any, both_ptr: Any, unused_ptr: Any) -> None:
    row = tl.load(place_ptr + 1)
    here = both_ptr + row
    tl.store(here, tl.load(here) + tl.load(x_ptr + 2))
    tl.store(y_ptr + row, row)


class Kernel:
    fn = staticmethod(kernel_function)
    arg_names = ("x_ptr", "place_ptr", "y_ptr", "both_ptr", "unused_ptr")


def test_kernels_are_read() -> None:
    assert tuple(names & {*Kernel.arg_names} for names in counting.pointers(kernel_function)) == (
        {"place_ptr", "both_ptr", "x_ptr"},
        {"y_ptr", "both_ptr"},
    )
    x, place, y, both = empty(100), empty(10, dtype=torch.int64), empty(200), empty(300)
    traffic = counting.Traffic()
    traffic.launch(Kernel, x, place, y, both, x, grid=(1,))
    assert [*traffic.rows.values()] == [counting.Row(1, 200 + 80 + 400 + 1200, 200 + 80 + 400 + 1200)]
    traffic.rows.clear()
    traffic.launch(Kernel, x, place, x, both, x, grid=(1,))  # nowhere to store to: x stands for what is not there
    assert [*traffic.rows.values()] == [counting.Row(1, 200 + 80 + 1200, 200 + 80 + 1200)]


def of_steps(groups: Groups) -> list[dict[str, tuple[int, int]]]:
    """(launches, bytes) by operation of a step of one micro-batch, of one of two, of one with an image tokenizer."""
    batch = random_micro_batch(MODEL, images=2, texts=2, pairs=3, text_length=9, caption_lengths=(4, 7))
    optim = OptimConfig(clip_norm=3.0)
    accounts = [benchmark_traffic.account(groups, MODEL, [batch] * n, optim) for n in (1, 2)]
    with META:
        tokenizer = VQKD(64, width=16, layers=1, heads=2, codebook_size=20, code_dim=4, target_dim=4)
    accounts.append(benchmark_traffic.account(groups, MODEL, [batch], optim, tokenizer=tokenizer))
    return [{name: (row.launches, row.bytes) for name, row in it.rows.items()} for it in accounts]


def test_a_step() -> None:
    """The parts of a step that can be counted by hand, of a model with 2 layers and 3 kinds of samples."""
    [(one, two, coded)] = run_workers(1, of_steps)
    groups = [group["params"] for group in parameter_groups(BEiT3(MODEL, device="meta"), 0.0)]
    elements, tensors = sum(p.numel() for group in groups for p in group), sum(map(len, groups))
    padded = sum(-(-sum(p.numel() for p in group) // 2) * 2 for group in groups)
    lists = [-(-len(group) // 64) for group in groups]
    assert one["attention's core"][0] == 2 * 4 * (1 + 3)  # of each kind of samples, and of words that belong to none
    assert one["foreach_copy"] == (sum(lists), 6 * elements)  # bf16 gradients to fp32 sums
    assert one["foreach_norm"] == (-(-tensors // 110) + 1, 4 * elements + 4 * tensors)
    assert one["fused_adamw"][0] == 2 and 0 <= one["fused_adamw"][1] - 28 * padded <= 16  # and the counts of steps
    # The second micro-batch's go to a flat buffer, and this to the sums.
    assert two["attention's core"][0] == 2 * one["attention's core"][0]
    assert two["foreach_copy"] == (2 * sum(lists), (6 + 4) * elements)
    assert two["foreach_norm"] == one["foreach_norm"] and two["fused_adamw"] == one["fused_adamw"]
    # The image tokenizer sees views of its own size, with a code for each patch: fp32 distances, int64 codes.
    assert coded["argmin"] == (1, 5 * MODEL.patches * (20 * 4 + 8))


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = counting.Traffic()
    traffic.record("matrix products", 7, 70, 70)
    traffic.record("add", 2, 30, 20)
    monkeypatch.setattr(benchmark_traffic, "account", lambda *_: traffic)
    monkeypatch.setattr(benchmark_traffic, "connect", lambda mesh: None)
    assert benchmark.main(["traffic", "--kernels", "torch", "--attention", "padded", "--samples", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["launches"], record["bytes"], record["floor_bytes"], record["all_launches"]) == (2, 30, 20, 9)
    assert benchmark.main(["traffic", "--kernels", "torch", "--attention", "padded", "--samples", "2"]) == 0
    assert "(9 launches with them)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples 0 is less than 1"),
        (["--recipe", "none.yaml"], "the recipe none.yaml cannot be read: No such file"),
        (["--kernels", "torch"], "--attention varlen needs --kernels triton"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["traffic", *arguments]) == 2
    assert message in capsys.readouterr().err
