"""DeepSpeed's optimizers without their loops over parameters do what they did, bit for bit, in fewer operations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_dist.config import RunConfig
from beit3_dist.kernels.adamw.definition import plain_adamw
from beit3_dist.model import BEiT3
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel import engine as engine_module
from beit3_dist.parallel import flat_step
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from beit3_dist.train.optimizer import pretraining_optimizer
from beit3_dist.train.totals import host_totals
from tests.micro_batches import precomputed_codes
from tests.parallel import training
from tests.parallel.training import SMALL_PIECES, build, engine_run, micro_batches, run_config, starting_value
from tests.parallel.workers import run_workers

STEPS = 3


def deepspeed_file(folder: Path, **zero: Any) -> str:
    """A DeepSpeed file with several reduce buckets a step, some of one parameter that is larger than a bucket."""
    pieces = json.loads(SMALL_PIECES.read_text())["zero_optimization"] | {"reduce_bucket_size": 4000}
    file = folder / "ds.json"
    file.write_text(json.dumps({"zero_optimization": pieces | zero}))
    return str(file)


@contextmanager
def deepspeeds_own_optimizer() -> Iterator[None]:
    """Inside, engines keep DeepSpeed's optimizer as it is."""
    engine_module.flatten_step = lambda engine, adamw: None
    try:
        yield
    finally:
        engine_module.flatten_step = flat_step.flatten_step


def flat_and_not(groups: Groups, configs: list[RunConfig]) -> None:
    """Runs with and without the module under test; they must be equal bit for bit."""
    for config in configs:
        flat = engine_run(groups, config)
        with deepspeeds_own_optimizer():
            theirs = engine_run(groups, config)
        what = f"{config.parallel}, {config.precision}, accumulation {config.batch.accumulation}"
        assert flat["losses"] == theirs["losses"], what
        assert flat["grad_norms"] == theirs["grad_norms"], what
        assert max(flat["grad_norms"]) > config.optim.clip_norm > min(flat["grad_norms"]), flat["grad_norms"]
        for name, (start, values) in theirs["weights"].items():
            assert flat["weights"][name][0] == start and np.array_equal(flat["weights"][name][1], values), (what, name)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_same_bits(zero_stage: int, precision: str, tmp_path: Path) -> None:
    configs = []
    for accumulation, overlap in ((1, True), (2, False), *([(2, True)] if precision == "bf16" else [])):
        config = run_config(
            "shallow",
            zero_stage=zero_stage,
            precision=precision,
            accumulation=accumulation,
            data_parallel=2,
            steps=STEPS,
            clip_norm=1.55,
        )
        folder = tmp_path / f"{accumulation}{overlap}"
        folder.mkdir()
        file = deepspeed_file(folder, overlap_comm=overlap, contiguous_gradients=zero_stage < 3 or not overlap)
        configs.append(replace(config, deepspeed_config=file))
    run_workers(2, flat_and_not, configs)


@pytest.mark.slow
def test_same_bits_in_a_pipeline_of_tensor_ranks(tmp_path: Path) -> None:
    """Which parameters count in the norm differs by rank here. There is one replica, so sums are sent in fp32: what
    DeepSpeed would round for nobody is the deviation that the module names."""
    config = run_config(
        "paper", zero_stage=1, precision="bf16", accumulation=2, data_parallel=1, tensor=2, pipeline=2, steps=STEPS,
        clip_norm=2.3,
    )  # fmt: skip
    file = Path(deepspeed_file(tmp_path))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"communication_data_type": "fp32"}))
    run_workers(4, flat_and_not, [replace(config, deepspeed_config=str(file))], tensor=2, pipeline=2)


@pytest.mark.slow
def test_same_bits_where_no_backward_pass_reaches_all_parameters(tmp_path: Path) -> None:
    """An interleaved pipeline: each backward pass is one chunk's, and overlaps with the reduction of two replicas."""
    config = run_config(
        "paper", zero_stage=1, precision="bf16", accumulation=4, data_parallel=2, pipeline=2, chunks=2, steps=STEPS,
        clip_norm=2.1,
    )  # fmt: skip
    config = replace(config, deepspeed_config=deepspeed_file(tmp_path, overlap_comm=True))
    run_workers(4, flat_and_not, [config], pipeline=2)


