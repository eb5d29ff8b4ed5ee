"""The planner on the shipped giant recipe, which leaves all paths out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import plan_layout

GIANT = str(Path(__file__).parents[2] / "launchers" / "recipes" / "giant.yaml")


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe names its DeepSpeed file relative to the repository."""
    monkeypatch.chdir(Path(__file__).parents[2])


def test_giant(capsys: pytest.CaptureFixture[str]) -> None:
    plan_layout.main(["--config", GIANT, "--ranks", "8", "512", "--device-gb", "18", "--json"])
    plans = {(p["ranks"], p["zero_stage"], p["tensor"], p["pipeline"]): p for p in json.loads(capsys.readouterr().out)}
    for ranks in (8, 512):
        assert plans[ranks, 3, 1, 1]["states_gb"] == pytest.approx(18 * 1.949 / ranks, rel=1e-3)
        assert plans[ranks, 1, 1, 1]["states_gb"] == pytest.approx((8 + 12 / ranks) * 1.949, rel=1e-3)
        # Almost everything is cut over the tensor ranks, so what is sharded over all ranks hardly changes.
        assert plans[ranks, 3, 8, 1]["states_gb"] == pytest.approx(18 * 1.949 / ranks, rel=0.02)
    assert not plans[8, 1, 1, 1]["fits"] and plans[8, 3, 1, 1]["fits"]
    assert all(p["data"] * p["tensor"] * p["pipeline"] == p["ranks"] for p in plans.values())
    assert (8, 3, 8, 2) not in plans


def test_table_marks_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    plan_layout.main(["--config", GIANT, "--ranks", "8", "--device-gb", "10"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    marks = {tuple(map(int, row[:4])): row[-1] == "*" for row in rows}
    assert marks[8, 1, 1, 1] and not marks[8, 3, 8, 1]


def test_recomputation_of_each_stage_does_not_matter(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", GIANT, "--ranks", "8", "--batch.accumulation", "8"]
    tables = []
    for stages in ([], ["--parallel.pipeline", "2", "--activation_checkpointing", "[full, none]"]):
        plan_layout.main([*options, *stages])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--deepspeed_config", "ds_configs/none.json"], "deepspeed_config: there is no file ds_configs/none.json"),
        (["--deepspeed_config", "ds_configs/zero3_bf16_offload.json"], "moves states to the CPU, which is not counted"),
        (["--optim.clip_norm", "1", "--deepspeed_config", "clipping.json"], "clipping.json sets gradient_clipping=2"),
        (["--ranks", "8", "0"], "--ranks: 0 is no number of ranks"),
    ],
)
def test_a_mistake_is_no_layout_that_does_not_divide(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clipping.json").write_text('{"gradient_clipping": 2}')
    options = [str(tmp_path / option) if option == "clipping.json" else option for option in options]
    with pytest.raises(SystemExit) as stop:
        plan_layout.main(["--config", GIANT, "--ranks", "8", *options])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and words in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_no_layout_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        plan_layout.main(["--config", GIANT, "--ranks", "7"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "no layout divides" in error
