"""A run whose image tokenizer gives one code for everything says so, in its log, its records and its report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from beit3_dist.config import ParallelConfig
from beit3_dist.image_tokenizer.files import load_vqkd, save_vqkd
from tests.integration.runs import metrics, run_config, save_random_tokenizer, train
from tests.parallel.workers import run_workers
from tools import report


@pytest.mark.slow
def test_one_code_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All weights are finite, and the codebook is one vector again and again."""
    tokenizer = load_vqkd(save_random_tokenizer(tmp_path / "image_tokenizer.pth"))
    tokenizer.quantize.embedding.weight.copy_(torch.ones_like(tokenizer.quantize.embedding.weight))
    save_vqkd(tokenizer, tmp_path / "image_tokenizer.pth")
    config = run_config(tmp_path, steps=12, parallel=ParallelConfig(zero_stage=1))
    assert run_workers(1, train, config) == [""]
    records = metrics(config.out)
    assert [r.get("entropy_image") for r in records] == [0.0] * 10 + [None] * 2
    assert all(record["entropy_text"] > 1 for record in records[:10])
    log = Path(config.out, "logs", "rank00000.log").read_text()
    for titles in ("images", "images of pairs"):
        assert log.count(f"the targets of {titles} have collapsed: 100.0% of ") == 1
    assert "texts have collapsed" not in log
    report.main([config.out, "--pictures", "1"])
    assert capsys.readouterr().out.count("have collapsed: 100.0% of ") == 2
