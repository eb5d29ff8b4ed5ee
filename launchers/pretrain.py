"""Pretrains BEiT-3 on images, texts and pairs.

    python launchers/pretrain.py --config RECIPE.yaml [--a.b VALUE ...]                              one process
    deepspeed [--num_accelerators N] launchers/pretrain.py --config RECIPE.yaml [--a.b VALUE ...]    all devices

Recipes are in launchers/recipes/. --print_config prints the resolved config and --help every field.
A mistake in the config or the data is one line and exit code 2, before any process group starts.
"""

from __future__ import annotations

import sys

from beit3_dist.command_line import parse, refuse
from beit3_dist.config import RunConfig

PROGRAM = "pretrain.py"


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    config = parse(RunConfig, PROGRAM, "Pretrains BEiT-3 on images, texts and image-text pairs.", arguments)
    # torch takes seconds to import: a typo is reported before that.
    from beit3_dist.parallel.mesh import read_mesh
    from beit3_dist.training.loop import pretrain
    from beit3_dist.training.preflight import prepare_run

    mesh = read_mesh()
    try:
        ready = prepare_run(config, mesh)
    except (ValueError, OSError) as error:
        refuse(PROGRAM, error)
    pretrain(config, mesh, ready)


if __name__ == "__main__":
    main(sys.argv[1:])
