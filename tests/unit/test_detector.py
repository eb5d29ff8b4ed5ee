"""The heads of detectors: their losses belong to each image, whatever comes with it, and boxes are learnt."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from beit3_dist.checkpoint.fitting import fit
from beit3_dist.checkpoint.model_folder import save_model_folder
from beit3_dist.config import ModelConfig
from beit3_dist.inference import Model, open_image
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.parallel.replicas import Replicas
from beit3_dist.run.preflight_finetuning import FinetuneReady
from beit3_dist.run.stage_file import stages_of
from beit3_dist.run.stages import prepare_stages
from beit3_dist.tasks.base import TaskInputs
from beit3_dist.tasks.config import DenseConfig, FinetuneConfig, TaskDataConfig
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.data.object_views import Objects
from beit3_dist.tasks.data.objects import Marked
from beit3_dist.tasks.parts.average_precision import packed
from beit3_dist.tasks.parts.detecting import Detection
from beit3_dist.tasks.parts.detector import Choice, Detector, Look
from beit3_dist.tasks.parts.drawing import colour_of, with_objects
from beit3_dist.tasks.registry import task_class
from tests.unit.tar_fixtures import picture, train_tokenizer

MODEL = ModelConfig(layers=2, width=32, heads=2, ffn_width=64, patch_size=8, image_size=64, vocab_size=310,
                    visual_vocab_size=16, vl_expert_layers=1, max_text_length=24)  # fmt: skip
DENSE = DenseConfig(channels=16, proposals=30, regions=16)
CLASSES = ["cat", "dog", "emu"]


def task_of(name: str, cascade: bool = False) -> Detection:
    config = FinetuneConfig(task=name, out="o", text_tokenizer="", model=MODEL, evaluate_only=True,
                            data=TaskDataConfig(validation="v", text_length=12),
                            dense=replace(DENSE, cascade=cascade))  # fmt: skip
    task: Any = task_class(name)(config, None, CLASSES)
    return task


def inputs(rows: list[int]) -> TaskInputs:
    """Four images by their numbers, with 1, 2, 0 and 1 objects."""
    boxes, labels = torch.zeros(4, 2, 4), torch.full((4, 2), -1)
    boxes[0, 0], labels[0, 0] = torch.tensor([5.0, 6, 40, 50]), 1
    boxes[1], labels[1] = torch.tensor([[5.0, 6, 40, 50], [20, 20, 60, 60]]), torch.tensor([0, 2])
    boxes[3, 0], labels[3, 0] = torch.tensor([30.0, 2, 62, 33]), 2
    masks = np.zeros((4, 2, 64, 64), np.uint8)
    for (n, k), (x0, y0, x1, y1) in zip(np.ndindex(4, 2), boxes.view(-1, 4).int().tolist(), strict=True):
        masks[n, k, y0:y1, x0:x1] = 1
    images = torch.randn(4, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(4, 0, dtype=torch.int64)
    objects = Objects(boxes[rows], labels[rows], torch.from_numpy(np.packbits(masks, axis=3))[rows])
    return TaskInputs(images[rows], none[rows], none[rows].bool(), objects, torch.arange(4)[rows])


@pytest.mark.parametrize(("name", "cascade"), [("detection", False), ("instance_segmentation", True)])
def test_a_step_is_the_sum_of_its_images(name: str, cascade: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two ranks with uneven numbers of objects, of which one has none: the gradient of the whole."""
    task = task_of(name, cascade)
    model = task.network(MODEL, 3, task.config.dense, seed=1)
    whole = task.losses(model, inputs([0, 1, 2, 3]))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(whole[0].sum(), parameters, allow_unused=True)
    counts: list[Tensor] = []

    def noted(self: Replicas, mine: Tensor) -> Tensor:
        counts.append(mine)
        return mine

    for rows in ([0, 1], [2, 3], [2]):
        monkeypatch.setattr(Replicas, "gather_constant", noted)
        task.losses(model, inputs(rows))
    monkeypatch.setattr(Replicas, "gather_constant", lambda self, mine: torch.cat(counts[:2]))
    assert counts[2][0, 2] == 0 and counts[0][0, 2] > counts[1][0, 2] > 0
    parts = [task.losses(model, inputs(rows)) for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    total = sum(part[0].sum() for part in parts)
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for ours, one in zip(gradients, expected, strict=True):
        assert (ours is None) == (one is None)
        if one is not None and ours is not None:
            torch.testing.assert_close(ours, one, rtol=1e-3, atol=1e-5)
    unused = {name for (name, p), g in zip(model.named_parameters(), expected, strict=True) if g is None}
    assert not any(name.startswith("task_head.") for name in unused)


def test_an_image_without_objects_teaches_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks pass all modules, forward and backward: ZeRO-3 waits for nobody."""
    task = task_of("instance_segmentation", True)
    model = task.network(MODEL, 3, task.config.dense)
    empty = inputs([2])
    empty = replace(empty, labels=Objects(torch.zeros(1, 0, 4), torch.zeros(1, 0).long(), empty.labels.masks[:, :0]))
    for given in (inputs([2]), empty):
        model.zero_grad()
        losses = task.losses(model, given)
        losses[0].sum().backward()
        assert torch.isfinite(losses).all()
        assert all(p.grad is not None for p in model.task_head.parameters())
        mask = [p.grad.abs().sum() for n, p in model.task_head.named_parameters() if n.startswith("masks.")]
        assert sum(mask) == 0


def test_published_geometry() -> None:
    """ViTDet's heads: 256 channels, four convolutions and one matrix to 1,024, offsets of each class or, in a cascade,
    of all together; five levels of anchors from 32 to 512 pixels."""
    with torch.device("meta"):
        sixteen = ModelConfig(patch_size=16)
        plain = Detector(sixteen, 80, DenseConfig(), masks=True)
        cascade = Detector(sixteen, 80, DenseConfig(cascade=True), masks=True)
    shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}
    assert shapes["boxes.0.dense.weight"] == (1024, 256 * 49) and shapes["boxes.0.score.weight"] == (81, 1024)
    assert shapes["boxes.0.offset.weight"] == (320, 1024) and shapes["masks.draw.weight"] == (80, 256, 1, 1)
    assert [tuple(head.offset.weight.shape) for head in cascade.boxes] == [(4, 1024)] * 3  # type: ignore[union-attr]
    assert plain.strides == [4, 8, 16, 32, 64]
    assert set(plain.deviations) | set(cascade.deviations) <= {n for n, _ in cascade.named_parameters()}


def test_the_choice_of_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 20, 30]])[:, None]
    scores = torch.tensor([[0.9, 0.3], [0.8, 0.04], [0.9, 0.9]])
    hard = Choice(100, 0.05, 0.0)(boxes, scores)  # of the first class one is left, the third box is empty
    assert hard[:, 4:].tolist() == [[pytest.approx(0.9), 0], [pytest.approx(0.3), 1]]
    soft = Choice(100, 0.0, 0.6)(boxes, scores)
    assert soft[:, 4].tolist() == pytest.approx([0.9, 0.3, 0.08, 0.04 * 0.1])
    assert len(Choice(1, 0.05, 0.0)(boxes, scores)) == 1
    of_classes = torch.stack([boxes[:, 0], boxes[:, 0] + 1], 1)
    assert Choice(100, 0.2, 0.0)(of_classes, scores)[1, :4].tolist() == [1, 1, 11, 11]


def test_what_several_looks_find_is_one_choice() -> None:
    """Boxes come back from larger and mirrored views, and a mask is the mean of what each look draws."""
    network = task_of("instance_segmentation", cascade=True).network(MODEL, 3, replace(DENSE, cascade=True), seed=1)
    head: Any = network.task_head
    maps = head.pyramid.maps(network, inputs([0, 1]).images[:, 0])

    def everything(boxes: Tensor, scores: Tensor) -> Tensor:
        return torch.cat([boxes[:, 0], scores.max(1).values[:, None], scores.argmax(1)[:, None].float()], 1)

    (plain, _), masks = head.detect([Look(maps, 64)], 64, everything)
    (halves, _), same = head.detect([Look(maps, 64)], 32, everything)
    torch.testing.assert_close((halves[:, :4] * 2, halves[:, 4:], same), (plain[:, :4], plain[:, 4:], masks))
    (turned, _), drawn = head.detect([Look(maps, 64, mirrored=True)], 64, everything)
    torch.testing.assert_close(turned[:, [0, 2, 1, 3]], torch.cat([64 - plain[:, [2, 0]], plain[:, [1, 3]]], 1))
    torch.testing.assert_close(drawn, masks.flip(-1))
    (both, _), means = head.detect([Look(maps, 64), Look(maps, 64, mirrored=True)], 64, everything)
    torch.testing.assert_close(both, torch.cat([plain, turned]))
    count = len(plain)
    torch.testing.assert_close(means[count : 2 * count], means[:count].flip(-1), atol=1e-5, rtol=0)
    assert (means[:count] - masks[:count]).abs().max() > 1e-4


def test_a_detector_that_looks_mirrored_too_sees_left_as_right() -> None:
    """At two sizes: of the mirrored pictures it finds the same, mirrored; one look alone does not."""
    task, view = task_of("detection"), inputs([0, 1])
    network = task.network(MODEL, 3, DENSE, seed=1)
    mirrored = replace(view, images=view.images.flip(-1))
    for flip in (True, False):
        task.config.eval = replace(task.config.eval, flip=flip, scales=[1.0, 1.5], least_score=0.0)
        found, other = (task.predict(network, seen)[:, :20] for seen in (view, mirrored))
        assert (found[..., 5] >= 0).all() and found[..., :4].max() <= 64
        turned = torch.cat([64 - other[..., [2]], other[..., [1]], 64 - other[..., [0]], other[..., 3:]], -1)
        assert torch.allclose(found, turned, atol=1e-3) == flip


def test_a_model_folder_detects_and_draws(tmp_path: Path) -> None:
    """Whatever the images' sizes: boxes within them, at most `detections`, and a picture of each."""
    task = task_of("instance_segmentation", cascade=True)
    network = task.network(MODEL, 3, task.config.dense)
    save_model_folder(tmp_path / "model", network.state_dict(), MODEL, task=task.describe())
    model = Model.load(tmp_path / "model", "cpu")
    model.task.config.eval.least_score = 0.0
    images = [Image.new("RGB", (80, 30), "red"), np.zeros((50, 20, 3), np.uint8)]
    for image, found in zip(images, model.detect(images), strict=True):
        width, height = image.size if isinstance(image, Image.Image) else (20, 50)
        assert 0 < len(found.boxes) <= 100 and (np.diff(found.scores) <= 0).all()
        assert (found.boxes >= 0).all() and (found.boxes <= [width, height, width, height]).all()
        assert found.masks[0].shape == (height, width)
        found.scores[:] = 1
        picture = with_objects(open_image(image), found, model.task.classes)
        assert picture.size == (width, height) and picture.tobytes() != open_image(image).tobytes()
    assert model.predict(images=images)[1].labels.tolist() == model.detect(images)[1].labels.tolist()
    model.task.config.eval.least_score = 0.99
    assert [(len(found.labels), found.masks) for found in model.detect(images)] == [(0, [])] * 2
    with pytest.raises(ValueError, match="was fine-tuned for instance_segmentation; classes need a model of task"):
        model.classify(images)


def test_another_data_sets_detector_goes_on_but_for_its_classes(caplog: pytest.LogCaptureFixture) -> None:
    """Objects365's boxes, then COCO's with masks: what tells classes, and the masks, begin anew."""
    before, now = task_of("detection", cascade=True), task_of("instance_segmentation", cascade=True)
    weights = dict(before.network(MODEL, 5, before.config.dense, seed=1).named_parameters())
    network = now.network(MODEL, 3, now.config.dense, device="meta")
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    found = fit(weights, MODEL, shapes, "objects365")
    anew = {name for name in shapes if name not in found}
    scores = {f"task_head.boxes.{n}.score.{part}" for n in range(3) for part in ("weight", "bias")}
    assert anew == scores | {name for name in shapes if name.startswith("task_head.masks.")}
    assert "no weights for which class a box is of: initial values are taken" in caplog.text
    assert torch.equal(found["task_head.boxes.2.dense.weight"], weights["task_head.boxes.2.dense.weight"])
    with pytest.raises(ValueError, match="proposals.objectness.weight .* has shape"):
        other = weights | {"task_head.proposals.objectness.weight": torch.zeros(9, 16, 1, 1)}
        fit(other, MODEL, shapes, "objects365")


def test_a_validation_shows_what_is_there_beside_what_was_found(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "white").save(tmp_path / "a.png")
    task = task_of("detection")
    marked = Marked(50, 40, ({"label": 1, "box": [10, 10, 20, 20]},))
    example = Example(0, (tmp_path / "a.png",), None, marked, "7")
    predictions = packed([torch.tensor([[12.8, 12.8, 38.4, 38.4, 0.9, 1.0]])], None, 100)  # of a view of 64 pixels
    scores = task.score(predictions, [example])
    assert scores["box_ap"] == pytest.approx(1)
    ((name, picture),) = task.shown()[0].items()
    assert name == "pictures/0" and picture.shape == (3, 40, 100) and picture.dtype == torch.uint8
    truth, found = picture.split(50, dim=2)
    for side in (truth, found):
        assert tuple(side[:, 25, 10].tolist()) == colour_of(1) and side[:, 35, 45].min() == 255
    assert not torch.equal(truth, found)  # scores


def test_a_detector_is_trained_in_stages(tmp_path: Path) -> None:
    """Boxes of five classes, then boxes and masks of three: both are checked before the first begins."""
    train_tokenizer(tmp_path / "text.spm")
    (tmp_path / "0.png").write_bytes(picture(0))
    for name, count in (("boxes", 5), ("masks", 3)):
        one = {"id": 1, "label": count - 1, "box": [1, 1, 20, 9], "mask": [[1, 1, 21, 1, 21, 10, 1, 10]]}
        line = {"image_path": "0.png", "image_id": 1, "width": 40, "height": 30, "objects": [one]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / f"{name}.txt").write_text("".join(f"class {n}\n" for n in range(count)))
        recipe = {
            "task": {"boxes": "detection", "masks": "instance_segmentation"}[name], "steps": 1, "precision": "fp32",
            "data": {"train": str(tmp_path / f"{name}.jsonl"), "images": str(tmp_path), "text_length": 12, "workers": 0,
                     "answers": str(tmp_path / f"{name}.txt")},
            "model": asdict(MODEL), "dense": asdict(replace(DENSE, cascade=True)), "batch": {"size": 1},
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "stages.yaml").write_text("stages: {boxes: boxes.yaml, masks: masks.yaml}\n")
    asked = ["--config", str(tmp_path / "stages.yaml"), "--out", str(tmp_path / "out"), "--text_tokenizer",
             str(tmp_path / "text.spm"), "--optim.warmup_steps", "0"]  # fmt: skip
    stages, _ = stages_of("stages.py", "", asked)
    assert [stage.config.out for stage in stages] == [str(tmp_path / "out" / name) for name in ("boxes", "masks")]
    ready = prepare_stages(stages, lambda config: Mesh(0, 1, 0, 1, torch.device("cpu")))
    assert isinstance(ready.first, FinetuneReady) and ready.first.task.name == "detection"
    with pytest.raises(ValueError, match="data.rand_augment='beit3' and data.random_erasing=0.0 move or hide"):
        config = ready.first.config
        ready.first.task.config = replace(config, data=replace(config.data, rand_augment="beit3"))
        ready.first.task.views()
    (tmp_path / "masks.jsonl").write_text(json.dumps(line | {"objects": [one | {"label": 3}]}) + "\n")
    with pytest.raises(ValueError, match=r"stage masks: .*line 1: object 1: label 3 is not in range\(3\)"):
        prepare_stages(stages, lambda config: Mesh(0, 1, 0, 1, torch.device("cpu")))
