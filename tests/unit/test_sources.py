"""A resume with other data is refused with a line that names the field, and goes on where it is meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from beit3_dist.config import CheckpointConfig, DataConfig, RunConfig, Source
from beit3_dist.data.batch import MixedBatches
from beit3_dist.run.sources import Sources, pretraining_sources, same_sources
from tests.unit.tar_fixtures import image_tar, small_run

CHECKPOINT = Path("run/checkpoints/step_0000004")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokenizer.pth").write_bytes(b"weights")
    (folder / "retrained.pth").write_bytes(b"others")
    return replace(small_run(folder), image_tokenizer=str(folder / "tokenizer.pth"))


@pytest.fixture(scope="module")
def kept(run: RunConfig) -> Sources:
    """As a checkpoint has them."""
    return json.loads(json.dumps(sources_of(run)))


def sources_of(run: RunConfig) -> Sources:
    return pretraining_sources(run, MixedBatches(run, 32, 0, 1), {})


def with_data(run: RunConfig, **changes: object) -> RunConfig:
    data: DataConfig = replace(run.data, **changes)  # type: ignore[arg-type]
    return replace(run, data=data)


def test_the_same_data_elsewhere_go_on(run: RunConfig, kept: Sources, tmp_path: Path) -> None:
    assert isinstance(run.data.images, str)
    folder = Path(run.data.images).parent
    shutil.copytree(folder, tmp_path / "moved")
    moved = {name: getattr(run.data, name).replace(str(folder), str(tmp_path / "moved")) for name in
             ("images", "texts", "pairs", "cache")}  # fmt: skip
    found = sources_of(with_data(run, **moved))
    assert same_sources(run, CHECKPOINT, kept, found) == found == kept


CASES: dict[str, tuple[Callable[[RunConfig], RunConfig], str]] = {
    "seed": (lambda run: replace(run, seed=5), "seed: .* was trained with seed=0, this run has seed=5"),
    "another shard": (
        lambda run: with_data(run, images=f"{run.data.images.rpartition('/')[0]}/images-*.tar"),  # type: ignore[union-attr]
        "data.images: .* was trained with shards=2, samples=11, names and sizes=.* has shards=3, samples=13",
    ),
    "weights": (
        lambda run: with_data(run, texts=[Source(shards=run.data.texts, weight=3)]),  # type: ignore[arg-type]
        r"data.texts: .* was trained with weights=\[1.0\], this run has weights=\[3.*\]",
    ),
    "windows": (lambda run: with_data(run, text_length=12), "data.text_length=.*, this run has data.text_length=12"),
    "shuffle": (lambda run: with_data(run, shuffle="blocks"), "data.shuffle=full, this run has data.shuffle=blocks of"),
    "image tokenizer": (
        lambda run: replace(run, image_tokenizer=run.image_tokenizer.replace("tokenizer.pth", "retrained.pth")),
        "^image_tokenizer: .* with image_tokenizer=.*, this run has .*, so that codes would mean something else",
    ),
    "pipes": (
        lambda run: with_data(run, images=f"pipe:cat {run.data.images}", virtual_readers=1),
        "data.images: .* was trained with .*names=None.*, this run has ",
    ),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES)
def test_other_data_are_refused_by_name(
    run: RunConfig,
    kept: Sources,
    change: Callable[[RunConfig], RunConfig],
    message: str,
    request: pytest.FixtureRequest,
) -> None:
    assert isinstance(run.data.images, str)
    other = Path(run.data.images).with_name("images-9.tar")
    image_tar(other, 2)
    request.addfinalizer(other.unlink)
    changed = change(run)
    found = sources_of(changed)
    with pytest.raises(ValueError, match=message) as error:
        same_sources(changed, CHECKPOINT, kept, found)
    assert "\n" not in str(error.value) and f"--init_from {CHECKPOINT}" in str(error.value)
    assert "bring the former back" in str(error.value) and "--checkpoint.other_data true" in str(error.value)
    allowed = replace(changed, checkpoint=CheckpointConfig(other_data=True))
    assert same_sources(allowed, CHECKPOINT, kept, found) == found, "the next resume is compared with these"


def test_checkpoints_of_former_versions_go_on(run: RunConfig, kept: Sources) -> None:
    assert same_sources(run, CHECKPOINT, {}, kept) == kept
    former = {name: value for name, value in kept.items() if name != "image_tokenizer"}
    assert same_sources(run, CHECKPOINT, former, kept) == kept, "the next resume is compared with this tokenizer"
    assert same_sources(run, None, {}, kept) == kept
