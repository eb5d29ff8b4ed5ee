"""Folders of precomputed codes: what they are made from, and how a picture's codes are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from beit3_dist.config import EvalConfig
from beit3_dist.data.batch import MixedBatches
from beit3_dist.training.image_codes import made_from
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
