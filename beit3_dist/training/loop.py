"""Pretraining, from top to bottom."""

from __future__ import annotations

import logging
import time
from itertools import islice
from pathlib import Path

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import loader, requests_from
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Mesh, connect
from beit3_dist.training.checkpointing import load_checkpoint, save_checkpoint
from beit3_dist.training.evaluation import evaluate
from beit3_dist.training.feed import Feed
from beit3_dist.training.image_codes import targets_of
from beit3_dist.training.image_targets import ImageTargets, target_flops
from beit3_dist.training.inputs import prepare
from beit3_dist.training.metrics import step_record
from beit3_dist.training.optimizer import build_optimizer
from beit3_dist.training.preflight import Ready
from beit3_dist.training.resilience import check_bad_samples
from beit3_dist.training.run_folder import RunFolder
from beit3_dist.training.schedule import learning_rate

log = logging.getLogger(__name__)


def pretrain(config: RunConfig, mesh: Mesh, ready: Ready) -> None:
    """Trains from `ready.state` to `config.steps`. `ready`: what was checked and opened before any process group."""
    groups = connect(mesh)
    run = RunFolder(Path(config.out), config, mesh, ready.state.step)
    engine = Engine(
        config,
        groups,
        ready.values,
        objective=lambda model: MaskedDataModeling(model, config.objective, config.seed),
        optimizer=lambda model, offload: build_optimizer(model, offload, config.optim, mesh.device),
        target_flops=target_flops(ready.image_tokenizer, sum(config.micro_batch(mesh.data)[::2])),
    )
    state = ready.state
    if mesh.is_first and state.step == 0:
        run.quarantine(0, ready.train.faults())  # what the shards' indexes had to leave out
    if ready.checkpoint is not None:
        load_checkpoint(ready.checkpoint, engine, state)
        log.info("going on after step %d from %s", state.step, ready.checkpoint)
    tokenize = ImageTargets(ready.image_tokenizer, mesh.device) if mesh.is_last_stage else None
    feed = Feed(config, groups)
    requests, data, pin = requests_from(state.consumed, config.batch), config.data, mesh.device.type == "cuda"
    batches = iter(loader(ready.train, requests, data.workers, data.prefetch, pin) if feed.reads else ())

    for step in range(state.step, config.steps):
        started = time.perf_counter()
        batch = feed.step(lambda: list(islice(batches, config.batch.accumulation)))
        data_wait = time.perf_counter() - started
        lr = learning_rate(step, config.steps, config.optim)
        prepared = (prepare(b, mesh.device, targets_of(b, ready.train_codes, tokenize)) for b in batch.micro_batches)
        result = engine.train_step(prepared, batch.totals[:4], step, lr)

        totals = batch.totals.tolist()
        state.advance(config.batch, replaced=totals[6])
        if mesh.tensor_rank == mesh.pipeline_rank == 0:  # others have read the same
            run.quarantine(state.step, [fault for b in batch.micro_batches for fault in b.faults])
        run.step(step_record(config, mesh, state.step, lr, totals, result, data_wait, time.perf_counter() - started))
        if ready.held_out is not None and state.step % config.eval.every == 0:
            losses = evaluate(config, engine, feed, ready.held_out, ready.held_out_codes, tokenize)
            run.evaluation({"step": state.step} | losses)
        if state.step % config.checkpoint.every == 0 or state.step == config.steps:
            save_checkpoint(config, engine, state)
        check_bad_samples(config, state)
    run.close()
