"""Tensor parallelism: every layer's matrices are cut over neighbouring ranks, after the model is built.

The model's layers say how they are cut (model/cut.py); they keep their names and get the local shapes. What crosses
ranks happens where attention and an expert's two matrices `enter` and `leave`, as in Megatron-LM (Shoeybi et al. 2019):

    attention and fc1 ... fc2:   copy in, all-reduce out
    with sequence parallelism:   all-gather in, reduce-scatter out, and norms, residuals and drop path in between
                                 work on each rank's share of the tokens (Korthikanti et al. 2022); the norms' gradients
                                 are added up once a step (parallel/token_norms.py)

Word vectors and both heads are cut by rows, with a cross-entropy that never gathers logits. Sub-LayerNorms over a cut
width reduce their moments. What they keep for the backward pass is what whole ones keep: a head its logits, which
become their gradient in place, a norm its input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu

from beit3_dist.config import ModelConfig, require_divides
from beit3_dist.kernels.cross_entropy.definition import at_least_fp32
from beit3_dist.kernels.cross_entropy.in_place import CHUNK
from beit3_dist.kernels.gelu_layer_norm import GeluLayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.attention import Attention
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.cut import cut_for, cuts_of, dimensions_of
from beit3_dist.model.encoder import Encoder
from beit3_dist.model.head import Head
from beit3_dist.model.multiway import FeedForward, join
from beit3_dist.model.token_layout import Selection, TokenLayout
from beit3_dist.parallel.collectives import (
    all_gather,
    copy,
    divide,
    gather,
    gather_replicated,
    reduce,
    reduce_scatter,
    scatter,
)


def check_tensor(config: ModelConfig, ranks: int) -> None:
    """Raises ValueError where the model cannot be cut into so many parts."""
    require_divides("parallel.tensor", ranks, "model.heads", config.heads)
    require_divides("parallel.tensor", ranks, "model.vision_heads", config.vision_heads)
    require_divides("parallel.tensor", ranks, "model.ffn_width", config.ffn_width)


def apply_tensor_parallelism(model: BEiT3, group: dist.ProcessGroup, sequence: bool) -> None:
    """Cuts a model on the meta device to this rank's parts. `sequence`: shard the tokens between the layers too."""
    ranks, rank = group.size(), group.rank()
    check_tensor(model.config, ranks)
    cuts = cuts_of(model)
    for name, layer in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if (parallel := _parallel_layer(layer, group)) is not None:
            setattr(model.get_submodule(owner), leaf, parallel)
    for module in model.modules():
        if isinstance(module, FeedForward):  # whose tokens may come in any order: shares are gathered rank by rank
            enter, leave = (gather, reduce_scatter) if sequence else (copy, reduce)
            module.enter, module.leave = partial(enter, group=group), partial(leave, group=group)
        elif isinstance(module, Attention):
            around: Any = _SequenceAttention(module, group) if sequence else _WholeAttention(group)
            module.enter, module.leave = around.enter, around.leave
        elif isinstance(module, Encoder) and sequence:
            shares = _TokenShares(group)
            module.enter, module.leave = shares.enter, shares.leave
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if (cut := cut_for(cuts, name, rank, ranks)) is not None:
            local = nn.Parameter(cut.of(parameter.detach()), parameter.requires_grad)
            setattr(model.get_submodule(owner), leaf, local)


def _parallel_layer(layer: nn.Module, group: dist.ProcessGroup) -> nn.Module | None:
    """What stands in a layer's place, by how it is cut; None: the layer itself."""
    dimension = dimensions_of(layer).get("weight")
    match layer:
        case nn.Embedding() if dimension == 0:
            return VocabParallelEmbedding(layer, group)
        case Head() if dimension == 0:
            return VocabParallelHead(layer, group)
        case Linear() if dimension == 1:
            return RowParallelLinear(layer, group)
        case nn.LayerNorm() if dimension == 0:
            return ShardedLayerNorm(layer, group)
    return None


def mark_model_parallel(model: nn.Module, tensor_rank: int, cuts: Collection[str]) -> None:
    """Tells DeepSpeed which parameters count on this rank in the norm of the whole model: its own parts, which `cuts`
    names, and what is replicated over the tensor ranks once. An unmarked one would count on model-parallel rank 0
    alone."""
    parameters: Iterable[tuple[str, Any]] = model.named_parameters()  # DeepSpeed reads an attribute of them
    for name, parameter in parameters:
        parameter.model_parallel = name in cuts or tensor_rank == 0


# ------------------------------------------------------------------------------------------------------------ layers


class RowParallelLinear(Linear):
    """x [T, in / ranks] -> partial sums [T, out]; the bias, whole on every rank, is added once over all of them."""

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__(whole.in_features, whole.out_features, device="meta")
        self.weight, self.bias, self.group = whole.weight, whole.bias, group

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, divide(self.bias, self.group))


