"""What containers, workflows and other files of the project name exists, and they name one version."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from beit3_dist import __version__

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "launchers" / "containers"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_there_is(workflow: Path) -> None:
    named = re.findall(r"(?:tests|launchers|tools)/[\w/]+\.(?:py|sh)", "\n".join(steps(workflow)))
    assert named and not [name for name in named if not (ROOT / name).exists()]
    for command in steps(workflow):
        assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0, command


def test_every_range_has_a_lower_end_that_is_tried() -> None:
    """torch's by CI's job `lowest`, the others' by tests/lowest.sh, which reads them; torchvision's is torch's."""
    ranges = dict(re.match(r"([\w-]+)(?:\[\w+\])?(?:>=([\d.]+))?", each).groups() for each in PROJECT["dependencies"])
    assert [name for name, low in ranges.items() if low is None] == ["torchvision"]
    for extra in ("hub", "trackers", "data", "detection"):
        assert all(re.match(r"[\w-]+>=[\d.]+", each) for each in PROJECT["optional-dependencies"][extra]), extra
    commands = "\n".join(steps(ROOT / ".github/workflows/ci.yml"))
    assert f"torch=={ranges['torch']}.*" in commands and "tests/lowest.sh" in commands
    assert "tests/lowest.sh" in (ROOT / "tests/run.sh").read_text()


@pytest.mark.parametrize("file", ["Dockerfile", "beit3.def"])
def test_images_install_extras_that_there_are(file: str) -> None:
    text = (CONTAINERS / file).read_text()
    extras = re.findall(r"^[^#\n]*install\.sh ([\w,-]+)", text, re.MULTILINE)
    assert extras and {extra for some in extras for extra in some.split(",")} <= PROJECT["optional-dependencies"].keys()


def test_images_hold_what_the_package_is_made_of() -> None:
    """The files of an Apptainer image, and those that Docker is shown, are one list."""
    shown = re.findall(r"^!(\S+)$", (CONTAINERS / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    copied = re.findall(r"^    (\S+) /src/\1$", (CONTAINERS / "beit3.def").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(copied) and all((ROOT / name).exists() for name in shown)
    links = [path.readlink() for path in (ROOT / "beit3_dist").iterdir() if path.is_symlink()]
    assert {link.name for link in links} <= set(shown)


def test_the_linters_are_of_one_version() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and hooks[0]["rev"] == f"v{pinned[1]}"


def test_make_says_what_it_makes() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [name for name in targets if name != "help"]
