"""One's own table of pictures, questions, answers, captions or classes as records of indexes, for any such task.

A row is an example. Columns have the names of the fields below, or others that `columns` tells:

    vqa, open_vqa                               image, question, answer (in .jsonl also a list of several)
    captioning, retrieval, retrieval_matching   image, caption (likewise)
    imagenet, imagenet_retrieval                image, class
    nlvr2                                       image, image2, text, class (true or false)
    text                                        text, class
    text_classification                         text, text2 (if there is such a column), class or a number

A mistake is named by file and line: what would be left out in silence, or learnt as another class, is refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3_dist.config import require
from beit3_dist.data.sides import side
from beit3_dist.data.tables import table_records
from beit3_dist.data.text_files import require_text
from beit3_dist.opening import inside
from beit3_dist.tasks.data.benchmarks import Indexes, Records
from beit3_dist.tasks.data.glue import NUMBER, names_of_classes, number_in
from beit3_dist.tasks.data.names import check_names
from beit3_dist.tasks.data.vqa_answers import soft_scores

FIELDS = {
    "vqa": ("image", "question", "answer"),
    "open_vqa": ("image", "question", "answer"),
    "captioning": ("image", "caption"),
    "retrieval": ("image", "caption"),
    "retrieval_matching": ("image", "caption"),
    "imagenet": ("image", "class"),
    "imagenet_retrieval": ("image", "class"),
    "nlvr2": ("image", "image2", "text", "class"),
    "text": ("text", "class"),
    "text_classification": ("text", "class"),
}
"""Task -> the columns that it needs."""
WORDLESS = ("imagenet", "imagenet_retrieval")
"""Tasks whose indexes have no text."""
OPTIONAL = {"text_classification": ("text2",)}
SEVERAL = ("answer", "caption")
"""Fields of which a record may have a list."""
PEOPLE = 10
"""Answers that one question has by the official rule of VQA."""
TRUTHS = {"true": 1, "1": 1, "yes": 1, "false": 0, "0": 0, "no": 0}

Row = tuple[str, dict[str, Any]]
"""Where it stands, and its fields: texts, and of those of `SEVERAL` lists of texts."""


def own_table(
    task: str,
    train: Path,
    validation: Path | None,
    held_out: float,
    columns: Mapping[str, str],
    images: Path,
    names: Sequence[str] | None,
) -> tuple[Indexes, list[str]]:
    """Indexes of both sides, and the names of the answers or classes.

    `validation`: its table; None: `held_out` is the share of the pictures (of the texts, where a task has none) of the
    one table that is kept aside, with all their rows. `columns`: field -> name of its column, where that is another
    one. `images`: folder that the paths of pictures are relative to, and lie in. `names`: those to use; None: those of
    the training side, answers with the most frequent first. Raises ValueError naming file and line.
    """
    sides = {"train": _rows(task, train, columns, images)}
    if validation is not None:
        sides["validation"] = _rows(task, validation, columns, images)
    else:
        key = FIELDS[task][0]
        rows, sides = sides["train"], {"train": [], "validation": []}
        for row in rows:
            kept_aside = side(str(row[1][key]).encode("utf-8", "surrogateescape"), held_out) == "held_out"
            sides["validation" if kept_aside else "train"].append(row)
        for name, some in sides.items():
            require(bool(some), f"{train} has too few rows for a share of {held_out:g}: none is left for {name}")
    known = _names(task, sides["train"]) if names is None else list(names)
    return {f"{task}.{name}.jsonl": _records(task, some, known, name == "train") for name, some in sides.items()}, known


def _rows(task: str, table: Path, columns: Mapping[str, str], images: Path) -> list[Row]:
    """The rows of a table, checked."""
    column = {name: columns.get(name, name) for name in (*FIELDS[task], *OPTIONAL.get(task, ()))}
    found = []
    for place, record in table_records(table):
        fields: dict[str, Any] = {}
        for name, header in column.items():
            if header not in record:
                if name in OPTIONAL.get(task, ()) and name not in columns:
                    continue
                raise ValueError(
                    f"{place}: {task} needs {name!r}, and there is no {header!r} but {', '.join(map(repr, record))}: "
                    f"name its column by --columns {name}=COLUMN"
                )
            fields[name] = _value(record[header], name, header, place)
        for name in ("image", "image2"):
            if name in fields:
                fields[name] = _picture(fields[name], images, place)
        found.append((place, fields))
    require(bool(found), f"{table} has no row")
    return found


def _value(value: Any, name: str, header: str, place: str) -> Any:
    """A field's text, or texts. A number stands for itself as it is written in JSON."""
    if name in SEVERAL:
        texts = value if isinstance(value, list) else [value]
        require(bool(texts), f"{place}: {header!r} is empty")
        return [_text(text, header, place) for text in texts]
    return _text(value, header, place)


