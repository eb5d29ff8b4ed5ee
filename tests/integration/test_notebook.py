"""The notebooks in examples/, cell by cell as a user runs them, with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parallel.workers import run_workers

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
FEWER = {"STEPS = 120": "STEPS = 2", "range(600)": "range(80)"}


def cells(path: Path) -> list[str]:
    """The code of a notebook, whose outputs are not kept."""
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell["outputs"] for cell in code)
    return ["".join(cell["source"]) for cell in code]


def execute(groups: object, folder: str, code: list[str]) -> str:
    """In a process of its own: all cells in one namespace; what they have printed last."""
    import contextlib
    import io
    import os

    import matplotlib

    matplotlib.use("agg")
    os.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for cell in code:
            exec(compile(cell, "a cell", "exec"), names)
    return printed.getvalue()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, tmp_path: Path) -> None:
    code = "\0".join(cells(path))
    for many, few in FEWER.items():
        assert many in code
        code = code.replace(many, few)
    (printed,) = run_workers(1, execute, str(tmp_path), code.split("\0"))
    assert "of 12 new drawings: the colour of " in printed
    assert (tmp_path / "shapes" / "model" / "config.json").is_file()
