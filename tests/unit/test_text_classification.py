"""GLUE's forms: its files as indexes, pairs of sentences as one text, its metrics, and numbers in place of classes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from beit3_dist.inference import Model
from beit3_dist.tasks.base import TaskInputs
from beit3_dist.tasks.data.batches import padded_words
from beit3_dist.tasks.data.examples import Example, read_index
from beit3_dist.tasks.parts.metrics import agreement, correlations
from beit3_dist.tasks.text_classification import Cut, TextClassification, pair_words
from tests.unit.test_decoding import ARCHITECTURES
from tests.unit.test_inference import SENTENCES, save, tokenizer  # noqa: F401 (a fixture)
from tools import build_index

FOLDERS = {
    "RTE": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tit rains\tit is wet\tentailment\n"
        "1\ta \"b\tc\tnot_entailment\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tone\ttwo\tnot_entailment\n",
        "test.tsv": "index\tsentence1\tsentence2\n7\tone\ttwo\n",
    },
    "CoLA": {
        "train.tsv": "gj04\t1\t\tthe dog runs\ngj04\t0\t*\tdog the runs\nbroken\n",
        "test.tsv": "index\tsentence\n0\tthe dog\n",
    },
    "STS-B": {
        "train.tsv": "index\tsentence1\tsentence2\tscore\n0\ta dog\ta cat\t2.400\n1\ta dog\ta hound\t5.000\n",
        "dev.jsonl": json.dumps({"sentence1": "a", "sentence2": "b", "label": 3, "idx": 4}) + "\n",
    },
}  # fmt: skip


def written(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def build(tmp_path: Path, name: str, spm: Path) -> Path:
    """The folder of a task's indexes."""
    source, out = written(tmp_path / name, FOLDERS[name]), tmp_path / f"{name}-indexes"
    build_index.main(["glue", str(source), str(out), "--text_tokenizer", str(spm)])
    return out


def test_the_files_of_glue_are_indexes(
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    def examples(folder: Path, side: str, classes: int, train: bool = False) -> list[Example]:
        return list(read_index(folder / f"{side}.jsonl", TextClassification, Path(), train=train, classes=classes))

    pairs = build(tmp_path, "RTE", tokenizer)
    assert (pairs / "classes.txt").read_text().split() == ["entailment", "not_entailment"]
    first, second = examples(pairs, "train", 2, train=True)
    assert (first.label, second.label, first.name) == (0, 1, "0")
    assert first.words is not None and first.words.count(2) == 1  # </s> between the sentences
    (unknown,) = examples(pairs, "test", 2)
    assert unknown.label is None and unknown.name == "7"
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: no integer in the field 'label'"):
        examples(pairs, "test", 2, train=True)

    alone = build(tmp_path, "CoLA", tokenizer)
    assert (alone / "classes.txt").read_text().split() == ["0", "1"]
    assert [example.label for example in examples(alone, "train", 2)] == [1, 0]
    assert "left out 1 lines: without the 4 fields of train.tsv; the first is" in capsys.readouterr().err

    numbers = build(tmp_path, "STS-B", tokenizer)
    assert (numbers / "classes.txt").read_text().split() == ["number"]
    assert [example.label for example in examples(numbers, "train", 1)] == [2.4, 5.0]
    assert examples(numbers, "dev", 1)[0].label == 3.0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"dev.tsv": "sentence\tlabel\na\t1\n"}, "has no train.tsv and no train.jsonl"),
        ({"train.tsv": "sentence\tlabel\n \t1\n"}, "train.tsv, line 2: an empty sentence"),
        ({"train.tsv": "words\tlabel\na\t1\n"}, "train.tsv, line 2: no text of GLUE's"),
        (
            {"train.tsv": "sentence\tlabel\na\tyes\n", "dev.tsv": "sentence\tlabel\na\tyes\nb\tno\n"},
            "dev.tsv, line 3: the class 'no' is none of train's: yes",
        ),
        (
            {"train.tsv": "sentence\tlabel\na\t1.5\nb\tno\n"},
            "train.tsv, line 3: the label 'no' is no number, as others are",
        ),
    ],
)
def test_what_is_not_glues_is_told_by_file_and_line(
    files: dict[str, str],
    message: str,
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = written(tmp_path / "task", files)
    with pytest.raises(SystemExit) as ended:
        build_index.main(["glue", str(source), str(tmp_path / "out"), "--text_tokenizer", str(tokenizer)])
    assert ended.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_of_a_pair_both_sentences_stay() -> None:
    assert pair_words([5, 6], [7, 8], 9) == [5, 6, 2, 7, 8]
    assert pair_words([5] * 9, [7, 8], 9) == [5, 5, 5, 5, 2, 7, 8]
    assert pair_words([5, 6], [7] * 9, 9) == [5, 6, 2, 7, 7, 7, 7]
    assert pair_words([5] * 9, [7] * 9, 9) == [5, 5, 5, 2, 7, 7, 7]
    examples = [Example(0, (), (*[5] * 9, 2, 7), 0, "0"), Example(1, (), (5, 6), 1, "1")]
    assert [example.words for example in Cut(examples, 8)] == [(5, 5, 5, 5, 2, 7), (5, 6)]  # type: ignore[arg-type]


def test_metrics_by_their_definitions() -> None:
    draw = np.random.default_rng(0)
    for classes in (2, 3):
        a, b = draw.integers(0, classes, (2, 50))
        found = agreement(torch.tensor(a), torch.tensor(b), classes)
        assert found["accuracy"] == pytest.approx((a == b).mean())
        # Of indicator columns: the correlation over all of them, each about its own mean (Gorodkin 2004).
        x, y = (np.eye(classes)[column] - np.eye(classes)[column].mean(0) for column in (a, b))
        assert found["matthews"] == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
        assert ("f1" in found) == (classes == 2)
    assert agreement(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0]), 2)["f1"] == pytest.approx(2 / 3)
    assert agreement(torch.tensor([0, 0]), torch.tensor([0, 0]), 2) == {"accuracy": 1.0, "matthews": 0.0, "f1": 0.0}
    x, y = torch.tensor(draw.normal(size=(2, 30)))
    assert correlations(x, y)["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlations(x, x.exp())["spearman"] == pytest.approx(1.0)
    ties = correlations(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 2, 3, 4]))
    assert ties["spearman"] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    assert correlations(torch.ones(3), torch.arange(3.0)) == {"pearson": 0.0, "spearman": 0.0}


