r"""Trains the BEiT v2 image tokenizer (VQ-KD): pictures in tars and a frozen teacher in, OUT/image_tokenizer.pth out.

    python launchers/train_image_tokenizer.py --config launchers/recipes/image_tokenizer_demo.yaml \
        --out OUT --shards 'images-*.tar'
    torchrun --nproc_per_node 8 launchers/train_image_tokenizer.py \
        --config launchers/recipes/image_tokenizer_base.yaml --out OUT --shards 'train-{0000..0146}.tar'

One process or data parallel under torchrun or deepspeed. OUT also holds config.yaml, metrics.jsonl and tensorboard/.
A mistake in the configuration is one line on standard error and exit code 2, before any process group starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from beit3_dist.checkpoint.files import write_text
from beit3_dist.command_line import parse, refuse, to_yaml
from beit3_dist.config import OptimConfig, require, require_divides
from beit3_dist.data.batch import ImageBatches, loader
from beit3_dist.model.vqkd import VQKD, save_vqkd
from beit3_dist.objectives.distillation import Teacher, build_teacher
from beit3_dist.parallel.mesh import Mesh, read_mesh
from beit3_dist.training.schedule import learning_rate

PROGRAM = "train_image_tokenizer.py"


@dataclass(kw_only=True)
class TokenizerConfig:
    """A training run of the image tokenizer. The defaults are BEiT v2's (base network, ImageNet-1k)."""

    out: str
    """Run folder: image_tokenizer.pth, config.yaml, metrics.jsonl, tensorboard/."""
    shards: str
    """Brace or glob pattern of tars with pictures."""
    teacher: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    """Frozen network whose features are rebuilt from the codes."""
    seed: int = 0
    """Seed of initial values, order, crops and codebook draws."""
    steps: int = 250_200
    """Optimizer steps (100 epochs of ImageNet-1k at batch 512)."""
    batch: int = 512
    """Pictures per step over all ranks."""
    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate of the last step."""
    warmup_steps: int = 25_020
    """Steps of the linear warm-up from 0."""
    weight_decay: float = 1e-4
    """Decoupled decay of the matrices; biases, norms, CLS tokens and position tables are not decayed."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: matrix products in bf16 (autocast), everything else and the quantisation in fp32. fp32: everything."""
    image_size: int = 224
    """Side of the square picture in pixels."""
    patch_size: int = 16
    """Side of a patch; (image_size / patch_size)^2 codes per picture."""
    width: int = 768
    """Hidden size of encoder and decoder."""
    layers: int = 12
    """Blocks of the encoder."""
    heads: int = 12
    """Attention heads."""
    codebook_size: int = 8192
    """Codes."""
    code_dim: int = 32
    """Dimension of a code's vector."""
    decoder_layers: int = 3
    """Blocks of the decoder."""
    codebook_decay: float = 0.99
    """Decay per step of the codebook's moving averages; its horizon, 1 / (1 - decay), must be short beside `steps`."""
    min_crop_scale: float = 0.08
    """Smallest area of the random crop as a share of the picture."""
    max_pixels: int = 100_000_000
    """Pictures with more pixels than this are refused as image bombs and replaced."""
    workers: int = 8
    """Loader processes per rank; 0 reads in the training process."""
    cache: str = "~/.cache/beit3_dist"
    """Folder of the shard indexes."""
    log_every: int = 10
    """Steps between progress lines; metrics.jsonl has every step."""
    save_every: int = 5000
    """Steps between writes of image_tokenizer.pth; the last step is always saved. Training cannot be resumed."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "image_size",
            "patch_size",
            "width",
            "layers",
            "heads",
            "codebook_size",
            "code_dim",
            "decoder_layers",
            "max_pixels",
            "log_every",
            "save_every",
        ):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "workers"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative")
        require_divides("patch_size", self.patch_size, "image_size", self.image_size)
        require_divides("heads", self.heads, "width", self.width)
        require(self.warmup_steps <= self.steps, f"warmup_steps={self.warmup_steps} exceeds steps={self.steps}")
        require(0 <= self.min_lr <= self.lr, f"min_lr={self.min_lr} is not between 0 and lr={self.lr}")
        require(0 <= self.codebook_decay < 1, f"codebook_decay={self.codebook_decay} is not in [0, 1)")
        require(0 < self.min_crop_scale <= 1, f"min_crop_scale={self.min_crop_scale} is not in (0, 1]")

    @property
    def optim(self) -> OptimConfig:
        """BEiT v2's AdamW with this run's rates."""
        return OptimConfig(
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
        )

    def build_model(self, target_dim: int) -> VQKD:
        """The untrained tokenizer."""
        model = VQKD(
            self.image_size,
            patch_size=self.patch_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            codebook_size=self.codebook_size,
            code_dim=self.code_dim,
            decoder_layers=self.decoder_layers,
            target_dim=target_dim,
        )
        model.initialize(self.seed)
        return model


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
        (matrices if decayed else others).append(parameter)
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


def connect(mesh: Mesh) -> None:
    """Starts the process group of a data-parallel run. DeepSpeed, which takes seconds to start, is not needed here."""
    if mesh.device.type == "cuda":
        torch.cuda.set_device(mesh.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // mesh.local_world))
    dist.init_process_group("nccl" if mesh.device.type == "cuda" else "gloo")


def average_gradients(model: nn.Module, world: int) -> None:
    """Replaces every gradient by its mean over the ranks, in one all-reduce; ranks hold equally many pictures."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