class ShardedLayerNorm(nn.Module):
    """LayerNorm over a width that is cut over the tensor ranks: x [T, width / ranks], weight and bias likewise. Where
    it comes after GELU, its input is GELU's."""

    def __init__(self, whole: nn.LayerNorm, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.group = whole.weight, whole.bias, whole.eps, group
        self.after_gelu = isinstance(whole, GeluLayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        return _ShardedNorm.apply(x, self.weight, self.bias, self.eps, self.after_gelu, self.group)


class _ShardedNorm(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the whole width, moments in fp32. It keeps x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, after_gelu: bool, group: dist.ProcessGroup
    ) -> Tensor:
        wide = (gelu(x) if after_gelu else x).float()
        mean = wide.mean(-1)
        moments = torch.stack([mean, wide.var(-1, unbiased=False)])
        everyones = all_gather(moments, group).view(group.size(), *moments.shape)
        # Moments of equal parts join as E[variance] + E[(mean - joint mean)^2] (Chan et al. 1979): no cancellation.
        joint = everyones[:, 0].mean(0)
        variance = everyones[:, 1].mean(0) + (everyones[:, 0] - joint).square().mean(0)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, joint, scale)
        ctx.after_gelu, ctx.group = after_gelu, group
        return ((wide - joint[:, None]) * scale[:, None]).to(x.dtype) * weight + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        wide = (gelu(x) if ctx.after_gelu else x).float()
        normal = (wide - mean[:, None]) * scale[:, None]
        of_weight, of_bias = (gradient * normal.to(x.dtype)).sum(0), gradient.sum(0)
        wide = (gradient * weight).float()
        means = torch.stack([wide.mean(-1), (wide * normal).mean(-1)])
        dist.all_reduce(means, group=ctx.group)
        means /= ctx.group.size()
        out = ((wide - means[0][:, None] - normal * means[1][:, None]) * scale[:, None]).to(x.dtype)
        of_x = torch.ops.aten.gelu_backward(out, x) if ctx.after_gelu else out
        return of_x, of_weight, of_bias, None, None, None


class VocabParallelEmbedding(nn.Module):
    """Word ids [W] -> [W, D]; each rank holds a range of the rows."""

    def __init__(self, whole: nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = whole.weight, group

    def forward(self, words: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = words - self.group.rank() * rows
        mine = (local >= 0) & (local < rows)
        vectors = embedding(local.clamp(0, rows - 1), self.weight) * mine[:, None]
        return reduce(vectors, self.group)


class VocabParallelHead(Head):
    """A head whose classes are cut over the tensor ranks; padding classes have a logit of minus infinity."""

    def __init__(self, whole: Head, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.classes, self.group = whole.weight, whole.bias, whole.classes, group

    def forward(self, hidden_MD: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return self.logits(hidden_MD)
        logits = self.compute(copy(hidden_MD, self.group), self.weight, self.bias)
        first = self.group.rank() * logits.shape[1]
        return _VocabParallelCrossEntropy.apply(logits, targets - first, max(0, self.classes - first), self.group)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """All logits [M, classes] on every rank, for what is computed alike on all of them (beam search, smoothing)."""
        local = self.compute(copy(hidden_MD, self.group), self.weight, self.bias)
        return gather_replicated(local.T, self.group).T[:, : self.classes]


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Logits [M, classes / ranks], of whose columns the first `classes` are none of padding, and targets relative to
    the rank's first class -> [2, M]: losses, hits.

    The logits, which nobody else reads, become their gradient in place, and what has to be wider is it some rows at a
    time, as in a whole head (kernels/cross_entropy/in_place.py).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, classes: int, group: dist.ProcessGroup) -> Tensor:
        logits, width = logits.detach(), logits.shape[1]
        logits[:, classes:] = -torch.inf
        best, index = logits.max(-1)
        best = at_least_fp32(best)
        top = best.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        mine = (targets >= 0) & (targets < width)
        local = targets.clamp(0, width - 1)[:, None]
        picked = torch.where(mine, at_least_fp32(logits.gather(1, local)[:, 0]), 0.0)
        chunk = max(1, CHUNK // width)
        parts = [*zip(logits.split(chunk), top[:, None].split(chunk), strict=True)]
        sums = torch.stack([torch.cat([_exponentials(*part).sum(-1) for part in parts]), picked])
        dist.all_reduce(sums, group=group)
        # The prediction is the first of the largest logits, as in torch's argmax.
        first = group.rank() * width
        prediction = torch.where(best == top, index + first, torch.iinfo(torch.int64).max)
        dist.all_reduce(prediction, dist.ReduceOp.MIN, group=group)
        at_target, totals = [], sums[0, :, None].split(chunk)
        for (part, its_top), total, column in zip(parts, totals, local.split(chunk), strict=True):
            softmax = (part if at_least_fp32(part) is part else _exponentials(part, its_top)).div_(total)
            at_target.append(softmax.gather(1, column))
            if softmax is not part:
                part.copy_(softmax)
        ctx.softmax = logits
        ctx.save_for_backward(torch.cat(at_target), local, mine)
        return torch.stack([sums[0].log() + top - sums[1], (prediction == targets + first).float()])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_2M: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.softmax is None:
            raise RuntimeError("this cross-entropy has gone backward before: its logits are overwritten")
        (at_target, local, mine), factor = ctx.saved_tensors, gradient_2M[0][:, None]
        gradient, ctx.softmax = ctx.softmax.mul_(factor), None
        # softmax - 1 in fp32: a share near 1 is 1 in bf16, but its distance from 1 keeps 8 bits.
        of_target = at_target * factor - factor * mine[:, None]
        return gradient.scatter_(1, local, of_target.to(gradient.dtype)), None, None, None


def _exponentials(logits: Tensor, top: Tensor) -> Tensor:
    """exp(logit - top), at least fp32; logits that are that are overwritten."""
    return at_least_fp32(logits).sub_(top).exp_()


# ------------------------------------------------------------------------------------------- what crosses the ranks


@dataclass(frozen=True)
class GatheredTokens(TokenLayout):
    """The whole micro-batch's layout, as attention needs it, with the place of each token among the gathered shares."""

    rows: Tensor | None = None
    """int64 [T]: row of each token in the gathered matrix [ranks * share]."""
    share: int = 0
    """Tokens of a rank, padding included."""


@dataclass(frozen=True)
class SharedTokens(TokenLayout):
    """The layout of one rank's share of the tokens: of each of the four segments an equal part, padded at its end."""

    whole: GatheredTokens | None = None
    """The whole micro-batch's layout."""
    parts: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Tokens of the segments in this share."""
    samples_of_tokens: Tensor | None = None
    """int64 [share]: sample of each token; padding belongs to sample 0."""
    returned: Tensor | None = None
    """int64 [T or M]: rows of the gathered matrix that the stack of blocks returns."""

    @property
    def segments(self) -> tuple[int, int, int, int]:
        return self.parts

    def token_samples(self, device: torch.device) -> Tensor:
        assert self.samples_of_tokens is not None
        return self.samples_of_tokens


def share_tokens(layout: TokenLayout, ranks: int, rank: int, device: torch.device) -> SharedTokens:
    """Cuts each segment by itself, padded to a multiple of the ranks, so that every rank runs every expert."""
    a, b, c, d = (-(-segment // ranks) for segment in layout.segments)
    parts = (a, b, c, d)
    share, rows, before = sum(parts), [], 0
    for segment, part in zip(layout.segments, parts, strict=True):
        token = torch.arange(segment, device=device)
        rows.append(token // max(part, 1) * share + before + token % max(part, 1))
        before += part
    place = torch.cat(rows)
    samples = torch.zeros(ranks * share, dtype=torch.int64, device=device)
    samples[place] = layout.token_samples(device)
    whole = GatheredTokens(layout.groups, rows=place, share=share)
    mine = samples[rank * share : (rank + 1) * share]
    return SharedTokens(layout.groups, whole=whole, parts=parts, samples_of_tokens=mine)


class _WholeAttention:
    """Around attention, all of whose tokens every rank has; the experts' slices cross the ranks together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def enter(self, slices: list[Tensor], layout: TokenLayout) -> tuple[list[Tensor], TokenLayout]:
        x_TD = copy(join(slices), self.group)
        return list(x_TD.split([len(part) for part in slices])), layout

    def leave(self, slices: list[Tensor], layout: TokenLayout) -> list[Tensor]:
        return [reduce(join(slices), self.group)]


class _SequenceAttention:
    """Around attention, which needs the tokens in the layout's order and without the shares' padding."""

    def __init__(self, attention: Attention, group: dist.ProcessGroup) -> None:
        self.slices, self.group = attention.q.slices, group

    def enter(self, slices: list[Tensor], layout: SharedTokens) -> tuple[list[Tensor], GatheredTokens]:
        assert layout.whole is not None and layout.whole.rows is not None
        x_TD = gather(join(slices), self.group).index_select(0, layout.whole.rows)
        return self.slices(x_TD, layout.whole), layout.whole

    def leave(self, slices: list[Tensor], layout: GatheredTokens) -> list[Tensor]:
        x_TD = join(slices)
        assert layout.rows is not None
        gathered = x_TD.new_zeros(self.group.size() * layout.share, x_TD.shape[1])
        return [reduce_scatter(gathered.index_copy(0, layout.rows, x_TD), self.group)]


class _TokenShares:
    """Around the stack of blocks: all tokens -> this rank's share, and back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def enter(
        self, x_TD: Tensor, layout: TokenLayout, selection: Selection | None
    ) -> tuple[Tensor, SharedTokens, None]:
        shared = share_tokens(layout, self.group.size(), self.group.rank(), x_TD.device)
        assert shared.whole is not None and shared.whole.rows is not None
        # Every rank's last block runs its whole share: shares of the selected tokens alone would need another layout.
        rows, share = shared.whole.rows, shared.whole.share
        shared = replace(shared, returned=rows if selection is None else rows[selection.rows])
        padded = x_TD.new_zeros(self.group.size() * share, x_TD.shape[1])
        return scatter(padded.index_copy(0, rows, x_TD), self.group), shared, None

    def leave(self, x_TD: Tensor, layout: SharedTokens) -> Tensor:
        assert layout.returned is not None
        return gather_replicated(x_TD, self.group).index_select(0, layout.returned)
