"""Folders of precomputed codes: what they are made from, and how a picture's codes are found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit3_dist.config import EvalConfig
from beit3_dist.data.batch import MicroBatch, MixedBatches, Samples
from beit3_dist.image_tokenizer.codes import FILES, PrecomputedCodes, made_from, write_codes
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


def batch_of(ids: Tensor) -> MicroBatch:
    """Images, and a text."""
    text = torch.tensor([5])
    return MicroBatch({"images": Samples(ids, ids, images=ids), "texts": Samples(text, text)})


def test_codes_of_any_number_of_pictures_are_found_with_few_open_files(tmp_path: Path) -> None:
    """Ids in any order, some of them twice, written in many pieces."""
    draw = np.random.default_rng(0)
    ids = torch.from_numpy(draw.integers(-(1 << 63), 1 << 63, 3_000))
    coded = ((some, codes_of(some)) for some in torch.cat([ids, ids[:500]]).split(10))
    assert write_codes(tmp_path / "codes", coded, {}, (3_000, 500)) == 3_000
    before = len(os.listdir("/proc/self/fd"))
    codes = PrecomputedCodes(tmp_path / "codes", "image_codes", 1 << 16)
    for some in ids[torch.from_numpy(draw.permutation(3_000))].split(64):
        assert torch.equal(codes.of(batch_of(some)), codes_of(some))
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    with pytest.raises(KeyError, match="no codes of 2 images"):
        codes.of(batch_of(torch.tensor([1, ids[0], 2])))  # type: ignore[arg-type]


def test_a_folder_of_a_former_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": {}}))
    with pytest.raises(
        ValueError, match=r"^image_codes: .* \(it has format 1, not 2\); tools/precompute_codes.py makes"
    ):
        PrecomputedCodes(tmp_path, "image_codes", 1 << 16)


def test_a_recipe_without_pictures_has_no_codes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no images"):
        write_codes(tmp_path / "codes", [], {}, (0, 0))


def written(folder: Path) -> Path:
    """Codes of ten pictures."""
    write_codes(folder / "codes", [(torch.arange(10), codes_of(torch.arange(10)))], {"view": 16}, (6, 4))
    return folder / "codes"


def manifest(folder: Path, **changes: Any) -> None:
    """The manifest with other values, or the one that fits the files as they are now."""
    content = json.loads((folder / "manifest.json").read_text())
    sizes = {name: (folder / name).stat().st_size for name in FILES}
    (folder / "manifest.json").write_text(json.dumps(content | {"files": sizes} | changes))


def save_rows(folder: Path, name: str, values: Any) -> None:
    np.save(folder / name, values)
    manifest(folder)


def no_file(folder: Path, name: str, link: str) -> None:
    """A device of a size that fits."""
    (folder / name).unlink()
    (folder / name).symlink_to(link)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = 0
    (folder / "manifest.json").write_text(json.dumps(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda f: (f / "manifest.json").write_text("{"),
    "a list": lambda f: (f / "manifest.json").write_text("[]"),
    "deep": lambda f: (f / "manifest.json").write_text("[" * 100_000),
    "a device as manifest": lambda f: [(f / "manifest.json").unlink(), (f / "manifest.json").symlink_to("/dev/zero")],
    "a device as ids": lambda f: no_file(f, "ids.npy", "/dev/zero"),
    "a device as codes": lambda f: no_file(f, "codes.bin", "/dev/zero"),
    "no files": lambda f: manifest(f, files={}),
    "files in a list": lambda f: manifest(f, files=list(FILES)),
    "no patches": lambda f: manifest(f, patches=0),
    "patches in words": lambda f: manifest(f, patches="3"),
    "patches that do not divide": lambda f: manifest(f, patches=7),
    "patches beyond counting": lambda f: manifest(f, patches=1 << 70),
    "pictures in words": lambda f: manifest(f, pictures=["6", "4"]),
    "three kinds of pictures": lambda f: manifest(f, pictures=[1, 2, 3]),
    "made from a list": lambda f: manifest(f, made_from=[]),
    "ids of another type": lambda f: save_rows(f, "ids.npy", np.arange(10.0)),
    "ids as a matrix": lambda f: save_rows(f, "ids.npy", np.zeros((10, 1), dtype=np.int64)),
    "fewer rows": lambda f: save_rows(f, "rows.npy", np.arange(9)),
    "a number as rows": lambda f: save_rows(f, "rows.npy", np.int64(3)),
    "no ids": lambda f: [save_rows(f, name, np.arange(0)) for name in ("ids.npy", "rows.npy")],
    "other things": lambda f: save_rows(f, "ids.npy", np.array([{}], dtype=object)),
    "several arrays": lambda f: [
        np.savez(f / "ids", np.arange(3)),
        (f / "ids.npz").replace(f / "ids.npy"),
        manifest(f),
    ],
    "garbage": lambda f: [(f / "ids.npy").write_bytes(b"x" * 300), manifest(f)],
    "nothing": lambda f: [(f / "ids.npy").write_bytes(b""), manifest(f)],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_lies_is_one_line(damage: str, tmp_path: Path) -> None:
    folder = written(tmp_path)
    DAMAGES[damage](folder)
    with pytest.raises(ValueError, match="^image_codes: .*codes is no whole folder of codes") as refusal:
        PrecomputedCodes(folder, "image_codes", 1 << 16)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("rows", [np.arange(10) + 1, np.arange(10) - 1, np.full(10, 1 << 40)])
def test_rows_that_are_not_there_are_named(rows: np.ndarray, tmp_path: Path) -> None:
    folder = written(tmp_path)
    save_rows(folder, "rows.npy", rows)
    codes = PrecomputedCodes(folder, "image_codes", 1 << 16)
    with pytest.raises(ValueError, match="^image_codes: .*codes is damaged"):
        codes.of(batch_of(torch.arange(10)))  # type: ignore[arg-type]


def test_codes_that_the_tokenizer_has_not_are_named(tmp_path: Path) -> None:
    codes = PrecomputedCodes(written(tmp_path), "image_codes", 9)
    with pytest.raises(ValueError, match="^image_codes: .*codes is damaged"):
        codes.of(batch_of(torch.arange(10)))  # type: ignore[arg-type]
