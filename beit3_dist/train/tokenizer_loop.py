"""Training of the image tokenizer, from top to bottom."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from beit3_dist.checkpoint.read import load
from beit3_dist.data.loader import loader
from beit3_dist.data.order import Stream, mix_arrays
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.image_tokenizer.drawing import mosaic, nearest_patches, sheet
from beit3_dist.image_tokenizer.files import save_vqkd
from beit3_dist.parallel.mesh import Groups, Mesh, connect
from beit3_dist.run.checkpointing import Checkpoints, whole_checkpoint
from beit3_dist.run.endings import Preempted
from beit3_dist.run.folder import RunFolder, of_all
from beit3_dist.run.guards import Guards
from beit3_dist.run.guards.watchdog import patience
from beit3_dist.run.lock import RunLock
from beit3_dist.run.preflight_image_tokenizer import TokenizerReady
from beit3_dist.train.feed import timed
from beit3_dist.train.metrics import peak_memory_gb
from beit3_dist.train.schedule import learning_rate
from beit3_dist.train.target_watch import COLLAPSED
from beit3_dist.train.tokenizer_engine import TokenizerEngine, TokenizerStep

log = logging.getLogger(__name__)

SHOWN = 8
"""Pictures in a row of TensorBoard's sheet."""


def train_tokenizer(config: TokenizerConfig, mesh: Mesh, ready: TokenizerReady) -> None:
    """Trains from `ready.state` to `config.steps` and writes OUT/image_tokenizer.pth at every checkpoint. Raises
    Preempted where it was asked to go and has saved, FolderInUse where another run has OUT."""
    groups = connect(mesh, patience(config.guards.step_timeout_s))
    with RunLock(config, ready.checkpoint):
        _train(config, groups, ready)


def _train(config: TokenizerConfig, groups: Groups, ready: TokenizerReady) -> None:
    mesh = groups.mesh
    checkpoint, state = whole_checkpoint(config, ready.checkpoint, ready.state)
    out = Path(config.out)
    run = RunFolder(out, config, mesh, state.step)
    guards = Guards(config, groups, run, state, config.data.max_bad_fraction)
    engine = TokenizerEngine(config, mesh, ready.teacher)
    if checkpoint is not None:
        engine.create_moments(state.step - state.skipped_steps)
        load(checkpoint, engine.pieces())
        log.info("going on after step %d from %s", state.step, checkpoint)
    elif mesh.is_first:
        run.quarantine(0, ready.train.stream.faults)  # what the shards' indexes had to leave out
    cuda = mesh.device.type == "cuda"
    steps = range(state.step, config.steps)
    batches = iter(loader(ready.train, steps, config.data.workers, config.data.prefetch, pin=cuda))

    pieces = lambda: engine.pieces() if mesh.is_first else ()  # noqa: E731
    with Checkpoints(config, run, mesh, state, checkpoint, pieces) as checkpoints:
        collapsed = False
        for step in steps:
            guards.begin(step + 1)
            started = time.perf_counter()
            batch, waited_s = guards.together(lambda: timed(lambda: next(batches)))
            pictures = batch.pictures.to(mesh.device, non_blocking=True)
            if step == 0:
                engine.start_codebook(pictures)
            lr = learning_rate(step, config.steps, config.optim)
            result = engine.train_step(pictures, step, lr)
            replaced, hash_terms, longest_wait_s = agreed(len(batch.faults), batch.ids, waited_s, mesh)

            state.advance({"images": config.batch}, replaced, result.skipped)
            if replaced:
                run.quarantine(state.step, of_all(batch.faults, None))
            if not collapsed and result.usage and result.usage.perplexity < math.exp(COLLAPSED):
                collapsed = True
                log.warning(
                    "step %d: the codes have collapsed: nearly all patches have one (perplexity %.3f), which teaches "
                    "nothing: lower optim.lr (now %g) or choose another teacher",
                    state.step, result.usage.perplexity, config.optim.lr,
                )  # fmt: skip
            seconds = time.perf_counter() - started
            run.step(
                record(state.step, result)
                | {"lr": lr, "images": config.batch, "samples_per_s": config.batch / seconds}
                | {"data_wait_s": longest_wait_s, "step_s": seconds, "memory_gb": peak_memory_gb(mesh.device)}
                | {"replaced_samples": replaced, "sample_hash": f"{hash_terms % (1 << 64):016x}"}
            )
            guards.check_step(state, [batch], result.loss, checkpoints)
            is_last = state.step == config.steps
            if mesh.is_first and config.pictures_every and (state.step % config.pictures_every == 0 or is_last):
                patches = nearest_patches(engine.tokenizer, [pictures])
                run.image(state.step, "codes", sheet([pictures[:SHOWN], mosaic(result.codes[:SHOWN], patches)]))
            if state.step % config.checkpoint.every == 0 or is_last:
                if mesh.is_first:  # before the checkpoint: once that is whole, a finished run is not started again
                    save_vqkd(engine.tokenizer, out / "image_tokenizer.pth")
                checkpoints.save()
            else:
                checkpoints.check()
            guards.check_samples(state)
    guards.close()
    run.close()
    if state.step < config.steps:
        raise Preempted(f"asked to go: saved after step {state.step} of {config.steps}")


def agreed(replaced: int, ids: torch.Tensor, waited_s: float, mesh: Mesh) -> tuple[int, int, float]:
    """Replaced samples of the step and the terms of its sample hash over all ranks, and the longest wait of any."""
    places = torch.arange(len(ids)) + mesh.rank * len(ids)
    terms = mix_arrays(torch.full_like(ids, Stream.IMAGES).numpy(), places.numpy(), ids.numpy())
    sums = torch.tensor([replaced, int(terms.sum(dtype="uint64").astype("int64"))], device=mesh.device)
    wait = torch.tensor(waited_s, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(sums)
    dist.all_reduce(wait, dist.ReduceOp.MAX)
    return int(sums[0]), int(sums[1]), float(wait)


def record(step: int, result: TokenizerStep) -> dict[str, Any]:
    """What a step came to, for metrics.jsonl. `used_codes`: share of the codebook that the step's patches used."""
    return {
        "step": step,
        "loss": result.loss,
        "loss_reconstruction": result.reconstruction,
        "loss_commitment": result.commitment,
        "used_codes": result.usage.share if result.usage else math.nan,
        "perplexity": result.usage.perplexity if result.usage else math.nan,
        "grad_norm": result.grad_norm,
        "skipped": int(result.skipped),
    }
