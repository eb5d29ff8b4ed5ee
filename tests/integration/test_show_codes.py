"""tools/show_codes.py on a small run: what is drawn is the run's pictures, masks and codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3_dist.config import EvalConfig
from tests.integration.runs import run_config, train
from tests.parallel.workers import run_workers

pytest.importorskip("matplotlib")
TOOL = Path(__file__).parents[2] / "tools" / "show_codes.py"
GREY = 150


def show(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = run_config(tmp_path_factory.mktemp("show"), steps=4)
    data = config.data
    config.eval = EvalConfig(images=data.images, texts=data.texts, pairs=data.pairs)
    assert run_workers(1, train, config) == [""]
    return Path(config.out)


@pytest.mark.slow
def test_rows_of_a_pretraining_run(run: Path) -> None:
    result = show(run, "--pictures", 4)
    assert result.returncode == 0, result.stderr
    page = np.asarray(Image.open(run / "codes.png"))
    zoom, side = 128 // 32, 32
    assert page.shape == (4 * (side + 2) * zoom, 4 * (side + 2) * zoom, 3)
    page = page[::zoom, ::zoom].reshape(4, side + 2, 4, side + 2, 3)[:, :side, :, :side]  # [row, y, column, x, channel]
    original, codes, masked, predicted = page
    hidden = (masked != original).any(-1)
    assert (masked[hidden] == GREY).all() and np.array_equal(masked[~hidden], original[~hidden])
    share = hidden.transpose(1, 0, 2).reshape(4, -1).mean(1)
    assert (np.abs(share - 6 / 16) < 0.02).all(), "40 % of 16 patches are hidden"
    assert np.array_equal(predicted[~hidden], original[~hidden]), "only hidden patches are drawn from predictions"
    assert not np.array_equal(codes, original) and not np.array_equal(predicted, original)


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    for arguments, named in (
        ((tmp_path,), "config.yaml"),
        ((tmp_path / "none",), "none"),
        ((tmp_path, "--pictures", 0), "0"),
    ):
        result = show(*arguments)
        assert result.returncode == 2 and named in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
