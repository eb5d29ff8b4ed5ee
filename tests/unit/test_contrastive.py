"""The contrastive objective: what is equal, what its head starts from, what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from beit3_dist.checkpoint.fitting import fit
from beit3_dist.checkpoint.released import weights_from_released, weights_to_released
from beit3_dist.config import BatchConfig, DataConfig, RunConfig
from beit3_dist.data.batch import MixedBatches, Request
from beit3_dist.model.initialization import materialize
from beit3_dist.objectives.contrastive import ContrastiveConfig
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.objectives.matching import MatchingConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import Objectives, PretrainingModule
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.tasks.registry import task_class
from beit3_dist.train.feed import StepBatch
from beit3_dist.train.optimizer import decays
from beit3_dist.train.passes import passes
from beit3_dist.train.totals import host_totals
from tests.micro_batches import precomputed_codes, random_micro_batch
from tests.unit.tar_fixtures import picture, small_run, write_tar
from tests.unit.test_flops import CONFIGS, patch_embedding

CPU = torch.device("cpu")
PAIRS = 4


def objectives_with(form: str, pairs: int = PAIRS, accumulation: int = 1, **section: object) -> Objectives:
    """Contrast beside masked data modelling."""
    run = RunConfig(
        out="unused",
        text_tokenizer="unused",
        data=DataConfig(images="unused", texts="unused", pairs="unused", text_length=20, caption_length=20),
        model=CONFIGS["paper"],
        batch=BatchConfig(images=3, texts=4, pairs=pairs, accumulation=accumulation),
        objectives={NAME: MaskedDataModelingConfig(), "contrastive": ContrastiveConfig(form=form, **section)},
    )
    return objectives_of(run)


def test_equal_images_and_equal_captions_have_one_label(tmp_path: Path) -> None:
    captions = ["a red circle", "a blue square", "a red circle", "a green star"]
    images = [picture(seed, kind="JPEG") for seed in (0, 0, 1, 2)]
    rows = zip(images, captions, strict=True)
    write_tar(
        tmp_path / "same" / "pairs.tar",
        [{"__key__": str(n), "jpg": image, "txt": words.encode()} for n, (image, words) in enumerate(rows)],
    )
    config = small_run(tmp_path)
    config = replace(
        config,
        data=replace(config.data, pairs=str(tmp_path / "same" / "*.tar")),
        batch=BatchConfig(images=0, texts=0, pairs=4),
        objectives={"contrastive": ContrastiveConfig(form="unicl")},
    )
    batches = MixedBatches(config, 32, 0, 1, annotators=[*objectives_of(config)])
    samples = batches[Request((0, 0, 0), 0)].streams["pairs"]
    found = samples.annotations["contrastive"]["labels"].tolist()
    assert len({image for image, _ in found}) == len({caption for _, caption in found}) == 3
    assert len(set(map(tuple, found))) == 4
    # The next epoch crops them otherwise, and knows them again.
    again = batches[Request((0, 0, 4), 0)].streams["pairs"].annotations["contrastive"]["labels"]
    assert sorted(again.tolist()) == sorted(found)


@pytest.mark.parametrize(("form", "scale"), [("softmax", 1 / 0.07), ("sigmoid", 10.0), ("unicl", 1 / 0.07)])
def test_what_the_head_starts_from(form: str, scale: float) -> None:
    objectives = objectives_with(form, dim=6)
    model = objectives.build()
    materialize(model, lambda name, shape: objectives.first_value(name, shape, 3), CPU)
    head = model.objective_heads["contrastive"]
    assert head.logit_scale.item() == pytest.approx(math.log(scale))
    assert head.vision_head.weight.shape == head.language_head.weight.shape == (6, 48)
    assert 0 < head.vision_head.weight.abs().max() <= 0.02
    own = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert ("logit_bias" in own) == (form == "sigmoid")
    if form == "sigmoid":
        assert head.logit_bias.item() == -10
    assert {name for name, shape in own.items() if not decays(name, shape)} == own.keys() - {
        "vision_head.weight",
        "language_head.weight",
    }
    assert objectives.bounds == {"objective_heads.contrastive.logit_scale": (0.0, pytest.approx(math.log(100)))}


@pytest.mark.parametrize("name", ["itc", "retrieval", "imagenet_retrieval", "nlvr2"])
def test_the_temperature_of_tasks_is_bounded_too(name: str) -> None:
    task = task_class(name)(SimpleNamespace(), None)  # type: ignore[arg-type]
    bounds = {"task_head.logit_scale": (0.0, pytest.approx(math.log(100)))} if task.contrastive else {}
    assert task.bounds(CONFIGS["paper"]) == bounds


@pytest.mark.parametrize("form", ["softmax", "sigmoid", "unicl"])
def test_flops_equal_torchs_counter(form: str) -> None:
    objectives = objectives_with(form)
    model = objectives.build()
    materialize(model, lambda name, shape: objectives.first_value(name, shape, 0), CPU)
    batch = random_micro_batch(CONFIGS["paper"], pairs=PAIRS)
    for name in ("pairs", "texts"):  # no padding, which torch would count inside attention
        batch.streams[name].lengths[:] = batch.streams[name].text.shape[1]
    batch.streams["pairs"].annotations["contrastive"] = {"labels": torch.arange(2 * PAIRS).view(-1, 2)}
    prepared = objectives.prepare(batch, CPU, precomputed_codes(CONFIGS["paper"]))
    module = PretrainingModule(model, objectives, 0).train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*prepared, torch.tensor(objectives.counts(batch)), 0)[0].backward()
    # Pixels need no gradient, and the pairs' images are embedded twice.
    twice = 2 * PAIRS * CONFIGS["paper"].patches * 3 * CONFIGS["paper"].patch_size ** 2 * CONFIGS["paper"].width
    uncounted = patch_embedding(CONFIGS["paper"], batch) + twice
    assert host_totals([batch], objectives).flops - counter.get_total_flops() == uncounted


def test_candidates_are_the_steps_or_the_micro_batchs() -> None:
    of_step, of_micro = (objectives_with("softmax", 8, 2, negatives=n) for n in ("step", "micro_batch"))
    assert of_step.ahead is not None and of_micro.ahead is None
    assert [view.stream for view in of_step.ahead.views] == ["pairs", "pairs"]
    counts = [0.0] * 4 + [4.0]
    assert of_step.head_flops(counts) - of_micro.head_flops(counts) == 4 * 2 * 48 * 2 * (8 - 4)


def test_a_caption_alone_drops_other_paths_than_its_image() -> None:
    """Else the paths that both lack would tell which belong together."""
    objectives = objectives_with("softmax")
    batch = random_micro_batch(CONFIGS["paper"], pairs=PAIRS)
    _, _, ids = objectives.prepare(batch, CPU, precomputed_codes(CONFIGS["paper"]))
    images, of_pairs, fused, texts, captions = ids.split([3, PAIRS, PAIRS, 4, PAIRS])
    assert torch.equal(of_pairs, batch.streams["pairs"].ids) and torch.equal(fused, of_pairs)
    assert torch.equal(texts, batch.streams["texts"].ids) and torch.equal(images, batch.streams["images"].ids)
    assert not set(captions.tolist()) & set(of_pairs.tolist())


def test_its_head_is_the_one_of_retrieval(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fine-tuning goes on with it, a released file holds it, and a run goes on with a released one."""
    objectives = objectives_with("softmax")
    model = replace(CONFIGS["released"], heads=4)
    run = replace(objectives.run, model=model)
    values = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
        for name, p in objectives_of(run).build().named_parameters()
    }
    needed = {name: p.shape for name, p in task_class("retrieval").network(model, device="meta").named_parameters()}
    found = fit(values, model, needed, "a run")
    assert found.keys() == needed.keys()
    for part in ("vision_head.weight", "language_head.weight", "logit_scale"):
        assert torch.equal(found[f"task_head.{part}"], values[f"objective_heads.contrastive.{part}"])
    assert "objective_heads.contrastive.* serves as task_head.*" in caplog.text
    released = weights_to_released(values)
    assert torch.equal(released["vision_head.weight"], values["objective_heads.contrastive.vision_head.weight"])
    assert released["logit_scale"].shape == () and "the heads of" not in caplog.text
    back = fit(weights_from_released(released), model, {n: v.shape for n, v in values.items()}, "a file")
    assert all(torch.equal(back[name], value) for name, value in values.items())
    # A sigmoid's bias is no part of retrieval, and other lengths have no place there.
    sigmoid = {n: p.shape for n, p in objectives_of(replace(run, objectives={"contrastive": ContrastiveConfig(
        form="sigmoid")})).build().named_parameters()}  # fmt: skip
    assert not any(name.startswith("objective_heads") for name in fit(found, model, sigmoid, "a task's"))


