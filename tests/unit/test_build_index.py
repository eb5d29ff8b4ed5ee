"""Indexes from small files in the official formats, and the demo's tasks: what they say is true of the pictures."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3_dist.command_line import configured
from beit3_dist.data.sides import side
from beit3_dist.data.text import TextTokenizer
from beit3_dist.demo import tasks as demo
from beit3_dist.demo.sources import Emoji
from beit3_dist.tasks.config import FinetuneConfig
from beit3_dist.tasks.data import benchmarks, own_table
from beit3_dist.tasks.data.examples import read_index
from beit3_dist.tasks.data.objects import bitmap
from beit3_dist.tasks.registry import task_class
from tests.unit.tar_fixtures import train_tokenizer
from tools import build_index


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text tokenizer."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "text.spm")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of an index."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(command: str, source: Path | None, out: Path, *arguments: object) -> None:
    """The tool, in this process."""
    build_index.main([command, *([str(source)] if source else []), str(out), *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that the tool ends with."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def touch(root: Path, *indexes: Path) -> None:
    """Makes files where indexes say that they lie."""
    for record in itertools.chain.from_iterable(map(read, indexes)):
        for name in ("image_path", "image2_path"):
            if name in record:
                (root / record[name]).parent.mkdir(parents=True, exist_ok=True)
                (root / record[name]).write_bytes(b"a picture")


def karpathy(path: Path, **more: Any) -> Path:
    """Five pictures with two captions each in Karpathy's format; the last caption of the first has no word."""
    images = [
        {
            "filename": f"{number}.jpg",
            "split": split,
            "sentences": [{"raw": f"word {number}"}, {"raw": " " if number == 0 else "more words"}],
            **{name: value(number) for name, value in more.items()},
        }
        for number, split in enumerate(["train", "restval", "val", "test", "test"])
    ]
    path.write_text(json.dumps({"images": images}))
    return path


def test_coco(tmp_path: Path, spm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = karpathy(tmp_path / "dataset_coco.json", filepath=lambda _: "val2014", cocoid=lambda number: 100 + number)
    run("coco", source, tmp_path / "out", "--text_tokenizer", spm)
    assert "coco_retrieval.train.jsonl: 3 examples, 1 without words left out" in capsys.readouterr().out
    words = TextTokenizer(str(spm)).encode
    train = read(tmp_path / "out" / "coco_retrieval.train.jsonl")
    assert train == [
        {"image_path": "val2014/0.jpg", "image_id": 0, "text_segment": words("word 0")},
        {"image_path": "val2014/1.jpg", "image_id": 1, "text_segment": words("word 1")},
        {"image_path": "val2014/1.jpg", "image_id": 1, "text_segment": words("more words")},
    ]
    # Every split counts its pictures anew, and has all captions of each.
    test = read(tmp_path / "out" / "coco_retrieval.test.jsonl")
    assert [(line["image_path"], line["image_id"]) for line in test] == [("val2014/3.jpg", 0)] * 2 + [
        ("val2014/4.jpg", 1)
    ] * 2
    captioning = read(tmp_path / "out" / "coco_captioning.train.jsonl")
    assert [line["image_id"] for line in captioning] == [100, 101, 101]
    assert read(tmp_path / "out" / "coco_captioning.val.jsonl") == [
        {"image_path": "val2014/2.jpg", "image_id": 102, "captions": ["word 2", "more words"], "text_segment": None}
    ]
    for task in ("retrieval", "captioning"):
        for split in ("train", "val", "test"):
            path = tmp_path / "out" / f"coco_{task}.{split}.jsonl"
            touch(tmp_path, path)
            read_index(
                path, task_class(task), tmp_path, train=split == "train", vocab_size=TextTokenizer(str(spm)).rows
            )


def test_flickr30k(tmp_path: Path, spm: Path) -> None:
    source = karpathy(tmp_path / "dataset_flickr30k.json")
    source.write_text(source.read_text().replace("restval", "train"))
    run("flickr30k", source, tmp_path / "out", "--text_tokenizer", spm)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"flickr30k.{split}.jsonl" for split in ("test", "train", "val")
    ]
    (first, _) = read(tmp_path / "out" / "flickr30k.val.jsonl")
    assert (first["image_path"], first["image_id"]) == ("flickr30k-images/2.jpg", 0)


