"""What a run writes and says."""

from __future__ import annotations

import errno
import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from beit3_dist.config import BatchConfig, DataConfig, RunConfig
from beit3_dist.objectives.base import Loss
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.parallel.engine import StepResult
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run import records
from beit3_dist.run.records import JsonLines, Reporter, finite
from beit3_dist.trackers.base import Recorded
from beit3_dist.trackers.tensorboard import TensorBoard
from beit3_dist.trackers.trackers import Trackers
from beit3_dist.train import metrics
from beit3_dist.train.feed import StepBatch
from beit3_dist.train.metrics import losses_and_accuracies
from beit3_dist.train.pretraining import step_record
from beit3_dist.train.totals import Totals

CONTRACT = """
step loss loss_image loss_text loss_pair_image loss_pair_text acc_image acc_text acc_pair_image acc_pair_text lr
grad_norm images texts pairs tokens_per_s samples_per_s tflops_per_device mfu data_wait_s step_s memory_gb sample_hash
""".split()


def reporter_of(out: Path, step: int, steps: int, terminal: TextIO | None = None) -> Reporter:
    """A reporter with the default tracker."""
    return Reporter(out, step, steps, Trackers(["tensorboard"], Recorded(out, step, {}, "", {})), terminal)


LOSSES = [Loss(name, 1.0) for name in ("image", "text", "pair_image", "pair_text")]


def test_losses_are_sums_over_counts() -> None:
    """Two ranks with 10 and 30 masked patches: the step's loss is 70 / 40, not the mean of 1 and 2."""
    losses = [Loss("a", 1.0), Loss("b", 2.0), Loss("c", 1.0), Loss("d", 0.5, has_accuracy=False)]
    record = losses_and_accuracies(losses, [10.0 + 60.0, 6.0, 0.0, 4.0], [20.0, 1.0, 0.0, 8.0], [40, 3, 0, 8])
    assert [record[f"loss_{name}"] for name in "abcd"] == [1.75, 2.0, 0.0, 0.5]
    assert [record[f"acc_{name}"] for name in "abc"] == [0.5, 1 / 3, 0.0] and "acc_d" not in record
    assert record["loss"] == 1.75 + 2 * 2.0 + 0.5 * 0.5


def test_step_record_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(
        out="out",
        text_tokenizer="",
        image_tokenizer="",
        data=DataConfig(images="i", texts="t", pairs="p"),
        batch=BatchConfig(images=8, texts=4, pairs=4),
        objectives={NAME: MaskedDataModelingConfig(text_weight=0.0)},
    )
    mesh = Mesh(rank=0, world=2, local_rank=0, local_world=2, device=torch.device("cpu"))
    # four counts, tokens, FLOPs, replaced samples, hash terms (a sum that wrapped below zero)
    totals = Totals([10, 2, 5, 4], tokens=1000, flops=6 * 10**12, replaced=3, hash_terms=-1)
    batch = StepBatch([], totals.pack(), torch.tensor(0.25))
    result = StepResult([20.0, 8.0, 5.0, 6.0], [5.0, 1.0, 0.0, 4.0], grad_norm=1.5)
    record = step_record(config, objectives_of(config).losses, mesh, 7, batch, result, 1e-4, 2.0)
    assert set(CONTRACT) <= set(record)
    expected = {
        "step": 7,
        "loss": 2.0 + 1.0 + 1.5,
        "loss_text": 4.0,
        "acc_image": 0.5,
        "lr": 1e-4,
        "grad_norm": 1.5,
        "tokens_per_s": 500.0,
        "samples_per_s": 8.0,
        "tflops_per_device": 1.5,  # 6 TFLOP in 2 s on 2 devices
        "mfu": None,
        "data_wait_s": 0.25,
        "step_s": 2.0,
        "replaced_samples": 3,
        "sample_hash": "ffffffffffffffff",
    }
    assert {name: record[name] for name in expected} == expected
    assert record["memory_gb"] > 0.01
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 6e12)
    assert step_record(config, objectives_of(config).losses, mesh, 7, batch, result, 1e-4, 2.0)["mfu"] == 0.25


