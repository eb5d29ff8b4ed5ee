"""Norms that each tensor rank computes on its own tokens: their gradients are added up once a step.

With sequence parallelism the norms of the blocks see a share of the tokens on each rank, so that the gradients of their
replicated weights and biases are partial sums. They are added up where the step is about to take them: after the last
backward pass of the step, and after the replicas' reduction, since both are sums. So one all-reduce over the tensor
ranks does for all of them, whatever the micro-batches and the layers, and where ZeRO shares out gradients each rank
sends only the part that it steps on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.parallel.mesh import Groups


class TokenNorms:
    """The trained parameters of the norms in a model's blocks that are whole on every tensor rank."""

    def __init__(self, blocks: nn.Module, groups: Groups, zero_stage: int) -> None:
        """`blocks`: cut by `apply_tensor_parallelism`, whose norms over cut widths are others than `LayerNorm`."""
        norms = [module for module in blocks.modules() if isinstance(module, LayerNorm)]
        self._groups, self._zero_stage = groups, zero_stage
        trained = (parameter for norm in norms for parameter in norm.parameters() if parameter.requires_grad)
        self._parameters = dict.fromkeys(trained)
        """In one order on all ranks."""

    @torch.no_grad()
    def add_up(self, optimizer: Any) -> None:
        """Completes the gradients that the DeepSpeed engine's `optimizer` is about to step with. Collective over the
        tensor ranks, which hold the same parts."""
        if self._zero_stage == 0:
            self._sum([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        else:
            optimizer.change_gradients(self._parameters, self._sum)

    def _sum(self, gradients: list[Tensor]) -> None:
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        # Gradients that are offloaded lie on the host.
        group = self._groups.tensor if flat.device == self._groups.mesh.device else self._groups.tensor_hosts
        dist.all_reduce(flat, group=group)
        torch._foreach_copy_(gradients, _unflatten_dense_tensors(flat, gradients))
