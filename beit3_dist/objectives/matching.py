"""Image-text matching: is this caption of this image, told from both together, in a second pass with hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from beit3_dist.config import RunConfig, require
from beit3_dist.data.batch import MicroBatch, Samples
from beit3_dist.data.order import Stream, mix
from beit3_dist.data.streams import Sample
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.hashing import hash64_tensor
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.beit3 import BEiT3, MixedInputs
from beit3_dist.model.token_layout import Selection, TokenLayout, group, to_device
from beit3_dist.objectives.base import Loss, Objective, Places, SecondPass, normalized
from beit3_dist.objectives.contrastive import Contrastive, hashes_of
from beit3_dist.objectives.mining import Negatives, draw_negatives

NAME = "matching"
SECTION = f"objectives.{NAME}"


@dataclass(kw_only=True)
class MatchingConfig:
    """Matching of pairs and of hard negatives, in a second pass over the model. Needs objectives.contrastive."""

    weight: float = 1.0
    """Weight of the loss."""
    head: Literal["pooler", "linear"] = "pooler"
    """What tells by the fused CLS. pooler: a matrix and tanh before the two classes (VLMo). linear: the two alone
    (ALBEF)."""
    negatives: Literal["all", "rank"] = "all"
    """Whose pairs hard negatives are drawn from. all: every rank's (VLMo). rank: those of its own rank (ALBEF), so that
    the loss depends on the number of ranks."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"{SECTION}.weight={self.weight} must be positive")


