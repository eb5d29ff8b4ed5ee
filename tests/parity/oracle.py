"""torchscale 0.3.0 as an outside reference; the benchmark measures against it too and knows how to import it."""

from __future__ import annotations

from beit3_dist.tools.benchmarks import torchscale

torchscale_beit3 = torchscale.torchscale_beit3

__all__ = ["torchscale_beit3"]
