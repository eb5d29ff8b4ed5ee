"""All objectives of a run, in one pass over the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor, nn

from beit3_dist.config import STREAMS, ModelConfig, RunConfig, require
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.views import Codes, SeenImages
from beit3_dist.model.beit3 import BEiT3, MixedInputs
from beit3_dist.model.drop_path import drop_path_factors
from beit3_dist.model.initialization import initial_value
from beit3_dist.model.token_layout import Group, Selection, TokenLayout, fill, group, prefix_mask, to_device
from beit3_dist.model.trained import freeze
from beit3_dist.objectives.base import Loss, Objective, Places, SecondPass, View, normalized
from beit3_dist.parallel.replicas import Replicas

NONE = torch.zeros(0, dtype=torch.int64)
ROUNDED = 128
"""On CUDA the captions of a micro-batch are filled up to a multiple of so many words, the only tokens whose number
differs between micro-batches, so that its shapes come again. What fills them up belongs to no sample and is read by
nobody. 64 words in the mean are 0.2 % of the giant's tokens at 3 x 32."""


@dataclass(frozen=True)
class Reading:
    """What the objectives read of a micro-batch, on the device."""

    selection: Selection
    """The tokens that any of them reads."""
    rows: list[Tensor | None]
    """int64 [M] for each objective: which of these are its own; None: all."""
    targets: list[Any]
    """Of each objective."""
    second: Mapping[int, Callable[[], SecondPass]] = field(default_factory=dict)
    """Objectives, by their place, that read a pass of their own after this one."""
    objectives: Objectives | None = None
    """Whose they are, where they are not all of the run's."""
    sets: Sequence[Tensor] = ()
    """int64 [m] for each loss that is told apart: the data sets of its targets."""


class OnHost:
    """What is known of a micro-batch on the host; each made once, for the step's totals and for the inputs."""

    def __init__(self, objectives: Objectives, batch: MicroBatch) -> None:
        self._objectives, self._batch = objectives, proxy(batch)  # which shall go when nobody else needs it

    @cached_property
    def layout(self) -> TokenLayout:
        """Where its tokens lie."""
        model = self._objectives.model
        layout = self._objectives.laid_out([_group(self._batch, view, model) for view in self._objectives.views])
        self._objectives.keep_shape(layout)
        return layout

    @cached_property
    def places(self) -> Places:
        """Where those of each view do."""
        return Places(self.layout, self._objectives.views)

    @cached_property
    def rows(self) -> list[Tensor]:
        """int64 [M]: the tokens that each objective reads."""
        return [objective.rows(self._batch, self.places) for objective in self._objectives]

    @cached_property
    def united(self) -> Tensor:
        """int64 [M]: those that any objective reads."""
        return self.rows[0] if len(self.rows) == 1 else torch.cat(self.rows).unique()

    @cached_property
    def read(self) -> tuple[int, int, int, int]:
        """How many they are of each segment."""
        ends = torch.tensor(self.layout.segments).cumsum(0)
        a, b, c, d = torch.searchsorted(self.united, ends).diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()
        return a, b, c, d


