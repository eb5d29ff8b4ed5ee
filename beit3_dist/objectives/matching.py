"""Image-text matching: is this caption of this image, told from both together, in a second pass with negatives."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from beit3_dist.config import RunConfig, require
from beit3_dist.data.batch import MicroBatch, Samples
from beit3_dist.data.order import Stream, mix
from beit3_dist.data.streams import Sample
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.beit3 import BEiT3, MixedInputs
from beit3_dist.model.token_layout import Selection, TokenLayout, group, to_device
from beit3_dist.objectives.base import Loss, Objective, Places, SecondPass, normalized
from beit3_dist.objectives.contrastive import Contrastive, hashes_of
from beit3_dist.objectives.mining import Negatives, draw_negatives, matching_losses, with_negatives

NAME = "matching"
SECTION = f"objectives.{NAME}"
HeadForm = Literal["pooler", "two_layers", "linear"]


@dataclass(kw_only=True)
class MatchingConfig:
    """Matching of pairs and of negatives, in a second pass over the model. Hard ones need objectives.contrastive."""

    weight: float = 1.0
    """Weight of the loss."""
    head: HeadForm = "pooler"
    """What tells by <s> of the caption beside its image. pooler: a matrix and tanh before the two classes (VLMo).
    two_layers: a matrix and GELU (ViT-BERT's form of all heads). linear: the two classes alone (ALBEF)."""
    negatives: Literal["all", "rank", "random"] = "all"
    """Whose pairs negatives are drawn from. all: every rank's, hard ones by contrast's similarities (VLMo). rank: hard
    ones of its own rank (ALBEF), so that the loss depends on the number of ranks. random: every rank's in the
    micro-batch, all alike, without contrast (ViLT)."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"{SECTION}.weight={self.weight} must be positive")


class MatchingHead(nn.Module):
    """<s> [M, D] -> logits [M, 2] of no match and match."""

    def __init__(self, width: int, form: HeadForm) -> None:
        super().__init__()
        self.pooler = Linear(width, width) if form == "pooler" else None
        self.hidden = Linear(width, width) if form == "two_layers" else None
        self.score = Linear(width, 2)

    @staticmethod
    def form_of(names: Container[str]) -> HeadForm:
        """Of the head whose parameters have these names."""
        return "pooler" if "pooler.weight" in names else "two_layers" if "hidden.weight" in names else "linear"

    def forward(self, start_MD: Tensor) -> Tensor:
        if self.pooler is not None:
            start_MD = torch.tanh(self.pooler(start_MD))
        elif self.hidden is not None:
            start_MD = gelu(self.hidden(start_MD))
        return self.score(start_MD)


class Matching(Objective):
    """One loss: of each pair, of its image with another caption and of its caption with another image.

    "No" to all is right in two of three cases. So the pairs that match are told apart in records, without weight:
    `acc_matches` is 0 there, and of the negatives (3 `acc_matching` - `acc_matches`) / 2 are right."""

    name = NAME
    Config = MatchingConfig
    second_pass = True
    hashes_images = True
    _drawn: Negatives
    _contrast: Contrastive | None = None

    def __init__(self, config: MatchingConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        require(bool(run.batch.pairs), f"{SECTION} reads pairs, but batch.pairs=0")
        self.views = []
        self.losses = [
            Loss(self.name, config.weight, title="matching of pairs", unit="pair shown"),
            Loss("matches", 0.0, title="those of them that match", unit="pair", stream="pairs"),
        ]
        self._seed, self._caption_length = run.seed, run.data.caption_length

    def meet(self, others: Mapping[str, Objective]) -> None:
        if self.config.negatives == "random":
            return
        contrast = others.get(Contrastive.name)
        require(
            isinstance(contrast, Contrastive),
            f"{SECTION} draws its negatives by contrast's similarities: give the section objectives.contrastive, too, "
            f"or draw them by {SECTION}.negatives=random",
        )
        assert isinstance(contrast, Contrastive)
        self._contrast = contrast

    def head(self) -> nn.Module:
        return MatchingHead(self.model.width, self.config.head)

    def annotate(
        self, stream: Stream, samples: Sequence[Sample], text: np.ndarray | None, tokenizer: TextTokenizer
    ) -> dict[str, Tensor]:
        """`labels` int64 [n, 2]: hashes of image and caption."""
        return {"labels": hashes_of(samples)} if stream is Stream.PAIRS else {}

    def counts(self, batch: MicroBatch) -> list[int]:
        return [3 * len(batch.streams["pairs"]), len(batch.streams["pairs"])]

    def targets_by_sample(self, batch: MicroBatch) -> list[Tensor]:
        return [torch.ones(len(batch.streams["pairs"]), dtype=torch.int64)]

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> None:
        """There are none in the first pass."""

    def second_pairs(self, samples: Mapping[str, int]) -> int:
        return 3 * samples["pairs"]

    def second(self, batches: Sequence[MicroBatch], number: int, step: int, device: torch.device) -> SecondPass:
        """Of each pair: itself, its caption with a drawn image, its image with a drawn caption. Negatives are drawn out
        of the pairs that the contrast has just compared: the step's, or the micro-batch's."""
        ahead = self._contrast is not None and self._contrast.looks_ahead
        pairs = [batch.streams["pairs"] for batch in (batches if ahead else batches[number : number + 1])]
        own, held = batches[number].streams["pairs"], sum(map(len, pairs))
        n, first = len(own), sum(map(len, pairs[:number])) if ahead else 0
        if first == 0:
            self._drawn = self._draws(pairs, mix(self._seed, step), device)
        give = partial(self._shown, pairs, device=device)
        shown = with_negatives(
            self._drawn,
            first,
            own.ids.to(device),
            self._shown([own], torch.arange(n), device),
            self.replicas,
            held,
            give,
        )
        return self._pass(shown.images, shown.words.cpu(), shown.lengths.cpu(), shown.ids, shown.counted)

    def _draws(self, pairs: Sequence[Samples], key: int, device: torch.device) -> Negatives:
        """For all of this replica's pairs that were compared."""
        labels = torch.cat([samples.annotations[self.name]["labels"] for samples in pairs]).to(device)
        ids = torch.cat([samples.ids for samples in pairs]).to(device)
        near, compared = self.config.negatives == "rank", self._contrast.compared if self._contrast else None
        return draw_negatives(compared, labels, ids, self.replicas, key, near)

    def _pass(self, images: Tensor, words: Tensor, lengths: Tensor, ids: Tensor, counted: Tensor) -> SecondPass:
        """Of M fused samples. `words` [M, L] and `lengths` [M] on the host."""
        samples, patches, longest = len(ids), 1 + self.model.patches, int(lengths.max())
        layout = TokenLayout((group(samples, patches, torch.arange(longest) >= lengths[:, None], longest),))
        packed = to_device(layout.packed([words[:, :longest].contiguous()]), ids.device)
        rows = to_device(samples * patches + lengths.cumsum(0) - lengths, ids.device)
        inputs = MixedInputs(normalized(images), packed, layout.to(ids.device))
        return SecondPass(inputs, Selection(rows, (0, 0, samples, 0)), ids, counted, lengths)

    def _shown(self, pairs: Sequence[Samples], rows: Tensor, device: torch.device) -> list[Tensor]:
        """On the device, of these rows of this replica's pairs, int64 [k] on the host: images uint8 [k, 3, S, S], words
        int64 [k, longest caption] and lengths int64 [k]."""
        sizes = torch.tensor([len(samples) for samples in pairs])
        parts = torch.searchsorted(sizes.cumsum(0), rows, right=True)
        places = rows - (sizes.cumsum(0) - sizes)[parts]

        def chosen(field: str, of: Callable[[Tensor], Tensor] = lambda values: values) -> Tensor:
            """The rows of a field, in their order."""
            values = [of(getattr(samples, field)) for samples in pairs]
            found = values[0].new_empty(len(rows), *values[0].shape[1:])
            for part, those in enumerate(values):
                found[parts == part] = those[places[parts == part]]
            return found

        length = self._caption_length
        words = chosen("text", lambda text: torch.nn.functional.pad(text, (0, length - text.shape[1])))
        jitter = None if pairs[0].jitter is None else chosen("jitter")
        seen = SeenImages(MicroBatch({"pairs": Samples(rows, rows, images=chosen("images"), jitter=jitter)}), device)
        return [seen.model, to_device(words, device), to_device(chosen("lengths"), device)]

    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Any) -> Tensor:
        """`targets`: which of the fused samples count, bool [M]."""
        logits_M2 = model.objective_heads[self.name](model.text_norm(hidden_MD))
        losses_2M = matching_losses(logits_M2, targets)
        matches_2M = losses_2M[:, : len(logits_M2) // 3].detach()
        self.each = [matches_2M]
        return torch.stack([losses_2M.sum(1), matches_2M.sum(1)], dim=1)

    def head_flops(self, counts: Sequence[float]) -> float:
        width = self.model.width
        return counts[0] * 2 * width * (2 + width * (self.config.head != "linear"))
