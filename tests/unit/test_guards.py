"""Loss spikes, the signals that a run must go, and the fields that configure the guards."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import GuardConfig
from beit3_dist.data.faults import Fault, OfStorage, StreamFailed
from beit3_dist.leaving import SIGNALS
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run import preemption
from beit3_dist.run.endings import AskedToGo, RunStopped, StorageLost
from beit3_dist.run.guards.bad_samples import BadSamples
from beit3_dist.run.guards.spikes import SpikeMonitor, last_losses
from beit3_dist.run.preemption import StopRequest, interrupt_main_thread


def falling_losses(steps: int) -> list[float]:
    """From 10 to 2, with noise of 1 %."""
    draw = random.Random(0)
    return [(2 + 8 * math.exp(-step / 100)) * draw.gauss(1, 0.01) for step in range(steps)]


def test_an_undisturbed_run_is_quiet() -> None:
    monitor = SpikeMonitor(window=100, factor=8.0)
    assert [monitor.check(step, loss) for step, loss in enumerate(falling_losses(2000))] == [""] * 2000


def test_a_spike_is_named_with_step_and_ratio_and_so_is_the_next_one() -> None:
    monitor = SpikeMonitor(window=100, factor=8.0)
    warnings = {}
    for step, loss in enumerate(falling_losses(1000)):
        if warning := monitor.check(step, loss * (1.5 if step in (700, 703) else 1.0)):
            warnings[step] = warning
    assert list(warnings) == [700, 703]
    assert "step 700: loss 2.999" in warnings[700] and "deviations above 2" in warnings[700]
    ratio = float(warnings[700].partition("lies ")[2].split()[0])
    assert 35 < ratio < 70  # 50 % over noise of 1 %, measured from 100 losses


def test_no_warning_before_the_window_is_full() -> None:
    monitor = SpikeMonitor(window=100, factor=8.0)
    assert not any([monitor.check(step, 2.0) for step in range(99)] + [monitor.check(99, 50.0)])
    assert monitor.check(100, 50.0)


def test_the_monitor_goes_on_from_the_metrics_of_the_run(tmp_path: Path) -> None:
    """Its only state are losses, which metrics.jsonl holds to the last bit; skipped steps have none."""
    losses = falling_losses(1000)[700:]
    whole = SpikeMonitor(window=100, factor=2.0)
    warnings = [whole.check(step, loss) for step, loss in enumerate(losses)]
    records = [{"step": step, "loss": loss, "skipped": 0} for step, loss in enumerate(losses[:250])]
    records.insert(200, {"step": 200, "loss": None, "skipped": 1, "non_finite": ["loss"]})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    resumed = SpikeMonitor(100, 2.0, last_losses(tmp_path / "metrics.jsonl", 100))
    assert [resumed.check(step, losses[step]) for step in range(250, 300)] == warnings[250:]
    assert any(warnings[250:]), "nothing was compared"
    assert last_losses(tmp_path / "nowhere", 100) == []


@pytest.fixture
def same_signals() -> Iterator[None]:
    """A run that is over leaves its process deaf, which for a run is the end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def watched(folder: Path, share: float, state: TrainState) -> BadSamples:
    return BadSamples(share, folder, Mesh(0, 1, 0, 1, torch.device("cpu")), state)


def fault(step: int, shard: str = "a.tar", reason: str = "undecodable image: 7 bytes") -> str:
    return json.dumps({"step": step, "shard": shard, "key": "k", "reason": reason})


def test_the_report_of_bad_samples_does_without_lines_that_are_not_whole(tmp_path: Path) -> None:
    (tmp_path / "quarantine.jsonl").write_text("\n".join([*[fault(9)] * 3, fault(9)[:30], "", "null", "{}"]) + "\n")
    guard = watched(tmp_path, 0.5, TrainState())
    guard.check(TrainState(step=9, consumed={"images": 20_000}, bad_samples=10_000))
    with pytest.raises(RunStopped) as stop:
        guard.check(TrainState(step=9, consumed={"images": 20_000}, bad_samples=10_001))
    for part in ("10,001 of 20,000 samples", "a.tar (3)", "undecodable image (3)", "4 of its lines cannot be read"):
        assert part in str(stop.value)


