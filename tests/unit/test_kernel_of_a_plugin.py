"""A version of an operation that one file adds from outside of the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.registry import Operation, Place, Version, operations, register, register_version
from beit3_dist.model import BEiT3
from beit3_dist.parallel.kernels import chosen_versions, sizes_of, use_kernels
from beit3_dist.plugins import load_plugins
from beit3_dist.run.computing import computed_by
from tests.equality import assert_close
from tests.kernels import TOLERANCE, check
from tests.micro_batches import counts_of, prepared, pretraining, random_micro_batch
from tests.unit.tar_fixtures import small_run
from tests.unit.test_kernels import SIZES
from tools import benchmark

PLUGIN = str(Path(__file__).parents[1] / "plugins" / "two_moments.py")
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    layers=2, width=32, heads=2, ffn_width=48, patch_size=16, image_size=32, vocab_size=150, visual_vocab_size=40,
    max_text_length=20, vl_expert_layers=1,
)  # fmt: skip


@pytest.fixture
def layer_norm() -> Iterator[Operation]:
    """The operation, of which the plugin's version is gone afterwards."""
    operation = operations()["layer_norm"]
    versions, path = list(operation.versions), list(sys.path)
    yield operation
    operation.versions[:], sys.path[:] = versions, path
    sys.modules.pop("two_moments", None)


def computed() -> tuple[Tensor, Tensor, BEiT3]:
    """Losses, all gradients in one vector, and the model that they are of."""
    model = BEiT3(CONFIG, seed=3)
    use_kernels(model, "torch")
    objective, micro_batch = pretraining(model, 5), random_micro_batch(CONFIG)
    contribution, statistics = objective(
        *prepared(objective, micro_batch, CPU), counts_of(objective, micro_batch, CPU), 7
    )
    contribution.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return statistics[0], torch.cat(gradients), model


def test_it_computes_a_model(layer_norm: Operation, tmp_path: Path) -> None:
    losses, gradients, _ = computed()
    load_plugins([PLUGIN])
    found, its_gradients, model = computed()
    assert {m.compute.__module__ for m in model.modules() if type(m) is LayerNorm} == {"two_moments"}
    assert_close(found, losses, "losses")
    assert not torch.equal(its_gradients, gradients), "another formula rounds otherwise"
    assert computed_by(small_run(tmp_path), CPU).endswith("kernels torch, attention padded, layer_norm two_moments")


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_keeps_the_contract(layer_norm: Operation, dtype: torch.dtype, sizes: str) -> None:
    load_plugins([PLUGIN])
    check(layer_norm, layer_norm.version("two_moments"), SIZES[sizes], CPU, dtype)


def test_it_is_benchmarked(
    layer_norm: Operation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sizes = "--tokens 8 --width 24 --ffn_width 16 --masked 4 --classes 20 --repeats 1 --json".split()
    assert benchmark.main(["kernels", *sizes, "--plugins", PLUGIN]) == 0
    assert "layer_norm two_moments" in [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]]


def test_a_name_is_given_once(layer_norm: Operation) -> None:
    load_plugins([PLUGIN])
    del sys.modules["two_moments"]
    with pytest.raises(ValueError, match="two_moments.py cannot be imported: .*layer_norm has a version 'two_moments'"):
        load_plugins([PLUGIN])
    other = Operation("layer_norm", layer_norm.definition, layer_norm.cases)
    with pytest.raises(ValueError, match="there is an operation 'layer_norm' already"):
        register(other)


def test_it_serves_no_width_but_its_own(layer_norm: Operation) -> None:
    def lacks(place: Place) -> str:
        return "" if (place.device, place.width) == ("cpu", 32) else "rows of 32 numbers on a CPU"

    register_version("layer_norm", Version("of_32", "two_moments", ("torch",), lacks))
    models = [replace(CONFIG, width=width) for width in (32, 64)]
    chosen = [chosen_versions("torch", torch.float32, sizes_of(model)) for model in models]
    assert [versions["layer_norm"].name for versions in chosen if "layer_norm" in versions] == ["of_32"]
