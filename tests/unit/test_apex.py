"""Apex counts as present only where NVIDIA's is: the public index has an unrelated package of that name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from beit3_dist.kernels import layer_norm
from beit3_dist.kernels.apex import apex_function
from beit3_dist.kernels.layer_norm import LayerNorm

NORM = ("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    apex_function.cache_clear()
    yield
    apex_function.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    """Puts a module and its empty parents in place for a test."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(attributes)


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)  # makes the import fail
    assert apex_function(*NORM) is None


def test_another_package_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "apex", some_web_framework=True)
    assert apex_function(*NORM) is None
    assert apex_function("apex.optimizers", "FusedAdam") is None


def test_a_module_without_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, NORM[0])
    assert apex_function(*NORM) is None


def test_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    function = lambda: None  # noqa: E731
    install(monkeypatch, NORM[0], **{NORM[1]: function})
    assert apex_function(*NORM) is function


def test_the_fused_norm_runs_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fused(x, weight, bias, shape, eps):
        calls.append((shape, eps))
        return "fused"

    install(monkeypatch, NORM[0], **{NORM[1]: fused})
    norm = LayerNorm(4, 1e-5)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(x), torch.nn.functional.layer_norm(x, (4,), norm.weight, norm.bias, 1e-5)) and not calls
    on_cuda = SimpleNamespace(is_cuda=True)
    assert norm(on_cuda) == "fused" and calls == [((4,), 1e-5)]


def test_without_apex_cuda_gets_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setattr(layer_norm, "plain_layer_norm", lambda *_: "plain")
    assert LayerNorm(4, 1e-5)(SimpleNamespace(is_cuda=True)) == "plain"
