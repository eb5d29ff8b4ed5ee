"""The command `beit3`: what it lists, what it refuses, and that its programs speak of it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beit3_dist import __main__ as command
from beit3_dist.recipe import find_recipe, read_recipe, shipped_recipes
from beit3_dist.run.stage_file import read_stages
from tools import list_recipes

REPOSITORY = Path(__file__).parents[2]


def test_every_program_is_a_command() -> None:
    files = (path for folder in ("launchers", "tools") for path in (REPOSITORY / folder).glob("*.py"))
    programs = {f"{path.parent.name}.{path.stem}" for path in files}
    assert set(command.MODULES.values()) == programs


def test_help_is_there_before_torch() -> None:
    program = "import sys; from beit3_dist.__main__ import main; main([]); sys.exit('jsonargparse' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"\n    {name} " in done.stdout for name in command.MODULES)


def test_what_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["pretrian"]) == 2
    error = "beit3: error: there is no command 'pretrian'; pretrain is one: beit3 --help lists all\n"
    assert capsys.readouterr().err == error
    assert command.main(["--nothing"]) == 2


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("beit3_dist.tools.list_recipes.main", interrupted)
    assert command.main(["recipes"]) == 130 and capsys.readouterr().err == "beit3 recipes: interrupted\n"


@pytest.mark.parametrize("name", command.MODULES)
def test_a_program_speaks_of_its_command(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beit3_dist.command_line.leave_when_asked", lambda program: None)  # this process stays
    monkeypatch.setattr(logging.getLogger("beit3_dist"), "handlers", [])
    with pytest.raises(SystemExit) as end:
        command.main(["--local_rank=0", name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: beit3 {name} ")
    file = command.MODULES[name].rpartition(".")[2]
    assert f"{file}.py" not in text and not re.search(r"python (tools|launchers)/", text)


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # of launchers/demo.sh
    for name in ("demo", "demo.yaml", "launchers/recipes/demo.yaml", "finetune/vqa_base"):
        assert find_recipe(name).is_file()
    assert find_recipe("nothing") == Path("nothing")
    assert [stage.stem for stage in read_stages(Path("vlmo_base_stages")).values()][0] == "vlmo_base_images"
    Path("mine.yaml").write_text("based_on: large\nsteps: 7\n")
    assert read_recipe("mine.yaml") == {**read_recipe("large"), "steps": 7}
    Path("large.yaml").write_text("steps: 8\n")  # one's own comes first
    assert read_recipe("large.yaml") == {"steps": 8}


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    list_recipes.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == shipped_recipes() and len(lines) > 40
    assert all(len(line.split("  ", 1)[1].strip()) > 10 and len(line) <= 122 for line in lines)
    list_recipes.main(["demo_clip"])
    assert re.search(r"^# demo_clip.yaml$.*^batch:", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