@pytest.mark.parametrize("head", ["pooler", "two_layers", "linear"])
def test_flops_of_the_second_pass_are_added_once_its_captions_are_drawn(head: Any) -> None:
    """By torch's counter."""
    config = CONFIGS["paper"]
    run = objectives_with("softmax").run
    objectives = objectives_of(replace(run, objectives=run.objectives | {"matching": MatchingConfig(head=head)}))
    model = objectives.build()
    materialize(model, lambda name, shape: objectives.first_value(name, shape, 0), CPU)
    batch = random_micro_batch(config, pairs=PAIRS)
    pairs = batch.streams["pairs"]
    batch.streams["texts"].lengths[:] = batch.streams["texts"].text.shape[1]
    pairs.lengths[:] = pairs.text.shape[1]
    pairs.annotations["matching"] = {"labels": torch.arange(2 * PAIRS).view(-1, 2)}
    totals = host_totals([batch], objectives)
    groups = SimpleNamespace(mesh=Mesh(0, 1, 0, 1, CPU), sum_over_data=lambda values: None)
    engine: Any = SimpleNamespace(mesh=groups.mesh, groups=groups)
    step = StepBatch([batch], totals.pack(), torch.zeros(()))
    module = PretrainingModule(model, objectives, 0).train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for micro_batch in passes(objectives, engine, step, lambda _: precomputed_codes(config), None):
            module(*micro_batch, torch.tensor(totals.counts), 0)[0].backward()
    embedded_again = 2 * 4 * PAIRS * config.patches * 3 * config.patch_size**2 * config.width
    similarities_again = 2 * 2 * PAIRS * PAIRS * config.width  # the contrast's, which recomputation does not count
    uncounted = patch_embedding(config, batch) + embedded_again - similarities_again
    assert step.known.flops - counter.get_total_flops() == uncounted
    assert step.known.tokens == totals.tokens + 3 * PAIRS * (1 + config.patches + pairs.text.shape[1])
