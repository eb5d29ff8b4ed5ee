"""The four losses are weighed and divided as written, without waiting for the device."""

from __future__ import annotations

import weakref
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_dist.config import BatchConfig, ModelConfig
from beit3_dist.data.batch import Request
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.model.token_layout import Selection
from beit3_dist.objectives.base import Objective
from beit3_dist.objectives.masked_data_modeling import (
    NAME,
    MaskedDataModeling,
    MaskedDataModelingConfig,
    Targets,
)
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule, Reading
from beit3_dist.parallel.replicas import ALONE, Replicas
from beit3_dist.tools.benchmarks.step import objectives_for
from beit3_dist.train.totals import host_totals
from tests.micro_batches import precomputed_codes, random_micro_batch
from tests.unit.tar_fixtures import small_run
from tests.unit.test_batch import opened


class Operations(TorchDispatchMode):
    """Notes the operations that bring numbers of the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if any(name in str(function) for name in ("lift_fresh", "_to_copy", "copy_")):
            self.copies.append(str(function))
        return function(*arguments, **(options or {}))


def test_objectives_go_to_loader_processes_without_the_replicas() -> None:
    """A process group can neither be sent nor, as here, be copied."""
    objectives = objectives_for(ModelConfig())
    connected = objectives.connected(Replicas(Lock()))  # type: ignore[arg-type]
    for objective, other in zip(objectives, connected, strict=True):
        assert isinstance(objective, Objective) and deepcopy(objective).replicas is ALONE
        assert other.replicas is not ALONE


def test_weights_are_numbers_not_tensors() -> None:
    names = ("image_weight", "text_weight", "pair_image_weight", "pair_text_weight")
    weights = (1.0, 0.3, 2.5, 0.7)
    objectives = objectives_for(ModelConfig(), **dict(zip(names, weights, strict=True)))
    objective = PretrainingModule(torch.nn.Identity(), objectives, seed=0)  # type: ignore[arg-type]
    losses = torch.rand(2, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses_of: Any = objective.model
    losses_of.image_losses = lambda patches, codes: losses[:, :8]
    losses_of.text_norm = lambda hidden: hidden
    losses_of.text_head = lambda hidden, ids: losses[:, 8:]
    rows = torch.arange(20)
    reading = Reading(Selection(rows, (5, 3, 5, 7)), [None], [Targets(rows[:8], rows[8:], [5, 3], [5, 7])])
    step_counts = torch.tensor([11, 13, 0, 17])
    with Operations() as operations:
        contribution, statistics = objective.losses(torch.zeros(20, 4), reading, step_counts)
        contribution.backward()
    assert operations.copies == []
    sums = [part.sum(1) for part in losses.detach().split([5, 3, 5, 7], dim=1)]
    expected = torch.stack([sums[0], sums[3], sums[1], sums[2]], dim=1)
    assert torch.equal(statistics, expected)
    assert torch.equal(
        contribution, (torch.tensor(weights) * expected[0] / step_counts.clamp(min=1)).sum()
    )  # bit for bit


def test_what_the_host_knows_of_a_micro_batch_is_made_once_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's totals and the inputs take the same rows."""
    asked, rows = [], MaskedDataModeling.rows
    monkeypatch.setattr(MaskedDataModeling, "rows", lambda *given: asked.append(1) or rows(*given))
    config = ModelConfig(layers=3, width=8, heads=2, ffn_width=8, patch_size=4, image_size=16)
    objectives, batch = objectives_for(config), random_micro_batch(config)
    host_totals([batch], objectives)
    _, reading, _ = objectives.prepare(batch, torch.device("cpu"), precomputed_codes(config))
    assert len(asked) == 1 and reading is not None and len(reading.selection.rows) == sum(objectives.counts(batch))
    another = random_micro_batch(config, seed=1)
    assert objectives.on_host(another) is not objectives.on_host(batch)
    gone = weakref.ref(batch)
    del batch
    assert gone() is None


