"""A profile of some steps of a run: a trace that opens in Perfetto (ui.perfetto.dev) and a table of the top kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 2
"""Steps before the profiled ones, which allocate memory and choose algorithms."""
TOP_KERNELS = 40


@contextmanager
def profiled(steps: int, folder: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Profiles `steps` steps of this process, after `SKIPPED` others, into a folder:

        with profiled(3, run_folder / "profile", device) as step_has_ended:
            for step in ...:
                ...
                step_has_ended()

    `trace.json` is for Perfetto; `kernels.txt` lists the operations that took longest by themselves. With 0 steps it
    does nothing. Of a run that ends earlier, the steps that there were are profiled.
    """
    if not steps:
        yield lambda: None
        return
    on_gpu = device.type == "cuda"

    def write(finished: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / "trace.json"))
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=by, row_limit=TOP_KERNELS, max_name_column_width=80)
        (folder / "kernels.txt").write_text(table + "\n", encoding="utf-8")

    with profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
        schedule=schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
    ) as profiler:
        yield profiler.step
