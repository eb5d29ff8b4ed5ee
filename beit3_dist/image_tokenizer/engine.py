"""One training step of the image tokenizer: network, teacher, AdamW and codebook of a data-parallel rank.

Ranks hold the same weights and tables and equally many images. Gradients are averaged, the codebook's counts and sums
added up, so that any number of ranks takes the same step.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from beit3_dist.config import OptimConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.quantizer import CodeUsage
from beit3_dist.parallel.mesh import Groups
from beit3_dist.teachers.vision import Teacher


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
    """[b, N] codes of this rank's images, before the step changed anything."""

    @property
    def skipped(self) -> bool:
        return self.usage is None


class TokenizerEngine:
    """Takes training steps. Every method is collective."""

    zero_stage = 0  # every rank holds all of it

    def __init__(self, config: TokenizerConfig, groups: Groups, teacher: Teacher) -> None:
        self.config, self.mesh, self.groups = config, groups.mesh, groups
        self.teacher = teacher.to(self.mesh.device)
        self.model = build_tokenizer(config, teacher.channels).to(self.mesh.device)
        self.whole_shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self.cuts: dict[str, int] = {}
        self.optimizer = tokenizer_optimizer(self.model, config.optim, self.mesh.device)

    def start_codebook(self, images: Tensor) -> None:
        """k-means on the vectors of the first step's images, uint8 [b, 3, S, S]."""
        with torch.no_grad(), self._autocast():
            z = self.model.embed(images.float() / 255)
        self.model.quantize.initialize(z, key=self.config.seed)

    def train_step(self, images: Tensor, step: int, lr: float) -> TokenizerStep:
        """Step number `step` = 0, 1, ... on this rank's images, uint8 [b, 3, S, S] on the device.

        Left out on all ranks, with nothing changed, where the loss or the gradient of any is not finite: it would spoil
        every weight and, through the running means, the codebook for good.
        """
        pixels = images.float() / 255
        with self._autocast():
            loss, result = self.model(pixels, self.teacher(pixels))
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.model.parameters())
        average_gradients(parameters, self.mesh.world)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_norm or float("inf"))
        means = torch.stack((loss.detach(), result.reconstruction, result.commitment, norm)) / self.mesh.world
        dist.all_reduce(means)  # so that all ranks judge the step alike
        clusters = self.model.quantize.clusters(result.z, result.codes)
        # The one place where the host waits for the device.
        total, reconstruction, commitment, grad_norm, *used = torch.cat((means, clusters.usage())).tolist()
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            return TokenizerStep(total, reconstruction, commitment, grad_norm, None, result.codes)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.model.quantize.update(
            result.z, clusters, key=self.config.seed + 1 + step, decay=self.config.model.codebook_decay
        )
        return TokenizerStep(total, reconstruction, commitment, grad_norm, CodeUsage(*used), result.codes)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


def build_tokenizer(config: TokenizerConfig, target_dim: int) -> VQKD:
    geometry = {name: value for name, value in asdict(config.model).items() if name != "codebook_decay"}
    tokenizer = VQKD(**geometry, target_dim=target_dim)
    tokenizer.initialize(config.seed)
    return tokenizer


def tokenizer_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
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
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat.div_(world), gradients)