class Objectives:
    """The objectives of a run."""

    def __init__(self, run: RunConfig, objectives: Sequence[Objective]) -> None:
        self.run, self.model, self._each = run, run.model, list(objectives)
        self.losses: list[Loss] = [loss for objective in objectives for loss in objective.losses]
        """Of all objectives."""
        for objective in objectives:
            require(
                bool(objective.views) or objective.second_pass or objective.average_decay > 0,
                f"objectives.{objective.name} reads none of the streams that batch has",
            )
        self._tell_apart()
        self._introduce()
        if self.model.fusion_layers and run.train_only:
            frozen = (name for name, p in self.build().named_parameters() if not p.requires_grad)
            within = next((name for name in frozen if re.match(r"blocks\.|decoder\.|vision_embedding\.b", name)), "")
            require(not within, f"train_only freezes {within}: with model.fusion_layers, leave blocks out of it")
        require(
            any(loss.weight for loss in self.losses), "objectives: all weights are 0, so that nothing would be learnt"
        )
        names = [loss.name for loss in self.losses]
        require(len({*names}) == len(names), f"objectives: two losses have one name among {', '.join(names)}")
        for view in (view for objective in objectives for view in objective.views if view.masked_by):
            require(
                view.masked_by in {objective.name for objective in objectives},
                f"objectives: one of them reads what {view.masked_by} hides: give the section "
                f"objectives.{view.masked_by}, too",
            )
        self.views = _views_of(objectives)
        """What is encoded, in the order of a layout's groups."""
        self.multiple = ROUNDED if torch.cuda.is_available() else 1
        """Of which the captions' words are filled up to be one."""
        self.fullest: dict[int, int] | None = {} if run.cuda_graphs else None
        """By `Group.kind` the words of the longest micro-batch so far, to which all are filled up, so that all have one
        shape; None: shapes may differ."""
        self._on_host: WeakKeyDictionary[MicroBatch, dict[tuple[Objective, ...], OnHost]] = WeakKeyDictionary()

    def __iter__(self) -> Any:
        return iter(self._each)

    def _tell_apart(self) -> None:
        """Finds the parts of the losses that named data sets have."""
        self._sets = {loss: self.run.sets(loss.stream) for loss in self.losses if loss.stream}
        self._sets = {loss: names for loss, names in self._sets.items() if names}
        self.told: list[Loss] = self.losses + [
            Loss(f"{loss.name}.{name}", 0.0, loss.has_accuracy, f"{loss.title}: {name}", loss.unit, part_of=loss.name)
            for loss, names in self._sets.items()
            for name in names
        ]
        """The losses, then the share in them of each named data set, in the order of every vector of statistics."""

    def connected(self, replicas: Replicas) -> Objectives:
        """The same objectives, which know who works on the step. Those that draw in loader processes do not."""
        connected = copy(self)
        connected._each = [copy(objective) for objective in self]
        for objective in connected:
            objective.replicas = replicas
        connected._introduce()
        return connected

    def _introduce(self) -> None:
        """Each objective meets the others."""
        for objective in self:
            objective.meet({other.name: other for other in self})

    @property
    def ahead(self) -> Objectives | None:
        """Those that look ahead, with what they want encoded; None where none does."""
        return self._some(lambda objective: objective.looks_ahead)

    @property
    def back(self) -> Objectives | None:
        """Those that look back, likewise."""
        return self._some(lambda objective: objective.looks_back)

    def _some(self, wanted: Callable[[Objective], bool]) -> Objectives | None:
        some = copy(self)
        some._each, some.fullest = [objective for objective in self if wanted(objective)], None
        some.losses = [loss for objective in some for loss in objective.losses]
        some._tell_apart()
        some.views = _views_of(some._each)
        return some if some._each else None

    @property
    def average_decay(self) -> float:
        """Decay of the moving average of the weights that those learn from which look back; 0: there is none."""
        return max((objective.average_decay for objective in self), default=0.0)

    def looked(self, found: list[list[Any]], step: int) -> list[dict[str, Any]]:
        """For each micro-batch what each of these objectives, by name, has found out from what each saw in each."""
        of_each = {
            objective.name: objective.looked(list(seen), step)
            for objective, seen in zip(self, zip(*found, strict=True), strict=True)
        }
        return [{name: own[number] for name, own in of_each.items()} for number in range(len(found))]

    def with_looked(self, reading: Reading, own: Mapping[str, Any]) -> Reading:
        """The reading of a micro-batch with what objectives, by name, have found out for it."""
        targets = [
            each.with_looked(targets, own[each.name]) if each.name in own else targets
            for each, targets in zip(self, reading.targets, strict=True)
        ]
        return replace(reading, targets=targets)

    def after_step(self) -> None:
        """After a training step that was not skipped."""
        for objective in self:
            objective.after_step()

    def state(self) -> dict[str, Tensor]:
        """What checkpoints hold of the objectives beside their heads, by OBJECTIVE.NAME; see `Objective.state`."""
        return {f"{each.name}.{name}": value for each in self for name, value in each.state().items()}

    def with_second(
        self,
        reading: Reading,
        batches: Sequence[MicroBatch],
        number: int,
        step: int,
        made: Callable[[SecondPass], None],
    ) -> Reading:
        """The reading of micro-batch `number` of a step's, on the host, with what its second passes are to be. `made`
        is told of each when it has been made."""

        def second(objective: Objective) -> SecondPass:
            made(found := objective.second(batches, number, step, reading.selection.rows.device))
            return found

        return replace(reading, second={n: partial(second, each) for n, each in enumerate(self) if each.second_pass})

    def first_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The initial value of a parameter, float32 on the CPU: a function of (seed, name), or a constant."""
        constants = self._of_heads("constants")
        return torch.full(shape, constants[name]) if name in constants else initial_value(name, shape, self.model, seed)

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Canonical name -> interval of the parameters that every step leaves in one."""
        return self._of_heads("bounds")

    def _of_heads(self, of: str) -> dict[str, Any]:
        values: dict[str, Mapping[str, Any]] = {objective.name: getattr(objective, of) for objective in self}
        return {f"objective_heads.{own}.{name}": value for own, some in values.items() for name, value in some.items()}

    @property
    def second_pass(self) -> bool:
        """Whether any of them reads a pass of its own."""
        return any(objective.second_pass for objective in self)

    @property
    def coded(self) -> set[str]:
        """Streams for some of whose images an image tokenizer has to run, or codes to be looked up."""
        return set().union(*(objective.coded for objective in self))

    def build(self) -> BEiT3:
        """The model with all heads, on the meta device, frozen but for `train_only`."""
        model = BEiT3(self.model, device="meta")
        with torch.device("meta"):
            heads = {objective.name: head for objective in self if (head := objective.head()) is not None}
        if heads:
            model.objective_heads = nn.ModuleDict(heads)
        freeze(model, self.run.train_only)
        return model

    @cached_property
    def trained(self) -> frozenset[str] | None:
        """Names of the parameters that are trained, where some are frozen."""
        named = self.build().named_parameters() if self.run.train_only else ()
        return frozenset(name for name, parameter in named if parameter.requires_grad) or None

    def counts(self, batch: MicroBatch) -> list[int]:
        """[K]: targets of each loss in a micro-batch, and of each data set's share."""
        whole = [count for objective in self for count in objective.counts(batch)]
        return whole + [
            int((own * (sets == number)).sum())
            for loss, sets, own in self._targets_by_sample(batch)
            for number in range(len(self._sets[loss]))
        ]

    def _targets_by_sample(self, batch: MicroBatch) -> list[tuple[Loss, Tensor, Tensor]]:
        """Each loss that is told apart, with the data set and the targets of each sample of its stream, int64 [n]."""
        found = []
        for loss, own in self._apart(lambda objective: objective.targets_by_sample(batch)):
            sets = batch.streams[loss.stream].sets  # a stream whose validation names no sets has none
            found.append((loss, torch.full_like(own, -1) if sets is None else sets, own))
        return found

    def _apart(self, of_losses: Callable[[Objective], Sequence[Tensor]]) -> list[tuple[Loss, Tensor]]:
        """What an objective has for its losses with a stream, of those that are told apart."""
        return [
            (loss, own)
            for objective in self
            if any(loss in self._sets for loss in objective.losses)
            for loss, own in zip(filter(_has_stream, objective.losses), of_losses(objective), strict=True)
            if loss in self._sets
        ]

    def sets_of_targets(self, batch: MicroBatch) -> list[Tensor]:
        """int64 [m] for each loss that is told apart: the data set of each target in a micro-batch."""
        return [sets.repeat_interleave(own) for _, sets, own in self._targets_by_sample(batch)]

    def by_set(self, reading: Reading) -> Tensor:
        """[2, shares]: sums of losses and of correct predictions of each data set, after `sums` of all objectives."""
        each = self._apart(lambda objective: objective.each)
        return torch.stack(
            [
                torch.where(sets == number, of_targets, 0).sum(1)
                for (loss, of_targets), sets in zip(each, reading.sets, strict=True)
                for number in range(len(self._sets[loss]))
            ],
            dim=1,
        )

    def on_host(self, batch: MicroBatch) -> OnHost:
        """What is known of a micro-batch on the host."""
        return self._on_host.setdefault(batch, {}).setdefault((*self._each,), OnHost(self, batch))

    def classes(self, reading: Reading) -> list[tuple[Loss, Tensor]]:
        """Each loss with the classes of its targets in a micro-batch."""
        found = [c for each, targets in zip(self, reading.targets, strict=True) for c in each.classes(targets)]
        return list(zip(self.losses, found, strict=True))

    def head_flops(self, counts: Sequence[float]) -> float:
        """FLOPs of all heads, forward, for so many targets of each loss [K]."""
        return sum(objective.head_flops(own) for objective, own in self._of_each(counts))

    def head_products(self, counts: Sequence[float]) -> list[tuple[str, float]]:
        """`Objective.head_products` of all of them, for so many targets of each loss [K]."""
        return [item for objective, own in self._of_each(counts) for item in objective.head_products(own).items()]

    def _of_each(self, counts: Sequence[float]) -> Iterator[tuple[Objective, Sequence[float]]]:
        """Each objective with the counts of its own losses, of those of all [K]."""
        left = list(counts)
        for objective in self:
            yield objective, left[: len(objective.losses)]
            del left[: len(objective.losses)]

    def laid_out(self, groups: Sequence[Group]) -> TokenLayout:
        """The layout of the views' groups."""
        if self.multiple == 1:
            return TokenLayout(tuple(groups))
        vary = [view.kind for view in self.views if view.text and (view.stream == "pairs" or self.fullest is not None)]
        return TokenLayout(fill(groups, sorted({*vary}), self.multiple, self.fullest))

    def keep_shape(self, layout: TokenLayout) -> None:
        """From now on micro-batches have at least as many words, where they are to have one shape."""
        if self.fullest is not None:
            *_, captions, texts = layout.segments
            for kind, words in {1: captions, 2: texts}.items():
                self.fullest[kind] = max(words, self.fullest.get(kind, 0))

    def largest(self, data_parallel: int) -> tuple[TokenLayout, float]:
        """For a pipeline's stages: the layout of a rank's micro-batch with all texts at full length, and about the
        FLOPs of all heads in it, forward and backward."""
        samples = dict(zip(STREAMS, self.run.micro_batch(data_parallel), strict=True))
        lengths = {"texts": self.run.data.text_length, "pairs": self.run.data.caption_length}
        groups = [
            group(samples[v.stream], v.image * (1 + self.model.patches), None, lengths[v.stream] if v.text else 0)
            for v in self.views
        ]
        flops = 3 * sum(each.head_flops(each.expected_counts(samples, self.run)) for each in self)
        return self.laid_out(groups), flops

    def prepare(
        self,
        batch: MicroBatch,
        device: torch.device,
        codes: Codes | None = None,
        embeds: bool = True,
        reads: bool = True,
    ) -> tuple[MixedInputs, Reading | None, Tensor]:
        """Inputs, what is read, and sample ids [samples of all groups] on `device`, of a micro-batch on the host.

        `codes`: visual ones, or what makes them of the images that need some. `embeds`: this process needs the inputs
        themselves, not only their layout. `reads`: it needs the targets; else they are None. Every index is made on the
        host, so that the device never has to be waited for.
        """

        def move(tensor: Tensor) -> Tensor:
            return to_device(tensor, device)

        known, seen = self.on_host(batch), SeenImages(batch, device, codes)
        inputs = MixedInputs(
            images=normalized(self._images(batch, seen, device) if embeds else torch.zeros(0, device=device)),
            words=move(known.layout.packed([_text(batch, v) for v in self.views if v.text]) if embeds else NONE),
            layout=known.layout.to(device),
            image_mask=self._image_mask(batch, move) if embeds else None,
        )
        views = iter(self.views)
        of_groups = [NONE.new_zeros(1) if g.filler else _ids(batch, next(views)) for g in known.layout.groups]
        ids = move(torch.cat(of_groups))
        if not reads:
            return inputs, None, ids
        rows, united = known.rows, known.united
        targets = [objective.targets(batch, known.places, seen, move) for objective in self]
        own = [None if len(rows) == 1 else move(torch.searchsorted(united, some)) for some in rows]
        sets = [move(sets) for sets in self.sets_of_targets(batch)]
        return inputs, Reading(Selection(move(united), known.read), own, targets, sets=sets), ids

    def _images(self, batch: MicroBatch, seen: SeenImages, device: torch.device) -> Tensor:
        """uint8 [images of all views, 3, S, S]."""
        wanted = [view.stream for view in self.views if view.image]
        if not wanted:
            side = self.model.image_size
            return torch.zeros(0, 3, side, side, dtype=torch.uint8, device=device)
        if wanted == [name for name, samples in batch.streams.items() if samples.images is not None]:
            return seen.model
        return torch.cat([seen.images[name] for name in wanted])

    def _image_mask(self, batch: MicroBatch, move: Any) -> Tensor | None:
        """bool [images of all views, patches]; None where nothing is hidden."""
        views = [view for view in self.views if view.image]
        if not any(view.masked_by for view in views):
            return None
        masks = []
        for view in views:
            samples = batch.streams[view.stream]
            shown = torch.zeros(len(samples), self.model.patches, dtype=torch.bool)
            masks.append(samples.annotations[view.masked_by]["image_mask"] if view.masked_by else shown)
        return move(torch.cat(masks))


