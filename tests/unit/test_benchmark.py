"""The benchmark compares equals, and its figures mean what they say. No time is asserted here."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from beit3_dist.config import ModelConfig
from tools import benchmark

TINY = [
    *("--layers", 2, "--width", 16, "--heads", 2, "--ffn_width", 24, "--patch_size", 8, "--image_size", 32),
    *("--vocab_size", 60, "--visual_vocab_size", 20, "--images", 2, "--texts", 2, "--pairs", 3),
    *("--text_length", 9, "--caption_lengths", 4, 7, "--repeats", 2),
]
CPU = torch.device("cpu")


def run(*arguments: object) -> int:
    """Exit code of the tool, in this process."""
    return benchmark.main(list(map(str, arguments)))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", "--json", *TINY) == 0
    record = json.loads(capsys.readouterr().out)
    ours, three, theirs = record["contenders"]
    assert record["ratio_vs_torchscale"] == theirs["step_s"] / ours["step_s"] > 0
    assert record["ratio_vs_three_passes"] == three["step_s"] / ours["step_s"]
    ratio = ours["activation_gb"] / theirs["activation_gb"]
    assert record["activation_memory_ratio_vs_torchscale"] == pytest.approx(ratio) and ratio > 0
    assert all(it["fastest_s"] <= it["step_s"] <= it["slowest_s"] for it in record["contenders"])
    assert set(record["losses"]) == {"image", "text", "pair_image", "pair_text"}
    assert record["options"]["text_length"] == 9 and record["options"]["caption_lengths"] == [4, 7]
    assert record["tokens"] >= 5 * 17 + 2 * 9 + 3 * 4


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", *TINY) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 8
    assert "equal losses: image" in printed and "ours, one pass" in printed and "torchscale, three passes" in printed


def contenders() -> list[benchmark.Contender]:
    options = benchmark.parse(["model", *map(str, TINY)])
    geometry = {name: getattr(options, name) for name in benchmark.GEOMETRY}
    config = ModelConfig(**geometry, attention="per_modality", sub_layernorm=True, vl_expert_layers=0, drop_path=0.0)
    return benchmark.model_contenders(config, benchmark.random_micro_batch(config, 2, 2, 3, 9, (4, 7)), CPU)


def test_nothing_is_timed_unless_losses_are_equal() -> None:
    three = contenders()
    assert len(benchmark.assert_equal_losses(three)) == 4
    with torch.no_grad():
        three[2].model.beit3.encoder.layers[1].ffn.B.fc1.bias[0] += 1e-2
    with pytest.raises(AssertionError, match="losses of torchscale, three passes differ"):
        benchmark.assert_equal_losses(three)


def test_a_step_of_each_learns_the_same() -> None:
    """The timed steps are the whole and the same work: after three of them all losses have fallen alike."""
    ours, three, theirs = contenders()
    before = sum(benchmark.assert_equal_losses([ours, theirs]))
    for _ in range(3):
        ours.step()
        theirs.step()
        assert all(p.grad is None for p in ours.model.parameters()), "gradients would add up over the steps"
    assert sum(benchmark.assert_equal_losses([ours, theirs])) < before
    assert three.model is ours.model and three.optimizer is ours.optimizer


def test_saved_bytes_of_a_known_graph() -> None:
    """x [5, 3] -> linear [4] -> exp: saved are x, the weight, which is a parameter, and exp's result, once for exp and
    once for its square."""
    model, x = nn.Linear(3, 4), torch.ones(5, 3, requires_grad=True)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        y = model(x).exp()
        return (y * y).sum(), y.detach()

    contender = benchmark.Contender("known", model, forward, benchmark.adamw(model))
    assert benchmark.activation_bytes(contender, CPU) == 4 * (5 * 3 + 5 * 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", 0], "--repeats 0 is less than 1"),
        (["--pairs", 0], "--pairs 0 is less than 1"),
        (["--text_length", 2], "--text_length"),
        (["--caption_lengths", 9, 5], "--caption_lengths"),
        (["--heads", 5], "model.width=768 is not divisible by model.heads=5"),
    ],
)
def test_mistakes(arguments: list[object], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", *arguments) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


def test_torchscale_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(config: ModelConfig) -> nn.Module:
        raise ModuleNotFoundError("No module named 'torchscale'")

    monkeypatch.setattr(benchmark, "torchscale_beit3", missing)
    assert run("model", *TINY) == 2
    assert "torchscale cannot be imported" in capsys.readouterr().err
