"""Pretrains BEiT-3 on images, texts and pairs.

    python launchers/pretrain.py --config RECIPE.yaml [--a.b VALUE ...]                              one process
    deepspeed [--num_accelerators N] launchers/pretrain.py --config RECIPE.yaml [--a.b VALUE ...]    all devices
    torchrun --nproc_per_node N launchers/pretrain.py --config RECIPE.yaml [--a.b VALUE ...]         the same
    srun --ntasks-per-node N python launchers/pretrain.py --config RECIPE.yaml [--a.b VALUE ...]     in a Slurm job

tools/list_recipes.py lists the recipes. --print_config prints the resolved config and --help every field.
A mistake in the config or the data is one line and exit code 2, before any process group starts. SIGTERM, SIGUSR1 or
SIGHUP (a closed terminal, but for nohup) to any process: all save after their step and end with exit code 75, to go on
with --checkpoint.resume auto. launchers/slurm/pretrain.sbatch does that for jobs that are preempted. Exit code 3: the
run stopped itself, and says why; 1: an error ended it; 130: Ctrl-C.
"""

from __future__ import annotations

import sys

from beit3_dist.command_line import begin, importing, parse
from beit3_dist.config import RunConfig
from beit3_dist.launched import read_place
from beit3_dist.objectives import SECTIONS

PROGRAM = "pretrain.py"


def main(arguments: list[str]) -> None:
    begin(PROGRAM)
    config = parse(RunConfig, PROGRAM, str(__doc__), arguments, SECTIONS)
    with importing():
        from beit3_dist.parallel.mesh import read_mesh
        from beit3_dist.plan.auto import with_layout
        from beit3_dist.run.launch import launch
        from beit3_dist.run.preflight import Ready, prepare_run
        from beit3_dist.train.pretraining import pretrain

    def prepare() -> Ready:
        laid_out = with_layout(config, read_place().world)
        return prepare_run(laid_out, read_mesh(laid_out.parallel.tensor, laid_out.parallel.pipeline))

    launch(PROGRAM, prepare, pretrain)


if __name__ == "__main__":
    main(sys.argv[1:])
