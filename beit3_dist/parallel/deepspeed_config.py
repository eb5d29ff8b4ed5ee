"""The DeepSpeed configuration of a run: a JSON file's choices, completed by the run config.

The run config decides the batch, the precision, the ZeRO stage and clipping. The file may say "auto" there, leave it
out, or say the same; anything else is an error, never an override.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError

from beit3_dist.config import TrainingConfig, require
from beit3_dist.opening import blaming, read_json

SHIPPED = Path(__file__).parents[1] / "ds_configs"
"""The DeepSpeed files that come with the program. A recipe names them as they stand in the repository."""

DEFAULT_BUCKET = 100_000_000
"""Elements of the reduce bucket where the file names none and the model is not smaller."""

_RECORDS = "a run writes its records to OUT/metrics.jsonl and OUT/tensorboard: leave it out"
_OURS = {  # DeepSpeed section -> why it is refused
    "optimizer": "the optim section of the run config describes the optimizer",
    "scheduler": "the optim section of the run config describes the schedule",
    "fp16": "use precision=bf16 or precision=fp32",
    "amp": "use precision=bf16 or precision=fp32",
    "torch_autocast": "use precision=bf16 or precision=fp32",
    "activation_checkpointing": "use activation_checkpointing of the run config",
    "checkpoint": "use checkpoint of the run config",
    "tensor_parallel": "use parallel.tensor of the run config",
    "pipeline": "use parallel.pipeline of the run config",
    "compile": "use kernels=compiled of the run config",
    **dict.fromkeys(("wandb", "tensorboard", "csv_monitor", "comet"), _RECORDS),
}

_PASSED_ON = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    bf16 data_types zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    communication_data_type prescale_gradients gradient_predivide_factor disable_allgather disable_python_gc aio
    steps_per_print dump_state log_level wall_clock_breakdown memory_breakdown timers comms_logger flops_profiler
""".split()
"""DeepSpeed's sections that mean something in a run. DeepSpeed itself ignores a name that it does not know."""


def _lookup(settings: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        settings = settings.get(key, "auto") if isinstance(settings, dict) else "auto"
    return settings


def _store(settings: dict[str, Any], path: str, value: Any, file: str) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ValueError(f"deepspeed_config: {file}: section {section!r} must be an object, not {settings!r}")
    settings[leaf] = value


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """The JSON of `deepspeed_config`: of that file, or else of the one of this name that comes with the program. Raises
    ValueError with the file's name."""
    if not path:
        return {}
    file = Path(path)
    if not file.is_file() and file == Path(SHIPPED.name, file.name):
        file = SHIPPED / file.name
    require(file.is_file(), f"deepspeed_config: there is no file {path}")
    with blaming("deepspeed_config", OSError):
        return read_json(file)


def deepspeed_config(config: TrainingConfig, data_parallel: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`. Raises ValueError naming both fields where file and config differ."""
    settings = read_deepspeed_file(config.deepspeed_config)
    for section, remedy in _OURS.items():
        if section in settings:
            raise ValueError(f"deepspeed_config: {config.deepspeed_config} has a section {section!r}; {remedy}")
    for section in settings:
        if section not in _PASSED_ON:
            raise ValueError(
                f"deepspeed_config: {config.deepspeed_config} has a section {section!r}, which means nothing in a run: "
                f"leave it out (there are {', '.join(_PASSED_ON)})"
            )
    micro_batch = sum(config.micro_batch(data_parallel))
    bf16 = config.in_bf16
    accumulate = "fp32" if bf16 else None
    expected = {  # DeepSpeed's name -> (value, the run config's name)
        "train_batch_size": (micro_batch * data_parallel * config.accumulation, "batch"),
        "train_micro_batch_size_per_gpu": (micro_batch, "batch"),
        "gradient_accumulation_steps": (config.accumulation, "batch.accumulation"),
        "gradient_clipping": (config.optim.clip_norm, "optim.clip_norm"),
        "zero_optimization.stage": (config.parallel.zero_stage, "parallel.zero_stage"),
        "bf16.enabled": (bf16, "precision"),
        "data_types.grad_accum_dtype": (accumulate, "precision"),
    }
    if bf16:  # without it ZeRO-2 steps with gradients that are not finite, in bf16 only
        expected["bf16.check_grad_overflow"] = (True, "precision")
        expected["bf16.immediate_grad_update"] = (False, "precision")  # flat_step.py sums gradients up many at a time
    for path, (value, name) in expected.items():
        given = _lookup(settings, path)
        if given not in ("auto", value):
            raise ValueError(
                f"deepspeed_config: {config.deepspeed_config} sets {path}={json.dumps(given)}, but {name} "
                f'of the run config means {json.dumps(value)}: write "auto" in the file or change the run'
            )
        _store(settings, path, value, config.deepspeed_config)
    _keep_torchs_linear(settings["zero_optimization"], config.deepspeed_config)
    _overlap(settings["zero_optimization"], data_parallel)
    _leave_gradients(settings["zero_optimization"], config)
    # The engine accumulates by itself and says which backward is a step's last one (see engine.py), so that DeepSpeed
    # neither counts micro-batches nor divides by their number.
    settings["gradient_accumulation_steps"] = 1
    settings["train_batch_size"] = micro_batch * data_parallel
    settings["steps_per_print"] = 2**31 - 1
    if config.deepspeed_config:
        _check(settings, config.deepspeed_config)
    return settings


def _keep_torchs_linear(zero: dict[str, Any], file: str) -> None:
    """DeepSpeed would replace torch's linear in the whole process, and so what a frozen network computes: near ties the
    image tokenizer would give other codes than at other stages. The layers that ZeRO-3 shards have a product of their
    own (`Engine`)."""
    given = zero.pop("memory_efficient_linear", "auto")
    if given not in ("auto", False):
        raise ValueError(
            f"deepspeed_config: {file} sets zero_optimization.memory_efficient_linear={json.dumps(given)}, which "
            "changes what the image tokenizer computes: leave it out; the sharded layers save that memory without it"
        )
    if zero["stage"] == 3:
        zero["memory_efficient_linear"] = False


def _overlap(zero: dict[str, Any], data_parallel: int) -> None:
    """Gradients are reduced beside the backward pass unless the file says otherwise, as ZeRO-3 has it by itself."""
    if zero["stage"] < 3 and data_parallel > 1:
        zero.setdefault("overlap_comm", True)


def _leave_gradients(zero: dict[str, Any], config: TrainingConfig) -> None:
    """Sequence parallelism adds up gradients of norms at the end of a step (`TokenNorms`), when DeepSpeed has written
    to NVMe what it offloads there."""
    offloaded = zero.get("offload_optimizer")
    require(
        not config.parallel.sequence or not isinstance(offloaded, dict) or offloaded.get("device") != "nvme",
        f"deepspeed_config: {config.deepspeed_config} offloads the optimizer to NVMe, which does not go with "
        'parallel.sequence: use "device": "cpu" in offload_optimizer, or parallel.sequence=false',
    )


def _check(settings: dict[str, Any], file: str) -> None:
    """Raises ValueError where DeepSpeed would not take the settings."""
    # As one process would: the process groups are not there yet.
    alone = settings | {"train_batch_size": settings["train_micro_batch_size_per_gpu"]}
    try:
        DeepSpeedConfig(alone, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: 1))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"deepspeed_config: {file}: DeepSpeed refuses it: {wrong}") from error
    except (DeepSpeedConfigError, ValueError, AssertionError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"deepspeed_config: {file}: DeepSpeed refuses it: {error}") from error
