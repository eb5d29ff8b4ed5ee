"""A process on the CPU gets the memory of a step from the system once."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEP = """
import sys
from resource import RUSAGE_SELF, getrusage
import torch
from beit3_dist.parallel.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def pages_of_a_step():
    before = getrusage(RUSAGE_SELF).ru_minflt
    large, small = torch.ones(50_000_000), [torch.ones(500_000) for _ in range(50)]
    return getrusage(RUSAGE_SELF).ru_minflt - before
print(min(pages_of_a_step() for _ in range(5)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
@pytest.mark.slow
def test_freed_memory_is_used_again() -> None:
    """A step of 300 MB is 73,000 pages of 4 KB. Kept, a later one takes next to none; without, each takes those of its
    large tensor at least."""
    pages = {
        how: int(subprocess.run([sys.executable, "-c", STEP, how], capture_output=True, check=True).stdout)
        for how in ("keep", "return")
    }
    assert pages["keep"] < 1000 < 40_000 < pages["return"]
