"""Between a run and the checkpoint store."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import beit3_dist
from beit3_dist.run import checkpointing
from tests.conftest import REPOSITORY


def test_a_clone_on_the_path_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints name the programs' versions, also where none of them was installed."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = checkpointing._versions()
    assert versions.keys() == {"torch", "deepspeed", "beit3-dist"} and all(versions.values())


def test_the_version_is_the_projects() -> None:
    settings = tomllib.loads(Path(REPOSITORY, "pyproject.toml").read_text())
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "beit3_dist.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", beit3_dist.__version__)