Step = tuple[dict[str, Any], VQKD]
"""Metrics of a step, the same on every rank, and the tokenizer after it."""


def train(config: TokenizerConfig, batches: ImageBatches, teacher: Teacher, mesh: Mesh) -> Iterator[Step]:
    """Runs the steps one by one."""
    device = mesh.device
    teacher.to(device)
    tokenizer = config.build_model(teacher.channels).to(device)
    optimizer = build_optimizer(tokenizer, config.optim)
    steps = iter(loader(batches, range(config.steps), config.workers, prefetch=2, pin=device.type == "cuda"))

    def autocast() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    for step in range(config.steps):
        started = time.perf_counter()
        pictures, _, faults = next(steps)
        waited = time.perf_counter() - started
        pixels = pictures.to(device, non_blocking=True).float() / 255
        with autocast():
            features = teacher(pixels)
            if step == 0:
                with torch.no_grad():
                    tokenizer.quantize.initialize(tokenizer.embed(pixels), key=config.seed)
            loss, result = tokenizer(pixels, features)
        optimizer.zero_grad()
        loss.backward()
        if mesh.world > 1:
            average_gradients(tokenizer, mesh.world)
        rate = learning_rate(step, config.steps, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        usage = tokenizer.quantize.update(result.z, result.codes, config.seed + 1 + step, config.codebook_decay)

        sums = torch.stack((loss.detach(), result.reconstruction, result.commitment, loss.new_tensor(len(faults))))
        if mesh.world > 1:
            dist.all_reduce(sums)
        total, reconstruction, commitment, replaced = sums.tolist()
        seconds = time.perf_counter() - started
        yield (
            {
                "step": step + 1,
                "loss": total / mesh.world,
                "loss_reconstruction": reconstruction / mesh.world,
                "loss_commitment": commitment / mesh.world,
                "used_codes": usage.share,
                "perplexity": usage.perplexity,
                "lr": rate,
                "replaced_samples": int(replaced),
                "images_per_s": config.batch / seconds,
                "data_wait_s": waited,
                "step_s": seconds,
            },
            tokenizer,
        )


def record(config: TokenizerConfig, run: Iterator[Step]) -> None:
    """Runs the training on the first rank: progress lines, metrics, TensorBoard and the tokenizer's file."""
    out = Path(config.out)
    write_text(out / "config.yaml", to_yaml(config))
    started, replaced = time.perf_counter(), 0
    with (out / "metrics.jsonl").open("w", buffering=1) as file, SummaryWriter(str(out / "tensorboard")) as board:
        for metrics, tokenizer in run:
            step = metrics["step"]
            replaced += metrics["replaced_samples"]
            file.write(json.dumps(metrics) + "\n")
            for name in metrics.keys() - {"step"}:
                board.add_scalar(name, metrics[name], step)
            if step % config.log_every == 0 or step in (1, config.steps):
                left = (time.perf_counter() - started) / step * (config.steps - step)
                print(
                    f"step {step}/{config.steps}  loss {metrics['loss']:.4f}  codes {metrics['used_codes']:.0%}  "
                    f"perplexity {metrics['perplexity']:.0f}  {metrics['images_per_s']:.0f} images/s  "
                    f"{left:.0f} s left",
                    flush=True,
                )
            if step % config.save_every == 0 or step == config.steps:
                save_vqkd(tokenizer, out / "image_tokenizer.pth")
    print(
        f"wrote {out / 'image_tokenizer.pth'} in {time.perf_counter() - started:.0f} s; "
        f"{replaced} pictures could not be used and were replaced"
    )


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    config = parse(TokenizerConfig, PROGRAM, "Trains the BEiT v2 image tokenizer (VQ-KD).", arguments)
    mesh = read_mesh()
    try:
        require_divides("the number of ranks", mesh.world, "batch", config.batch)
        batches = ImageBatches(
            config.shards,
            config.image_size,
            config.seed,
            config.batch,
            mesh.rank,
            mesh.world,
            config.cache,
            min_crop_scale=config.min_crop_scale,
            max_pixels=config.max_pixels,
        )
        teacher = build_teacher(config.teacher, grid=config.image_size // config.patch_size)
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        refuse(PROGRAM, error)
    if mesh.world > 1:
        connect(mesh)
    run = train(config, batches, teacher, mesh)
    if mesh.is_first:
        record(config, run)
    else:
        for _ in run:
            pass
    if mesh.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
