"""The planner: what it counts, what it adds up, and what its command says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beit3_dist.config import BatchConfig, DataConfig, ModelConfig, RunConfig
from beit3_dist.objectives.masked_data_modeling import MaskedDataModelingConfig
from beit3_dist.objectives.matching import MatchingConfig
from beit3_dist.plan import h200
from beit3_dist.plan.auto import USABLE
from beit3_dist.plan.counting import Counting, Work, caption_lengths
from beit3_dist.plan.devices import DEVICES, Device, Link, device_named
from beit3_dist.plan.layouts import Layout, Plan, Planner
from tools import plan

GIANT = str(Path(__file__).parents[2] / "launchers" / "recipes" / "giant.yaml")
MODEL = ModelConfig(
    layers=4, vl_expert_layers=1, width=32, heads=4, ffn_width=64, patch_size=8, image_size=32, vocab_size=60,
    visual_vocab_size=20, max_text_length=30,
)  # fmt: skip
PLAIN = Layout(1, 1, False, 1, "none", 1)
A100 = DEVICES["A100-40"]


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe names its DeepSpeed file relative to the repository."""
    monkeypatch.chdir(Path(__file__).parents[2])


def run_config(**fields: object) -> RunConfig:
    data = DataConfig(images="unused", texts="unused", pairs="unused", text_length=20, caption_length=16)
    batch = BatchConfig(images=16, texts=16, pairs=16)
    config = RunConfig(out="unused", text_tokenizer="unused", kernels="torch", data=data, batch=batch, model=MODEL)
    return replace(config, image_codes="unused", **fields)  # type: ignore[arg-type]


def test_layers_add_up() -> None:
    """The counts of a deeper model are those of its layers; products are the model's own."""
    few, deep = (
        Counting(run_config(model=replace(MODEL, layers=n)), gpu=True).pieces((4, 4, 4), "none") for n in (4, 7)
    )
    assert (few.layers, deep.layers) == (3, 6) and few.layer.work.flops == deep.layer.work.flops
    assert few.layer.kept == pytest.approx(deep.layer.kept, rel=1e-3)
    tokens, d, f = few.tokens, MODEL.width, MODEL.ffn_width
    assert few.layer.work.flops == 3 * tokens * (8 * d * d + 4 * d * f)
    lengths = [17] * 4 + [17 + 16] * 4 + [20] * 4 + [79]  # padded; the last fills 49 words of captions up to 128
    assert few.layer.work.core_flops == 3.5 * 4 * d * sum(n * n for n in lengths)


def test_recomputation_and_tensor_ranks() -> None:
    counting = Counting(run_config(), gpu=True)
    none, full = (counting.pieces((4, 4, 4), mode).layer for mode in ("none", "full"))  # type: ignore[arg-type]
    assert full.kept < none.kept / 5 and full.work.flops == pytest.approx(none.work.flops * 4 / 3)
    halved = counting.pieces((4, 4, 4), "none", 2).layer
    assert halved.work.flops == none.work.flops / 2 and none.work.collectives == {}
    tokens = counting.pieces((4, 4, 4), "none").tokens
    sent = {name: 0.0 for name, _ in halved.work.collectives}
    for (name, size), often in halved.work.collectives.items():
        sent[name] += size * often
    assert sent == {"all_reduce": 4 * tokens * MODEL.width * 2}  # Megatron's two forward and two backward


def test_a_second_pass_is_counted() -> None:
    """Matching shows the model three fused samples for each pair, beside the first pass and its memory."""
    objectives: dict[str, Any] = {"masked_data_modeling": MaskedDataModelingConfig()}
    plain, matched = (
        Counting(run_config(objectives=objectives | more), gpu=False).pieces((4, 4, 4), "none")
        for more in ({}, {"matching": MatchingConfig(negatives="random")})
    )
    fused = 12 * 17 + int(caption_lengths(12, 16).sum())
    assert matched.tokens == plain.tokens + fused
    assert matched.layer.work.flops / plain.layer.work.flops == pytest.approx(matched.tokens / plain.tokens)
    assert matched.layer.kept / plain.layer.kept == pytest.approx(matched.tokens / plain.tokens, rel=0.1)


