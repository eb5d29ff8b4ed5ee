"""The image tokenizer under training: network, teacher, AdamW and codebook of one data-parallel rank.

Ranks hold the same tables and equally many pictures. Gradients are averaged, the codebook's counts and sums are added
up, so any number of ranks takes the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3_dist.checkpoint.layout import Piece
from beit3_dist.config import OptimConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.quantizer import CodeUsage
from beit3_dist.image_tokenizer.teachers import Teacher
from beit3_dist.parallel.fragments import MOMENTS
from beit3_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class TokenizerStep:
    """What a step came to, over all ranks, and this rank's codes."""

    loss: float
    reconstruction: float
    commitment: float
    grad_norm: float
    usage: CodeUsage | None
    """None of a step that was left out."""
    codes: Tensor
    """[b, N] codes of this rank's pictures, before the step changed anything."""

    @property
    def skipped(self) -> bool:
        """Whether the step changed nothing."""
        return self.usage is None


class TokenizerEngine:
    """Takes training steps. Every method is collective."""

    def __init__(self, config: TokenizerConfig, mesh: Mesh, teacher: Teacher) -> None:
        self.config, self.mesh = config, mesh
        self.teacher = teacher.to(mesh.device)
        self.tokenizer = build_tokenizer(config, teacher.channels).to(mesh.device)
        self.optimizer = build_optimizer(self.tokenizer, config.optim, mesh.device)

    def start_codebook(self, pictures: Tensor) -> None:
        """k-means on the vectors of the first step's pictures, uint8 [b, 3, S, S]."""
        with torch.no_grad(), self._autocast():
            z = self.tokenizer.embed(pictures.float() / 255)
        self.tokenizer.quantize.initialize(z, key=self.config.seed)

    def train_step(self, pictures: Tensor, step: int, lr: float) -> TokenizerStep:
        """Step number `step` = 0, 1, ... on this rank's pictures, uint8 [b, 3, S, S] on the device.

        Left out on all ranks, with nothing changed, where the loss or the gradient of any is not finite: it would spoil
        every weight and, through the running means, the codebook for good.
        """
        pixels = pictures.float() / 255
        with self._autocast():
            loss, result = self.tokenizer(pixels, self.teacher(pixels))
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.tokenizer.parameters())
        average_gradients(parameters, self.mesh.world)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm or float("inf"))
        means = torch.stack((loss.detach(), result.reconstruction, result.commitment, norm)) / self.mesh.world
        dist.all_reduce(means)  # so that all ranks judge the step alike
        total, reconstruction, commitment, grad_norm = means.tolist()
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            return TokenizerStep(total, reconstruction, commitment, grad_norm, None, result.codes)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        usage = self.tokenizer.quantize.update(
            result.z, result.codes, key=self.config.seed + 1 + step, decay=self.config.model.codebook_decay
        )
        return TokenizerStep(total, reconstruction, commitment, grad_norm, usage, result.codes)

    def create_moments(self, step: int) -> None:
        """Gives AdamW the state that it has after `step` steps, skipped ones not counted, its moments still zero, to be
        filled from a file."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                device = parameter.device if group["fused"] else "cpu"
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=device),
                    **{name: torch.zeros_like(parameter) for name in MOMENTS},
                }

    def pieces(self) -> Iterator[Piece]:
        """Views of all that a checkpoint holds: parameters with their moments, and the codebook's tables."""
        if not self.optimizer.state:  # every step so far was skipped
            self.create_moments(0)
        for name, parameter in self.tokenizer.named_parameters():
            moments = self.optimizer.state[parameter]
            views = {f"/{key}": moments[key].view(-1) for key in MOMENTS}
            yield Piece(name, tuple(parameter.shape), 0, {"": parameter.detach().view(-1), **views})
        for name, table in self.tokenizer.named_buffers():
            yield Piece(name, tuple(table.shape), 0, {"": table.view(-1)})

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


def build_tokenizer(config: TokenizerConfig, target_dim: int) -> VQKD:
    """The untrained tokenizer."""
    model = config.model
    tokenizer = VQKD(
        model.image_size,
        patch_size=model.patch_size,
        width=model.width,
        layers=model.layers,
        heads=model.heads,
        codebook_size=model.codebook_size,
        code_dim=model.code_dim,
        decoder_layers=model.decoder_layers,
        target_dim=target_dim,
    )
    tokenizer.initialize(config.seed)
    return tokenizer


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays matrices; not biases, norms, CLS tokens and position tables."""
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
        fused=device.type == "cuda",
    )


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Replaces every gradient by its mean over the ranks, in one all-reduce."""
    if world == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
