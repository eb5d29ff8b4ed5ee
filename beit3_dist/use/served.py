"""What some models can be tried for, and why not for the rest: the tabs of the page, without the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from beit3_dist.checkpoint.find import checkpoint_of
from beit3_dist.checkpoint.formats import read_source
from beit3_dist.checkpoint.model_folder import is_model_folder, model_in, read_model_folder
from beit3_dist.config import require
from beit3_dist.data.kinds import LeftOut, images_below, told
from beit3_dist.inference import HIDDEN, Guess, Model
from beit3_dist.opening import read_yaml
from beit3_dist.reports.page import names_of
from beit3_dist.tasks.registry import pretrained_tasks
from beit3_dist.train.guesses import codes_right
from beit3_dist.use.attention import attention_picture, layers_that_look
from beit3_dist.use.image_index import Index, Tell, best, brought_up_to_date
from beit3_dist.use.reconstruction import Reconstruction, hidden_blocks

TOP = 5
"""Guesses that are shown."""
FOUND = 12
"""Images that a search shows."""


@dataclass
class Served:
    """One use: the models that serve for it by their names, or why none does."""

    models: dict[str, Model]
    why_not: str = ""


@dataclass
class Models:
    """The models that were given, opened, and what else the uses need."""

    opened: dict[str, Model]
    """By the names that the page calls them."""
    paths: dict[str, Path]
    """Where each is from."""
    pictures: Path | None = None
    """The folder that is searched, and whose images tell what codes look like."""
    indexes: dict[str, Index] = field(default_factory=dict)
    """Of the folder, for each model that can search."""
    reconstructions: dict[str, Reconstruction] = field(default_factory=dict)
    why_no_reconstruction: str = ""

    def with_method(self, method: str, why_not: str) -> Served:
        """The models whose task has a method of `Model`."""
        return self._those(lambda model: not isinstance(model._task, str) and method in model._task.serves, why_not)

    def _those(self, serves: Callable[[Model], bool], why_not: str) -> Served:
        found = {name: model for name, model in self.opened.items() if serves(model)}
        return Served(found, "" if found else why_not)

    @property
    def asking(self) -> Served:
        return self.with_method("answer", "No model here was fine-tuned for vqa or open_vqa, which teach answers.")

    @property
    def captioning(self) -> Served:
        need = "captioning, nor pretrained by prefix_language_modeling"
        return self.with_method("caption", f"No model here was fine-tuned for {need}, which teach captions.")

    @property
    def contrast(self) -> Served:
        need = "retrieval, nor pretrained by contrastive"
        why_not = f"No model here was fine-tuned for {need}, which teach what belongs together."
        return self.with_method("embed_texts", why_not)

    @property
    def searching(self) -> Served:
        contrast = self.contrast
        if contrast.models and self.pictures is None:
            return Served({}, "No folder was named to search: give --pictures FOLDER.")
        return contrast

    @property
    def filling(self) -> Served:
        def fills(model: Model) -> bool:
            return hasattr(model.network, "text_head") and model._tokenizer is not None and masks(model)

        return self._those(fills, "No model here has its head for masked words and its text tokenizer.")

    @property
    def attending(self) -> Served:
        return Served(self.opened)

    @property
    def rebuilding(self) -> Served:
        found = {name: self.opened[name] for name in self.reconstructions}
        return Served(found, "" if found else self.why_no_reconstruction)


def masks(model: Model) -> bool:
    """Whether the model has kept what masked data modelling has taught: a fine-tuned one has not."""
    return hasattr(model.network, "image_head")


def open_models(
    paths: Sequence[Path],
    pictures: Path | None,
    image_tokenizer: Path | None,
    text_tokenizer: Path | None,
    cache: str,
    device: str | None,
    tell: Tell,
) -> Models:
    """Opens model folders, checkpoints and runs' folders. `image_tokenizer`: of pretrained models; None: that of the
    run. Raises ValueError or OSError with one line where one cannot be opened."""
    opened: dict[str, Model] = {}
    places: dict[str, Path] = {}
    require(len({path.absolute() for path in paths}) == len(paths), f"{paths[-1]}: a model is given twice")
    for path, name in zip(paths, names_of(paths), strict=True):
        content = read_model_folder(path) if is_model_folder(model_in(path)) else read_source(path)
        if text_tokenizer is not None and content.text_tokenizer is None:
            content = replace(content, text_tokenizer=text_tokenizer)
        serves = pretrained_tasks(content.objectives) if content.task is None else []
        for task in serves if len(serves) > 1 else [None]:
            called = name if task is None else f"{name} ({task})"
            opened[called], places[called] = Model.of(content, str(path), device, task), path
    models = Models(opened, places, pictures)
    left_out: LeftOut = {}
    for name, model in models.searching.models.items():
        index, fresh = brought_up_to_date(pictures or Path(), model, places[name], cache, left_out, tell)
        tell(f"{name}: {len(index.vectors)} images of {pictures}, {fresh} of them newly read")
        require(bool(index.vectors), f"--pictures {pictures} holds no readable image")
        models.indexes[name] = index
    for line in told(left_out):
        tell(line)
    _add_reconstructions(models, image_tokenizer, tell)
    return models


def _add_reconstructions(models: Models, image_tokenizer: Path | None, tell: Tell) -> None:
    """For each model that can guess codes, once a path."""
    able = {name: model for name, model in models.opened.items() if masks(model)}
    models.why_no_reconstruction = "No model here has its head for the visual codes of masked patches."
    if able and models.pictures is None:
        models.why_no_reconstruction = "What codes look like is told by images: give --pictures FOLDER."
        return
    done: set[Path] = set()
    for name, model in able.items():
        if models.paths[name] in done:
            continue
        done.add(models.paths[name])
        file = image_tokenizer or _tokenizer_of(models.paths[name])
        if file is None:
            models.why_no_reconstruction = f"The image tokenizer of {name} is not known: give --image_tokenizer FILE."
            continue
        images = [*images_below(models.pictures or Path(), {})]
        tell(f"{name}: looking at what codes look like in {models.pictures}")
        models.reconstructions[name] = Reconstruction(model, str(file), images)


def _tokenizer_of(path: Path) -> Path | None:
    """The image tokenizer that a run's recipe names, where it lies there still."""
    recipe = checkpoint_of(path) / "config.yaml"
    named = read_yaml(recipe).get("image_tokenizer") if recipe.is_file() else None
    return Path(named) if isinstance(named, str) and named and Path(named).is_file() else None


