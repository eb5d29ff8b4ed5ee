"""The notebooks in examples/, cell by cell as a user runs them, with fewer steps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.launching import launch

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
FEWER = {"STEPS = 120": "STEPS = 2", "range(600)": "range(200)"}


def cells(path: Path) -> list[str]:
    """The code of a notebook, whose outputs are not kept."""
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell["outputs"] for cell in code)
    return ["".join(cell["source"]) for cell in code]


def main(arguments: list[str]) -> None:
    """For `launch`: a file's code, in a folder."""
    os.environ |= {"MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}
    os.chdir(arguments[1])
    exec(compile(Path(arguments[0]).read_text(), "notebook", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, tmp_path: Path) -> None:
    code = "\n".join(cells(path))
    for many, few in FEWER.items():
        assert many in code
        code = code.replace(many, few)
    (tmp_path / "cells.py").write_text(code)
    done = launch(__name__, str(tmp_path / "cells.py"), str(tmp_path))
    assert "of 12 new drawings: the colour of " in done.stdout, done.stderr[-3000:]
    assert (tmp_path / "shapes" / "model" / "config.json").is_file()
