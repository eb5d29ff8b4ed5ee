"""The package as pip installs it: built, in an environment of its own, used outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.integration.runs import CODES, save_random_tokenizer
from tests.unit.tar_fixtures import picture, sentences

REPOSITORY = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "beit3_dist", "launchers", "tools", "ds_configs")
RUN = """
    --steps 2 --batch.images 0 --batch.texts 2 --batch.pairs 4 --model.layers 1 --model.width 32 --model.heads 2
    --model.ffn_width 64 --model.image_size 32 --model.vl_expert_layers 1 --model.vocab_size 310 --data.workers 0
    --model.max_text_length 18 --data.text_length 16 --data.caption_length 16 --eval.every 0 --data.cache cache
    --data.texts texts/train/*.tar --data.pairs pairs/train/*.tar --checkpoint.every 2 --optim.warmup_steps 1
""".split()  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # built beside the repository: setuptools would take what a former build has left in it
        path, copy = REPOSITORY / name, folder / "source" / name
        copy.parent.mkdir(exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """The programs of a fresh environment: the wheel, and the packages of this one, which took minutes to install."""
    folder = wheel.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", str(folder / "bin" / "python"), "install", "--no-index", str(wheel))
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    position = command.index("wheel" if "wheel" in command else "install") + 1
    done = subprocess.run([*command[:position], "--no-deps", "--quiet", *command[position:]], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=300)  # fmt: skip


def test_the_wheel_holds_what_the_repository_has(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("beit3_dist", "*.py"), ("tools", "*.py"), ("launchers", "*.py"), ("launchers", "*.yaml"),
                            ("launchers", "*.sbatch"), ("ds_configs", "*.json")):  # fmt: skip
        for path in (REPOSITORY / folder).rglob(pattern):
            name = str(path.relative_to(REPOSITORY))
            assert (name if folder == "beit3_dist" else f"beit3_dist/{name}") in held


def test_from_data_to_scores_outside_the_repository(environment: Path, tmp_path: Path) -> None:
    def beit3(*arguments: object) -> str:
        done = run(tmp_path, environment / "beit3", *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    table = tmp_path / "captions.tsv"
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(picture(number, 32, 32))
    table.write_text("image\tcaption\n" + "".join(f"{n}.png\t{sentences()[n]}\n" for n in range(12)))
    (tmp_path / "corpus.txt").write_text("\n".join(sentences()))
    beit3("build-shards", "pairs", table, "pairs", "--held-out", "0.3")
    beit3("build-shards", "texts", "corpus.txt", "texts")
    beit3("train-text-tokenizer", "--shards", "texts/*/*.tar", "--pieces", "300", "--out", "text.spm")
    save_random_tokenizer(tmp_path / "image.pth")

    tokenizers = ("--text_tokenizer", "text.spm", "--image_tokenizer", "image.pth")
    geometry = (*tokenizers, "--model.visual_vocab_size", CODES)
    processes = (environment / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    pretrain = (*processes, "-m", "beit3_dist", "pretrain", "--config", "demo_contrast", "--out", "run", *RUN)
    trained = run(tmp_path, *pretrain, *geometry)
    assert trained.returncode == 0, trained.stderr[:2000]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert "every step read the samples" in beit3("verify-order", "run")
    beit3("evaluate", "run", "retrieval", "--data", "pairs/held_out/*.tar", "--json", "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert 0 <= scores["metrics"]["image_retrieval_recall@1"] <= 1
    beit3("convert", "run", "model", "--to", "safetensors")
    python = "import beit3_dist; from beit3_dist.inference import Model; print(beit3_dist.__file__); "
    python += "print(Model.load('model').embed_images(['1.png']).shape)"
    used = run(tmp_path, environment / "python", "-c", python)
    assert used.stdout.splitlines()[1] == "torch.Size([1, 32])", used.stderr[-2000:]
    assert Path(used.stdout.splitlines()[0]).is_relative_to(environment.parent)

    deepspeed = (environment / "python", "-m", "deepspeed.launcher.runner", "--num_accelerators", 1, "--module")
    refused = run(tmp_path, *deepspeed, "beit3_dist", "pretrain", "--config", "demo", "--model.heads", 7)
    assert refused.returncode == 2
    assert "beit3 pretrain: error: model.width=128 is not divisible by model.heads=7" in refused.stderr
