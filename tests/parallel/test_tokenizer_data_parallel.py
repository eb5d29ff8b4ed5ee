"""The image tokenizer on two data-parallel processes takes the steps that one process takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit3_dist.config import OptimConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig, TokenizerDataConfig, TokenizerModelConfig
from beit3_dist.image_tokenizer.engine import TokenizerEngine
from beit3_dist.image_tokenizer.images import ImageBatches
from beit3_dist.parallel.mesh import Groups
from tests.parallel.workers import run_workers
from tests.unit.tar_fixtures import image_tar

STEPS, BATCH, SIDE, PATCH = 5, 16, 64, 8


class RandomTeacher(torch.nn.Module):
    """A fixed random map of every patch."""

    channels = 24

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(self.channels, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(3))
        self.register_buffer("weight", weight)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(pixels, self.weight, stride=PATCH).flatten(2).transpose(1, 2)


def tokenizer_config(folder: Path) -> TokenizerConfig:
    return TokenizerConfig(
        out=str(folder / "out"),
        data=TokenizerDataConfig(images=str(folder / "images.tar"), cache=str(folder / "cache")),
        steps=STEPS,
        batch=BATCH,
        precision="fp32",
        model=TokenizerModelConfig(image_size=SIDE, patch_size=PATCH, width=48, layers=2, heads=4, codebook_size=64,
                                   code_dim=8, decoder_layers=1, codebook_decay=0.9),
        optim=OptimConfig(lr=1e-3, warmup_steps=2, beta2=0.99, eps=1e-8),
    )  # fmt: skip


def five_steps(groups: Groups, config: TokenizerConfig, codebook: dict[str, np.ndarray] | None) -> dict[str, Any]:
    """For `run_workers`: codes [steps, b, N], losses and final weights; the codebook by k-means, or the given one."""
    mesh = groups.mesh
    engine = TokenizerEngine(config, groups, RandomTeacher())
    batches = ImageBatches(config.data, SIDE, config.seed, BATCH, mesh.rank, mesh.world)
    quantize = engine.model.quantize
    if codebook is None:
        engine.start_codebook(batches[0][0])
    else:
        quantize.load_state_dict({name: torch.from_numpy(table) for name, table in codebook.items()})
    started = {name: table.numpy().copy() for name, table in quantize.state_dict().items()}
    results = [engine.train_step(batches[step][0], step, lr=1e-3) for step in range(STEPS)]
    return {
        "started": started,
        "codes": np.stack([result.codes.numpy() for result in results]),
        "losses": np.array([[r.loss, r.reconstruction, r.grad_norm, r.usage.perplexity] for r in results]),
        "weights": {name: value.numpy() for name, value in engine.model.state_dict().items()},
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizerConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tokenizer")
    image_tar(folder / "images.tar", 40)
    config = tokenizer_config(folder)
    return config, run_workers(1, five_steps, config, None)[0]


def test_five_steps_from_a_copied_codebook(alone: tuple[TokenizerConfig, dict[str, Any]]) -> None:
    config, one = alone
    two = run_workers(2, five_steps, config, one["started"])
    codes = np.concatenate([rank["codes"] for rank in two], axis=1)
    assert len(np.unique(codes)) > 20, "a few codes for everything show nothing"
    equal = codes == one["codes"]
    assert equal.mean() >= 0.999, f"{equal.mean():.2%} of the assignments are equal"  # a tie may flip
    same = int(equal.all(axis=(1, 2)).cumprod().sum())  # steps before the first flip
    np.testing.assert_allclose(two[0]["losses"][:same], one["losses"][:same], rtol=1e-5)
    assert np.array_equal(two[0]["losses"], two[1]["losses"]), "the ranks report different losses"
    for name, value in two[1]["weights"].items():
        assert np.array_equal(two[0]["weights"][name], value), f"{name} differs between the ranks"
    if same == STEPS:
        for name, value in one["weights"].items():
            difference = np.linalg.norm(two[0]["weights"][name] - value)
            assert difference <= 1e-5 * max(np.linalg.norm(value), 1e-3), f"{name}: {difference}"


def test_k_means_on_vectors_gathered_in_sample_order(alone: tuple[TokenizerConfig, dict[str, Any]]) -> None:
    config, one = alone
    two = run_workers(2, five_steps, config, None)
    for name, table in one["started"].items():
        assert np.array_equal(two[0]["started"][name], two[1]["started"][name])
        # Each vector comes from a batch of another size: fp32 noise of the matrix products.
        np.testing.assert_allclose(two[0]["started"][name], table, rtol=1e-5, atol=1e-5)


def bad_step(groups: Groups, config: TokenizerConfig, spoilt: str) -> tuple[bool, bool]:
    """For `run_workers`: a good step, then one whose loss or gradient is not finite on the last rank. Whether it was
    skipped, and whether all is as the good step left it."""
    mesh = groups.mesh
    engine = TokenizerEngine(config, groups, RandomTeacher())
    pictures = torch.full((2, 3, SIDE, SIDE), 50 + mesh.rank, dtype=torch.uint8)
    engine.train_step(pictures, 0, lr=1e-3)
    before = [value.clone() for value in values_of(engine)]
    if mesh.rank == mesh.world - 1 and spoilt == "loss":
        engine.teacher.weight.fill_(float("inf"))
    elif mesh.rank == mesh.world - 1:
        next(engine.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    result = engine.train_step(pictures, 1, lr=1e-3)
    return result.skipped, all(torch.equal(a, b) for a, b in zip(before, values_of(engine), strict=True))


def values_of(engine: TokenizerEngine) -> list[Tensor]:
    """Weights, codebook and moments."""
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    return [*engine.model.state_dict().values(), *moments]


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_on_all_ranks(tmp_path: Path, spoilt: str) -> None:
    for skipped, unchanged in run_workers(2, bad_step, tokenizer_config(tmp_path), spoilt):
        assert skipped and unchanged
