"""What the README and the pages of docs/ say exists, and what they tell to type is understood."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from beit3_dist.__main__ import MODULES
from beit3_dist.command_line import configured
from beit3_dist.config import ModelConfig, RunConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.model import BEiT3, parameter_counts
from beit3_dist.recipe import read_recipe
from beit3_dist.tasks.config import FinetuneConfig

REPOSITORY = Path(__file__).parents[2]
ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text()
CODE_LAYOUT = ARCHITECTURE.split("## How the code is laid out")[1].split("```")[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SHELL = [block for page in PAGES for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)]


def field_names(config: Any, prefix: str = "") -> set[str]:
    """Dotted names of all fields of a config class."""
    names = set()
    for field in fields(config):
        kind = get_type_hints(config)[field.name]
        names |= {prefix + field.name} | (field_names(kind, f"{prefix}{field.name}.") if is_dataclass(kind) else set())
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_it_names_exist(page: Path) -> None:
    files = re.findall(r"(?<![\w/])(?:launchers|tools|tests|ds_configs|examples)/[\w./-]*\w", page.read_text())
    assert not [name for name in files if "RECIPE" not in name and not (REPOSITORY / name).exists()]


def anchors(page: Path) -> set[str]:
    """What a link may point at in a page: its headings, as the site and hosts of repositories spell them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Pages of reference/ are written when the site is built; tests/unit/test_site.py has those."""
    links = re.findall(r"\]\((?!https://|reference/)([^)#\s]*)(?:#([^)]*))?\)", page.read_text())
    for name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def test_commands_are_understood() -> None:
    """By bash, and the commands of `beit3` are some that there are."""
    assert len(SHELL) > 15
    for block in SHELL:
        done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
        assert not done.returncode, f"{block}\n{done.stderr}"
    named = {name for block in SHELL for name in re.findall(r"(?:^beit3|beit3_dist) ([a-z][a-z-]+)", block, re.M)}
    assert named and not named - MODULES.keys()


def help_of(program: str, command: list[str]) -> str:
    """What a program of tools/ prints of itself, or of its command."""
    module: Any = importlib.import_module("beit3_dist." + program.removesuffix(".py").replace("/", "."))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="^0$"):
        getattr(module, "program", module.main)([*command, "--help"])
    return printed.getvalue()


def test_options_of_tools_are_some_that_there_are() -> None:
    """Each is in the program's help; fields of configs are tested below."""
    seen = 0
    for block in SHELL:
        for program, rest in re.findall(r"python (tools/\w+\.py)((?:[^\n#\\]|\\\n)*)", block):
            given = re.findall(r"(?<!\S)--[a-z][\w-]*(?![\w.-])", rest)
            words = help_of(program, re.findall(r"^ (\w+) ", rest))
            assert not [name for name in given if not re.search(rf"{name}\b", words)], f"{program}{rest}"
            seen += len(given)
    assert seen > 10


CONFIGS = {"pretrain": RunConfig, "finetune": FinetuneConfig, "train_image_tokenizer": TokenizerConfig}
LAUNCHED = [
    (name.replace("-", "_"), shlex.split(rest.replace("...", ""), comments=True))
    for block in SHELL
    for name, rest in re.findall(
        r"(?:launchers/|beit3 |beit3_dist |slurm/)(pretrain|finetune|train[_-]image[_-]tokenizer)(?:\.\w+)? +(--.*)",
        block.replace("\\\n", " "),
    )
]


@pytest.mark.parametrize("program, arguments", LAUNCHED, ids=[f"{i}-{name}" for i, (name, _) in enumerate(LAUNCHED)])
def test_runs_that_they_start_have_a_config(program: str, arguments: list[str]) -> None:
    """Every field, value and recipe of their command lines; what a page leaves out in "..." is filled up."""
    given = [word.replace("RECIPE", "demo").replace("SEED", "0") for word in arguments]
    needed = ["--text_tokenizer", "--image_tokenizer", "--data.images", "--data.texts", "--data.pairs"]
    if program == "pretrain":
        given += [word for name in needed if name not in given for word in (name, "FILE")]
    config = configured(CONFIGS[program], program, "", given)
    assert config.out


def test_the_first_page_tells_what_the_page_on_pretraining_does() -> None:
    readme, page = ((REPOSITORY / name).read_text() for name in ("README.md", "docs/pretrain.md"))
    (commands,) = {block for block in SHELL if block in readme and "# 3." in block}
    assert commands in page


def test_python_that_they_show_compiles() -> None:
    blocks = [block for page in PAGES for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert len(blocks) > 3
    for block in blocks:
        compile(block, "page", "exec")
        for module, names in re.findall(r"^from (beit3_dist[\w.]*) import (.*)$", block, re.M):
            assert all(hasattr(importlib.import_module(module), name.strip()) for name in names.split(","))


def test_files_that_the_walks_through_the_code_name_exist() -> None:
    """docs/architecture.md names them below the package."""
    walks = ARCHITECTURE
    named = re.findall(r"`([a-z_]+/[\w./]*)`", walks)
    assert len(named) > 40
    assert not [name for name in named if not (REPOSITORY / "beit3_dist" / name).exists()]
    assert not re.findall(r"`\w+\.py`", walks), "without its folder"


def test_layout_of_the_code_is_the_folders() -> None:
    """Every folder and module that the picture names exists, and each is named; "..." stands for modules that are not.
    Remarks stand in parentheses and before a colon."""
    package, picture = REPOSITORY / "beit3_dist", CODE_LAYOUT.split("ds_configs/")[0]
    assert {*re.findall(r"^  (\w+)\.py ", picture, re.M), "__init__"} == {path.stem for path in package.glob("*.py")}
    described = dict(re.findall(r"^  (\w+/) +(.*?)(?=^  \w|\Z)", picture, re.M | re.S))
    assert described.keys() == folders(package)
    for folder, words in described.items():
        named = {name.strip() for name in re.sub(r"\([^)]*\)", "", words).rpartition(":")[2].split(",")}
        there = {path.stem for path in (package / folder).glob("*.py")} - {"__init__"} | folders(package / folder)
        assert not named - there - {"..."}, f"{folder} in docs/architecture.md names what does not exist"
        assert "..." in named or not there - named, f"{folder} in docs/architecture.md leaves these out"


def folders(path: Path) -> set[str]:
    """Names of the folders with code in a folder."""
    return {f"{file.parent.name}/" for file in path.glob("*/*.py") if not file.parent.is_symlink()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_it_names_are_fields(page: Path) -> None:
    known = set().union(*map(field_names, CONFIGS.values())) | {"config", "help", "print_config"}
    dotted = set(re.findall(r"--([a-z_]+\.[a-z_.]+[a-z])", page.read_text()))
    assert not dotted - known
    sections = "|".join({name.split(".")[0] for name in known if "." in name})
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+[a-z])[`=:]", page.read_text()))
    assert not named - known


@pytest.mark.parametrize("recipe", ["demo", "base", "large", "giant"])
def test_parameters_of_the_recipes(recipe: str) -> None:
    row = re.search(rf"\| `{recipe}` \| ([\d.]+)([MB])", (REPOSITORY / "docs" / "recipes.md").read_text())
    assert row
    model = ModelConfig(**read_recipe(REPOSITORY / f"launchers/recipes/{recipe}.yaml")["model"])
    total = sum(parameter_counts(BEiT3(model, device="meta")).values())
    stated = float(row[1]) * {"M": 1e6, "B": 1e9}[row[2]]
    assert total == pytest.approx(stated, rel=0.03 if recipe == "giant" else 0.005)  # the paper rounds to 1.9B
