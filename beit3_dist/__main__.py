"""The command `beit3`: every program of launchers/ and tools/ under one name, from any folder.

The programs are the same files, and so are their options; their messages and examples name the command instead. What
they import takes seconds, and is imported when its command is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from beit3_dist import __version__
from beit3_dist.leaving import interrupted

PROGRAMS = {
    "Data and tokenizers": {
        "build-shards": ("tools.build_shards", "tar shards from folders, tables, texts, or data that pip brings"),
        "check-shards": ("tools.check_shards", "everything that can be wrong with shards, before a run"),
        "train-text-tokenizer": ("tools.train_text_tokenizer", "a SentencePiece model from shards or text files"),
        "train-image-tokenizer": ("launchers.train_image_tokenizer", "BEiT v2's visual codes (VQ-KD)"),
        "precompute-codes": ("tools.precompute_codes", "the visual codes of a run's images, made once"),
        "build-index": ("tools.build_index", "what fine-tuning reads, from benchmarks or a table of your own"),
    },
    "Training": {
        "recipes": ("tools.list_recipes", "the recipes that --config finds by name"),
        "plan": ("tools.plan", "memory, time and cost of every layout of a run"),
        "pretrain": ("launchers.pretrain", "pretraining on images, texts and pairs"),
        "stages": ("launchers.stages", "pretraining in stages, each from the weights of the one before"),
        "finetune": ("launchers.finetune", "fine-tuning and validation on a downstream task"),
    },
    "What came of it": {
        "report": ("tools.report", "curves and pictures of a pretraining run"),
        "show-codes": ("tools.show_codes", "what the codes of an image tokenizer stand for"),
        "compare-tasks": ("tools.compare_tasks", "fine-tuning from pretrained beside random weights"),
        "verify-order": ("tools.verify_order", "that a run has read exactly the samples that it should"),
    },
    "Models in use": {
        "convert": ("tools.convert_checkpoint", "checkpoints and released weights into one another"),
        "evaluate": ("tools.evaluate", "zero-shot scores, k-NN and linear probes, without fine-tuning"),
        "demo": ("tools.demo", "a page on this machine to try models: ask, caption, search, classify, look inside"),
        "draw": ("tools.draw", "what a model of dense prediction says of images, as pictures"),
        "search": ("tools.search_images", "the images of a folder that fit some words"),
    },
    "Speed": {
        "benchmark": ("tools.benchmark", "steps, kernels, data and checkpoints, beside other projects'"),
    },
}
"""Heading -> command -> its module in the package, and what it does. A module has PROGRAM, its name in messages, and
`program` or `main`, which takes the arguments and may return an exit code."""
MODULES = {name: module for group in PROGRAMS.values() for name, (module, _) in group.items()}
COMMANDS = {module: name for name, module in MODULES.items()}
ABOUT = """\
BEiT-3 pretraining in the open.

    beit3 COMMAND --help                                             what it does, and every option
    beit3 pretrain --config demo --out runs/demo ...                 one process
    torchrun --standalone --nproc_per_node 8 -m beit3_dist pretrain ...     eight, one a GPU; so do stages,
    deepspeed --num_accelerators 8 --module beit3_dist pretrain ...         finetune and train-image-tokenizer
    srun --ntasks-per-node 8 beit3 pretrain ...                      in a Slurm job
"""


def help_text() -> str:
    """All commands, a line each."""
    width = max(map(len, MODULES))
    groups = (
        heading + "\n" + "".join(f"    {name:{width}}  {summary}\n" for name, (_, summary) in commands.items())
        for heading, commands in PROGRAMS.items()
    )
    return ABOUT + "\n" + "\n".join(groups)


def as_commands(text: str) -> str:
    """A program's description with the command where it names files of the repository."""

    def command(found: re.Match[str]) -> str:
        launcher, place, file = found.groups()
        name = COMMANDS.get(f"{place}.{file}")
        if name is None:
            return found[0]
        if launcher and launcher.startswith("python"):
            return f"beit3 {name}"
        option = {"torchrun": "-m ", "deepspeed": "--module "}.get((launcher or "").split(" ")[0])
        return f"{launcher}{option}beit3_dist {name}" if option else f"{launcher or ''}beit3 {name}"

    launched = re.sub(r"(python |(?:torchrun|deepspeed) [^\n]*?)?(launchers|tools)/(\w+)\.py", command, text)
    launched = re.sub(r"(srun [^\n]*?)python beit3 ", r"\1beit3 ", launched)
    return re.sub(r"launchers/recipes/([\w/]+)\.yaml", r"\1", launched)


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Runs the command that the arguments begin with; its exit code, where it has one."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and re.match(r"--local[_-]rank=", given[0]):  # deepspeed's, which tells the same by LOCAL_RANK
        del given[0]
    if not given or given[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0
    if given[0] == "--version":
        print(__version__)
        return 0
    name, *rest = given
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, 1)
        meant = f"; {near[0]} is one" if near else ""
        print(f"beit3: error: there is no command {name!r}{meant}: beit3 --help lists all", file=sys.stderr)
        return 2
    program: Any = importlib.import_module(f"beit3_dist.{MODULES[name]}")
    program.PROGRAM, program.__doc__ = f"beit3 {name}", as_commands(str(program.__doc__))
    try:
        return getattr(program, "program", program.main)(rest)
    except KeyboardInterrupt:  # while it imported what it needs
        return interrupted(program.PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