def vqa_files(folder: Path, pictures: int) -> Path:
    """VQA v2 in small: a question per picture; nine of ten people say 'Two', but 'many' on every tenth question."""
    folder.mkdir()
    for split, name in benchmarks.VQA_SPLITS.items():
        number = 12 if split == "train" else 3 if split.startswith("test") else pictures
        base = {"train": 10_000, "val": 20_000, "test": 30_000, "test-dev": 30_000}[split]
        questions = [
            {"question_id": 10 * (base + i), "image_id": base + i, "question": "how many words?"} for i in range(number)
        ]
        (folder / f"v2_OpenEnded_mscoco_{name}_questions.json").write_text(json.dumps({"questions": questions}))
        if split in ("train", "val"):
            annotations = []
            for question in questions:
                major = "many" if question["image_id"] % 10 == 9 else "Two"
                people = [major] * 9 + ["3."]
                annotations.append(
                    {
                        "question_id": question["question_id"],
                        "multiple_choice_answer": major,
                        "answers": [{"answer": answer} for answer in people],
                    }
                )
            path = folder / f"v2_mscoco_{name}_annotations.json"
            path.write_text(json.dumps({"annotations": annotations}))
    return folder


def test_vqa(tmp_path: Path, spm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "VALIDATION_IMAGES", 20)
    source, out = vqa_files(tmp_path / "vqa", pictures=50), tmp_path / "out"
    run("vqa", source, out, "--text_tokenizer", spm)
    # 'many' is the first answer of 1 + 5 questions only, 'Two' (2) of many; '3.' of none.
    assert read(out / "answer2label.txt") == [{"answer": "2", "label": 0}]
    train = read(out / "vqa.train.jsonl")
    assert len(train) == 11  # without the question on which nobody gives a listed answer
    assert train[0] == {
        "image_path": "train2014/COCO_train2014_000000010000.jpg",
        "qid": 100_000,
        "labels": [0],
        "scores": [1.0],
        "text_segment": TextTokenizer(str(spm)).encode("how many words?"),
    }
    val, rest, trainable = (read(out / f"vqa.{name}.jsonl") for name in ("val", "rest_val", "trainable_val"))
    assert len(val) == 50 and len(rest) == 20  # with the questions that cannot be answered right
    assert {line["qid"] for line in rest} | {line["qid"] for line in trainable} == {
        line["qid"] for line in val if line in rest or line["labels"]
    }
    assert not {line["qid"] for line in rest} & {line["qid"] for line in trainable}
    assert val[0]["answers"] == ["Two"] * 9 + ["3."] and "answers" not in trainable[0]
    assert [line["image_path"] for line in read(out / "vqa.test-dev.jsonl")] == [
        f"test2015/COCO_test2015_0000000{number}.jpg" for number in (30_000, 30_001, 30_002)
    ]
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    run("vqa", source, out, "--text_tokenizer", spm)
    assert {
        path.name: path.read_bytes() for path in out.iterdir()
    } == first  # the thousand pictures are always the same
    for split in ("train", "trainable_val", "rest_val", "test"):
        path = out / f"vqa.{split}.jsonl"
        touch(tmp_path, path)
        read_index(path, task_class("vqa"), tmp_path, train=split.startswith("train"), classes=1)


def test_vqa_with_a_given_list_of_answers(tmp_path: Path, spm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "VALIDATION_IMAGES", 5)
    build_index.write_answers(tmp_path / "list.txt", ["3", "2", "many"])
    run(
        "vqa",
        vqa_files(tmp_path / "vqa", pictures=10),
        tmp_path / "out",
        "--text_tokenizer",
        spm,
        "--answers",
        tmp_path / "list.txt",
    )
    assert (tmp_path / "out" / "answer2label.txt").read_bytes() == (tmp_path / "list.txt").read_bytes()
    lines = read(tmp_path / "out" / "vqa.train.jsonl")
    assert [(line["labels"], line["scores"]) for line in lines[8:10]] == [([1, 0], [1.0, 0.3]), ([2, 0], [1.0, 0.3])]


