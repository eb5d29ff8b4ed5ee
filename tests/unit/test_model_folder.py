"""A model folder gives back what was saved, and says what is wrong with it otherwise."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch

from beit3_dist.checkpoint.model_folder import read_model_folder, save_model_folder
from beit3_dist.config import ModelConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.model import BEiT3

CONFIG = ModelConfig(
    layers=2,
    width=16,
    heads=2,
    ffn_width=24,
    patch_size=8,
    image_size=16,
    vocab_size=40,
    visual_vocab_size=12,
    vl_expert_layers=1,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "words.spm").write_bytes(b"pieces")
    weights = dict(BEiT3(CONFIG).named_parameters()) | {"task_head.dense.weight": torch.ones(3, 16).half().T}
    save_model_folder(tmp_path / "model", weights, CONFIG, task={"kind": "vqa"}, text_tokenizer=tmp_path / "words.spm")
    return tmp_path / "model"


def test_what_is_saved_is_read(folder: Path) -> None:
    read = read_model_folder(folder)
    assert read.config == CONFIG and read.task == {"kind": "vqa"}
    assert read.text_tokenizer is not None and read.text_tokenizer.read_bytes() == b"pieces"
    head = read.weights.pop("task_head.dense.weight")
    assert torch.equal(head, torch.ones(16, 3).half()) and head.dtype == torch.float16
    expected = BEiT3(CONFIG).state_dict()
    assert read.weights.keys() == expected.keys()
    assert all(torch.equal(read.weights[name], value) for name, value in expected.items())


def test_a_full_disk_is_the_systems_error_with_the_files_name(tmp_path: Path) -> None:
    """For no file of this process, as for one on a full disk, more than 64 KiB; the library had it in words alone."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            save_model_folder(tmp_path / "model", {"a": torch.zeros(1 << 16)}, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and error.value.filename.endswith("model.safetensors")
    assert not (tmp_path / "model").exists()


def test_no_task_and_no_tokenizer(tmp_path: Path) -> None:
    save_model_folder(tmp_path / "model", {"a": torch.zeros(2)}, CONFIG)
    read = read_model_folder(tmp_path / "model")
    assert read.task is None and read.text_tokenizer is None and list(read.weights) == ["a"]


def test_a_tokenizer_that_is_no_file_is_not_taken_for_none(tmp_path: Path) -> None:
    save_model_folder(tmp_path / "model", {"a": torch.zeros(2)}, CONFIG)
    (tmp_path / "model" / "tokenizer.spm").symlink_to("nowhere.spm")
    tokenizer = read_model_folder(tmp_path / "model").text_tokenizer
    with pytest.raises(ValueError, match="there is no file"):
        TextTokenizer(str(tokenizer))


def test_an_existing_folder_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(ValueError, match="already exists"):
        save_model_folder(folder, {}, CONFIG)
    assert read_model_folder(folder).config == CONFIG


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        read_model_folder(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .* it is damaged"):
        read_model_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9, this version reads 1"),
        ({"model": {"depth": 3}}, "depth"),
        ({"model": {"heads": 3}}, r"model\.heads=3"),
    ],
)
def test_another_config_is_refused(change: dict, message: str, folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=rf"config\.json is not a config of ours: .*{message}"):
        read_model_folder(folder)
