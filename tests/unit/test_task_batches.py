"""Batches of downstream tasks: the same for every layout and after a resume, and nothing is lost in validation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit3_dist.data import index
from beit3_dist.data.faults import StreamFailed, of_storage
from beit3_dist.data.loader import loader
from beit3_dist.data.order import generator
from beit3_dist.data.text import TextTokenizer
from beit3_dist.tasks.data import batches
from beit3_dist.tasks.data.augmentation import IMAGENET, Mixing, Views, _rand_augment, erased, globals_from
from beit3_dist.tasks.data.batches import Examples, Places, TaskBatch, training_places, validation_places
from beit3_dist.tasks.data.examples import Example, TarMember
from beit3_dist.tasks.data.pair_shards import PairShards
from beit3_dist.tasks.vqa import VQA
from tests.unit.tar_fixtures import image_tar, picture, train_tokenizer, write_tar

COUNT = 23
"""Examples of the fixture: no multiple of any batch."""
SIZE = 16


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Examples of two pictures each, with words of different lengths."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(COUNT + 1)]
    for number, path in enumerate(paths):
        path.write_bytes(picture(number))
    return [
        Example(id, (paths[id], paths[id + 1]), tuple(range(5, 6 + id % 7)), id % 4, f"name {id}")
        for id in range(COUNT)
    ]


def dataset(examples: Sequence[Example], train: bool = True, **settings: Any) -> Examples:
    """The examples with small pictures and short texts."""
    settings = {"views": Views(), "image_size": SIZE, "max_words": 6, "seed": 3} | settings
    return Examples(examples, train=train, **settings)


def joined(batches: list[TaskBatch]) -> dict[str, list[Any]]:
    """Each field's rows over all batches; words without padding."""
    rows: dict[str, list[Any]] = {f.name: [] for f in fields(TaskBatch) if f.name not in ("faults", "targets")}
    for batch in batches:
        for name, column in rows.items():
            values = getattr(batch, name)
            column.extend(row[~p] for row, p in zip(values, batch.padding, strict=True)) if name == "words" else None
            column.extend(values.unbind()) if name not in ("words", "padding") else None
    return rows


def assert_same(first: list[TaskBatch], second: list[TaskBatch]) -> None:
    """The same samples in the same order."""
    ours, theirs = joined(first), joined(second)
    for name, column in ours.items():
        assert len(column) == len(theirs[name])
        for one, other in zip(column, theirs[name], strict=True):
            assert torch.equal(one, other), name


def steps(data: Examples, count: int, world: int, accumulation: int, consumed: int = 0) -> list[TaskBatch]:
    """The micro-batches of `count` steps of 12 samples, of all ranks, in the order of the global batch."""
    ranks = [training_places(consumed, 12, accumulation, rank, world) for rank in range(world)]
    return [data[next(rank)] for _ in range(count * accumulation) for rank in ranks]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 2), (1, 6)])
@pytest.mark.parametrize("mixed", [False, True])
def test_any_layout_and_a_resume_give_the_same_samples(
    examples: list[Example], world: int, accumulation: int, mixed: bool
) -> None:
    settings: dict[str, Any] = {}
    if mixed:
        examples = [replace(example, images=example.images[:1]) for example in examples]
        views = Views(min_crop_scale=0.08, rand_augment="rand-m9-mstd0.5-inc1", erase=0.25)
        settings = {"views": views, "mixing": Mixing(4)}
    data = dataset(examples, **settings)
    alone = steps(data, 4, world=1, accumulation=1)
    assert_same(alone, steps(data, 4, world, accumulation))
    assert_same(alone[2:], steps(data, 2, world, accumulation, consumed=24))


def test_an_epoch_holds_every_example_once_and_the_next_in_another_order(examples: list[Example]) -> None:
    ids = torch.cat([batch.ids for batch in steps(dataset(examples), 4, 1, 1)]).tolist()
    first, second = ids[:COUNT], ids[COUNT : 2 * COUNT]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second and first != sorted(first)
    other = torch.cat([batch.ids for batch in steps(dataset(examples, seed=4), 4, 1, 1)]).tolist()
    assert other[:COUNT] != first