def test_a_number_that_is_not_finite_is_null_and_flagged() -> None:
    record = {"step": 3, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "mfu": None}
    assert finite(record) == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "lr": 0.1,
        "mfu": None,
        "non_finite": ["loss", "grad_norm"],
    }
    assert finite({"loss": 1.0}) == {"loss": 1.0}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, steps: range) -> None:
    file = JsonLines(path, None)
    for step in steps:
        file.write({"step": step, "loss": math.nan if step == 2 else 1.0})
    file.close()


def test_records_are_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 4))
    assert "NaN" not in path.read_text()
    assert lines(path)[1] == {"step": 2, "loss": None, "non_finite": ["loss"]}


def test_going_on_cuts_back_and_keeps_the_tail(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 6))
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # the process was killed while it wrote
    before = path.read_bytes()
    file = JsonLines(path, 3)
    file.write({"step": 4})
    file.close()
    assert [record["step"] for record in lines(path)] == [1, 2, 3, 4]
    (aside,) = tmp_path.glob("metrics.tail-*.jsonl")
    assert aside.read_bytes() == b"".join(before.splitlines(keepends=True)[3:])


def test_a_half_written_last_line_does_not_survive(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 3))
    with open(path, "a") as file:
        file.write('{"step": 2')
    JsonLines(path, 2).close()
    assert [record["step"] for record in lines(path)] == [1, 2]


@pytest.mark.parametrize("last_step", [2, 9, None])
def test_nothing_to_cut(last_step: int | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 3))
    JsonLines(path, last_step).close()
    assert [record["step"] for record in lines(path)] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_records_of_one_step_stay_together(tmp_path: Path) -> None:
    """quarantine.jsonl has any number of lines per step."""
    path = tmp_path / "quarantine.jsonl"
    file = JsonLines(path, None)
    for step, what in ((1, "a"), (1, "b"), (2, "c"), (1, "d")):
        file.write({"step": step, "what": what})
    file.close()
    JsonLines(path, 1).close()
    assert [record["what"] for record in lines(path)] == ["a", "b", "d"]


@pytest.mark.parametrize("block", [1, 7, 50, 1 << 20])
@pytest.mark.parametrize("content", [b"", b"a", b"a\n", b"\n", b"a\n\nbcd\n" + b"x" * 100 + b"\nend", b"ab\n" * 50])
def test_lines_from_the_end(block: int, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "READ_AT_ONCE", block)
    (tmp_path / "file").write_bytes(content)
    assert list(records.from_the_end(tmp_path / "file"))[::-1] == content.splitlines(keepends=True)


@pytest.mark.parametrize("last_step", [0, 150, 2995, 3000])
def test_a_long_file_is_read_only_as_far_as_it_is_cut(
    last_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 3001)))
    before, seen = path.read_bytes(), []
    step_of = records._step_of
    monkeypatch.setattr(records, "_step_of", lambda line: seen.append(line) or step_of(line))
    JsonLines(path, last_step).close()
    assert [record["step"] for record in lines(path)] == list(range(1, last_step + 1))
    assert len(set(seen)) <= 3000 - last_step + records.IN_ORDER
    asides = list(tmp_path.glob("metrics.tail-*.jsonl"))
    assert len(asides) == (last_step < 3000)
    assert path.read_bytes() + b"".join(aside.read_bytes() for aside in asides) == before


