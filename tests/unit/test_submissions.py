"""Files of predictions hold what each benchmark's evaluation reads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.nlvr2 import NLVR2
from beit3_dist.tasks.parts.submissions import write_classes, write_results
from beit3_dist.tasks.retrieval import write_retrieval


def test_answers_and_captions_are_lists_with_integer_ids(tmp_path: Path) -> None:
    answers = write_results(tmp_path / "a.json", ["7", "3"], "question_id", ["yes", "café"], "answer")
    assert json.loads(answers.read_text()) == [
        {"question_id": 7, "answer": "yes"},
        {"question_id": 3, "answer": "café"},
    ]


def test_two_captions_of_a_picture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one image_id has two of caption"):
        write_results(tmp_path / "a.json", ["7", "7"], "image_id", ["a cat", "a dog"], "caption")
    assert not list(tmp_path.iterdir())


def test_nlvr2_has_true_or_false_on_each_line(tmp_path: Path) -> None:
    examples = [Example(n, (), (5,), 0, name) for n, name in enumerate(("dev-0-0-0", "dev-0-1-0"))]
    task: Any = SimpleNamespace(results=partial(NLVR2.results, None))
    NLVR2.write_predictions(task, tmp_path, torch.tensor([1, 0]), examples)
    assert (tmp_path / "nlvr2_predictions.csv").read_text() == "dev-0-0-0,True\ndev-0-1-0,False\n"


def test_classes_are_a_table(tmp_path: Path) -> None:
    assert write_classes(tmp_path, ["x,y.png", "z.png"], [4, 0]).read_text() == 'name,class\n"x,y.png",4\nz.png,0\n'


def test_retrieval_ranks_each_picture_once(tmp_path: Path) -> None:
    # Two captions of picture 5, one of picture 9; vectors of the pictures are given with each caption.
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.0, 1.0]])
    records = [json.loads(line) for line in write_retrieval(tmp_path, ["5", "5", "9"], images, texts).open()]
    assert records == [
        {"text": 0, "images": ["5", "9"], "scores": [0.9, 0.1]},
        {"text": 1, "images": ["9", "5"], "scores": [0.8, 0.2]},
        {"text": 2, "images": ["9", "5"], "scores": [1.0, 0.0]},
        {"image": "5", "texts": [0, 1, 2], "scores": [0.9, 0.2, 0.0]},
        {"image": "9", "texts": [2, 1, 0], "scores": [1.0, 0.8, 0.1]},
    ]
