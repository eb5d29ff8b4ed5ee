"""The saving benchmark compares equal values and measures what it says. No time is asserted here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from beit3_dist.tools.benchmarks import checkpoint
from tests.unit.small_checkpoints import one_process as one_process
from tools import benchmark

RECIPE = "model: {layers: 2, width: 8, heads: 2, ffn_width: 12, vl_expert_layers: 1, vocab_size: 50}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_json(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    assert benchmark.main(f"checkpoint --json --rounds 3 --recipe {recipe} --folder {disk}".split()) == 0
    record = json.loads(capsys.readouterr().out)
    figures = {name: figure["median_s"] for name, figure in record["figures"].items()}
    assert record["pause_ratio_vs_copy"] == figures["pause"] / figures["copy"]
    assert record["durable_ratio_vs_torch_save"] == figures["torch.save"] / figures["ours"]
    assert record["durable_ratio_vs_distributed_checkpoint"] == figures["dcp"] / figures["ours"]
    assert figures["pause"] < figures["ours"]
    model = checkpoint.model_of(recipe)
    values = 12 * sum(shape.numel() for shape in checkpoint.shapes_of(model).values())
    assert values < record["bytes"] < values + 200_000, "weights and both moments, and headers"
    assert record["giant"]["bytes"] == pytest.approx(12 * 1.946e9, rel=1e-2)
    assert not list(disk.iterdir()) and not dist.is_initialized(), "it leaves nothing behind"


@pytest.mark.parametrize("way", ["ours", "torch.save", "torch.distributed.checkpoint"])
def test_other_values_are_noticed(
    way: str, recipe: Path, one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders = checkpoint.Contenders(checkpoint.model_of(recipe), tmp_path, torch.device("cpu"))
    for save in (contenders.ours, contenders.torch_save, contenders.distributed):
        save()
    contenders.assert_equal_values()
    loaded = contenders.loaded

    def with_a_difference() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name, tensors in loaded():
            if name == way:
                next(iter(tensors.values()))[0] += 1
            yield name, tensors

    monkeypatch.setattr(contenders, "loaded", with_a_difference)
    with pytest.raises(AssertionError, match=f"{way} gives back other values of"):
        contenders.assert_equal_values()


@pytest.mark.parametrize("option", ["--rounds 0", "--folder /nowhere", "--recipe /nowhere.yaml"])
def test_mistakes(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["checkpoint", *option.split()]) == 2
    assert option.split()[1] in capsys.readouterr().err
