"""A run in numbers: what report.json holds, and the lines for a person at the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta

import numpy as np

from beit3_dist.config import STREAMS
from beit3_dist.reports.opened import Record, Run, column
from beit3_dist.reports.targets import TrainingSample, baseline, watched
from beit3_dist.train.guesses import Example, codes_right
from beit3_dist.train.target_watch import collapse, entropy

LAST_STEPS = 20


def summarize(run: Run, sample: TrainingSample, shown: dict[str, list[Example]]) -> Record:
    wall = float(column(run.metrics, "step_s").sum())
    samples = {name: int(column(run.metrics, name).sum()) for name in STREAMS}

    def course(name: str) -> Record:
        values, held_out = column(run.metrics, name), column(run.evaluations[-1:], name)
        last = values[-LAST_STEPS:]
        if "." in name:  # of a data set of which not every step has a sample
            last = last[~np.isnan(last)]
        mean = last.mean() if len(last) else math.nan
        course = {"first": values[0], "last": mean, "held_out": (*held_out, math.nan)[0]}
        return {when: float(value) if math.isfinite(value) else None for when, value in course.items()}

    return {
        "run": str(run.folder),
        "checkpoint": str(run.checkpoint),
        "checkpoint_step": run.step,
        "steps": run.metrics[-1]["step"],
        "planned_steps": run.config.steps,
        "wall_s": wall,
        "samples": samples,
        "samples_per_s": sum(samples.values()) / wall,
        "data_wait_share": float(column(run.metrics, "data_wait_s").sum()) / wall,
        "losses": {loss.name: course(f"loss_{loss.name}") for loss in run.objectives.told},
        "accuracies": {loss.name: course(f"acc_{loss.name}") for loss in run.objectives.told if loss.has_accuracy},
        "sets": {
            f"{stream}.{name}": int(np.nansum(column(run.metrics, f"{stream}.{name}")))
            for stream in STREAMS
            for name in run.config.sets(stream)
        },
        "entropies": {name: entropy(counts) for name, counts in sample.counts.items()},
        "baselines": {name: baseline(counts) for name, counts in sample.counts.items()},
        "targets": {name: int(counts.sum()) for name, counts in sample.counts.items()},
        "sampled": {name: sample.samples * bool(getattr(run.config.batch, name)) for name in STREAMS},
        "held_out_step": run.evaluations[-1]["step"] if run.evaluations else None,
        "zero_shot": zero_shot(run),
        "pictures": "held-out" if run.shown.held_out else "training",
        "collapsed": list(filter(None, (collapse(loss, sample.counts[loss.name]) for loss in watched(run)))),
        "codes_right": {name: codes_right(some) for name, some in shown.items()},
    }


def zero_shot(run: Run) -> dict[str, float]:
    """What the last validation has scored beside losses and their accuracies."""
    known = {"step", "loss", *(f"{of}_{loss.name}" for loss in run.objectives.told for of in ("loss", "acc"))}
    return {name: value for record in run.evaluations[-1:] for name, value in record.items() if name not in known}


def summary_lines(run: Run, report: Record) -> Iterator[str]:
    """The report for a person at the terminal."""
    samples, sampled = report["samples"], report["sampled"]
    yield (
        f"{report['run']}: {report['steps']:,} of {report['planned_steps']:,} steps, {sum(samples.values()):,} samples "
        f"({', '.join(f'{count:,} {name}' for name, count in samples.items())})"
    )
    if report["sets"]:
        yield f"of data sets: {', '.join(f'{count:,} {name}' for name, count in report['sets'].items())}"
    yield (
        f"{timedelta(seconds=round(report['wall_s']))} of training steps, {report['samples_per_s']:,.0f} samples/s, "
        f"{report['data_wait_share']:.1%} of the time waiting for data"
    )
    yield ""
    yield f"loss                first step   last {LAST_STEPS} steps        held-out        entropy of the targets"
    for kind in run.objectives.told:
        loss, bound = report["losses"][kind.name], report["entropies"].get(kind.name)
        last, held_out = (f"{digits(loss[key], '7.3f')} {verdict(loss[key], bound):5}" for key in ("last", "held_out"))
        yield f"{kind.title:18}  {digits(loss['first'], '10.3f')}  {last:>14}  {held_out:>14}  {digits(bound, '24.3f')}"
    yield ""
    yield f"accuracy            first step   last {LAST_STEPS} steps        held-out    most frequent target's share"
    for kind in run.objectives.told:
        if kind.has_accuracy:
            accuracy, share = report["accuracies"][kind.name], report["baselines"].get(kind.name)
            first, last, held_out = (digits(accuracy[key], "7.1%") for key in ("first", "last", "held_out"))
            yield f"{kind.title:18}  {first:>10}  {last:>8}        {held_out:>8}        {digits(share, '24.1%')}"
    yield ""
    yield from report["collapsed"]
    yield (
        f"The targets were counted at {sum(report['targets'].values()):,} masked positions of "
        f"{max(sampled.values()):,} training samples of each stream."
    )
    if report["held_out_step"] is not None:
        yield f"Held-out: the validation after step {report['held_out_step']:,}."
    for name, value in report["zero_shot"].items():
        yield f"{name:32}  {digits(value, '7.1%')}"


def digits(value: float | None, form: str) -> str:
    """A number, or a dash of the same width where there is none."""
    return "-".rjust(int(form.split(".")[0])) if value is None else format(value, form)


def verdict(loss: float | None, bound: float | None) -> str:
    return "" if loss is None or bound is None else "below" if loss < bound else "above"
