"""The neutral form: the same bytes from any layout, a checkpoint itself, written within a few buffers of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from beit3_dist.checkpoint import neutral, read
from beit3_dist.checkpoint.files import sha256, write_json
from beit3_dist.checkpoint.find import damaged, find, read_state
from beit3_dist.checkpoint.neutral import write_neutral
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.snapshot import Snapshot
from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.cut import cut_for, cuts_of
from tools.convert_checkpoint import main

MODEL = ModelConfig(layers=2, width=8, heads=2, ffn_width=12, vl_expert_layers=1)
SUFFIXES = ("", "/exp_avg", "/exp_avg_sq")
SHAPES = {
    "language_embedding.words.weight": (7, 3),  # 7 rows are padded where 2 or 3 ranks share them
    "text_head.bias": (7,),
    "blocks.0.ffn.vl.fc2.weight": (5, 7),  # cut along its columns
    "norm.shared.weight": (5,),  # replicated
}
CUTS = cuts_of(BEiT3(MODEL, device="meta"))
VALUES = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for seed, (name, shape) in enumerate(SHAPES.items())
}


def stored(weight: Tensor, suffix: str) -> Tensor:
    """A weight or one of its moments."""
    return weight + SUFFIXES.index(suffix)


def write_checkpoint(
    folder: Path,
    tensor: int = 1,
    data: int = 1,
    values: Mapping[str, Tensor] = VALUES,
    model: ModelConfig = MODEL,
    recipe: str = "out: x\n",
) -> Path:
    """What `tensor` x `data` ranks would save: parts of the tensor ranks, each in `data` runs of equal length.
    `values`: the weights; their moments are made up."""
    folder.mkdir()
    for rank in range(tensor * data):
        (tensor_rank, data_rank), pieces = divmod(rank, data), []
        for name, weight in values.items():
            place = cut_for(CUTS, name, tensor_rank, tensor)
            if place is None and tensor_rank:
                continue  # replicated: the first tensor rank's copy is saved
            wholes = {suffix: stored(weight, suffix) for suffix in SUFFIXES}
            parts = {suffix: (place.of(v) if place else v).reshape(-1) for suffix, v in wholes.items()}
            length = -(-parts[""].numel() // data)
            start = min(data_rank * length, parts[""].numel())
            runs = {suffix: part[start : start + length].clone() for suffix, part in parts.items()}
            pieces.append(Shard(name, tuple(weight.shape), start, runs, place))
        snapshot = Snapshot(torch.device("cpu"))
        snapshot.take(pieces)
        snapshot.write(folder / f"shard_{rank:05d}.safetensors")
    state = {"format": 1, "step": 7, "consumed": [1, 2, 3], "bad_samples": 0, "model": vars(model), "versions": {}}
    write_json(folder / "state.json", state)
    (folder / "config.yaml").write_text(recipe)
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in folder.iterdir()}
    write_json(folder / "manifest.json", entries)
    return folder


LAYOUTS = [(1, 1), (1, 3), (2, 1), (3, 1), (2, 3), (4, 2)]


@pytest.mark.parametrize(("tensor", "data"), LAYOUTS)
def test_every_layout_has_the_same_neutral_form(tensor: int, data: int, tmp_path: Path) -> None:
    write_neutral(write_checkpoint(tmp_path / "source", tensor, data), tmp_path / "neutral")
    found = load_file(tmp_path / "neutral" / "shard_00000.safetensors")
    assert list(found) == sorted(name + suffix for name in VALUES for suffix in SUFFIXES)
    for name, weight in VALUES.items():
        for suffix in SUFFIXES:
            assert torch.equal(found[name + suffix], stored(weight, suffix).flatten()), name + suffix
    write_neutral(write_checkpoint(tmp_path / "plain"), tmp_path / "reference")
    for path in (tmp_path / "reference").iterdir():
        assert (tmp_path / "neutral" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(("tensor", "data"), LAYOUTS)
def test_it_is_a_checkpoint_that_any_layout_loads(tensor: int, data: int, tmp_path: Path) -> None:
    """neutral -> what the ranks of a layout hold -> neutral, bit for bit."""
    write_neutral(write_checkpoint(tmp_path / "source", 3, 2), tmp_path / "neutral")
    assert find(str(tmp_path / "neutral"), tmp_path) == tmp_path / "neutral"
    assert read_state(tmp_path / "neutral", MODEL) == TrainState(step=7, consumed={"images": 1, "texts": 2, "pairs": 3})
    for name, weight in VALUES.items():
        for tensor_rank in range(tensor):
            place = cut_for(CUTS, name, tensor_rank, tensor)
            for suffix in SUFFIXES:
                whole = stored(weight, suffix)
                expected = (place.of(whole) if place else whole).reshape(-1)
                length = -(-expected.numel() // data)
                for start in range(0, expected.numel(), length):
                    run = torch.full((min(length, expected.numel() - start),), torch.nan)
                    read.load(tmp_path / "neutral", [Shard(name, SHAPES[name], start, {suffix: run}, place)])
                    assert torch.equal(run, expected[start : start + length])
    main([str(tmp_path / "neutral"), str(tmp_path / "again"), "--to", "neutral"])
    for path in (tmp_path / "neutral").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_small_buffers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end in the middle of rows and of fragments."""
    source = write_checkpoint(tmp_path / "source", 2, 3)
    write_neutral(source, tmp_path / "one")
    monkeypatch.setattr(neutral, "BUFFER", 4)
    monkeypatch.setattr(read, "BUFFER", 3)
    write_neutral(source, tmp_path / "other")
    shards = [(tmp_path / name / "shard_00000.safetensors").read_bytes() for name in ("one", "other")]
    assert shards[0] == shards[1]


