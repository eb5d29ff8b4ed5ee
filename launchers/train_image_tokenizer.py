r"""Trains the BEiT v2 image tokenizer (VQ-KD): images in tars and a frozen teacher in, OUT/image_tokenizer.pth out.

    python launchers/train_image_tokenizer.py --config launchers/recipes/image_tokenizer_demo.yaml \
        --out OUT --data.images 'images-*.tar'
    torchrun --nproc_per_node 8 launchers/train_image_tokenizer.py \
        --config launchers/recipes/image_tokenizer_base.yaml --out OUT --data.images 'train-{0000..0146}.tar' \
        --teacher.kind clip --teacher.weights ViT-B-16.pt

One process, or data parallel under torchrun, deepspeed or srun. SIGTERM, SIGUSR1 or SIGHUP to any process saves and
ends with exit code 75, as in pretrain.py; --checkpoint.resume auto goes on bit for bit. --print_config prints the
resolved config and --help every field. A mistake in the config or the data is one line and exit code 2, before any
process group starts.
"""

from __future__ import annotations

import sys

from beit3_dist.command_line import begin, importing, parse
from beit3_dist.image_tokenizer.config import TokenizerConfig

PROGRAM = "train_image_tokenizer.py"


def main(arguments: list[str]) -> None:
    begin(PROGRAM)
    config = parse(TokenizerConfig, PROGRAM, str(__doc__), arguments)
    with importing():
        from beit3_dist.parallel.mesh import read_mesh
        from beit3_dist.run.launch import launch
        from beit3_dist.run.preflight_image_tokenizer import prepare_tokenizer_run
        from beit3_dist.train.image_tokenizer import train_image_tokenizer

    launch(PROGRAM, lambda: prepare_tokenizer_run(config, read_mesh()), train_image_tokenizer)


if __name__ == "__main__":
    main(sys.argv[1:])
