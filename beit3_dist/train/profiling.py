"""A profile of some steps of a run: a trace that opens in Perfetto (ui.perfetto.dev) and a table of the top kernels."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 2
"""Steps before the profiled ones, which allocate memory and choose algorithms."""
TOP_KERNELS = 40


class StepProfiler:
    """Profiles `steps` steps of this process, after `SKIPPED` others, into a folder:

        with StepProfiler(3, run_folder / "profile", device) as profiler:
            for step in ...:
                ...
                profiler.step()

    `trace.json` is for Perfetto; `kernels.txt` lists the operations that took longest by themselves. With 0 steps it
    does nothing. Of a run that ends earlier, the steps that there were are profiled.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device) -> None:
        self._folder, self._cuda = folder, device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        self._profile = (
            profile(
                activities=activities,
                schedule=schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            if steps
            else None
        )

    def __enter__(self) -> StepProfiler:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, trace)

    def step(self) -> None:
        """A step has ended."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, finished: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._folder / "trace.json"))
        by = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=by, row_limit=TOP_KERNELS, max_name_column_width=80)
        (self._folder / "kernels.txt").write_text(table + "\n", encoding="utf-8")
