"""What a pretraining objective is: one file that defines an `Objective` and registers it.

On the host it draws for each sample what it needs (`annotate`), says which views of the samples it wants encoded, and
which tokens it reads of them. The model runs once over the views of all objectives, its last block over the tokens that
any of them reads. On the device the objective makes its losses from the hidden states of its own tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3_dist.config import ModelConfig, RunConfig
from beit3_dist.data.batch import MicroBatch, Samples
from beit3_dist.data.order import Numbers, Stream, mix
from beit3_dist.data.streams import Sample
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.model.beit3 import BEiT3, MixedInputs
from beit3_dist.model.token_layout import Group, Selection, TokenLayout
from beit3_dist.parallel.replicas import ALONE, Replicas


@dataclass(frozen=True)
class View:
    """Samples of a stream as the model sees them: a group of the layout, shared by the objectives that want it."""

    stream: str
    image: bool
    """Whether it sees their images, alone or before the texts."""
    text: bool
    """Whether it sees their texts."""
    masked_by: str = ""
    """The objective whose annotations hide some of it: `image_mask` bool [n, patches] and `text` int64 [n, L], the
    words as they are shown. Empty: the samples as they are."""
    prefix_by: str = ""
    """The objective whose annotations say how its texts begin: `prefix` int64 [n], see `prefix_mask`. What comes after
    the prefix sees nothing that follows it. Empty: every token sees all of its sample."""
    ends: bool = False
    """Whether the texts end with that prefix, of which there is <s> at least; what comes after it is not shown."""

    def lengths(self, samples: Samples) -> Tensor:
        """int64 [n]: tokens that are shown of each text; 0 where there are none."""
        if samples.lengths is None:
            return torch.zeros(len(samples), dtype=torch.int64)
        return samples.annotations[self.prefix_by]["prefix"].clamp(min=1) if self.ends else samples.lengths

    @property
    def kind(self) -> int:
        """The place of its group in a layout, see `Group.kind`."""
        return 1 if self.image and self.text else 0 if self.image else 2


class Places:
    """Where the tokens of the views lie in a micro-batch's token matrix. On the host."""

    def __init__(self, layout: TokenLayout, views: Sequence[View]) -> None:
        patches, words = layout.pieces
        starts = np.cumsum([0, *patches, *words]).tolist()
        of_patches, of_words = starts[: len(patches)], starts[len(patches) : -1]
        own = [
            [start for group, start in zip(groups, some, strict=True) if not group.filler]
            for groups, some in ((layout.patch_groups, of_patches), (layout.word_groups, of_words))
        ]
        self._groups = dict(zip(views, (group for group in layout.groups if not group.filler), strict=True))
        self._patches = dict(zip([v for v in views if v.image], own[0], strict=True))
        self._words = dict(zip([v for v in views if v.text], own[1], strict=True))

    def patches(self, view: View, mask: Tensor) -> Tensor:
        """Rows, int64 [M], of the patches in `mask`, bool [n, patches]."""
        masked, patches = mask.flatten().nonzero().squeeze(1), mask.shape[1]
        # CLS stands before each image's patches.
        return self._patches[view] + masked // patches * (1 + patches) + 1 + masked % patches

    def words(self, view: View, mask: Tensor) -> Tensor:
        """Rows, int64 [M], of the words in `mask`, bool [n, L]."""
        return self._words[view] + self.packed(view, mask).nonzero().squeeze(1)

    def first(self, view: View) -> Tensor:
        """Rows, int64 [n], of each sample's first token: CLS, or <s> where there are texts alone."""
        group = self._groups[view]
        if view.image:
            return self._patches[view] + torch.arange(group.samples) * group.patches
        return self._words[view] + (group.positions(torch.device("cpu")) == 0).nonzero().squeeze(1)

    def group(self, view: View) -> Group:
        """The view's group of the layout."""
        return self._groups[view]

    def all(self, view: View) -> Tensor:
        """Rows, int64 [T], of all tokens of a view of pairs: all patches, then all words."""
        group = self._groups[view]
        patches = self._patches[view] + torch.arange(group.samples * group.patches)
        return torch.cat([patches, self._words[view] + torch.arange(group.real_words)])

    def packed(self, view: View, words: Tensor) -> Tensor:
        """The entries of [n, L] at tokens that are no padding."""
        index = self._groups[view].index
        return words.flatten() if index is None else words.flatten()[index]


