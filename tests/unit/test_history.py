"""Records thinned out while they are read, and a run folder's contents, which may grow and be cut back."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beit3_dist.reports import live
from beit3_dist.reports.contents import RunContents
from beit3_dist.reports.history import BUCKETS, Followed, History
from beit3_dist.reports.page import Shown, contents, names_of, page


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("steps", [1, 2 * BUCKETS, 2 * BUCKETS + 1, 5000])
def test_the_buckets_are_plain_means_with_their_range(steps: int) -> None:
    values = np.random.default_rng(steps).normal(5, 1, steps)
    history = History()
    history.add({"step": i + 1, "loss": float(values[i]), "images": 4, "step_s": 2.0} for i in range(steps))
    curves, width = history.curves(), history.width
    assert len(curves["steps"]) <= 2 * BUCKETS and steps <= 2 * BUCKETS * width
    parts = [values[i : i + width] for i in range(0, steps, width)]
    assert curves["fields"]["loss"]["mean"] == pytest.approx([part.mean() for part in parts], rel=1e-4)
    if width > 1:
        assert curves["fields"]["loss"]["high"] == pytest.approx([part.max() for part in parts], rel=1e-4)
        assert curves["fields"]["loss"]["low"] == pytest.approx([part.min() for part in parts], rel=1e-4)
    assert curves["steps"][-1] == steps and curves["samples"][-1] == 4 * steps
    assert curves["hours"][-1] == pytest.approx(steps * 2 / 3600, rel=1e-4)
    assert history.recent()["loss"] == pytest.approx(values[-20:].mean(), rel=1e-4)


def test_fields_may_come_late_and_numbers_may_be_missing() -> None:
    history = History()
    history.add([{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": 5.0, "late": 7}])
    fields = history.curves()["fields"]
    assert fields["loss"]["mean"] == [None, 3.0, 5.0] and fields["late"]["mean"] == [None, None, 7.0]
    assert history.recent()["loss"] is None  # one of the last steps had none


def test_a_file_is_followed_from_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    followed = Followed(path)
    assert [*followed.new()] == [] and not followed.cut_back()
    path.write_text(lines({"step": 1}) + '{"step": 2')
    assert [record["step"] for record in followed.new()] == [1]
    path.write_text(lines({"step": 1}, {"step": 2}, {"step": 3}))
    assert [record["step"] for record in followed.new()] == [2, 3] and not followed.cut_back()
    path.write_text(lines({"step": 1}, {"step": 2, "another": "past"}, {"step": 3}))  # longer, but another
    assert followed.cut_back()
    assert [record["step"] for record in followed.new()] == [1, 2, 3]
    path.write_text(lines({"step": 1}))
    assert followed.cut_back() and [*followed.new()] == [{"step": 1}]
    for nonsense in ("nonsense", '{"step": Infinity}', '{"step": 1e300}', '{"step": -1}', "[" * 100_000):
        path.write_text(lines({"step": 1}) + nonsense + "\n")
        for _ in range(2):  # the same words, which are then said once
            with pytest.raises(ValueError, match="line 2 is not"):
                [*followed.new()]


def test_a_run_that_goes_back_is_read_anew(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 9\nout: x\n")
    (tmp_path / "config_step_0000000.yaml").write_text("steps: 9\noptim:\n  lr: 1\n")
    run = RunContents(tmp_path)
    assert not run.read() and run.told("x")["step"] == 0
    (tmp_path / "metrics.jsonl").write_text(lines(*({"step": i, "loss": 1.0, "step_s": 1.0} for i in range(1, 7))))
    (tmp_path / "quarantine.jsonl").write_text(
        lines(*({"step": 1, "stream": "images", "shard": "a.tar", "key": str(i), "reason": "cut off"} for i in "12"))
    )
    (tmp_path / "skipped.jsonl").write_text(lines({"step": 3, "images": [1]}, {"step": 3, "images": [2]}))
    assert run.read() and not run.read()
    told = run.told("x")
    assert (told["step"], told["seconds"], told["skipped"], told["replaced_count"]) == (6, 6.0, [3], 2)
    assert told["replaced"] == [{"stream": "images", "reason": "cut off", "count": 2, "example": "a.tar 1"}]
    (tmp_path / "metrics.jsonl").write_text(lines({"step": 1, "loss": 2.0, "step_s": 1.0}))
    (tmp_path / "config_step_0000001.yaml").write_text("steps: 9\noptim:\n  lr: 2\n")
    assert run.read()
    told = run.told("x")
    assert (told["step"], told["seconds"], told["replaced_count"]) == (1, 1.0, 2)
    assert told["stretches"] == [{"after": 0, "changed": []}, {"after": 1, "changed": ["optim.lr: 1 → 2"]}]


def test_a_page_holds_whatever_a_run_has_met(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff\xc3\xa4")
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 9\nout: x\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1e999, "lr": NaN}\n')
    (folder / "quarantine.jsonl").write_text(lines({"step": 1, "shard": os.fsdecode(b"a\xff.tar"), "key": "1"}))
    run = Shown(folder, folder.name, 0, torch.device("cpu"), "report.py")
    assert run.read()
    shown = page(contents([run])).encode()
    assert rb"a\udcff.tar" in shown and b"What r\\udcff\xc3\xa4 has learnt" in shown


@pytest.mark.parametrize("error", [ValueError("no data"), KeyError("no field"), MemoryError()])
def test_what_cannot_be_read_is_said_once_and_the_others_go_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    ending, looks = threading.Event(), 0

    class Broken:
        def read(self) -> bool:
            return False

        def look(self, plugins: Any) -> bool:
            nonlocal looks
            looks += 1
            if looks == 3:
                ending.set()
            raise error

        def told(self) -> dict[str, Any]:
            return {"name": "broken"}

    following: Any = live.Following([Broken()], [])  # type: ignore[list-item]
    following.follow(ending)
    assert looks == 3 and len(caplog.messages) == 1


def test_a_browser_that_has_gone_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    server: Any = object.__new__(live._Server)
    for error, told in ((BrokenPipeError(), False), (RuntimeError("a mistake of ours"), True)):
        try:
            raise error
        except Exception:
            server.handle_error(None, ("127.0.0.1", 1))
        assert ("Traceback" in capsys.readouterr().err) is told


def test_runs_are_called_by_what_tells_them_apart() -> None:
    assert names_of([Path("/a/b/run")]) == ["b/run"]
    assert names_of([Path("/a/b/run"), Path("/a/c/run")]) == ["b/run", "c/run"]
