"""The normal distribution in registers, for GELU and its slope."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cumulative_and_density(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """P(x) and p(x) in fp32, from one exponential: with it kernels wait for memory, with erf they would compute.

    1 - P(|x|) = t (a1 + t (a2 + ...)) exp(-x^2 / 2) / 2 with t = 1 / (1 + c |x|), Abramowitz and Stegun 1964, 7.1.26:
    P is right to 8e-8, which is fp32's own rounding near 1.
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    tail = 1.061405429 * t - 1.453152027
    tail = tail * t + 1.421413741
    tail = tail * t - 0.284496736
    tail = tail * t + 0.254829592
    tail = 0.5 * tail * t * bell
    return tl.where(x < 0, tail, 1.0 - tail), 0.3989422804014327 * bell
