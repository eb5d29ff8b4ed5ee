"""Compiled blocks compute what plain ones do, with code that knows no micro-batch's lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.kernels import check_kernels, use_kernels
from tests.equality import assert_close, assert_tensors_close
from tests.micro_batches import counts_of, prepared, pretraining, random_micro_batch
from tests.unit.tar_fixtures import small_run
from tools import benchmark

CONFIG = ModelConfig(
    layers=3, width=32, heads=2, ffn_width=64, patch_size=8, image_size=32, vocab_size=150, visual_vocab_size=40,
    max_text_length=20, drop_path=0.2, vl_expert_layers=1,
)  # fmt: skip
BATCHES: list[dict[str, int]] = [  # other lengths each time; then no pairs, and one text
    {"seed": 0}, {"seed": 1}, {"seed": 2, "images": 5}, {"seed": 3, "pairs": 0}, {"seed": 4, "texts": 1},
]  # fmt: skip


@pytest.fixture
def one_thread() -> Any:
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def objective(kernels: str, config: ModelConfig = CONFIG) -> PretrainingModule:
    model = BEiT3(config, seed=3)
    use_kernels(model, kernels)
    return pretraining(model, 5)


def step(module: PretrainingModule, batch: dict[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses [4] of a micro-batch, and its gradients in training."""
    micro_batch = random_micro_batch(CONFIG, **batch)
    loss, statistics = module(*prepared(module, micro_batch), counts_of(module, micro_batch), 7)
    if module.training:
        loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    module.zero_grad()
    return statistics[0], gradients


@pytest.mark.slow
def test_one_code_for_all_lengths(one_thread: None) -> None:
    """Losses and gradients of plain blocks. Three codes in training: of all blocks before attention, and after it of a
    block without and with a vision-language expert, the latter for selected tokens. Bit for bit the same results where
    the micro-batches come in another order: what is compiled first does not matter to a run that goes on."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = objective("torch").train(), objective("compiled").train()
    results = []
    for batch in BATCHES:
        expected, gradients = step(plain, batch)
        results.append(step(compiled, batch))
        assert_close(results[-1][0], expected, "losses")
        assert_tensors_close(results[-1][1], gradients)
    assert counters["stats"]["unique_graphs"] == 3
    with torch.no_grad():
        assert_close(step(compiled.eval(), BATCHES[0])[0], step(plain.eval(), BATCHES[0])[0], "losses in evaluation")

    torch._dynamo.reset()
    again = objective("compiled").train()
    for batch, (losses, gradients) in reversed(list(zip(BATCHES, results, strict=True))):
        other_losses, other = step(again, batch)
        assert torch.equal(other_losses, losses)
        assert all(torch.equal(other[name], gradient) for name, gradient in gradients.items())


@pytest.mark.slow
def test_below_fusion_blocks_are_compiled(one_thread: None) -> None:
    """Those of images beside words that rest, and of both, in two codes each; fusion stays as it is."""
    fusion: Any = {"attention": "per_modality", "vl_expert_layers": 0, "fusion_layers": 1, "language_layers": 1}
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (objective(kernels, replace(CONFIG, **fusion)).train() for kernels in ("torch", "compiled"))
    for batch in BATCHES[:2]:
        (losses, found), (expected, gradients) = step(compiled, batch), step(plain, batch)
        assert_close(losses, expected, "losses")
        assert_tensors_close(found, gradients)
    assert counters["stats"]["unique_graphs"] == 4


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_kernels(config.kernels)
    config.kernels = "compiled"
    with pytest.raises(
        ValueError, match="kernels=compiled needs a C[+][+] compiler, and no-such-compiler is not found"
    ):
        check_kernels(config.kernels)


def test_the_benchmark_refuses_what_a_run_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert benchmark.main(["model", "--kernels", "compiled"]) == 2
    error = capsys.readouterr().err
    assert "kernels=compiled needs a C++ compiler" in error and error.count("\n") == 1
