"""The benchmark compares equals, and its figures mean what they say. No time is asserted here."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.registry import Case, operations
from beit3_dist.parallel import compiled
from beit3_dist.tools.benchmarks import growth, kernels, recipe
from beit3_dist.tools.benchmarks.measure import MatrixProducts, kept_bytes, peak_bytes
from tools import benchmark

TINY = [
    *("--layers", 2, "--width", 16, "--heads", 2, "--ffn_width", 24, "--patch_size", 8, "--image_size", 32),
    *("--vocab_size", 60, "--visual_vocab_size", 20, "--images", 2, "--texts", 2, "--pairs", 3),
    *("--text_length", 9, "--caption_lengths", 4, 7, "--repeats", 2),
]
CPU = torch.device("cpu")


def run(*arguments: object) -> int:
    """Exit code of the tool, in this process."""
    return benchmark.main(list(map(str, arguments)))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", "--json", *TINY) == 0
    record = json.loads(capsys.readouterr().out)
    ours, three, theirs, fused = record["contenders"]
    assert record["ratio_vs_torchscale"] == theirs["step_s"] / ours["step_s"] > 0
    assert record["ratio_vs_torchscale_fused_adamw"] == fused["step_s"] / ours["step_s"]
    assert record["cpu_ratio_vs_torchscale"] == theirs["cpu_s"] / ours["cpu_s"]
    assert record["ratio_vs_torchscale_compiled"] is None and record["mfu"] is None and "profile" not in record
    assert 0 < record["matmul_share"] and 0 < record["model_tflops"]
    assert record["ratio_vs_three_passes"] == three["step_s"] / ours["step_s"]
    ratio = ours["activation_gb"] / theirs["activation_gb"]
    assert record["activation_memory_ratio_vs_torchscale"] == pytest.approx(ratio) and ratio > 0
    assert all(it["fastest_s"] <= it["step_s"] <= it["slowest_s"] for it in record["contenders"])
    assert set(record["losses"]) == {"image", "text", "pair_image", "pair_text"}
    assert record["options"]["text_length"] == 9 and record["options"]["caption_lengths"] == [4, 7]
    assert record["tokens"] >= 5 * 17 + 2 * 9 + 3 * 4


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", *TINY) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 12
    assert "equal losses: image" in printed and "ours, one pass" in printed and "torchscale, three passes" in printed


def test_objectives_alone_and_together(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip")
    names = ["masked_data_modeling", "contrastive"]
    assert run("model", "--json", "--objectives", ",".join(names), *TINY) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    together, *alone, theirs = rows.values()
    assert [*rows] == ["all in one pass", *names, "open_clip, contrast"]
    assert together["flops"] == sum(part["flops"] for part in alone)  # they share no view
    assert theirs["flops"] > alone[1]["flops"] / 2
    assert run("model", "--alone", "--objectives", "contrastive", *TINY) == 0
    printed = capsys.readouterr().out
    assert "open_clip" not in printed and "sum of its parts" not in printed
    assert run("model", "--objectives", "contrastive,matching", *TINY) == 2
    assert "matching: it has a second pass" in capsys.readouterr().err


def contenders() -> list[benchmark.Contender]:
    options = benchmark.parse(["model", *map(str, TINY)])
    geometry = {name: getattr(options, name) for name in benchmark.GEOMETRY}
    config = ModelConfig(**geometry, attention="per_modality", sub_layernorm=True, vl_expert_layers=0, drop_path=0.0)
    return benchmark.model_contenders(config, benchmark.random_micro_batch(config, 2, 2, 3, 9, (4, 7)), CPU)


def test_nothing_is_timed_unless_losses_are_equal() -> None:
    all_of_them = contenders()
    assert len(benchmark.assert_equal_losses(all_of_them)) == 4
    with torch.no_grad():
        all_of_them[2].model.beit3.encoder.layers[1].ffn.B.fc1.bias[0] += 1e-2
    with pytest.raises(AssertionError, match="losses of torchscale, three passes differ"):
        benchmark.assert_equal_losses(all_of_them)


def test_a_step_of_each_learns_the_same() -> None:
    """The timed steps are the whole and the same work: after three of them all losses have fallen alike."""
    ours, three, theirs, _ = contenders()
    before = sum(benchmark.assert_equal_losses([ours, theirs]))
    for _ in range(3):
        ours.step()
        theirs.step()
        assert all(p.grad is None for p in ours.model.parameters()), "gradients would add up over the steps"
    assert sum(benchmark.assert_equal_losses([ours, theirs])) < before
    assert three.model is ours.model and three.optimizer is ours.optimizer


def test_ours_alone_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", "--json", *TINY, "--alone", "--precision", "bf16", "--profile", "--threads", 1) == 0
    record = json.loads(capsys.readouterr().out)
    assert [it["name"] for it in record["contenders"]] == ["ours, one pass"]
    assert record["ratio_vs_torchscale"] is record["activation_memory_ratio_vs_torchscale"] is None
    assert record["machine"]["threads"] == 1 and "AdamW" in record["profile"]


def test_ours_compiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Which of ours it was is said; equal losses are asserted inside. The CPU's peak of compiled code is not known."""
    calls, before = [], compiled._before_attention

    def spy(*arguments):
        calls.append(arguments)
        return before(*arguments)

    monkeypatch.setattr(compiled, "_before", spy)  # not compiled: it takes long
    monkeypatch.setattr(compiled, "_after", compiled._after_attention)
    assert run("model", "--json", *TINY, "--kernels", "compiled") == 0
    record = json.loads(capsys.readouterr().out)
    ours, three, theirs, _ = record["contenders"]
    assert calls and ours["name"] == "ours, one pass, compiled"
    assert ours["activation_gb"] is three["activation_gb"] is record["activation_memory_ratio_vs_torchscale"] is None
    assert record["ratio_vs_torchscale"] == theirs["step_s"] / ours["step_s"] and theirs["activation_gb"] > 0
    assert run("model", *TINY, "--kernels", "compiled", "--alone") == 0
    assert "ours, one pass, compiled" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_with_fused_attention_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal losses are asserted inside. The layers share their graphs: pictures, texts and pairs, each without and with
    gradients. Only the pairs' attention has a mask."""
    graphs, masks = [], []

    def traced(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        attention = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
        graphs.append(graph)
        masks.extend(node.kwargs["attn_mask"] is not None for node in attention)
        return graph  # making code of it would take long

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=traced))
    before = dict(sys.modules)
    assert run("model", "--json", *TINY, "--layers", 5, "--compile") == 0
    record = json.loads(capsys.readouterr().out)
    assert len(graphs) == len(masks) <= 9 and sum(masks) * 3 == len(masks)
    assert (
        before.keys() <= sys.modules.keys()
        and not {"timm.models.layers", "fairscale"} & sys.modules.keys() - before.keys()
    )
    theirs = record["contenders"][4]
    assert record["ratio_vs_torchscale_compiled"] == theirs["step_s"] / record["contenders"][0]["step_s"]


