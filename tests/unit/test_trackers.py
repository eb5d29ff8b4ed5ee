"""Trackers without network: what their stores hold, that resumed runs go on in one record, and that none ends a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_dist.config import DataConfig, RunConfig
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.folder import RunFolder
from beit3_dist.trackers import trackers
from beit3_dist.trackers.base import Recorded, Tracker
from beit3_dist.trackers.registry import TRACKERS, check_trackers, chosen
from beit3_dist.trackers.trackers import Trackers

SOURCES = {"text_tokenizer": "07bcc1e8d28130a1", "data.images": {"names and sizes": "f68b3d610213c608"}}
PICTURE = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)


def missing(name: str) -> bool:
    return importlib.util.find_spec(name) is None


def two_stretches(out: Path, names: list[str | dict[str, Any]]) -> None:
    """A run of three steps that is resumed after the second."""
    data = DataConfig(images="a.tar", texts="b.tar", pairs="c.tar")
    config = RunConfig(out=str(out), data=data, image_tokenizer="i", text_tokenizer="t", trackers=names)
    for first, steps in ((0, (1, 2, 3)), (2, (3,))):
        run = RunFolder(out, config, Mesh(0, 1, 0, 1, torch.device("cpu")), first, SOURCES)
        for step in steps:
            run.step({"step": step, "loss": first + step / 2, "samples_per_s": 1.0, "sample_hash": f"hash{step}"})
        run.evaluation({"step": steps[-1], "loss": 7.0, "image_retrieval_recall@1": 0.5})
        run.shown(steps[-1], {"pictures/images": PICTURE}, {"captions": "a [cat→dog]"})
        run.close()
    assert {len((out / f"{name}.jsonl").read_text().splitlines()) for name in ("metrics", "eval")} == {3, 1}


@pytest.fixture(autouse=True)
def same_logging() -> Any:
    """A run's processes log into its folder to their end."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


@pytest.mark.skipif(missing("wandb"), reason="needs the extra trackers")
def test_wandb_offline_goes_on_in_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    two_stretches(tmp_path, [{"wandb": {"mode": "offline", "project": "p"}}])
    name = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    # Within one second both stretches have one folder, which is the same to `wandb sync`.
    stores = [*(tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")]
    assert stores and len([*(tmp_path / "wandb").glob("offline-run-*")]) == len(stores)
    text = b"".join(path.read_bytes() for path in stores)
    for words in (
        "train/loss",
        "image_retrieval_recall@1",
        "hash3",
        "text_tokenizer",
        "07bcc1e8d28130a1",
        "warmup_steps",
    ):
        assert words.encode() in text, words
    assert [*(tmp_path / "wandb").glob("*/files/media/images/pictures/*.png")]
    assert any("dog" in path.read_text() for path in (tmp_path / "wandb").glob("*/files/media/table/*.json"))


@pytest.mark.skipif(missing("mlflow"), reason="needs the extra trackers")
def test_mlflow_in_files_goes_on_in_one_record(tmp_path: Path) -> None:
    two_stretches(tmp_path, [{"mlflow": {"experiment": "e"}}, "tensorboard"])
    import mlflow

    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("e")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    steps = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 3.5)]
    assert run.data.metrics["eval/image_retrieval_recall_at_1"] == 0.5
    assert run.data.params["optim.lr"] and run.data.params["steps"] == "1000000"
    assert run.data.tags["hash.text_tokenizer"] == "07bcc1e8d28130a1" and len(run.data.tags["hash.config"]) == 64
    assert run.data.tags["hash.data.images.names and sizes"] == "f68b3d610213c608"
    assert run.data.tags["sample_hash"] == "hash3"
    held = {path.name for path in (tmp_path / "mlflow").rglob("*") if path.is_file()}
    assert {"config_step_0000000.yaml", "config_step_0000002.yaml", "step_0000003.txt"} <= held
    assert any(name.endswith(".png") for name in held)
    assert any((tmp_path / "tensorboard").iterdir())


