"""The description of a fine-tuning run. Defaults are unilm's for BEiT-3 unless a docstring says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from beit3_dist.config import (
    LoadingConfig,
    OptimConfig,
    TrainingConfig,
    expand_home,
    require,
    require_not_negative,
    require_positive,
    require_within,
)
from beit3_dist.tasks.registry import task_class, task_names

Pyramids = Literal["simple", "layers", "adapter"]
Heads = Literal["upernet", "mask2former"]
WRITTEN = 10
"""Words of an answer that is written after a text, </s> counted."""


@dataclass(kw_only=True)
class TaskDataConfig(LoadingConfig):
    """Examples of a downstream task, as unilm's jsonl indexes; tools/build_index.py makes them."""

    train: str | list[str] = ""
    """Index of the training examples (.jsonl), or a list of them (unilm's vqa: [vqa.train.jsonl,
    vqa.trainable_val.jsonl]), or a pattern of tars: itc takes pair shards, as in pretraining, imagenet and
    imagenet_retrieval shards with a .cls member for each image."""
    validation: str | list[str] = ""
    """Index (or indexes, or tars) of the validation examples; empty: no validation."""
    images: str = "."
    """Folder that the image paths of the indexes start from."""
    answers: str = ""
    """vqa and open_vqa: file with one answer a line, in the order of the labels; imagenet, text, text_classification:
    names of the classes (of the latter one alone: a number is told); imagenet_retrieval: their names in words, which
    are the texts."""
    text_length: int = 64
    """Longest text in tokens, <s> and </s> included; longer ones are cut (unilm: 64, captioning 32)."""
    caption_key: str = "caption"
    """itc from tar shards: field of a pair's .json member that holds the caption."""
    min_crop_scale: float = 0.5
    """Smallest area of the random crop as a share of the image (imagenet: 0.08)."""
    scales: list[float] = field(default_factory=lambda: [0.1, 2.0])
    """detection and instance_segmentation: least and greatest longer side of a training image, as a share of the
    model's images: large-scale jitter, of which a square is cut out, or which grey fills up. segmentation: the same of
    the shorter side (0.5 and 2)."""
    photometric: bool = False
    """segmentation: random brightness, contrast, saturation and hue."""
    horizontal_flip: float = 0.5
    """Probability of mirroring an image, each by itself (unilm: 0.5 for all tasks, whatever a text says of left)."""
    rand_augment: str = ""
    """Random changes of a training image: a policy of timm's RandAugment such as rand-m9-mstd0.5-inc1 (imagenet), or
    beit3, unilm's for vqa and captioning: two draws of strength 7. Empty: none."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle (unilm: 0.25)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_home(self, "train", "validation", "images", "answers")
        require(
            self.text_length >= 3, f"data.text_length={self.text_length}: a text needs at least <s>, a word and </s>"
        )
        require_within("(0, 1]", "data.", self, "min_crop_scale")
        require(
            len(self.scales) == 2 and 0 < self.scales[0] <= self.scales[1],
            f"data.scales={self.scales}: the least and the greatest scale, both above 0",
        )
        require_within("[0, 1]", "data.", self, "horizontal_flip", "random_erasing")

    def files(self, train: bool) -> list[str]:
        """The one or more files that `train`, or `validation`, names."""
        given = self.train if train else self.validation
        return [given] if isinstance(given, str) else given

    def pattern(self, train: bool) -> tuple[str, str]:
        """The pattern of tars that `train`, or `validation`, names, and this field. Raises ValueError for several."""
        files, name = self.files(train), "data.train" if train else "data.validation"
        require(len(files) == 1, f"{name}={files}: tars are named by one pattern, such as '{{a,b}}/*.tar'")
        return files[0], name


@dataclass(kw_only=True)
class TaskBatchConfig:
    """Examples per step over all ranks and micro-batches."""

    size: int = 256
    """Examples per step."""
    accumulation: int = 1
    """Micro-batches per step. The contrastive tasks tell each example from all others of its step, and encode every
    micro-batch of several twice, first without gradient (GradCache)."""

    def __post_init__(self) -> None:
        require_positive("batch.", self, "size", "accumulation")


@dataclass(kw_only=True)
class TaskEvalConfig:
    """Validation: the task's own metric on every example of `data.validation`."""

    every: int = 0
    """Steps between validations; 0: only after the last step."""
    beams: int = 3
    """captioning and open_vqa: width of the beam search."""
    length_penalty: float = 0.6
    """captioning and open_vqa: exponent of the length that a text's log-probability is divided by."""
    caption_metrics: list[str] = field(default_factory=lambda: ["exact_match"])
    """captioning: any of exact_match, bleu4, cider (need pycocoevalcap), meteor, spice (need Java as well)."""
    batch: int = 0
    """Examples per rank and forward; 0: the training's micro-batch."""
    rerank: int = 128
    """retrieval_matching: so many of the images that are most similar to a text, and of the texts to an image, are put
    in order by matching (ALBEF: 128 on Flickr30k, 256 on COCO); 0: similarity alone."""

    detections: int = 100
    """detection and instance_segmentation: most of an image (COCO: 100, LVIS: 300)."""
    least_score: float = 0.05
    """The same: of what counts as a detection (EVA-01, with soft_nms: 0)."""
    soft_nms: float = 0.0
    """The same: overlap from which a better box lowers the scores of others, by Soft-NMS (EVA-01: 0.6); 0: those that
    it overlaps by more than half are left out."""
    maskness: bool = False
    """instance_segmentation: a mask's score is its box's times the mean probability within it (EVA-01)."""
    stride: int = 0
    """segmentation: pixels from one window of the model's size to the next, on an image whose shorter side is the
    model's; 0: two thirds of a window."""
    flip: bool = False
    """segmentation, detection, instance_segmentation: images are seen mirrored, too."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """The same: sizes at which images are seen, of their usual one."""
    pictures: int = 4
    """segmentation, detection, instance_segmentation: so many of the first images are shown to the `trackers` with what
    is there and what was told."""

    def __post_init__(self) -> None:
        require_not_negative("eval.", self, "every", "batch", "rerank", "stride", "pictures")
        require_positive("eval.", self, "beams", "detections")
        require_within("[0, 1)", "eval.", self, "least_score", "soft_nms")
        require(
            bool(self.scales) and all(scale > 0 for scale in self.scales),
            f"eval.scales={self.scales}: one or more numbers above 0",
        )


@dataclass(kw_only=True)
class DenseConfig:
    """segmentation, detection, instance_segmentation: what stands on the vision experts. A model folder keeps it."""

    window: int = 0
    """Patches of a side of the squares that attention stays in; 0: it sees the whole image (ViTDet: 14, EVA-01: 16)."""
    global_blocks: int = 4
    """Blocks between that see the whole image, where there is a window."""
    pyramid: Pyramids = "simple"
    """segmentation: where its four maps come from: the last block (ViTDet), four blocks (BEiT), or ViT-Adapter, which
    learns beside the blocks."""
    head: Heads = "upernet"
    """segmentation: what makes classes of them."""
    channels: int = 256
    """Of the four maps (but for pyramid=layers and adapter, where they have the model's width), and of what heads make
    of them."""
    queries: int = 100
    """segmentation by mask2former: masks that are told."""
    proposals: int = 1000
    """detection and instance_segmentation: boxes of an image that heads are given."""
    regions: int = 512
    """The same: those of a training image that they learn from."""
    cascade: bool = False
    """detection and instance_segmentation: three heads for boxes, each on those of the one before (Cascade R-CNN)."""

    def __post_init__(self) -> None:
        require_not_negative("dense.", self, "window")
        require_positive("dense.", self, "global_blocks", "channels", "queries", "proposals", "regions")
        for name, given, known in (("pyramid", self.pyramid, get_args(Pyramids)), ("head", self.head, get_args(Heads))):
            require(given in known, f"dense.{name}={given!r} is not one of {', '.join(known)}")
        require(
            self.head == "upernet" or self.channels % 8 == 0,
            f"dense.channels={self.channels}: mask2former has 8 attention heads: give a multiple of 8",
        )


def _fine_tuning_optimizer() -> OptimConfig:
    return OptimConfig(
        lr=3e-5, min_lr=1e-6, warmup_steps=0, weight_decay=0.01, beta1=0.9, beta2=0.98, eps=1e-8, clip_norm=0.0
    )


def _those_with(trait: str) -> str:
    """The tasks that have a trait, in words."""
    return ", ".join(name for name in task_names() if getattr(task_class(name), trait))


@dataclass(kw_only=True)
class FinetuneConfig(TrainingConfig):
    """A fine-tuning run."""

    task: str
    """What to train for: one of those above, or a plugin's."""
    data: TaskDataConfig
    """Examples."""
    epochs: float = 0.0
    """Passes over the training examples; above 0 it sets `steps`."""
    warmup_epochs: float = 0.0
    """Passes of the linear warm-up; used with `epochs`, where it sets optim.warmup_steps."""
    head_lr_scale: float = 1.0
    """imagenet, vqa, nlvr2, text and text_classification: factor of the learning rate of the head, the pooler or norm
    before it left out (unilm: 20 for vqa)."""
    label_smoothing: float = 0.1
    """Tasks of classes or of writing, without mixing: probability spread over all classes."""
    name_smoothing: float = 0.0
    """imagenet_retrieval: the same, over all examples of the step (the paper's giant: 0.1)."""
    mixup: float = 0.0
    """imagenet: alpha of Mixup (unilm: 0.8)."""
    cutmix: float = 0.0
    """imagenet: alpha of CutMix (unilm: 1.0)."""
    caption_mask_ratio: float = 0.7
    """captioning: share of a caption's words, <s> and </s> counted, that are masked and recovered (unilm: 0.7)."""
    drop_worst_ratio: float = 0.2
    """captioning: share of a micro-batch's masked words, those with the greatest losses over all ranks, that do not
    count (unilm: 0.2, of each rank's words for themselves)."""
    drop_worst_after: int = 12_000
    """captioning: steps in which all words count; then the worst are dropped."""
    evaluate_only: bool = False
    """Only the validation of what the run would start from, a fine-tuned model: `init_from`, or OUT's newest checkpoint
    with checkpoint.resume=auto. Its predictions go to OUT/predictions, its scores to OUT/eval.jsonl."""
    batch: TaskBatchConfig = field(default_factory=TaskBatchConfig)
    """Examples per step."""
    optim: OptimConfig = field(default_factory=_fine_tuning_optimizer)
    """The optimizer and its schedule."""
    eval: TaskEvalConfig = field(default_factory=TaskEvalConfig)
    """Validation."""
    dense: DenseConfig = field(default_factory=DenseConfig)
    """segmentation, detection and instance_segmentation: backbone and head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        task = task_class(self.task)
        require(bool(self.data.train) or self.evaluate_only, "data.train names no index of training examples")
        require(
            not self.evaluate_only or bool(self.data.validation),
            "evaluate_only: data.validation names no index of examples to evaluate on",
        )
        require(
            not task.writes or not self.model.fusion_layers or self.model.decoder_layers > 0,
            f"model.fusion_layers={self.model.fusion_layers} without model.decoder_layers: task={self.task} needs a "
            "model that writes, and in fusion layers nothing keeps what words look at",
        )
        require(
            task.is_dense or self.dense == DenseConfig(),
            f"dense belongs to {_those_with('is_dense') or 'no task'}, not to task={self.task}: leave its fields alone",
        )
        require(
            not self.dense.window or self.dense.global_blocks <= self.model.layers,
            f"dense.global_blocks={self.dense.global_blocks} exceeds model.layers={self.model.layers}",
        )
        require_not_negative("", self, "epochs", "warmup_epochs", "mixup", "cutmix", "drop_worst_after")
        require(self.warmup_epochs <= self.epochs, f"warmup_epochs={self.warmup_epochs} exceeds epochs={self.epochs}")
        require_positive("", self, "head_lr_scale")
        require_within("[0, 1)", "", self, "label_smoothing", "name_smoothing", "drop_worst_ratio")
        require_within("(0, 1]", "", self, "caption_mask_ratio")
        require(
            self.head_lr_scale == 1 or task.has_classifier,
            f"head_lr_scale={self.head_lr_scale}: task={self.task} has no head of its own classes: leave it at 1",
        )
        require(
            task.mixes or not self.mixes,
            f"mixup={self.mixup} and cutmix={self.cutmix} belong to {_those_with('mixes')}, not to task={self.task}: "
            "leave them at 0",
        )
        require(
            task.needs_names or not self.data.answers,
            f"data.answers belongs to {_those_with('needs_names')}, not to task={self.task}",
        )
        require(
            self.parallel.pipeline == 1 and not self.parallel.sequence,
            "parallel.pipeline and parallel.sequence are for pretraining: a fine-tuned model runs whole on its tensor "
            "ranks; set parallel.pipeline=1 and parallel.sequence=false",
        )
        require(
            self.data.text_length <= self.model.max_text_length,
            f"data.text_length={self.data.text_length} exceeds model.max_text_length={self.model.max_text_length}",
        )
        require(
            not (task.writes and task.reads_text)
            or self.model.decoder_layers > 0  # which has positions of its own
            or self.data.text_length + WRITTEN < self.model.max_text_length,
            f"data.text_length={self.data.text_length} leaves no room in model.max_text_length="
            f"{self.model.max_text_length} for an answer of {WRITTEN} words and <s>",
        )

    @property
    def accumulation(self) -> int:
        return self.batch.accumulation

    @property
    def mixes(self) -> bool:
        """Whether training mixes images."""
        return self.mixup > 0 or self.cutmix > 0

    def micro_batch(self, data_parallel: int) -> tuple[int, ...]:
        parts = data_parallel * self.batch.accumulation
        require(
            self.batch.size % parts == 0,
            f"batch.size={self.batch.size} is not divisible by {data_parallel} data-parallel ranks "
            f"x batch.accumulation={self.batch.accumulation} = {parts}",
        )
        return (self.batch.size // parts,)
