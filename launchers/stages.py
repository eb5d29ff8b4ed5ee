"""Trains in stages: the recipes of a stage file one after the other, each from the weights of the one before.

    python launchers/stages.py --config STAGES.yaml --out OUT [--a.b VALUE ...] [--NAME.a.b VALUE ...]
    deepspeed [--num_accelerators N] launchers/stages.py ...                     all devices, as launchers/pretrain.py

A recipe with a `task` is a fine-tuning, any other a pretraining. Each stage is a run in OUT/NAME; `--a.b VALUE` is a
field of all stages, `--NAME.a.b VALUE` of one. All stages are checked before the first begins; --dry-run does no more.
--checkpoint.resume auto goes on in the stage that is not done, and runs none again that is.
launchers/slurm/pretrain.sbatch says how to run them in a Slurm job. Signals and exit codes are those of
launchers/pretrain.py.
"""

from __future__ import annotations

import sys

from beit3_dist.command_line import begin, is_first_process
from beit3_dist.run.stage_file import stages_of

PROGRAM = "stages.py"


def main(arguments: list[str]) -> None:
    begin(PROGRAM)
    stages, dry_run = stages_of(PROGRAM, str(__doc__), arguments)
    # torch takes seconds to import: a typo is reported before that.
    from beit3_dist.parallel.mesh import read_mesh
    from beit3_dist.run.launch import launch
    from beit3_dist.run.stages import ReadyStages, prepare_stages
    from beit3_dist.train.stages import train_stages

    def train(ready: ReadyStages) -> None:
        if not dry_run:
            train_stages(PROGRAM, ready)
        elif is_first_process():
            print(f"{PROGRAM}: nothing is wrong; to do: {', '.join(s.name for s in ready.stages) or 'nothing'}")

    mesh_of = lambda config: read_mesh(config.parallel.tensor, config.parallel.pipeline)  # noqa: E731
    launch(PROGRAM, lambda: prepare_stages(stages, mesh_of), train)


if __name__ == "__main__":
    main(sys.argv[1:])
