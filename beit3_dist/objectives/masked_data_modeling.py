"""BEiT-3's objective: recover masked patches (as visual codes) and masked words, from images, texts and pairs alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from beit3_dist.config import RunConfig, require
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.order import Numbers, Stream
from beit3_dist.data.streams import Draw, Sample
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.base import Loss, Objective, Places, View, grid_of
from beit3_dist.objectives.masking import block_masks, mask_count, mask_words
from beit3_dist.objectives.momentum_distillation import MomentumDistillation
from beit3_dist.objectives.soft_targets import Taught, losses_of

NAME = "masked_data_modeling"
SECTION = f"objectives.{NAME}"
IMAGE, TEXT = "image", "text"
"""The sides of a sample."""


@dataclass(kw_only=True)
class MaskedDataModelingConfig:
    """Masked data modelling."""

    image_mask_ratio: float = 0.4
    """Share of patches masked, block-wise; the count is exact: round(ratio * patches). A side whose ratio is 0 is seen
    whole and has no loss; an objective beside this one may have other uses of it."""
    pair_image_mask_ratio: float | Literal["same"] = "same"
    """Of the images of pairs; same: as image_mask_ratio. 0: captions are masked beside whole images, as in VLMo,
    ViLT and ALBEF."""
    predict_codes: bool = True
    """Whether masked patches are predicted as visual codes. false: another objective says what is hidden there, such as
    distillation a teacher's features (EVA, MVP), and no image tokenizer is needed."""
    text_mask_ratio: float = 0.15
    """Share of a text's words masked; the count is exact: max(1, round(ratio * words))."""
    caption_mask_ratio: float = 0.5
    """Share of a caption's words masked; exact as above. 0: images are masked beside whole captions."""
    whole_words: bool = False
    """Whether all pieces of a word are masked or none (ViLT, VLMo): ratios and counts are of whole words. One begins
    where SentencePiece has a space; a script without spaces has few."""
    mask_token_share: float = 0.8
    """Share of the masked words that are replaced by <mask> (the paper is silent; BERT's 80/10/10)."""
    random_token_share: float = 0.1
    """Share of the masked words that are replaced by a random word; the rest keeps its word."""
    mask_pairs: Literal["both", "one"] = "both"
    """both: image and caption of a pair are masked in the same pass. one: one of the two, chosen per sample by a fair
    keyed coin (the paper is silent; it gives both ratios without saying that they exclude one another)."""
    image_weight: float = 1.0
    """Weight of the image-only loss (the paper is silent; plain sum)."""
    text_weight: float = 1.0
    """Weight of the text-only loss."""
    pair_image_weight: float = 1.0
    """Weight of the image loss of pairs."""
    pair_text_weight: float = 1.0
    """Weight of the caption loss of pairs."""

    def __post_init__(self) -> None:
        ratios = {name: value for name, value in vars(self).items() if name.endswith("_ratio") and value != "same"}
        for name, ratio in ratios.items():
            require(0 <= ratio < 1, f"{SECTION}.{name}={ratio} is not in [0, 1)")
        require(
            self.mask_pairs == "both" or min(self.of_pair_images, self.caption_mask_ratio) > 0,
            f"{SECTION}.mask_pairs=one masks either side of some pairs, but the ratio of one side is 0: use both",
        )
        require(
            min(self.mask_token_share, self.random_token_share) >= 0
            and self.mask_token_share + self.random_token_share <= 1,
            f"{SECTION}.mask_token_share + {SECTION}.random_token_share must lie in [0, 1]",
        )
        for name in ("image_weight", "text_weight", "pair_image_weight", "pair_text_weight"):
            require(getattr(self, name) >= 0, f"{SECTION}.{name}={getattr(self, name)} is negative")

    @property
    def of_pair_images(self) -> float:
        """Share of the patches of pairs that are masked."""
        return self.image_mask_ratio if self.pair_image_mask_ratio == "same" else self.pair_image_mask_ratio

    @property
    def ratios(self) -> dict[tuple[Stream, str], float]:
        """Stream and side -> share of its patches or words that is masked."""
        return {
            (Stream.IMAGES, IMAGE): self.image_mask_ratio,
            (Stream.TEXTS, TEXT): self.text_mask_ratio,
            (Stream.PAIRS, IMAGE): self.of_pair_images,
            (Stream.PAIRS, TEXT): self.caption_mask_ratio,
        }


@dataclass(frozen=True)
class Targets:
    """What the heads have to recover. Image-only patches come before pairs', pairs' words before texts'."""

    codes: Tensor
    """int64 [Mi + Mpi]: visual codes of the masked patches."""
    words: Tensor
    """int64 [Mpt + Mt]: ids of the masked words."""
    patch_counts: list[int]
    """[Mi, Mpi], without those of streams that the run does not have."""
    word_counts: list[int]
    """[Mpt, Mt], likewise."""
    taught: Taught | None = None
    """What a moving average of the model says of the words."""


