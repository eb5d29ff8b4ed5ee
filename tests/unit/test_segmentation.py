"""Segmentation: masks and their indexes, views, metric, windows, matching, losses, and use."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from beit3_dist.checkpoint.model_folder import save_model_folder
from beit3_dist.config import ModelConfig
from beit3_dist.data.faults import BadSample
from beit3_dist.demo import tasks as demo
from beit3_dist.inference import Model
from beit3_dist.tasks.base import TaskInputs
from beit3_dist.tasks.config import DenseConfig, FinetuneConfig, TaskDataConfig, TaskEvalConfig
from beit3_dist.tasks.data.examples import Example, read_index
from beit3_dist.tasks.data.masked_views import OUTSIDE, MaskedViews, scaled_size, stacked_labels
from beit3_dist.tasks.data.masks import NOTHING, Mask, labels_of
from beit3_dist.tasks.parts.mask2former import (
    OF_CLASS,
    OF_DICE,
    OF_MASK,
    assigned,
    drawn_places,
    image_loss,
    mask_terms,
    scores_of,
    uncertain_places,
)
from beit3_dist.tasks.parts.metrics import overlaps
from beit3_dist.tasks.registry import task_class
from beit3_dist.tasks.segmentation import Segmentation, kept_channels
from tools import build_index, draw

MODEL = ModelConfig(layers=6, width=16, heads=2, ffn_width=32, patch_size=8, image_size=32, vl_expert_layers=0,
                    vocab_size=64, visual_vocab_size=16, max_text_length=8, drop_path=0.0)  # fmt: skip
CLASSES = ["sky", "sea", "sand"]


def save(path: Path, numbers: Any, kind: Any = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(numbers, kind)).save(path)
    return path


def a_task(**eval: Any) -> Segmentation:
    config = FinetuneConfig(
        task="segmentation", out="a model", text_tokenizer="", model=MODEL, evaluate_only=True,
        data=TaskDataConfig(validation="it", text_length=8), eval=TaskEvalConfig(**eval),
    )  # fmt: skip
    task = task_class("segmentation")(config, None, CLASSES)
    assert isinstance(task, Segmentation)
    return task


# --------------------------------------------------------------------------------------------------------------- metric


def test_overlaps_of_a_case_by_hand() -> None:
    """Two classes met, one only told, one never."""
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 4, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores, (ious, accuracies, pixels) = overlaps(confusion)
    assert ious[:3] == pytest.approx([6 / 9, 3 / 10, 0]) and np.isnan(ious[3]) and pixels == [8, 8, 0, 0]
    assert accuracies[:2] == [6 / 8, 3 / 8] and np.isnan(accuracies[2:]).all()
    assert scores == pytest.approx({"miou": (2 / 3 + 0.3) / 3, "mean_accuracy": 4.5 / 8, "pixel_accuracy": 9 / 16})


def test_overlaps_are_a_librarys_on_random_predictions() -> None:
    library = pytest.importorskip("torchmetrics.functional.classification")
    truth, guess = torch.randint(0, 6, (2, 5000), generator=torch.Generator().manual_seed(0))
    confusion = torch.bincount(truth * 6 + guess, minlength=36).view(6, 6)
    assert torch.equal(library.multiclass_confusion_matrix(guess, truth, 6), confusion)
    theirs = library.multiclass_jaccard_index(guess, truth, 6, average="none")
    assert overlaps(confusion)[1][0] == pytest.approx(theirs.tolist(), rel=1e-6)
    accuracy = library.multiclass_accuracy(guess, truth, 6, average="macro").item()
    assert overlaps(confusion)[0]["mean_accuracy"] == pytest.approx(accuracy, rel=1e-6)


def test_overlaps_are_those_of_sets_of_pixels() -> None:
    truth, guess = torch.randint(0, 6, (2, 5000), generator=torch.Generator().manual_seed(0))
    confusion = torch.bincount(truth * 6 + guess, minlength=36).view(6, 6)
    sets = [((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum() for c in range(6)]
    assert overlaps(confusion)[1][0] == pytest.approx([float(one) for one in sets])


# ---------------------------------------------------------------------------------------------------------------- masks


def test_masks_and_their_faults(tmp_path: Path) -> None:
    mask = save(tmp_path / "a.png", [[0, 1, 3], [255, 2, 0]])
    assert labels_of(Mask(mask, 0, 1), (3, 2), None).tolist() == [[NOTHING, 0, 2], [254, 1, NOTHING]]
    assert labels_of(Mask(None, 0, 1), (3, 2), 3).tolist() == [[NOTHING] * 3] * 2
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "p.png")
    assert labels_of(Mask(tmp_path / "p.png", 255, 0), (2, 1), 2).tolist() == [[0, 1]]
    wide = save(tmp_path / "w.png", [[300, 65535]], np.uint16)
    assert labels_of(Mask(wide, 65535, 0), (2, 1), 400).tolist() == [[300, NOTHING]]
    for given, size, classes, message in (
        (Mask(mask, 0, 1), (2, 2), 3, r"a.png has 3 x 2 pixels, its image 2 x 2"),
        (Mask(mask, 0, 1), (3, 2), 3, r"a.png has 255 at pixel \(0, 1\): classes are 1 to 3, and nothing is 0"),
        (Mask(mask, 255, 1), (3, 2), 3, r"a.png has 0 at pixel \(0, 0\)"),
        (Mask(tmp_path / "b.png", 0, 1), (3, 2), 3, "b.png cannot be read"),
        (Mask(save(tmp_path / "c.png", np.zeros((2, 3, 3))), 0, 1), (3, 2), 3, "c.png has 3 channels"),
    ):
        with pytest.raises(BadSample, match=message):
            labels_of(given, size, classes)


def test_the_index_names_what_is_missing_by_file_and_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.png", np.zeros((4, 4, 3)))
    save(tmp_path / "m.png", np.zeros((4, 4)))
    good = {"image_path": "a.png", "mask_path": "m.png", "nothing": 255, "first": 0}
    index = tmp_path / "i.jsonl"

    def read(*lines: dict[str, Any], train: bool = True) -> Any:
        index.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_index(index, Segmentation, tmp_path, train=train, predicted=not train)

    assert read(good)[0].label == Mask(tmp_path / "m.png", 255, 0) and read(good)[0].name == "a"
    unknown = {name: value for name, value in good.items() if name != "mask_path"}
    assert read(unknown, train=False)[0].label.path is None
    for lines, train, message in (
        ((good, good | {"mask_path": "n.png"}), True, r"i.jsonl, line 2: there is no file .*n.png"),
        ((good, unknown), True, r"i.jsonl, line 2: no string in the field 'mask_path'"),
        ((good | {"nothing": "0"},), True, r"line 1: no integer in the field 'nothing'"),
        ((good | {"mask_path": "../m.png"},), True, r"line 1: .*\.\./m.png"),
        ((good, good), False, r"line 2: image_path a is also that of"),
    ):
        with pytest.raises(ValueError, match=message):
            read(*lines, train=train)


def folders(root: Path, sides: tuple[str, ...] = ("training", "validation")) -> None:
    for number, side in enumerate(sides):
        for n in range(2):
            save(root / "images" / side / f"{n}.png", np.full((4, 6, 3), 50 * n))
            save(root / "annotations" / side / f"{n}.png", np.full((4, 6), number + n))
    names = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.2\t1\t1\t1\twall\n2\t0.1\t1\t1\t1\tbuilding, edifice\n"
    (root / "objectInfo150.txt").write_text(names)


def test_ade20ks_own_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(tmp_path / "ade")
    save(tmp_path / "ade" / "images" / "testing" / "9.png", np.zeros((4, 6, 3)))
    build_index.main(["ade20k", str(tmp_path / "ade"), str(tmp_path / "out")])
    assert (tmp_path / "out" / "segmentation.classes.txt").read_text() == "wall\nbuilding, edifice\n"
    lines = (tmp_path / "out" / "segmentation.training.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"image_path": "images/training/1.png", "nothing": 0, "first": 1,
                                    "mask_path": "annotations/training/1.png"}  # fmt: skip
    assert "mask_path" not in (tmp_path / "out" / "segmentation.testing.jsonl").read_text()
    assert "segmentation.classes.txt: 2 classes" in capsys.readouterr().out


def test_faults_of_a_folder_of_masks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(tmp_path / "own")
    (tmp_path / "names.txt").write_text("a\nb\n")
    told = ["masks", str(tmp_path / "own"), str(tmp_path / "out"), "--classes", str(tmp_path / "names.txt")]

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as exit:
            build_index.main([*told, *more])
        assert exit.value.code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "validation/1.png has 2 at pixel (0, 0): classes are 0 to 1, and nothing is 255" in refused()
    save(tmp_path / "own" / "annotations" / "training" / "0.png", np.zeros((4, 5)))
    assert "training/0.png has 5 x 4 pixels, its image 6 x 4" in refused("--nothing", "2")
    (tmp_path / "own" / "annotations" / "training" / "0.png").unlink()
    assert "1 faults" in (line := refused("--nothing", "2")) and "there is no mask" in line
    told[1] = str(tmp_path)
    assert f"there is no folder {tmp_path / 'images'}" in refused()


def test_the_demos_masks_are_the_shapes(tmp_path: Path) -> None:
    image = np.full((8, 8, 3), 240, np.uint8)
    image[2:5, 3:6] = (0, 0, 250)
    image[5, 3:6], image[1, 3:6] = (200, 200, 242), (60, 60, 248)  # of both: the nearer
    expected = np.zeros((8, 8), bool)
    expected[1:5, 3:6] = True
    assert np.array_equal(demo.shape_pixels(image), expected)


# ---------------------------------------------------------------------------------------------------------------- views


def test_masks_move_with_their_images(tmp_path: Path) -> None:
    """Each class has a grey of its own, so that the view says what its labels have to be, but for blurred borders."""
    rng = np.random.default_rng(0)
    numbers = np.repeat(np.repeat(rng.integers(0, 3, (5, 7)), 12, 0), 12, 1)
    image = Image.fromarray(np.stack([60 * numbers.astype(np.uint8)] * 3, -1))
    mask = Mask(save(tmp_path / "m.png", numbers), 255, 0)
    example = Example(0, (), None, mask, "it")
    views = MaskedViews(classes=3, scales=(0.5, 2.0), horizontal_flip=0.5)
    filled = 0
    for seed in range(30):
        found, (view,) = views.of_training(example, [image], 40, [np.random.default_rng(seed)])
        levels, known = view[..., 0].astype(int), found.label != NOTHING
        assert view.shape == (40, 40, 3) and found.label.shape == (40, 40)
        sharp = known & (levels % 60 == 0)
        assert sharp.sum() > 0.3 * known.sum() and (levels[sharp] == 60 * found.label[sharp]).mean() > 0.98
        assert (view[~known] == 128).all()
        filled += not known.all()
    assert 0 < filled < 30
    with pytest.raises(BadSample, match="classes are 0 to 1"):
        MaskedViews(classes=2).of_training(example, [image], 40, [np.random.default_rng(0)])
    again = [views.of_training(example, [image], 40, [np.random.default_rng(3)])[1][0] for _ in range(2)]
    assert np.array_equal(*again)


def test_colours_change_and_a_seed_decides_them(tmp_path: Path) -> None:
    example = Example(0, (), None, Mask(None, 255, 0), "it")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    views = MaskedViews(classes=3, scales=(1, 1), photometric=True, horizontal_flip=0)
    seen = [views.of_training(example, [image], 40, [np.random.default_rng(seed)])[1][0] for seed in range(12)]
    changed = sum(not np.array_equal(one, np.asarray(image)) for one in seen)
    assert 6 < changed <= 12 and np.array_equal(
        seen[2], views.of_training(example, [image], 40, [np.random.default_rng(2)])[1][0]
    )


def test_a_validation_sees_the_whole_image(tmp_path: Path) -> None:
    assert scaled_size(100, 50, 32) == (64, 32) and scaled_size(50, 100, 32) == (32, 64)
    assert scaled_size(1000, 50, 32) == (128, 6) and scaled_size(20, 20, 32, 0.5) == (16, 16)
    views = MaskedViews(classes=3)
    image = Image.new("RGB", (100, 50))
    mask = save(tmp_path / "m.png", np.ones((50, 100)))
    found, (view,) = views.of_evaluation(Example(0, (), None, Mask(mask, 255, 0), "it"), [image], 32)
    assert view.shape == (32, 64, 3) and found.label.shape == (50, 100)
    labels = stacked_labels([found, Example(1, (), None, np.zeros((60, 10), np.int16), "other")])
    assert labels.shape == (2, 60, 100) and (labels[1, :, 10:] == OUTSIDE).all() and (labels[0, :50] == 1).all()


# -------------------------------------------------------------------------------------------------------------- windows


class Positions(Segmentation):
    """Whose scores are what the pixels say, so that windows, scales and mirroring show."""

    def scores(self, model: Any, images: Tensor) -> Tensor:
        self.seen = [*getattr(self, "seen", []), tuple(images.shape[-2:])]
        return torch.stack([images[:, 0], images[:, 1], images[:, 2]], 1)


def test_windows_slide_over_the_whole_image_at_all_scales() -> None:
    task: Any = a_task(flip=True, scales=[1.0, 2.0], stride=20)
    task.__class__ = Positions
    images = [torch.rand(3, 32, 70), torch.rand(3, 32, 32)]
    sizes = [(32, 70), (16, 16)]
    found = task.class_maps(None, images, sizes, at_once=3)
    up = torch.nn.functional.interpolate(images[0][None], scale_factor=2, mode="bilinear")
    back = torch.nn.functional.interpolate(up, size=(32, 70), mode="bilinear")[0]
    assert torch.equal(found[0], (images[0] + back).argmax(0)) and found[1].shape == (16, 16)
    assert set(task.seen) == {(32, 32)}
    corners = [corner for step in task._steps(images[0], 1.0, 3) for corner in step[0]]
    assert corners == [(0, 0), (0, 20), (0, 38)]


def test_all_ranks_take_as_many_steps() -> None:
    """A rank with less to see sees something again until the others are done."""
    task: Any = a_task()
    task.__class__ = Positions
    asked: list[bool] = []

    def agree(done: bool) -> bool:
        asked.append(done)
        return len(asked) > 5

    task.class_maps(None, [torch.rand(3, 32, 32)], [(32, 32)], agree)
    assert asked == [False, True, True, True, True, True] and len(task.seen) == 5


# ---------------------------------------------------------------------------------------------------------- mask2former


def test_matching_is_the_cheapest() -> None:
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (3, 3), (3, 6), (5, 6)):
        costs = rng.normal(size=(rows, columns)).round(1)
        cheapest = min(sum(costs[r, c] for r, c in enumerate(chosen))
                       for chosen in itertools.permutations(range(columns), rows))  # fmt: skip
        found = assigned(costs)
        assert len(set(found)) == rows and costs[range(rows), found].sum() == pytest.approx(cheapest)


def test_matching_is_scipys() -> None:
    scipy = pytest.importorskip("scipy.optimize")
    costs = np.random.default_rng(1).normal(size=(30, 200))
    assert np.array_equal(assigned(costs), scipy.linear_sum_assignment(costs)[1])


def test_the_score_of_a_pixel_is_a_sum_over_queries() -> None:
    classes = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]])
    masks = torch.tensor([[[[0.0]], [[1.0]]]])
    p, q = classes[0].softmax(-1), masks[0, :, 0, 0].sigmoid()
    expected = [p[0, 0] * q[0] + p[1, 0] * q[1], p[0, 1] * q[0] + p[1, 1] * q[1]]
    torch.testing.assert_close(scores_of([(classes, masks)])[0, :, 0, 0], torch.stack(expected))


def test_losses_of_an_image() -> None:
    """By hand for one mask and one layer: a matched query, another that says none."""
    labels = torch.zeros(4, 4, dtype=torch.int64)
    labels[:2] = NOTHING
    truth = (labels == 0).float()
    masks = torch.stack([10 * truth - 5, 5 - 10 * truth])[None]
    classes = torch.tensor([[[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]]])
    key = torch.tensor(7)
    places = uncertain_places(masks[0, :1], key, 50, 1)
    at = [torch.nn.functional.grid_sample(one[None, None], (2 * places - 1)[:, None], align_corners=False)[0, 0, 0]
          for one in (masks[0, 0], truth)]  # fmt: skip
    cross, dice = mask_terms(at[0][None], at[1][None])
    logs = classes[0].log_softmax(-1)
    of_classes = -(logs[0, 0] + 0.1 * logs[1, 2]) / 1.1
    expected = OF_MASK * cross[0] + OF_DICE * dice[0] + OF_CLASS * of_classes
    torch.testing.assert_close(image_loss([(classes, masks)], 0, labels, key, 50), expected)
    swapped = image_loss([(classes.flip(1), masks.flip(1))], 0, labels, key, 50)
    torch.testing.assert_close(swapped, expected)
    nothing = image_loss([(classes, masks)], 0, torch.full((4, 4), NOTHING), key, 50)
    torch.testing.assert_close(nothing, -OF_CLASS * logs[:, 2].mean())


def test_places_are_drawn_by_key_and_most_are_uncertain() -> None:
    key = torch.tensor(3)
    places = drawn_places(key, 4000, 0)
    assert torch.equal(places, drawn_places(key, 4000, 0)) and not torch.equal(places, drawn_places(key, 4000, 1))
    assert 0 <= places.min() and places.max() < 1 and abs(places.mean() - 0.5) < 0.02
    slope = torch.linspace(-8, 8, 64).expand(1, 64, 64)
    x = uncertain_places(slope, key, 400, 0)[0, :, 0]
    assert ((x - 0.5).abs() < 0.2).float().mean() > 0.75


def test_channels_are_dropped_by_sample_and_step() -> None:
    keys = torch.tensor([4, 5])
    kept = kept_channels(keys, 5000, seed=0, step=1)
    assert torch.equal(kept, kept_channels(keys, 5000, seed=0, step=1)) and kept.shape == (2, 5000, 1, 1)
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept, kept_channels(keys, 5000, seed=0, step=2))
    assert abs((kept == 0).float().mean() - 0.1) < 0.02 and abs(kept.mean() - 1) < 0.02


# ------------------------------------------------------------------------------------------------------------------ use


@pytest.mark.parametrize("dense", [
    DenseConfig(channels=8), DenseConfig(pyramid="layers", channels=8), DenseConfig(pyramid="adapter", channels=8),
    DenseConfig(pyramid="adapter", head="mask2former", channels=16, queries=5, window=2, global_blocks=2),
])  # fmt: skip
def test_a_model_folder_segments_images_and_draws_them(dense: DenseConfig, tmp_path: Path) -> None:
    """Of any head, which the folder remembers; every parameter of the head learns."""
    network = task_class("segmentation").network(MODEL, 3, dense, seed=1)
    entry = {"name": "segmentation", "classes": 3, "answers": CLASSES, "text_length": 8, "dense": vars(dense)}
    save_model_folder(tmp_path / "model", dict(network.state_dict()), MODEL, task=entry)
    image = save(tmp_path / "one.png", np.random.default_rng(0).integers(0, 256, (20, 50, 3)))
    model = Model.load(tmp_path / "model", "cpu")
    task: Any = model.task
    labels = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(0)).short()
    none = torch.empty(2, 0, dtype=torch.int64)
    inputs = TaskInputs(torch.randn(2, 1, 3, 32, 32), none, none.bool(), labels, torch.arange(2))
    task.losses(network.train(), inputs)[0].sum().backward()
    still = [name for name, p in network.task_head.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still
    (classes,) = model.segment([image])
    assert classes.shape == (20, 50) and set(classes.ravel()) <= {0, 1, 2}
    assert np.array_equal(model.predict(images=[image])[0], classes)
    draw.main([str(tmp_path / "model"), str(image), "--out", str(tmp_path / "drawn"), "--device", "cpu"])
    with Image.open(tmp_path / "drawn" / "one.png") as drawn:
        assert drawn.size == (50, 20)
    assert (tmp_path / "drawn" / "classes.png").is_file()


def test_it_learns_where_things_are() -> None:
    """Red rectangles of four pictures, to an IoU of 0.9: nothing is mirrored, moved or told of another picture on the
    way from masks to losses to windows."""
    images = torch.full((4, 1, 3, 32, 32), 0.8)
    labels = torch.zeros(4, 32, 32, dtype=torch.int16)
    for n, (y, x) in enumerate([(2, 3), (14, 1), (5, 15), (17, 16)]):
        images[n, 0, 0, y : y + 12, x : x + 14] = -1
        labels[n, y : y + 12, x : x + 14] = 1
    task = a_task()
    network = task_class("segmentation").network(replace(MODEL, layers=2), 2, DenseConfig(channels=16), seed=1)
    optimizer = torch.optim.Adam(network.train().parameters(), 1e-2)
    none = torch.empty(4, 0, dtype=torch.int64)
    for step in range(80):
        inputs = TaskInputs(images, none, none.bool(), labels, torch.arange(4), step=step)
        optimizer.zero_grad()
        task.losses(network, inputs)[0].mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = torch.stack(task.class_maps(network.eval(), list(images[:, 0]), [(32, 32)] * 4))
    confusion = torch.bincount((2 * labels + found).flatten(), minlength=4).view(2, 2)
    assert overlaps(confusion)[0]["miou"] > 0.9


def test_wrong_settings_are_refused() -> None:
    for given, message in (({"pyramid": "tall"}, "dense.pyramid='tall' is not one of simple, layers, adapter"),
                           ({"head": "mask2former", "channels": 12}, "dense.channels=12"),
                           ({"queries": 0}, "dense.queries must be positive")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            DenseConfig(**given)
    with pytest.raises(ValueError, match="eval.scales"):
        TaskEvalConfig(scales=[])
    with pytest.raises(ValueError, match="data.scales"):
        TaskDataConfig(scales=[2.0, 1.0])
