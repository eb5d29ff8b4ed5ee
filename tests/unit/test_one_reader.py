"""One reader for one thing: calls that have a reader of their own are used by that reader alone.

What is right in one place and forgotten in its sibling begins as a second `rglob`, `tarfile` or `splitlines`. A new use
belongs into the reader; where it is something else, it gets a line here that says what.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path for folder in ("beit3_dist", "tools", "launchers") for path in (ROOT / folder).rglob("*.py") if path.is_file()
)

ALLOWED = {
    # Folders of pictures: data/kinds.py knows which files count.
    "rglob": set(),
    "os.walk": {"beit3_dist/data/kinds.py"},
    "os.listdir": {"beit3_dist/data/kinds.py"},
    "os.scandir": {"beit3_dist/tasks/examples.py"},  # whether the pictures that an index names are files
    "iterdir": {
        "beit3_dist/data/kinds.py",
        "tools/build_shards.py",  # whether OUT is empty
        "tools/build_index.py",  # the same
        "tools/benchmark_checkpoint.py",  # bytes of a checkpoint
    },
    "glob": {
        "beit3_dist/data/index.py",  # what a pattern names
        "beit3_dist/data/cache.py",  # the program's own files, in all of these
        "beit3_dist/data/unpack.py",
        "beit3_dist/checkpoint/find.py",
        "beit3_dist/checkpoint/read.py",
        "beit3_dist/checkpoint/store.py",
        "beit3_dist/training/run_folder.py",
        "tools/compare_tasks.py",
        "beit3_dist/data/demo_sources.py",  # a package's files
        "tools/benchmark_data.py",  # shards that it has written itself
    },
    # Tars: data/tars.py reads headers, data/unpack.py makes plain ones, data/members.py joins members.
    "import tarfile": {"tools/benchmark_run.py"},  # writes some
    "import gzip": set(),
    "import zlib": {"beit3_dist/data/unpack.py", "beit3_dist/data/metadata.py"},  # checksums of PNG's chunks
    "headers": {"beit3_dist/data/tars.py", "beit3_dist/data/streaming.py"},
    # Pictures: data/transforms.py decodes them, with data/metadata.py.
    "Image.open": {"beit3_dist/data/transforms.py"},
    "exif_transpose": set(),
    "getexif": {"beit3_dist/data/metadata.py"},
}
"""Call or import -> the modules that may use it."""


def uses(tree: ast.AST) -> Iterator[str]:
    """Calls by their last name, and by the last two, and imports, of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name.partition('.')[0]}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"import {(node.module or '').partition('.')[0]}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr
            if isinstance(node.func.value, ast.Name):
                yield f"{node.func.value.id}.{node.func.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


@pytest.fixture(scope="module")
def found() -> dict[str, set[str]]:
    """Call or import -> the modules that use it."""
    users: dict[str, set[str]] = {}
    for path in MODULES:
        for use in uses(ast.parse(path.read_bytes())):
            users.setdefault(use, set()).add(str(path.relative_to(ROOT)))
    return users


@pytest.mark.parametrize("use", ALLOWED)
def test_only_its_reader_uses_it(found: dict[str, set[str]], use: str) -> None:
    assert found.get(use, set()) == ALLOWED[use], f"{use}: use the reader, or say what else it is for"


def test_uses_are_found() -> None:
    source = "import tarfile\nfrom gzip import open as x\nfor p in Path('.').rglob('*'): Image.open(p)\nheaders(1)\n"
    assert {"import tarfile", "import gzip", "rglob", "Image.open", "headers"} <= set(uses(ast.parse(source)))