def distance(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Relative, of all together."""
    far = np.linalg.norm([np.linalg.norm(a - b) for a, b in zip(ours, theirs, strict=True)])
    return float(far / np.linalg.norm([np.linalg.norm(b) for b in theirs]))


def with_another_adamw(groups: Groups, configs: list[RunConfig]) -> list[list[str]]:
    """Of each run the types of the gradients that the operation took; it must be torch's but for rounding. In plain
    torch: Triton's interpreter cuts bits off where it stores bf16, and the contract of kernels tests its kernel."""
    taken: list[list[str]] = []

    def noted(flat: Any, gradients: Any, sizes: Any, update: Any) -> None:
        taken[-1].append(str(next(g.dtype for g in gradients if g is not None)))
        plain_adamw(flat, gradients, sizes, update)

    for config in configs:
        theirs = engine_run(groups, config)
        taken.append([])
        engine_module.flatten_step = lambda engine, _: flat_step.flatten_step(engine, noted)
        try:
            ours = engine_run(groups, config)
        finally:
            engine_module.flatten_step = flat_step.flatten_step
        assert ours["losses"][0] == theirs["losses"][0] and ours["grad_norms"][0] == theirs["grad_norms"][0]
        assert ours["grad_norms"][0] > config.optim.clip_norm
        names = [*theirs["weights"]]
        moments = ([run["first_moments"][name][1] for name in names] for run in (ours, theirs))
        assert distance(*moments) < 1e-6
        # The last steps start from weights that bf16 may round otherwise where the masters' last bits differ.
        updates = ([run["weights"][n][1] - run["initial"][n][1] for n in names] for run in (ours, theirs))
        assert distance(*updates) < 1e-3
    return taken


def test_an_adamw_that_clips_and_writes_the_working_parameters(tmp_path: Path) -> None:
    """It reads bf16 gradients where they lie if there is nothing to sum up."""
    small = partial(run_config, "shallow", zero_stage=1, precision="bf16", clip_norm=1.0, steps=STEPS)
    for ranks, accumulations in ((1, (1, 2)), (2, (1,))):
        configs = [
            replace(small(accumulation=a, data_parallel=ranks), deepspeed_config=deepspeed_file(tmp_path))
            for a in accumulations
        ]
        groups = 2
        expected = ["torch.bfloat16" if ranks == 1 and a == 1 else "torch.float32" for a in accumulations]
        for taken in run_workers(ranks, with_another_adamw, configs):
            assert taken == [[one] * groups * STEPS for one in expected]


def with_states_on_the_host(groups: Groups, config: RunConfig) -> None:
    """`flat_and_not` with torch's AdamW: DeepSpeed's own for the CPU would be compiled first."""
    training.pretraining_optimizer = lambda model, offload, config: pretraining_optimizer(model, False, config)
    flat_and_not(groups, [config])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_same_bits_with_states_on_the_host(zero_stage: int, tmp_path: Path) -> None:
    config = run_config(
        "shallow", zero_stage=zero_stage, precision="bf16", accumulation=2, data_parallel=2, steps=STEPS, clip_norm=1.55
    )
    file = Path(deepspeed_file(tmp_path, offload_optimizer={"device": "cpu"}))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"zero_force_ds_cpu_optimizer": False}))
    run_workers(2, with_states_on_the_host, replace(config, deepspeed_config=str(file)))


class Operations(TorchDispatchMode):
    """Counts operations that compute something: no views, no memory without values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and function is not torch.ops.aten.empty.memory_format:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations_of_a_step(groups: Groups, config: RunConfig) -> Counter[str]:
    """Operations of a rank's second step between the end of its backward passes and the end of the step."""
    engine = Engine(
        config,
        groups,
        lambda: BEiT3(config.model, device="meta"),
        lambda name, shape: starting_value(name, shape, config),
        objective=lambda model: PretrainingModule(model, objectives_of(config), config.seed),
        optimizer=lambda model, offload: build(model, offload, config, sgd=False),
    )
    operations = Operations()
    for name in ("_backward_epilogue", "step"):
        inner = getattr(engine.deepspeed, name)

        def counted(*arguments: Any, inner: Any = inner, **keywords: Any) -> Any:
            with operations:
                return inner(*arguments, **keywords)

        setattr(engine.deepspeed, name, counted)
    for step in range(2):
        operations.counts.clear()
        batches = micro_batches(config.model, step, config.batch.accumulation, range(config.batch.accumulation))
        counts = torch.tensor(host_totals(batches, objectives_of(config)).counts)
        prepared = (
            objectives_of(config).prepare(batch, groups.mesh.device, precomputed_codes(config.model))
            for batch in batches
        )
        engine.train_step(prepared, counts, step, 1e-3)
    return operations.counts


def operations_by_layers(groups: Groups, config: RunConfig) -> list[tuple[int, int]]:
    """(operations by our module, by DeepSpeed) for a model of 2 and for one of 5 layers."""
    results = []
    for layers in (2, 5):
        deeper = replace(config, model=replace(config.model, layers=layers))
        ours = operations_of_a_step(groups, deeper)
        with deepspeeds_own_optimizer():
            theirs = operations_of_a_step(groups, deeper)
        results.append((ours.total(), theirs.total()))
    return results


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_operations_do_not_grow_with_the_number_of_parameters(zero_stage: int, tmp_path: Path) -> None:
    config = run_config("shallow", zero_stage=zero_stage, precision="bf16", accumulation=2, data_parallel=1)
    file = deepspeed_file(tmp_path, reduce_bucket_size=10**7)  # one bucket: their number grows with the elements
    config = replace(config, deepspeed_config=file)
    [[(ours, theirs), (ours_deeper, theirs_deeper)]] = run_workers(1, operations_by_layers, config)
    assert ours == ours_deeper, f"{ours} operations with 2 layers, {ours_deeper} with 5"
    assert theirs_deeper > theirs + 100, "DeepSpeed's own do not grow any more: is this module still needed?"
    assert ours_deeper < theirs_deeper / 10


def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for flat in (flat_step.FlatBF16, flat_step.FlatStage12, flat_step.FlatStage3):
        flat_step.check_written_for(flat)
    monkeypatch.setattr(flat_step.BF16_Optimizer, "update_hp_grads", lambda self, clear: None)
    with pytest.raises(RuntimeError, match=r"BF16_Optimizer.update_hp_grads of deepspeed .* has changed: install"):
        flat_step.check_written_for(flat_step.FlatBF16)
    monkeypatch.delattr(flat_step.DeepSpeedZeroOptimizer_Stage3, "partition_grads")
    with pytest.raises(RuntimeError, match=r"partition_grads of deepspeed .* has changed: install"):
        flat_step.check_written_for(flat_step.FlatStage3)
    monkeypatch.setattr(flat_step.deepspeed, "__version__", "0.20.1")
    with pytest.raises(RuntimeError, match=r"deepspeed 0.20.1 was not tried: install deepspeed 0.19"):
        flat_step.check_written_for(flat_step.FlatStage12)
