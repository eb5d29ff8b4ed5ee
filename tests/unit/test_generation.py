"""Beam search against greedy search, a plain search and all captions there are."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from beit3_dist.model import BEiT3
from beit3_dist.tasks.parts.generation import generate
from tests.unit.test_decoding import ARCHITECTURES, MASK, model_of, pictures, plain_logits


@dataclass(frozen=True)
class Words:
    bos: int = 0
    eos: int = 2
    mask: int = MASK
    words: range = range(4, 50)


FEW = replace(Words(), words=range(4, 7))
LONGEST = 6


def log_probabilities(model: BEiT3, image: Tensor, words: list[int], vocabulary: Words) -> dict[int, float]:
    """log p of everything that may follow the words, without any cache."""
    logits = plain_logits(model, image[None], torch.tensor([[vocabulary.bos, *words]]))[0]
    allowed = [vocabulary.eos, *vocabulary.words]
    return dict(zip(allowed, logits[allowed].log_softmax(0).tolist(), strict=True))


def plain_search(model: BEiT3, image: Tensor, vocabulary: Words, beams: int, penalty: float, longest: int) -> list[int]:
    """Beam search over lists, without a cache, to the greatest length whatever is finished before."""
    beam: list[tuple[float, list[int]]] = [(0.0, [])]
    finished = []
    for length in range(1, longest + 1):
        candidates = [
            (total + p, words, word)
            for total, words in beam
            for word, p in log_probabilities(model, image, words, vocabulary).items()
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        beam = []
        for total, words, word in candidates:  # best first, until as many go on as there are beams
            if word == vocabulary.eos:
                finished.append((total / (length + 1) ** penalty, words))
            else:
                beam.append((total, [*words, word]))
            if len(beam) == beams:
                break
    finished += [(total / (longest + 1) ** penalty, words) for total, words in beam]
    return max(finished)[1]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> BEiT3:
    """</s> is likely enough that captions have different lengths."""
    model = model_of(request.param)
    model.text_head.bias[Words.eos] += 1.5
    return model


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_against_a_plain_search(model: BEiT3, beams: int, penalty: float) -> None:
    images = pictures(5)
    found = generate(model, images, Words(), beams=beams, length_penalty=penalty, max_words=LONGEST)
    expected = [plain_search(model, image, Words(), beams, penalty, LONGEST) for image in images]
    assert found == expected
    if penalty < 1:  # beyond, the longest are the best
        assert len({len(words) for words in found}) > 1, "all captions have the same length"


def test_one_beam_is_greedy(model: BEiT3) -> None:
    """Where longer captions are not preferred, the first that ends is the best."""
    expected = []
    for image in pictures(6):
        words: list[int] = []
        while len(words) < LONGEST:
            following = log_probabilities(model, image, words, Words())
            word = max(following, key=lambda w: following[w])
            if word == Words.eos:
                break
            words.append(word)
        expected.append(words)
    assert generate(model, pictures(6), Words(), beams=1, length_penalty=0.0, max_words=LONGEST) == expected


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_enough_beams_find_the_best_of_all_captions(model: BEiT3, penalty: float) -> None:
    longest, image = 3, pictures(1)
    scores = {}
    for length in range(longest + 1):
        for caption in itertools.product(FEW.words, repeat=length):
            written = [*caption, FEW.eos] if length < longest else [*caption]
            total = 0.0
            for place, word in enumerate(written):
                total += log_probabilities(model, image[0], written[:place], FEW)[word]
            scores[caption] = total / (len(written) + 1) ** penalty
    best = max(scores, key=lambda caption: scores[caption])
    assert len(scores) == 1 + 3 + 9 + 27
    beams = 64  # more than there are candidates at any step
    assert generate(model, image, FEW, beams=beams, length_penalty=penalty, max_words=longest) == [list(best)]


def test_company_does_not_matter(model: BEiT3) -> None:
    images = pictures(5)
    together = generate(model, images, Words(), max_words=LONGEST)
    assert together == [generate(model, image[None], Words(), max_words=LONGEST)[0] for image in images]


def test_going_on_after_the_end_changes_nothing(model: BEiT3) -> None:
    """Ranks whose pictures are done keep running with the others."""
    calls: list[bool] = []

    def never(done: bool) -> bool:
        calls.append(done)
        return False

    found = generate(model, pictures(4), Words(), max_words=LONGEST, agree=never)
    assert found == generate(model, pictures(4), Words(), max_words=LONGEST)
    assert len(calls) == LONGEST and calls[-1]


def test_only_words_are_written(model: BEiT3) -> None:
    model.text_head.bias[[0, 1, 3, 55, MASK]] += 100
    found = generate(model, pictures(4), Words(), max_words=LONGEST)
    model.text_head.bias[[0, 1, 3, 55, MASK]] -= 100
    assert all(word in Words.words for words in found for word in words)


def test_sums_stay_finite() -> None:
    """Logits far apart: probabilities underflow, their logarithms do not."""
    model = model_of("paper")
    model.text_head.weight *= 1e4
    found = generate(model, pictures(3), Words(), beams=4, max_words=LONGEST)
    assert found == [plain_search(model, image, Words(), 4, 0.6, LONGEST) for image in pictures(3)]
    model.text_head.bias[7] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        generate(model, pictures(3), Words(), max_words=LONGEST)


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: number} for name in ("beams", "max_words") for number in (0, 1.5, "3")),
        *({"length_penalty": number} for number in (-1.0, math.nan, math.inf, "0.6")),
    ],
    ids=str,
)
def test_numbers_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(model_of("paper"), pictures(1), Words(), **{"max_words": LONGEST, **wrong})
