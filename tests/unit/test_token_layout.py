"""Where the tokens of a mixed micro-batch lie, against plain loops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.varlen_attention.definition import plain_varlen_attention
from beit3_dist.model.attention import attend
from beit3_dist.model.token_layout import Group, TokenLayout, group, to_device
from beit3_dist.parallel.tensor import share_tokens
from tests.micro_batches import fused_and_alone

CPU = torch.device("cpu")


def padding(lengths: list[int], longest: int) -> torch.Tensor:
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]


CAPTIONS, TEXTS = [2, 4], [3, 1, 5]
MIXED = TokenLayout((group(3, 5, None), group(2, 5, padding(CAPTIONS, 4), 4), group(3, 0, padding(TEXTS, 6), 6)))
FULL = TokenLayout((group(1, 3, None), group(2, 3, None, 4), group(2, 0, padding([2, 2], 2), 2)))


def test_segments_by_hand() -> None:
    assert MIXED.segments == (15, 10, 6, 9)
    assert FULL.segments == (3, 6, 8, 4)
    assert TokenLayout(FULL.groups[2:]).segments == (0, 0, 0, 4)


def test_slices_of_the_experts_by_hand() -> None:
    assert MIXED.sizes(("shared",)) == [40]
    assert MIXED.sizes(("vision", "language")) == [25, 15]
    assert MIXED.sizes(("vision", "vl", "language")) == [15, 16, 9]
    with pytest.raises(AssertionError, match="language"):
        MIXED.sizes(("language", "vision"))


def plain_tokens(layout: TokenLayout, captions: list[int], texts: list[int]) -> list[tuple[int, int]]:
    """(sample, position in its modality) of each token, by the picture in layout.py."""
    image, pair, text = layout.groups
    tokens = [(s, p) for s in range(image.samples) for p in range(image.patches)]
    tokens += [(image.samples + s, p) for s in range(pair.samples) for p in range(pair.patches)]
    tokens += [(image.samples + s, p) for s, length in enumerate(captions) for p in range(length)]
    tokens += [(image.samples + pair.samples + s, p) for s, length in enumerate(texts) for p in range(length)]
    assert len(tokens) == sum(layout.segments) and text.samples == len(texts)
    return tokens


@pytest.mark.parametrize(
    ("layout", "captions", "texts"), [(MIXED, CAPTIONS, TEXTS), (FULL, [4, 4], [2, 2])], ids=["padded", "full"]
)
def test_samples_and_positions_against_a_loop(layout: TokenLayout, captions: list[int], texts: list[int]) -> None:
    tokens = plain_tokens(layout, captions, texts)
    assert layout.token_samples(CPU).tolist() == [sample for sample, _ in tokens]
    words = tokens[sum(layout.segments[:2]) :]
    assert layout.word_positions(CPU).tolist() == [position for _, position in words]


def test_without_padding_there_is_neither_index_nor_mask() -> None:
    assert FULL.groups[2] == Group(2, 0, 2) and FULL.groups[0] == Group(1, 3, 0)


def test_padded_words_are_no_keys() -> None:
    pairs = MIXED.groups[1]
    mask = pairs.mask
    assert mask is not None and mask.shape == (2, 1, 1, 5 + 4)  # [B, H, queries, keys]
    assert mask[0, 0, 0].tolist() == [True] * (5 + 2) + [False] * 2
    assert mask[1].all()
    assert pairs.index is not None and pairs.index.tolist() == [0, 1, 4, 5, 6, 7]


def test_attention_mask_and_padding_both_hold() -> None:
    causal = torch.ones(6, 6).tril().bool()
    mask = group(2, 2, padding([2, 4], 4), 4, attention_mask=causal).mask
    assert mask is not None and mask.shape == (2, 1, 6, 6)
    for sample, length in enumerate((2, 4)):
        for query in range(6):
            for key in range(6):
                assert mask[sample, 0, query, key] == (key <= query and key < 2 + length)


def test_moving_moves_all_and_keeps_the_rest() -> None:
    moved = MIXED.to(torch.device("meta"))
    assert moved.segments == MIXED.segments
    for ours, theirs in zip(moved.groups, MIXED.groups, strict=True):
        assert (ours.samples, ours.patches, ours.words) == (theirs.samples, theirs.patches, theirs.words)
        for tensor, of in ((ours.index, theirs.index), (ours.mask, theirs.mask)):
            assert (tensor is None) == (of is None)
            if tensor is not None and of is not None:
                assert tensor.is_meta and tensor.shape == of.shape and tensor.dtype == of.dtype
    again = MIXED.to(CPU)
    for ours, theirs in zip(again.groups[1:], MIXED.groups[1:], strict=True):
        assert ours.index is not None and ours.mask is not None
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.mask, theirs.mask)


def test_attention_sample_by_sample_is_that_of_the_groups() -> None:
    """Groups of one kind follow one another, and the same samples are fused and alone."""
    layout = fused_and_alone(ModelConfig(layers=1, vl_expert_layers=0, patch_size=8, image_size=16))[0].layout
    packing = layout.packing(CPU)
    assert packing is not None and packing.cumulative[-1] == sum(layout.segments)
    assert len(packing.cumulative) == 1 + sum(group.samples for group in layout.groups)
    qkv = torch.randn(sum(layout.segments), 3, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (expected,) = attend(*([part] for part in qkv.unbind(1)), layout)
    mixed = plain_varlen_attention(qkv[packing.order], packing.cumulative, packing.longest)
    torch.testing.assert_close(mixed[packing.place], expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_ranks_hold_all_tokens_of_each_segment(ranks: int) -> None:
    layout = fused_and_alone(ModelConfig(layers=1, vl_expert_layers=0, patch_size=8, image_size=16))[0].layout
    shares = [share_tokens(layout, ranks, rank, CPU) for rank in range(ranks)]
    whole, parts = shares[0].whole, shares[0].parts
    assert whole is not None and whole.rows is not None and whole.groups == layout.groups
    assert all(share.segments == parts and torch.equal(share.whole.rows, whole.rows) for share in shares)
    tokens = torch.full((ranks * whole.share,), -1)
    tokens[whole.rows] = torch.arange(sum(layout.segments))
    of_ranks = [rows.split(parts) for rows in tokens.view(ranks, whole.share)]  # what each has of each segment
    for segment, found in zip(
        torch.arange(sum(layout.segments)).split(layout.segments), zip(*of_ranks, strict=True), strict=True
    ):
        together = torch.cat(found)
        assert together[together >= 0].tolist() == segment.tolist()
    samples = torch.cat([share.token_samples(CPU) for share in shares])
    assert torch.equal(samples[whole.rows], layout.token_samples(CPU))


@pytest.mark.parametrize(("source", "target", "pinned"), [("cpu", "cuda", 1), ("cuda", "cuda", 0), ("cpu", "cpu", 0)])
def test_only_what_goes_to_a_gpu_is_pinned(source: str, target: str, pinned: int) -> None:
    calls: list[str] = []

    class Tensor(SimpleNamespace):
        def pin_memory(self) -> Tensor:
            calls.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool) -> tuple[torch.device, bool]:
            return device, non_blocking

    assert to_device(Tensor(device=torch.device(source)), torch.device(target)) == (torch.device(target), True)
    assert calls == ["pinned"] * pinned