CODE = "the code {}: look at image_tokenizer with tools/show_codes.py"
WORD = "the word {}: does text_tokenizer know this language?"


class MaskedDataModeling(Objective):
    """Up to four losses, each a cross-entropy: of the masked patches and words of each stream that has such."""

    name = NAME
    Config = MaskedDataModelingConfig

    def __init__(self, config: MaskedDataModelingConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        self._ratios = config.ratios
        masked = [side for side, ratio in self._ratios.items() if side[0] in self.streams and ratio > 0]
        require(bool(masked), f"{SECTION}: of all streams that batch has the mask ratios are 0")
        self._sides = [(stream, side) for stream, side in masked if side == TEXT or config.predict_codes]
        views = {s: View(s.field, s.has_images, s.has_text, masked_by=self.name) for s in self.streams}
        self.views = [view for stream, view in views.items() if stream in {stream for stream, _ in masked}]
        codes, words = self.model.visual_vocab_size, self.model.vocab_size
        patch: dict[str, Any] = {"unit": "patch", "classes": codes, "remedy": CODE}
        word: dict[str, Any] = {"unit": "word", "classes": words, "remedy": WORD}
        of_sides = {
            (Stream.IMAGES, IMAGE): Loss("image", config.image_weight, title="images", **patch),
            (Stream.TEXTS, TEXT): Loss("text", config.text_weight, title="texts", **word),
            (Stream.PAIRS, IMAGE): Loss("pair_image", config.pair_image_weight, title="images of pairs", **patch),
            (Stream.PAIRS, TEXT): Loss("pair_text", config.pair_text_weight, title="captions of pairs", **word),
        }
        self.losses = [replace(of_sides[side], stream=side[0].field) for side in self._sides]
        self._images = [views[stream] for stream, side in self._sides if side == IMAGE]
        self._texts = [views[stream] for stream, side in self._sides if side == TEXT][::-1]  # pairs' lie before texts'
        self.coded = {view.stream for view in self._images}
        self.looks_back = MomentumDistillation.name in run.objectives and bool(self._texts)

    def meet(self, others: Mapping[str, Objective]) -> None:
        self._momentum: Any = others.get(MomentumDistillation.name)
        elsewhere = [view for other in others.values() if other is not self for view in other.views]
        require(
            self.config.predict_codes or any(view.image and view.masked_by == self.name for view in elsewhere),
            f"{SECTION}.predict_codes=false: nobody says what masked patches hide: give the section "
            "objectives.distillation with masked_features of images or pairs",
        )

    def annotate(
        self, stream: Stream, samples: Sequence[Sample], text: np.ndarray | None, tokenizer: TextTokenizer
    ) -> dict[str, Tensor]:
        """`image_mask` bool [n, patches], `text` int64 [n, L] as it is shown, `text_mask` bool [n, L]."""
        images_masked = texts_masked = np.ones(len(samples), dtype=bool)
        if stream is Stream.PAIRS and self.config.mask_pairs == "one":
            images_masked = _numbers(samples, Draw.MASKED_SIDE)(0, 1)[:, 0] < 0.5
            texts_masked = ~images_masked
        drawn: dict[str, Tensor] = {}
        if stream.has_images:
            count = mask_count(self._ratios[stream, IMAGE], self.model.patches)
            numbers = _numbers(samples, Draw.IMAGE_MASK)
            masks = block_masks(grid_of(self.model), np.where(images_masked, count, 0), numbers)
            drawn["image_mask"] = torch.from_numpy(masks)
        if text is not None:
            shown, predict = mask_words(
                text,
                _numbers(samples, Draw.WORD_MASK),
                ratio=self._ratios[stream, TEXT],
                specials=tokenizer.specials,
                mask_id=tokenizer.mask,
                words=tokenizer.words,
                mask_token_share=self.config.mask_token_share,
                random_token_share=self.config.random_token_share,
                begins=tokenizer.begins if self.config.whole_words else None,
            )
            shown[~texts_masked], predict[~texts_masked] = text[~texts_masked], False
            drawn |= {"text": torch.from_numpy(shown), "text_mask": torch.from_numpy(predict)}
        return drawn

    def _masks(self, batch: MicroBatch, field: str, views: list[View]) -> list[Tensor]:
        return [batch.streams[view.stream].annotations[self.name][field] for view in views]

    def counts(self, batch: MicroBatch) -> list[int]:
        return [int(own.sum()) for own in self.targets_by_sample(batch)]

    def targets_by_sample(self, batch: MicroBatch) -> list[Tensor]:
        drawn = [batch.streams[stream.field].annotations[self.name][f"{side}_mask"] for stream, side in self._sides]
        return [mask.sum(1) for mask in drawn]

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        patches, words = self._masks(batch, "image_mask", self._images), self._masks(batch, "text_mask", self._texts)
        return torch.cat(
            [
                torch.zeros(0, dtype=torch.int64),
                *(places.patches(view, mask) for view, mask in zip(self._images, patches, strict=True)),
                *(places.words(view, mask) for view, mask in zip(self._texts, words, strict=True)),
            ]
        )

    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> Targets:
        patches, words = self._masks(batch, "image_mask", self._images), self._masks(batch, "text_mask", self._texts)
        none = torch.zeros(0, dtype=torch.int64)
        masked_codes = []
        if self._images:
            masked = {view.stream: mask.any(1) for view, mask in zip(self._images, patches, strict=True)}
            codes = seen.codes(masked)
            masked_codes = [
                codes[view.stream].flatten()[move(mask[masked[view.stream]].flatten().nonzero().squeeze(1))]
                for view, mask in zip(self._images, patches, strict=True)
            ]
        truths = [batch.streams[view.stream].text for view in self._texts]
        masked_words = [
            places.packed(view, truth)[places.packed(view, mask)]
            for view, truth, mask in zip(self._texts, truths, words, strict=True)
            if truth is not None
        ]
        return Targets(
            codes=torch.cat(masked_codes) if masked_codes else move(none),
            words=move(torch.cat([none, *masked_words])),
            patch_counts=[int(mask.sum()) for mask in patches],
            word_counts=[int(mask.sum()) for mask in words],
        )

    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Targets) -> Tensor:
        patches, words = hidden_MD.split([len(targets.codes), len(targets.words)])
        of_patches = model.image_losses(patches, targets.codes).split(targets.patch_counts, dim=1)
        head, taught = partial(model.text_head, model.text_norm(words)), targets.taught if model.training else None
        of_words = losses_of(head, targets.words, taught).split(targets.word_counts, dim=1)
        if not self._sides:
            return hidden_MD.new_zeros(2, 0, dtype=torch.float32)
        of_targets = self._ordered(of_patches, of_words)
        self.each = [some.detach() for some in of_targets]
        return torch.stack([some.sum(1) for some in of_targets], dim=1)

    def look(self, model: BEiT3, hidden_MD: Tensor, targets: Targets) -> Tensor:
        return model.text_logits(hidden_MD[len(targets.codes) :])

    def looked(self, found: list[Tensor], step: int) -> list[Taught]:
        return self._momentum.taught(found, step)

    def with_looked(self, targets: Targets, own: Taught) -> Targets:
        return replace(targets, taught=own)

    def guesses(self, model: BEiT3, hidden_MD: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Loss -> int64 [m]: the likeliest code or word at each of its tokens, from what `sums` takes."""
        patches, words = hidden_MD.split([len(targets.codes), len(targets.words)])
        codes, ids = model.image_logits(patches).argmax(-1), model.text_logits(words).argmax(-1)
        found = self._ordered(codes.split(targets.patch_counts), ids.split(targets.word_counts))
        return {loss.name: guessed for loss, guessed in zip(self.losses, found, strict=True)}

    def _ordered(self, of_images: Sequence[Tensor], of_texts: Sequence[Tensor]) -> list[Tensor]:
        """What belongs to each loss, from what the views with images and those with texts have."""
        images = {view.stream: value for view, value in zip(self._images, of_images, strict=True)}
        texts = {view.stream: value for view, value in zip(self._texts, of_texts, strict=True)}
        return [(images if side == IMAGE else texts)[stream.field] for stream, side in self._sides]

    def classes(self, targets: Targets) -> list[Tensor]:
        return self._ordered(targets.codes.split(targets.patch_counts), targets.words.split(targets.word_counts))

    def head_flops(self, counts: Sequence[float]) -> float:
        return sum(self.head_products(counts).values())

    def head_products(self, counts: Sequence[float]) -> dict[str, float]:
        products = {"image_head.": 0.0, "text_head.": 0.0}
        for loss, (_, side), count in zip(self.losses, self._sides, counts, strict=True):
            products["image_head." if side == IMAGE else "text_head."] += 2 * self.model.width * count * loss.classes
        return products

    def expected_counts(self, samples: dict[str, int], run: RunConfig) -> list[float]:
        words = {Stream.TEXTS: run.data.text_length, Stream.PAIRS: run.data.caption_length}
        tokens = [self.model.patches if side == IMAGE else words[stream] for stream, side in self._sides]
        sizes = [samples[stream.field] * self._ratios[stream, side] for stream, side in self._sides]
        return [size * token for size, token in zip(sizes, tokens, strict=True)]


def _numbers(samples: Sequence[Sample], use: Draw) -> Numbers:
    """The samples' random numbers for one use, by numbers that were given before objectives had names."""
    return Numbers((sample.key for sample in samples), use)
