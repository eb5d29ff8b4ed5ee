"""What computes a run, in words: the log, metrics.jsonl and TensorBoard show it, so that no choice is silent."""

from __future__ import annotations

import deepspeed
import torch

from beit3_dist.config import JobConfig, RunConfig, TrainingConfig
from beit3_dist.parallel.kernels import chosen_attention, chosen_kernels, chosen_versions, sizes_of


def computed_by(config: JobConfig, device: torch.device) -> str:
    """The device, the programs and, of what a config leaves open, what was chosen: "NVIDIA H200, torch 2.11.0+cu130,
    DeepSpeed 0.19.8, bf16, kernels triton, attention varlen"."""
    on_gpu = device.type == "cuda"
    parts = [
        torch.cuda.get_device_name(device) if on_gpu else "CPU",
        f"torch {torch.__version__}",
        f"DeepSpeed {deepspeed.__version__}",
        config.precision,
    ]
    if isinstance(config, TrainingConfig):
        kernels = chosen_kernels(config.kernels)
        dtype = torch.bfloat16 if config.in_bf16 else torch.float32
        head_dim = config.model.width // config.model.heads
        attention = chosen_attention(config.attention_kernel, kernels, dtype, head_dim)
        parts += [f"kernels {kernels}", f"attention {attention}"]
        versions = chosen_versions(kernels, dtype, sizes_of(config.model)).items()
        parts += [f"{operation} {it.name}" for operation, it in versions if it.name not in (kernels, "torch")]
    if isinstance(config, RunConfig) and config.cuda_graphs:
        parts.append("blocks as CUDA graphs")
    return ", ".join(parts)