@pytest.mark.skipif(missing("trackio"), reason="needs the extra trackers")
def test_trackio_goes_on_in_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    two_stretches(tmp_path / "run", [{"trackio": {"project": "p"}}])
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("p") == ["run"]
    records = SQLiteStorage.get_logs("p", "run")
    steps = [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
    assert steps == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 3.5)]
    config = SQLiteStorage.get_run_config("p", "run")
    assert config["optim"]["lr"] and config["hashes"]["text_tokenizer"] == "07bcc1e8d28130a1"
    for name in ("eval/image_retrieval_recall@1", "pictures/images", "captions"):
        assert any(name in record for record in records), name
    assert {record["sample_hash"] for record in records if "sample_hash" in record} == {"hash1", "hash2", "hash3"}
    assert [*(tmp_path / "store" / "media").rglob("*.png")]


def test_the_default_writes_no_new_file(tmp_path: Path) -> None:
    two_stretches(tmp_path, ["tensorboard"])
    assert not (tmp_path / "trackers.json").exists()
    assert [*(tmp_path / "tensorboard").iterdir()]


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """None."""


class Broken(Tracker):
    """Does not begin, fails at its second record, or never comes back, as `way` says."""

    name, module, Config, way = "broken", "json", NoSettings, "fails"
    told: list[int] = []
    go = threading.Event()

    def __init__(self, config: Any, run: Recorded) -> None:
        if self.way == "does not begin":
            raise RuntimeError("not logged\nin")

    def record(self, kind: str, record: Mapping[str, Any]) -> None:
        if self.way == "hangs":
            self.go.wait()
        if record["step"] == 2:
            raise ConnectionError("gone")
        self.told.append(record["step"])

    def text(self, step: int, name: str, text: str) -> None: ...

    def image(self, step: int, name: str, image: Tensor) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    monkeypatch.setattr(Broken, "told", [])
    monkeypatch.setattr(Broken, "go", threading.Event())
    return Broken


def test_one_that_breaks_is_told_once_and_the_run_goes_on(
    broken: type[Broken], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_stretches(tmp_path, ["broken", "tensorboard"])
    told = [message for message in caplog.messages if "broken" in message]
    assert told == ["the tracker broken has failed; the run goes on without it (ConnectionError: gone)"]
    assert broken.told == [1, 3, 3]  # of the second stretch, which begins it anew, all


def test_one_that_hangs_makes_nobody_wait(
    broken: type[Broken], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken, "way", "hangs")
    monkeypatch.setattr(trackers, "ENDING_S", 0.05)
    monkeypatch.setattr(trackers, "WAITING", 2)
    two_stretches(tmp_path, ["broken"])
    assert (
        caplog.messages.count("the tracker broken is too slow: some of its records are left out") == 2
    )  # of 2 stretches
    assert any("its end is lost" in message for message in caplog.messages)
    broken.go.set()


def test_one_that_cannot_begin_is_a_mistake(
    broken: type[Broken], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken, "way", "does not begin")
    with pytest.raises(ValueError, match="^the tracker broken cannot begin.*: not logged in$"):
        Trackers(["broken"], Recorded(tmp_path, 0, {}, "", {}))


@pytest.mark.parametrize(("names", "words"), [
    (["nobody"], "there is no nobody, only tensorboard, wandb, mlflow, trackio"), (["wandb", "wandb"], "twice"),
    ([{"wandb": {"colour": "red"}}], "no field colour, only project, entity, name, mode"),
    ([{"wandb": {"project": 3}}], "trackers.wandb.project=3"), ([{"wandb": "x"}], "a section of fields"),
    ([{}], "trackers: an entry is empty: name tensorboard"),
    ([{"tensorboard": {"a": "b"}}], "only none at all"), ([{"wandb": {"mode": "loud"}}], "online, offline"),
])  # fmt: skip
def test_a_wrong_section_is_named(names: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chosen(names)


def test_a_missing_package_is_told_before_the_run(broken: type[Broken], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broken, "module", "nowhere_to_be_found")
    check_trackers(["broken"], is_first=False)  # only the first process writes
    with pytest.raises(ValueError, match="the tracker broken needs nowhere_to_be_found.*leave broken out of trackers"):
        check_trackers(["broken"], is_first=True)
