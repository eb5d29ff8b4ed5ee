"""Files of predictions hold what each benchmark's evaluation reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from beit3_dist.tasks.captioning import write_captions
from beit3_dist.tasks.nlvr2 import write_nlvr2
from beit3_dist.tasks.parts.submissions import write_classes
from beit3_dist.tasks.retrieval import write_retrieval
from beit3_dist.tasks.vqa import write_vqa


def test_answers_and_captions_are_lists_with_integer_ids(tmp_path: Path) -> None:
    answers = write_vqa(tmp_path, ["7", "3"], ["yes", "café"])
    assert json.loads(answers.read_text()) == [
        {"question_id": 7, "answer": "yes"},
        {"question_id": 3, "answer": "café"},
    ]
    captions = write_captions(tmp_path, ["7"], ["a cat"])
    assert json.loads(captions.read_text()) == [{"image_id": 7, "caption": "a cat"}]


def test_two_captions_of_a_picture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a picture has two captions"):
        write_captions(tmp_path, ["7", "7"], ["a cat", "a dog"])
    assert not list(tmp_path.iterdir())


def test_nlvr2_has_true_or_false_on_each_line(tmp_path: Path) -> None:
    path = write_nlvr2(tmp_path, ["dev-0-0-0", "dev-0-1-0"], [True, False])
    assert path.read_text() == "dev-0-0-0,True\ndev-0-1-0,False\n"


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
