"""What a caption's words are masked by, and which of them count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit3_dist.tasks.captioning import Captioning

BOS, PAD, EOS, MASK = 0, 1, 2, 301
TOKENIZER: Any = SimpleNamespace(bos=BOS, pad=PAD, mask=MASK, words=range(4, 300))


def task(**settings: Any) -> Captioning:
    config: Any = SimpleNamespace(caption_mask_ratio=0.7, **settings)
    return Captioning(config, TOKENIZER)


@pytest.mark.parametrize(("length", "masked"), [(3, 2), (8, 6), (10, 7), (12, 8), (14, 10), (16, 11)])
def test_as_many_words_are_masked_as_in_the_released_code(length: int, masked: int) -> None:
    """`length`: words with <s> and </s>, both counted; <s> is never masked, so that there is a last one to count."""
    rows = [[BOS, *[50] * (length - 2), EOS, PAD, PAD]] * 20
    words = torch.tensor(rows)
    _, targets = task().mask(words, words == PAD, list(range(20)))
    assert targets is not None
    assert ((targets >= 0).sum(1) == masked).all()
    assert not (targets[:, 0] >= 0).any() and not (targets[:, length:] >= 0).any()
    assert (targets[:, length - 1] == EOS).any()  # </s> is one of them