def _group(batch: MicroBatch, view: View, model: ModelConfig) -> Any:
    samples = batch.streams[view.stream]
    patches = 1 + model.patches if view.image else 0
    if not view.text:
        return group(len(samples), patches, None)
    assert samples.text is not None and samples.lengths is not None
    lengths, mask = view.lengths(samples), None
    width = int(lengths.max()) if view.ends else samples.text.shape[1]
    if view.prefix_by and not view.ends:
        mask = prefix_mask(patches, width, samples.annotations[view.prefix_by]["prefix"])
    return group(len(samples), patches, torch.arange(width) >= lengths[:, None], width, mask)


def _has_stream(loss: Loss) -> bool:
    return bool(loss.stream)


def _views_of(objectives: Sequence[Objective]) -> list[View]:
    views = dict.fromkeys(view for objective in objectives for view in objective.views)
    return sorted(views, key=lambda view: view.kind)


def _ids(batch: MicroBatch, view: View) -> Tensor:
    """int64 [n]: what the samples draw their drop path by. A caption alone draws for itself: from the paths that both
    sides lack, an image's caption could be told without looking at it."""
    ids = batch.streams[view.stream].ids
    return ~ids if view.stream == "pairs" and not view.image else ids


def _text(batch: MicroBatch, view: View) -> Tensor:
    """int64 [n, L]: the words that the model is shown."""
    samples = batch.streams[view.stream]
    text = samples.annotations[view.masked_by]["text"] if view.masked_by else samples.text
    assert text is not None
    return text[:, : int(view.lengths(samples).max())] if view.ends else text


