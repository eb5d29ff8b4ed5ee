"""What a frozen teacher is asked for, about the samples of one stream."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm, smooth_l1_loss
from torch.utils.flop_counter import FlopCounterMode

from beit3_dist.config import RunConfig, require, require_not_negative, require_positive
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.order import Stream
from beit3_dist.data.text import TextTokenizer
from beit3_dist.objectives.base import View, grid_of
from beit3_dist.objectives.image_classification import ImageClassification
from beit3_dist.objectives.masked_data_modeling import IMAGE, TEXT, MaskedDataModeling, MaskedDataModelingConfig
from beit3_dist.opening import blaming
from beit3_dist.teachers.beit3 import BEiT3Teacher
from beit3_dist.teachers.build import build_teacher
from beit3_dist.teachers.config import TeacherConfig
from beit3_dist.teachers.vision import TimmClassifier

NAME = "distillation"
SECTION = f"objectives.{NAME}"
BETA = 2.0
"""Where FD's smooth L1 passes from square to straight (Wei et al. 2022b; their code)."""
log = logging.getLogger(__name__)

SIDES = ((Stream.IMAGES, IMAGE), (Stream.PAIRS, IMAGE), (Stream.PAIRS, TEXT), (Stream.TEXTS, TEXT))
"""In the order of their tokens."""


@dataclass(kw_only=True)
class LessonConfig:
    """What is learnt from a teacher of a stream's samples."""

    learns: Literal["nothing", "features", "masked_features", "masked_logits", "classes"] = "nothing"
    """features: its last features of all patches, and of all words where it is a beit3, of whole samples (FD).
    masked_features: the same where masked_data_modeling hides patches and words from the student (EVA, MVP).
    masked_logits: what a beit3 says of hidden patches' codes and hidden words, seeing no more than the student.
    classes: what it says of whole images' classes, learnt by the head of image_classification."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen network. A beit3 teaches both sides of a pair, all others its image."""
    channels: int = 0
    """Of features: how many a token has, which is a width of the student's head; it must be given."""
    compared: Literal["cosine", "smooth_l1"] = "cosine"
    """Features, which are normalised first (LayerNorm without weights, as EVA and FD do). cosine: 1 - cosine (EVA).
    smooth_l1: the mean over channels (FD; its beta is 2)."""
    temperature: float = 1.0
    """Of distributions: both logits are divided by it."""
    weight: float = 1.0
    """Weight of the stream's losses."""

    def __post_init__(self) -> None:
        require_positive(f"{SECTION}: ", self, "temperature", "weight")
        require_not_negative(f"{SECTION}: ", self, "channels")


@dataclass(frozen=True)
class Opened:
    """A teacher on the CPU."""

    network: Any
    flops: int
    """Of one sample, forward; texts at their full length."""