def test_nlvr2(tmp_path: Path, spm: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    examples = [
        {"identifier": "train-10-0-1", "directory": 7, "sentence": "two words", "label": "True"},
        {"identifier": "train-10-0-2", "directory": 8, "sentence": "a word", "label": "False"},
    ]
    for name in ("train.json", "dev.json", "test1.json"):
        lines = [{k: v for k, v in e.items() if name == "train.json" or k != "directory"} for e in examples]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("nlvr2", folder, tmp_path / "out", "--text_tokenizer", spm)
    words = TextTokenizer(str(spm)).encode
    assert read(tmp_path / "out" / "nlvr2.train.index.jsonl") == [
        {
            "image_path": f"images/train/{folder}/train-10-0-img0.png",
            "image2_path": f"images/train/{folder}/train-10-0-img1.png",
            "label": label,
            "identifier": identifier,
            "text_segment": words(text),
        }
        for folder, label, identifier, text in (
            (7, 1, "train-10-0-1", "two words"),
            (8, 0, "train-10-0-2", "a word"),
        )
    ]
    assert read(tmp_path / "out" / "nlvr2.test-P.index.jsonl")[0]["image_path"] == "test1/train-10-0-img0.png"


def test_imagenet(tmp_path: Path) -> None:
    for name in ("train/n02/b.JPEG", "train/n02/a.JPEG", "train/n01/c.JPEG", "val/n02/d.JPEG", "train/n01/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"a picture")
    run("imagenet", tmp_path, tmp_path / "out")
    assert read(tmp_path / "out" / "imagenet.train.index.jsonl") == [
        {"image_path": "train/n01/c.JPEG", "label": 0},
        {"image_path": "train/n02/a.JPEG", "label": 1},
        {"image_path": "train/n02/b.JPEG", "label": 1},
    ]
    assert (tmp_path / "out" / "imagenet.classes.txt").read_text() == "n01\nn02\n"
    index = read_index(tmp_path / "out" / "imagenet.val.index.jsonl", task_class("imagenet"), tmp_path, classes=2)
    assert [(example.name, example.label) for example in index] == [("d.JPEG", 1)]


def test_what_is_missing_or_malformed_is_one_line(
    tmp_path: Path, spm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--text_tokenizer", spm)
    assert "there is no file" in refused(capsys, "coco", tmp_path / "no.json", tmp_path / "out", *words)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "broken.json: not JSON" in refused(capsys, "coco", broken, tmp_path / "out", *words)
    for content in ("[]", '{"images": [{"split": "val"}]}'):
        broken.write_text(content)
        assert "broken.json is not in the official format" in refused(capsys, "coco", broken, tmp_path / "out", *words)
    assert "there is no file" in refused(capsys, "vqa", tmp_path, tmp_path / "out", *words)
    assert "there is no folder" in refused(capsys, "imagenet", tmp_path, tmp_path / "out")
    assert "text_tokenizer: there is no file" in refused(
        capsys, "coco", broken, tmp_path / "out", "--text_tokenizer", tmp_path / "no.spm"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "already exists" in refused(capsys, "demo", None, tmp_path / "full", *words)


ODD = {  # (command, what is changed in a record, words of the one line)
    "a caption that is a number": ("flickr30k", {"sentences": [{"raw": 5}]}, "raw is 5, and no text"),
    "a caption that is none": ("coco", {"sentences": [{"raw": None}]}, "raw is None, and no text"),
    "a number in words": ("coco", {"cocoid": "five"}, "cocoid is 'five', and no whole number"),
    "another split": ("coco", {"split": "dev"}, "split is 'dev', and none of train, restval, val, test"),
    "a split that leaves OUT": ("flickr30k", {"split": "x/../../y"}, "split is 'x/../../y', and none of"),
    "no picture": ("coco", None, "it has no image"),
    "a sentence that is a number": ("nlvr2", {"sentence": 5}, "sentence is 5, and no text"),
    "a question that is none": ("vqa", {"question": None}, "question is None, and no text"),
    "a picture in words": ("vqa", {"image_id": "1"}, "image_id is '1', and no whole number"),
}


@pytest.mark.parametrize(("command", "change", "words"), ODD.values(), ids=ODD)
def test_what_an_official_file_cannot_hold_is_one_line(
    command: str, change: dict | None, words: str, tmp_path: Path, spm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "vqa":
        source = vqa_files(tmp_path / "vqa", pictures=3)
        path, field = source / "v2_OpenEnded_mscoco_train2014_questions.json", "questions"
    elif command == "nlvr2":
        source = tmp_path
        path, field = tmp_path / "train.json", "lines"
        path.write_text(json.dumps({"lines": [{"sentence": "a", "label": "True", "identifier": "train-1-0-0"}]}))
    else:
        source = path = karpathy(tmp_path / "k.json", filepath=lambda _: "val2014", cocoid=lambda number: number)
        field = "images"
    records = json.loads(path.read_text())[field]
    content = [] if change is None else [{**records[0], **change}, *records[1:]]
    path.write_text(json.dumps(content if field == "lines" else {field: content}))
    said = refused(capsys, command, source, tmp_path / "out", "--text_tokenizer", spm)
    assert f"{path} is not in the official format: {words}" in said
    assert not (tmp_path / "out").exists()


def test_official_numbers_that_come_twice(tmp_path: Path, spm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--text_tokenizer", spm)
    source = vqa_files(tmp_path / "vqa", pictures=3)
    files = {"v2_mscoco_val2014_annotations": "annotations", "v2_OpenEnded_mscoco_test2015_questions": "questions"}
    for name, field in files.items():
        whole = (source / f"{name}.json").read_text()
        records = json.loads(whole)[field]
        (source / f"{name}.json").write_text(json.dumps({field: [*records, records[0]]}))
        said = refused(capsys, "vqa", source, tmp_path / "out", *words)
        assert f"{name}.json: question_id {records[0]['question_id']} comes twice" in said
        (source / f"{name}.json").write_text(whole)
    coco = karpathy(tmp_path / "dataset_coco.json", filepath=lambda _: "val2014", cocoid=lambda number: number // 2)
    assert "dataset_coco.json: cocoid 0 comes twice" in refused(capsys, "coco", coco, tmp_path / "out", *words)
    line = json.dumps({"sentence": "both", "label": "True", "identifier": "train-1-0-0"}) + "\n"
    for name in ("train", "dev", "test1"):
        (tmp_path / f"{name}.json").write_text(line * 2)
    said = refused(capsys, "nlvr2", tmp_path, tmp_path / "out", *words)
    assert "train.json: identifier train-1-0-0 comes twice" in said


@pytest.mark.parametrize("name", ["two\nlines", "\ufeffcat", "caf\udce9"])
def test_folders_that_no_list_of_classes_can_hold(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("train/dog", f"train/{name}", "val/dog"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(b"a picture")
    said = refused(capsys, "imagenet", tmp_path, tmp_path / "out")
    assert f"{tmp_path / 'train'}, class " in said
    (tmp_path / "train" / name).rename(tmp_path / "train" / "cat")
    run("imagenet", tmp_path, tmp_path / "out")


def test_what_is_left_out_of_class_folders_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (
        "train/cat/a.jpg",
        "train/cat/b.psd",
        "train/cat/c.psd",
        "train/cat/more/d.jpg",
        "val/cat/e.jpg",
        "val/f.jpg",
    )
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"a picture")
    run("imagenet", tmp_path, tmp_path / "out")
    assert capsys.readouterr().err.split("\n") == [
        f"left out 1 files: beside the folders; the first is {tmp_path}/val/f.jpg",
        f"left out 2 files: extension .psd; the first is {tmp_path}/train/cat/b.psd",
        f"left out 1 files: a folder; the first is {tmp_path}/train/cat/more",
        "",
    ]


def test_a_folder_without_pictures_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("train/cat", "train/lost+found", "train/.thumbnails", "val/cat"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / ("a.jpg" if folder.endswith("cat") else "notes")).write_bytes(b"a picture")
    assert "train/lost+found holds no image, but would be" in refused(capsys, "imagenet", tmp_path, tmp_path / "out")
    shutil.rmtree(tmp_path / "train" / "lost+found")
    run("imagenet", tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "imagenet.classes.txt").read_text() == "cat\n"


def test_answers_are_read_as_in_training(
    tmp_path: Path, spm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "VALIDATION_IMAGES", 2)
    source = vqa_files(tmp_path / "vqa", pictures=5)
    (tmp_path / "answers.txt").write_bytes(b"\xef\xbb\xbf2\r\nmany\r\n")
    run("vqa", source, tmp_path / "out", "--text_tokenizer", spm, "--answers", tmp_path / "answers.txt")
    assert [line["answer"] for line in read(tmp_path / "out" / "answer2label.txt")] == ["2", "many"]
    (tmp_path / "answers.txt").write_text("2\nmany\n2\n")
    words = ("--text_tokenizer", spm, "--answers", tmp_path / "answers.txt")
    assert "line 3: '2' is also the name at" in refused(capsys, "vqa", source, tmp_path / "out", *words)


# ----------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def easy() -> dict[str, demo.EasySide]:
    """Both sides of easy-VQA."""
    pytest.importorskip("easy_vqa")
    return demo.easy_vqa()


def test_what_is_said_of_a_picture_is_its_colour(easy: dict[str, demo.EasySide]) -> None:
    pixels: dict[str, Counter] = defaultdict(Counter)
    known = easy["test"].shapes()
    for picture, shape in itertools.islice(known.items(), 200):
        colors = Image.open(easy["test"].paths[picture]).convert("RGB").getcolors()
        assert colors is not None
        pixels[shape.color][sorted(colors)[-2][1]] += 1  # only the background has more pixels
    assert len(known) > 850 and pixels.keys() == set(demo.COLORS)
    assert all(len(colors) == 1 for colors in pixels.values())  # one colour of pixels for each name ...
    assert len({next(iter(colors)) for colors in pixels.values()}) == len(demo.COLORS)  # ... and no two alike


def test_sentences_are_true_as_labelled_and_no_side_gives_them_away(
    easy: dict[str, demo.EasySide], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SENTENCES", {"train": 1200, "test": 400})
    indexes = demo.nlvr2(easy)
    alone: dict[str, Counter] = defaultdict(Counter)
    together: dict[str, Counter] = defaultdict(Counter)
    for split, source in easy.items():
        known = {source.image_path(number, split): shape for number, shape in source.shapes().items()}
        for record in indexes[f"nlvr2.{split}.jsonl"]:
            pair = [known[record["image_path"]], known[record["image2_path"]]]
            assert record["image_path"] != record["image2_path"]
            assert is_true(record["text"], pair) == bool(record["label"])
            saying = " ".join(re.sub("left |right ", "", record["text"]).split()[:2])
            alone[saying][record["label"]] += 1
            together[f"{saying} {pair[0].kind == pair[1].kind} {pair[0].color == pair[1].color}"][record["label"]] += 1
    assert all(counts[0] == counts[1] for counts in alone.values()) and len(alone) == 4
    guessed = sum(max(counts.values()) for counts in together.values()) / 1600
    assert guessed < 0.54  # 0.5 plus what 16 classes of pairs show by chance


def is_true(sentence: str, pair: list[demo.Shape]) -> bool:
    """The truth of a sentence, read from its words alone."""
    told = re.findall(rf"({'|'.join(demo.COLORS)}) ({'|'.join(demo.SHAPES)})", sentence)
    shown = [tuple(shape) for shape in pair]
    if sentence.startswith("both pictures contain a "):
        return all(shape.kind == sentence.rpartition(" ")[2] for shape in pair)
    if sentence.startswith("both shapes are "):
        return all(shape.color == sentence.rpartition(" ")[2] for shape in pair)
    side = 0 if " left " in sentence else 1
    if " shape is " in sentence:
        return pair[side].color == sentence.rpartition(" ")[2]
    return told == [shown[side]]


def test_captions_classes_and_answers_agree(easy: dict[str, demo.EasySide]) -> None:
    captions = {line["image_path"]: line["text"] for line in demo.captioning(easy)["captioning.test.jsonl"]}
    classes = {line["image_path"]: line["label"] for line in demo.shapes(easy)["shapes.test.jsonl"]}
    names = demo.SHAPE_CLASSES
    assert {path: f"a {names[label]}" for path, label in classes.items()} == captions
    assert len(set(classes.values())) == len(names) == 24
    questions = demo.vqa(easy)
    blind = demo.questions(questions)["questions.test.jsonl"]
    assert [(line["text"], [line["label"]]) for line in blind] == [
        (line["text"], line["labels"]) for line in questions["vqa.test.jsonl"]
    ]
    assert len(questions["vqa.train.jsonl"]) == 38_575 and len(questions["vqa.test.jsonl"]) == 9_673
    for line in questions["vqa.test.jsonl"][:500]:
        caption = captions.get(line["image_path"])
        (answer,) = line["answers"]
        assert demo.ANSWERS[line["labels"][0]] == answer
        assert caption is None or answer in ("yes", "no") or answer in caption


def test_drawings_are_tested_on_where_the_shards_hold_them_out() -> None:
    emoji = [Emoji(f"{number // 2}".encode(), f"name {number}", bytes([number])) for number in range(200)]
    indexes, files = demo.retrieval(emoji, 0.1)
    tested = {line["text"] for line in indexes["retrieval.test.jsonl"]}
    assert tested == {one.name for one in emoji if side(one.identity, 0.1) == "held_out"}
    assert 0 < len(tested) < 60 and len(indexes["retrieval.train.jsonl"]) == 200 - len(tested)
    for lines in indexes.values():
        assert [line["image_id"] for line in lines] == list(range(len(lines)))
        assert all(files[line["image_path"]][0] == int(line["text"].split()[1]) for line in lines)


def test_parts_of_speech_are_equally_frequent_and_words_are_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dictionary")
    entries = list(itertools.islice(demo.dictionary_entries(), 20_000))
    monkeypatch.setattr(demo, "dictionary_entries", lambda: iter(entries))
    monkeypatch.setattr(demo, "PER_PART", {"train": 100, "test": 10})
    indexes = demo.text(0.05)
    for split, count in demo.PER_PART.items():
        lines = indexes[f"text.{split}.jsonl"]
        assert Counter(line["label"] for line in lines) == dict.fromkeys(range(4), count)
    meanings = {demo.definitions([part]): part for _, parts in entries for part in parts}
    for line in indexes["text.test.jsonl"]:
        part = meanings[line["text"]]["part_of_speech"]
        assert demo.PARTS_OF_SPEECH[part] == demo.TEXT_CLASSES[line["label"]]
    assert not {line["text"] for line in indexes["text.train.jsonl"]} & {
        line["text"] for line in indexes["text.test.jsonl"]
    }


@pytest.mark.slow
def test_the_whole_demo_is_read_without_a_fault(tmp_path: Path, spm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tasks"
    run("demo", None, out, "--text_tokenizer", spm)
    tasks = {"vqa": 13, "shapes": 24, "captioning": None, "nlvr2": 2, "retrieval": None, "text": 4, "segmentation": 9,
             "objects": 8}  # fmt: skip
    for name, classes in tasks.items():
        for split in ("train", "test"):
            task = {"shapes": "imagenet", "objects": "instance_segmentation"}.get(name, name)
            index = read_index(out / f"{name}.{split}.jsonl", task_class(task), out, train=True, classes=classes)
            assert len(index) > 100
            for image in index[len(index) - 1].images:
                assert isinstance(image, Path)
                Image.open(image).load()
    marked = index[0].label  # of the last one, objects
    (left, top, width, height), mask = marked.objects[0]["box"], bitmap(marked.objects[0]["mask"], 64, 64)
    box = (slice(int(top), int(top + height)), slice(int(left), int(left + width)))
    assert mask[box].sum() == mask.sum() > 0 and mask[box].any(0).all() and mask[box].any(1).all()
    first = {name: json.loads((out / f"{name}.test.jsonl").read_text().splitlines()[0]) for name in tasks}
    numbers = np.asarray(Image.open(out / first["segmentation"]["mask_path"]))
    color = demo.SHAPE_CLASSES[first["shapes"]["label"]].split()[0]
    assert np.array_equal(numbers, mask * demo.SEGMENTS.index(color))
    assert demo.COLORS[marked.objects[0]["label"]] == color
    capsys.readouterr()
    run("demo", None, out, "--text_tokenizer", spm)
    assert capsys.readouterr().out == f"{out} is complete\n"
    assert "another --held-out" in refused(capsys, "demo", None, out, "--text_tokenizer", spm, "--held-out", "0.2")


# ------------------------------------------------------------------------------------------------------ one's own table

ROWS = 12
COLOURS = ["red", "green", "blue"]


def own_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows with a column for every field, and their pictures."""
    (folder / "p").mkdir(parents=True)
    for number in range(ROWS // 2):
        Image.new("RGB", (8, 8), COLOURS[number % 3]).save(folder / f"p/{number}.png")
    return [
        {
            "image": f"p/{number // 2}.png", "image2": f"p/{(number + 1) // 2 % 6}.png", "question": f"which, {number}",
            "answer": COLOURS[number // 2 % 3], "caption": f"it is {COLOURS[number // 2 % 3]}, {number}",
            "class": ["true", "false"][number // 2 % 2], "text": f"sentence {number}", "text2": f"another, {number}",
        }
        for number in range(ROWS)
    ]  # fmt: skip


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".tsv":
        lines = ([*rows[0]], *(row.values() for row in rows))
        path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))
    else:
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, [*rows[0]])
            table.writeheader()
            table.writerows(rows)
    return path


@pytest.mark.parametrize("task", own_table.FIELDS)
def test_a_table_becomes_the_index_of_any_task(
    task: str, tmp_path: Path, spm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same of .csv, .tsv and .jsonl; what training reads, every row on one side, and a picture's rows together."""
    rows, written = own_rows(tmp_path), {}
    for ending in (".csv", ".tsv", ".jsonl"):
        table, out = write_table(tmp_path / f"table{ending}", rows), tmp_path / f"out{ending}"
        run("table", table, out, "--task", task, "--text_tokenizer", spm, "--held-out", 0.4)
        written[ending] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert written[".csv"] == written[".tsv"] == written[".jsonl"]
    out = tmp_path / "out.csv"
    names = (out / "names.txt").read_text().split() if (out / "names.txt").exists() else []
    sides = {
        name: read_index(
            out / f"{task}.{name}.jsonl", task_class(task), tmp_path, train=name == "train", predicted=name != "train",
            vocab_size=310, classes=len(names) or None,
        )
        for name in ("train", "validation")
    }  # fmt: skip
    images = {name: {image for example in side for image in example.images[:1]} for name, side in sides.items()}
    assert not images["train"] & images["validation"]
    held_out = {row["image"] for row in rows if side(row[own_table.FIELDS[task][0]].encode(), 0.4) == "held_out"}
    per_picture = task == "captioning"
    if "image" in own_table.FIELDS[task]:
        assert len(sides["validation"]) == len(held_out) * (1 if per_picture else 2) and held_out
        assert len(sides["train"]) == ROWS - 2 * len(held_out)
    else:
        assert len(sides["train"]) + len(sides["validation"]) == ROWS
    expected = {"answer": COLOURS, "class": ["false", "true"]}.get(own_table.FIELDS[task][-1], [])
    assert sorted(names) == ([] if task == "nlvr2" else sorted(expected))
    command = capsys.readouterr().out.splitlines()[-1]
    begins = f"for launchers/finetune.py: --task {task} --data.train {tmp_path}/out.jsonl/{task}.train.jsonl "
    assert command.startswith(begins)
    arguments = command.split(": ")[1].split()
    needed = ["--out", "run", "--init_from", "model", "--text_tokenizer", str(spm)]
    assert configured(FinetuneConfig, "finetune", "", [*arguments, *needed]).task == task


def test_what_a_table_means(tmp_path: Path, spm: Path) -> None:
    rows = own_rows(tmp_path)
    lists = [row | {"answer": ["red"] * 4 + ["blue"] * 6, "caption": ["one thing", "another"]} for row in rows[:2]]
    train, other = write_table(tmp_path / "a.jsonl", [*lists, *rows[2:]]), write_table(tmp_path / "b.csv", rows[:3])
    run("table", train, tmp_path / "vqa", "--task", "vqa", "--text_tokenizer", spm, "--validation", other)
    first, *_ = read(tmp_path / "vqa/vqa.train.jsonl")
    names = (tmp_path / "vqa/names.txt").read_text().split()
    assert {names[label] for label in first["labels"]} == {"red", "blue"} and first["scores"] == [1.0, 1.0]
    assert [line["answers"] for line in read(tmp_path / "vqa/vqa.validation.jsonl")] == [["red"], ["red"], ["green"]]
    run("table", train, tmp_path / "captions", "--task", "captioning", "--text_tokenizer", spm, "--validation", train)
    assert len(read(tmp_path / "captions/captioning.train.jsonl")) == ROWS + 2
    of_first = read(tmp_path / "captions/captioning.validation.jsonl")[0]
    assert of_first["captions"] == ["one thing", "another"] * 2 and of_first["text_segment"] is None
    numbers = write_table(tmp_path / "n.csv", [row | {"class": n / 4} for n, row in enumerate(rows)])
    run("table", numbers, tmp_path / "n", "--task", "text_classification", "--text_tokenizer", spm, "--held-out", 0.4)
    assert (tmp_path / "n/names.txt").read_text() == "number\n"
    labels = {line["label"] for line in read(tmp_path / "n/text_classification.train.jsonl")}
    assert labels < {n / 4 for n in range(ROWS)}
    (tmp_path / "known.txt").write_text("blue\nred\ngreen\nblack\n")
    german = write_table(tmp_path / "g.tsv", [{"bild": row["image"], "farbe": row["answer"]} for row in rows])
    run("table", german, tmp_path / "g", "--task", "imagenet", "--columns", "image=bild", "class=farbe",
        "--names", tmp_path / "known.txt", "--held-out", 0.4, "--images", tmp_path)  # fmt: skip
    assert {line["label"] for line in read(tmp_path / "g/imagenet.train.jsonl")} <= {0, 1, 2}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("vqa", {"answer": ""}, r"table\.csv, line 4: 'answer' is empty"),
        ("vqa", {"image": "p/none.png"}, r"table\.csv, line 4: there is no picture .*p/none\.png"),
        ("vqa", {"image": "../x.png"}, r"table\.csv, line 4: the name '\.\./x\.png' leads out of .*: --images names"),
        ("nlvr2", {"class": "perhaps"}, r"table\.csv, line 4: 'perhaps' is neither true nor false"),
        ("imagenet", {"class": ".DS_Store"}, r"table\.csv, line 4: '\.DS_Store' is named like a hidden file"),
        ("captioning", {"caption": "   "}, r"table\.csv, line 4: 'caption' is empty"),
    ],
)
def test_mistakes_in_a_table_are_named_by_file_and_line(
    task: str, change: dict[str, str], message: str, tmp_path: Path, spm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = own_rows(tmp_path)
    rows[2] |= change
    table = write_table(tmp_path / "table.csv", rows)
    arguments = ("--task", task, "--text_tokenizer", spm, "--validation", table)
    assert re.search(message, refused(capsys, "table", table, tmp_path / "out", *arguments))


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, spm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = own_rows(tmp_path)
    table = write_table(tmp_path / "table.csv", rows)
    alike = write_table(tmp_path / "alike.csv", [row | {"class": "one"} for row in rows])
    nameless = write_table(tmp_path / "nameless.csv", [{"image": row["image"]} for row in rows])
    short = tmp_path / "short.csv"
    short.write_text("image,class\np/0.png\n")
    (tmp_path / "known.txt").write_text("black\nwhite\n")
    for source, arguments, message in (
        (nameless, ["--task", "imagenet"], r"nameless\.csv, line 2: imagenet needs 'class', and there is no 'class' "
         r"but 'image': name its column by --columns class=COLUMN"),
        (alike, ["--task", "imagenet", "--validation", alike], r"alike\.csv, line 2: all rows are 'one', and th"),
        (short, ["--task", "imagenet"], r"short\.csv, line 2: too few columns, 1 for the header's 2"),
        (table, ["--task", "vqa"], "--text_tokenizer is not given, which vqa needs"),
        (table, ["--task", "imagenet", "--columns", "hue=class"], "--columns hue=class: imagenet has no 'hue'"),
        (table, ["--task", "imagenet", "--columns", "class"], "--columns class: it is FIELD=COLUMN"),
        (table, ["--task", "imagenet", "--held-out", 0.4, "--names", tmp_path / "known.txt"],
         r"line \d+: 'true' is none of what is lear"),
        (table, ["--task", "imagenet", "--held-out", 0.0001], "has too few rows for a share of 0.0001: none is left"),
        (tmp_path / "none.csv", ["--task", "imagenet"], r"there is no file .*none\.csv"),
    ):  # fmt: skip
        assert re.search(message, refused(capsys, "table", source, tmp_path / "out", *arguments)), message
    assert not (tmp_path / "out").exists()