class PretrainingModule(nn.Module):
    """The model under its objectives.

    Each loss is its sum over the whole step divided by the step's global number of its targets. Means of means would be
    wrong: the numbers differ per rank and micro-batch. A micro-batch therefore contributes `sum / count of the step`,
    and the contributions of all micro-batches and ranks add up to the loss.
    """

    def __init__(self, model: BEiT3, objectives: Objectives, seed: int) -> None:
        super().__init__()
        self.model, self.objectives, self.seed = model, objectives, seed
        self.columns = len(objectives.told)
        """K."""

    def forward(
        self,
        inputs: Any,
        reading: Any = None,
        sample_ids: Any = None,
        step_counts: Tensor | None = None,
        step: int = 0,
        predict: Any = None,
    ) -> Any:
        """The pass over the micro-batch, and those that only then can be made; or, where there is `predict`, what the
        function `inputs` makes of the model.

        Returns its contribution to the step's loss (a scalar to go backward from) and the statistics [2, K]: sums of
        the losses and of correct predictions. `step_counts` [K]: targets of the whole step over all ranks; None: the
        micro-batch is only looked at, and the result is what each of `reading.objectives` sees.
        `sample_ids` [samples of all groups] and `step` key the drop path in training.
        """
        if predict is not None:
            return inputs(self.model)
        inputs = self.with_drop_path(inputs, sample_ids, step)
        hidden_MD = self.model.hidden(inputs, reading.selection)
        if step_counts is not None:
            return self.losses(hidden_MD, reading, step_counts, step)
        read = self._read(reading.objectives or (), hidden_MD, reading)
        return [objective.look(self.model, hidden, targets) for objective, hidden, targets in read]

    def _second(self, objective: Objective, second: SecondPass, step: int) -> Tensor:
        """The sums [2, losses] of an objective's own pass."""
        inputs = self.with_drop_path(second.inputs, second.ids, step)
        return objective.sums(self.model, self.model.hidden(inputs, second.selection), second.targets)

    def _read(
        self, objectives: Iterable[Objective], hidden_MD: Tensor, reading: Reading
    ) -> Iterator[tuple[Objective, Tensor, Any]]:
        """Each objective with the hidden states and the targets of its own tokens."""
        for objective, rows, targets in zip(objectives, reading.rows, reading.targets, strict=True):
            yield objective, hidden_MD if rows is None else hidden_MD.index_select(0, rows), targets

    def with_drop_path(self, inputs: MixedInputs, sample_ids: Tensor, step: int) -> MixedInputs:
        """The inputs with the drop-path factors of this step; unchanged in evaluation."""
        config = self.model.config
        if not self.training or config.drop_path == 0:
            return inputs
        factors = drop_path_factors(sample_ids, seed=self.seed, step=step, layers=config.layers, rate=config.drop_path)
        return replace(inputs, keep=factors)

    def losses(self, hidden_MD: Tensor, reading: Reading, step_counts: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """The contribution to the loss and the statistics [2, K] from the last block's hidden states of the selected
        tokens."""
        objectives = reading.objectives or self.objectives
        read = self._read(objectives, hidden_MD, reading)
        sums = {
            place: objective.sums(self.model, hidden, targets)
            for place, (objective, hidden, targets) in enumerate(read)
            if place not in reading.second
        }
        for place, objective in enumerate(objectives):
            if place in reading.second:  # what the others have made of the first pass may choose its samples
                sums[place] = self._second(objective, reading.second[place](), step)
        statistics = sums[0] if len(sums) == 1 else torch.cat([sums[place] for place in sorted(sums)], dim=1)
        # Weights as Python's numbers: the host would wait for the copy of a tensor to the device.
        losses = zip(objectives.losses, statistics[0], strict=True)
        weighted = torch.stack([loss.weight * value for loss, value in losses])
        told = statistics.detach()
        if reading.sets:
            told = torch.cat([told, objectives.by_set(reading)], dim=1)
        if reading.objectives is None:
            return (weighted / step_counts[: len(weighted)].clamp(min=1)).sum(), told
        names = [loss.name for loss in self.objectives.told]
        places = [names.index(loss.name) for loss in objectives.told]
        of_all = statistics.new_zeros(2, self.columns)
        of_all[:, places] = told
        return (weighted / step_counts[places[: len(weighted)]].clamp(min=1)).sum(), of_all
