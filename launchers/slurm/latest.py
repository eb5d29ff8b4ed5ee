"""python latest.py ARGUMENTS: prints which file names the newest checkpoint of launchers/pretrain.py ARGUMENTS.

For pretrain.sbatch, which always goes on with --checkpoint.resume auto, and so refuses a PATH instead of overriding it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from beit3_dist.command_line import parse, refuse
from beit3_dist.config import RunConfig
from beit3_dist.objectives import SECTIONS

PROGRAM = "pretrain.sbatch"

config = parse(RunConfig, PROGRAM, "Pretrains BEiT-3 on images, texts and image-text pairs.", sys.argv[1:], SECTIONS)
checkpoints = Path(config.out, "checkpoints")
if config.checkpoint.resume not in ("none", "auto"):
    refuse(
        PROGRAM,
        f"checkpoint.resume={config.checkpoint.resume}: a job goes on from the newest checkpoint in {checkpoints}: "
        "leave checkpoint.resume out, and move the later ones away from there (or copy another run's checkpoint there)",
    )
print(checkpoints / "latest")