def _text(value: Any, header: str, place: str) -> str:
    if isinstance(value, (int, float)):
        value = str(value).lower() if isinstance(value, bool) else str(value)
    require(isinstance(value, str), f"{place}: {header!r} is {value!r:.60}, and no text")
    require_text(value, place)
    require(bool(value.strip()), f"{place}: {header!r} is empty")
    return value.strip()


def _picture(name: str, images: Path, place: str) -> str:
    """The path of a picture below `images`."""
    try:
        path = inside(images, name)
    except ValueError as error:
        raise ValueError(f"{place}: {error}: --images names the folder that pictures lie in") from None
    require(path.is_file(), f"{place}: there is no picture {path}")
    return os.path.relpath(path, images)


def _names(task: str, rows: Sequence[Row]) -> list[str]:
    """What the rows tell apart, in the order of the labels. Raises ValueError for a name that cannot be meant."""
    if "answer" in FIELDS[task]:
        counts = Counter(answer for _, fields in rows for answer in fields["answer"])
        found = [answer for answer, _ in counts.most_common()]
    elif "class" not in FIELDS[task] or task == "nlvr2":
        return []
    elif task == "text_classification":
        found = names_of_classes({fields["class"] for _, fields in rows})
    else:
        found = sorted({fields["class"] for _, fields in rows})
    field = FIELDS[task][-1]
    first = {name: place for place, fields in reversed(rows) for name in _listed(fields[field])}
    check_names((first.get(name, task), name) for name in found)
    require(
        len(found) > 1 or found == [NUMBER], f"{rows[0][0]}: all rows are {found[0]!r}, and there is nothing to learn"
    )
    return found


def _listed(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def _records(task: str, rows: Sequence[Row], names: Sequence[str], is_train: bool) -> Records:
    """The rows as an index has them, with their texts in words."""
    labels = {name: number for number, name in enumerate(names)}
    is_number = task == "text_classification" and list(names) == [NUMBER]

    def label(name: str, place: str) -> int | float:
        if is_number:
            value = number_in(name)
            require(value is not None, f"{place}: {name!r} is no number, as others are")
            assert value is not None
            return value
        if name not in labels:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(f"{place}: {name!r} is none of what is learnt: {shown}")
        return labels[name]

    pictures: dict[str, int] = {}
    records: Records = []
    for number, (place, fields) in enumerate(rows):
        record: dict[str, Any] = {}
        if "image" in fields:
            record["image_path"] = fields["image"]
        if "answer" in fields:
            # People may answer what nobody has in training: no model is right then.
            given = [answer for answer in fields["answer"] if answer in labels or not is_train or label(answer, place)]
            scores = soft_scores(given) if len(given) == PEOPLE else dict.fromkeys(given, 1.0)
            scored = {labels[answer]: score for answer, score in scores.items() if answer in labels}
            record |= {"text": fields["question"], "qid": number}
            record |= {"labels": list(scored), "scores": list(scored.values())}
            if not is_train:
                record["answers"] = given
        elif task == "captioning" and not is_train:
            if fields["image"] in pictures:
                records[pictures[fields["image"]]]["captions"] += fields["caption"]
                continue
            pictures[fields["image"]] = len(records)
            record |= {"image_id": len(records), "text": None, "captions": list(fields["caption"])}
        elif "caption" in fields:
            record["image_id"] = pictures.setdefault(fields["image"], len(pictures))
            records += [record | {"text": caption} for caption in fields["caption"]]
            continue
        elif task == "nlvr2":
            truth = TRUTHS.get(fields["class"].lower())
            require(truth is not None, f"{place}: {fields['class']!r} is neither true nor false")
            record |= {"image2_path": fields["image2"], "text": fields["text"], "label": truth}
            record["identifier"] = f"row-{number}"
        else:
            record |= {name: fields[name] for name in ("text", "text2") if name in fields}
            record["label"] = label(fields["class"], place)
        records.append(record)
    return records