class Lesson:
    """What one stream's teacher is asked for."""

    def __init__(self, stream: Stream, config: LessonConfig, run: RunConfig) -> None:
        self.stream, self.config, self.run, self.name = stream, config, run, f"{SECTION}.{stream.field}"
        learns, kind, what = config.learns, config.teacher.kind, f"{self.name}.learns={config.learns}"
        self.is_beit3 = kind == "beit3"
        self.masked, self.of_features = learns.startswith("masked"), learns.endswith("features")
        kinds = {"masked_logits": ("beit3",), "classes": ("timm", "beit3")}.get(learns, (kind,))
        require(kind in kinds, f"{what}, which {self.name}.teacher.kind={kind} does not say: use {' or '.join(kinds)}")
        require(stream.has_images or self.is_beit3, f"{self.name}.teacher.kind={kind} reads no text: use beit3")
        require(learns != "classes" or stream is Stream.IMAGES, f"{what}: images alone have classes")
        require(
            bool(config.channels) or not self.of_features,
            f"{self.name}.channels=0: give the number of channels of the teacher's features",
        )
        masking = run.objectives.get(MaskedDataModeling.name) or MaskedDataModelingConfig()
        self._ratios = masking.ratios if self.masked else dict.fromkeys(masking.ratios, 1.0)
        reads = [side for of, side in SIDES if of is stream and (side == IMAGE or self.is_beit3)]
        self.sides = [side for side in reads if self._ratios[stream, side] > 0]
        """Those of its samples that are learnt about."""
        require(bool(self.sides), f"{what}: masked_data_modeling hides nothing of {stream.field}")
        hides = MaskedDataModeling.name if self.masked else ""
        self.view = View(stream.field, stream.has_images, stream.has_text, masked_by=hides)

    def opened(self) -> Opened:
        """The teacher. Raises ValueError naming the field where it does not fit."""
        config, model = self.config, self.run.model
        given = config.teacher
        with blaming(self.name):
            if config.learns == "classes" and not self.is_beit3:
                classes = self.run.objectives[ImageClassification.name].classes
                network: Any = TimmClassifier(given.name, given.weights, classes)
            elif self.is_beit3:
                classifier = ImageClassification.name if config.learns == "classes" else ""
                network = BEiT3Teacher(grid_of(model), given.weights, classifier)
                self._check_beit3(network)
            else:
                network = build_teacher(grid=grid_of(model), **asdict(given))
            if self.of_features:
                require(
                    network.channels == config.channels,
                    f"channels={config.channels}, but this teacher's features have {network.channels}",
                )
        size, length = model.image_size, self.words * self.is_beit3
        pixels = torch.zeros(1, 3, size, size) if self.stream.has_images else None
        text = torch.zeros(1, length, dtype=torch.int64) if length else None
        with FlopCounterMode(display=False) as counter:
            self.ask(network, pixels, text, None if text is None else text.bool(), None)
        flops = counter.get_total_flops()
        log.info("%s: its teacher takes %.3g GFLOP a sample, which records leave out", self.name, flops / 1e9)
        return Opened(network, flops)

    @property
    def words(self) -> int:
        """Tokens of its samples' texts at most."""
        data = self.run.data
        return {Stream.IMAGES: 0, Stream.TEXTS: data.text_length, Stream.PAIRS: data.caption_length}[self.stream]

    def tokens(self, side: str) -> float:
        """About how many of a sample's tokens are learnt about."""
        if self.config.learns == "classes":
            return 1
        return self._ratios[self.stream, side] * (self.run.model.patches if side == IMAGE else self.words)

    def _check_beit3(self, network: BEiT3Teacher) -> None:
        ours, theirs, learns = self.run.model, network.model.config, self.config.learns
        network.require_groups("the final norm", *(["the language side"] if self.stream.has_text else []))
        if self.stream.has_text:
            most = theirs.max_text_length
            require(most >= self.words, f"its texts have at most {most} tokens, {self.stream.field} have {self.words}")
            own, other = TextTokenizer(self.run.text_tokenizer), network.text_tokenizer
            require(
                theirs.vocab_size == ours.vocab_size
                and (other is None or TextTokenizer(str(other)).fingerprint == own.fingerprint),
                f"teacher.weights: {network.path} has another text tokenizer than this run",
            )
        if learns == "classes":
            classes, found = self.run.objectives[ImageClassification.name].classes, network.tells_apart
            require(found == classes, f"the teacher tells {found} classes apart, this run {classes}")
        if learns != "masked_logits":
            return
        for side in self.sides:
            network.require_groups("the mask token", "the image head" if side == IMAGE else "the text head")
            if side == IMAGE:
                require(
                    theirs.patches == ours.patches and theirs.visual_vocab_size == ours.visual_vocab_size,
                    f"the teacher tells {theirs.visual_vocab_size} codes of {theirs.patches} patches apart, this run "
                    f"{ours.visual_vocab_size} of {ours.patches}",
                )

    def ask(
        self, network: Any, pixels: Tensor | None, text: Tensor | None, padding: Tensor | None, hidden: Tensor | None
    ) -> Tensor:
        """Of n samples [n, tokens, channels], patches before words; of classes logits [n, classes]. `pixels` in [0, 1];
        `hidden`: masked patches, where the teacher does not see them either."""
        if self.config.learns == "classes":
            return network.classes(pixels) if self.is_beit3 else network(pixels)
        if not self.is_beit3:
            return network(pixels)
        if self.of_features:
            return network.features_of(pixels, text, padding)
        found = network.hidden(pixels, text, padding, hidden)
        return found[:, 1:] if self.stream.has_images else found

    def mask(self, side: str, batch: MicroBatch) -> Tensor:
        """bool [n, patches or L]: the tokens that are learnt about."""
        samples = batch.streams[self.stream.field]
        if self.masked:
            return samples.annotations[MaskedDataModeling.name][f"{side}_mask"]
        if side == IMAGE:
            return torch.ones(len(samples), self.run.model.patches, dtype=torch.bool)
        assert samples.text is not None and samples.lengths is not None
        return torch.arange(samples.text.shape[1]) < samples.lengths[:, None]


def normalised(features: Tensor) -> Tensor:
    """Features [m, channels], each by its own mean and deviation, fp32."""
    return layer_norm(features.float(), features.shape[1:])


def distance(features: Tensor, target: Tensor, compared: str) -> Tensor:
    """[m]: how far features [m, channels] are from normalised ones; `LessonConfig.compared`."""
    if compared == "cosine":
        return 1 - cosine_similarity(features, target)
    return smooth_l1_loss(features, target, reduction="none", beta=BETA).mean(1)
