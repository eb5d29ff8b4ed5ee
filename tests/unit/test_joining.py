"""Parts of a micro-batch that several loader processes have made, put together."""

from __future__ import annotations

import torch

from beit3_dist.data.batch import MicroBatch, Samples
from beit3_dist.data.joining import joined

PAD = 1


def part(positions: list[int], width: int) -> MicroBatch:
    """Texts whose words, and what is drawn for them, tell their positions."""
    place = torch.tensor(positions)
    text = place[:, None].expand(-1, width).contiguous() + 10
    drawn = {"text_mask": text > 10, "text_weights": text / 2, "text_others": text + 100, "score": place * 2}
    texts = Samples(ids=place, positions=place, text=text, lengths=torch.full_like(place, width),
                    annotations={"of_a_plugin": drawn, "of_nothing": {}})  # fmt: skip
    return MicroBatch({"texts": texts})


def test_what_stands_at_tokens_is_padded() -> None:
    """Ids with <pad>, all else with 0; the samples in the order of their places, and no stream that nobody has."""
    whole = joined([part([2, 0], 2), part([1], 3), part([], 0)], PAD)
    assert list(whole.streams) == ["texts"] and whole.readers.shape == (0, 6)
    texts = whole.streams["texts"]
    assert texts.positions.tolist() == texts.ids.tolist() == [0, 1, 2] and texts.lengths.tolist() == [2, 3, 2]
    assert texts.text.tolist() == [[10, 10, PAD], [11, 11, 11], [12, 12, PAD]] and texts.images is None
    drawn = texts.annotations["of_a_plugin"]
    assert drawn["text_mask"].tolist() == [[False] * 3, [True] * 3, [True, True, False]]
    assert drawn["text_weights"].tolist() == [[5, 5, 0], [5.5, 5.5, 5.5], [6, 6, 0]]
    assert drawn["text_others"].tolist() == [[110, 110, PAD], [111, 111, 111], [112, 112, PAD]]
    assert drawn["score"].tolist() == [0, 2, 4] and texts.annotations["of_nothing"] == {}
