"""What we rely on inside DeepSpeed and is not its documented interface: an upgrade fails here, and says where."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from dataclasses import fields
from functools import cache
from types import ModuleType
from typing import Any

import deepspeed
import pytest

OURS = "beit3_dist/parallel"


def broken(file: str, what: str) -> str:
    """The message of a failed guard."""
    return (
        f"deepspeed was upgraded (now {deepspeed.__version__}, written for 0.19.8) and {what}: "
        f"{OURS}/{file} relies on it; read the new code and adapt that file before training with it"
    )


def module(name: str) -> ModuleType:
    # By its name: the attribute deepspeed.comm.torch, for one, is torch itself.
    return importlib.import_module(f"deepspeed.{name}")


@cache
def tree_of(source: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(source)))


def assigned(owner: type) -> set[str]:
    """Names x of all `self.x = ...` and `self.x: T = ...` in a class."""
    names = set()
    for node in ast.walk(tree_of(owner)):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(t).removeprefix("self.") for t in targets if ast.unparse(t).startswith("self.")}
    return names


def arguments(owner: Any, name: str) -> list[str] | None:
    """A function's arguments as written; None where there is no such function. DeepSpeed's decorators hide them from
    inspect.signature."""
    for place in getattr(owner, "__mro__", (owner,))[:-1] or (owner,):
        for node in ast.walk(tree_of(place)):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    return None


def called(source: Any) -> set[str]:
    """Names that a class or function calls as plain, module-global names."""
    return {n.func.id for n in ast.walk(tree_of(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


ENGINE = module("runtime.engine").DeepSpeedEngine
STAGE_1_2 = module("runtime.zero.stage_1_and_2").DeepSpeedZeroOptimizer
STAGE_3 = module("runtime.zero.stage3").DeepSpeedZeroOptimizer_Stage3
COORDINATOR = module("runtime.zero.partitioned_param_coordinator").PartitionedParameterCoordinator
BF16 = module("runtime.bf16_optimizer").BF16_Optimizer


@pytest.mark.parametrize(
    ("file", "optimizer", "name"),
    [
        ("fragments.py", STAGE_3, "grad_position"),
        ("fragments.py", STAGE_3, "fp32_partitioned_groups_flat"),
        ("fragments.py", STAGE_3, "persistent_parameters"),
        ("pipeline.py", STAGE_3, "grad_partitions_flat_buffer"),
        ("pipeline.py", STAGE_3, "parameter_offload"),
        ("fragments.py", STAGE_1_2, "single_partition_of_fp32_groups"),
        ("fragments.py", BF16, "fp32_groups_flat_partition"),
        ("flat_step.py", BF16, "bf16_groups"),
        ("flat_step.py", BF16, "fp32_groups_gradients"),
        ("flat_step.py", BF16, "fp32_groups_gradients_flat"),
        ("flat_step.py", BF16, "fp32_groups_gradient_flat_partition"),
        ("flat_step.py", BF16, "fp32_groups_has_gradients"),
        ("flat_step.py", BF16, "param_names"),
        ("flat_step.py", STAGE_1_2, "reduction_stream"),
        ("flat_step.py", STAGE_1_2, "param_names"),
        ("flat_step.py", STAGE_1_2, "bit16_groups"),
        ("flat_step.py", STAGE_3, "grad_partitions_flat_buffer"),
        ("flat_step.py", STAGE_3, "averaged_gradients"),
        ("fragments.py", STAGE_1_2, "optimizer"),
        ("fragments.py", STAGE_3, "optimizer"),
        ("fragments.py", BF16, "optimizer"),
    ],
)
def test_attributes_of_the_optimizers(file: str, optimizer: type, name: str) -> None:
    assert name in assigned(optimizer), broken(file, f"{optimizer.__name__} no longer sets .{name}")


@pytest.mark.parametrize(
    ("file", "owner", "name", "parameters"),
    [
        ("fragments.py", STAGE_3, "get_param_id", ["self", "param"]),
        ("pipeline.py", STAGE_3, "clear_backward_seen_flag", ["self"]),
        ("pipeline.py", COORDINATOR, "reset_step", ["self"]),
        ("pipeline.py", STAGE_1_2, "clear_backward_seen_flag", ["self"]),
        ("engine.py", ENGINE, "set_gradient_accumulation_boundary", ["self", "is_boundary"]),
        ("engine.py", ENGINE, "backward", ["self", "loss", "retain_graph", "scale_wrt_gas"]),
        ("engine.py", ENGINE, "get_global_grad_norm", ["self"]),
        ("flat_step.py", ENGINE, "allreduce_bucket", ["self", "bucket", "dp_group", "dp_world_size"]),
        ("flat_step.py", ENGINE, "zero_overlap_comm", ["self"]),
        ("reduction.py", ENGINE, "buffered_allreduce_fallback", ["self", "grads", "elements_per_buffer"]),
        ("reduction.py", ENGINE, "_reduce_non_expert_gradients", ["self", "grads", "elements_per_buffer"]),
        ("flat_step.py", ENGINE, "zero_reduce_bucket_size", ["self"]),
        ("mesh.py", module("comm.torch"), "build_shm_op", []),
        ("pipeline.py", module("runtime.zero.utils"), "assert_ints_same_as_other_ranks", ["ints"]),
    ],
)
def test_signatures(file: str, owner: Any, name: str, parameters: list[str]) -> None:
    label = f"{owner.__name__}.{name}"
    assert hasattr(owner, name), broken(file, f"{label} is gone")
    now = arguments(owner, name)
    assert now == parameters, broken(file, f"{label} takes {now} instead of {parameters}")


def test_shared_memory_is_built_by_the_name_that_we_replace() -> None:
    comm = module("comm.torch")
    assert "build_shm_op" in called(comm.TorchBackend), broken("mesh.py", "TorchBackend does not call build_shm_op")
    # Without the operator gloo must take over.
    assert "if self.shm_comm_op != None" in inspect.getsource(comm.TorchBackend), broken(
        "mesh.py", "TorchBackend insists on shm_comm_op"
    )


def test_order_of_modules_is_compared_by_the_name_that_we_replace() -> None:
    """Another name, or an import inside a function, would compare over the world again and hang the pipeline."""
    coordinator = module("runtime.zero.partitioned_param_coordinator")
    name = "assert_ints_same_as_other_ranks"
    assert hasattr(coordinator, name) and name in called(coordinator.PartitionedParameterCoordinator), broken(
        "pipeline.py", f"PartitionedParameterCoordinator does not call the module's {name}"
    )
    inner = [n for f in ast.walk(tree_of(coordinator)) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
    local = [a.name for n in inner if isinstance(n, ast.ImportFrom) for a in n.names]
    assert name not in local, broken("pipeline.py", f"{name} is imported inside a function")


def test_zero_init_takes_our_groups() -> None:
    taken = set(inspect.signature(deepspeed.zero.Init.__init__).parameters)
    missing = {"module", "config_dict_or_path", "dtype", "data_parallel_group", "mpu"} - taken
    assert not missing, broken("engine.py", f"zero.Init takes no {sorted(missing)}")


def test_linear_that_keeps_no_gathered_weights() -> None:
    """By name and signature; tests/parallel/test_frozen_networks.py shows that it keeps none."""
    taken = list(inspect.signature(module("runtime.zero.linear").zero3_linear_wrap).parameters)
    assert taken == ["input", "weight", "bias"], broken("engine.py", f"zero3_linear_wrap takes {taken}")


def test_sharded_parameters_know_their_pieces() -> None:
    init = module("runtime.zero.partition_parameters")
    source = inspect.getsource(init)
    for name in ("ds_id", "ds_tensor", "ds_numel", "ds_shape", "ds_process_group", "partition", "all_gather"):
        assert f"param.{name} = " in source, broken("fragments.py", f"zero.Init no longer sets .{name} of parameters")


def test_grad_position_is_group_offset_length() -> None:
    source = "".join(inspect.getsource(STAGE_3.set_grad_positions).split())
    assert "self.grad_position[param_id]=[int(i),int(current_offset),int(num_elements)]" in source, broken(
        "fragments.py", "grad_position no longer holds [group, offset, length]"
    )


def test_fragment_mapping() -> None:
    utils = module("utils.tensor_fragment")
    names = {f.name for f in fields(utils.tensor_fragment)}
    missing = {"param_group_index", "lp_fragment_address", "hp_fragment_address"} - names
    assert not missing, broken("fragments.py", f"_hp_mapping has no {sorted(missing)}")
    assert {"start", "numel"} <= {f.name for f in fields(utils.fragment_address)}, broken(
        "fragments.py", "the addresses of _hp_mapping have no start and numel"
    )
    for optimizer in (STAGE_1_2, BF16):
        assert "link_hp_params" in called(optimizer), broken("fragments.py", f"{optimizer.__name__} links no fragments")
    assert "_hp_mapping" in inspect.getsource(module("utils.mixed_precision_linkage")), broken(
        "fragments.py", "parameters have no _hp_mapping"
    )


@pytest.mark.parametrize("optimizer", [STAGE_1_2, STAGE_3, BF16], ids=lambda optimizer: optimizer.__name__)
def test_norm_reads_our_mark(optimizer: type) -> None:
    """`mark_model_parallel` decides which parameters count; by behaviour, for the function, and by use."""

    class Parameter:
        model_parallel = True

    assert module("runtime.utils").is_model_parallel_parameter(Parameter()), broken(
        "tensor.py", "is_model_parallel_parameter does not read .model_parallel"
    )
    assert "is_model_parallel_parameter" in called(optimizer), broken(
        "tensor.py", f"the norm of {optimizer.__name__} does not ask is_model_parallel_parameter"
    )


def test_bf16_with_fp32_sums_at_stage_1_has_an_optimizer_of_its_own() -> None:
    """Its masters have another name (fragments.py), and it shards no gradients (memory.py)."""
    source = "".join(inspect.getsource(ENGINE._do_optimizer_sanity_check).split())
    condition = "model_dtype==torch.bfloat16andgrad_accum_dtype==torch.float32andself.zero_optimization_stage()==1"
    assert condition in source and "_configure_bf16_optimizer" in inspect.getsource(ENGINE), broken(
        "memory.py", "another optimizer serves ZeRO-1 in bf16 with fp32 sums"
    )


def test_engine_leaves_the_reduction_to_an_optimizer_that_has_one() -> None:
    source = "".join(inspect.getsource(ENGINE).split())
    assert "hasattr(self.optimizer,'reduce_gradients')" in source, broken(
        "flat_step.py", "the engine does not look for the optimizer's reduce_gradients"
    )


def test_guard_notices_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(STAGE_3, "get_param_id")
    with pytest.raises(
        AssertionError, match=r"deepspeed was upgraded .*get_param_id is gone: .*parallel/fragments\.py"
    ):
        test_signatures("fragments.py", STAGE_3, "get_param_id", ["self", "param"])
