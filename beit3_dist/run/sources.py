"""What a run's samples and targets depend on, kept in its checkpoints, so that a resume notices other data.

A position is mapped to a sample by a permutation of (seed, number of samples). One shard more under a glob, another
seed or weight is another permutation: from there on samples of the epoch come twice or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit3_dist.checkpoint.files import sha256
from beit3_dist.checkpoint.formats import digest_of_source
from beit3_dist.config import JobConfig, RunConfig
from beit3_dist.data.batch import MixedBatches
from beit3_dist.data.index import expand
from beit3_dist.data.kinds import is_jsonl
from beit3_dist.data.streaming import SequentialStream
from beit3_dist.data.streams import SampleStream
from beit3_dist.data.text import TextTokenizer
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.tasks.config import FinetuneConfig

log = logging.getLogger(__name__)

Sources = dict[str, Any]
"""Field of the config -> what is compared, as JSON has it."""
CONSEQUENCES = {
    "image_tokenizer": "that codes would mean something else from here on",
    "data.answers": "that labels would mean something else from here on",
    "teacher.weights": "that another network would teach from here on",
}
"""Field, or the end of its name -> what going on with another value of it would mean."""
OF_THE_ORDER = "that samples would come twice or not at all"
"""The same for all other fields."""


def pretraining_sources(config: RunConfig, batches: MixedBatches, teachers: Mapping[str, str]) -> Sources:
    """What pretraining depends on: its training streams, and what its targets are made with. `teachers`: field ->
    weights of a network that an objective learns from."""
    data = config.data
    return {
        "seed": config.seed,
        "data.shuffle": data.shuffled_by,
        "data.text_length": data.text_length,
        "text_tokenizer": batches.tokenizer.fingerprint[:16],
        **({"image_tokenizer": sha256(Path(config.image_tokenizer))[:16]} if config.image_tokenizer else {}),
        **{field: digest_of_source(Path(weights))[:16] for field, weights in teachers.items()},
        **{f"data.{s.field}": stream_source(found) for s, found in batches.streams.items()},
    }


def stream_source(stream: SampleStream | SequentialStream) -> dict[str, Any]:
    """A stream's files by name and size, wherever they lie; commands and addresses as they are named."""
    if isinstance(stream, SequentialStream):
        return {"shards": sum(map(len, stream.shards)), "weights": stream.weights, "names": _digest(stream.shards)}
    files, weights = stream.names_and_sizes(), stream.weights
    shards_found = sum(map(len, files))
    return {"shards": shards_found, "samples": len(stream), "weights": weights, "names and sizes": _digest(files)}


def finetuning_sources(config: FinetuneConfig, examples: int, tokenizer: TextTokenizer) -> Sources:
    """What fine-tuning depends on: its training examples, in index files or tars, and their labels and tokens."""
    paths = [
        path
        for name in config.data.files(train=True)
        for path in ([name] if is_jsonl(name) else expand(name, "data.train"))
    ]
    files = [(os.path.basename(path), os.stat(path).st_size) for path in paths]
    train = {"files": len(files), "examples": examples, "names and sizes": _digest(files)}
    answers = {"data.answers": sha256(Path(config.data.answers))[:16]} if config.data.answers else {}
    return {"seed": config.seed, "data.train": train, "text_tokenizer": tokenizer.fingerprint[:16], **answers}


def tokenizer_sources(config: TokenizerConfig, stream: SampleStream) -> Sources:
    """What the training of an image tokenizer depends on: its images and its teacher."""
    weights = config.teacher.weights
    teacher = {"teacher.weights": digest_of_source(Path(weights))[:16]} if weights else {}
    return {"seed": config.seed, "data.images": stream_source(stream), **teacher}


def _digest(names: Any) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def same_sources(config: JobConfig, checkpoint: Path | None, kept: Sources, found: Sources) -> Sources:
    """`found`, which the run's checkpoints keep from here on.

    Raises ValueError naming the field where `kept`, that of `checkpoint`, differs, unless `checkpoint.other_data`
    allows it. A checkpoint of a former version has kept nothing.
    """
    for name in found if checkpoint else ():
        before, now = _changes(name, kept.get(name, found[name]), found[name])
        if before == now:
            continue
        change = f"{name}: {checkpoint} was trained with {before}, this run has {now}"
        if not config.checkpoint.other_data:
            weights = f" with --init_from {checkpoint}" if hasattr(config, "init_from") else ""
            raise ValueError(
                f"{change}, so {_consequence(name)}: bring the former back, or start a new run"
                f"{weights}, or go on all the same by --checkpoint.other_data true"
            )
        log.warning("%s; checkpoint.other_data lets the run go on", change)
    return found


def _consequence(name: str) -> str:
    return next((what for field, what in CONSEQUENCES.items() if name.endswith(field)), OF_THE_ORDER)


def _changes(name: str, kept: Any, found: Any) -> tuple[str, str]:
    """What differs, before and now, in words; two equal texts where nothing does."""
    if not isinstance(kept, dict) or not isinstance(found, dict):
        return f"{name}={kept}", f"{name}={found}"
    names = [key for key in found if kept.get(key) != found[key]]
    before, now = (", ".join(f"{key}={part.get(key)}" for key in names) for part in (kept, found))
    return before, now
