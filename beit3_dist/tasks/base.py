"""What a downstream task has to define, and the objective that trains any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from beit3_dist.checkpoint.model_folder import TASK_HEAD
from beit3_dist.config import ModelConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.model.drop_path import drop_path_factors
from beit3_dist.parallel.replicas import ALONE, Replicas
from beit3_dist.tasks.config import DenseConfig, FinetuneConfig
from beit3_dist.tasks.data.augmentation import Views
from beit3_dist.tasks.data.batches import class_labels
from beit3_dist.tasks.data.examples import Example, Record, Rules, read_index
from beit3_dist.tasks.parts.heads import FineTuned, TaskHead

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and deviation of the channels that pretraining normalises by."""


class Normalization:
    """Images uint8 [..., 3, S, S] on a device -> fp32: (x / 255 - mean) / deviation, channel by channel."""

    def __init__(self, statistics: tuple[tuple[float, ...], tuple[float, ...]], device: torch.device) -> None:
        self._mean, self._deviation = (torch.tensor(v, device=device).view(3, 1, 1) for v in statistics)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self._mean) / self._deviation


@dataclass(frozen=True)
class TaskInputs:
    """A micro-batch of B examples on the device."""

    images: Tensor
    """[B, k, 3, S, S], normalised; k images an example."""
    words: Tensor
    """int64 [B, L]."""
    padding: Tensor
    """bool [B, L], on the host: layouts are made there."""
    labels: Any
    """What the task's `labels` made; no prediction looks at them."""
    keys: Tensor
    """int64 [B]: what each sample draws its drop path by."""
    targets: Tensor | None = None
    """int64 [B, L]: what the task's `mask` wants recovered, -1 elsewhere."""
    told: Tensor | None = None
    """`told_places` of the targets, on the device."""
    step: int = 0
    """Steps of training before this one."""
    keep: Callable[[Tensor], Tensor | None] = lambda keys: None
    """keys int64 [S] -> drop-path factors [layers, 2, S]; None in evaluation."""
    looked: Any = None
    """What `Task.looked` found out for this micro-batch, where the step has several and the task looks ahead."""
    agree: Callable[[bool], bool] = lambda done: done
    """Whether all ranks are done, for predictions in as many steps as it takes."""
    again: bool = False
    """Whether these are examples that `Task.refined` has asked for."""


