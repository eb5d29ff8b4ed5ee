"""Using a fine-tuned model: embeddings of pictures and texts, answers to questions, captions, classes.

    from beit3_dist.inference import Model
    model = Model.load("FOLDER")                        # config.json, model.safetensors, tokenizer.spm
    model.embed_images(["a.jpg", "b.png"])              # retrieval: unit vectors [2, D]
    model.embed_texts(["a red circle"])                 # retrieval: unit vectors [1, D]
    model.answer(["a.jpg"], ["what shape is this?"])    # vqa: one answer for each picture and its question
    model.caption(["a.jpg"])                            # captioning
    model.classify(["a.jpg"])                           # imagenet: pictures; text: sentences
    model.is_true([("a.jpg", "b.png")], ["both are red"])   # nlvr2: a sentence about two pictures

Every method takes lists and gives a result for each place. One picture or text that is in no list is refused: a text is
a sequence of letters, too. A picture is a path, a PIL image or an array uint8 [height, width, 3]. It is seen as in the
validation of the model's task: whole, squashed to the model's square, and for the classes of pictures its largest
centred square.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3_dist.checkpoint.model_folder import ModelFolder, check_blocks, read_model_folder
from beit3_dist.config import DataConfig
from beit3_dist.data.faults import BadSample
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.text_files import require_text
from beit3_dist.data.transforms import normalised, read_picture
from beit3_dist.devices import device_type
from beit3_dist.tasks.all import TASKS
from beit3_dist.tasks.augmentation import Views
from beit3_dist.tasks.config import CONTRASTIVE, seen_in_validation
from beit3_dist.tasks.generation import generate
from beit3_dist.tasks.heads import FineTuned, build
from beit3_dist.tasks.task import Normalization

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
PICTURES = (str, os.PathLike, Image.Image, np.ndarray)
"""The same for `isinstance`."""

IMAGES_AT_ONCE, TEXTS_AT_ONCE = 32, 256
"""Samples of a forward pass."""
USUAL_LENGTH = 32
"""Longest caption, <s> and </s> included, of a folder that does not say what its model was taught (unilm: 32)."""

_T = TypeVar("_T")


def open_picture(picture: Picture, max_pixels: int = DataConfig.max_pixels) -> Image.Image:
    """The picture upright and in RGB. Raises one-line errors: OSError for a file that cannot be read, ValueError for
    one that holds no picture, or one of more than `max_pixels` pixels (an image bomb)."""
    try:
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
                raise ValueError(f"an array must be uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
            return Image.fromarray(picture)
        if isinstance(picture, Image.Image):
            return normalised(picture, max_pixels)
        return read_picture(picture, max_pixels)
    except BadSample as bad:
        name = f"{os.fspath(picture)}: " if isinstance(picture, str | os.PathLike) else ""
        raise ValueError(f"{name}{bad}") from None


class Model:
    """A fine-tuned model on one device. What it can be asked depends on its task; the rest is a ValueError."""

    def __init__(self, name: str, network: FineTuned, task: dict[str, Any], tokenizer: TextTokenizer | None) -> None:
        self.name, self.network, self.task = name, network.requires_grad_(False).eval(), task
        self.tokenizer = tokenizer
        self.device = next(network.parameters()).device
        self._views = Views(evaluation=seen_in_validation(task["name"]))
        self._normalize = Normalization(TASKS[task["name"]].statistics, self.device)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: torch.device | str | None = None) -> Model:
        """The model of a folder, or of a fine-tuning run's, in fp32. `device`: the first GPU where there is one, unless
        said otherwise.

        Raises FileNotFoundError or ValueError with one line where the folder holds no fine-tuned model, and ValueError
        where there is no such device, or a GPU that cannot be used and nobody has said to do without.
        """
        device = device_type() if device is None else device
        _check_device(device)
        content = read_model_folder(Path(folder))
        if content.task is None:
            raise ValueError(f"{folder} holds a pretrained model without a task; launchers/finetune.py teaches it one")
        network = _network(folder, content).to(device)
        tokenizer = None
        if content.text_tokenizer is not None:
            tokenizer = TextTokenizer(str(content.text_tokenizer))
            tokenizer.check_vocab(content.config.vocab_size)
        return cls(os.fspath(folder), network, content.task, tokenizer)

    def embed_images(self, images: Sequence[Picture]) -> Tensor:
        """Unit vectors of pictures, fp32 [N, D] on the CPU. Their products with texts' vectors are similarities."""
        self._require(CONTRASTIVE, "embeddings")
        pictures = _pictures(images)
        return self._run(lambda some: self.network.embed_images(self._pixels(some)), pictures, IMAGES_AT_ONCE)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, fp32 [N, D] on the CPU. What is longer than the model's texts is cut."""
        self._require(CONTRASTIVE, "embeddings")
        listed = _texts(texts)
        return self._run(lambda some: self.network.embed_texts(*self._words(some)), listed, TEXTS_AT_ONCE)

    @torch.inference_mode()
    def answer(self, images: Sequence[Picture], questions: Sequence[str]) -> list[str]:
        """The likeliest of the model's answers to each question about the picture in the same place."""
        self._require(("vqa",), "answers")
        images, questions = _pictures(images), _texts(questions, "questions")
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} pictures and {len(questions)} questions: each question needs its picture")
        answers: list[str] = []
        for some in _batches(list(zip(images, questions, strict=True)), IMAGES_AT_ONCE):
            pictures, asked = zip(*some, strict=True)
            logits = self.network.answer_logits(self._pixels(pictures), *self._words(asked))
            answers += [self.task["answers"][best] for best in logits.argmax(-1).tolist()]
        return answers

    @torch.inference_mode()
    def classify(self, samples: Sequence[Picture]) -> list[str]:
        """The likeliest class of each picture (imagenet) or sentence (text)."""
        self._require(("imagenet", "text"), "classes")
        names = self.task.get("answers", [])
        if len(names) != self.network.classes:
            raise ValueError(f"{self.name}/config.json names {len(names)} of {self.network.classes} classes")
        best: list[int] = []
        if self.task["name"] == "imagenet":
            for pictures in _batches(_pictures(samples), IMAGES_AT_ONCE):
                best += self.network.class_logits(self._pixels(pictures)).argmax(-1).tolist()
        else:
            for texts in _batches(_texts(samples), TEXTS_AT_ONCE):
                best += self.network.sentence_logits(*self._words(texts)).argmax(-1).tolist()
        return [names[number] for number in best]

    @torch.inference_mode()
    def is_true(self, images: Sequence[tuple[Picture, Picture]], sentences: Sequence[str]) -> list[bool]:
        """Whether each sentence is true of the two pictures in the same place."""
        self._require(("nlvr2",), "truths of sentences")
        given = [_pictures(pair) for pair in _listed(images, "pairs of pictures")]
        sentences = _texts(sentences, "sentences")
        for pair in given:
            if len(pair) != 2:
                raise ValueError(f"a sentence is about two pictures, not {len(pair)}")
        if len(given) != len(sentences):
            raise ValueError(f"{len(given)} pairs of pictures and {len(sentences)} sentences: each needs the other")
        truths: list[bool] = []
        for some in _batches(list(zip(given, sentences, strict=True)), IMAGES_AT_ONCE):
            pairs, told = zip(*some, strict=True)
            pixels = torch.stack([self._pixels(pair) for pair in pairs])
            truths += self.network.truth_logits(pixels, *self._words(told)).argmax(-1).bool().tolist()
        return truths

    def caption(
        self, images: Sequence[Picture], *, beams: int = 3, length_penalty: float = 0.6, max_words: int | None = None
    ) -> list[str]:
        """What the model says of each picture; see `tasks.generation.generate` for the search's settings. `max_words`:
        as many as in the validation of the model's training, unless said otherwise."""
        self._require(("captioning",), "captions")
        if max_words is None:
            longest = min(USUAL_LENGTH, self.network.config.max_text_length)
            max_words = self.task.get("text_length", longest) - 1
        tokenizer, captions, images = self._tokenizer(), [], _pictures(images)
        for some in _batches(images, IMAGES_AT_ONCE):
            captions += generate(
                self.network,
                self._pixels(some),
                tokenizer,
                beams=beams,
                length_penalty=length_penalty,
                max_words=max_words,
            )
        return [tokenizer.decode(words) for words in captions]

    def _require(self, tasks: tuple[str, ...], use: str) -> None:
        if self.task["name"] not in tasks:
            raise ValueError(
                f"{self.name} was fine-tuned for {self.task['name']}; {use} need a model of task {' or '.join(tasks)}"
            )

    def _tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer.spm, which words need")
        return self.tokenizer

    @torch.inference_mode()
    def _run(self, embed: Callable[[Sequence[_T]], Tensor], samples: Sequence[_T], at_once: int) -> Tensor:
        parts = [embed(some).float().cpu() for some in _batches(samples, at_once)]
        return torch.cat([torch.empty(0, self.network.config.width), *parts])

    def _pixels(self, images: Sequence[Picture]) -> Tensor:
        """[B, 3, S, S] on the device, normalised as in training."""
        size = self.network.config.image_size
        views = np.stack([self._views.evaluate(open_picture(image), size) for image in images])
        return self._normalize(torch.from_numpy(views).permute(0, 3, 1, 2).to(self.device))

    def _words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L] on the device, framed by <s> and </s>; padding bool [B, L] on the host."""
        tokenizer, longest = self._tokenizer(), self.task.get("text_length", self.network.config.max_text_length)
        rows = [[tokenizer.bos, *tokenizer.encode_beginning(text)[: longest - 2], tokenizer.eos] for text in texts]
        length = max(map(len, rows))
        words = torch.tensor([row + [tokenizer.pad] * (length - len(row)) for row in rows])
        padding = torch.arange(length) >= torch.tensor([len(row) for row in rows])[:, None]
        return words.to(self.device), padding


def _check_device(device: torch.device | str) -> None:
    """Raises ValueError where nothing can be computed on it here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the device {device} cannot be used here: {reason}") from None


