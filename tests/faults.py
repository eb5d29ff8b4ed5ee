"""Random faults in runs of four and eight processes, as one command that prints what became of each.

    python -m tests.faults [--faults 200] [--seed 0]

Kinds: a process that is killed, that stops, that cannot save for want of room, that can read no more data, that is slow
for a step; a gradient of one rank with a NaN or a flipped bit. Layouts: four replicas under ZeRO-1 and ZeRO-3, two
replicas of two tensor ranks, of two pipeline stages, and of both. A run with faults is started again as
launchers/slurm/pretrain.sbatch does (after a full disk by hand), and compared with one that nobody disturbs: every step
once, the same samples, each checkpoint whole, and where no gradient was spoilt each bit of the losses. Exit code 0: all
of that held. tests/integration/disturbing.py has the details.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.integration.disturbing import COMPUTING, ENDING, PASSING, SPREADS, Disturbed, counted, disturb

OF_A_RUN = 5
"""Faults of one run."""


def main(arguments: list[str] | None = None) -> int:
    """Disturbs and prints; returns the exit code."""
    parser = ArgumentParser(prog="tests.faults", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many there are")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, ranks, steps and bits")
    options = parser.parse_args(arguments)
    results: list[Disturbed] = []
    started = time.monotonic()
    while (done := counted(results).total()) < options.faults:
        # Every third run has faults that change what is computed, so that the others can be compared bit for bit.
        number, spread = len(results), SPREADS[len(results) % len(SPREADS)]
        kinds = (*ENDING, *PASSING, *COMPUTING) if number % 3 == 2 else (*ENDING, *PASSING)
        with TemporaryDirectory(prefix="beit3-faults-") as folder:
            faults = min(OF_A_RUN, options.faults - done)
            result = disturb(Path(folder), spread, faults, kinds, options.seed + number,
                             tell=lambda line: print(line, flush=True))  # fmt: skip
            result.check()
        results.append(result)
    taken_s = time.monotonic() - started
    kinds_found = ", ".join(f"{count} x {kind}" for kind, count in sorted(counted(results).items()))
    alike = sum(result.computed_alike for result in results)
    print(
        f"{counted(results).total()} faults ({kinds_found}) in {len(results)} runs, {taken_s:.0f} s: "
        f"every step once with its samples, every checkpoint whole; {alike} runs are the undisturbed one in every bit"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