@dataclass(frozen=True)
class Loss:
    """One of the losses that are told apart in all records."""

    name: str
    """`loss_NAME` and `acc_NAME` in records."""
    weight: float
    has_accuracy: bool = True
    title: str = ""
    """What it is the loss of, for people."""
    unit: str = ""
    """What one of its targets is, for people."""
    classes: int = 0
    """Of its targets, where it tells classes apart; their entropy is watched then."""
    remedy: str = ""
    """What is wrong where nearly all its targets are one class, for `str.format(class)`."""
    stream: str = ""
    """By whose named data sets it is told apart; empty: it is not."""
    part_of: str = ""
    """The loss that this is a data set's share of; such a one has no weight."""


@dataclass(frozen=True)
class SecondPass:
    """A micro-batch of samples that only the first pass could choose, on the device."""

    inputs: MixedInputs
    selection: Selection
    """The tokens that are read."""
    ids: Tensor
    """int64 [samples]: what they draw their drop path by."""
    targets: Any
    """For `Objective.sums`."""
    captions: Tensor
    """int64 [samples] on the host: words of each sample, all of which have an image."""


class Objective(ABC):
    """An objective of one run. `name` is that of its section in `objectives`, `Config` the section's dataclass."""

    name: ClassVar[str]
    Config: ClassVar[type]
    second_pass: ClassVar[bool] = False
    """Whether it reads a pass of its own, `second`, after the one over all views, which a pipeline cannot make."""
    coded: Set[str] = frozenset()
    """Streams for whose images it asks for visual codes, which need an image tokenizer."""
    hashes_images: bool = False
    """See `Annotator`."""
    label_classes: int = 0
    """See `Annotator`."""
    looks_ahead: bool = False
    """Whether its losses compare samples of all micro-batches of a step, of which there are several: each is encoded
    twice then, the first time for `look`."""
    looks_back: bool = False
    """Whether it learns from a moving average of the weights, by which each micro-batch of a step is encoded before,
    without drop path, for `look`."""
    average_decay: float = 0.0
    """Decay of that average; 0: it asks for none."""
    constants: Mapping[str, float] = {}
    """Names of its head's parameters that start from a number; others from a function of (seed, name)."""
    bounds: Mapping[str, tuple[float, float]] = {}
    """Names of its head's parameters that every step leaves in an interval."""
    replicas: Replicas = ALONE
    """Those that work on the step."""
    teachers: Mapping[str, str] = {}
    """Field -> weights of a frozen network that it learns from; their content is that of the whole run."""

    losses: list[Loss]
    """What it tells apart, in the order of its counts and sums."""
    views: list[View]
    """What it wants encoded."""
    each: Sequence[Tensor] = ()
    """[2, m] for each loss that has a stream: of its targets, in the order of their samples, what `sums` has added up
    last, without gradient."""

    def __init__(self, config: Any, run: RunConfig) -> None:
        """`config`: its section. Raises ValueError naming the field where the run cannot have it."""
        self.config: Any = config
        self.model = run.model
        self.streams = [stream for stream in Stream if getattr(run.batch, stream.field)]
        """Those that the run has."""

    def meet(self, others: Mapping[str, Objective]) -> None:
        """Learns which objectives the run has, by name. Raises ValueError where it lacks one that it needs."""
        return None

    def open_teachers(self) -> Any:
        """The networks that it learns from, on the CPU, for `use_teachers`; they are no part of the model. Raises
        ValueError naming the field where one does not fit."""
        return None

    def use_teachers(self, opened: Any, device: torch.device | None, group: dist.ProcessGroup | None) -> None:
        """What they are. From here on they make targets on `device`, which the processes of `group` are asked for
        alike; None: on a pipeline stage that needs no targets."""
        return None

    def target_flops(self, samples: Mapping[str, int]) -> float:
        """FLOPs of its teachers for so many samples of each stream."""
        return 0

    def head(self) -> nn.Module | None:
        """Layers that the model lacks, `objective_heads.NAME` of it: with the pipeline's last stage, in checkpoints."""
        return None

    def annotate(
        self, stream: Stream, samples: Sequence[Sample], text: np.ndarray | None, tokenizer: TextTokenizer
    ) -> dict[str, Tensor]:
        """See `Annotator`. Draw by `numbers`."""
        return {}

    def numbers(self, samples: Sequence[Sample], use: int) -> Numbers:
        """Random numbers of the samples for a use of this objective's own."""
        name = int.from_bytes(self.name.encode()[:7].ljust(7), "big")
        return Numbers((sample.key for sample in samples), mix(name, len(self.name), use))

    @abstractmethod
    def counts(self, batch: MicroBatch) -> list[int]:
        """What each loss is divided by, summed over the step: its targets in the micro-batch."""

    @abstractmethod
    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        """int64 [M] on the host: the tokens that it reads, ascending."""

    @abstractmethod
    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> Any:
        """What `sums` compares its tokens with. `move` brings a tensor to the device without waiting for it."""

    @abstractmethod
    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Any) -> Tensor:
        """[2, losses]: the sum of each loss, with its gradient, and of correct predictions (0 where there are none),
        from the last block's hidden states of `rows`, before the final norm."""

    def targets_by_sample(self, batch: MicroBatch) -> list[Tensor]:
        """int64 [n] for each loss that has a stream: targets of each of its samples."""
        return []

    def look(self, model: BEiT3, hidden_MD: Tensor, targets: Any) -> Any:
        """Where it looks ahead or back: what it has to know of every micro-batch of the step before the losses of the
        first one, from what `sums` takes. Nothing here has a gradient."""
        raise NotImplementedError

    def looked(self, found: list[Any], step: int) -> list[Any]:
        """For each micro-batch what `with_looked` takes, from what `look` gave of each."""
        raise NotImplementedError

    def with_looked(self, targets: Any, own: Any) -> Any:
        """The targets for `sums`, with what was found out for this micro-batch."""
        raise NotImplementedError

    def after_step(self) -> None:
        """After a training step that was not skipped."""
        return None

    def state(self) -> dict[str, Tensor]:
        """What checkpoints hold of it beside its head, from `use_teachers` on: name -> float32, the same on all ranks
        and in any layout; filled in place where a run goes on."""
        return {}

    def second(self, batches: Sequence[MicroBatch], number: int, step: int, device: torch.device) -> SecondPass:
        """Its own pass for micro-batch `number` of the step's, on the host, after the first pass over that one.
        Collective over the replicas."""
        raise NotImplementedError

    def second_pairs(self, samples: Mapping[str, int]) -> int:
        """Fused samples in the second pass of a micro-batch of so many samples of each stream; it reads a token of
        each."""
        return 0

    def classes(self, targets: Any) -> list[Tensor]:
        """int64 [m] for each loss: the classes of its targets, to be watched."""
        return [torch.zeros(0, dtype=torch.int64)] * len(self.losses)

    def head_flops(self, counts: Sequence[float]) -> float:
        """FLOPs of its heads, forward, for so many targets of each loss."""
        return 0

    def sample_flops(self, batch: MicroBatch) -> float:
        """FLOPs of its heads, forward, that depend on more of a micro-batch than how many targets there are."""
        return 0

    def head_products(self, counts: Sequence[float]) -> Mapping[str, float]:
        """How the names of heads' parameters begin -> what of `head_flops` is products with their weights."""
        return {f"objective_heads.{self.name}.": self.head_flops(counts)}

    def expected_counts(self, samples: dict[str, int], run: RunConfig) -> list[float]:
        """About how many targets each loss has in a micro-batch of so many samples of each stream, for the balance of a
        pipeline's stages."""
        return [0.0] * len(self.losses)


def normalized(pixels: Tensor) -> Tensor:
    """uint8 images -> [-1, 1] (mean and deviation 0.5, as in the released models' fine-tuning)."""
    return pixels / 127.5 - 1.0


def grid_of(model: ModelConfig) -> int:
    """Patches along one side of an image."""
    return model.image_size // model.patch_size
