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
    "os.scandir": {"beit3_dist/tasks/data/examples.py"},  # whether the pictures that an index names are files
    "iterdir": {
        "beit3_dist/data/kinds.py",
        "beit3_dist/tasks/data/glue.py",  # a benchmark's folder of tables
        "beit3_dist/checkpoint/files.py",  # whether OUT is empty
        "tools/benchmarks/checkpoint.py",  # bytes of a checkpoint
    },
    "glob": {
        "beit3_dist/data/index.py",  # what a pattern names
        "beit3_dist/data/cache.py",  # the program's own files, in all of these
        "beit3_dist/data/unpack.py",
        "beit3_dist/kernels/registry.py",  # the package's own
        "beit3_dist/checkpoint/find.py",
        "beit3_dist/checkpoint/read.py",
        "beit3_dist/checkpoint/store.py",
        "beit3_dist/run/folder.py",
        "beit3_dist/reports/contents.py",
        "tools/compare_tasks.py",
        "beit3_dist/demo/sources.py",  # a package's files
        "beit3_dist/tasks/registry.py",  # the package's own
        "beit3_dist/recipe.py",
        "tools/benchmarks/data.py",  # shards that it has written itself
    },
    # Tars: data/tars.py reads headers, data/unpack.py and compressed.py make plain ones, data/members.py joins members.
    "import tarfile": set(),
    "import gzip": set(),
    "import zlib": {
        "beit3_dist/data/compressed.py",
        "beit3_dist/data/metadata.py",  # checksums of PNG's chunks
        "beit3_dist/looking.py",  # what processes tell one another
    },
    "headers": {"beit3_dist/data/tars.py", "beit3_dist/data/streaming.py"},
    # Pictures: data/transforms.py decodes them, with data/metadata.py.
    "Image.open": {
        "beit3_dist/data/transforms.py",
        "beit3_dist/tasks/data/masks.py",  # numbers that are no colours
    },
    "exif_transpose": {"beit3_dist/hub/image_processing_beit3.py"},  # in folders where nothing of ours is there
    "getexif": {"beit3_dist/data/metadata.py"},
    # Text: opening.py reads small files whole, data/text_files.py lines, records and large JSON, data/tables.py cells.
    ".read_text": {"beit3_dist/tasks/registry.py"},  # the package's own
    ".splitlines": {"beit3_dist/tasks/registry.py"},
    "open to read text": set(),
    "text written in the locale's encoding": set(),
    "json.load": set(),
    "yaml.load": {"beit3_dist/opening.py"},
    "yaml.safe_load": {
        "beit3_dist/recipe.py",  # after it has looked for fields given twice
        "beit3_dist/run/resumption.py",  # a recipe that it has just made
    },
    "csv.reader": {"beit3_dist/data/tables.py"},
    "csv.DictReader": set(),
    # Weights: weights.py.
    "torch.load": {"beit3_dist/weights.py", "tools/benchmarks/checkpoint.py"},  # whose time the latter takes
    "torch.jit.load": {"beit3_dist/weights.py"},
    "load_file": {"beit3_dist/weights.py"},
    "import pickle": set(),
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
            yield from (node.func.attr, f".{node.func.attr}", ast.unparse(node.func))
            yield from text_access(node, node.func.attr, ast.unparse(node.func))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id
            yield from text_access(node, node.func.id, node.func.id)


def text_access(call: ast.Call, name: str, whole: str) -> Iterator[str]:
    """Whether a call of `open`, a module's or a path's, opens text, or one of `write_text` leaves its encoding open."""
    others = ("os.open", "Image.open", "tarfile.open", "_opener().open", "write_text")
    if whole in others or name not in ("open", "write_text"):
        return
    of_a_path = whole != "open"
    modes = [word.value for word in call.keywords if word.arg == "mode"] or call.args[0 if of_a_path else 1 :][:1]
    mode = ast.literal_eval(modes[0]) if modes and name == "open" else "w" if name == "write_text" else "r"
    if "b" not in mode and not set(mode) & set("wax"):
        yield "open to read text"
    elif "b" not in mode and not any(word.arg == "encoding" for word in call.keywords):
        yield "text written in the locale's encoding"


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
    for source in ("open(p)", "open(p, 'r')", "open(p, mode='rt')", "p.open()", "p.open('r', encoding='utf-8')"):
        assert "open to read text" in set(uses(ast.parse(source)))
    for source in ("open(p, 'w')", "open(p, 'a')", "p.open('x')", "p.write_text(t)"):
        assert "text written in the locale's encoding" in set(uses(ast.parse(source)))
    for source in ("open(p, 'rb')", "p.open('wb')", "os.open(p, 1)", "open(p, 'w', encoding='u8')", "write_text(p, t)"):
        assert not {"open to read text", "text written in the locale's encoding"} & set(uses(ast.parse(source)))
    assert {".read_text", ".splitlines", "torch.load"} <= set(uses(ast.parse("torch.load(p.read_text().splitlines())")))
    assert ".read_text" not in set(uses(ast.parse("read_text(p)")))