# What the tabs do. An error of theirs is one line for whoever asks.


def ask(model: Model, image: str, question: str) -> list[Guess]:
    """The likeliest answers; one without a score where the model writes them."""
    require(bool(question.strip()), "Write a question.")
    if not model.task.outcomes:
        return [Guess(model.answer([image], [question])[0], 1.0)]
    return model.answer([image], [question], top=TOP)[0]


def classify(model: Model, image: str, names: str, template: str) -> list[Guess]:
    """`names`: one a line, or with commas between them. `template`: with {} for the name, or empty."""
    listed = [name.strip() for line in names.split("\n") for name in line.split(",") if name.strip()]
    require(len(listed) > 1, "Write two names of classes or more, a line each.")
    return model.classify_by_names([image], list(dict.fromkeys(listed)), [template.strip() or "{}"], top=len(listed))[0]


def search(models: Models, name: str, words: str) -> list[tuple[Image.Image, str]]:
    """The best matches, small, with their scores and names."""
    require(bool(words.strip()), "Write what to look for.")
    assert models.pictures is not None
    vector = models.opened[name].embed_texts([words])[0]
    found = best(models.indexes[name], vector, models.pictures, FOUND)
    return [(Image.fromarray(np.asarray(match.small)), f"{match.score:.3f}  {match.name}") for match in found]


def fill(model: Model, text: str, image: str | None) -> list[tuple[str, list[Guess]]]:
    """For each hidden word its place and the likeliest pieces."""
    require(HIDDEN in text, f"Write a text with {HIDDEN} in the place of a word.")
    (found,) = model.fill_words([text], None if image is None else [image], top=TOP)
    return [(f"{HIDDEN} {number}", guesses) for number, guesses in enumerate(found, start=1)]


def attend(model: Model, image: str, text: str, layer: int) -> Image.Image:
    """`layer`: from 1; above the highest, the highest."""
    text = text.strip()
    return attention_picture(model, image, text, min(layer, layers(model, bool(text))) - 1)


def layers(model: Model, words: bool) -> int:
    """How many layers look at patches, with words or without."""
    return len(layers_that_look(model, words))


def rebuild(reconstruction: Reconstruction, image: str, share: float, seed: int) -> tuple[list[np.ndarray], str]:
    """The pictures, and how many of the hidden codes are guessed."""
    hidden = hidden_blocks(reconstruction.model.network.config.patches, share, seed)
    example = reconstruction(image, hidden)
    right = codes_right([example])
    assert right is not None
    return reconstruction.pictures(example), f"{right:.0%} of the {int(hidden.sum())} hidden codes are guessed."
