"""Using a model: embeddings of images and texts, answers to questions, captions, classes.

    from beit3_dist.inference import Model
    model = Model.load("FOLDER")                        # device="cuda:1", precision="bf16"
    model.embed_images(["a.jpg", "b.png"])              # retrieval: unit vectors [2, D]
    model.embed_texts(["a red circle"])                 # retrieval: unit vectors [1, D]
    model.match(["a.jpg"], ["a red circle"])            # retrieval, of a model that was pretrained by matching: [1]
    model.answer(["a.jpg"], ["what shape is this?"])    # vqa, open_vqa: one answer for each image and its question
    model.caption(["a.jpg"])                            # captioning
    model.classify(["a.jpg"])                           # imagenet: images; text, text_classification: sentences
    model.classify_pairs(["it rains"], ["it is wet"])   # text_classification: pairs of sentences
    model.is_true([("a.jpg", "b.png")], ["both are red"])   # nlvr2: a sentence about two images
    model.detect(["a.jpg"])                             # detection, instance_segmentation: boxes, scores, masks
    model.segment(["a.jpg"])                            # segmentation: the class of each pixel, a matrix an image
    model.predict(images=["a.jpg"])                     # any task, one of a plugin that is imported too
    model.answer(images, questions, top=5)              # so classify, ...: the likeliest ones with their scores

A model that was only pretrained serves for the task that one of its objectives has taught it: captioning after prefix
language modelling, retrieval after contrast. Where there are several, `Model.load(FOLDER, task="captioning")` says
which. And it is of use as masking has left it, with a task or without:

    model.features(["a.jpg"]), model.text_features(["a red circle"])          # of any model: [1, D]
    model.fill_words(["a red [MASK]"], images=["a.jpg"], top=5)               # the likeliest words, with their scores
    model.fill_patches(["a.jpg"], hidden)                                     # the visual codes of hidden patches
    model.learn_classes(images, ["cat", "dog", ...])(["a.jpg"], top=2)        # by a linear probe, or by neighbours
    model.classify_by_names(["a.jpg"], ["cat", "dog"], top=2)                 # where contrast was learnt

Every method takes lists and gives a result for each place. One image or text that is in no list is refused: a text is a
sequence of letters, too. An image is a path, a file:// or https:// address, a PIL image or an array uint8 [height,
width, 3]. It is seen as in the validation of the model's task: whole, squashed to the model's square, and for the
classes of images its largest centred square.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3_dist.checkpoint.model_folder import (
    OBJECTIVE_HEADS,
    TASK_HEAD,
    ModelFolder,
    check_blocks,
    read_model_folder,
)
from beit3_dist.config import DataConfig, require
from beit3_dist.data.addresses import fetched, is_address, local_file
from beit3_dist.data.faults import BadSample
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.text_files import require_text
from beit3_dist.data.transforms import decode, largest_file, normalised, read_image
from beit3_dist.devices import device_type
from beit3_dist.model.head import Head
from beit3_dist.objectives.matching import Matching, MatchingHead
from beit3_dist.tasks.base import HALF, Normalization, Task, TaskInputs
from beit3_dist.tasks.config import DenseConfig, FinetuneConfig, TaskDataConfig
from beit3_dist.tasks.data.augmentation import Views
from beit3_dist.tasks.data.batches import padded_words
from beit3_dist.tasks.parts.frozen import frozen_features, names_as_vectors, neighbours_votes, probe_scores
from beit3_dist.tasks.parts.heads import FineTuned, NoNorm
from beit3_dist.tasks.registry import pretrained_tasks, task_class, task_names
from beit3_dist.tasks.retrieval import match_logits
from beit3_dist.tasks.text_classification import pair_words

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
Text = str | tuple[str, str]
"""A text, or a pair of texts that are read as one."""
IMAGE_TYPES = (str, os.PathLike, Image.Image, np.ndarray)

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

IMAGES_AT_ONCE, TEXTS_AT_ONCE, WINDOWS_AT_ONCE = 32, 256, 4
MATCH_HEAD = "match_head."
"""Prefix of the weights of matching's head, beside that of the task."""
HIDDEN = "[MASK]"
"""What stands for a hidden word, one piece of the text tokenizer, in the texts of `Model.fill_words`."""