def test_a_line_is_written_to_its_end_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = JsonLines(tmp_path / "some.jsonl", None), os.write
    monkeypatch.setattr(records.os, "write", lambda file, data: write(file, data[:5]))
    file.write({"step": 1, "loss": 2.0})
    assert lines(tmp_path / "some.jsonl") == [{"step": 1, "loss": 2.0}]

    def full(file: int, data: bytes) -> int:
        if not data.startswith(b"{"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:5])

    monkeypatch.setattr(records.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file.write({"step": 2})
    file.close()


def record_of(step: int) -> dict:
    losses = {name: 1.0 + number for number, name in enumerate([f"loss_{loss.name}" for loss in LOSSES])}
    return {"step": step, "loss": 10.25, **losses, "samples_per_s": 123.4, "mfu": None, "sample_hash": "00ff"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0, strftime=lambda form: "now")
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(records, "time", clock)
    return clock


def test_progress_in_a_file_is_a_line_every_ten_seconds(tmp_path: Path, clock: SimpleNamespace) -> None:
    terminal = io.StringIO()
    reporter = reporter_of(tmp_path, 10, 40, terminal)
    for step in range(11, 41):
        clock.now += 4.0
        reporter.step(record_of(step))
    reporter.close()
    printed = terminal.getvalue().splitlines()
    assert [line.split()[1] for line in printed] == [
        f"{step}/40" for step in (11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 40)
    ]
    assert printed[0] == (
        "step 11/40  loss 10.250  (image 1.000  text 2.000  pair_image 3.000  pair_text 4.000)  123 samples/s"
    )
    assert printed[1].endswith("123 samples/s  0:01:44 left")  # 26 steps of 4 s
    assert printed[-1].endswith("0:00:00 left")
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == list(range(11, 41))
    assert any((tmp_path / "tensorboard").iterdir())


def test_time_left_is_that_of_the_last_steps(tmp_path: Path, clock: SimpleNamespace) -> None:
    """An hour of starting, a first step that compiles, a validation: none of them comes again in every step."""
    terminal = io.StringIO()
    reporter = reporter_of(tmp_path, 0, 200, terminal)
    clock.now += 3600.0
    for step in range(1, 101):
        clock.now += {1: 600.0, 50: 900.0}.get(step, 12.0 if step < 20 else 20.0)
        reporter.step(record_of(step))
    reporter.close()
    printed = terminal.getvalue().splitlines()
    assert not any("left" in line for line in printed[:3]), "three steps of one process tell nothing yet"
    assert printed[3].endswith(f"  0:{196 * 12 // 60}:{196 * 12 % 60:02d} left")
    assert printed[-1].endswith(f"  0:{100 * 20 // 60}:{100 * 20 % 60:02d} left"), (
        "nor do the first steps count for ever"
    )


FULL = {"lr": 9.98e-4, "grad_norm": 12.345, "memory_gb": 71.27}


def test_progress_shows_rate_norm_and_memory(tmp_path: Path, clock: SimpleNamespace) -> None:
    terminal = io.StringIO()
    reporter = reporter_of(tmp_path, 0, 9, terminal)
    reporter.step(record_of(1) | FULL)
    reporter.close()
    assert terminal.getvalue().endswith("4.000)  lr 1.0e-03  grad norm 12.3  123 samples/s  71.3 GB\n")


@pytest.mark.parametrize("columns", [120, 200])
def test_the_longest_progress_fits_a_screen_of_120_columns(
    columns: int, tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the parts of the loss where there is no room for them, and with nothing cut off."""
    monkeypatch.setattr(records.os, "get_terminal_size", lambda descriptor: os.terminal_size((columns, 40)))
    terminal = Terminal()
    reporter = reporter_of(tmp_path, 900_000, 1_000_000, terminal)
    for step in range(900_001, 900_005):
        clock.now += 12.0
        reporter.step(record_of(step) | FULL | {"samples_per_s": 12345.6})
    reporter.close()
    last = terminal.getvalue().split("\x1b[K")[-1].rstrip("\n")
    assert len(last) < columns and last.endswith(
        "lr 1.0e-03  grad norm 12.3  12346 samples/s  71.3 GB  13 days, 21:19:12 left"
    )
    assert ("pair_text" in last) == (columns == 200)


class Terminal(io.StringIO):
    """A screen."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def test_progress_on_a_screen_renews_one_line_that_fits(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records.os, "get_terminal_size", lambda descriptor: os.terminal_size((30, 40)))
    terminal = Terminal()
    reporter = reporter_of(tmp_path, 0, 2, terminal)
    clock.now += 1
    reporter.step(record_of(1))
    reporter.say("a remark")
    reporter.close()
    assert terminal.getvalue() == "\r\x1b[Kstep 1/2  loss 10.250  (image\r\x1b[Ka remark\n\n"


def test_days_are_told(tmp_path: Path, clock: SimpleNamespace) -> None:
    terminal = io.StringIO()
    reporter = reporter_of(tmp_path, 0, 1_000_000, terminal)
    for step in range(1, 5):
        clock.now += 11.0
        reporter.step(record_of(step))
    reporter.close()
    assert terminal.getvalue().endswith("127 days, 7:32:36 left\n")  # 999,996 steps of 11 s


def test_evaluation_goes_to_its_own_file(tmp_path: Path) -> None:
    terminal = io.StringIO()
    reporter = reporter_of(tmp_path, 0, 2, terminal)
    reporter.evaluation({"step": 2, **losses_and_accuracies(LOSSES, [4.0] * 4, [1.0] * 4, [2] * 4)})
    reporter.close()
    (record,) = lines(tmp_path / "eval.jsonl")
    assert (record["loss"], record["acc_text"]) == (8.0, 0.5)
    assert terminal.getvalue() == (
        "held-out after step 2: loss 8.000 (image 2.000  text 2.000  pair_image 2.000  pair_text 2.000)\n"
    )


def test_after_a_resume_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    """Also the checkpoint's own, with its validation; what came after that before the run was killed is gone."""
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        reporter = reporter_of(tmp_path, first, 4, io.StringIO())
        for step in steps:
            reporter.step(record_of(step) | {"loss": 10.0 * first + step})
        reporter.evaluation({"step": steps[1], "loss": 0.5})
        reporter.close()
        for path in (tmp_path / "tensorboard").glob("events.*"):  # in the order of their seconds, which are the same
            path.rename(path.with_name(f"tfevents.{first}"))
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]
    assert [event.step for event in shown.Scalars("eval/loss")] == [2, 4]


def test_a_step_that_diverged_is_still_reported(tmp_path: Path) -> None:
    """NaN must neither stop the run's record nor reach TensorBoard."""
    terminal = io.StringIO()
    reporter = reporter_of(tmp_path, 0, 1, terminal)
    reporter.step(record_of(1) | {"loss": math.nan, "loss_text": math.inf})
    reporter.close()
    assert "loss nan" in terminal.getvalue() and "text inf" in terminal.getvalue()
    assert lines(tmp_path / "metrics.jsonl")[0]["non_finite"] == ["loss", "loss_text"]


class GoneTerminal(Terminal):
    """A screen that is gone, or a file on a full disk."""

    def __init__(self, number: int, is_screen: bool) -> None:
        super().__init__()
        self.number, self.is_screen = number, is_screen

    def isatty(self) -> bool:
        return self.is_screen

    def write(self, _: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))

    def fileno(self) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO])
