#!/usr/bin/env python3
"""What pretraining is worth: a table of fine-tuning runs that started from pretrained and from random weights.

    python tools/compare_tasks.py FOLDER [--json]

FOLDER holds runs NAME-pretrained and NAME-random of launchers/finetune.py. Prints the last validation of each, as
markdown or JSON.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from beit3_dist.command_line import refusing
from beit3_dist.config import require
from beit3_dist.data.text_files import read_records
from beit3_dist.opening import read_yaml

PROGRAM = "compare_tasks.py"
STARTS = ("pretrained", "random")


def last_validation(run: Path) -> dict[str, float]:
    """The metrics of a run's last validation. Raises ValueError where there is none."""
    log = run / "eval.jsonl"
    records = list(read_records(log)) if log.is_file() else []
    require(bool(records), f"{run} has no validation in eval.jsonl: let launchers/finetune.py finish it")
    return records[-1][1]


def compare(folder: Path) -> list[dict[str, str | float]]:
    """A row for each metric of each pair of runs. Raises ValueError where the two runs differ in more than their
    start."""
    rows: list[dict[str, str | float]] = []
    for pretrained in sorted(folder.glob("*-pretrained")):
        name = pretrained.name.removesuffix("-pretrained")
        runs = {start: folder / f"{name}-{start}" for start in STARTS}
        scores = {start: last_validation(run) for start, run in runs.items()}
        settings = [read_yaml(run / "config.yaml") for run in runs.values()]
        for config in settings:
            for field in ("out", "init_from", "checkpoint"):
                config.pop(field)
        if settings[0] != settings[1]:
            raise ValueError(f"{runs['pretrained']} and {runs['random']} have other settings: compare equal runs")
        for metric in scores["random"]:
            if metric != "step":
                by_start = {start: score[metric] for start, score in scores.items()}
                rows.append({"run": name, "metric": metric, "steps": scores["random"]["step"], **by_start})
    require(bool(rows), f"{folder} holds no run NAME-pretrained with its NAME-random")
    return rows


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(arguments))
    with refusing(PROGRAM):
        rows = compare(options.folder)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("| run | metric | steps | from pretraining | from random |\n|---|---|---|---|---|")
    for row in rows:
        values = " | ".join(f"{100 * float(row[start]):.1f} %" for start in STARTS)
        print(f"| {row['run']} | {row['metric']} | {row['steps']} | {values} |")


if __name__ == "__main__":
    main(sys.argv[1:])
