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
    model.predict(images=["a.jpg"])                     # any task, one of a plugin that is imported too

A model that was only pretrained serves for the task that one of its objectives has taught it: captioning after prefix
language modelling, retrieval after contrast. Where there are several, `Model.load(FOLDER, task="captioning")` says
which.

Every method takes lists and gives a result for each place. One image or text that is in no list is refused: a text is a
sequence of letters, too. An image is a path, a file:// or https:// address, a PIL image or an array uint8 [height,
width, 3]. It is seen as in the validation of the model's task: whole, squashed to the model's square, and for the
classes of images its largest centred square.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from beit3_dist.objectives.matching import Matching, MatchingHead
from beit3_dist.tasks.base import HALF, Normalization, Task, TaskInputs
from beit3_dist.tasks.config import DenseConfig, FinetuneConfig, TaskDataConfig
from beit3_dist.tasks.data.augmentation import Views
from beit3_dist.tasks.data.batches import padded_words
from beit3_dist.tasks.parts.frozen import frozen_features
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

IMAGES_AT_ONCE, TEXTS_AT_ONCE = 32, 256
MATCH_HEAD = "match_head."
"""Prefix of the weights of matching's head, beside that of the task."""

_T = TypeVar("_T")


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
    """A model on one device. What it can be asked depends on its task; the rest is a ValueError."""

    def __init__(self, network: FineTuned, task: Task, classes: int = 0) -> None:
        self.network, self.task, self.classes = network.requires_grad_(False).eval(), task, classes
        self.name = task.config.out
        weight = next(network.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._views = task.views()
        self._normalize = Normalization(task.statistics, self.device)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        device: torch.device | str | None = None,
        task: str | None = None,
        precision: Precision = "fp32",
    ) -> Model:
        """The model of a folder, or of a fine-tuning run's. `device`: the first GPU where there is one, unless said
        otherwise. `task`: which one a pretrained model is to serve for; None where there is no choice. `precision`: of
        its weights and of what it computes.

        Raises FileNotFoundError or ValueError with one line where the folder holds no model of a task, and ValueError
        where there is no such device, or a GPU that cannot be used and nobody has said to do without.
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
        pretrained, content = content.task is None, _with_task(content, name, task)
        tokenizer = None
        if content.text_tokenizer is not None:
            tokenizer = TextTokenizer(str(content.text_tokenizer))
            tokenizer.check_vocab(content.config.vocab_size)
        network, found = _network_and_task(name, content, tokenizer, pretrained)
        assert content.task is not None
        return cls(network.to(device, DTYPES[precision]), found, content.task.get("classes", 0))

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

    def answer(self, images: Sequence[ImageLike], questions: Sequence[str]) -> list[str]:
        """The likeliest of the model's answers to each question about the image in the same place."""
        self._task_for("answer", "answers")
        images, questions = _images(images), _texts(questions, "questions")
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images and {len(questions)} questions: each question needs its image")
        return self._results([[image] for image in images], questions)

    def classify(self, samples: Sequence[ImageLike]) -> list[Any]:
        """The likeliest class of each image or sentence, whichever the model's task reads, or the number that it tells
        of a sentence."""
        if self._task_for("classify", "classes").images:
            return self._results([[image] for image in _images(samples)], [])
        return self._results([], _texts(samples))

    def classify_pairs(self, firsts: Sequence[str], seconds: Sequence[str]) -> list[Any]:
        """The likeliest class of each pair of texts in the same places, or the number that the model tells of it."""
        self._task_for("classify_pairs", "classes of pairs")
        firsts, seconds = _texts(firsts), _texts(seconds)
        if len(firsts) != len(seconds):
            raise ValueError(f"{len(firsts)} first and {len(seconds)} second texts: each needs the other")
        return self._results([], list(zip(firsts, seconds, strict=True)))

    def is_true(self, images: Sequence[tuple[ImageLike, ImageLike]], sentences: Sequence[str]) -> list[bool]:
        """Whether each sentence is true of the two images in the same place."""
        self._task_for("is_true", "truths of sentences")
        given = [_images(pair) for pair in _listed(images, "pairs of images")]
        sentences = _texts(sentences, "sentences")
        if wrong := [len(pair) for pair in given if len(pair) != 2]:
            raise ValueError(f"a sentence is about two images, not {wrong[0]}")
        if len(given) != len(sentences):
            raise ValueError(f"{len(given)} pairs of images and {len(sentences)} sentences: each needs the other")
        return self._results(given, sentences)

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

    def _task_for(self, method: str, use: str) -> Any:
        """The model's task, which has a method or predicts what it says. Raises ValueError for any other task."""
        if method not in self.task.serves:
            others = " or ".join(name for name in task_names() if method in task_class(name).serves)
            raise ValueError(f"{self.name} was fine-tuned for {self.task.name}; {use} need a model of task {others}")
        return self.task

    @torch.inference_mode()
    def _results(self, images: Sequence[Sequence[ImageLike]], texts: Sequence[Text]) -> list[Any]:
        """The task's results for samples of its number of images and their texts; of what it does not read, none."""
        task, results = self.task, []
        if task.needs_names and len(task.classes) != self.classes:
            raise ValueError(f"{self.name}/config.json names {len(task.classes)} of {self.classes} classes")
        size, none = self.network.config.image_size, torch.empty(0, dtype=torch.int64)
        for rows in _batches(range(len(images or texts)), IMAGES_AT_ONCE if task.images else TEXTS_AT_ONCE):
            pixels = self._pixels([image for row in rows for image in images[row]]) if task.images else none.float()
            words, padding = self._words([texts[row] for row in rows]) if texts else (none.view(len(rows), 0),) * 2
            pixels = pixels.view(len(rows), task.images, 3, size, size)
            inputs = TaskInputs(pixels, words, padding.bool(), labels=none, keys=none)
            results += task.results(task.predict(self.network, inputs).cpu())
        return results

    @torch.inference_mode()
    def _run(self, embed: Callable[[Sequence[_T]], Tensor], samples: Sequence[_T], at_once: int) -> Tensor:
        parts = [embed(some).float().cpu() for some in _batches(samples, at_once)]
        return torch.cat(parts or [torch.empty(0, self.network.config.width)])

    def _pixels(self, images: Sequence[ImageLike]) -> Tensor:
        """[B, 3, S, S] on the device, normalised as in training."""
        seen = self._views.seen(map(open_image, images), self.network.config.image_size)
        return self._normalize(seen.to(self.device)).to(self.dtype)

    def _words(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L] on the device, framed by <s> and </s>; padding bool [B, L] on the host."""
        tokenizer, longest = self.task.tokenizer, self.task.config.data.text_length

        def tokens(text: Text) -> list[int]:
            if isinstance(text, str):
                return tokenizer.encode_beginning(text)
            first, second = map(tokenizer.encode_beginning, text)
            return pair_words(first, second, longest)

        words, padding = padded_words([tokens(text) for text in texts], longest)
        return words.to(self.device), padding


@torch.inference_mode()
def image_features(
    content: ModelFolder, name: str, device: torch.device | str | None = None, cls: bool = False
) -> Callable[[Sequence[ImageLike]], Tensor]:
    """What a frozen encoder makes of images, fp32 [N, D] on the CPU: the mean of their patches, or CLS, after the final
    norm where it has one. Each image is seen in its largest centred square, as its classes are.

    Of any model's weights, whatever its heads; errors call it `name`. Raises ValueError as `Model.of` does.
    """
    device = _usable(device)
    try:
        check_blocks(content.weights, content.config)
        network = FineTuned(content.config, None, device="meta")
        del network.text_head
        if content.config.decoder_layers:
            del network.decoder
        if not any(weight.startswith("norm.") for weight in content.weights):
            network.norm = NoNorm()
        needed = network.state_dict().keys()
        weights = {key: weight.float() for key, weight in content.weights.items() if key in needed}
        network.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: its weights and config do not fit: {' '.join(str(error).split())[:300]}") from error
    network = network.to(device).requires_grad_(False).eval()
    views, normalize = Views(evaluation="centre"), Normalization(HALF, torch.device(device))

    @torch.inference_mode()
    def features(images: Sequence[ImageLike]) -> Tensor:
        parts = [torch.empty(0, content.config.width)]
        for some in _batches(images, IMAGES_AT_ONCE):
            seen = views.seen(map(open_image, some), content.config.image_size)
            hidden = network.encode(normalize(seen.to(device)))
            parts.append(frozen_features(hidden, cls).float().cpu())
        return torch.cat(parts)

    return features


def _usable(device: torch.device | str | None) -> torch.device | str:
    """The device, or the first GPU where there is one. Raises ValueError where nothing can be computed on it here."""
    device = device_type() if device is None else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the device {device} cannot be used here: {reason}") from None
    return device


def _with_task(content: ModelFolder, name: str, task: str | None) -> ModelFolder:
    """What was read with a task: of a pretrained model the one that it serves for, or that is named."""
    if content.task is not None:
        if task is not None and content.task.get("name") != task:
            raise ValueError(f"{name} was fine-tuned for {content.task.get('name')}, not for {task}")
        return content
    serves = pretrained_tasks(content.objectives)
    if task is None and len(serves) > 1:
        raise ValueError(f"{name} is a pretrained model that serves for {' and '.join(serves)}: name one, task=...")
    if not serves or task not in (None, *serves):
        what = "without a task" if task is None else f"that none of its objectives fits for {task}"
        raise ValueError(f"{name} holds a pretrained model {what}; launchers/finetune.py teaches it one")
    return replace(content, task={"name": task or serves[0]})


def _network_and_task(
    folder: str, content: ModelFolder, tokenizer: TextTokenizer | None, pretrained: bool
) -> tuple[FineTuned, Task]:
    """The folder's network on the CPU, in fp32, and its task."""
    entry: Any = content.task
    try:
        _check_entry(entry)
        check_blocks(content.weights, content.config)
        found = task_class(entry["name"])
        weights, dense = content.weights, DenseConfig(**entry.get("dense", {}))
        if pretrained:  # it has the heads of all objectives
            before = f"{OBJECTIVE_HEADS}{found.pretrained_by}."
            own = {name.removeprefix(before): w for name, w in weights.items() if name.startswith(before)}
            with torch.device("meta"):
                network = FineTuned(content.config, found.pretrained_head(content.config, own), device="meta")
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
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: model.safetensors and config.json do not fit together: {reason}") from error
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
