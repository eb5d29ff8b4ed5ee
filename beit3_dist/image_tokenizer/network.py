"""The BEiT v2 image tokenizer (Peng et al. 2022): vector-quantised knowledge distillation, VQ-KD.

A vision transformer turns a picture into one short unit vector per patch; the nearest entry of a codebook is the
patch's code, the target of masked image modelling. In training a shallow decoder rebuilds a teacher's features from
the codes. Names and shapes are those of the released files, so both load the same way:

    encoder.*  encode_task_layer.*  quantize.*  decoder.*  decode_task_layer.*

Shapes: B pictures, S image side, N patches, D width, K codes, C code dimension, T teacher channels, M vectors.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_dist.model.initialization import generator
from beit3_dist.weights import read_weights_file, require_finite, state_dict_in

LAYER_NORM_EPS = 1e-6
SMALL = 0.02
"""Deviation of the initial weights."""


# Vision transformer ---------------------------------------------------------------------------------------------------


class PatchEmbedding(nn.Module):
    """[B, channels, S, S] -> [B, N, D]: a linear map of every patch."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention whose keys have no bias: it would cancel in the softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """[B, channels, S, S] -> [B, N, D]: normalised patch tokens, CLS left out."""

    def __init__(self, *, grid: int, patch_size: int, channels: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.patch_embed = PatchEmbedding(patch_size, channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.fc_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def positions(self, patches: int) -> Tensor:
        """[1, 1 + patches, D]: the table itself, or resized (bicubic) for pictures of another size than trained on."""
        if patches == self.grid**2:
            return self.pos_embed
        side = math.isqrt(patches)
        table = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat((self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        patches = x.shape[1]
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.positions(patches)
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:])


# Codebook -------------------------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """The tables of the released layout, none of them trained by gradients."""

    weight: Tensor
    """[K, C] unit vectors."""
    cluster_size: Tensor
    """[K] vectors per code at k-means initialisation."""
    embed_avg: Tensor
    """[K, C] zeros; part of the layout only."""
    initted: Tensor
    """[1] one when `weight` holds usable vectors."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(codes, dim))
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed_avg", torch.zeros(codes, dim))
        self.register_buffer("initted", torch.ones(1))


@dataclass(frozen=True)
class CodeUsage:
    """How one step's vectors, of all data-parallel ranks, were spread over the codebook."""

    share: float
    """Codes that were used at least once, as a share of the codebook."""
    perplexity: float
    """Exponential of the entropy of the codes: the number of equally frequent codes that would be as diverse."""


