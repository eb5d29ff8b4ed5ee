"""A finished run's hashes follow from its config, the shards and the quarantine alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from beit3_dist.config import Source, TemperatureConfig
from tests.integration.runs import run_config, train
from tests.parallel.workers import run_workers
from tests.unit.tar_fixtures import exit_code, picture, sentences, write_tar
from tools import verify_order


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks over several epochs, with weighted sources, blocks, bad pictures and bad captions."""
    folder = tmp_path_factory.mktemp("run")
    config = run_config(folder, steps=8)
    broken = [{"__key__": f"{n}", "png": b"not a picture" if n % 3 == 0 else picture(n)} for n in range(6)]
    write_tar(folder / "broken-images.tar", broken)
    pairs = [
        {"__key__": f"{n}", "png": picture(n), "txt": b"" if n == 2 else sentences()[n].encode()} for n in range(6)
    ]
    write_tar(folder / "broken-pairs.tar", pairs)
    images = [
        Source(name="torn", shards=str(folder / "broken-images.tar"), weight=4),
        Source(name="whole", shards=str(folder / "images-0.tar")),
    ]
    data = replace(config.data, images=images, pairs=str(folder / "broken-pairs.tar"), max_bad_fraction=1.0,
                   shuffle="blocks", shuffle_block=2, shuffle_window=4,
                   temperature=TemperatureConfig(images=2))  # fmt: skip
    assert run_workers(2, train, replace(config, data=data)) == ["", ""]
    return Path(config.out)


def verify(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = verify_order.main([str(out), "--json"])
    return code, json.loads(capsys.readouterr().out)


def changed(run: Path, folder: Path, name: str, change: object) -> Path:
    """A copy of the run's texts in which the lines of one file are changed."""
    folder.mkdir(exist_ok=True)
    for file in ("config.yaml", "metrics.jsonl", "quarantine.jsonl"):
        lines = (run / file).read_text().splitlines()
        (folder / file).write_text("\n".join(change(lines) if file == name else lines) + "\n")
    return folder


def test_finished_run_is_right(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = verify(run, capsys)
    assert code == 0 and report["mistakes"] == []
    assert report["steps"] == 8 and report["samples"] == 8 * 12 and report["replaced"] > 3
    sets = report["sets"]  # weights 4 and 1 at temperature 2
    assert set(sets) == {"images.torn", "images.whole"} and sum(sets.values()) == 32 and 20 <= sets["images.torn"] <= 23
    assert verify_order.main([str(run)]) == 0
    assert "every step read the samples that it should" in capsys.readouterr().out


def test_changed_hash_seed_and_quarantine_are_found(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def third(lines: list[str]) -> list[str]:
        record = json.loads(lines[2])
        return [*lines[:2], json.dumps(record | {"sample_hash": "0" * 16}), *lines[3:]]

    def miscounted(lines: list[str]) -> list[str]:
        return [*lines[:4], json.dumps(json.loads(lines[4]) | {"images.torn": 9}), *lines[5:]]

    code, report = verify(changed(run, tmp_path / "counts", "metrics.jsonl", miscounted), capsys)
    [mistake] = report["mistakes"]
    assert code == 1 and mistake["step"] == 5 and mistake["problem"].startswith("images.torn is 9 and should be ")
    code, report = verify(changed(run, tmp_path / "hash", "metrics.jsonl", third), capsys)
    assert code == 1 and [mistake["step"] for mistake in report["mistakes"]] == [3]
    seed = changed(
        run, tmp_path / "seed", "config.yaml", lambda lines: [x.replace("seed: 0", "seed: 1") for x in lines]
    )
    code, report = verify(seed, capsys)
    assert code == 1 and len(report["mistakes"]) == 8
    fault = json.loads((run / "quarantine.jsonl").read_text().splitlines()[0])
    less = changed(run, tmp_path / "less", "quarantine.jsonl", lambda lines: lines[1:])
    code, report = verify(less, capsys)
    assert code == 1 and [mistake["step"] for mistake in report["mistakes"]] == [fault["step"]]
    assert verify_order.main([str(less)]) == 1
    assert f"step {fault['step']}: the hash is" in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda lines: lines[:3] + lines[4:], lambda lines: lines[:4] + lines[3:]])
def test_missing_and_repeated_steps(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object
) -> None:
    code, report = verify(changed(run, tmp_path, "metrics.jsonl", change), capsys)
    assert code == 1 and report["mistakes"][0]["problem"].startswith(("line 4 holds step 5", "line 5 holds step 4"))


def test_what_cannot_be_verified(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(verify_order.main, [str(tmp_path)]) == 2
    assert "there is no file" in capsys.readouterr().err
    damaged = changed(run, tmp_path / "damaged", "metrics.jsonl", lambda lines: [*lines, '{"step": 9'])
    assert exit_code(verify_order.main, [str(damaged)]) == 2
    assert "metrics.jsonl, line 9: not JSON" in capsys.readouterr().err
    other = changed(
        run, tmp_path / "other", "quarantine.jsonl", lambda lines: [lines[0].replace('"key": "', '"key": "no')]
    )
    assert exit_code(verify_order.main, [str(other)]) == 2
    assert "holds no sample 'no" in capsys.readouterr().err
