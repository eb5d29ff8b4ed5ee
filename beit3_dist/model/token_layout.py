"""Where the tokens of a mixed micro-batch lie: one matrix, each expert's tokens one contiguous slice.

    [ patches of images alone | patches of pairs | words of pairs | words of texts alone ]
      \\__________ vision expert ______________/   \\_________ language expert _________/
                                \\___ VL expert, top layers ___/

A micro-batch is a list of groups: samples of one kind, within each of which attention runs. There may be any number of
groups of a kind, and the same sample in several of them, as a pair, say, and its image alone; inside each of the four
segments the groups' tokens follow one another. 'Patches' means CLS + patches. Words are packed: padding exists only
inside attention. (A run's layout, over tensor, pipeline and data-parallel ranks, is another matter: parallel/mesh.py.)
Shape letters: B samples, N tokens of a sample, T tokens of the micro-batch, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

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
    fused: bool = False
    """Whether these are pairs, whose tokens the vision-language experts take; else images or texts alone."""
    filler: bool = False
    """Whether these words belong to no sample: nobody reads them, they make up a number of tokens that comes again."""

    @property
    def kind(self) -> int:
        """Its place in the order of groups: 0 images alone, 1 pairs, 2 texts alone."""
        return 1 if self.fused else 0 if self.patches else 2

    @property
    def real_words(self) -> int:
        return self.samples * self.words if self.index is None else len(self.index)

    @property
    def of_patches(self) -> Group:
        """A pair's image alone."""
        return Group(self.samples, self.patches, 0)

    @property
    def of_words(self) -> Group:
        """A pair's words alone, under the same mask."""
        own = None if self.mask is None else self.mask[..., -self.words :]
        if own is not None and own.shape[-2] > 1:
            own = own[..., -self.words :, :]
        return replace(self, patches=0, mask=own, fused=False)

    def positions(self, device: torch.device) -> Tensor:
        """Position of each real word in its text, int64 [real words]."""
        rows = torch.arange(self.samples * self.words, device=device) if self.index is None else self.index
        return rows % max(self.words, 1)

    def word_samples(self, device: torch.device) -> Tensor:
        """Sample of each real word, int64 [real words]."""
        rows = torch.arange(self.samples * self.words, device=device) if self.index is None else self.index
        return rows // max(self.words, 1)

    def to(self, device: torch.device) -> Group:
        return self.moved(lambda tensor: to_device(tensor, device))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Group:
        """The group, whose tensors `move` brings to a device."""
        index, mask = (None if tensor is None else move(tensor) for tensor in (self.index, self.mask))
        return replace(self, index=index, mask=mask)

    def by_sample(self, x_TD: Tensor) -> Tensor:
        """Its tokens [T, D], all patches before all real words -> [B, N, D], zeros at padding."""
        patches, words = x_TD.split([self.samples * self.patches, self.real_words])
        if self.index is not None:
            words = words.new_zeros(self.samples * self.words, words.shape[1]).index_copy(0, self.index, words)
        sizes = ((patches, self.patches), (words, self.words))
        return torch.cat([part.view(self.samples, size, part.shape[1]) for part, size in sizes], dim=1)


def group(
    samples: int, patches: int, padding: Tensor | None, words: int = 0, attention_mask: Tensor | None = None
) -> Group:
    """The group of `samples` samples: pairs where they have patches and words, images or texts alone where not.

    `padding`: bool [B, words], True where the text is padding; None where nothing is. `attention_mask`: bool [N, N] or
    [B, N, N], True where a query may attend to a key. Looks at the values of `padding`, so call it on the host.
    """
    mask, whole, fused = None, attention_mask is None, patches > 0 and (words > 0 or padding is not None)
    if attention_mask is not None:
        mask = attention_mask.bool().reshape(-1, 1, *attention_mask.shape[-2:])
    if padding is None or not bool(padding.any()):
        return Group(samples, patches, words, None, mask, whole, fused)
    real = ~padding.bool()
    keys = torch.cat([real.new_ones(samples, patches), real], dim=1)[:, None, None, :]
    index = real.flatten().nonzero().squeeze(1)
    return Group(samples, patches, words, index, keys if mask is None else mask & keys, whole, fused)


def prefix_mask(patches: int, words: int, prefixes: Tensor) -> Tensor:
    """The mask of prefix language modelling, bool [B, N, N] for N = patches + words, True where a query may attend to a
    key (Liu et al. 2018; SimVLM, Wang et al. 2022).

    The patches, CLS counted, and the first `prefixes` [B] tokens of the text, <s> counted, see one another; each token
    after them sees them, itself and the ones between. A prefix of 0: patches see patches alone, <s> what they are.
    """
    place = torch.arange(patches + words)
    return (place <= place[:, None]) | (place < patches + prefixes[:, None, None])


def fill(
    groups: Sequence[Group], kinds: Sequence[int], multiple: int, fullest: Mapping[int, int] | None = None
) -> tuple[Group, ...]:
    """The groups, and behind those of each of `kinds` (see `Group.kind`) words that belong to no sample, so that the
    words of this kind are a multiple. `fullest`: words of a kind that there are at least."""
    filled = list(groups)
    for kind in kinds:
        place = max(number for number, group in enumerate(filled) if group.kind == kind) + 1
        words = sum(group.real_words for group in filled if group.kind == kind)
        wanted = max(words + -words % multiple, (fullest or {}).get(kind, 0))
        filled.insert(place, Group(1, 0, wanted - words, fused=kind == 1, filler=True))
    return tuple(filled)