class Quantizer(nn.Module):
    """Nearest-neighbour quantisation on the unit sphere with a codebook that follows the vectors by moving averages.

    `codes` and `look_up` are pure. `initialize` and `update` change the codebook; every data-parallel rank must call
    them together, with as many vectors each, and all ranks end with the same tables.
    """

    KMEANS_ROUNDS = 10
    DEAD_SHARE = 0.1
    """A code is dead when its moving count falls below this share of the mean count. The paper has no revival."""

    cluster_size: Tensor
    """[K] moving average of the vectors per step that chose each code."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = Codebook(codes, dim)
        self.register_buffer("cluster_size", torch.zeros(codes))

    def codes(self, z: Tensor) -> Tensor:
        """[..., C] unit vectors -> [...] int64 codes, by the smallest squared Euclidean distance."""
        weight = self.embedding.weight
        # |z - w|^2 without |z|^2, which is the same for every code.
        return (weight.square().sum(-1) - 2 * z @ weight.t()).argmin(-1)

    def look_up(self, codes: Tensor) -> Tensor:
        """[...] codes -> [..., C] codebook vectors."""
        return F.embedding(codes, self.embedding.weight)

    @torch.no_grad()
    def initialize(self, z: Tensor, key: int) -> None:
        """Sets the codebook by spherical k-means on the vectors [..., C] of all ranks, starting from a keyed draw.

        The vectors are gathered in rank order, which is sample order, so any number of ranks gives the same codebook.
        """
        vectors = gather(z.flatten(0, -2))
        codes, dim = self.embedding.weight.shape
        order = torch.randperm(len(vectors), generator=generator(key, "k-means")).to(z.device)
        # Fewer vectors than codes: some are taken more than once, and update() revives the codes that stay unused.
        self.embedding.weight.copy_(vectors[order[torch.arange(codes, device=z.device) % len(order)]])
        for _ in range(self.KMEANS_ROUNDS):
            counts, sums = cluster(vectors, self.codes(vectors), codes)
            used = (counts > 0)[:, None]
            self.embedding.weight.copy_(torch.where(used, F.normalize(sums, dim=-1), self.embedding.weight))
        if distributed():
            dist.broadcast(self.embedding.weight, src=0)
            dist.broadcast(counts, src=0)
        self.embedding.cluster_size.copy_(counts)
        self.embedding.embed_avg.zero_()
        self.embedding.initted.fill_(1)
        self.cluster_size.copy_(counts)

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor, key: int, decay: float = 0.99) -> CodeUsage:
        """Moves the codebook towards the step's vectors z [..., C] with their codes [...], over all ranks.

        A used code becomes normalize(decay * code + (1 - decay) * mean direction of its vectors); the others keep
        their value. Dead codes then jump to vectors of this step, drawn by `key`, and get the mean count: time to
        prove themselves.
        """
        vectors, weight = z.flatten(0, -2), self.embedding.weight
        counts, sums = cluster(vectors, codes.flatten(), len(weight))
        all_reduce(counts)
        all_reduce(sums)
        moved = F.normalize(decay * weight + (1 - decay) * F.normalize(sums, dim=-1), dim=-1)
        weight.copy_(torch.where((counts > 0)[:, None], moved, weight))
        self.cluster_size.lerp_(counts, 1 - decay)

        mean = self.cluster_size.mean()
        dead = self.cluster_size < self.DEAD_SHARE * mean
        weight.copy_(torch.where(dead[:, None], self.drawn(vectors, key), weight))
        self.cluster_size.copy_(torch.where(dead, mean, self.cluster_size))

        shares = counts / counts.sum()
        return CodeUsage((counts > 0).float().mean().item(), torch.special.entr(shares).sum().exp().item())

    def drawn(self, vectors: Tensor, key: int) -> Tensor:
        """[K, C]: one vector per code, drawn with repeats from the vectors [M, C] of every rank.

        Each rank fills in the rows it holds and the sum puts them together, so no rank gathers all vectors.
        """
        world, rank = (dist.get_world_size(), dist.get_rank()) if distributed() else (1, 0)
        codes, count = len(self.embedding.weight), len(vectors)
        rows = torch.randint(count * world, (codes,), generator=generator(key, "revival")).to(vectors.device)
        mine = rows // count == rank
        picked = torch.where(mine[:, None], vectors[rows % count], 0.0)
        all_reduce(picked)
        return picked


def cluster(vectors: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Counts [K] and sums [K, C] of the vectors [M, C] by their codes [M]."""
    counts = torch.bincount(codes, minlength=size).to(vectors.dtype)
    return counts, vectors.new_zeros(size, vectors.shape[-1]).index_add_(0, codes, vectors)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_reduce(x: Tensor) -> None:
    """Sums x over the ranks in place."""
    if distributed():
        dist.all_reduce(x)


def gather(vectors: Tensor) -> Tensor:
    """[M, C] -> [ranks * M, C] in rank order."""
    if not distributed():
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.cat(parts)


# Tokenizer ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """What a training step needs besides the loss."""

    z: Tensor
    """[B, N, C] unit vectors, detached: the input of Quantizer.update."""
    codes: Tensor
    """[B, N] their codes."""
    reconstruction: Tensor
    """Scalar: mean of 1 - cosine(decoder's output, teacher's features), detached."""
    commitment: Tensor
    """Scalar: mean squared distance of z from its code, detached."""


