"""Pretrains BEiT-3 on images, texts and pairs.

    python launchers/pretrain.py --config RECIPE.yaml [--a.b VALUE ...]                              one process
    deepspeed [--num_accelerators N] launchers/pretrain.py --config RECIPE.yaml [--a.b VALUE ...]    all devices

Recipes are in launchers/recipes/. --print_config prints the resolved config and --help every field.
A mistake in the config or the data is one line and exit code 2, before any process group starts.
"""

from __future__ import annotations

import logging
import sys

from beit3_dist.command_line import STOPPED, log_to_console, parse, refuse
from beit3_dist.config import RunConfig

PROGRAM = "pretrain.py"


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    config = parse(RunConfig, PROGRAM, "Pretrains BEiT-3 on images, texts and image-text pairs.", arguments)
    # torch takes seconds to import: a typo is reported before that.
    from beit3_dist.parallel.mesh import read_mesh
    from beit3_dist.training.loop import pretrain
    from beit3_dist.training.preflight import prepare_run
    from beit3_dist.training.resilience import RunStopped

    log_to_console()
    try:
        mesh = read_mesh(config.parallel.tensor, config.parallel.pipeline)
        ready = prepare_run(config, mesh)
    except (ValueError, OSError) as error:
        refuse(PROGRAM, error)
    try:
        pretrain(config, mesh, ready)
    except RunStopped as stop:
        refuse(PROGRAM, stop, exit_code=STOPPED)
    except Exception:
        logging.exception("this process failed")  # into its own log as well
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
