"""Classes of images in pretraining's image stream: read where they are asked for, told from CLS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from beit3_dist.config import BatchConfig, RunConfig
from beit3_dist.data.batch import MixedBatches, Request
from beit3_dist.model.initialization import initial_value, materialize
from beit3_dist.objectives.image_classification import NAME, ImageClassificationConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.train.totals import host_totals
from tests.micro_batches import CPU
from tests.unit.tar_fixtures import picture, small_run, write_tar
from tests.unit.test_flops import patch_embedding

CLASSES = 5


def labelled(folder: Path, labels: list[bytes | None], **changes: Any) -> RunConfig:
    """A run over images of these classes, the second half of them in a shard of its own."""
    run = small_run(folder, objectives={NAME: ImageClassificationConfig(classes=CLASSES)}, **changes)
    samples = [
        {"__key__": f"a/{n:02d}", "png": picture(n)} | ({} if label is None else {"cls": label})
        for n, label in enumerate(labels)
    ]
    half = len(labels) // 2
    write_tar(folder / "labelled-0.tar", samples[:half])
    write_tar(folder / "labelled-1.tar", samples[half:])
    batch = BatchConfig(images=8, texts=0, pairs=0)
    return replace(run, data=replace(run.data, images=str(folder / "labelled-*.tar")), batch=batch)


def opened(run: RunConfig, held_out: bool = False) -> MixedBatches:
    return MixedBatches(run, 32, 0, 1, held_out, annotators=[*objectives_of(run)])


def test_each_image_has_its_own_class(tmp_path: Path) -> None:
    numbers = [n % CLASSES for n in range(16)]
    run = labelled(tmp_path, [f" {n}\n".encode() for n in numbers])
    held_out = opened(replace(run, eval=replace(run.eval, images=run.data.images)), held_out=True)
    stored = [held_out[Request((first, 0, 0), 0)].streams["images"] for first in (0, 8)]
    assert torch.cat([samples.annotations[NAME]["label"] for samples in stored]).tolist() == numbers
    shuffled = opened(run)[Request((0, 0, 0), 0)].streams["images"]
    again = opened(run).streams[0]
    assert shuffled.annotations[NAME]["label"].tolist() == [again.read(place).label for place in range(8)]


def test_its_loss_is_that_of_whole_images_from_cls(tmp_path: Path) -> None:
    run = labelled(tmp_path, [f"{n % CLASSES}".encode() for n in range(16)])
    objectives = objectives_of(run)
    assert not objectives.coded
    model = objectives.build()
    materialize(model, lambda name, shape: initial_value(name, shape, run.model, 0) * 5, "cpu")
    module, batch = PretrainingModule(model, objectives, seed=0), opened(run)[Request((0, 0, 0), 0)]
    inputs, reading, ids = objectives.prepare(batch, CPU)
    counts = torch.tensor(objectives.counts(batch))
    contribution, statistics = module.eval()(inputs, reading, ids, counts, 0)
    cls = model.encode(inputs.images)[:, 0]
    logits, labels = model.objective_heads[NAME](cls), batch.streams["images"].annotations[NAME]["label"]
    assert counts.tolist() == [8]
    assert contribution.item() == pytest.approx(cross_entropy(logits, labels, label_smoothing=0.1).item(), rel=1e-5)
    assert statistics[1].tolist() == [int((logits.argmax(1) == labels).sum())]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.train()(inputs, reading, ids, counts, 0)[0].backward()
    assert host_totals([batch], objectives).flops - counter.get_total_flops() == patch_embedding(run.model, batch)


@pytest.mark.parametrize(
    ("labels", "has"),
    [
        ([b"0", None, b"1", None], "2 of 4 images .* a/01 of .*labelled-0.tar, has no .cls member"),
        ([b"0", b"1", b"7", b"1"], "1 of 4 images .* a/02 of .*labelled-1.tar, has the class 7"),
        ([b"0", b"x", b"1", b"1"], "1 of 4 images .* a/01 of .*, has a .cls member that is no number"),
    ],
)
def test_an_image_without_a_class_is_one_line_before_training(
    labels: list[bytes | None], has: str, tmp_path: Path
) -> None:
    run = labelled(tmp_path, labels, batch=BatchConfig(images=2, texts=0, pairs=0))
    with pytest.raises(ValueError, match=rf"data.images: {has}") as refusal:
        opened(run)
    assert "range(5)" in str(refusal.value) and "\n" not in str(refusal.value)
    # Nobody else asks for classes.
    other = replace(run, objectives={}, batch=BatchConfig(images=2, texts=0, pairs=0))
    assert len(opened(other)[Request((0, 0, 0), 0)].streams["images"]) == 2


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    run = labelled(tmp_path, [b"0"] * 4)
    piped = replace(run, data=replace(run.data, images=f"pipe:cat {tmp_path}/labelled-0.tar", virtual_readers=1))
    with pytest.raises(ValueError, match="data.images has no random access, which the classes of images need"):
        opened(piped)
    with pytest.raises(ValueError, match="image_classification reads none of the streams"):
        objectives_of(replace(run, batch=BatchConfig(images=0, texts=8, pairs=0)))
    with pytest.raises(ValueError, match="objectives.image_classification.classes=0: give the number of classes"):
        objectives_of(replace(run, objectives={NAME: ImageClassificationConfig()}))