def test_bf16_learns_from_fp32_masters() -> None:
    """A change that bf16 rounds away adds up in the masters: twenty steps of 1e-4 from 1 are 0.998, not 1."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    optimizer = benchmark.MasterAdamW(model)
    for _ in range(20):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.masters[0].item() == pytest.approx(1 - 20e-4 - 20 * 1e-4 * 0.05, rel=1e-5)
    assert model.weight.grad is None and model.weight.item() == torch.tensor(0.9979).bfloat16().item() < 1


def test_peak_bytes_of_a_known_graph() -> None:
    """x [5, 3] -> linear [4] -> exp -> square: the linear's result is freed once exp has its own. At the peak, the
    backward pass, exp's result lives with gradients of its own size."""
    model, x = nn.Linear(3, 4), torch.ones(5, 3)
    forward = lambda: model(x).exp()  # noqa: E731
    assert kept_bytes(forward, CPU) == 4 * 20
    assert peak_bytes(forward, CPU) == 4 * 2 * 20
    with torch.no_grad():
        assert kept_bytes(forward, CPU) == 0
    assert peak_bytes(lambda: x.t().view(3, 5)[1:], CPU) == 0, "views of what was there before need no memory"


def test_gradients_that_exist_do_not_count() -> None:
    model = nn.Linear(300, 400)
    forward = lambda: (model(torch.ones(1, 300)).sum(), torch.ones(1))  # noqa: E731
    contender = benchmark.Contender("known", model, forward, benchmark.adamw(model))
    peak = benchmark.activation_bytes(contender, CPU)
    gradient = 4 * 300 * 400
    assert gradient <= peak < 1.1 * gradient, "the new gradient lives until it is added to the old one"
    assert model.weight.grad is None


