"""Between a run and the checkpoint store."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from beit3_dist.config import DataConfig, RunConfig
from beit3_dist.training import checkpointing


def test_a_program_whose_version_cannot_be_told_ends_the_run_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone on PYTHONPATH: its run ended at its first checkpoint."""

    def version(name: str) -> str:
        if name == "beit3-dist":
            raise PackageNotFoundError(name)
        return "1"

    data = DataConfig(images="a.tar", texts="b.tar", pairs="c.tar")
    config = RunConfig(out=str(tmp_path / "run"), data=data, image_tokenizer="i", text_tokenizer="t")
    checkpointing.starting_point(config)
    monkeypatch.setattr(checkpointing, "version", version)
    with pytest.raises(ValueError, match=r"^beit3-dist is not installed: run `pip install -e .` in the repository$"):
        checkpointing.starting_point(config)
