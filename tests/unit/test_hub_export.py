"""Graphs of a model for other runtimes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from beit3_dist.checkpoint.model_folder import read_model_folder, save_model_folder
from beit3_dist.config import ModelConfig
from beit3_dist.hub import export
from beit3_dist.model import BEiT3
from beit3_dist.tasks.registry import task_class
from tools.convert_checkpoint import main

CONFIG = ModelConfig(
    layers=1, width=32, heads=2, ffn_width=48, patch_size=8, image_size=16, attention="per_modality",
    sub_layernorm=True, vl_expert_layers=1, vocab_size=50, visual_vocab_size=8, max_text_length=12,
)  # fmt: skip


def saved(folder: Path, task: str | None) -> Path:
    network = BEiT3(CONFIG) if task is None else task_class(task).network(CONFIG, 4)
    draw = torch.Generator().manual_seed(0)
    weights = {n: p.detach() + 0.2 * torch.randn(p.shape, generator=draw) for n, p in network.named_parameters()}
    entry = None if task is None else {"name": task, "classes": 4, "answers": list("abcd"), "text_length": 10}
    save_model_folder(folder, weights, CONFIG, task=entry)
    return folder


@pytest.mark.slow
def test_onnx_graphs(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute what the model does, in batches and lengths that they were not traced by; so do those in 8 bits, by
    and large."""
    caplog.set_level(logging.INFO, "beit3_dist")
    monkeypatch.setattr(export, "PARTS", {name: export.PARTS[name] for name in ("text", "answers")})  # each takes long
    folder = saved(tmp_path / "ours", "vqa")
    main([str(folder), str(tmp_path / "graphs"), "--to", "onnx", "--int8"])
    graphs = json.loads((tmp_path / "graphs/index.json").read_text())["graphs"]
    assert list(graphs) == ["text", "answers"]
    told = [record.getMessage() for record in caplog.records]
    assert sum("results off by" in line for line in told) == 2 and any("first choice" in line for line in told)
    for name, part, network in export.parts_of(read_model_folder(folder)):
        assert graphs[name]["inputs"] == list(part.inputs)
        given = export.inputs_for(part, network, 7, 11)
        expected = part.run(network, *given)
        assert export.deviation(expected, export.runner(tmp_path / f"graphs/{name}.onnx", part)(given)) < 1e-4
        off = export.deviation(expected, export.runner(tmp_path / f"graphs/{name}.int8.onnx", part)(given))
        assert 1e-4 < off < 0.1, "in 8 bits"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["captioning", None])
def test_programs_of_torch_export(tmp_path: Path, task: str | None) -> None:
    folder = saved(tmp_path / "ours", task)
    found = {name: (part, network) for name, part, network in export.parts_of(read_model_folder(folder))}
    part, network = found["next_words" if task else "masked"]
    program = export.program_of(part, network)
    for samples, words in ((1, 2), (7, 11)):
        given = export.inputs_for(part, network, samples, words)
        assert not task or given[2][:, -1].all(), "words that a caption goes on from stand at the end"
        assert export.deviation(part.run(network, *given), list(program.module()(*given))) < 1e-5


def test_a_graph_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, vision = saved(tmp_path / "ours", "imagenet"), export.PARTS["vision"]
    monkeypatch.setattr(export, "PARTS", {"vision": vision})
    monkeypatch.setattr(export, "program_of", lambda part, network: None)
    monkeypatch.setattr(
        export, "_write_program", lambda path, part, program: lambda given: [torch.ones(len(given[0]), 5, 32)]
    )
    with pytest.raises(SystemExit) as ended:
        main([str(folder), str(tmp_path / "graphs"), "--to", "torch_export"])
    assert ended.value.code == 2 and "vision: torch_export differs from torch by" in capsys.readouterr().err
    assert not (tmp_path / "graphs").exists()
    with pytest.raises(SystemExit):
        main([str(folder), str(tmp_path / "graphs"), "--to", "torch_export", "--int8"])
    assert "--int8 is of --to onnx" in capsys.readouterr().err
