"""Ten steps of every kind of run leave the very bits that they left when the values were recorded.

For refactorings: what is recorded (records of all steps, validations, digests of weights and of predictions) was made
by another arrangement of the same arithmetic. Bits of fp32 depend on the processor and on torch, so they are compared
where both are as recorded; elsewhere the samples must be the same, and the first losses close (1e-3). Texts are lines
of the standard library's documentation, which some of Python's patch releases have changed: others compare nothing.

    pytest tests/golden -k 'demo and one_process'      one case
    python -m tests.golden.record demo-one_process     records it anew, where what is computed is meant to change
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from beit3_dist.inference import Model
from tests.golden.record import VALUES
from tests.golden.runs import CASES, IMAGES, LAYOUTS, STEPS, machine, make_data, result, run, small_recipe
from tests.launching import launch
from tests.unit.tar_fixtures import sentences

OLD = Path(__file__).with_name("old")
LINES = "95780c7fb33c3184"
"""Digest of the lines that the values were recorded with (Python 3.11.7)."""
TEXTS = ["a red circle", "the statement is used to import a module"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if hashlib.sha256("\n".join(sentences()[:1500]).encode()).hexdigest()[:16] != LINES:
        pytest.skip(f"Python {platform.python_version()} documents itself in other lines than 3.11.7, as recorded")
    folder = tmp_path_factory.mktemp("golden")
    make_data(folder)
    return folder


def recorded(case: str) -> dict[str, Any]:
    return json.loads((VALUES / f"{case}.json").read_text())


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if LAYOUTS[c.split("-")[1]][0] > 1 else ()) for c in CASES]
)
def test_values(case: str, data: Path, tmp_path: Path) -> None:
    if case.startswith("image_tokenizer"):
        pytest.importorskip("efficientnet_lite_pytorch")
    compare(run(case, data, tmp_path / case), recorded(case))


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Fails, with the first step that differs, unless `found` holds all that was recorded."""
    same_machine = expected["machine"] == machine()
    for part in ("metrics", "eval"):
        for new, old in zip(found.get(part, []), expected.get(part, []), strict=True):
            # Fields that came later are no concern of what was recorded.
            shown = {name: new.get(name) for name in old} if same_machine else {"sample_hash": new.get("sample_hash")}
            assert shown == {name: old.get(name) for name in shown}, f"{part}, step {old['step']}"
    for new, old in zip(found["metrics"][:3], expected["metrics"][:3], strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-3)
    assert found["weights"].keys() == expected["weights"].keys()
    if same_machine:
        changed = [name for name, digest in expected["weights"].items() if found["weights"][name] != digest]
        assert not changed, f"weights that differ: {changed}"
        assert found["predictions"] == expected["predictions"]


@pytest.mark.slow
def test_a_checkpoint_written_before_goes_on(data: Path, tmp_path: Path) -> None:
    """Of two ranks under ZeRO-3, resumed by one process under ZeRO-1: the samples of the whole run, and its losses but
    for the order of sums (1e-5)."""
    out = tmp_path / "run"
    shutil.copytree(OLD / "run", out)
    launcher, _, settings = small_recipe("demo-one_process", data, out)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | {"checkpoint": {"every": 6, "resume": "auto"}}))
    ended = launch(launcher, "--config", str(tmp_path / "recipe.yaml"))
    assert ended.returncode == 0, ended.stderr
    whole = json.loads((OLD / "run.json").read_text())["metrics"]
    found = result(out, launcher)["metrics"]
    assert [record["step"] for record in found] == [*range(1, STEPS + 1)]
    for new, old in zip(found, whole, strict=True):
        assert new["sample_hash"] == old["sample_hash"]
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-5), new["step"]


def test_a_model_folder_written_before_is_used(data: Path) -> None:
    model = Model.load(OLD / "model", "cpu")
    expected = json.loads((OLD / "embeddings.json").read_text())
    found = {
        "images": model.embed_images([data / f"{n}.png" for n in range(IMAGES)]),
        "texts": model.embed_texts(TEXTS),
    }
    for name, vectors in found.items():
        torch.testing.assert_close(vectors, torch.tensor(expected[name]), rtol=0, atol=1e-5, msg=name)