@dataclass(frozen=True)
class Packing:
    """The tokens of a micro-batch sample by sample, as attention over samples of different lengths takes them:

    [ images alone, one by one | pairs one by one: CLS + patches, then words | texts alone, one by one ]
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
            case ("vision",):  # of images alone
                return [image_patches + pair_patches]
            case ("language",):  # of words alone
                return [pair_words + text_words]
            case ("vision", "language"):
                return [image_patches + pair_patches, pair_words + text_words]
            case ("vision", "vl", "language"):
                return [image_patches, pair_patches + pair_words, text_words]
        raise AssertionError(f"no slices are defined for the experts {experts}")


@dataclass(frozen=True)
class TokenLayout(Segments):
    """The groups of a micro-batch and where their tokens lie."""

    groups: tuple[Group, ...]
    """Groups of images alone, then of pairs, then of texts alone."""

    def __post_init__(self) -> None:
        if any(group.kind > after.kind for group, after in pairwise(self.groups)):
            raise ValueError("a layout's groups are those of images alone, then of pairs, then of texts alone")

    @property
    def patch_groups(self) -> list[Group]:
        return [group for group in self.groups if group.kind < 2]

    @property
    def word_groups(self) -> list[Group]:
        return [group for group in self.groups if group.kind > 0]

    @property
    def pieces(self) -> tuple[list[int], list[int]]:
        """Tokens of each group with patches and of each group with words: the token matrix from top to bottom."""
        return [g.samples * g.patches for g in self.patch_groups], [g.real_words for g in self.word_groups]

    @property
    def segments(self) -> tuple[int, int, int, int]:
        def total(groups: list[Group], sizes: list[int], fused: bool) -> int:
            return sum(size for group, size in zip(groups, sizes, strict=True) if group.fused is fused)

        patches, words = self.pieces
        return (
            total(self.patch_groups, patches, False),
            total(self.patch_groups, patches, True),
            total(self.word_groups, words, True),
            total(self.word_groups, words, False),
        )

    @cached_property
    def alone(self) -> TokenLayout:
        """The same tokens with the images of pairs as images alone, and their words as texts alone."""
        return TokenLayout((*self.images_alone.groups, *self.words_alone.groups))

    @cached_property
    def images_alone(self) -> TokenLayout:
        """The patches, which come first."""
        return TokenLayout(tuple(g.of_patches if g.fused else g for g in self.patch_groups if not g.filler))

    @cached_property
    def words_alone(self) -> TokenLayout:
        """The words, which come last."""
        return TokenLayout(tuple(g.of_words if g.fused else g for g in self.word_groups))

    @cached_property
    def pairs(self) -> TokenLayout:
        """The tokens of pairs, which lie in the middle."""
        return TokenLayout(tuple(g for g in self.groups if g.fused))

    @property
    def tokens(self) -> int:
        """Tokens of samples."""
        return sum(g.samples * g.patches + g.real_words for g in self.groups if not g.filler)

    def word_positions(self, device: torch.device) -> Tensor:
        """Position of each real word in its text, int64 [words]."""
        groups = self.word_groups  # the table of positions may be shorter than a filler
        return _cat([group.positions(device) * (not group.filler) for group in groups], device)

    def token_samples(self, device: torch.device) -> Tensor:
        """Sample of each token, int64 [T], counted over the groups."""
        patches, words, first = [], [], 0
        for group in self.groups:
            if group.kind < 2:
                samples = torch.arange(group.samples, device=device)
                patches.append(first + samples.repeat_interleave(group.patches))
            if group.kind > 0:
                words.append(first + group.word_samples(device))
            first += group.samples
        return torch.cat([*patches, *words])

    def packed(self, words: list[Tensor]) -> Tensor:
        """The real words of padded ones, [B, L] of each group of samples with words, in the layout's order: [real
        words]. Those of fillers are zeros."""
        flat, left = [], iter(words)
        for group in self.word_groups:
            padded = torch.zeros(group.words, dtype=torch.int64) if group.filler else next(left).flatten()
            flat.append(padded if group.index is None else padded[group.index])
        return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int64)

    @cached_property
    def _packings(self) -> dict[torch.device, Packing | None]:
        return {}

    def packing(self, device: torch.device) -> Packing | None:
        """The tokens sample by sample; None where some may not attend to all others of their sample.

        The groups' indexes are on `device`, which does not have to be waited for. Made once.
        """
        if device not in self._packings:
            self._packings[device] = _pack(self, device) if all(g.whole for g in self.groups) else None
        return self._packings[device]

    def to(self, device: torch.device) -> TokenLayout:
        return TokenLayout(tuple(group.to(device) for group in self.groups))


def _cat(parts: list[Tensor], device: torch.device) -> Tensor:
    """int64 [n], also where there are no parts."""
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *parts])


def _pack(layout: TokenLayout, device: torch.device) -> Packing:
    groups = layout.groups
    samples = [g.word_samples(device) for g in groups]
    lengths = torch.cat(
        [
            torch.full((g.samples,), g.patches, device=device).scatter_add_(0, of_words, torch.ones_like(of_words))
            for g, of_words in zip(groups, samples, strict=True)
        ]
    )
    cumulative = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    patches, words = [], []
    for g, of_words, first in zip(groups, samples, cumulative[:-1].split([g.samples for g in groups]), strict=True):
        if g.kind < 2:
            patches.append((first[:, None] + torch.arange(g.patches, device=device)).flatten())
        if g.kind > 0:
            words.append(first[of_words] + g.patches + g.positions(device))
    place = torch.cat([*patches, *words])
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
