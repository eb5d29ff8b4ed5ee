"""Fine-tunes a pretrained BEiT-3 on a downstream task.

    python launchers/finetune.py --config RECIPE.yaml [--a.b VALUE ...]                              one process
    deepspeed [--num_accelerators N] launchers/finetune.py --config RECIPE.yaml [--a.b VALUE ...]    all devices

tools/list_recipes.py lists the recipes; --task names what to train, --init_from the weights to start from. The
indexes of the data come from tools/build_index.py. At the end OUT/model holds what beit3_dist.inference loads, and
OUT/predictions the validation's in the benchmark's submission format. --evaluate_only true does no more than the
validation, of --init_from MODEL or of OUT's newest checkpoint. --print_config prints the resolved config and --help
every field. A mistake in the config or the data is one line and exit code 2, before any process group starts.
"""

from __future__ import annotations

import sys

from beit3_dist.command_line import begin, importing, parse
from beit3_dist.tasks.config import FinetuneConfig
from beit3_dist.tasks.registry import summaries

PROGRAM = "finetune.py"


def main(arguments: list[str]) -> None:
    begin(PROGRAM)
    config = parse(FinetuneConfig, PROGRAM, f"{__doc__}\n{summaries()}", arguments)
    with importing():
        from beit3_dist.parallel.mesh import read_mesh
        from beit3_dist.run.launch import launch
        from beit3_dist.run.preflight_finetuning import prepare_finetuning
        from beit3_dist.train.finetuning import finetune

    launch(PROGRAM, lambda: prepare_finetuning(config, read_mesh(config.parallel.tensor)), finetune)


if __name__ == "__main__":
    main(sys.argv[1:])