class VQKD(nn.Module):
    """The image tokenizer. The defaults are the released base model with the three-layer decoder.

    It works in fp32, or under autocast; the quantisation itself is always fp32.
    """

    def __init__(
        self,
        image_size: int = 224,
        *,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        codebook_size: int = 8192,
        code_dim: int = 32,
        decoder_layers: int = 3,
        target_dim: int = 512,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not divisible by patch_size={patch_size}")
        if width % heads:
            raise ValueError(f"width={width} is not divisible by heads={heads}")
        self.geometry = {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "layers": layers,
            "heads": heads,
            "codebook_size": codebook_size,
            "code_dim": code_dim,
            "decoder_layers": decoder_layers,
            "target_dim": target_dim,
        }
        self.image_size, self.patch_size, self.grid = image_size, patch_size, image_size // patch_size
        self.encoder = VisionTransformer(
            grid=self.grid, patch_size=patch_size, channels=3, width=width, layers=layers, heads=heads
        )
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.quantize = Quantizer(codebook_size, code_dim)
        self.decoder = VisionTransformer(
            grid=self.grid, patch_size=1, channels=code_dim, width=width, layers=decoder_layers, heads=heads
        )
        self.decode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, target_dim))
        if self.quantize.cluster_size.device.type != "meta":
            self.initialize(seed=0)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Sets every parameter and the codebook (random unit vectors) as a function of (seed, name).

        Matrices and tables: a normal of deviation 0.02; the output matrices of block l = 1..L are divided by
        sqrt(2 l), as in BEiT.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                value = torch.empty(parameter.shape).normal_(std=SMALL, generator=generator(seed, name))
                if output := re.search(r"blocks\.(\d+)\.(?:attn\.proj|mlp\.fc2)\.", name):
                    value /= math.sqrt(2 * (int(output[1]) + 1))
                parameter.copy_(value)
        codebook = self.quantize.embedding.weight
        vectors = torch.randn(codebook.shape, generator=generator(seed, "quantize.embedding.weight"))
        codebook.copy_(F.normalize(vectors, dim=-1))

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] [B, 3, S, S] -> unit vectors [B, N, C], fp32, before quantisation."""
        side = pixels.shape[-1]
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side) or side % self.patch_size:
            raise ValueError(
                f"pixels must be [B, 3, S, S] with S a multiple of {self.patch_size}, not {list(pixels.shape)}"
            )
        if not pixels.is_floating_point():
            raise ValueError(f"pixels must be floats in [0, 1], not {pixels.dtype}")
        features = self.encoder(2 * pixels - 1)
        with torch.autocast(pixels.device.type, enabled=False):
            return F.normalize(self.encode_task_layer(features.float()), dim=-1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], float [B, 3, S, S] -> codes int64 [B, N], row by row. A pure function.

        S may differ from `image_size`: the position table is then resized, and N = (S / patch_size)^2.
        """
        z = self.embed(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.quantize.codes(z)

    def forward(self, pixels: Tensor, teacher_features: Tensor) -> tuple[Tensor, Quantized]:
        """The training loss for pixels [B, 3, S, S] in [0, 1] and their teacher features [B, N, T]; changes no state.

        loss = mean(1 - cosine(decoded, teacher)) + mean((z - its code)^2), the code held fixed (beta = 1); gradients
        pass the quantisation straight through. `quantize.update(result.z, result.codes, key)` moves the codebook.
        """
        z = self.embed(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            codes = self.quantize.codes(z.detach())
            z_q = self.quantize.look_up(codes)
            commitment = F.mse_loss(z, z_q)
            through = z + (z_q - z).detach()
        decoded = self.decode_task_layer(self.decoder(through.transpose(1, 2).unflatten(2, (self.grid, self.grid))))
        reconstruction = (1 - F.cosine_similarity(decoded.float(), teacher_features.float(), dim=-1)).mean()
        return (reconstruction + commitment, Quantized(z.detach(), codes, reconstruction.detach(), commitment.detach()))


# Files ----------------------------------------------------------------------------------------------------------------

TRAINING_ONLY = ("loss", "teacher", "scaling")
"""First letters of the names that released files hold beside the tokenizer."""


def save_vqkd(model: VQKD, path: str | os.PathLike[str]) -> None:
    """Writes {model: tensors in the released layout, geometry: integers}; `path` is replaced in one step."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.tmp{os.getpid()}")
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    try:
        with unfinished.open("wb") as file:
            torch.save({"model": tensors, "geometry": model.geometry}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_vqkd(path: str | os.PathLike[str]) -> VQKD:
    """The tokenizer of a file of ours or of BEiT v2, frozen, in eval mode, fp32, on the CPU.

    Everything but the number of heads follows from the tensors' shapes. Our files name the heads; without a name they
    are width / 64, as in the released models. Raises ValueError naming `image_tokenizer` for anything else.
    """
    state, heads = read_tokenizer(path)
    try:
        geometry = infer_geometry(state, heads)
        with torch.device("meta"):
            model = VQKD(**geometry)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"image_tokenizer={path} is not a VQ-KD image tokenizer: {reason}") from error
    require_finite(model.state_dict().items(), f"image_tokenizer={path}")
    return model.requires_grad_(False).eval()


def read_tokenizer(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], int | None]:
    """The tokenizer's tensors by name and its number of heads, if the file says so."""
    if Path(path).is_dir():
        raise ValueError(f"image_tokenizer={path} is a folder: name its file, as {path}/image_tokenizer.pth of a run")
    if not Path(path).is_file():
        raise ValueError(f"image_tokenizer={path} does not exist; launchers/train_image_tokenizer.py makes one")
    try:
        content = read_weights_file(path)
        state = state_dict_in(content, str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"image_tokenizer={error}") from error
    geometry = content.get("geometry")
    heads = geometry.get("heads") if isinstance(geometry, dict) else None
    if heads is not None and (type(heads) is not int or heads < 1):
        raise ValueError(f"image_tokenizer={path} is not a VQ-KD image tokenizer: it would have {heads!r} heads")
    return {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}, heads


def infer_geometry(state: dict[str, Tensor], heads: int | None) -> dict[str, int]:
    """VQKD's arguments from the shapes of its tensors. Raises KeyError for a missing one."""

    def layers(part: str) -> int:
        return sum(re.fullmatch(rf"{part}\.blocks\.\d+\.norm1\.weight", name) is not None for name in state)

    width, _, patch_size, _ = state["encoder.patch_embed.proj.weight"].shape
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    grid = math.isqrt(state["encoder.pos_embed"].shape[1] - 1)
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "width": width,
        "layers": layers("encoder"),
        "heads": heads or width // 64,
        "codebook_size": codebook_size,
        "code_dim": code_dim,
        "decoder_layers": layers("decoder"),
        "target_dim": state["decode_task_layer.2.weight"].shape[0],
    }
