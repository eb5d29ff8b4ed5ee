"""Pictures and classes in tars are examples of the task imagenet; nothing is left out without a word."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from beit3_dist.tasks.data.augmentation import Views
from beit3_dist.tasks.data.batches import Examples, Places
from beit3_dist.tasks.data.class_shards import ClassShards, read_class_shards
from beit3_dist.tasks.data.examples import TarMember
from tests.unit.tar_fixtures import picture, write_tar


def shard(path: Path, *labels: str, **first: bytes) -> Path:
    """A tar with a picture per class; `first` changes the members of the first one."""
    samples = [
        {"__key__": f"n/{path.stem}.{number}", "png": picture(number), "cls": label.encode()}
        for number, label in enumerate(labels)
    ]
    samples[0] = {name: value for name, value in (samples[0] | first).items() if value != b"-"}
    return write_tar(path, samples)


def read(folder: Path, classes: int = 10) -> ClassShards:
    return read_class_shards(str(folder / "*.tar"), "data.train", str(folder / "cache"), classes)


def test_examples_are_those_of_the_tars(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", "3", "0\n")
    shard(tmp_path / "b.tar", "9")
    examples = pickle.loads(pickle.dumps(read(tmp_path)))
    assert [(example.id, example.label, example.name) for example in examples] == [
        (0, 3, "a.0.png"),
        (1, 0, "a.1.png"),
        (2, 9, "b.0.png"),
    ]
    for example, content in zip(examples, (picture(0), picture(1), picture(0)), strict=True):
        (member,) = example.images
        assert isinstance(member, TarMember)
        assert Path(member.tar).read_bytes()[member.offset : member.offset + member.size] == content
    data = Examples(examples, train=False, views=Views(), image_size=8, max_words=3, seed=0)
    batch = data[Places((2, 1), (True, True))]
    assert batch.labels.tolist() == [9, 0] and batch.images.shape == (2, 1, 3, 8, 8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cls": b"10"}, r"key n/b.0: the class '10' is not in range\(10\)"),
        ({"cls": b"cat"}, "key n/b.0: the class 'cat'"),
        ({"cls": b"-1"}, "the class '-1'"),
        ({"cls": b"-"}, "key n/b.0: an image without a .cls member"),
        ({"png": b"-"}, "key n/b.0: a .cls member without an image"),
        ({"jpg": b"x"}, "key n/b.0: a second .(jpg|png) member"),
    ],
)
def test_a_faulty_sample_is_named(tmp_path: Path, changes: dict[str, bytes], reason: str) -> None:
    shard(tmp_path / "a.tar", "3")
    shard(tmp_path / "b.tar", "1", "2", **changes)
    with pytest.raises(ValueError, match=f"data.train: 1 faults: .*b.tar, .*{reason}") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_cut_tar_and_no_tar_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.train: no file matches"):
        read(tmp_path)
    whole = shard(tmp_path / "a.tar", "3", "4")
    whole.write_bytes(whole.read_bytes()[:1600])
    with pytest.raises(ValueError, match="a.tar: cut at byte 1600"):
        read(tmp_path)
