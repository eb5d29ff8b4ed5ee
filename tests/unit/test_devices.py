"""A GPU that is there or asked for but cannot be used is no reason to compute on the CPU in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from beit3_dist import devices
from beit3_dist.devices import device_type
from beit3_dist.inference import Model
from beit3_dist.parallel.mesh import read_mesh


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU, whatever this one has; the path of its driver, which is not there."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "nvidiactl"


def test_a_machine_without_a_gpu_computes_on_the_cpu() -> None:
    assert device_type() == "cpu"


def test_a_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_type() == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device_type() == "cpu"


@pytest.mark.parametrize("sign", ["driver", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"])
def test_a_gpu_that_cannot_be_used_is_named_by_all_who_take_one(
    sign: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA unknown error\nwith a second line")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    if sign == "driver":
        machine.touch()
    else:
        monkeypatch.setenv(sign, {"CUDA_VISIBLE_DEVICES": "0,1", "DS_ACCELERATOR": "cuda"}[sign])
    for take in (device_type, read_mesh, lambda: Model.load("folder")):
        with pytest.raises(ValueError, match=r"cannot be used \(CUDA unknown error\).*DS_ACCELERATOR=cpu"):
            take()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device_type() == "cpu" and read_mesh().device.type == "cpu"


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_a_gpu_that_is_hidden_is_not_meant(value: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert device_type() == "cpu"


def test_another_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(ValueError, match="DS_ACCELERATOR=xpu"):
        device_type()


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="process 2 of this host has no GPU of its own: there are 2 for 4 processes"):
        read_mesh()