class Task(ABC):
    """A downstream use, in one file: what it reads, its head, loss, predictions and score, and how it is used.
    `registry.register` names it. A model folder remembers the name, and `inference.Model` finds the task by it."""

    name: ClassVar[str]
    """What `task:` calls it; `register` sets it."""

    # What it takes.
    images: ClassVar[int] = 1
    """Images of an example."""
    reads_text: ClassVar[bool] = False
    """Whether a prediction depends on a text."""
    statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = HALF
    """Mean and deviation that images are normalised by."""
    evaluation: ClassVar[Literal["centre", "squash"]] = "squash"
    """Which view of an image is evaluated: `Views.evaluation`."""
    needs_names: ClassVar[bool] = False
    """Whether data.answers names what the task tells apart, its answers or classes."""
    keeps_names: ClassVar[bool] = False
    """Whether a model without these names is of no use."""
    one_prediction: ClassVar[str] = ""
    """Field of the index of which the benchmark takes one prediction each; empty: names may come several times."""
    usual_text_length: ClassVar[int | None] = None
    """Longest text of a model whose folder does not say; None: as long as the model allows."""

    writes: ClassVar[bool] = False
    """Whether its model writes words one after the other."""

    is_dense: ClassVar[bool] = False
    """Whether it says something of every place of an image. Its `head` then takes a third argument, the config's
    section `dense`, and `network` builds it by that."""

    summed: ClassVar[bool] = False
    """Whether the predictions of all examples are added up, and their sum [1, ...] is what is scored."""

    # What the training allows.
    has_classifier: ClassVar[bool] = False
    """Whether the head has a part `head` of its own classes, whose rate head_lr_scale changes."""
    mixes: ClassVar[bool] = False
    """Whether Mixup and CutMix may mix its images and labels."""
    contrastive: ClassVar[bool] = False
    """Whether each example is told from all others of its step, image and text each encoded by itself. Where a step has
    several micro-batches, each is encoded twice, the first time for `look`."""
    matched: ClassVar[int] = 0
    """Pairs of each example that a contrastive task encodes beside that, image and text together."""

    pretrained_by: ClassVar[str] = ""
    """The pretraining objective whose models serve for the task without fine-tuning; none where it is inherited."""
    pretrained = False
    """Whether the model is as this objective has left it."""
    serves: ClassVar[tuple[str, ...]] = ()
    """Methods of `inference.Model` that a model of this task has beside `predict`. answer, classify,
    classify_pairs and is_true say `predict` in other words; embed_images, embed_texts and caption are methods of the
    task, too."""

    def __init__(self, config: FinetuneConfig, tokenizer: TextTokenizer | None, classes: Sequence[str] = ()) -> None:
        """`classes`: names of what the head tells apart, where the task has such. `tokenizer`: only a model in use that
        reads and writes no text may lack one."""
        self.config, self.classes, self._tokenizer = config, list(classes), tokenizer
        self.replicas = ALONE
        self.is_last = False
        """Whether the validation that goes on is the last one, whose predictions are written."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """What makes texts token ids. Raises ValueError where a model folder has none."""
        if self._tokenizer is None:
            raise ValueError(f"{self.config.out} has neither tokenizer.spm nor tokenizer.json, which words need")
        return self._tokenizer

    def connect(self, replicas: Replicas) -> None:
        """Learns who works on the step, for losses that look at all its examples."""
        self.replicas = replicas

    # The examples, before any process group.

    def examples(self, train: bool) -> Sequence[Example]:
        """Those of data.train, or of data.validation. Raises ValueError naming what is wrong with them, or missing for
        the task to be trained, or evaluated."""
        data = self.config.data
        return read_index(
            list(map(Path, data.files(train))),
            type(self),
            Path(data.images),
            train=train,
            predicted=not train,
            vocab_size=self.config.model.vocab_size,
            classes=len(self.classes) or None,
        )

    @staticmethod
    @abstractmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        """The example of a line of the index. Raises `Malformed`."""

    @staticmethod
    def files(example: Example) -> tuple[Any, ...]:
        """What lies in files of an example."""
        return example.images

    @staticmethod
    def labels(examples: Sequence[Example], classes: int) -> Any:
        """What `losses` learns from, of a batch: int64 [B] unless the task says otherwise, a tensor or a batch of such.
        `classes`: how many names the task tells apart."""
        return class_labels(examples)

    def views(self) -> Views:
        """How its images are seen."""
        data = self.config.data
        return Views(
            min_crop_scale=data.min_crop_scale,
            horizontal_flip=data.horizontal_flip,
            rand_augment=data.rand_augment,
            erase=data.random_erasing,
            evaluation=self.evaluation,
        )

    def mask(self, words: Tensor, padding: Tensor, keys: list[int]) -> tuple[Tensor, Tensor | None]:
        """What the model reads of a training batch's words [B, L], and what it has to recover. On the host; `keys`: of
        what each sample draws."""
        return words, None

    # The model.

    @classmethod
    @abstractmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead | None:
        """The head on top of the encoder; None: the model's own head for words."""

    @classmethod
    def pretrained_head(cls, config: ModelConfig, weights: Mapping[str, Tensor]) -> TaskHead | None:
        """The head of a model as `pretrained_by` has left it, on the meta device: of this objective's own weights."""
        return cls.head(config, 0)

    @classmethod
    def network(
        cls,
        config: ModelConfig,
        classes: int = 0,
        dense: DenseConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> FineTuned:
        """The model with the task's head; `device="meta"` takes no memory, else values are those of (seed, name)."""
        built_by: Any = (dense or DenseConfig(),) if cls.is_dense else ()
        with torch.device("meta"):
            head = cls.head(config, classes, *built_by)
        return FineTuned(config, head, seed=seed, device=device)

    def bounds(self, config: ModelConfig) -> dict[str, tuple[float, float]]:
        """Canonical name -> interval of the parameters that every step of training leaves in one."""
        with torch.device("meta"):
            head = self.head(config, len(self.classes))
        return {} if head is None else {f"{TASK_HEAD}{name}": interval for name, interval in head.bounds.items()}

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "classes": len(self.classes),
            "answers": self.classes,
            "text_length": self.config.data.text_length,
            **({"dense": asdict(self.config.dense)} if self.is_dense else {}),
        }

    def logits(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """What the head makes of each example's one image and its text, as far as the task reads them: [B, ...]."""
        image = inputs.images[:, 0] if self.images else None
        words, padding = (inputs.words, inputs.padding) if self.reads_text else (None, None)
        return model.task_head(model.encode(image, words, padding, keep=inputs.keep(inputs.keys)))

    @abstractmethod
    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """[2, M]: losses, and how right each prediction is in [0, 1]; M = B, or the words of captions."""

    def look(self, model: FineTuned, inputs: TaskInputs) -> Any:
        """What a contrastive task has to know of every micro-batch of the step before the losses of the first one.
        Nothing here has a gradient."""
        raise NotImplementedError

    def looked(self, found: list[Any]) -> list[Any]:
        """For each micro-batch `TaskInputs.looked`, from what `look` gave of each."""
        raise NotImplementedError

    @abstractmethod
    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """[B, ...]: what `score` needs, of one shape for all batches."""

    @property
    def outcomes(self) -> Sequence[Any]:
        """What `logits` has a number for, one each; none where its numbers mean nothing else."""
        return self.classes

    def chances(self, logits: Tensor) -> Tensor:
        """Logits [B, outcomes] as how likely each outcome is, in [0, 1]."""
        return logits.softmax(1)

    # The predictions [N, ...] of all examples, on the CPU.

    def refined(
        self, predictions: Tensor, examples: Sequence[Example], predict: Callable[[Sequence[Example]], Tensor]
    ) -> Any:
        """What is scored and written, where that needs another look at examples once the predictions of all are known:
        `predict` gives those of `predict_again`. Collective."""
        return predictions

    def predict_again(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """As `predict`, of the examples that `refined` asks for."""
        raise NotImplementedError

    def results(self, predictions: Tensor) -> list[Any]:
        return predictions.tolist()

    @abstractmethod
    def score(self, predictions: Any, examples: Sequence[Example]) -> dict[str, float]:
        """The metrics, of predictions in the examples' order. Examples without a truth (an index for a test server) do
        not count; none where no example has one."""

    def shown(self) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
        """Images uint8 [3, H, W] and texts by name, of the last validation on this rank, for trackers."""
        return {}, {}

    @abstractmethod
    def write_predictions(self, folder: Path, predictions: Any, examples: Sequence[Example]) -> None:
        """Writes them into a folder in the benchmark's submission format."""


class TaskObjective(nn.Module):
    """A model under a task's loss: the mean over the step's examples (captioning: masked words), in any layout."""

    columns = 1
    """Losses that the statistics tell apart."""

    def __init__(self, model: FineTuned, task: Task, seed: int) -> None:
        super().__init__()
        self.model, self._task, self._seed = model, task, seed

    def forward(
        self,
        inputs: TaskInputs,
        step_counts: Tensor | None = None,
        step: int = 0,
        predict: Callable[[bool], bool] | None = None,
    ) -> Any:
        """The micro-batch's contribution to the step's loss, and the statistics [2, 1]: sums of losses and of right
        predictions. `step_counts` [1]: what the sum is divided by; None: the micro-batch is only looked at, and the
        result is what the task sees. With `predict`, which tells whether all ranks are done, the task's predictions."""
        if predict is not None:
            look = self._task.predict_again if inputs.again else self._task.predict
            return look(self.model, replace(inputs, agree=predict))
        config = self.model.config
        inputs = replace(inputs, step=step)
        if self.training and config.drop_path > 0:
            drawn = partial(drop_path_factors, seed=self._seed, layers=config.layers, rate=config.drop_path)
            inputs = replace(inputs, keep=partial(drawn, step=step))
        if step_counts is None:
            return self._task.look(self.model, inputs)
        sums = self._task.losses(self.model, inputs).sum(1)
        return sums[0] / step_counts[0].clamp(min=1), sums.detach()[:, None]


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """float [B]: 1 where the largest logit is the label's."""
    return (logits.argmax(-1) == labels).float()


def told_places(targets: Tensor) -> Tensor:
    """int64 [M]: places of the M words of [B * L] that have one of the targets [B, L], which lie on the host: it would
    wait for a device's."""
    return (targets.flatten() >= 0).nonzero().squeeze(1)


def cross_entropies(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """[2, B] of logits [B, classes] and classes int64 [B] (or probabilities [B, classes]), in fp32."""
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return torch.stack([losses, hits(logits, labels if labels.ndim == 1 else labels.argmax(-1))])