def test_matrix_products_of_a_known_step() -> None:
    """A linear layer without input gradient: one product forward, one backward. Attention of N = 5, d = 4 in 2 heads:
    two products forward, four backward."""
    model, x = nn.Linear(3, 4), torch.ones(5, 3)
    with MatrixProducts() as products:
        model(x).sum().backward()
    assert len(products.calls) == 2 and products.flops() == 2 * (2 * 5 * 3 * 4)
    q = torch.ones(1, 2, 5, 4, requires_grad=True)
    with MatrixProducts() as products:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert len(products.calls) == 6 and products.flops() == 6 * (2 * 2 * 5 * 5 * 4)
    with MatrixProducts() as again:
        products.alone(CPU)()
    assert sorted(again.calls) == sorted(products.calls)


# ------------------------------------------------------------------------------------------------------- other parts


SMALL = {
    "attention": ["--samples", 2, "--patches", 4, "--text_length", 3, "--heads", 2],
    "kernels": ["--tokens", 8, "--ffn_width", 16, "--masked", 4, "--classes", 20],
}


@pytest.mark.parametrize("command", SMALL)
def test_operations(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run(command, *SMALL[command], "--repeats", 2, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2 or torch.cuda.is_available()  # then others are compared too
    for row in rows:
        assert row["ratio"] == row["plain"]["median_s"] / row["ours"]["median_s"]
        assert row["kept_ratio"] == pytest.approx(row["ours"]["kept_mb"] / row["plain"]["kept_mb"])
    assert run(command, *SMALL[command], "--repeats", 2) == 0
    assert rows[0]["name"] in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_contenders_of_a_gpu(precision: str) -> None:
    """In Triton's interpreter, where there is none."""
    options = benchmark.parse(["kernels", *map(str, SMALL["kernels"]), "--width", "12", "--precision", precision])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = kernels.kernel_pairs(options, device)
    of_triton = {name for name, o in operations().items() if any(v.name == "triton" for v in o.versions)}
    assert {pair.name.split(",")[0] for pair in pairs} >= {f"{name} triton" for name in of_triton}
    for pair in pairs:
        kernels.assert_equal(pair, pair.case.leaves(device, kernels.DTYPES[precision]))


def test_without_a_gpu_it_says_what_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = benchmark.parse(["kernels", *map(str, SMALL["kernels"])])
    assert len(kernels.kernel_pairs(options, CPU)) == 2
    assert (
        "benchmark.py: without a CUDA device, left out: adamw triton, column_sums triton, " in capsys.readouterr().err
    )


def test_operations_are_not_timed_unless_equal() -> None:
    case = Case([(3,)], lambda compute, x: [compute(x)])
    pair = kernels.Pair("this", case, lambda x: x * 1.001, lambda x: x * 1)
    with pytest.raises(AssertionError, match="this differs from its definition by 1.0e-03"):
        kernels.assert_equal(pair, case.leaves(CPU, torch.float32))


def test_growth(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(growth, "SERIES", {"layers": (1, 2)})
    monkeypatch.setattr(growth, "BASE", {"layers": 1, "width": 64, "batch": 1, "text_length": 9})
    assert run("growth", "--axes", "layers", "--repeats", 1, "--json") == 0
    series = json.loads(capsys.readouterr().out)["series"]["layers"]
    assert [point["layers"] for point in series["points"]] == [1, 2]
    assert series["points"][0]["flops"] < series["points"][1]["flops"]
    assert all(0 < point["products_cpu_s"] and 0 < point["optimizer_cpu_s"] for point in series["points"])
    assert run("growth", "--axes", "layers", "--repeats", 1) == 0
    assert "time = c * FLOPs^" in capsys.readouterr().out


def test_a_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that do not fit end a kind of kernels, and so do kernels that cannot run."""
    arguments = ["recipe", "--samples", 1, 2, 3, "--kernels", "torch", "triton", "--precision", "bf16", "--repeats", 1]
    real = recipe.random_micro_batch

    def full(config: ModelConfig, samples: int, *rest: object):
        if samples == 3:
            raise torch.OutOfMemoryError
        return real(config, samples, *rest)

    def broken(step: object, kernels: str, precision: str) -> None:
        if kernels == "triton":
            raise RuntimeError("no such\ndevice")

    monkeypatch.setattr(recipe, "random_micro_batch", full)
    monkeypatch.setattr(recipe, "switch", broken)
    assert run(*arguments, "--json") == 0
    printed = capsys.readouterr()
    one, two, three, triton = json.loads(printed.out)["rows"]
    assert (one["samples"], two["samples"], three["left_out"]) == (1, 2, "it does not fit")
    assert triton == {"kernels": "triton", "samples": 1, "left_out": "no such device"}
    assert one["tokens"] < two["tokens"] and one["mfu"] is one["memory_gb"] is None
    assert two["model_tflops"] * two["step_s"] > one["model_tflops"] * one["step_s"] > 0
    assert printed.err.count("\n") == 4, "each row is there as soon as it is measured"
    assert run(*arguments, "--profile") == 0
    table = capsys.readouterr().out
    assert table.count("left out") == 2 and "of products" in table


def test_kernels_of_a_recipe_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(layers=1, width=16, heads=2, ffn_width=24, patch_size=8, image_size=16, vl_expert_layers=0)
    batch = recipe.micro_batch(config, {"caption_length": 9, "text_length": 9}, 1)
    step = benchmark.OurStep(benchmark.BEiT3(config), batch, CPU)

    def worse(model: benchmark.BEiT3, kernels: str) -> None:
        with torch.no_grad():
            model.text_head.bias[::2] += 3.0

    monkeypatch.setattr(sys.modules["beit3_dist.tools.benchmarks.step"], "use_kernels", worse)
    with pytest.raises(AssertionError, match="the losses of torch differ"):
        benchmark.switch(step, "compiled", "bf16")


def test_exponents() -> None:
    flops = [1e9, 3e9, 1e10]
    assert growth.exponent(flops, [5 * x for x in flops]) == pytest.approx(1)
    assert growth.exponent(flops, [x**0.5 for x in flops]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", 0], "--repeats 0 is less than 1"),
        (["--pairs", 0], "--pairs 0 is less than 1"),
        (["--text_length", 2], "--text_length"),
        (["--caption_lengths", 9, 5], "--caption_lengths"),
        (["--heads", 5], "model.width=768 is not divisible by model.heads=5"),
        (["recipe", "--recipe", "none.yaml"], "the recipe none.yaml cannot be read: No such file"),
        (["recipe", "--samples", 2, 0], "--samples 0 is less than 1"),
    ],
)
def test_mistakes(arguments: list[object], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*([] if arguments[0] == "recipe" else ["model"]), *arguments) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


def test_torchscale_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(config: ModelConfig) -> nn.Module:
        raise ModuleNotFoundError("No module named 'torchscale'")

    monkeypatch.setattr(sys.modules["beit3_dist.tools.benchmarks.torchscale"], "torchscale_beit3", missing)
    assert run("model", *TINY) == 2
    assert "torchscale cannot be imported" in capsys.readouterr().err