def test_views_change_with_the_epoch_and_are_apart_for_the_two_pictures(examples: list[Example]) -> None:
    same_twice = [replace(example, images=(examples[0].images[0],) * 2) for example in examples[:1]]
    batch = dataset(same_twice)[Places((0, 1), (True, True))]
    views = batch.images.flatten(0, 1)
    assert all(not torch.equal(views[i], views[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 30])
def test_validation_sees_every_example_once_on_ranks_with_equally_many_batches(
    examples: list[Example], world: int, count: int
) -> None:
    data = dataset(examples, train=False)
    places = [list(validation_places(COUNT, count, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in places}) == 1
    batches = [data[turn] for turns in zip(*places, strict=True) for turn in turns]
    assert all(len(batch.ids) == count for batch in batches)
    valid = torch.cat([batch.valid for batch in batches])
    assert torch.cat([batch.ids for batch in batches])[valid].tolist() == list(range(COUNT))


def test_a_validation_view_is_the_whole_picture(examples: list[Example]) -> None:
    whole = np.zeros((10, 30, 3), dtype=np.uint8)
    whole[:, :15] = (250, 10, 10)  # the left half is red
    file = examples[0].images[0]
    assert isinstance(file, Path)
    path = file.with_name("halves.png")
    Image.fromarray(whole).save(path)
    data = dataset([replace(examples[0], images=(path,))], train=False)
    view = data[Places((0,), (True,))].images[0, 0]
    assert view.shape == (3, SIZE, SIZE)
    assert (view[0, :, : SIZE // 2 - 2] > 240).all() and (view[:, :, SIZE // 2 + 2 :] < 10).all()
    centre = dataset([replace(examples[0], images=(path,))], train=False, views=Views(evaluation="centre"))
    # Of 30 x 10 pixels the middle 10 x 10: its left half is red, its right half black, as well.
    assert torch.equal(centre[Places((0,), (True,))].images[0, 0, 0] > 128, view[0] > 128)


def test_words_are_framed_cut_and_padded(examples: list[Example]) -> None:
    batch = dataset(examples, train=False)[Places((0, 2, 6), (True, True, False))]
    assert batch.words.tolist() == [[0, 5, 2, 1, 1, 1], [0, 5, 6, 7, 2, 1], [0, 5, 6, 7, 8, 2]]
    assert batch.padding.tolist() == [[False] * 3 + [True] * 3, [False] * 5 + [True], [False] * 6]
    assert batch.labels.tolist() == [0, 2, 2] and batch.labels.dtype == torch.int64
    assert batch.valid.tolist() == [True, True, False]
    assert batch.images.shape == (3, 2, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8


def test_no_pictures_and_no_words_have_shapes_too(examples: list[Example]) -> None:
    texts = dataset([replace(example, images=()) for example in examples])[Places((0, 1), (True, True))]
    assert texts.images.shape == (2, 0, 3, SIZE, SIZE)
    pictures = dataset([replace(example, words=None) for example in examples])[Places((0, 1), (True, True))]
    assert pictures.words.shape == pictures.padding.shape == (2, 0)


def test_scored_answers_become_a_row_of_scores(examples: list[Example]) -> None:
    scored = [replace(example, label={2: 0.3, 0: 1.0}) for example in examples]
    batch = dataset(scored, labels=partial(VQA.labels, classes=4))[Places((0, 1), (True, True))]
    assert torch.equal(batch.labels, torch.tensor([[1.0, 0.0, 0.3, 0.0]] * 2))


def test_a_broken_picture_is_replaced_in_training_and_stops_an_evaluation(examples: list[Example]) -> None:
    file = examples[0].images[0]
    assert isinstance(file, Path)
    broken = file.with_name("broken.png")
    broken.write_bytes(b"no picture")
    some = [replace(example, images=(broken,)) if example.id == 5 else example for example in examples]
    some = [replace(example, images=example.images[:1]) for example in some]
    batches, whole = steps(dataset(some), 2, 1, 1), steps(dataset(examples), 2, 1, 1)
    faults = [fault for batch in batches for fault in batch.faults]
    assert [(fault.shard, fault.key) for fault in faults] == [(str(broken), "name 5")]
    ids, expected = (torch.cat([batch.ids for batch in side]) for side in (batches, whole))
    assert torch.equal(ids[expected != 5], expected[expected != 5]) and 5 not in ids
    with pytest.raises(StreamFailed, match="name 5 cannot be evaluated: .*broken.png") as stop:
        dataset(some, train=False)[Places((5,), (True,))]
    assert [(fault.shard, fault.key) for fault in stop.value.faults] == [(str(broken), "name 5")]
    with pytest.raises(StreamFailed, match="100 examples in a row") as stop:
        dataset([replace(examples[0], images=(broken,))])[Places((0,), (True,))]
    assert not of_storage(stop.value.faults)
    broken.unlink()
    with pytest.raises(StreamFailed, match=r"broken.png: No such file or directory$") as stop:
        dataset([replace(examples[0], images=(broken,))])[Places((0,), (True,))]
    assert of_storage(stop.value.faults), "so that the run can be started again"


def test_a_pair_without_a_caption_is_replaced_in_training_and_stops_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [
        {"__key__": f"{number:04d}", "png": picture(number), "txt": text}
        for number, text in enumerate((b"a red circle", b"a cat", b" \n", b"the sea"))
    ]
    tar = write_tar(tmp_path / "pairs.tar", samples)
    tokenizer = TextTokenizer(str(train_tokenizer(tmp_path / "text.spm")))
    pairs = PairShards(str(tar), str(tmp_path / "cache"), tokenizer, "caption")
    data = dataset(pairs)
    batches = [data[Places(tuple(range(first, first + 4)), (True,) * 4)] for first in (0, 4)]
    faults = [fault for batch in batches for fault in batch.faults]
    assert [(fault.key, fault.reason) for fault in faults] == [("number 2", f"{tar}, 0002: empty caption")] * 2
    assert all(2 not in batch.ids and {0, 1, 3} == set(batch.ids.tolist()) for batch in batches)
    with pytest.raises(StreamFailed, match="number 2 cannot be evaluated: .*pairs.tar, 0002: empty caption"):
        dataset(pairs, train=False)[Places((0, 1, 2, 3), (True,) * 4)]
    scans: list[str] = []
    monkeypatch.setattr(index, "shard_scan", lambda path, *_: scans.append(path) or index.scan(path))
    assert pairs[0].name == "number 0" and not scans, "the names of a whole shard are read for each sample"
    named = PairShards(str(tar), str(tmp_path / "cache"), tokenizer, "caption", named=True)
    assert [named[place].name for place in (0, 1, 3)] == ["0000", "0001", "0003"] and len(scans) == 1


def test_pictures_come_from_tars_as_well(examples: list[Example], tmp_path: Path) -> None:
    tar = image_tar(tmp_path / "shard.tar", 2)
    content = picture(1)
    member = TarMember(str(tar), tar.read_bytes().index(content), len(content))
    batch = dataset([replace(examples[1], images=(examples[1].images[0], member))], train=False)[Places((0,), (True,))]
    assert torch.equal(batch.images[0, 0], batch.images[0, 1])
    with pytest.raises(StreamFailed, match="short read"):
        cut = replace(member, offset=tar.stat().st_size - 10)
        dataset([replace(examples[1], images=(cut,))], train=False)[Places((0,), (True,))]


def test_loader_processes_give_the_same_batches(examples: list[Example]) -> None:
    data = dataset(examples)
    places = list(islice(training_places(0, 12, 2, 0, 1), 4))
    alone, several = (list(loader(data, places, workers, 2, pin=False)) for workers in (0, 2))
    assert_same(alone, several)


def test_requests_that_cannot_be_met_are_refused(examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        next(training_places(0, 12, 1, 0, 5))
    with pytest.raises(ValueError, match="must be even"):
        dataset(examples, mixing=Mixing(4))[Places((0, 1, 2), (True,) * 3)]
    with pytest.raises(ValueError, match="max_words=2"):
        dataset(examples, max_words=2)
    with pytest.raises(ValueError, match="mixing is for training"):
        dataset(examples, train=False, mixing=Mixing(4))
    with pytest.raises(ValueError, match="rand_augment='rand-x7'"):
        Views(rand_augment="rand-x7")


def test_changes_are_made_as_often_as_in_the_released_code() -> None:
    """There each of two draws is left out half the time, and one of its ten changes nothing: (1 - 0.45)^2 = 30 % of the
    pictures stay as they are; 800 of them within five standard deviations (1.6 % x 5)."""
    levels = np.random.default_rng(0).integers(
        60, 200, (16, 16, 3), dtype=np.uint8
    )  # so that all nine change something
    change = _rand_augment("beit3")
    with globals_from(np.random.default_rng(1)):
        same = [np.array_equal(np.asarray(change(Image.fromarray(levels))), levels) for _ in range(800)]
    assert np.mean(same) == pytest.approx(0.55**2, abs=0.08)


@pytest.mark.parametrize("policy", ["beit3", "rand-m9-mstd0.5-inc1"])
def test_rand_augment_is_keyed_and_leaves_the_global_generators_alone(policy: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    views = Views(rand_augment=policy)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    made = [views.train(image, 24, generator(key)) for key in (0, 1, 0)]
    assert np.array_equal(made[0], made[2]) and not np.array_equal(made[0], made[1])
    assert (random.random(), np.random.rand()) == expected
    plain = [Views().train(image, 24, generator(key)) for key in range(20)]
    changed = [views.train(image, 24, generator(key)) for key in range(20)]
    # Crops and mirroring are drawn first, so that only the changes differ; a few pictures stay as they are.
    assert 8 <= sum(not np.array_equal(one, other) for one, other in zip(plain, changed, strict=True)) <= 20


def test_the_global_generators_come_back_after_an_error() -> None:
    state = random.getstate()
    with pytest.raises(KeyError), globals_from(generator(0)):
        random.random()
        raise KeyError
    assert random.getstate() == state


def test_an_erased_box_is_noise_of_the_right_size_and_levels() -> None:
    view = np.full((200, 200, 3), 7, dtype=np.uint8)
    shares, pixels = [], []
    for key in range(60):
        result = erased(view, generator(key))
        changed = (result != view).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = result[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (result != view).any(2).sum() > 0.95 * box[..., 0].size  # a box, but for noise of level 7
        shares.append(box[..., 0].size / 200**2)
        pixels.append(box.reshape(-1, 3))
    assert 0.015 < min(shares) < 0.06 and 0.25 < max(shares) < 0.34
    # Clipping to bytes moves means of these distributions by less than 3 levels.
    assert np.abs(np.concatenate(pixels).mean(0) - 255 * np.array(IMAGENET[0])).max() < 3
    assert (view == 7).all()


def test_mixing_blends_or_exchanges_neighbours() -> None:
    images = torch.stack([torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (0, 100, 200, 40)])
    labels = torch.tensor([0, 1, 2, 3])
    blend = Mixing(classes=4, cutmix=0.0, label_smoothing=0.0)
    mixed, targets = blend(images, labels, [generator(1), generator(2)])
    assert mixed.dtype == torch.uint8
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        own, levels = float(targets[row, row]), mixed[row].unique()
        assert targets[row, other] == pytest.approx(1 - own) and len(levels) == 1
        assert (
            abs(float(levels[0]) - (own * float(images[row, 0, 0, 0]) + (1 - own) * float(images[other, 0, 0, 0])))
            < 0.51
        )
    exchange = Mixing(classes=4, mixup=0.0)
    mixed, targets = exchange(images, labels, [generator(1), generator(2)])
    share = (mixed[0, 0] == 0).float().mean()
    smoothed = 0.1 / 4
    assert float(targets[0, 0]) == pytest.approx(float(share) * 0.9 + smoothed, abs=1e-6)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert set(mixed[0].unique().tolist()) <= {0, 100} and set(mixed[2].unique().tolist()) <= {200, 40}


def test_an_image_of_examples_in_a_row_is_decoded_once(
    examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    decode = batches.decoded
    monkeypatch.setattr(batches, "decoded", lambda image, most: decoded.append(image) or decode(image, most))
    one, other = (replace(example, images=example.images[:1]) for example in examples[:2])
    rows = [one, replace(one, id=1), replace(one, id=2), other, one]
    batch = dataset(rows, train=False)[Places((0, 1, 2, 3, 4), (True,) * 5)]
    assert [*map(str, decoded)] == [str(example.images[0]) for example in (one, other, one)]
    assert torch.equal(batch.images[0], batch.images[1]) and not torch.equal(batch.images[0], batch.images[3])
    assert torch.equal(batch.images[0], batch.images[4])
