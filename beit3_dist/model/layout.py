"""Where the tokens of a mixed micro-batch lie: one matrix, each expert's tokens one contiguous slice.

    [ image-only patches | pair patches | pair words | text-only words ]
      \\______ vision expert _________/   \\____ language expert ____/
                          \\__ VL expert, top layers __/

'Patches' means CLS + patches. Words are packed: padding exists only inside attention, which runs per group.
Shape letters: B samples, N tokens of a sample, T tokens of the micro-batch, H heads, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From the host to a GPU by way of page-locked memory: only then the host goes on, and
    prepares a micro-batch while the one before is computed."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Group:
    """Samples of one kind: their patches (if any) are followed by their words (if any) in one joint attention."""

    samples: int
    """Samples B."""
    patches: int
    """CLS + patches of a sample; 0 for texts."""
    words: int
    """Padded length of a sample's text; 0 for images."""
    index: Tensor | None = None
    """int64 [real words]: rows of the padded words [B * words] that are real, ascending; None: no padding."""
    mask: Tensor | None = None
    """bool, broadcastable to [B, H, N, N], True where a query may attend to a key; None: everywhere."""
    whole: bool = True
    """Whether every token may attend to every other one of its sample; else `mask` says more than what is padding."""

    @property
    def real_words(self) -> int:
        """Words that are not padding."""
        return self.samples * self.words if self.index is None else len(self.index)

    def positions(self, device: torch.device) -> Tensor:
        """Position of each real word in its text, int64 [real words]."""
        rows = torch.arange(self.samples * self.words, device=device) if self.index is None else self.index
        return rows % max(self.words, 1)

    def word_samples(self, device: torch.device) -> Tensor:
        """Sample of each real word, int64 [real words]."""
        rows = torch.arange(self.samples * self.words, device=device) if self.index is None else self.index
        return rows // max(self.words, 1)

    def to(self, device: torch.device) -> Group:
        """The same group with its tensors on `device`."""
        move = lambda t: None if t is None else to_device(t, device)  # noqa: E731
        return Group(self.samples, self.patches, self.words, move(self.index), move(self.mask), self.whole)


def group(
    samples: int, patches: int, padding: Tensor | None, words: int = 0, attention_mask: Tensor | None = None
) -> Group:
    """The group of `samples` samples.

    `padding`: bool [B, words], True where the text is padding; None where nothing is. `attention_mask`: bool [N, N] or
    [B, N, N], True where a query may attend to a key. Looks at the values of `padding`, so call it on the host.
    """
    mask, whole = None, attention_mask is None
    if attention_mask is not None:
        mask = attention_mask.bool().reshape(-1, 1, *attention_mask.shape[-2:])
    if padding is None or not bool(padding.any()):
        return Group(samples, patches, words, None, mask, whole)
    real = ~padding.bool()
    keys = torch.cat([real.new_ones(samples, patches), real], dim=1)[:, None, None, :]
    index = real.flatten().nonzero().squeeze(1)
    return Group(samples, patches, words, index, keys if mask is None else mask & keys, whole)


@dataclass(frozen=True)
class Packing:
    """The tokens of a micro-batch sample by sample, as attention over samples of different lengths takes them:

    [ images one by one | pairs one by one: CLS + patches, then words | texts one by one ]
    """

    place: Tensor
    """int64 [T]: row in this order of each token of the layout's order."""
    order: Tensor
    """int64 [T]: the reverse, the layout's row of each token of this order."""
    cumulative: Tensor
    """int32 [S + 1]: first token of each sample, and T."""
    longest: int
    """Tokens of the longest sample, or more: padding counts."""


class Segments:
    """Tokens of one micro-batch in its four segments: all that is read of a layout outside attention's core."""

    @property
    def segments(self) -> tuple[int, int, int, int]:
        """Tokens of the four segments, in their order."""
        raise NotImplementedError

    def sizes(self, experts: tuple[str, ...]) -> list[int]:
        """Tokens of each expert's slice; `experts` in the order of their slices."""
        image_patches, pair_patches, pair_words, text_words = self.segments
        match experts:
            case ("shared",):
                return [image_patches + pair_patches + pair_words + text_words]
            case ("vision", "language"):
                return [image_patches + pair_patches, pair_words + text_words]
            case ("vision", "vl", "language"):
                return [image_patches, pair_patches + pair_words, text_words]
        raise AssertionError(f"no slices are defined for the experts {experts}")


NO_SAMPLES = Group(0, 0, 0)


@dataclass(frozen=True)
class Layout(Segments):
    """The groups of a micro-batch and where their tokens lie."""

    images: Group = NO_SAMPLES
    """Image-only samples."""
    pairs: Group = NO_SAMPLES
    """Image-text pairs."""
    texts: Group = NO_SAMPLES
    """Text-only samples."""

    @property
    def segments(self) -> tuple[int, int, int, int]:
        return (
            self.images.samples * self.images.patches,
            self.pairs.samples * self.pairs.patches,
            self.pairs.real_words,
            self.texts.real_words,
        )

    def token_samples(self, device: torch.device) -> Tensor:
        """Sample of each token, int64 [T], counted over images, pairs, texts."""
        of_patches = lambda g: torch.arange(g.samples, device=device).repeat_interleave(g.patches)  # noqa: E731
        first_pair, first_text = self.images.samples, self.images.samples + self.pairs.samples
        return torch.cat(
            [
                of_patches(self.images),
                first_pair + of_patches(self.pairs),
                first_pair + self.pairs.word_samples(device),
                first_text + self.texts.word_samples(device),
            ]
        )

    @cached_property
    def _packings(self) -> dict[torch.device, Packing | None]:
        return {}

    def packing(self, device: torch.device) -> Packing | None:
        """The tokens sample by sample; None where some may not attend to all others of their sample.

        The groups' indexes are on `device`, which does not have to be waited for. Made once.
        """
        if device not in self._packings:
            whole = all(g.whole for g in (self.images, self.pairs, self.texts))
            self._packings[device] = _pack(self, device) if whole else None
        return self._packings[device]

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on `device`."""
        return Layout(*(g.to(device) for g in (self.images, self.pairs, self.texts)))


def _pack(layout: Layout, device: torch.device) -> Packing:
    groups = (layout.images, layout.pairs, layout.texts)
    samples = [g.word_samples(device) for g in groups]
    lengths = torch.cat(
        [
            torch.full((g.samples,), g.patches, device=device).scatter_add_(0, of_words, torch.ones_like(of_words))
            for g, of_words in zip(groups, samples, strict=True)
        ]
    )
    cumulative = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    image_patches, pair_patches, pair_words, text_words = layout.segments
    before_texts = image_patches + pair_patches + pair_words
    first = cumulative[layout.images.samples :][: layout.pairs.samples]  # of each pair
    place = torch.cat(
        [
            torch.arange(image_patches, device=device),
            (first[:, None] + torch.arange(layout.pairs.patches, device=device)).flatten(),
            first[samples[1]] + layout.pairs.patches + layout.pairs.positions(device),
            torch.arange(before_texts, before_texts + text_words, device=device),
        ]
    )
    order = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=device))
    longest = max((g.patches + g.words for g in groups if g.samples), default=0)
    return Packing(place, order, cumulative.to(torch.int32), longest)


@dataclass(frozen=True)
class Selection(Segments):
    """Some tokens of a micro-batch: those that are read after the last block. Their order is the layout's too."""

    rows: Tensor
    """int64 [M]: their rows of the token matrix, segment by segment."""
    counts: tuple[int, int, int, int]
    """How many of each segment."""

    @property
    def segments(self) -> tuple[int, int, int, int]:
        return self.counts
