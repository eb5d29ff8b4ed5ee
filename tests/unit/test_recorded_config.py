"""The config of a run folder, and the tools that want a pretraining run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from beit3_dist.command_line import to_yaml
from beit3_dist.config import DataConfig, RunConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig, TokenizerDataConfig
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.reports.opened import open_run
from beit3_dist.run.recorded_config import pretraining_config
from beit3_dist.tasks.config import FinetuneConfig, TaskDataConfig
from tools import verify_order

PRETRAINING = RunConfig(
    out="out", text_tokenizer="t", image_tokenizer="v", data=DataConfig(images="i", texts="t", pairs="p")
)
OTHERS = {
    "fine-tuning": FinetuneConfig(task="nlvr2", out="out", text_tokenizer="t", data=TaskDataConfig(train="x")),
    "tokenizer": TokenizerConfig(out="out", data=TokenizerDataConfig(images="i")),
}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(PRETRAINING))
    found = pretraining_config(tmp_path, "tool.py")
    assert found == replace(PRETRAINING, objectives={NAME: MaskedDataModelingConfig()})
    (tmp_path / "config.yaml").write_text(to_yaml(found).replace("objectives:\n  masked_data_modeling:", "objective:"))
    assert pretraining_config(tmp_path, "tool.py") == found, "as former versions wrote it"
    with pytest.raises(ValueError, match="is not a run folder: it has no config.yaml"):
        pretraining_config(tmp_path / "none", "tool.py")


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_run_is_named(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(OTHERS[kind]))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for use in (lambda: open_run(tmp_path, "report.py"), lambda: verify_order.verify(tmp_path)):
        with pytest.raises(ValueError, match=rf"^{tmp_path} is no pretraining run"):
            use()


def test_a_config_that_is_refused_is_the_callers_error(tmp_path: Path) -> None:
    """No end of the process, in which a page may follow other runs."""
    (tmp_path / "config.yaml").write_text(to_yaml(PRETRAINING) + "older_field: 1\n")
    with pytest.raises(ValueError, match=rf"^the recipe {tmp_path}/config\.yaml: .*older_field"):
        open_run(tmp_path, "report.py")


@pytest.mark.parametrize("text", ["", "[]", "objective", "a: [", "[" * 200_000])
def test_what_is_no_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.yaml ") as refusal:
        pretraining_config(tmp_path, "tool.py")
    assert "\n" not in str(refusal.value)
