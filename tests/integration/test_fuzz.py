"""2,000 files damaged at random, by their bytes and by what they mean: each is taken or refused in one line, in bounded
time and memory, and nothing is written outside of its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration import fuzzing
from tests.integration.runs import REPOSITORY

SEEDS = 400


@pytest.mark.slow
def test_two_thousand_damaged_files(tmp_path: Path) -> None:
    """Of each kind so many seeds; python -m tests.integration.fuzzing FOLDER 1 KIND:SEED shows one of them again."""
    command = [sys.executable, "-m", "tests.integration.fuzzing", str(tmp_path), str(SEEDS)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=570)
    assert result.returncode == 0, f"the process ended at {result.stderr[-3000:]}"
    summaries = [json.loads(line) for line in result.stdout.splitlines()]
    assert [summary["kind"] for summary in summaries] == list(fuzzing.KINDS)
    print("\n".join(f"{s['kind']}: {s['taken']} taken, {s['refused']} refused" for s in summaries))
    for summary in summaries:
        assert summary["failed"] == {}
        assert summary["taken"] > 10 and summary["refused"] > 100, "most damages are to be seen, and not all"


def fail(error: BaseException) -> Callable[..., None]:
    def reader(*_: Any) -> None:
        raise error

    return reader


FAULTS: dict[str, tuple[Callable[..., None], str]] = {
    "an unnamed error": (fail(KeyError("a")), "a traceback"),
    "no memory": (fail(MemoryError()), "a traceback"),
    "two lines": (fail(ValueError("one\ntwo")), "no clear line"),
    "bytes that are no text": (fail(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")), "no clear line"),
    "torch's own error": (fail(RuntimeError("shapes")), "no clear line"),
    "a file beside": (lambda _, place, __: (place / "../../x").write_text("x"), "wrote elsewhere"),
    "a file over another": (lambda _, place, __: (place / "../../secret").write_text("x"), "wrote over the secret"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, words = FAULTS[fault]
    monkeypatch.setitem(fuzzing.KINDS, "tar", reader)
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(fuzzing.SECRET)
    files: Any = None
    assert fuzzing.verdict("tar", 1, files, tmp_path).startswith(words)


def test_a_seed_is_a_file() -> None:
    """The same at every run, on every machine."""
    draws = [fuzzing.spoil_json(b'{"a": [1, {"b": "c"}], "d": 2}', fuzzing.random.Random(f"x {n}")) for n in range(200)]
    again = [fuzzing.spoil_json(b'{"a": [1, {"b": "c"}], "d": 2}', fuzzing.random.Random(f"x {n}")) for n in range(200)]
    assert draws == again and len(set(draws)) > 100
