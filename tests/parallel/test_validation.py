"""What a fine-tuning run does around its validations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beit3_dist.checkpoint.store import checkpoints
from beit3_dist.config import CheckpointConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.checkpointing import Checkpoints
from beit3_dist.run.preemption import Together
from beit3_dist.tasks.base import Task
from beit3_dist.tasks.config import FinetuneConfig, TaskEvalConfig
from beit3_dist.train.finetuning import FineTuning
from tests.parallel import test_finetuning
from tests.parallel.test_finetuning import CLASSES, records
from tests.parallel.workers import run_workers
from tests.unit.tar_fixtures import picture, train_tokenizer

TASK = "captioning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions to learn from, and pictures whose captions are to be written."""
    folder = tmp_path_factory.mktemp("validation")
    train_tokenizer(folder / "text.spm")
    for number in range(test_finetuning.PICTURES):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    lines = records(TASK, TextTokenizer(str(folder / "text.spm")))
    (folder / f"{TASK}.train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = lines[:5]
    (folder / f"{TASK}.validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        line["text_segment"] = None
    (folder / "to_write.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run_config(folder: Path, out: str, **changes: Any) -> FinetuneConfig:
    """Three steps; the last two are followed by a validation, the first two and the last saved."""
    config = test_finetuning.run_config(folder, TASK, "dp2", out)
    settings = {"steps": 3, "checkpoint": CheckpointConfig(every=1), "eval": TaskEvalConfig(beams=1, every=2, batch=2)}
    return replace(config, **(settings | changes))


def watched_run(groups: Groups, config: FinetuneConfig) -> tuple[list[list[int]], list[int], int]:
    """For `run_workers`: the steps whose saving had begun when each validation began, those that were saved at the last
    one, and how often scores are computed."""
    begun: list[int] = []
    at_validations: list[list[int]] = []
    saved: list[int] = []
    scored = 0
    save = Checkpoints.save
    predictions, task = FineTuning._predictions, test_finetuning.prepare_finetuning(config, groups.mesh).task
    score = type(task).score

    def watched_save(self: Checkpoints) -> None:
        begun.append(self._state.step)
        save(self)

    def watched_predictions(self: FineTuning, together: Together, *arguments: Any) -> Any:
        at_validations.append(list(begun))
        saved[:] = checkpoints(Path(config.out, "checkpoints"))
        return predictions(self, together, *arguments)

    def watched_score(self: Task, *arguments: Any) -> dict[str, float]:
        nonlocal scored
        scored += 1
        return score(self, *arguments)

    Checkpoints.save = watched_save  # type: ignore[method-assign]
    FineTuning._predictions = watched_predictions  # type: ignore[method-assign]
    type(task).score = watched_score  # type: ignore[method-assign]
    test_finetuning.run(groups, [config])
    return at_validations, saved, scored


def test_steps_are_saved_before_a_validation_and_scored_by_the_first_rank(folder: Path) -> None:
    config = run_config(folder, "order")
    (begun, saved, scored), (_, _, scored_by_the_other) = run_workers(2, watched_run, config)
    assert begun == [[1, 2], [1, 2, 3]]
    assert saved == [1, 2, 3]
    assert (scored, scored_by_the_other) == (2, 0)
    lines = [json.loads(line) for line in Path(config.out, "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3] and all("exact_match" in line for line in lines)


@pytest.mark.slow
def test_a_validation_alone_is_the_runs_last_one(folder: Path) -> None:
    """Of the run's newest checkpoint, on two ranks, and of its model, on one; neither reads training examples."""
    config = run_config(folder, "alone")
    run_workers(2, test_finetuning.run, [config])
    out = Path(config.out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (written,), records = (out / "predictions").iterdir(), out / "eval.jsonl"
    captions = written.read_text()
    written.unlink()
    alone = replace(config, evaluate_only=True, data=replace(config.data, train=""))
    resumed = replace(alone, checkpoint=replace(alone.checkpoint, resume="auto"))
    other = replace(alone, out=str(folder / "other"), init_from=str(out / "model"))
    run_workers(2, test_finetuning.run, [resumed])
    last = json.loads(records.read_text().splitlines()[-1])
    assert [json.loads(line) for line in records.read_text().splitlines()[2:]] == [last] and last["step"] == 3
    run_workers(1, test_finetuning.run, [other])
    for place in (out, Path(other.out)):
        assert (place / "predictions" / written.name).read_text() == captions
    assert json.loads((Path(other.out) / "eval.jsonl").read_text()) == last | {"step": 0}
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path for path in before | after if before.get(path) != after.get(path)} == {records}


def test_captions_without_a_truth_are_written_and_not_scored(folder: Path) -> None:
    config = run_config(folder, "to_write")
    config = replace(config, data=replace(config.data, validation=str(folder / "to_write.jsonl")))
    run_workers(2, test_finetuning.run, [config])
    assert Path(config.out, "eval.jsonl").read_text() == ""
    written = json.loads(Path(config.out, "predictions", "captions_results.json").read_text())
    assert len(written) == 5
    log = Path(config.out, "logs", "rank00000.log").read_text()
    assert log.count("to_write.jsonl holds no truths, so that there is no score") == 2
