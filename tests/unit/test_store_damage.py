"""Every file of a checkpoint in turn deleted, truncated, one byte flipped: refused by name, and `auto` falls back."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from beit3_dist.checkpoint.find import Damaged, checkpoint_of, find
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.parallel.mesh import Groups
from tests.parallel.workers import run_workers
from tests.unit.damages import DAMAGES, damage_at_random, flip, resume
from tests.unit.small_checkpoints import load, save
from tests.unit.small_checkpoints import one_process as one_process

pytestmark = pytest.mark.usefixtures("one_process")

NEWER, OLDER = "step_0000008", "step_0000004"
FILES = [
    "shard_00000.safetensors",
    "shard_00001.safetensors",
    "state.json",
    "config.yaml",
    "tensors.json",
    "manifest.json",
]


def save_two(groups: Groups, folder: str) -> None:
    for step in (4, 8):
        save(Path(folder), step, groups.mesh.rank, groups.mesh.world)


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_workers(2, save_two, str(folder))
    return folder


@pytest.fixture
def folder(saved_by_two: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 4 and 8 of two ranks."""
    return Path(shutil.copytree(saved_by_two, tmp_path / "checkpoints"))


def resume_in_worker(groups: Groups, what: str, folder: str) -> str:
    try:
        return str(resume(what, Path(folder)))
    except Damaged as damage:
        return f"refused: {damage}"


def test_undamaged(folder: Path) -> None:
    assert resume("auto", folder) == folder / NEWER == resume(str(folder / NEWER), folder)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_refused_by_name_and_auto_falls_back(
    name: str, damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](folder / NEWER / name)
    with pytest.raises(Damaged, match=f"^checkpoint.resume: .*{name}") as refusal:
        resume(str(folder / NEWER), folder)
    assert "\n" not in str(refusal.value)
    with caplog.at_level(logging.WARNING):
        assert resume("auto", folder) == folder / OLDER
    (warning,) = caplog.messages
    # A digest that is not right any more is told of the file that has another one.
    told = name if name == "manifest.json" else str(folder / NEWER / name)
    assert told in warning and NEWER in warning and "falling back" in warning

    DAMAGES[damage](folder / OLDER / name)
    with pytest.raises(Damaged, match=f"auto finds no whole checkpoint.*{NEWER}/.*{name}.*{OLDER}/.*{name}"):
        resume("auto", folder)


def test_random_damages_are_refused_by_name(folder: Path) -> None:
    """`python -m tests.attack` does so 600 times with a real run's checkpoint."""
    refusals = damage_at_random(folder, 60)
    assert refusals.missed == [] and refusals.refused.total() == 60 and len(refusals.refused) == 8


def test_a_damage_that_is_not_refused_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit3_dist.checkpoint.find.wrong_digests", lambda path, names: [])
    missed = damage_at_random(folder, 60).missed
    assert missed and all("goes on from" in line for line in missed)


def test_no_flipped_byte_of_the_manifest_goes_unnoticed(folder: Path) -> None:
    path = folder / NEWER
    manifest, content = path / "manifest.json", (path / "manifest.json").read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        manifest.write_bytes(changed)
        with pytest.raises(Damaged, match=r"manifest\.json"):
            resume(str(path), folder)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"checkpoint\.resume: .*nowhere is no whole checkpoint"):
        find(str(tmp_path / "nowhere"), tmp_path)


def test_a_runs_folder_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(Damaged, match=f"it is a run's folder; name a checkpoint, such as .*/checkpoints/{NEWER}$"):
        find(str(folder.parent), folder)


def test_latest_means_what_it_names(folder: Path) -> None:
    assert resume(str(folder / "latest"), folder) == folder / NEWER
    (folder / "latest").write_text(OLDER + "\n")
    assert resume(str(folder / "latest"), folder) == folder / OLDER
    for name in ("step_0000099", "../checkpoints/step_0000008", "", "step_0000008\0"):
        (folder / "latest").write_text(name)
        with pytest.raises(Damaged, match=r"^checkpoint.resume: .*/latest names .*no such checkpoint beside it"):
            resume(str(folder / "latest"), folder)


@pytest.mark.parametrize("named", [".", "checkpoints", "checkpoints/latest"])
def test_weights_of_a_run_are_its_newest_checkpoints(
    named: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = folder.parent
    assert checkpoint_of(run / named) == folder / NEWER
    assert checkpoint_of(folder / OLDER) == folder / OLDER
    flip(folder / NEWER / "state.json", 0)
    if named != "checkpoints/latest":  # which asks for that one
        assert checkpoint_of(run / named) == folder / OLDER and "falling back" in caplog.text
        flip(folder / OLDER / "state.json", 0)
        with pytest.raises(Damaged, match=f"finds no whole checkpoint.*{NEWER}.*{OLDER}"):
            checkpoint_of(run / named)


def test_the_checkpoint_before_is_told_by_its_number(tmp_path: Path) -> None:
    """Names have more digits from step 10,000,000 on."""
    for step in (9_999_998, 9_999_999, 10_000_000):
        path = save(tmp_path, step)
    flip(path / FILES[0], -1)
    assert resume("auto", tmp_path) == tmp_path / "step_9999999"


def test_all_ranks_decide_the_same(folder: Path) -> None:
    """The damage lies in one rank's share of the files. A rank that raised or fell back alone would leave the others in
    a collective for ever."""
    flip(folder / NEWER / "shard_00001.safetensors", 300)
    answers = run_workers(2, resume_in_worker, str(folder / NEWER), str(folder))
    assert answers[0] == answers[1] and answers[0].startswith("refused") and "shard_00001" in answers[0]
    assert run_workers(2, resume_in_worker, "auto", str(folder)) == 2 * [str(folder / OLDER)]
    flip(folder / OLDER / "shard_00000.safetensors", 300)
    answers = run_workers(2, resume_in_worker, "auto", str(folder))
    assert answers[0] == answers[1] and "no whole checkpoint" in answers[0]


def find_elsewhere(groups: Groups, folder: str) -> str:
    return resume_in_worker(groups, "auto", folder if groups.mesh.is_first else f"{folder}/another_node")


def test_ranks_that_see_other_files_do_not_start(folder: Path) -> None:
    """A folder that only one node has: the others would start anew."""
    answers = run_workers(2, find_elsewhere, str(folder))
    assert answers[0] == answers[1] and "rank 1 finds None" in answers[0] and "file system" in answers[0]


def test_tools_refuse_a_flipped_byte_too(folder: Path) -> None:
    shard = folder / NEWER / "shard_00000.safetensors"
    load(folder / NEWER)
    flip(shard, shard.stat().st_size - 1)
    with pytest.raises(Damaged, match="shard_00000.safetensors: the SHA-256 is not the one in manifest.json"):
        read_weights(folder / NEWER)