class MatchingHead(nn.Module):
    """CLS [M, D] -> logits [M, 2] of no match and match."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.pooler = Linear(width, width) if pooled else None
        self.score = Linear(width, 2)

    def forward(self, cls_MD: Tensor) -> Tensor:
        return self.score(cls_MD if self.pooler is None else torch.tanh(self.pooler(cls_MD)))


class Matching(Objective):
    """One loss: of each pair, of its image with another caption and of its caption with another image."""

    name = NAME
    Config = MatchingConfig
    second_pass = True
    hashes_images = True

    def __init__(self, config: MatchingConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        require(bool(run.batch.pairs), f"{SECTION} reads pairs, but batch.pairs=0")
        self.views = []
        self.losses = [Loss(self.name, config.weight, title="matching of pairs", unit="pair shown")]
        self._seed, self._caption_length = run.seed, run.data.caption_length
        self._drawn: Negatives | None = None

    def meet(self, others: Mapping[str, Objective]) -> None:
        contrast = others.get(Contrastive.name)
        require(
            isinstance(contrast, Contrastive),
            f"{SECTION} draws its negatives by contrast's similarities: give the section objectives.contrastive, too",
        )
        assert isinstance(contrast, Contrastive)
        self._contrast = contrast

    def head(self) -> nn.Module:
        return MatchingHead(self.model.width, self.config.head == "pooler")

    def annotate(
        self, stream: Stream, samples: Sequence[Sample], text: np.ndarray | None, tokenizer: TextTokenizer
    ) -> dict[str, Tensor]:
        """`labels` int64 [n, 2]: hashes of image and caption."""
        return {"labels": hashes_of(samples)} if stream is Stream.PAIRS else {}

    def counts(self, batch: MicroBatch) -> list[int]:
        return [3 * len(batch.streams["pairs"])]

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> None:
        """There are none in the first pass."""

    def second(self, batches: Sequence[MicroBatch], number: int, step: int, device: torch.device) -> SecondPass:
        """Of each pair: itself, its caption with a drawn image, its image with a drawn caption. Negatives are drawn out
        of the pairs that the contrast has just compared: the step's, or the micro-batch's."""
        known = batches if self._contrast.looks_ahead else batches[number : number + 1]
        pairs = [batch.streams["pairs"] for batch in known]
        own, n = batches[number].streams["pairs"], len(batches[number].streams["pairs"])
        first = sum(map(len, pairs[:number])) if self._contrast.looks_ahead else 0
        if self._drawn is None or first == 0:
            labels = torch.cat([samples.annotations[self.name]["labels"] for samples in pairs]).to(device)
            ids = torch.cat([samples.ids for samples in pairs]).to(device)
            key = mix(self._seed, step)
            near = self.config.negatives == "rank"
            self._drawn = draw_negatives(self._contrast.compared, labels, ids, self.replicas, key, near)
        drawn = self._drawn
        wanted = torch.cat([drawn.images[first : first + n], drawn.captions[first : first + n]])
        valid = wanted >= 0
        # Where there is none, the pair itself stands in, and counts for nothing.
        itself = self.replicas.rank * sum(map(len, pairs)) + first + torch.arange(n, device=device).repeat(2)
        wanted = torch.where(valid, wanted, itself)
        fetched = self.replicas.fetch(wanted, sum(map(len, pairs)), lambda rows: self._shown(pairs, rows, device))
        images, words, lengths = fetched
        (own_images, own_words, own_lengths) = self._shown([own], torch.arange(n), device)
        return self._pass(
            images=torch.cat([own_images, images[:n], own_images]),
            words=torch.cat([own_words, own_words, words[n:]]).cpu(),
            lengths=torch.cat([own_lengths, own_lengths, lengths[n:]]).cpu(),
            ids=torch.cat([own.ids.to(device), hash64_tensor(drawn.ids[wanted]) ^ own.ids.to(device).repeat(2)]),
            counted=torch.cat([valid.new_ones(n), valid]),
        )

    def _pass(self, images: Tensor, words: Tensor, lengths: Tensor, ids: Tensor, counted: Tensor) -> SecondPass:
        """Of M fused samples, the first third of which match. `words` [M, L] and `lengths` [M] on the host."""
        padding, patches, samples = torch.arange(words.shape[1]) >= lengths[:, None], 1 + self.model.patches, len(ids)
        layout = TokenLayout((group(samples, patches, padding, words.shape[1]),))
        rows = to_device(torch.arange(samples) * patches, ids.device)
        inputs = MixedInputs(normalized(images), to_device(layout.packed([words]), ids.device), layout.to(ids.device))
        selection = Selection(rows, (0, samples, 0, 0))
        return SecondPass(inputs, selection, ids, counted, lengths)

    def _shown(self, pairs: Sequence[Samples], rows: Tensor, device: torch.device) -> list[Tensor]:
        """On the device, of these rows of this replica's pairs, int64 [k] on the host: images uint8 [k, 3, S, S], words
        int64 [k, longest caption] and lengths int64 [k]."""
        ends = np.cumsum([len(samples) for samples in pairs])
        places = [(int(np.searchsorted(ends, row, side="right")), row) for row in rows.tolist()]
        chosen = [(pairs[part], row - (int(ends[part]) - len(pairs[part]))) for part, row in places]
        words = torch.zeros(len(rows), self._caption_length, dtype=torch.int64)
        for out, (samples, row) in zip(words, chosen, strict=True):
            assert samples.text is not None
            out[: samples.text.shape[1]] = samples.text[row]

        def stacked(field: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
            values = [getattr(samples, field)[row] for samples, row in chosen if getattr(samples, field) is not None]
            missing = not values and getattr(pairs[0], field) is None
            return None if missing else torch.stack(values) if values else torch.zeros(0, *shape, dtype=dtype)

        side = self.model.image_size
        images, jitter = stacked("images", (3, side, side), torch.uint8), stacked("jitter", (3,), torch.float32)
        lengths = stacked("lengths", (), torch.int64)
        assert lengths is not None
        of_rows = MicroBatch({"pairs": Samples(rows, rows, images=images, jitter=jitter)})
        return [SeenImages(of_rows, device).model, to_device(words, device), to_device(lengths, device)]

    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Any) -> Tensor:
        """`targets`: which of the fused samples count, bool [M]."""
        logits_M2 = model.objective_heads[self.name](model.norm[model.norm.experts[0]](hidden_MD)).float()
        right = (torch.arange(len(logits_M2), device=logits_M2.device) < len(logits_M2) // 3).long()
        losses = cross_entropy(logits_M2, right, reduction="none")
        hits = (logits_M2.argmax(1) == right).float()
        return torch.stack([(losses * targets).sum(), (hits * targets).sum()])[:, None]

    def head_flops(self, counts: Sequence[float]) -> float:
        width, pooled = self.model.width, self.config.head == "pooler"
        return counts[0] * 2 * width * (2 + width * pooled)
