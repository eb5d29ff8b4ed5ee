"""python job.py NODES LEAST PROCESSES PROGRAM ARGUMENTS: what pretrain.sbatch has to know of PROGRAM ARGUMENTS.

The first line is the number of nodes to run on: of NODES nodes of PROCESSES processes each as many as the run's batch
divides by, at least LEAST. The others, one for each stage of launchers/stages.py, are files that name the newest
checkpoint. The script always goes on with --checkpoint.resume auto: a PATH is refused, not overridden.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from beit3_dist.command_line import parse, refuse
from beit3_dist.config import RunConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.objectives import SECTIONS
from beit3_dist.plan.dividing import dividing_nodes
from beit3_dist.run.stage_file import stages_of
from beit3_dist.tasks.config import FinetuneConfig

SCRIPT = "pretrain.sbatch"


def configs_of(program: str, arguments: list[str]) -> list[Any]:
    """The config of each run. Ends the process for a wrong argument, or a program that trains nothing."""
    name = Path(program).name
    if name == "stages.py":
        return [stage.config for stage in stages_of(SCRIPT, "", arguments)[0]]
    if name == "pretrain.py":
        return [parse(RunConfig, SCRIPT, "Pretrains.", arguments, SECTIONS)]
    if name == "finetune.py":
        return [parse(FinetuneConfig, SCRIPT, "Fine-tunes.", arguments)]
    if name == "train_image_tokenizer.py":
        return [parse(TokenizerConfig, SCRIPT, "Trains an image tokenizer.", arguments)]
    programs = "pretrain.py, stages.py, finetune.py and train_image_tokenizer.py"
    refuse(SCRIPT, f"BEIT3_PROGRAM={program} is none of launchers/: {programs}")


def main(nodes: str, least: str, processes: str, program: str, *arguments: str) -> None:
    configs = configs_of(program, list(arguments))
    for config in configs:
        checkpoints = Path(config.out, "checkpoints")
        if config.checkpoint.resume not in ("none", "auto"):
            refuse(
                SCRIPT,
                f"checkpoint.resume={config.checkpoint.resume}: a job goes on from the newest checkpoint in "
                f"{checkpoints}: leave checkpoint.resume out, and move the later ones away from there (or copy another "
                "run's there)",
            )
    try:
        print(dividing_nodes(configs, int(nodes), int(least), int(processes)))
    except ValueError as error:
        refuse(SCRIPT, error)
    for config in configs:
        print(Path(config.out, "checkpoints", "latest"))


main(*sys.argv[1:])
