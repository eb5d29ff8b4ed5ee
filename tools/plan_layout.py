#!/usr/bin/env python3
"""What a run's states would take per device, before a machine is paid for: ZeRO 1 and 3 x tensor x pipeline.

    python tools/plan_layout.py --config RECIPE.yaml [--a.b VALUE] [--ranks 8 16 ...] [--device-gb 80] [--json]

For each number of ranks: the layouts that divide, and the bytes on the fullest rank in GB (1e9 bytes) by the arithmetic
of beit3_dist/parallel/memory.py. `states`: parameters, gradients, masters, moments; `all`: with the reduce bucket and
the gathered parameters. Activations come on top. `*`: more than the device has. A pipeline is planned with at least as
many micro-batches as stages. Paths that the recipe leaves out may stay out.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from beit3_dist.command_line import parse, refusing
from beit3_dist.config import RunConfig, require
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives import SECTIONS
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.parallel.deepspeed_config import read_deepspeed_file
from beit3_dist.parallel.memory import state_bytes

PROGRAM = "plan_layout.py"
UNUSED = ("out", "text_tokenizer", "image_tokenizer", "data.images", "data.texts", "data.pairs")


@dataclass(frozen=True)
class Plan:
    ranks: int
    zero_stage: int
    tensor: int
    pipeline: int
    data: int
    states_gb: float
    """On the fullest rank, as `all_gb`."""
    all_gb: float


def plan(config: RunConfig, model: BEiT3, ranks: int, zero_stage: int, tensor: int, pipeline: int) -> Plan:
    """Raises ValueError where the layout does not divide. `model`: on the meta device."""
    config = replace(
        config,
        parallel=replace(config.parallel, zero_stage=zero_stage, tensor=tensor, pipeline=pipeline, chunks=1),
        batch=replace(config.batch, accumulation=max(config.batch.accumulation, pipeline)),
        deepspeed_config=config.deepspeed_config if zero_stage == config.parallel.zero_stage else "",
    )
    records = state_bytes(config, ranks, model, objectives_of(config).largest)
    states, everything = max(r.states for r in records) / 1e9, max(r.total for r in records) / 1e9
    return Plan(ranks, zero_stage, tensor, pipeline, ranks // (tensor * pipeline), states, everything)


def plans(config: RunConfig, ranks: Sequence[int]) -> list[Plan]:
    """All layouts that divide. Raises ValueError, with the last reason, where none does, and where something is wrong
    with the DeepSpeed file."""
    require(min(ranks) > 0, f"--ranks: {min(ranks)} is no number of ranks")
    read_deepspeed_file(config.deepspeed_config)  # a stage of its own that is not planned would hide what is wrong
    config = replace(
        config,
        parallel=replace(config.parallel, tensor=1, sequence=False, pipeline=1, chunks=1),
        activation_checkpointing="none",  # a list belongs to one number of stages; activations do not count here
        activation_checkpointing_every=1,
    )
    model, found, reason = objectives_of(config).build(), [], ""
    without_file = replace(config, deepspeed_config="")
    for world, tensor, pipeline in product(ranks, (1, 2, 4, 8), (1, 2, 4)):
        try:
            plan(without_file, model, world, 1, tensor, pipeline)
        except ValueError as error:
            reason = str(error)
            continue
        found += [plan(config, model, world, zero_stage, tensor, pipeline) for zero_stage in (1, 3)]
    require(bool(found), f"no layout divides: {reason}")
    return sorted(found, key=lambda p: (p.ranks, p.zero_stage, p.tensor, p.pipeline))


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--device-gb", type=float, default=80.0)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    placeholders = [f"--{name}=unused" for name in UNUSED]
    config = parse(RunConfig, PROGRAM, str(__doc__), [*placeholders, *rest], SECTIONS)
    with refusing(PROGRAM):
        found = plans(config, options.ranks)
    if options.json:
        print(json.dumps([asdict(p) | {"fits": p.all_gb <= options.device_gb} for p in found]))
        return
    print("ranks  ZeRO  tensor  pipeline  data  states GB     all GB")
    for p in found:
        print(
            f"{p.ranks:5}  {p.zero_stage:4}  {p.tensor:6}  {p.pipeline:8}  {p.data:4}  {p.states_gb:9.2f}  "
            f"{p.all_gb:9.2f}{'' if p.all_gb <= options.device_gb else ' *'}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
