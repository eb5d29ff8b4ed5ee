"""The whole objective learns: 32 fixed samples are overfitted in all four losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3_dist.config import BatchConfig
from beit3_dist.data.batch import MixedBatches, Request
from beit3_dist.image_tokenizer.files import load_vqkd
from beit3_dist.image_tokenizer.targets import ImageTargets
from beit3_dist.model import BEiT3
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.train.optimizer import parameter_groups
from tests.integration.runs import run_config

PAPER = dict(attention="shared", sub_layernorm=False, vl_expert_layers=2)
RELEASED = dict(attention="per_modality", sub_layernorm=True, vl_expert_layers=0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [PAPER, RELEASED], ids=["paper", "released"])
def test_overfits_32_samples(architecture: dict, tmp_path: Path) -> None:
    """11 pictures, 10 texts and 11 pairs, always masked alike: below 0.5 nat in every loss."""
    config = run_config(tmp_path)
    model = replace(config.model, layers=4, width=96, heads=4, ffn_width=192, drop_path=0.0, **architecture)
    config = replace(config, model=model, batch=BatchConfig(images=11, texts=10, pairs=11))
    objectives = objectives_of(config)
    batch = MixedBatches(config, 32, rank=0, world=1, annotators=[*objectives])[Request((0, 0, 0), 0)]
    tokenize = ImageTargets(load_vqkd(config.image_tokenizer), torch.device("cpu"))
    inputs, reading, ids = objectives.prepare(batch, torch.device("cpu"), tokenize)
    counts = torch.tensor(objectives.counts(batch))
    assert reading is not None and len(reading.targets[0].codes.unique()) > 4, (
        "targets that are all the same would be too easy"
    )

    objective = PretrainingModule(BEiT3(model), objectives, seed=0).train()
    optimizer = torch.optim.AdamW(parameter_groups(objective.model, 0.0), lr=2e-3)
    for _ in range(150):
        loss, statistics = objective(inputs, reading, ids, counts, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        losses = statistics[0] / counts
        if losses.max() < 0.5:
            return
    pytest.fail(f"image, text, pair image and pair text losses after 150 steps: {losses.tolist()}")
