"""python latest.py PROGRAM ARGUMENTS: prints which file names the newest checkpoint of PROGRAM ARGUMENTS, for
launchers/stages.py the one of each stage, a line each.

For pretrain.sbatch, which always goes on with --checkpoint.resume auto, and so refuses a PATH instead of overriding it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from beit3_dist.command_line import parse, refuse
from beit3_dist.config import RunConfig
from beit3_dist.objectives import SECTIONS
from beit3_dist.run.stage_file import stages_of

PROGRAM = "pretrain.sbatch"

program, *arguments = sys.argv[1:]
if Path(program).name == "stages.py":
    configs = [stage.config for stage in stages_of(PROGRAM, "", arguments)[0]]
else:
    configs = [
        parse(RunConfig, PROGRAM, "Pretrains BEiT-3 on images, texts and image-text pairs.", arguments, SECTIONS)
    ]
for config in configs:
    checkpoints = Path(config.out, "checkpoints")
    if config.checkpoint.resume not in ("none", "auto"):
        refuse(
            PROGRAM,
            f"checkpoint.resume={config.checkpoint.resume}: a job goes on from the newest checkpoint in {checkpoints}: "
            "leave checkpoint.resume out, and move the later ones away from there (or copy another run's there)",
        )
    print(checkpoints / "latest")