@pytest.mark.parametrize("is_screen", [False, True])
def test_what_nobody_can_read_ends_no_run(number: int, is_screen: bool, tmp_path: Path) -> None:
    reporter = reporter_of(tmp_path, 0, 2, GoneTerminal(number, is_screen))
    for step in (1, 2):
        reporter.step(record_of(step))
    reporter.evaluation({"step": 2, "loss": 1.0})
    reporter.close()
    assert len(lines(tmp_path / "metrics.jsonl")) == 2 and len(lines(tmp_path / "eval.jsonl")) == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl", "skipped.jsonl", "quarantine.jsonl", "tensorboard"])
def test_a_full_disk_is_told_by_the_file_that_it_holds(name: str, tmp_path: Path) -> None:
    if name == "tensorboard":
        reporter = reporter_of(tmp_path, 0, 9)
        (tensorboard,) = reporter._trackers.in_folder
        assert isinstance(tensorboard, TensorBoard)
        tensorboard.writer.close()

        class Full:
            def add_scalar(self, *_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

        tensorboard.writer = Full()  # type: ignore[assignment]
    else:
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        if name in ("metrics.jsonl", "tensorboard"):
            (reporter if name == "tensorboard" else reporter_of(tmp_path, 0, 9)).step(record_of(1))
        elif name == "eval.jsonl":
            reporter_of(tmp_path, 0, 9).evaluation({"step": 1, "loss": 1.0})
        else:
            JsonLines(tmp_path / name, 0).write({"step": 1})
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / name)
