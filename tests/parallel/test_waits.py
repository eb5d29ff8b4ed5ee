"""Where the host waits for the device in a training step: once, for the gradient's norm and what comes with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from beit3_dist.config import RunConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.image_tokenizer.engine import TokenizerEngine
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.preflight_finetuning import prepare_finetuning
from beit3_dist.tasks.config import FinetuneConfig
from beit3_dist.train.finetuning import FineTuning, finetune
from tests.parallel.test_finetuning import folder as folder
from tests.parallel.test_finetuning import run_config as finetune_config
from tests.parallel.test_tokenizer_data_parallel import SIDE, RandomTeacher, tokenizer_config
from tests.parallel.training import engine_run, run_config
from tests.parallel.workers import run_workers
from tests.waits import waits

READS_NORM = {1: "step", 2: "scaled_global_norm", 3: "_get_norm_groups"}
"""ZeRO stage -> the function of parallel/flat_step.py that reads the norm off the device; statistics come beside it."""
TASKS = ["imagenet", "vqa", "nlvr2", "captioning", "retrieval", "text_classification"]
"""With mixed images and soft labels, words, two images, losses of words of which the worst are dropped, contrast over
micro-batches, and without images."""


@contextmanager
def counting(owner: type, on_device: Callable[..., list[Tensor]]) -> Iterator[Counter[str]]:
    """Where the last `train_step` of any `owner` waited. `on_device`: what lay there before, of its arguments."""
    original: Any = owner.train_step  # type: ignore[attr-defined]
    found: Counter[str] = Counter()

    def counted(*args: Any, **kwargs: Any) -> Any:
        with waits(on_device(*args)) as counter:
            result = original(*args, **kwargs)
        found.clear()
        found.update(counter)
        return result

    owner.train_step = counted  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        owner.train_step = original  # type: ignore[attr-defined]


def held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, tables and moments."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*model.parameters(), *model.buffers(), *(t for t in states if isinstance(t, Tensor) and t.dim())]


def counted_run(groups: Groups, config: RunConfig) -> dict[str, int]:
    """`engine_run`; where its last step waited."""
    with counting(Engine, lambda self, *args: [*held(self.model, self.optimizer.optimizer), args[1]]) as found:
        engine_run(groups, config)
    return dict(found)


def check_one_wait(zero_stage: int, precision: str) -> None:
    """Of a step's two micro-batches, preparing their inputs and targets included."""
    config = run_config("shallow", zero_stage=zero_stage, accumulation=2, data_parallel=1, precision=precision, steps=3)
    [found] = run_workers(1, counted_run, config)
    reads = READS_NORM[2] if (zero_stage, precision) == (1, "fp32") else READS_NORM[zero_stage]
    assert found == {f"parallel/flat_step.py:{reads}": 1}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_waits_once(zero_stage: int, precision: str) -> None:
    check_one_wait(zero_stage, precision)


def counted_finetuning(groups: Groups, configs: list[FinetuneConfig]) -> list[dict[str, int]]:
    """Of each run, where its last step waited."""
    places = []
    for config in configs:
        ready = prepare_finetuning(config, groups.mesh)
        with counting(
            FineTuning,
            lambda self, batch, *_: [*held(self._engine.model, self._engine.optimizer.optimizer), batch.totals],
        ) as found:
            finetune(ready)
        places.append(dict(found))
    return places


@pytest.mark.slow
def test_a_step_of_fine_tuning_waits_once(folder: Path) -> None:
    configs = [finetune_config(folder, task, "one", "waits") for task in TASKS]
    configs = [replace(c, steps=3, precision="bf16", data=replace(c.data, validation="")) for c in configs]
    [found] = run_workers(1, counted_finetuning, configs)
    assert dict(zip(TASKS, found, strict=True)) == dict.fromkeys(TASKS, {"parallel/flat_step.py:step": 1})


def counted_tokenizer(groups: Groups, config: TokenizerConfig) -> dict[str, int]:
    """Where the second step of an image tokenizer waits."""
    engine, device = TokenizerEngine(config, groups, RandomTeacher()), groups.mesh.device
    images = torch.randint(0, 256, (config.batch, 3, SIDE, SIDE), dtype=torch.uint8).to(device)
    with counting(
        TokenizerEngine, lambda self, x, *_: [*held(self.model, self.optimizer), *self.teacher.buffers(), x]
    ) as found:
        for step in range(2):
            engine.train_step(images, step, lr=1e-3)
    return dict(found)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_of_the_image_tokenizer_waits_once(precision: Literal["bf16", "fp32"], tmp_path: Path) -> None:
    [found] = run_workers(1, counted_tokenizer, replace(tokenizer_config(tmp_path), precision=precision))
    assert found == {"image_tokenizer/engine.py:train_step": 1}