_T = TypeVar("_T")


class Guess(NamedTuple):
    """One of several things that may be, and how likely the model takes it for."""

    what: Any
    """An answer, a class, a word, or whether a sentence is true."""
    score: float
    """In [0, 1]. Of one question they sum up to 1 over all that may be, but for answers (vqa), of which several may be
    right, and votes of neighbours."""


def open_image(image: ImageLike, max_pixels: int = DataConfig.max_pixels) -> Image.Image:
    """The image upright and in RGB. Raises one-line errors: OSError for a file that cannot be read, ValueError for
    one that holds no image, or one of more than `max_pixels` pixels (an image bomb)."""
    try:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"an array must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
            return Image.fromarray(image)
        if isinstance(image, Image.Image):
            return normalised(image, max_pixels)
        if isinstance(image, str) and is_address(image):
            file = local_file(image)
            if file is None:
                return decode(fetched(image, largest_file(max_pixels)), max_pixels)
            return read_image(file, max_pixels)
        return read_image(image, max_pixels)
    except BadSample as bad:
        name = f"{os.fspath(image)}: " if isinstance(image, str | os.PathLike) else ""
        raise ValueError(f"{name}{bad}") from None


class Model:
    """A model on one device. What it can be asked depends on its task, and on the heads that it has; the rest is a
    ValueError."""

    def __init__(
        self, network: FineTuned, task: Task | str, name: str, tokenizer: TextTokenizer | None, classes: int = 0
    ) -> None:
        """`task`: or why it has none. `name`: what errors call it. `classes`: that its head tells apart."""
        self.network, self.name, self.classes = network.requires_grad_(False).eval(), name, classes
        self._task, self._tokenizer = task, tokenizer
        weight = next(network.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._pretrained_view = Views(evaluation="centre"), Normalization(HALF, self.device)
        self._view, self._longest = self._pretrained_view, network.config.max_text_length
        if isinstance(task, Task):
            self._view = task.views(), Normalization(task.statistics, self.device)
            self._longest = task.config.data.text_length

    @property
    def task(self) -> Task:
        """What it was fine-tuned for, or serves for as it is. Raises ValueError where that is nothing, or several."""
        if isinstance(self._task, str):
            raise ValueError(self._task)
        return self._task

    @property
    def tokenizer(self) -> TextTokenizer:
        """What makes texts token ids. Raises ValueError where the model folder has none."""
        if self._tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer.spm, which words need")
        return self._tokenizer

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        device: torch.device | str | None = None,
        task: str | None = None,
        precision: Precision = "fp32",
    ) -> Model:
        """The model of a folder, or of a fine-tuning run's. `device`: the first GPU where there is one, unless said
        otherwise. `task`: which one a pretrained model is to serve for; needed for what several could be meant by.
        `precision`: of its weights and of what it computes.

        Raises FileNotFoundError or ValueError with one line where the folder holds no model, or none of this task, and
        ValueError where there is no such device, or a GPU that cannot be used and nobody has said to do without.
        """
        device = _usable(device)
        return cls.of(read_model_folder(Path(folder)), os.fspath(folder), device, task, precision)

    @classmethod
    def of(
        cls,
        content: ModelFolder,
        name: str,
        device: torch.device | str | None = None,
        task: str | None = None,
        precision: Precision = "fp32",
    ) -> Model:
        """As `load`, of what was read from a folder or a file, which errors call `name`."""
        device = _usable(device)
        require(precision in DTYPES, f"precision={precision!r}: it is one of {', '.join(DTYPES)}")
        pretrained = content.task is None
        content, without = _with_task(content, name, task)
        tokenizer = None
        if content.text_tokenizer is not None:
            tokenizer = TextTokenizer(str(content.text_tokenizer))
            tokenizer.check_vocab(content.config.vocab_size)
        if content.task is None:
            return cls(_bare_network(content, name).to(device, DTYPES[precision]), without, name, tokenizer)
        network, found = _network_and_task(name, content, tokenizer, pretrained)
        return cls(network.to(device, DTYPES[precision]), found, name, tokenizer, content.task.get("classes", 0))

    def predict(self, images: Sequence[Any] = (), texts: Sequence[str] = ()) -> list[Any]:
        """What the model's task says of each sample: `Task.results`. `images`: those of each sample, a sequence where
        the task has several; `texts`: that of each sample. What the task does not read is left out."""
        several, task = self.task.images > 1, self.task
        per_sample = [_images(one) if several else _images([one]) for one in _listed(images, "images")]
        listed = _texts(texts)
        for given, reads, what in ((per_sample, task.images > 0, "images"), (listed, task.reads_text, "texts")):
            if given and not reads:
                raise ValueError(f"{self.name} was fine-tuned for {task.name}, which reads no {what}")
        if wrong := [len(some) for some in per_sample if len(some) != task.images]:
            raise ValueError(f"a sample of {task.name} has {task.images} images, not {wrong[0]}")
        if task.images and task.reads_text and len(per_sample) != len(listed):
            raise ValueError(f"{len(per_sample)} samples' images and {len(listed)} texts: each sample has both")
        if "detect" in task.serves:
            return self.detect([image for (image,) in per_sample])
        if "segment" in task.serves:
            return self.segment([image for (image,) in per_sample])
        return self._results(per_sample, listed)

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Unit vectors of images, fp32 [N, D] on the CPU. Their products with texts' vectors are similarities."""
        task, images = self._task_for("embed_images", "embeddings"), _images(images)
        return self._run(lambda some: task.embed_images(self.network, self._pixels(some)), images, IMAGES_AT_ONCE)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, fp32 [N, D] on the CPU. What is longer than the model's texts is cut."""
        task, listed = self._task_for("embed_texts", "embeddings"), _texts(texts)
        return self._run(lambda some: task.embed_texts(self.network, *self._words(some)), listed, TEXTS_AT_ONCE)

    def match(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """How well each text fits the image in the same place, told from both together: the logit of a match less that
        of none, fp32 [N] on the CPU."""
        self._task_for("embed_texts", "matches")
        images, texts = _images(images), _texts(texts)
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: each text needs its image")
        head: Any = getattr(self.network, "match_head", None) or getattr(self.network.task_head, "match", None)
        if head is None:
            raise ValueError(
                f"{self.name} was not pretrained by objectives.matching, nor fine-tuned for retrieval_matching, which "
                "teach what belongs together"
            )

        def matches(rows: Sequence[int]) -> Tensor:
            pixels, (words, padding) = self._pixels([images[r] for r in rows]), self._words([texts[r] for r in rows])
            return match_logits(self.network, head, pixels, words, padding)

        return self._run(matches, range(len(texts)), IMAGES_AT_ONCE)

    def answer(self, images: Sequence[ImageLike], questions: Sequence[str], *, top: int | None = None) -> list[Any]:
        """The likeliest of the model's answers to each question about the image in the same place. `top`: so many of
        them instead, as `Guess`es, the likeliest first; so in the methods below."""
        self._task_for("answer", "answers")
        images, questions = _images(images), _texts(questions, "questions")
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images and {len(questions)} questions: each question needs its image")
        return self._results([[image] for image in images], questions, top)

    def classify(self, samples: Sequence[ImageLike], *, top: int | None = None) -> list[Any]:
        """The likeliest class of each image or sentence, whichever the model's task reads, or the number that it tells
        of a sentence."""
        if self._task_for("classify", "classes").images:
            return self._results([[image] for image in _images(samples)], [], top)
        return self._results([], _texts(samples), top)

    @torch.inference_mode()
    def detect(self, images: Sequence[ImageLike]) -> list[Any]:
        """The objects in each image, `tasks.parts.average_precision.Detections`: boxes in the image's pixels, scores,
        labels, which are numbers of `model.task.classes`, and masks, of a model that draws them; best first."""
        task, found = self._task_for("detect", "objects in images"), []
        none = torch.empty(0, dtype=torch.int64)
        for some in _batches([open_image(image) for image in _images(images)], IMAGES_AT_ONCE):
            words = none.view(1, 0).expand(len(some), 0)
            inputs = TaskInputs(self._pixels(some)[:, None], words, words.bool(), labels=none, keys=none)
            predictions = task.predict(self.network, inputs).cpu()
            found += [task.found(row, image.size) for row, image in zip(predictions, some, strict=True)]
        return found

    @torch.inference_mode()
    def segment(self, images: Sequence[ImageLike]) -> list[np.ndarray]:
        """The class of each pixel of each image, int64 [height, width]: numbers of `model.task.classes`."""
        task, found, (views, normalize) = self._task_for("segment", "classes of pixels"), [], self._view
        for image in map(open_image, _images(images)):
            seen = torch.from_numpy(views.evaluate(image, self.network.config.image_size).copy())
            pixels = normalize(seen.permute(2, 0, 1).to(self.device)).to(self.dtype)
            (classes,) = task.class_maps(self.network, [pixels], [(image.height, image.width)], at_once=WINDOWS_AT_ONCE)
            found.append(classes.cpu().numpy())
        return found

    def classify_by_names(
        self,
        images: Sequence[ImageLike],
        names: Sequence[str],
        templates: Sequence[str] = ("{}",),
        *,
        top: int | None = None,
    ) -> list[Any]:
        """The class of each image whose name, in all templates in the place of {}, has the closest vector. Scores are
        the softmax of the cosines by the temperature that contrast has learnt."""
        self._task_for("embed_images", "classes by their names")
        names, templates = _texts(names, "names"), _texts(templates, "templates")
        require(bool(names), "names: there is none")
        require(all("{}" in template for template in templates), "templates: each has {} in the place of the name")
        scale = self.network.task_head(None, None)[2].cpu()
        cosines = self.embed_images(images) @ names_as_vectors(self.embed_texts, names, templates).T
        guesses = _guesses((scale * cosines).softmax(1), names, 1 if top is None else top)
        return [some[0].what for some in guesses] if top is None else guesses

    def classify_pairs(self, firsts: Sequence[str], seconds: Sequence[str], *, top: int | None = None) -> list[Any]:
        """The likeliest class of each pair of texts in the same places, or the number that the model tells of it."""
        self._task_for("classify_pairs", "classes of pairs")
        firsts, seconds = _texts(firsts), _texts(seconds)
        if len(firsts) != len(seconds):
            raise ValueError(f"{len(firsts)} first and {len(seconds)} second texts: each needs the other")
        return self._results([], list(zip(firsts, seconds, strict=True)), top)

    def is_true(
        self, images: Sequence[tuple[ImageLike, ImageLike]], sentences: Sequence[str], *, top: int | None = None
    ) -> list[Any]:
        """Whether each sentence is true of the two images in the same place."""
        self._task_for("is_true", "truths of sentences")
        given = [_images(pair) for pair in _listed(images, "pairs of images")]
        sentences = _texts(sentences, "sentences")
        if wrong := [len(pair) for pair in given if len(pair) != 2]:
            raise ValueError(f"a sentence is about two images, not {wrong[0]}")
        if len(given) != len(sentences):
            raise ValueError(f"{len(given)} pairs of images and {len(sentences)} sentences: each needs the other")
        return self._results(given, sentences, top)

    def caption(
        self, images: Sequence[ImageLike], *, beams: int = 3, length_penalty: float = 0.6, max_words: int | None = None
    ) -> list[str]:
        """What the model says of each image; see `tasks.parts.generation.generate` for the search's settings.
        `max_words`: as many as in the validation of the model's training, unless said otherwise."""
        task, captions = self._task_for("caption", "captions"), []
        for some in _batches(_images(images), IMAGES_AT_ONCE):
            written = task.caption(self.network, self._pixels(some), beams, length_penalty, max_words)
            captions += task.results(written)
        return captions

    # What needs no task: the model as pretraining has left it. Images are seen in their largest centred square.

    @torch.inference_mode()
    def features(self, images: Sequence[ImageLike], cls: bool = False) -> Tensor:
        """What the encoder makes of images, fp32 [N, D] on the CPU: the mean of their patches, or CLS, which masking
        alone does not train; after the final norm where there is one."""
        return self._run(
            lambda some: frozen_features(self.network.encode(self._square(some)), cls), _images(images), IMAGES_AT_ONCE
        )

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """What the encoder makes of texts, fp32 [N, D] on the CPU: the mean over their tokens, <s> and </s> too."""

        def features(some: Sequence[str]) -> Tensor:
            words, padding = self._words(some)
            return self.network.encode(None, words, padding).sum(1) / (~padding).sum(1, keepdim=True).to(self.device)

        return self._run(features, _texts(texts), TEXTS_AT_ONCE)

    @torch.inference_mode()
    def fill_words(
        self, texts: Sequence[str], images: Sequence[ImageLike] | None = None, *, top: int = 5
    ) -> list[list[list[Guess]]]:
        """For each `HIDDEN` of each text the likeliest pieces of the text tokenizer that may stand there, by the head
        of masked language modelling; with `images`, one for each text, by text and image together."""
        self._head("text_head", "words")
        texts, tokenizer = _texts(texts), self.tokenizer
        given = None if images is None else _images(images)
        if given is not None and len(given) != len(texts):
            raise ValueError(f"{len(given)} images and {len(texts)} texts: each text needs its image")
        lines = []
        for number, text in enumerate(texts):
            hidden, *more = (tokenizer.encode_beginning(part) for part in text.split(HIDDEN))
            require(bool(more), f"texts[{number}] has no {HIDDEN}, which stands for a hidden word")
            for part in more:
                hidden += [tokenizer.mask, *part]
            if len(hidden) + 2 > self.network.config.max_text_length:
                longest = self.network.config.max_text_length - 2
                raise ValueError(f"texts[{number}] has {len(hidden)} tokens: the model reads {longest}")
            lines.append(hidden)
        found: list[list[list[Guess]]] = []
        for rows in _batches(range(len(lines)), TEXTS_AT_ONCE if given is None else IMAGES_AT_ONCE):
            words, padding = padded_words([lines[row] for row in rows], self.network.config.max_text_length)
            pixels = None if given is None else self._square([given[row] for row in rows])
            hidden_BND = self.network.encode(pixels, words.to(self.device), padding)[:, -words.shape[1] :]
            for line, states in zip(words, hidden_BND, strict=True):
                logits = self.network.text_head(states[(line == tokenizer.mask).to(self.device)]).float()
                chances = logits.softmax(1).cpu()[:, tokenizer.words.start : tokenizer.words.stop]
                best = _guesses(chances, range(tokenizer.words.start, tokenizer.words.stop), top)
                found.append([[Guess(tokenizer.decode([word]), score) for word, score in some] for some in best])
        return found

    @torch.inference_mode()
    def fill_patches(self, images: Sequence[ImageLike], hidden: Tensor, texts: Sequence[str] | None = None) -> Tensor:
        """The visual codes that the model guesses for all patches, int64 [N, patches] on the CPU, where those of
        `hidden`, bool [N, patches], are hidden from it; with `texts`, one for each image, by both together. What a code
        looks like is told by the image tokenizer's data: `use.reconstruction` draws it."""
        self._head("image_head", "visual codes")
        given, patches = _images(images), self.network.config.patches
        if hidden.dtype != torch.bool or hidden.shape != (len(given), patches):
            raise ValueError(f"hidden is {hidden.dtype} {list(hidden.shape)}, not bool [{len(given)}, {patches}]")
        listed = None if texts is None else _texts(texts)
        if listed is not None and len(listed) != len(given):
            raise ValueError(f"{len(given)} images and {len(listed)} texts: each image needs its text")

        def codes(rows: Sequence[int]) -> Tensor:
            words, padding = (None, None) if listed is None else self._words([listed[row] for row in rows])
            mask = hidden[rows[0] : rows[-1] + 1].to(self.device)
            states = self.network.encode(self._square([given[row] for row in rows]), words, padding, mask)
            return self.network.image_head(states[:, 1 : 1 + patches].flatten(0, 1)).argmax(1).view(len(rows), patches)

        parts = [codes(rows).cpu() for rows in _batches(range(len(given)), IMAGES_AT_ONCE)]
        return torch.cat(parts or [torch.empty(0, patches, dtype=torch.int64)])

    def learn_classes(
        self,
        images: Sequence[ImageLike],
        classes: Sequence[str],
        by: Literal["probe", "neighbours"] = "probe",
        *,
        neighbours: int = 20,
        cls: bool = False,
    ) -> Callable[..., list[Any]]:
        """What tells the classes of other images, as `classify` does, from the features of these and the class of each:
        a linear probe, or votes of the nearest ones. The model itself learns nothing."""
        require(by in ("probe", "neighbours"), f"by={by!r}: it is probe or neighbours")
        known = _texts(classes, "classes")
        names = sorted(set(known))
        given = _images(images)
        if len(given) != len(known):
            raise ValueError(f"{len(given)} images and {len(known)} classes: each image needs its class")
        require(len(names) > 1, f"classes: {len(names)} of them, and there is nothing to tell apart")
        train, labels = self.features(given, cls), torch.tensor([names.index(name) for name in known])

        def classify(images: Sequence[ImageLike], *, top: int | None = None) -> list[Any]:
            test = self.features(images, cls)
            if by == "probe":
                chances = probe_scores(train, labels, test, len(names))[0].softmax(1)
            else:
                votes = neighbours_votes(train, labels, test, len(names), neighbours)
                chances = votes / votes.sum(1, keepdim=True)
            guesses = _guesses(chances, names, 1 if top is None else top)
            return [some[0].what for some in guesses] if top is None else guesses

        return classify

    def _head(self, name: str, of: str) -> None:
        """Raises ValueError where the network lacks a head of masked data modelling."""
        if not hasattr(self.network, name):
            raise ValueError(f"{self.name} has no head for {of}: a model that was pretrained by masking has one")

    def _task_for(self, method: str, use: str) -> Any:
        """The model's task, which has a method or predicts what it says. Raises ValueError for any other task."""
        if isinstance(self._task, str):
            raise ValueError(f"{self._task}; {use} need one")
        if method not in self.task.serves:
            others = " or ".join(name for name in task_names() if method in task_class(name).serves)
            raise ValueError(f"{self.name} was fine-tuned for {self.task.name}; {use} need a model of task {others}")
        return self.task

    @torch.inference_mode()
    def _results(
        self, images: Sequence[Sequence[ImageLike]], texts: Sequence[Text], top: int | None = None
    ) -> list[Any]:
        """The task's results for samples of its number of images and their texts; of what it does not read, none. With
        `top` the so many likeliest, as guesses."""
        task, results = self.task, []
        if top is not None and not task.outcomes:
            raise ValueError(f"{self.name}: {task.name} tells no scores of several: leave top out")
        if task.needs_names and len(task.classes) != self.classes:
            raise ValueError(f"{self.name}/config.json names {len(task.classes)} of {self.classes} classes")
        size, none = self.network.config.image_size, torch.empty(0, dtype=torch.int64)
        for rows in _batches(range(len(images or texts)), IMAGES_AT_ONCE if task.images else TEXTS_AT_ONCE):
            pixels = self._pixels([image for row in rows for image in images[row]]) if task.images else none.float()
            words, padding = self._words([texts[row] for row in rows]) if texts else (none.view(len(rows), 0),) * 2
            pixels = pixels.view(len(rows), task.images, 3, size, size)
            inputs = TaskInputs(pixels, words, padding.bool(), labels=none, keys=none)
            if top is not None:
                results += _guesses(task.chances(task.logits(self.network, inputs).float()).cpu(), task.outcomes, top)
            else:
                results += task.results(task.predict(self.network, inputs).cpu())
        return results

    @torch.inference_mode()
    def _run(self, embed: Callable[[Sequence[_T]], Tensor], samples: Sequence[_T], at_once: int) -> Tensor:
        parts = [embed(some).float().cpu() for some in _batches(samples, at_once)]
        return torch.cat(parts or [torch.empty(0, self.network.config.width)])

    def _pixels(self, images: Sequence[ImageLike]) -> Tensor:
        """[B, 3, S, S] on the device, normalised as in training."""
        return self._seen(images, *self._view)

    def _square(self, images: Sequence[ImageLike]) -> Tensor:
        """[B, 3, S, S] on the device: the largest centred squares, normalised as in pretraining."""
        return self._seen(images, *self._pretrained_view)

    def _seen(self, images: Sequence[ImageLike], views: Views, normalize: Normalization) -> Tensor:
        seen = views.seen(map(open_image, images), self.network.config.image_size)
        return normalize(seen.to(self.device)).to(self.dtype)

    def _words(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L] on the device, framed by <s> and </s>; padding bool [B, L] on the host."""
        tokenizer, longest = self.tokenizer, self._longest

        def tokens(text: Text) -> list[int]:
            if isinstance(text, str):
                return tokenizer.encode_beginning(text)
            first, second = map(tokenizer.encode_beginning, text)
            return pair_words(first, second, longest)

        words, padding = padded_words([tokens(text) for text in texts], longest)
        return words.to(self.device), padding


def image_features(
    content: ModelFolder, name: str, device: torch.device | str | None = None, cls: bool = False
) -> Callable[[Sequence[ImageLike]], Tensor]:
    """`Model.features` of any model's weights, whatever its task. Raises ValueError as `Model.of` does."""
    bare = replace(content, task=None, objectives=(), text_tokenizer=None)
    return partial(Model.of(bare, name, device).features, cls=cls)


def _usable(device: torch.device | str | None) -> torch.device | str:
    """The device, or the first GPU where there is one. Raises ValueError where nothing can be computed on it here."""
    device = device_type() if device is None else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the device {device} cannot be used here: {reason}") from None
    return device


def _with_task(content: ModelFolder, name: str, task: str | None) -> tuple[ModelFolder, str]:
    """What was read with a task: of a pretrained model the one that it serves for, or that is named; or why it has
    none."""
    if content.task is not None:
        if task is not None and content.task.get("name") != task:
            raise ValueError(f"{name} was fine-tuned for {content.task.get('name')}, not for {task}")
        return content, ""
    serves = pretrained_tasks(content.objectives)
    if task is None and len(serves) != 1:
        if serves:
            return content, f"{name} is a pretrained model that serves for {' and '.join(serves)}: name one, task=..."
        return content, f"{name} holds a pretrained model without a task; launchers/finetune.py teaches it one"
    if task not in (None, *serves):
        what = f"that none of its objectives fits for {task}"
        raise ValueError(f"{name} holds a pretrained model {what}; launchers/finetune.py teaches it one")
    return replace(content, task={"name": task or serves[0]}), ""


@contextmanager
def _fitting(folder: str) -> Iterator[None]:
    """Turns what goes wrong inside, for weights and a config that are not of one model, into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: model.safetensors and config.json do not fit together: {reason}") from error


def _add_masked_heads(network: FineTuned, content: ModelFolder) -> None:
    """On the meta device: the heads of masked data modelling that there are weights of."""
    for name, classes in (("image_head", content.config.visual_vocab_size), ("text_head", content.config.vocab_size)):
        if f"{name}.weight" in content.weights:
            with torch.device("meta"):
                setattr(network, name, Head(content.config.width, classes))


def _bare_network(content: ModelFolder, name: str) -> FineTuned:
    """The encoder with the heads of masked data modelling that it has, on the CPU, in fp32; no head of a task."""
    with _fitting(name):
        check_blocks(content.weights, content.config)
        network = FineTuned(content.config, None, device="meta")
        del network.text_head
        if content.config.decoder_layers:
            del network.decoder
        if any(weight.startswith("norm.") for weight in content.weights):
            _add_masked_heads(network, content)
        else:
            network.norm = NoNorm()
        needed = network.state_dict().keys()
        weights = {key: weight.float() for key, weight in content.weights.items() if key in needed}
        network.load_state_dict(weights, assign=True)
    return network


def _network_and_task(
    folder: str, content: ModelFolder, tokenizer: TextTokenizer | None, pretrained: bool
) -> tuple[FineTuned, Task]:
    """The folder's network on the CPU, in fp32, and its task."""
    entry: Any = content.task
    with _fitting(folder):
        _check_entry(entry)
        check_blocks(content.weights, content.config)
        found = task_class(entry["name"])
        weights, dense = content.weights, DenseConfig(**entry.get("dense", {}))
        if pretrained:  # it has the heads of all objectives
            before = f"{OBJECTIVE_HEADS}{found.pretrained_by}."
            own = {name.removeprefix(before): w for name, w in weights.items() if name.startswith(before)}
            with torch.device("meta"):
                network = FineTuned(content.config, found.pretrained_head(content.config, own), device="meta")
            _add_masked_heads(network, content)
            named = weights | {TASK_HEAD + name: weight for name, weight in own.items()}
            matching = f"{OBJECTIVE_HEADS}{Matching.name}."
            if found.contrastive and f"{matching}score.weight" in weights:
                form = MatchingHead.form_of({name.removeprefix(matching) for name in weights})
                with torch.device("meta"):
                    network.match_head = MatchingHead(content.config.width, form)
                named |= {name.replace(matching, MATCH_HEAD): weight for name, weight in weights.items()}
            weights = {name: weight for name, weight in named.items() if name in network.state_dict()}
        else:
            network = found.network(content.config, entry.get("classes", 0), dense, device="meta")
        network.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
        longest = content.config.max_text_length
        length = entry.get("text_length", min(longest, found.usual_text_length or longest))
        config = FinetuneConfig(  # what the folder tells of the training; the rest is of no use any more
            task=entry["name"],
            out=folder,
            text_tokenizer="",
            model=content.config,
            evaluate_only=True,
            data=TaskDataConfig(validation="what the model is asked", text_length=length),
            dense=dense,
        )
    task = found(config, tokenizer, entry.get("answers", []))
    task.pretrained = pretrained
    if task.keeps_names and len(task.classes) != entry.get("classes", 0):
        raise ValueError(f"{folder}/config.json names {len(task.classes)} answers for {entry.get('classes', 0)}")
    return network, task


def _check_entry(entry: dict[str, Any]) -> None:
    """Raises ValueError where a folder's task is not what one of ours has written."""
    require(isinstance(entry.get("name"), str), f"there is no task {entry.get('name')!r}")
    for field, least in (("classes", 0), ("text_length", 3)):
        value = entry.get(field, least)
        if type(value) is not int or value < least:
            raise ValueError(f"the task's {field} is {value!r}")
    answers = entry.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("the task's answers are no list of texts")


def _guesses(chances: Tensor, outcomes: Sequence[Any], top: int) -> list[list[Guess]]:
    """The `top` likeliest of each row of chances [N, outcomes], best first."""
    require(type(top) is int and top >= 1, f"top={top!r}: give the number of guesses, 1 or more")
    best = chances.topk(min(top, len(outcomes)), dim=1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[Guess(outcomes[place], score) for place, score in zip(*row, strict=True)] for row in rows]


def _listed(given: Any, what: str) -> list[Any]:
    """What was given as a list of `what`. Raises ValueError for a single one, which would be taken apart."""
    one = given.ndim in (0, 2, 3) if isinstance(given, np.ndarray) else isinstance(given, (*IMAGE_TYPES, bytes))
    if one or not isinstance(given, Iterable):
        raise ValueError(f"{what} are given as a list and have a result each; this is one {type(given).__name__}")
    return list(given)


def _images(given: Any) -> list[ImageLike]:
    images = _listed(given, "images")
    for image in images:
        if not isinstance(image, IMAGE_TYPES):
            raise ValueError(f"an image is a path, a PIL image or an array, not {type(image).__name__}")
    return images


def _texts(given: Any, what: str = "texts") -> list[str]:
    texts = _listed(given, what)
    for number, text in enumerate(texts):
        require(isinstance(text, str), f"{what} are strings, not {type(text).__name__}")
        require_text(text, f"{what}[{number}]")
    return texts


def _batches(samples: Sequence[_T], at_once: int) -> Iterator[Sequence[_T]]:
    for first in range(0, len(samples), at_once):
        yield samples[first : first + at_once]