def test_data_that_go_bad_late_in_a_run_stop_it_soon(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half of the samples from step 500,001 on: 3,072 of 6,144 a step, against 61,440 in a thousand steps."""
    state = TrainState(step=500_000, consumed={"images": 500_000 * 6_144}, bad_samples=500_000)
    guard = watched(tmp_path, 0.01, state)
    lines = [*[fault(step, "old.tar", "empty caption") for step in range(9)], fault(500_001), fault(500_020)]
    (tmp_path / "quarantine.jsonl").write_text("\n".join(lines) + "\n")
    for _ in range(20):
        state.advance({"images": 6_144}, 3_072)
        guard.check(state)
    assert len(caplog.messages) == 20 and "step 500001: 3072 bad samples" in caplog.messages[0]
    state.advance({"images": 6_144}, 3_072)
    with pytest.raises(RunStopped, match="64,512 samples .* in steps 500001 to 500021, more than .*6,144,000") as stop:
        guard.check(state)
    assert "most of them in a.tar (2); reasons: undecodable image (2);" in str(stop.value), "of these steps"


def test_few_bad_samples_stop_and_warn_at_no_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = TrainState()
    guard = watched(tmp_path, 0.01, state)
    for _ in range(2_100):
        state.advance({"images": 200}, 2)
        guard.check(state)
    assert caplog.messages == []


@pytest.mark.usefixtures("same_signals")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_request_and_does_not_spoil_the_end(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    request = StopRequest(torch.device("cpu"))
    assert request.together(lambda: 3) == 3
    os.kill(os.getpid(), number)
    with pytest.raises(AskedToGo):
        request.together(lambda: pytest.fail("nothing more is read"))
    request.close()
    os.kill(os.getpid(), number)  # pretrain.sbatch repeats it every two seconds until the process is gone


@pytest.mark.usefixtures("same_signals")
@pytest.mark.parametrize("wait", [lambda: time.sleep(60), lambda: Queue().get()], ids=["pause", "loader process"])
def test_a_signal_ends_the_waiting_for_data(wait: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    request, started = StopRequest(torch.device("cpu")), time.monotonic()
    threading.Timer(0.2, interrupt_main_thread).start()
    with pytest.raises(AskedToGo):
        request.together(wait)
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("same_signals")
def test_a_signal_that_comes_elsewhere_interrupts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    request = StopRequest(torch.device("cpu"))
    request.together(lambda: 1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert sum(range(1000)) == 499_500, "a step is never cut short"
    with pytest.raises(AskedToGo):
        request.together(lambda: 1)


@pytest.mark.usefixtures("same_signals")
@pytest.mark.parametrize(
    ("mine", "others", "stops"),
    [(OfStorage, None, StorageLost), (OfStorage, Fault, RunStopped), (Fault, None, RunStopped)],
)
def test_what_storage_keeps_back_lets_a_run_be_started_again(
    mine: type[Fault], others: type[Fault] | None, stops: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the fault of the data, of any rank, does not."""

    def failed(kind: type[Fault]) -> StreamFailed:
        return StreamFailed("100 bad samples in a row", [kind("images", "a.tar", "0", "why")])

    def read() -> None:
        raise failed(mine)

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    other = failed(others) if others else StreamFailed("")
    monkeypatch.setattr(preemption, "gather_objects", lambda mine: [StreamFailed(""), mine, other])
    with pytest.raises(RunStopped, match="100 bad samples") as stop:
        StopRequest(torch.device("cpu")).together(read)
    assert type(stop.value) is stops and len(stop.value.faults) == 1 + bool(others)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_asks_to_go_but_under_nohup(nohup: bool) -> None:
    script = "import signal; from beit3_dist.leaving import SIGNALS; print(signal.SIGHUP in SIGNALS)"
    how = signal.SIG_IGN if nohup else signal.SIG_DFL
    command = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGHUP, {int(how)}); {script}"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"{not nohup}\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_skipped_steps", 0), ("spike_window", 0), ("spike_factor", -1.0), ("step_timeout_s", -1.0)],
)
def test_config(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"guards.{field}"):
        GuardConfig(**{field: value})
