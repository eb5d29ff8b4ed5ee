"""Gradients are sent beside the backward pass where DeepSpeed waits for its end, or loses some: ZeRO-0, ZeRO-1 in fp32.

`PlainReduction` is ZeRO-0's: DeepSpeed 0.19's engine (`buffered_allreduce_fallback`) joins and sends all gradients when
the last backward pass of a step is over. `flat_step.FlatStage12` is the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class InOrder:
    """Hands on the parameters whose gradients are complete in one order on all ranks: from the model's end to its
    begin, as a backward pass reaches them. What autograd finishes before its turn waits."""

    def __init__(self, parameters: Iterable[nn.Parameter], hand_on: Callable[[Any], None]) -> None:
        """`parameters`: in the model's order."""
        self._order = [*parameters][::-1]
        self._hand_on = hand_on
        self._arrived: set[nn.Parameter] = set()
        self._next = 0

    def arrive(self, parameter: nn.Parameter) -> None:
        """The step's last backward pass has made its gradient."""
        self._arrived.add(parameter)
        while self._next < len(self._order) and self._order[self._next] in self._arrived:
            self._next += 1
            self._hand_on(self._order[self._next - 1])

    def end(self) -> None:
        """Hands on the rest, of which that pass did not reach all; then the next step begins."""
        for parameter in self._order[self._next :]:
            self._hand_on(parameter)
        self._arrived.clear()
        self._next = 0


class PlainReduction:
    """ZeRO-0's, in buckets of `reduce_bucket_size` elements, or of one larger parameter, by DeepSpeed's arithmetic."""

    def __init__(self, engine: Any, parameters: Iterable[nn.Parameter]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._engine, self._size = engine, engine.zero_reduce_bucket_size()
        self._stream = torch.cuda.Stream() if trained[0].is_cuda else None
        self._in_order = InOrder(trained, self._take)
        self._bucket: list[Tensor] = []
        self._elements = 0
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._arrived)
        engine.buffered_allreduce_fallback = self.end

    def _arrived(self, parameter: Any) -> None:
        if self._engine.is_gradient_accumulation_boundary():
            self._in_order.arrive(parameter)

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # other replicas may have one
        if self._bucket and self._elements + parameter.numel() > self._size:
            self._send()
        self._bucket.append(parameter.grad)
        self._elements += parameter.numel()

    def _send(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            self._engine._reduce_non_expert_gradients(self._bucket, self._size)
        self._bucket, self._elements = [], 0

    @torch.no_grad()
    def end(self, grads: None = None, elements_per_buffer: int = 0) -> None:
        """After the last backward pass of a step: in place of the engine's own reduction."""
        self._in_order.end()
        if self._bucket:
            self._send()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