def test_collectives_and_rates() -> None:
    link = Link(1e9, 1e-5)
    device = Device("x", 8, 1e12, 1e10, link, Link(1e8, 1e-4), "", node=4, link_share=1.0, launch_s=0, memory_share=1)
    assert device.collective_s("all_reduce", 4e6, 4, 1) == pytest.approx(2e-5 + 2 * 3 / 4 * 4e-3)
    assert device.collective_s("all_gather", 4e6, 4, 1) == pytest.approx(1e-5 + 3 / 4 * 4e-3)
    # Two nodes: four adapters together, a hop between nodes and one inside.
    assert device.collective_s("all_gather", 8e6, 8, 1) == pytest.approx(2e-4 + 7 / 8 * 8e6 / 4e8)
    assert device.collective_s("all_reduce", 1e6, 1, 1) == 0
    own = replace(device, collectives={"all_gather": Link(5e8, 2e-5)})
    assert own.collective_s("all_gather_into_tensor", 4e6, 4, 1) == pytest.approx(2e-5 + 3 / 4 * 8e-3)
    assert own.collective_s("all_reduce", 4e6, 4, 1) == device.collective_s("all_reduce", 4e6, 4, 1)
    measured = replace(device, products=[(1e6, 1e9), (1e8, 3e9)], operations={"add": 5e9})
    assert measured.product_rate(1e7) == pytest.approx(2e9) and measured.product_rate(1e9) == 3e9
    assert measured.seconds(Work(operations={"add": (5e9, 1), "mul": (1e10, 1)})) == pytest.approx(2)


def test_memory_of_states_and_reasons() -> None:
    planner = Planner(run_config(), A100)
    one, four = (planner.plan(PLAIN, n) for n in (1, 4))
    assert isinstance(one, Plan) and isinstance(four, Plan)
    parameters = one.memory.parameters / 2
    assert one.memory.states == pytest.approx(12 * parameters) and four.memory.states == pytest.approx(3 * parameters)
    assert four.host_gb == pytest.approx(3 * parameters / 1e9) and four.micro_batch == (4, 4, 4)
    assert isinstance(planner.plan(PLAIN, 1, usable_gb=1e-6), float)
    with pytest.raises(ValueError, match="does not divide 4 devices"):
        planner.plan(replace(PLAIN, tensor=8), 4)
    piped = planner.plan(replace(PLAIN, pipeline=2, accumulation=2), 4)
    assert isinstance(piped, Plan) and piped.memory.pipeline_buffers > 0 and piped.time.bubble > 0


def test_what_was_measured_on_the_h200() -> None:
    """Seven steps within 10 %, by two fitted constants, and their memory within 5 %, by none."""
    for row in h200.ROWS:
        assert row.predicted_s(DEVICES["H200"]) == pytest.approx(row.step_s, rel=0.1), row.name
        assert row.counted_gb == pytest.approx(row.memory_gb, rel=0.05), row.name


TABLE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text().partition("## Memory")[2]
PLANNED = """
import json, sys
from dataclasses import replace
from beit3_dist.command_line import configured
from beit3_dist.config import RunConfig
from beit3_dist.objectives import SECTIONS
from beit3_dist.plan.devices import DEVICES
from beit3_dist.plan.layouts import Layout, Planner
unnamed = "text_tokenizer", "image_tokenizer", "data.images", "data.texts", "data.pairs"
for recipe, layouts in json.loads(sys.argv[1]).items():
    given = ["--config", recipe, "--out", "run", *(word for name in unnamed for word in (f"--{name}", "FILE"))]
    config = configured(RunConfig, "plan", "", given, SECTIONS)
    stage = json.loads(open(config.deepspeed_config).read())["zero_optimization"]["stage"]
    planner = Planner(replace(config, batch=replace(config.batch, accumulation=1)), DEVICES["H100"])
    for accumulation, devices in layouts:
        plan = planner.plan(Layout(stage, 1, False, 1, config.activation_checkpointing, accumulation), devices)
        print(json.dumps([recipe, accumulation, devices, plan.memory_gb, plan.memory.activations / 1e9]))
"""
"""In a process of its own, where Triton's kernels are a GPU's: here they are interpreted, and cannot be counted."""


