"""Folders of precomputed codes: what they are made from, and how a picture's codes are found."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from beit3_dist.config import EvalConfig
from beit3_dist.data.batch import MixedBatches
from beit3_dist.training.image_codes import CodesWriter, PrecomputedCodes, made_from
from tests.unit.tar_fixtures import small_run


def test_codes_of_another_order_are_of_other_pictures(tmp_path: Path) -> None:
    """Below one epoch the order decides which pictures have codes; held-out pictures come in stored order."""
    run = small_run(tmp_path)
    data = run.data
    (tmp_path / "tokenizer.pth").write_bytes(b"weights")
    run = replace(run, image_tokenizer=str(tmp_path / "tokenizer.pth"),
                  eval=EvalConfig(every=1, images=data.images, texts=data.texts, pairs=data.pairs))  # fmt: skip
    changes: list[dict[str, object]] = [{"shuffle": "blocks"}, {"shuffle": "blocks", "shuffle_block": 2}]
    others = [replace(run, data=replace(data, **change)) for change in changes]  # type: ignore[arg-type]
    for held_out, kinds in ((False, 3), (True, 1)):
        batches = MixedBatches(run, 32, 0, 1, held_out)
        found = [made_from(other, 32, held_out, batches) for other in (run, *others)]
        assert len({str(made) for made in found}) == kinds


def codes_of(ids: Tensor) -> Tensor:
    """Three patches a picture."""
    return torch.stack([ids % 65_521, ids % 7, ids % 65_536], dim=1).abs()


def batch_of(ids: Tensor) -> SimpleNamespace:
    """Pictures, and a text behind them."""
    return SimpleNamespace(images=ids, sample_ids=torch.cat([ids, torch.tensor([5])]))


def test_codes_of_any_number_of_pictures_are_found_with_few_open_files(tmp_path: Path) -> None:
    """Ids in any order, some of them twice, written in many pieces."""
    draw = np.random.default_rng(0)
    ids = torch.from_numpy(draw.integers(-(1 << 63), 1 << 63, 3_000))
    writer = CodesWriter(tmp_path / "codes")
    for some in torch.cat([ids, ids[:500]]).split(10):
        writer.add(some, codes_of(some))
    assert writer.close({}, (3_000, 500)) == 3_000
    before = len(os.listdir("/proc/self/fd"))
    codes = PrecomputedCodes(tmp_path / "codes", "image_codes")
    for some in ids[torch.from_numpy(draw.permutation(3_000))].split(64):
        assert torch.equal(codes.of(batch_of(some)), codes_of(some))  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    with pytest.raises(KeyError, match="no codes of 2 pictures"):
        codes.of(batch_of(torch.tensor([1, ids[0], 2])))  # type: ignore[arg-type]


def test_a_folder_of_a_former_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    with pytest.raises(
        ValueError, match=r"^image_codes: .* \(it has format 1, not 2\); tools/precompute_codes.py makes"
    ):
        PrecomputedCodes(tmp_path, "image_codes")


def test_a_recipe_without_pictures_has_no_codes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no pictures"):
        CodesWriter(tmp_path / "codes").close({}, (0, 0))
