"""What every test needs before it imports anything of ours."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

# Until all tests are collected, what is made is imported modules, which stay: they are not searched for garbage.
gc.disable()

import pytest  # noqa: E402
import torch  # noqa: E402

from beit3_dist import leaving  # noqa: E402

REPOSITORY = Path(__file__).parent.parent

# For programs that tests start: the package is found even where it is not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))

# DeepSpeed decides at its import, from the packages that it finds, so this comes before.
# Triton decides when a kernel is defined whether its interpreter will run it.
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TRITON_INTERPRET"] = "1"


def define_torchvision_operators() -> torch.library.Library | None:
    """Makes `import torchvision`, and so `import timm`, work where torchvision's C++ does not fit this torch.

    torchvision registers shapes for two operators of its C++ library while it is imported, and raises if they do not
    exist. Declared, but not implemented, they are enough for its transforms and for timm's models. None if the
    library is there. The result must be kept: the declarations go with it.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def preload_the_fork_server() -> None:
    """A process has one fork server, for loader processes and for test workers, and it imports what was asked for when
    it started. Let it be what workers need, whoever comes first. (On a GPU nothing that has imported DeepSpeed may be
    forked, and workers do without.)"""
    from tests.parallel.workers import PRELOAD

    forkserver.set_forkserver_preload(PRELOAD)
    forkserver.set_forkserver_preload = lambda modules: None  # type: ignore[assignment]


if not torch.cuda.is_available():
    preload_the_fork_server()

_torchvision_operators = define_torchvision_operators()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's folder for shard indexes: what `data.cache` names in a run."""
    return tmp_path_factory.mktemp("cache")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The full product of layouts takes long: it runs only under `-m product`."""
    if "product" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("product")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("product")]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def deaf() -> Iterator[None]:
    """A program that a test calls in this process begins to listen for signals to go: one would end the tests, or what
    is forked by later ones would not heed it."""
    yield
    leaving._forget()
