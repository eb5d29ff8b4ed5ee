#!/usr/bin/env python3
"""What a run would take, before a machine is paid for: memory, time and cost of every layout that divides.

    python tools/plan.py --config RECIPE.yaml [--a.b VALUE] [--device H100] [--devices 8] [--price 2.5] [--json]
    python tools/plan.py --config RECIPE.yaml --device H100 --devices 64 --emit       # overrides for pretrain.py
    python tools/plan.py --config RECIPE.yaml --device H100 --devices 1024 --failures # days on 8 to 1,024 that fail
    python tools/plan.py --check h200                           # what was measured beside what is planned
    python tools/plan.py --calibrate RATES.json                 # this CPU's rates, by two processes
    python tools/plan.py --check cpu --rates RATES.json         # steps of six layouts, planned and measured here
    python tools/plan.py --check failures --run OUT COMMAND     # a real run under random kills, and what is predicted
    python tools/plan.py --config RECIPE.yaml --device cpu --rates RATES.json --devices 2

Layouts: ZeRO stage x tensor x sequence x pipeline x activation checkpointing x accumulation. Printed are the ten
fastest that fit, in GB of 1e9 bytes on the fullest device, and why the others fall out. beit3_dist/plan/ says what is
counted, which numbers are measured and which are data sheets'. --days: what so many days for the whole run mean in MFU.
Paths that the recipe leaves out may stay out. --failures: runs are simulated on the fastest layout of each number of
devices; beit3_dist/plan/failures.py has the published rates. --check failures: COMMAND, with its own --out OUT,
--checkpoint.resume auto, --checkpoint.every as --every and more --steps than it can take, as
deepspeed --num_accelerators 2 launchers/pretrain.py --config launchers/recipes/demo.yaml --out demo/killed ...
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beit3_dist.command_line import parse, refuse, refusing
from beit3_dist.config import RunConfig, require
from beit3_dist.objectives import SECTIONS
from beit3_dist.plan import failures, h200
from beit3_dist.plan.devices import DEVICES, Device, device_named
from beit3_dist.plan.layouts import Plan, Planner
from beit3_dist.plan.model_flops import step_flops
from beit3_dist.tools.plans import killed

PROGRAM = "plan.py"
UNUSED = ("out", "text_tokenizer", "image_tokenizer", "data.images", "data.texts", "data.pairs")
BEST = 10
OF_FAILURES = {
    "failures_per_device_hour": (failures.PER_DEVICE_HOUR, "that stop the job; Llama 3's"),
    "pause_s": (2.0, "what a save stops the training for"),
    "durable_s": (60.0, "from then on until it counts"),
    "restart_s": (180.0, "from the processes' start to the first step"),
    "requeue_s": (60.0, "until the devices are there again"),
    "noticed_s": (30.0, "from the failure to the job's end"),
}
"""Option -> default and help."""
LEAST = {"failures_per_device_hour": 1e-12, "mtbf_s": 1e-3, "seconds": 1e-3, "repeats": 1, "every": 1}
"""Of options that may not be 0."""
FEWEST = 8
"""Devices of --failures."""
DAY_S = 86_400


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="H100", help=f"{', '.join(DEVICES)} or cpu")
    parser.add_argument("--devices", type=int, default=8, help="how many")
    parser.add_argument("--rates", default="", help="file of --calibrate, for --device cpu")
    parser.add_argument("--price", type=float, default=0.0, help="of a device-hour; 0: no cost is said")
    parser.add_argument("--days", type=float, default=0.0, help="time for the whole run, to be told as MFU")
    parser.add_argument("--emit", action="store_true", help="the fastest layout as arguments of pretrain.py")
    parser.add_argument("--json", action="store_true", help="all layouts that fit, as one JSON object")
    parser.add_argument("--check", choices=("h200", "cpu", "failures"), help="predictions beside measurements")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each layout of --check cpu")
    parser.add_argument("--run", type=Path, default=Path("demo/killed"), help="OUT of the command of --check failures")
    parser.add_argument("--seconds", type=float, default=1200.0, help="of --check failures")
    parser.add_argument("--mtbf-s", type=float, default=120.0, help="mean time between its kills")
    parser.add_argument("--every", type=int, default=20, help="checkpoint.every of its command")
    parser.add_argument("--seed-of-kills", type=int, default=0, help="by which their times are drawn")
    parser.add_argument("--calibrate", default="", metavar="FILE", help="measures this CPU's rates")
    parser.add_argument("--failures", action="store_true", help="days on devices that fail, and how often to save")
    for name, (default, text) in OF_FAILURES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, help=text)
    options, rest = parser.parse_known_args(arguments)
    with refusing(PROGRAM):
        check(options)
    if options.check or options.calibrate:
        if options.check != "failures":
            require_nothing(rest)
        with refusing(PROGRAM):
            measure(options, rest)
        return
    placeholders = [f"--{name}=unused" for name in UNUSED]
    config = parse(RunConfig, PROGRAM, str(__doc__), [*placeholders, *rest], SECTIONS)
    with refusing(PROGRAM):
        device = device_named(options.device, options.rates)
        planner = Planner(config, device)
        if options.failures:
            print("\n".join(on_failing_devices(planner, options)))
            return
        plans, reasons = planner.plans(options.devices)
        require(bool(plans), f"no layout divides and fits: {'; '.join(reasons)}")
    run = Run(config, device, options, planner.uncounted)
    if options.json:
        print(json.dumps(run.record() | {"layouts": [p.record() | run.of_plan(p) for p in plans], "left_out": reasons}))
    elif options.emit:
        print(" ".join(f"--{name} {value}" for name, value in plans[0].layout.overrides().items()))
    else:
        print("\n".join([*run.lines(), "", *table(plans[:BEST], run), "", *left_out(reasons, len(plans))]))


def check(options: Namespace) -> None:
    """Raises ValueError for a number that cannot be, and where what is measured could not be kept."""
    for name in ("price", "days", *OF_FAILURES, "repeats", "seconds", "mtbf_s", "every"):
        value, least = getattr(options, name), LEAST.get(name, 0)
        is_one = least <= value < math.inf
        require(is_one, f"--{name.replace('_', '-')} {value:g} is not in [{least:g}, infinity): give a number of these")
    if options.failures:
        require(options.devices >= FEWEST, f"--devices {options.devices}: --failures begins at {FEWEST}, give as many")
    file = Path(options.calibrate)
    if options.calibrate and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"--calibrate {file} is to be a file in a folder that is there")


def require_nothing(rest: Sequence[str]) -> None:
    if rest:
        refuse(PROGRAM, ValueError(f"{rest[0]} has no meaning with --check or --calibrate"))


def measure(options: Namespace, command: Sequence[str]) -> None:
    """Prints or writes what is measured, or was. `command`: that of --check failures."""
    if options.check == "h200":
        print("\n".join(h200.lines(DEVICES["H200"])))
        return
    if options.check == "failures":
        require(bool(command), "--check failures needs the run's command behind it")
        given = options.seconds, options.mtbf_s, options.every, options.seed_of_kills
        found = killed.experiment(command, options.run, *given, tell=lambda line: print(line, flush=True))
        print("\n".join(killed.lines(found)))
        return
    from beit3_dist.tools.plans import cpu_rates, on_cpu  # start processes

    if options.calibrate:
        rates = json.dumps(on_cpu.together(cpu_rates.rates)[0], indent=1)
        Path(options.calibrate).write_text(rates + "\n", encoding="utf-8")
        return
    for line in on_cpu.compared(device_named("cpu", options.rates), options.repeats):
        print(line, flush=True)


def on_failing_devices(planner: Planner, options: Namespace) -> list[str]:
    """The table of expected days, on 8, 16, ... devices. Raises ValueError where no number of them has a layout."""
    config, step_s = planner.config, {}
    for devices in (2**n for n in range(int(math.log2(FEWEST)), options.devices.bit_length())):
        plans, _ = planner.plans(devices)
        if plans:
            step_s[devices] = plans[0].time.total
    require(bool(step_s), f"on no number of devices up to {options.devices} a layout divides and fits")
    given = {name: getattr(options, name) for name in OF_FAILURES}
    return failures.table(failures.Run(config.steps, 1.0, 1, config.checkpoint.every, **given), step_s)


class Run:
    """The whole run on some devices."""

    def __init__(self, config: RunConfig, device: Device, options: Namespace, uncounted: list[str]) -> None:
        """`uncounted`: what of the recipe no plan has."""
        self._config, self._device, self._options, self._uncounted = config, device, options, uncounted
        self._flops = step_flops(config)

    def mfu(self, step_s: float) -> float | None:
        """Of the devices' peak; None where that is not known."""
        peak = self._device.peak * self._options.devices
        return self._flops / step_s / peak if peak else None

    def of_plan(self, plan: Plan) -> dict[str, Any]:
        hours = plan.time.total * self._config.steps / 3600
        device_hours = hours * self._options.devices
        cost = device_hours * self._options.price if self._options.price else None
        return {"mfu": self.mfu(plan.time.total), "hours": hours, "device_hours": device_hours, "cost": cost}

    def record(self) -> dict[str, Any]:
        options = self._options
        within = self.mfu(options.days * DAY_S / self._config.steps) if options.days else None
        own = {"device": options.device, "devices": options.devices, "steps": self._config.steps}
        return own | {"step_flops": self._flops, "mfu_of_days": within, "uncounted": self._uncounted}

    def lines(self) -> list[str]:
        options, steps = self._options, self._config.steps
        said = [
            f"{options.devices} x {options.device} of {self._device.memory_gb:g} GB; {self._flops / 1e15:.3g} PFLOP a "
            f"step, {steps:,} steps"
        ]
        if self._uncounted:
            said.append(f"not counted: the teachers of {', '.join(self._uncounted)}")
        if options.days and (within := self.mfu(options.days * DAY_S / steps)) is not None:
            said.append(f"in {options.days:g} days: {options.days * DAY_S / steps:.4g} s a step, {within:.1%} MFU")
        return said


