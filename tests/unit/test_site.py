"""The site of docs/ is whole: built strictly, with the pages that the code writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beit3_dist.__main__ import MODULES

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    """Every page is in its contents, no link or anchor leads nowhere, and each command is there with its options."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert not built.returncode, built.stderr
    commands = (tmp_path / "site/reference/commands/index.html").read_text()
    assert set(re.findall(r'<h3 id="beit3-([a-z-]+)"', commands)) == MODULES.keys()
    assert all(f"usage: beit3 {name}" in commands for name in MODULES) and "--objectives.contrastive.weight" in commands
    parts = re.findall(r'<h4 id="beit3-([a-z-]+)"', commands)
    assert {"build-shards-images", "build-index-vqa", "benchmark-kernels"} <= {*parts}
    python = (tmp_path / "site/reference/python/index.html").read_text()
    assert all(f'id="{name}"' in python for name in ("beit3_distpretrain", "modelembed_images"))
    pages = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'(?:src|rel="stylesheet" href)="?https?:', pages), "a page asks another host for something"