def _network(folder: str | os.PathLike[str], content: ModelFolder) -> FineTuned:
    """The folder's network on the CPU, in fp32."""
    task: Any = content.task
    try:
        _check_task(task)
        check_blocks(content.weights, content.config)
        network = build(content.config, task)
        network.load_state_dict({name: weight.float() for name, weight in content.weights.items()}, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: model.safetensors and config.json do not fit together: {reason}") from error
    if network.task == "vqa" and len(task.get("answers", [])) != network.classes:
        raise ValueError(f"{folder}/config.json names {len(task.get('answers', []))} answers for {network.classes}")
    return network


def _check_task(task: dict[str, Any]) -> None:
    """Raises ValueError where a folder's task is not what one of ours has written."""
    if task.get("name") not in TASKS:
        raise ValueError(f"there is no task {task.get('name')!r}")
    for field, least in (("classes", 0), ("text_length", 3)):
        value = task.get(field, least)
        if type(value) is not int or value < least:
            raise ValueError(f"the task's {field} is {value!r}")
    answers = task.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("the task's answers are no list of texts")


def _listed(given: Any, what: str) -> list[Any]:
    """What was given as a list of `what`. Raises ValueError for a single one, which would be taken apart."""
    one = given.ndim in (0, 2, 3) if isinstance(given, np.ndarray) else isinstance(given, (*PICTURES, bytes))
    if one or not isinstance(given, Iterable):
        raise ValueError(f"{what} are given as a list and have a result each; this is one {type(given).__name__}")
    return list(given)


def _pictures(given: Any) -> list[Picture]:
    """Pictures that were given as a list. Raises ValueError for anything else."""
    pictures = _listed(given, "pictures")
    for picture in pictures:
        if not isinstance(picture, PICTURES):
            raise ValueError(f"a picture is a path, a PIL image or an array, not {type(picture).__name__}")
    return pictures


def _texts(given: Any, what: str = "texts") -> list[str]:
    """Texts that were given as a list. Raises ValueError for anything else."""
    texts = _listed(given, what)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{what} are strings, not {type(text).__name__}")
        require_text(text, f"{what}[{number}]")
    return texts


def _batches(samples: Sequence[_T], at_once: int) -> Iterator[Sequence[_T]]:
    for first in range(0, len(samples), at_once):
        yield samples[first : first + at_once]