WHOLE = {
    "captions beside whole images": ({"pair_image_mask_ratio": 0.0}, ["image", "text", "pair_text"]),
    "images beside whole captions": ({"caption_mask_ratio": 0.0}, ["image", "text", "pair_image"]),
    "pairs alone": ({"image_mask_ratio": 0.0, "text_mask_ratio": 0.0, "pair_image_mask_ratio": 0.25},
                    ["pair_image", "pair_text"]),
    "words alone": ({"image_mask_ratio": 0.0}, ["text", "pair_text"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_a_side_of_ratio_0_is_seen_whole_and_has_no_loss(case: str, tmp_path: Path) -> None:
    section, names = WHOLE[case]
    run = small_run(tmp_path, objectives={NAME: MaskedDataModelingConfig(**section)})
    objectives = objectives_of(run)
    assert [loss.name for loss in objectives.losses] == names
    assert objectives.coded == {{"image": "images", "pair_image": "pairs"}[name] for name in names if "image" in name}
    batch = opened(run)[Request((0, 0, 0), 0)]
    inputs, reading, _ = objectives.prepare(batch, torch.device("cpu"), precomputed_codes(run.model))
    drawn = {name: samples.annotations[NAME] for name, samples in batch.streams.items()}
    counts = dict(zip(names, objectives.counts(batch), strict=True))
    masked = {
        "image": drawn["images"]["image_mask"],
        "text": drawn["texts"]["text_mask"],
        "pair_image": drawn["pairs"]["image_mask"],
        "pair_text": drawn["pairs"]["text_mask"],
    }
    assert {name: int(mask.sum()) for name, mask in masked.items() if mask.any()} == counts
    pairs = batch.streams["pairs"]
    assert torch.equal(drawn["pairs"]["text"], pairs.text) or "pair_text" in names
    assert reading is not None and len(reading.selection.rows) == sum(counts.values())
    sizes = {"images": len(batch.streams["images"]), "texts": len(batch.streams["texts"]), "pairs": len(pairs)}
    assert len(next(iter(objectives)).expected_counts(sizes, run)) == len(names)
    if case == "pairs alone":
        assert counts["pair_image"] == len(pairs) * 4 and [view.stream for view in objectives.views] == ["pairs"]


def test_whole_words_of_the_tokenizer(tmp_path: Path) -> None:
    run = small_run(tmp_path, objectives={NAME: MaskedDataModelingConfig(whole_words=True)})
    tokenizer, batch = TextTokenizer(run.text_tokenizer), opened(run)[Request((0, 0, 0), 0)]
    assert tokenizer.begins.shape == (tokenizer.rows,)
    for name in ("texts", "pairs"):
        samples = batch.streams[name]
        for text, mask in zip(samples.text.tolist(), samples.annotations[NAME]["text_mask"].tolist(), strict=True):
            inside = [n for n in range(2, len(text)) if text[n] not in tokenizer.specials
                      and text[n - 1] not in tokenizer.specials and not tokenizer.begins[text[n]]]  # fmt: skip
            assert all(mask[n] == mask[n - 1] for n in inside) and any(mask)
    plain = opened(replace(run, objectives={}))[Request((0, 0, 0), 0)].streams["texts"].annotations[NAME]["text_mask"]
    assert not torch.equal(plain, batch.streams["texts"].annotations[NAME]["text_mask"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"caption_mask_ratio": 1.0}, "caption_mask_ratio=1.0 is not in"),
        ({"pair_image_mask_ratio": -0.1}, "pair_image_mask_ratio=-0.1 is not in"),
        (
            {"mask_pairs": "one", "caption_mask_ratio": 0.0},
            "mask_pairs=one masks either side .* ratio of one",
        ),
        (
            {"image_mask_ratio": 0.0},
            "of all streams that batch has the mask ratios are 0",
        ),
    ],
)
def test_ratios_that_cannot_be(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        batch = BatchConfig(images=8, texts=0, pairs=0)
        objectives_of(small_run(tmp_path, objectives={NAME: MaskedDataModelingConfig(**section)}, batch=batch))


@pytest.mark.parametrize(
    "section", [{}, {"mask_pairs": "one"}, {"pair_image_mask_ratio": 0.0}, {"image_mask_ratio": 0.0}], ids=str
)
def test_only_images_with_masked_patches_are_coded(section: dict[str, Any], tmp_path: Path) -> None:
    run = small_run(tmp_path, objectives={NAME: MaskedDataModelingConfig(**section)})
    objectives, batch, asked = objectives_of(run), opened(run)[Request((0, 0, 0), 0)], []
    tokenize = precomputed_codes(run.model)

    def watched(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return tokenize(images)

    _, reading, _ = objectives.prepare(batch, torch.device("cpu"), watched)
    all_codes = tokenize(SeenImages(batch, torch.device("cpu")).tokenizer)
    _, given, _ = objectives.prepare(batch, torch.device("cpu"), all_codes)
    masks = torch.cat([samples.annotations[NAME]["image_mask"] for samples in batch.with_images])
    assert reading is not None and given is not None
    assert torch.equal(reading.targets[0].codes, all_codes[masks])
    assert torch.equal(given.targets[0].codes, all_codes[masks])
    masked = int(masks.any(1).sum())
    assert asked == [masked] * (masked > 0) and (masked == len(masks)) == (not section)
