"""What a step's time goes to on this rank: data, forward, backward, reduction, optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "reduce", "optimizer")
"""reduce: what of the gradients' reduction nothing hides, waiting for other ranks included."""
PROBE, PRODUCTS = 1024, 8
"""Side of the square matrices whose products tell how fast the device is by itself, and how many of them."""


class Phases:
    """A clock of one step. On a GPU its marks are events, which neither wait for the device nor make it wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack: list[str] = []
        self._marks: list[tuple[str, Any]] = []
        """(what began, or went on, then, when); "" is none of PHASES."""

    def begin(self) -> None:
        """A step begins."""
        self._marks.clear()
        self._mark()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Inside a phase; one inside another interrupts it."""
        self._stack.append(phase)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def inside(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function as a phase."""

        def clocked(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return function(*args, **kwargs)

        return clocked

    def _mark(self) -> None:
        when: Any = time.perf_counter()
        if self._device.type == "cuda":
            when = torch.cuda.Event(enable_timing=True)
            when.record()
        self._marks.append((self._stack[-1] if self._stack else "", when))

    def seconds(self) -> list[float]:
        """Of PHASES, since `begin`. Waits for the device."""
        taken = dict.fromkeys(PHASES, 0.0)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                taken[phase] += start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
        return list(taken.values())


def probe_s(device: torch.device) -> float:
    """Seconds of products that depend on nobody else: how fast the device is now. Waits for it."""
    factor = torch.ones(PROBE, PROBE, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    phases = Phases(device)
    factor @ factor
    phases.begin()
    with phases("forward"):
        for _ in range(PRODUCTS):
            factor @ factor
    return sum(phases.seconds())