def test_memory_of_the_recipes_is_what_the_page_says() -> None:
    """Of base every figure, of others those of 8 devices; a recipe's head has the first one, too."""
    asked = {name: [(1, 8)] for name in ("base", "large", "giant", "beit3_base_contrast")}
    asked["base"] += [(2, 8), (4, 8), (1, 64)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-c", PLANNED, json.dumps(asked)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    planned = {tuple(row[:3]): row[3:] for row in map(json.loads, done.stdout.splitlines())}
    for recipe in asked:
        row = next(line for line in TABLE.splitlines() if line.startswith(f"| `{recipe}` |"))
        said = [float(cell) for cell in row.split("|")[2:-1]]
        assert planned[recipe, 1, 8] == pytest.approx(said[:2], abs=0.6), recipe
        assert f"8 devices: {said[0]:.0f} GB" in (Path("launchers/recipes") / f"{recipe}.yaml").read_text()
        if recipe == "base":
            others = [planned[recipe, *of][0] for of in ((2, 8), (4, 8), (1, 64))]
            assert others == pytest.approx(said[2:], abs=0.6)
            assert planned[recipe, 1, 8][0] > DEVICES["H100"].memory_gb * USABLE > others[0], "auto takes 2"


@pytest.fixture()
def few_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    def layouts(self: Planner, devices: int) -> Iterator[Layout]:
        for accumulation in (1, 8, 4096):
            yield Layout(3, 1, False, 1, "full", accumulation)
        yield Layout(3, 3, False, 1, "none", 1)

    monkeypatch.setattr(Planner, "layouts", layouts)
    monkeypatch.setattr(plan, "step_flops", lambda config: 1.4e16)
    # A test asks for the same run in several forms: each layout is planned once.
    planned: dict[Any, Any] = {}
    of_layout = Planner.plan

    def once(self: Planner, layout: Layout, devices: int, *more: Any, **options: Any) -> Any:
        key = (layout, devices, more, *sorted(options.items()))
        if key not in planned:
            planned[key] = of_layout(self, layout, devices, *more, **options)
        return planned[key]

    monkeypatch.setattr(Planner, "plan", once)


COMMAND = ["--config", GIANT, "--kernels", "torch", "--device", "A100-40", "--devices", "256"]


def test_command(few_layouts: None, capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([*COMMAND, "--json", "--price", "2", "--days", "14"])
    record = json.loads(capsys.readouterr().out)
    assert [layout["accumulation"] for layout in record["layouts"]] == [1, 8]  # 8: micro-batches of one sample each
    first = record["layouts"][0]
    assert first["zero_stage"] == 3 and first["tensor"] == first["pipeline"] == 1 and first["data"] == 256
    assert first["memory_gb"] == pytest.approx(sum(first["memory"].values())) and first["memory_gb"] < 40 * 0.93
    assert first["cost"] == pytest.approx(first["device_hours"] * 2) and first["step_s"] > 0
    # Two weeks of 256 A100 for a million steps: 1.21 s a step.
    assert record["mfu_of_days"] == pytest.approx(1.4e16 / (14 * 86_400 / 1e6) / (256 * 312e12))
    assert len(record["left_out"]) == 2
    plan.main([*COMMAND, "--days", "14"])
    out = capsys.readouterr().out
    assert "in 14 days: 1.21 s a step, 14.5% MFU" in out and "2 layouts fit" in out
    plan.main([*COMMAND, "--emit"])
    assert "--parallel.zero_stage 3 --parallel.tensor 1" in capsys.readouterr().out


def test_failing_devices(few_layouts: None, capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([*COMMAND[:-1], "16", "--failures", "--steps", "20000", "--durable-s", "30"])
    lines = capsys.readouterr().out.splitlines()
    assert "a failure every 50,6" in lines[0] and [line.split()[0] for line in lines[2:]] == ["8", "16"]


def test_what_was_measured_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--check", "h200"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(h200.ROWS)
    with pytest.raises(SystemExit):
        plan.main(["--check", "h200", "--steps", "3"])
    assert "--steps has no meaning with --check" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.main(["--check", "failures"])
    assert "needs the run's command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--deepspeed_config", "ds_configs/none.json"], "deepspeed_config: there is no file ds_configs/none.json"),
        (["--device", "A101"], "--device A101: there are A100-40"),
        (["--device", "cpu"], "--device cpu has no data sheet"),
        (["--kernels", "compiled"], "kernels=compiled cannot be counted"),
        (["--devices", "7", "--batch.images", "2049"], "no layout divides and fits: "),
        (["--price", "nan"], "--price nan is not in [0, infinity)"),
        (["--failures", "--pause-s=-1"], "--pause-s -1 is not in [0"),
        (["--failures", "--failures-per-device-hour", "0"], "--failures-per-device-hour 0 is not in"),
        (["--check", "failures", "--mtbf-s", "0", "true"], "--mtbf-s 0 is not in"),
        (["--failures", "--devices", "4"], "--devices 4: --failures begins at 8"),
        (["--calibrate", "nowhere/rates.json"], "--calibrate nowhere/rates.json is to be a file in a folder"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], words: str, few_layouts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        plan.main([*COMMAND, *options])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and words in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_rates_of_a_cpu_come_from_a_file(tmp_path: Path) -> None:
    link = {"bandwidth": 1e9, "latency": 1e-5}
    values = {
        "name": "cpu",
        "memory_gb": 8,
        "peak": 0,
        "bandwidth": 1e10,
        "inside": link,
        "outside": link,
        "source": "",
    }
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(values | {"products": [[1e6, 1e9]], "gpu": False}))
    assert device_named("cpu", str(file)).product_rate(5) == 1e9
    file.write_text(json.dumps(values | {"products": [], "collectives": {"all_gather": link}, "gpu": False}))
    assert device_named("cpu", str(file)).collectives == {"all_gather": Link(1e9, 1e-5)}
    for wrong in ({"speed": 3}, {"products": [], "collectives": [link]}):
        file.write_text(json.dumps(values | wrong))
        with pytest.raises(ValueError, match="is no file of --calibrate"):
            device_named("cpu", str(file))
