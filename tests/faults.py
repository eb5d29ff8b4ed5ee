"""Random faults in runs of four and eight processes, as one command that prints what became of each.

    python -m tests.faults [--faults 200] [--seed 0]

Kinds: a process that is killed, that stops, that cannot save for want of room, that can read no more data, that is slow
for a step; a gradient of one rank with a NaN or a flipped bit. Layouts: four replicas under ZeRO-1 and ZeRO-3, two
replicas of two tensor ranks, of two pipeline stages, and of both. A run with faults is started again as
launchers/slurm/pretrain.sbatch does (by hand after a full disk, and after a flip that made copies of weights differ),
and compared with one that met none but those faults that have left a mark on the weights: every step once, the same
samples, each bit of the losses, each checkpoint whole. At the end comes a table of what became of each kind. Exit code
0: all of that held. tests/integration/disturbing.py has the details.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.integration.disturbing import SPREADS, Disturbed, disturb
from tests.integration.faulty import ENDING, PASSING

OF_A_RUN = 20
"""Faults of one run, at most."""


def main(arguments: list[str] | None = None) -> int:
    """Disturbs and prints; returns the exit code."""
    parser = ArgumentParser(prog="tests.faults", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many there are")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, ranks, steps and bits")
    options = parser.parse_args(arguments)
    of_a_run = min(OF_A_RUN, -(-options.faults // len(SPREADS)))
    results: list[Disturbed] = []
    started = time.monotonic()
    while (done := sum(len(result.met) for result in results)) < options.faults:
        number, spread = len(results), SPREADS[len(results) % len(SPREADS)]
        with TemporaryDirectory(prefix="beit3-faults-") as folder:
            faults = min(of_a_run, options.faults - done)
            result = disturb(Path(folder), spread, faults, (*ENDING, *PASSING), options.seed + number,
                             tell=lambda line: print(line, flush=True))  # fmt: skip
            result.check()
        results.append(result)
        print(f"{done + len(result.met)} faults, {time.monotonic() - started:.0f} s", flush=True)
    alike = sum(result.apart_from is None for result in results)
    print(
        f"{table(results)}\n{done} faults in {len(results)} runs: every step once with its samples, every checkpoint "
        f"whole; {alike} runs are the others in every bit, the rest up to a flip that made copies differ"
    )
    return 0


def table(results: Sequence[Disturbed]) -> str:
    """Counts of each kind and what became of it, by layout."""
    counts = Counter((met.fault.kind, met.became, str(result.spread)) for result in results for met in result.met)
    spreads = [str(spread) for spread in SPREADS]
    rows = [("fault", "what became of it", *spreads, "all")]
    for kind, became in sorted({(kind, became) for kind, became, _ in counts}):
        cells = [counts[kind, became, spread] for spread in spreads]
        rows.append((kind, became, *map(str, (*cells, sum(cells)))))
    totals = [sum(count for (_, _, of), count in counts.items() if of == spread) for spread in spreads]
    rows.append(("all", "", *map(str, (*totals, sum(totals)))))
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:]))


if __name__ == "__main__":
    sys.exit(main())