def table(plans: Sequence[Plan], run: Run) -> list[str]:
    lines = [
        "ZeRO  tensor  seq  pipe  data  recompute  accum  GB/device  host GB   s/step   tokens/s     MFU     hours  "
        "device-h"
    ]
    for p in plans:
        layout, more = p.layout, run.of_plan(p)
        mfu = f"{more['mfu']:6.1%}" if more["mfu"] else "     -"
        lines.append(
            f"{layout.zero_stage:4}  {layout.tensor:6}  {'yes' if layout.sequence else 'no':>3}  {layout.pipeline:4}  "
            f"{p.data:4}  {layout.activation_checkpointing:>9}  {layout.accumulation:5}  {p.memory_gb:9.2f}  "
            f"{p.host_gb:7.2f}  {p.time.total:7.4g}  {p.tokens / p.time.total:9,.0f}  {mfu}  {more['hours']:8,.0f}  "
            f"{more['device_hours']:8,.0f}" + (f"  costs {more['cost']:,.0f}" if more["cost"] else "")
        )
    best = plans[0]
    of_memory = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in vars(best.memory).items() if size)
    of_time = ", ".join(f"{name} {seconds:.3g}" for name, seconds in vars(best.time).items() if seconds)
    return [*lines, "", f"GB of the first: {of_memory}", f"seconds of the first: {of_time} (tensor is part of passes)"]


def left_out(reasons: dict[str, int], fit: int) -> list[str]:
    return [f"{fit} layouts fit; left out:", *(f"{count:6}  {reason}" for reason, count in reasons.items())]


if __name__ == "__main__":
    main(sys.argv[1:])
