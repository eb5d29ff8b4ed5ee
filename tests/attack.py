"""The attacks that a run survives, as one command that prints its figures.

    python -m tests.attack [--kills 100] [--damages 600] [--seed 0]

A small run is killed (SIGKILL) at random moments, each time started again with --checkpoint.resume auto, and compared
with one that nobody disturbs: every step once, losses, gradient norms and sample hashes equal in every bit. Then files
of its newest checkpoint are damaged at random: each damage has to be refused in one line that names the file, and
`auto` has to take the checkpoint before. Exit code 0: all of that held. On two cores beside much other work it takes
eleven seconds a kill, and eight seconds for all damages.
"""

from __future__ import annotations

import logging
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from tests.integration.killing import kill_at_random
from tests.unit.damages import damage_at_random


def main(arguments: list[str] | None = None) -> int:
    """Attacks and prints; returns the exit code."""
    parser = ArgumentParser(prog="tests.attack", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how often the run is killed")
    parser.add_argument("--damages", type=int, default=600, help="how often a file of a checkpoint is damaged")
    parser.add_argument("--seed", type=int, default=0, help="of moments, places and kinds")
    options = parser.parse_args(arguments)
    logging.getLogger("beit3_dist").setLevel(logging.ERROR)  # every fall back to an older checkpoint is a warning

    with TemporaryDirectory(prefix="beit3-attack-") as name:
        folder, started = Path(name), time.monotonic()
        killed = kill_at_random(folder, options.kills, options.seed, tell=lambda line: print(line, flush=True))
        killed.check()
        moments = ", ".join(f"{count} while {moment}" for moment, count in sorted(killed.moments.items()))
        print(f"{options.kills} kills ({moments}) in {time.monotonic() - started:.0f} s: all of {killed.steps} steps "
              "once, each bit of losses, gradient norms and sample hashes that of the undisturbed run")  # fmt: skip

        started = time.monotonic()
        dist.init_process_group("gloo", store=dist.FileStore(f"{name}/group", 1), rank=0, world_size=1)
        refusals = damage_at_random(Path(killed.killed, "checkpoints"), options.damages, options.seed)
        dist.destroy_process_group()
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(refusals.refused.items()))
    print(f"{refusals.refused.total()} of {options.damages} damages refused by the file's name in "
          f"{time.monotonic() - started:.0f} s ({kinds})")  # fmt: skip
    print("".join(f"not refused: {missed}\n" for missed in refusals.missed), end="")
    return 1 if refusals.missed else 0


if __name__ == "__main__":
    sys.exit(main())
