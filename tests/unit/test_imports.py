"""Imports go one way: no module imports what stands above it, and none itself by way of others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Set
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FLOORS = (  # a floor imports those before it, and none of its own
    ("kernels",),
    ("model",),
    ("optimizers",),
    ("data", "parallel", "checkpoint"),
    ("teachers", "trackers"),
    ("objectives",),
    ("image_tokenizer",),
    ("tasks",),
    ("run", "inference", "demo"),
    ("train", "hub"),
    ("plan",),
    ("reports",),
    ("use",),
    ("tools", "launchers", "session"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
GROUND = -1
"""Of all other modules at the top of the package (config, opening, ...): everything imports them, and they no room."""
EXCEPTIONS = {
    ("beit3_dist.model.vqkd", "beit3_dist.image_tokenizer.network"),  # an alias: the image tokenizer's public name
    ("beit3_dist.model.vqkd", "beit3_dist.image_tokenizer.files"),
}

Graph = dict[str, set[str]]
"""Module -> modules that it imports, wherever in its text."""


def graph_of(root: Path, annotations: bool = True) -> Graph:
    """The imports among the modules of a repository, but for its tests. `annotations`: those for type checkers too."""
    trees = trees_of(root)
    return {name: imports(name, tree, trees.keys(), annotations) - {name} for name, tree in trees.items()}


@cache
def trees_of(root: Path) -> dict[str, ast.Module]:
    """Module -> its syntax."""
    paths = [path for folder in ("beit3_dist", "tools", "launchers") for path in (root / folder).rglob("*.py")]
    modules = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: ast.parse(path.read_text()) for name, path in modules.items()}


def imports(name: str, tree: ast.Module, modules: Set[str], annotations: bool) -> set[str]:
    """Those of `modules` that the module `name` imports."""
    found: set[str] = set()
    body = tree.body
    if not annotations:
        body = [node for node in body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    for node in (inner for outer in body for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            beside = name.startswith("beit3_dist.hub.")  # its files also lie in folders that transformers loads
            assert node.level <= beside and node.module, "imports name the whole path"
            module = f"{name.rpartition('.')[0]}.{node.module}" if node.level else node.module
            module = re.sub(r"^beit3_dist\.(?=(tools|launchers)\b)", "", module)  # links in the package
            inside = {f"{module}.{alias.name}" for alias in node.names}
            found |= inside & modules or {module}
    return found & modules


def floor(module: str) -> tuple[int, str]:
    """The floor and the room of a module."""
    parts = module.removeprefix("beit3_dist.").split(".")
    return FLOOR.get(parts[0], GROUND), parts[0] if parts[0] in FLOOR else ""


def upwards(graph: Graph) -> set[tuple[str, str]]:
    """Imports of another room that does not stand below."""
    pairs = {(module, other) for module, others in graph.items() for other in others}
    return {(a, b) for a, b in pairs if floor(a)[0] <= floor(b)[0] and floor(a)[1] != floor(b)[1]}


def circle(graph: Graph) -> list[str]:
    """Modules of which each imports the next one, and the last one the first; none where there is no such circle."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        found = next((c for other in sorted(graph[module]) if (c := visit(other, [*path, module]))), [])
        done.add(module)
        return found

    return next((found for module in graph if (found := visit(module, []))), [])


def test_no_module_imports_upwards() -> None:
    graph = graph_of(REPOSITORY)
    rooms = {path.parent.name for path in REPOSITORY.glob("beit3_dist/*/__init__.py")}
    assert rooms | {"inference", "session", "tools", "launchers"} == FLOOR.keys()
    assert len(graph) > 150 and "beit3_dist.config" in graph["beit3_dist.train.pretraining"]
    assert upwards(graph) <= EXCEPTIONS


def test_what_needs_no_torch_starts_without_it() -> None:
    """Importing it takes seconds, and each of a pool's processes of such a tool would import it again."""
    tools = ("build_index", "check_shards", "compare_tasks", "convert_checkpoint", "precompute_codes",
             "train_text_tokenizer")  # fmt: skip
    launchers = ("pretrain", "finetune", "train_image_tokenizer")
    modules = [f"tools.{name}" for name in tools] + [f"launchers.{name}" for name in launchers]
    program = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = graph_of(REPOSITORY, annotations=False)
    for module, other in EXCEPTIONS:
        graph[module].discard(other)
    assert circle(graph) == []


def test_an_import_upwards_and_a_circle_are_seen(tmp_path: Path) -> None:
    texts = {
        "config": "import numpy",
        "opening": "from beit3_dist.data import order",
        "kernels/__init__": "",
        "kernels/linear": "from beit3_dist.config import RunConfig",
        "model/__init__": "from beit3_dist.kernels import linear\nfrom beit3_dist.model import head",
        "model/head": "def f():\n    import beit3_dist.model.block",
        "model/block": "from beit3_dist.model import head\nimport beit3_dist.train.loop",
        "data/__init__": "",
        "data/order": "import beit3_dist.checkpoint.store",
        "checkpoint/__init__": "",
        "checkpoint/store": "from beit3_dist.kernels.linear import Linear",
        "train/__init__": "",
        "train/loop": "import beit3_dist.data.order\nfrom beit3_dist import config",
    }
    for name, text in texts.items():
        path = tmp_path / "beit3_dist" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = graph_of(tmp_path)
    assert graph["beit3_dist.model"] == {"beit3_dist.kernels.linear", "beit3_dist.model.head"}
    assert upwards(graph) == {
        ("beit3_dist.opening", "beit3_dist.data.order"),
        ("beit3_dist.model.block", "beit3_dist.train.loop"),
        ("beit3_dist.data.order", "beit3_dist.checkpoint.store"),
    }
    assert set(circle(graph)) == {"beit3_dist.model.head", "beit3_dist.model.block"}
    graph["beit3_dist.model.block"].clear()
    assert circle(graph) == []
