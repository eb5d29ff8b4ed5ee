"""What the engine does to the model it does to no other network: targets do not depend on the ZeRO stage, nor on how
many tensor ranks share the images out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from beit3_dist.config import BatchConfig, ParallelConfig, RunConfig
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import ImageTargets
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from tests.integration.runs import metrics, run_config, train
from tests.parallel.test_layouts import Layout
from tests.parallel.training import SMALL, engine_run
from tests.parallel.workers import Workers, run_workers


def tokenizer_near_ties() -> VQKD:
    """An image tokenizer whose codes come in pairs that differ in a float's last bits: how its layers round decides
    between the two."""
    tokenizer = VQKD(SMALL["image_size"], patch_size=SMALL["patch_size"], width=192, layers=2, heads=2, code_dim=8,
                     codebook_size=SMALL["visual_vocab_size"], decoder_layers=1, target_dim=8)  # fmt: skip
    tokenizer.initialize(0)
    draw = torch.Generator().manual_seed(0)
    for parameter in tokenizer.parameters():
        if parameter.ndim == 1:  # biases of zero add nothing that could be rounded
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    codes = tokenizer.quantize.embedding.weight.data
    codes[1::2] = codes[::2] + 1e-7 * torch.randn(codes[::2].shape, generator=draw)
    return tokenizer


def run_with_tokenizer(groups: Groups, config: RunConfig) -> dict[str, Any]:
    """`engine_run` with a tokenizer that runs before each micro-batch: codes, and what they are the nearest of."""
    tokenizer, linear = tokenizer_near_ties(), nn.functional.linear
    targets, codes, vectors = ImageTargets(tokenizer, groups.mesh.device), [], []

    def tokenize(pictures: Tensor) -> Tensor:
        codes.append(targets(pictures))
        with torch.no_grad():
            vectors.append(tokenizer.embed(pictures.float() / 255))
        return codes[-1]

    run = engine_run(groups, config, tokenize=tokenize)
    kept = {name: run[name] for name in ("losses", "grad_norms")}
    return kept | {
        "torch's linear": nn.functional.linear is linear,
        "codes": torch.cat(codes).numpy(),
        "vectors": torch.cat(vectors).numpy(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", ["paper", "released"])
def test_targets_are_those_of_every_stage(model: str) -> None:
    """Codes bit for bit, losses to 1e-6, over steps that update the weights."""
    with Workers(1) as alone:
        (plain,), *others = (
            alone.run(run_with_tokenizer, Layout(stage, model, accumulation=2).config()) for stage in (0, 1, 2, 3)
        )
    assert len(np.unique(plain["codes"])) > 4, "hardly any code is used"
    for stage, (run,) in enumerate(others, start=1):
        assert np.array_equal(run["vectors"], plain["vectors"]), f"the tokenizer rounds differently under ZeRO-{stage}"
        assert np.array_equal(run["codes"], plain["codes"]), f"other codes under ZeRO-{stage}"
        assert run["torch's linear"], f"ZeRO-{stage} has replaced torch's linear in the whole process"
        np.testing.assert_allclose(run["losses"], plain["losses"], rtol=1e-6)
        np.testing.assert_allclose(run["grad_norms"], plain["grad_norms"], rtol=1e-5)


def shared_codes(groups: Groups, numbers: list[int]) -> list[tuple[int, list[list[int]]]]:
    """For each of these numbers of images: how many this rank encodes, and the codes of all."""
    draw, found = torch.Generator().manual_seed(0), []
    tokenizer = VQKD(16, patch_size=8, width=32, layers=1, heads=2, code_dim=8, codebook_size=40, decoder_layers=1,
                     target_dim=8)  # fmt: skip
    tokenizer.initialize(0)
    targets = ImageTargets(tokenizer, groups.mesh.device, groups.tensor)
    for number in numbers:
        images = torch.randint(0, 256, (number, 3, 16, 16), dtype=torch.uint8, generator=draw)
        with patch.object(tokenizer, "encode", wraps=tokenizer.encode) as encode:
            codes = targets(images.to(groups.mesh.device))
        found.append((len(encode.call_args.args[0]), codes.tolist()))
    return found


@pytest.mark.slow
def test_tensor_ranks_share_the_images_out() -> None:
    """Whether their number divides by the ranks or not; each encodes its share and has all codes."""
    numbers = [6, 7, 3, 2, 1, 0]
    (alone,) = run_workers(1, shared_codes, numbers)
    assert [encoded for encoded, _ in alone] == numbers
    assert len({code for _, images in alone for codes in images for code in codes}) > 4, "hardly any code is used"
    for ranks in (2, 3):
        for rank in run_workers(ranks, shared_codes, numbers, tensor=ranks):
            assert [encoded for encoded, _ in rank] == [-(-number // ranks) for number in numbers]
            assert [codes for _, codes in rank] == [codes for _, codes in alone]


def codes_of_run(groups: Groups, config: RunConfig) -> list[list[int]]:
    """Of a run with an image tokenizer: the codes of its micro-batches, on a process that makes targets."""
    codes: list[list[int]] = []
    call = ImageTargets.__call__

    def watched(targets: ImageTargets, images: Tensor) -> Tensor:
        found = call(targets, images)
        codes.append(found.flatten().tolist())
        return found

    with patch.object(ImageTargets, "__call__", watched):
        assert train(groups, config) == ""
    return codes


@pytest.mark.slow
def test_a_run_has_the_codes_of_one_process(tmp_path: Path) -> None:
    """Three images in each micro-batch, over two tensor ranks; behind a pipeline's first stage, too."""
    batch = BatchConfig(images=2, texts=4, pairs=4, accumulation=2)
    config = run_config(tmp_path, steps=3, batch=batch, out=str(tmp_path / "one"))
    ((*alone,),) = run_workers(1, codes_of_run, config)
    assert len(alone) == 6 and {len(codes) for codes in alone} == {3 * config.model.patches}
    for world, pipeline in ((2, 1), (4, 2)):
        out = str(tmp_path / f"{world}")
        parallel = ParallelConfig(zero_stage=1, tensor=2, pipeline=pipeline)
        ranks = run_workers(world, codes_of_run, replace(config, out=out, parallel=parallel), tensor=2,
                            pipeline=pipeline)  # fmt: skip
        assert ranks == [[]] * (world - 2) + [alone] * 2
        expected = [record["loss"] for record in metrics(config.out)]
        assert [record["loss"] for record in metrics(out)] == pytest.approx(expected, rel=1e-5)