def test_a_number_is_learnt_by_its_square_and_scored_by_correlations() -> None:
    task = TextClassification(SimpleNamespace(label_smoothing=0.0), None, ["number"])  # type: ignore[arg-type]
    model = TextClassification.network(ARCHITECTURES["paper"], 1)
    words, padding = padded_words([(5, 2, 6), (7, 8, 2, 9)], 10)
    examples = [Example(0, (), (5,), 2.5, "0"), Example(1, (), (5,), -1.0, "1")]
    none = torch.zeros(2, dtype=torch.int64)
    labels = task.labels(examples, 1)
    inputs = TaskInputs(torch.empty(2, 0, 3, 16, 16), words, padding, labels, none)
    told = task.predict(model, inputs)
    torch.testing.assert_close(task.losses(model, inputs)[0], (told[:, 0] - torch.tensor([2.5, -1.0])).square())
    assert task.score(torch.tensor([[1.0], [0.0]]), examples) == pytest.approx({"pearson": 1.0, "spearman": 1.0})
    assert task.results(torch.tensor([[1.5]])) == [1.5]


def test_a_model_classifies_pairs(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    model = Model.load(save(tmp_path / "pairs", "text_classification", tokenizer), device="cpu")
    usual = model.network.task_head(model.network.encode(None, *model._words([(one, one) for one in SENTENCES]))).mean(
        0
    )
    head: Any = model.network.task_head
    head.head[3].bias -= usual
    seconds = SENTENCES[1:] + SENTENCES[:1]
    told = model.classify_pairs(SENTENCES, seconds)
    assert told == [model.classify_pairs([a], [b])[0] for a, b in zip(SENTENCES, seconds, strict=True)]
    assert len({*told}) > 1 and model.classify(SENTENCES) != told
    with pytest.raises(ValueError, match="6 first and 1 second texts"):
        model.classify_pairs(SENTENCES, SENTENCES[:1])
