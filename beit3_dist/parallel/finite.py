"""One sign for all ranks that a step must not change the model."""

from __future__ import annotations

from torch import Tensor


def spoil_if_not_finite(loss: Tensor) -> Tensor:
    """The same loss, bit for bit, but one that is not finite has a gradient that is NaN everywhere.

    A loss can be infinite while its gradient is finite. With this the norm of the whole model's gradient, which all
    ranks know anyway, tells them of a bad loss anywhere, without another reduction and without waiting for the device.
    """
    factor = loss.detach().new_ones(()).masked_fill(~loss.detach().isfinite(), float("nan"))
    return loss * factor
