"""How equal is equal: relative L2 norms per tensor, against the noise of fp32.

fp32 noise at base width was measured at 8e-7 (hidden states) and 1.6e-6 (gradients); the bound is 1e-5. A gradient
that is exactly zero in theory (a key bias) is noise in practice, so a tensor's scale is at least a thousandth of the
model's mean gradient norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

BOUND = 1e-5


def assert_close(ours: Tensor, theirs: Tensor, what: str, bound: float = BOUND) -> None:
    """|ours - theirs| <= bound * |theirs|, in the L2 norm."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape, f"{what}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    difference, scale = (ours - theirs).norm().item(), theirs.norm().item()
    assert difference <= bound * scale, (
        f"{what}: relative difference {difference / max(scale, 1e-30):.2e} exceeds {bound:.0e}"
    )


def assert_tensors_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], bound: float = BOUND) -> None:
    """|difference| <= bound * max(|g|, 1e-3 * |g of model| / sqrt(tensors)) for all gradients (or weights)."""
    assert ours.keys() == theirs.keys(), f"tensors of other parameters: {sorted(ours.keys() ^ theirs.keys())[:5]}"
    of_model = math.sqrt(sum(g.detach().double().square().sum().item() for g in theirs.values()))
    floor = 1e-3 * of_model / math.sqrt(len(theirs))
    wrong = {}
    for name, gradient in theirs.items():
        reference = gradient.detach().double()
        difference = (ours[name].detach().double() - reference).norm().item()
        allowed = bound * max(reference.norm().item(), floor)
        if not difference <= allowed:
            wrong[name] = difference / allowed
    assert of_model > 0, "all reference tensors are zero: the comparison shows nothing"
    assert not wrong, f"{len(wrong)} tensors differ, in units of the bound: {dict(list(wrong.items())[:5])}"