PEAK = """
import sys
from collections.abc import Mapping
from pathlib import Path
from beit3_dist.checkpoint import neutral, read

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

neutral.BUFFER = read.BUFFER = 1 << 18
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kilobytes("VmRSS")
{work}
print((kilobytes("VmHWM") - before) * 1024)
"""
CONVERT = "neutral.write_neutral(Path(sys.argv[1]), Path(sys.argv[2]))"


def peak_growth(work: str, *paths: Path) -> int:
    """Bytes by which some work raises the peak of a process's memory above what the imports took."""
    command = [sys.executable, "-c", PEAK.replace("{work}", work), *map(str, paths)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout)


@pytest.mark.slow
def test_memory_is_bounded_by_buffers_and_not_by_the_checkpoint(tmp_path: Path) -> None:
    """10 parameters of 6 MiB, weight and moments: 180 MiB, in shards cut over 2 x 2 ranks along rows and columns. The
    peak stays below twice the largest parameter plus buffers of 1 MiB each, of which a few are held at once."""
    names = [f"blocks.{n}.ffn.vl.{matrix}.weight" for n in range(5) for matrix in ("fc1", "fc2")]
    source = write_checkpoint(tmp_path / "source", 2, 2, dict.fromkeys(names, torch.ones(1024, 1536)))
    largest = 4 * 1024 * 1536
    total = sum(path.stat().st_size for path in source.glob("shard_*"))
    assert total > 25 * largest
    everything = peak_growth("weights = read.read_weights(Path(sys.argv[1]))", source)
    assert everything > total / 4, "the measure sees what is held"
    growth = peak_growth(CONVERT, source, tmp_path / "neutral")
    print(f"converting {total / 2**20:.0f} MiB raised the peak by {growth / 2**20:.1f} MiB")
    assert growth < 2 * largest + 8 * 2**20


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the tool ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("name", ["shard_00001.safetensors", "state.json", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "source", data=2)
    path = source / name
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(flipped if damage == "flipped" else content[:middle])
    error = refusal([str(source), str(tmp_path / "neutral"), "--to", "neutral"], capsys)
    assert str(source) in error
    if (damage, name) == ("deleted", "manifest.json"):
        assert "no checkpoint of a training run" in error
    elif name != "manifest.json":  # a flipped byte of the manifest is another file's wrong digest
        assert name in error
    assert not list(tmp_path.glob("neutral*"))


def test_a_missing_shard_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint whose manifest fits, but which is not all of it."""
    source = write_checkpoint(tmp_path / "source", data=2)
    manifest = json.loads((source / "manifest.json").read_text())
    del manifest["shard_00001.safetensors"]
    write_json(source / "manifest.json", manifest)
    (source / "shard_00001.safetensors").unlink()
    assert damaged(source) == ""
    error = refusal([str(source), str(tmp_path / "neutral"), "--to", "neutral"], capsys)
    assert "holds" in error and "elements of" in error
    assert not list(tmp_path.glob("neutral*"))


@pytest.mark.parametrize("option", ["--dtype fp16", "--image_size 64", "--heads drop", "--attention_heads 4"])
def test_it_is_the_training_state_as_it_is(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source")
    error = refusal([str(source), str(tmp_path / "neutral"), "--to", "neutral", *option.split()], capsys)
    assert option.split()[0] in error and "as it is" in error


def test_weights_alone_have_no_neutral_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.pth").touch()
    error = refusal([str(tmp_path / "weights.pth"), str(tmp_path / "neutral"), "--to", "neutral"], capsys)
    assert "moments" in error and "--to safetensors" in error


def test_an_existing_destination_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source")
    (tmp_path / "neutral").mkdir()
    assert "already exists" in refusal([str(source), str(tmp_path / "neutral"), "--to", "neutral"], capsys)
