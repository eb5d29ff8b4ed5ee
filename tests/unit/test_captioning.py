"""What a caption's words are masked by, and which of them count."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit3_dist.config import ModelConfig
from beit3_dist.tasks.base import TaskInputs, told_places
from beit3_dist.tasks.captioning import Captioning, weights_of_the_better

BOS, PAD, EOS, MASK = 0, 1, 2, 301
TOKENIZER: Any = SimpleNamespace(bos=BOS, pad=PAD, mask=MASK, words=range(4, 300))


def task(**settings: Any) -> Captioning:
    model = SimpleNamespace(decoder_layers=0)
    config: Any = SimpleNamespace(caption_mask_ratio=0.7, model=model, **settings)
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


MODEL = ModelConfig(layers=1, width=32, heads=2, ffn_width=48, patch_size=8, image_size=16, vocab_size=310,
                    visual_vocab_size=8, vl_expert_layers=1, max_text_length=16)  # fmt: skip


def test_late_in_training_the_worst_words_do_not_count() -> None:
    """The mean is that of the least 80 % of the losses, of 28 words 22; before, it is that of all."""
    captioning = task(
        label_smoothing=0.1, drop_worst_ratio=0.2, drop_worst_after=10, data=SimpleNamespace(text_length=12)
    )
    words = torch.randint(4, 300, (4, 10), generator=torch.Generator().manual_seed(0))
    words[:, 0], words[:, 9] = BOS, EOS
    shown, targets = captioning.mask(words, words == PAD, list(range(4)))
    assert targets is not None
    inputs = TaskInputs(
        torch.randn(4, 1, 3, 16, 16), shown, words == PAD, torch.arange(4), torch.arange(4), targets,
        told_places(targets),
    )  # fmt: skip
    model = Captioning.network(MODEL).eval()
    with torch.no_grad():
        early, late = (captioning.losses(model, replace(inputs, step=step)) for step in (10, 11))
    assert early.shape == (2, 28) and torch.equal(early[1], late[1])
    torch.testing.assert_close(late[0].mean(), early[0].sort().values[:22].mean())
    assert (late[0] == 0).sum() == 6


def test_few_words_and_equal_ones() -> None:
    one = weights_of_the_better(torch.tensor([3.0]), 0.2, room=4)
    assert one.tolist() == [1.0]
    equal = weights_of_the_better(torch.tensor([2.0, 1.0, 2.0, 2.0, 5.0]), 0.5, room=5)  # two of five, and their equals
    torch.testing.assert_close(equal, torch.tensor([1.25, 1.25, 1.25, 1.25, 0.0]))


def test_a_loss_that_is_no_number_is_not_hidden() -> None:
    losses = torch.tensor([1.0, torch.nan, 2.0, 3.0, 4.0])
    assert (losses * weights_of_the_better(losses, 0.4, room=9)).isnan().any()
