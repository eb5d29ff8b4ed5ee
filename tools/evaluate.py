#!/usr/bin/env python3
"""Scores a model as it is, without fine-tuning: zero-shot by its contrast or its captions, or its frozen features.

    python tools/evaluate.py MODEL retrieval --data 'pairs/held_out/*.tar'
    python tools/evaluate.py MODEL classes   --data 'images/val/*.tar' --names classes.txt [--templates prompts.txt]
    python tools/evaluate.py MODEL captions  --data 'pairs/held_out/*.tar' [--beams 3] [--caption_metrics cider]
    python tools/evaluate.py MODEL knn       --data 'images/val/*.tar' --train 'images/train/*.tar' --names classes.txt
    python tools/evaluate.py MODEL probe     --data 'images/val/*.tar' --train 'images/train/*.tar' --names classes.txt

MODEL is a model folder, a run's folder (its newest checkpoint, also while it trains), a checkpoint, or a file of
weights in the released form with --text_tokenizer. DATA is a pattern of tars, of pairs or of images with .cls members,
or an index of tools/build_index.py (.jsonl) with --images FOLDER.

    retrieval   images for texts and texts for images: image_retrieval_recall@1, @5, @10, text_retrieval_recall@...; an
                image with several captions is found by any of them, and counts once. Equal captions of different images
                are told apart, as published figures do, unless --merge_captions. Needs contrast: a model pretrained by
                the objective contrastive, or fine-tuned for retrieval. --rerank N: the N best each are put in order by
                what the objective matching, or the task retrieval_matching, has taught.
    classes     the class whose name, in all templates, has the closest vector: acc1, acc5, mean_per_class_recall.
                Needs contrast. --templates: a file of lines with {} for the name, or `shipped` for eight that
                come with the program; without it the name alone.
    captions    exact_match and other --caption_metrics. Needs prefix language modelling, or captioning.
    knn         votes of the nearest images of --train: knn10_acc1, ... for 10, 20, 100 and 200 of them. Any model.
    probe       multinomial regression on --train: lp_acc1, lp_acc5, lp_mean_per_class_recall. Any model.

The frozen features are the mean of the patches, or CLS with --features cls, which masking alone does not train. Keys
are those of CLIP_benchmark's results; --json FILE writes them in its form. A mistake is one line, exit code 2.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit3_dist.command_line import refusing
from beit3_dist.config import require

if TYPE_CHECKING:  # torch takes seconds to import: a typo is reported before that
    from torch import Tensor

    from beit3_dist.checkpoint.model_folder import ModelFolder
    from beit3_dist.inference import Model
    from beit3_dist.tasks.data.zero_shot import Captioned, Labelled
    from beit3_dist.tasks.parts.scores import Match

PROGRAM = "evaluate.py"
NEEDS = {"classes": ("names",), "knn": ("names", "train"), "probe": ("names", "train")}
"""Options that a score cannot do without."""
TASKS = {"retrieval": "zeroshot_retrieval", "classes": "zeroshot_classification", "probe": "linear_probe"}
"""What CLIP_benchmark calls the scores that it has, too."""
AT_ONCE = 256
"""Images whose files are open at a time."""


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(
        PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("score", choices=("retrieval", "classes", "captions", "knn", "probe"))
    parser.add_argument("--data", required=True, help="what is scored: a pattern of tars, or an index")
    parser.add_argument("--train", help="knn, probe: what is learnt from, in the form of --data")
    parser.add_argument("--images", default=".", help="folder that the images of an index lie in (default: this one)")
    parser.add_argument("--names", type=Path, help="names of the classes, one a line in the order of their numbers")
    text = "retrieval: captions that are equal letter for letter are one, right for the images of all of them"
    parser.add_argument("--merge_captions", action="store_true", help=text)
    text = "retrieval: the N best by contrast are put in order by matching, where that was learnt, too (default: 0)"
    parser.add_argument("--rerank", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--templates", help="classes: lines such as `a photo of a {}`, or shipped")
    parser.add_argument("--features", choices=("mean", "cls"), default="mean", help="knn, probe (default: mean)")
    parser.add_argument("--beams", type=int, default=3, help="captions: width of the search (default: 3)")
    parser.add_argument("--max_words", type=int, help="captions: longest, </s> counted (default: as in training)")
    text = "captions: exact_match, bleu4, cider, meteor, spice (default: exact_match)"
    parser.add_argument("--caption_metrics", nargs="+", default=["exact_match"], metavar="METRIC", help=text)
    text = "images scored, and learnt from: of more, so many at equal distances, as eval.at_most (default: 0, all)"
    parser.add_argument("--at_most", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--caption_key", default="caption", help="field of .json members (default: caption)")
    parser.add_argument("--text_tokenizer", type=Path, help="SentencePiece file (default: the model's own)")
    parser.add_argument("--cache", default="~/.cache/beit3_dist", help="folder of the shards' indexes")
    parser.add_argument("--device", help="cpu, cuda (default: the first GPU where there is one)")
    parser.add_argument("--json", type=Path, help="file for the scores, in the form of CLIP_benchmark's results")
    options = parser.parse_args(list(arguments))
    with refusing(PROGRAM):
        for name in NEEDS.get(options.score, ()):
            if getattr(options, name) is None:
                raise ValueError(f"--{name} is not given, which {options.score} needs")
        for name in ("rerank", "at_most"):
            require(getattr(options, name) >= 0, f"--{name} {getattr(options, name)} is negative: give 0 or more")
        if options.json is not None and not options.json.parent.is_dir():
            raise ValueError(f"--json {options.json}: there is no folder {options.json.parent}")
        metrics = evaluate(options)
        for name, value in metrics.items():
            print(f"{name} {value:.4f}")
        if options.json is not None:
            task = TASKS.get(options.score, options.score)
            result = {"dataset": options.data, "model": str(options.model), "task": task, "metrics": metrics}
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def evaluate(options: Namespace) -> dict[str, float]:
    """The metrics by name. Raises ValueError or OSError with one line where they cannot be had."""
    from beit3_dist.checkpoint.formats import read_source
    from beit3_dist.inference import Model

    content, name = read_source(options.model), str(options.model)
    if options.text_tokenizer is not None:
        content = replace(content, text_tokenizer=options.text_tokenizer)
    if options.score in ("knn", "probe"):
        return frozen(content, options)
    task = "captioning" if options.score == "captions" else "retrieval"
    model = Model.of(content, name, options.device, task if content.task is None else None)
    if (missing := "caption" if task == "captioning" else "embed_images") not in model.task.serves:
        raise ValueError(f"{name} was fine-tuned for {model.task.name}, which has no {missing} for {options.score}")
    return {"retrieval": retrieval, "classes": classes, "captions": captions}[options.score](model, options)


def retrieval(model: Model, options: Namespace) -> dict[str, float]:
    from beit3_dist.tasks.parts.scores import retrieval_scores

    found = captioned(options, model)

    def match(texts: Sequence[str]) -> Match:
        return lambda images, rows: matches(model, found.images, texts, images, rows)

    vectors = partial(embedded, model), model.embed_texts
    return retrieval_scores(found, *vectors, options.merge_captions, options.rerank, match)


def matches(model: Model, images: Sequence[Any], texts: Sequence[str], of_image: Tensor, of_text: Tensor) -> Tensor:
    """What matching says of pairs of an image and a text, int64 [P] each, the images in ascending order: [P]."""
    import torch

    parts = [torch.empty(0)]
    for first, some in zip(range(0, len(images), AT_ONCE), opened(images), strict=True):
        here = (of_image >= first) & (of_image < first + AT_ONCE)
        shown = [some[row] for row in (of_image[here] - first).tolist()]
        parts.append(model.match(shown, [texts[row] for row in of_text[here].tolist()]))
    return torch.cat(parts)


def classes(model: Model, options: Namespace) -> dict[str, float]:
    from beit3_dist.tasks.data.names import read_names
    from beit3_dist.tasks.data.zero_shot import Classed, read_templates
    from beit3_dist.tasks.parts.scores import name_scores

    names = read_names(options.names)
    templates = ("{}",) if options.templates is None else read_templates(options.templates, "--templates")
    classed = Classed(*labelled(options.data, "--data", options, len(names)), names, templates)
    return name_scores(classed, partial(embedded, model), model.embed_texts)


def captions(model: Model, options: Namespace) -> dict[str, float]:
    from beit3_dist.tasks.parts.metrics import check_caption_metrics
    from beit3_dist.tasks.parts.scores import caption_matches

    check_caption_metrics(options.caption_metrics)
    settings = {"beams": options.beams, "max_words": options.max_words}

    def write(images: Sequence[Any]) -> list[str]:
        return [text for some in opened(images) for text in model.caption(some, **settings)]

    return caption_matches(captioned(options, model), write, options.caption_metrics)


def frozen(content: ModelFolder, options: Namespace) -> dict[str, float]:
    """k-NN and linear probe, by features of the encoder alone."""
    from beit3_dist.inference import image_features
    from beit3_dist.tasks.data.names import read_names
    from beit3_dist.tasks.parts.scores import NEIGHBOURS, linear_scores, neighbour_scores

    number = len(read_names(options.names))
    sides = [labelled(getattr(options, side), f"--{side}", options, number) for side in ("train", "data")]
    if options.score == "knn" and len(sides[0][0]) < NEIGHBOURS[0]:
        raise ValueError(f"--train has {len(sides[0][0])} images, and {NEIGHBOURS[0]} neighbours are asked")
    features = image_features(content, str(options.model), options.device, cls=options.features == "cls")
    (train, known), (test, labels) = ((joined(map(features, opened(images))), these) for images, these in sides)
    if options.score == "knn":
        return neighbour_scores(train, known, test, labels, number)
    found, decay = linear_scores(train, known, test, labels, number)
    print(f"weight of the squared norm, chosen on every fifth of --train: {decay:g}")
    return found


# ------------------------------------------------------------------------------------------------------------- data


def captioned(options: Namespace, model: Model) -> Captioned:
    """The images of --data with all their captions."""
    from beit3_dist.data.kinds import is_jsonl
    from beit3_dist.tasks.data.zero_shot import captioned_tars

    if is_jsonl(options.data):
        return captioned_index(options, model)
    return captioned_tars(options.data, "--data", options.cache, options.caption_key, options.at_most)


def captioned_index(options: Namespace, model: Model) -> Captioned:
    """Images by their numbers. Their texts are those of the field `captions`, else the tokens of each line as words."""
    from beit3_dist.tasks.data.examples import read_index
    from beit3_dist.tasks.data.zero_shot import Captioned, spread
    from beit3_dist.tasks.registry import task_class

    kind = task_class("captioning" if options.score == "captions" else "retrieval")
    vocabulary = model.network.config.vocab_size
    images: dict[int, Any] = {}
    texts: dict[int, list[str]] = {}
    for example in read_index(Path(options.data), kind, Path(options.images), vocab_size=vocabulary):
        images.setdefault(example.label, example.images[0])
        own = list(example.references)
        if not own and example.words is not None:
            own = [model.task.tokenizer.decode(list(example.words))]
        texts.setdefault(example.label, []).extend(own)
    if silent := [number for number, own in texts.items() if not own]:
        raise ValueError(f"--data: {len(silent)} images of {options.data} have no caption; the first is {silent[0]}")
    numbers = list(images)
    chosen = [numbers[place] for place in spread(len(numbers), options.at_most)]
    return Captioned([images[number] for number in chosen], [texts[number] for number in chosen])


def labelled(data: str, field: str, options: Namespace, number: int) -> Labelled:
    """The images of --data or --train, with their classes."""
    from beit3_dist.data.kinds import is_jsonl
    from beit3_dist.tasks.data import zero_shot
    from beit3_dist.tasks.data.examples import read_index
    from beit3_dist.tasks.registry import task_class

    if not is_jsonl(data):
        return zero_shot.classed_tars(data, field, options.cache, number, options.at_most)
    examples = read_index(Path(data), task_class("imagenet"), Path(options.images), classes=number)
    return zero_shot.labelled(examples, options.at_most)


def opened(images: Sequence[Any]) -> Iterator[list[Any]]:
    """The images in batches, decoded. Raises ValueError naming the first that cannot be: a score is of all or none."""
    from beit3_dist.tasks.data.zero_shot import decoded_whole

    for first in range(0, len(images), AT_ONCE):
        yield [decoded_whole(image, "--data") for image in images[first : first + AT_ONCE]]


def embedded(model: Model, images: Sequence[Any]) -> Tensor:
    """Unit vectors [N, D]."""
    return joined(model.embed_images(some) for some in opened(images))


def joined(parts: Iterator[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(parts))


if __name__ == "__main__":
    main(sys.argv[1:])