def kept_views(groups: Groups, config: RunConfig) -> tuple[int, list[list[int]]]:
    """Of what a run's graphs save: how many are gathered parameters themselves, which DeepSpeed empties, and the shapes
    of others in the same memory, which would hold it until the backward pass. What is never sharded does not count."""
    parameters, views = 0, []
    train_step = Engine.train_step

    def watched(engine: Engine, *arguments: Any) -> Any:
        sharded: list[Any] = [p for p in engine.model.parameters() if not getattr(p, "ds_persist", False)]

        def pack(tensor: Tensor) -> Tensor:
            nonlocal parameters
            if isinstance(tensor, nn.Parameter):
                parameters += 1
            elif any(0 <= tensor.data_ptr() - p.data_ptr() < p.nbytes for p in sharded):
                views.append(list(tensor.shape))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return train_step(engine, *arguments)

    Engine.train_step = watched  # type: ignore[method-assign]
    engine_run(groups, config)
    return parameters, views


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Layout(3, "paper", data=2, steps=2), Layout(3, "released", tensor=2, steps=2),
     Layout(3, "paper", tensor=2, sequence=True, steps=2), Layout(3, "paper", pipeline=2, steps=2)],
    ids=["dp2", "tp2", "tp2-sequence", "pp2"],
)  # fmt: skip
def test_zero3_can_release_what_it_gathered(layout: Layout) -> None:
    world = layout.data * layout.tensor * layout.pipeline
    for parameters, views in run_workers(world, kept_views, layout.config(), tensor=layout.tensor,
                                         pipeline=layout.pipeline):  # fmt: skip
        assert parameters > 0 and views == []
