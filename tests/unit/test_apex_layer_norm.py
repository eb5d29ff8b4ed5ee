"""Apex counts as present only where NVIDIA's is, with its kernels; the public index has another of that name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from beit3_dist.kernels.layer_norm import LayerNorm, apex
from beit3_dist.kernels.layer_norm.apex import apex_layer_norm

KERNELS, MODULE, FUNCTION = "fused_layer_norm_cuda", "apex.normalization.fused_layer_norm", "fused_layer_norm_affine"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    apex_layer_norm.cache_clear()
    yield
    apex_layer_norm.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    """Puts a module and its empty parents in place for a test."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(attributes)


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, KERNELS)
    monkeypatch.setitem(sys.modules, "apex", None)  # makes the import fail
    assert apex_layer_norm() is None


def test_another_package_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, KERNELS)
    install(monkeypatch, "apex", some_web_framework=True)
    assert apex_layer_norm() is None


def test_a_module_without_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, KERNELS)
    install(monkeypatch, MODULE)
    assert apex_layer_norm() is None


def test_apex_built_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python half imports all the same, and fails at the first call."""
    install(monkeypatch, MODULE, **{FUNCTION: lambda: None})
    monkeypatch.setitem(sys.modules, KERNELS, None)
    assert apex_layer_norm() is None


def test_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    function = lambda: None  # noqa: E731
    install(monkeypatch, KERNELS)
    install(monkeypatch, MODULE, **{FUNCTION: function})
    assert apex_layer_norm() is function


def test_the_fused_norm_runs_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fused(x, weight, bias, shape, eps):
        calls.append((shape, eps))
        return "fused"

    monkeypatch.setattr(apex, "apex_layer_norm", lambda: fused)
    norm = LayerNorm(4, 1e-5)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(x), torch.nn.functional.layer_norm(x, (4,), norm.weight, norm.bias, 1e-5)) and not calls
    assert norm(SimpleNamespace(is_cuda=True, numel=lambda: 12)) == "fused" and calls == [((4,), 1e-5)]


def test_cuda_gets_torchs_without_apex_and_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "plain_layer_norm", lambda *_: "plain")
    for fused, elements in ((None, 12), (lambda *_: "fused", 0)):
        monkeypatch.setattr(apex, "apex_layer_norm", lambda fused=fused: fused)
        assert LayerNorm(4, 1e-5)(SimpleNamespace(is_cuda=True, numel=lambda n=elements: n)) == "plain"
