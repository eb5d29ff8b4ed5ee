"""Gradient masking: equal to its definition in one process, in every layout, and bit for bit after a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from beit3_dist.checkpoint.read import StoredShards, read_weights
from beit3_dist.command_line import parse
from beit3_dist.config import BatchConfig, CheckpointConfig, GradientMaskingConfig, ParallelConfig, RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.cut import cuts_of
from beit3_dist.model.initialization import materialize
from beit3_dist.objectives import SECTIONS
from beit3_dist.objectives.prefix_language_modeling import PrefixLanguageModelingConfig as PrefixConfig
from beit3_dist.objectives.registry import objectives_by_stream, objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.fragments import fragments, optimizer_state
from beit3_dist.parallel.gradient_masks import TEXT_MASK, is_shared, packed, unpacked
from beit3_dist.parallel.mesh import Groups
from beit3_dist.train.masked_by_stream import MaskedByStream
from beit3_dist.train.passes import passes_by_stream
from beit3_dist.train.schedule import learning_rate
from beit3_dist.train.totals import host_totals
from tests.equality import assert_close, assert_tensors_close
from tests.integration.runs import reproducible, run_config, second_half, train_in_turn
from tests.micro_batches import random_micro_batch
from tests.parallel import training
from tests.parallel.training import MODELS, starting_value, unshard
from tests.parallel.workers import Workers

STEPS, EVERY, SHARE, PER_UPDATE = 4, 1, 0.5, 0.25
SAMPLES = 8
MODEL = replace(MODELS["paper"], layers=3, vl_expert_layers=1)


def config_of(accumulation: int = 1, **parallel: Any) -> RunConfig:
    config = training.run_config("paper", zero_stage=3, accumulation=accumulation, data_parallel=1, steps=STEPS)
    masking = GradientMaskingConfig(every=EVERY, share=SHARE, share_per_update=PER_UPDATE)
    batch = BatchConfig(images=SAMPLES, texts=SAMPLES, pairs=0, accumulation=accumulation)
    layout = ParallelConfig(**({"zero_stage": 3} | parallel))
    return replace(config, model=MODEL, batch=batch, gradient_masking=masking, parallel=layout)


def batches_of(step: int, parts: int, of: range) -> list[Any]:
    count = SAMPLES // parts
    return [random_micro_batch(MODEL, images=count, texts=count, pairs=0, seed=1000 * step + p) for p in of]


def codes_of(batch: Any) -> Any:
    return training.precomputed_codes(MODEL)


def masked_run(groups: Groups, config: RunConfig) -> dict[str, Any]:
    """One rank's run by our engine: losses, norms, first moments after the first step, masks after each."""
    mesh, objectives = groups.mesh, objectives_of(config)
    engine = Engine(
        config, groups, objectives.build, lambda name, shape: starting_value(name, shape, config),
        objective=lambda model: PretrainingModule(model, objectives, config.seed),
        optimizer=lambda model, offload: training.build(model, offload, config, False), passes=2,
    )  # fmt: skip
    teachers = {objective.name: {} for objective in objectives}
    masked = MaskedByStream(config, SimpleNamespace(teachers=teachers, objectives=objectives), engine)  # type: ignore[arg-type]
    record: dict[str, Any] = {"losses": [], "norms": [], "masks": [], "tensor_rank": mesh.tensor_rank}
    parts = mesh.data * config.batch.accumulation
    for step in range(STEPS):
        mine = batches_of(step, parts, range(mesh.data_rank, parts, mesh.data))
        counts = torch.tensor(host_totals(mine, objectives).counts)
        groups.sum_over_data(counts)
        passes = masked.passes(SimpleNamespace(micro_batches=mine), codes_of)  # type: ignore[arg-type]
        result = engine.train_step(passes, counts, step, learning_rate(step, STEPS, config.optim))
        record["losses"].append(result.losses)
        record["norms"].append(result.grad_norm)
        if step == 0:
            held = (f for f in fragments(engine.model, engine.optimizer))
            record["moments"] = {
                f.name: (f.start, optimizer_state(engine.optimizer, f)["exp_avg"].numpy().copy()) for f in held
            }
        masked.after(step + 1)
        names = [name for name, _ in engine.model.named_parameters() if is_shared(name)]
        record["masks"].append({name: masked.masks.mask(name).numpy() for name in names})
    record["bytes"] = sum(part.bits.nbytes for part in masked.masks.parts.values())
    return record


def plainly(config: RunConfig, parts: int) -> dict[str, Any]:
    """The definition: both gradients of all weights, and M by sorting all magnitudes."""
    model = BEiT3(MODEL, device="meta")
    materialize(model, lambda name, shape: starting_value(name, shape, config), "cpu")
    objectives, by_stream = objectives_of(config), objectives_by_stream(config, ("texts", "images"))
    module, optim = PretrainingModule(model, objectives, config.seed).train(), config.optim
    optimizer = training.build(model, False, config, False)
    shared = {name: p for name, p in model.named_parameters() if is_shared(name)}
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in shared.items()}
    record: dict[str, Any] = {"losses": [], "norms": [], "masks": []}
    engine: Any = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cpu"), pipeline_rank=0, is_last_stage=True))
    for step in range(STEPS):
        batches = batches_of(step, parts, range(parts))
        counts, statistics, gradients = torch.tensor(host_totals(batches, objectives).counts), 0, {}
        for stream, own in by_stream.items():
            model.zero_grad()
            passes = passes_by_stream({stream: own}, engine, SimpleNamespace(micro_batches=batches), codes_of, str)  # type: ignore[arg-type]
            for inputs in passes:
                contribution, sums = module(*inputs, counts, step)
                contribution.backward()
                statistics = statistics + sums[0]
            gradients[stream] = {
                n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
            }
        for name, p in model.named_parameters():
            text, image = gradients["texts"][name], gradients["images"][name]
            p.grad = torch.where(masks[name], text, image) if name in masks else text + image
        record["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm).item())
        record["losses"].append(statistics.tolist())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, optim)
        optimizer.step()
        moments = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
        if step == 0:
            record["moments"] = {name: value.clone() for name, value in moments.items()}
        share = min(SHARE, (step + 1) // EVERY * PER_UPDATE)
        flat = torch.cat([moments[name].abs().flatten() for name in masks])
        flat[~torch.cat([m.flatten() for m in masks.values()])] = -1  # what is 0 stays so
        zeroed = torch.zeros_like(flat, dtype=torch.bool)
        zeroed[flat.argsort(stable=True)[: round(share * len(flat))]] = True
        masks = {
            n: ~z.view_as(shared[n])
            for n, z in zip(masks, zeroed.split([m.numel() for m in masks.values()]), strict=True)
        }
        record["masks"].append({name: mask.clone() for name, mask in masks.items()})
    return record


def whole(records: list[dict[str, Any]], part: Any, name: str, shape: torch.Size, cut: int | None) -> torch.Tensor:
    """A parameter's values from all ranks; `part`: (record, name) -> first element and values."""
    ranks = 1 + max(record["tensor_rank"] for record in records)
    slices = []
    for tensor_rank in range(ranks):
        pieces = {}
        for record in (r for r in records if r["tensor_rank"] == tensor_rank):
            if (piece := part(record, name)) is not None:  # a replica may hold nothing of a small one
                pieces[piece[0]] = piece[1]
        flat = torch.from_numpy(np.concatenate([pieces[start] for start in sorted(pieces)]))
        local = [*shape]
        if cut is not None:
            local[cut] //= ranks
        slices.append(flat[: int(np.prod(local))].view(local))
    return unshard(cut, slices, tuple(shape))


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    torch.set_num_threads(1)
    return plainly(config_of(), parts=2)


@pytest.mark.parametrize(
    "layout",
    [{"zero_stage": 0, "data": 2}, {"zero_stage": 1, "data": 2}, {"zero_stage": 3, "data": 2},
     {"zero_stage": 3, "tensor": 2, "sequence": True}],
    ids=["dp2-zero0", "dp2-zero1", "dp2-zero3", "tp2-zero3"],
)  # fmt: skip
def test_every_layout_is_the_definition(layout: dict[str, Any], plain: dict[str, Any]) -> None:
    data = layout.pop("data", 1)
    config = config_of(accumulation=2 // data, **layout)
    with Workers(2, config.parallel.tensor) as workers:
        records = workers.run(masked_run, config)
    shapes, cuts = (
        {n: p.shape for n, p in BEiT3(MODEL, device="meta").named_parameters()},
        cuts_of(BEiT3(MODEL, device="meta")),
    )
    moments = {
        name: whole(records, lambda r, n: r["moments"].get(n), name, shape, cuts.get(name))
        for name, shape in shapes.items()
        if name not in ("language_embedding.words.weight",) and not name.startswith(("text_head", "image_head"))
    }
    assert_tensors_close(moments, {name: plain["moments"][name] for name in moments})
    assert_close(torch.tensor(records[0]["losses"]), torch.tensor(plain["losses"]), "losses")
    assert_close(torch.tensor(records[0]["norms"]), torch.tensor(plain["norms"]), "gradient norms")
    for step, share in enumerate((PER_UPDATE, SHARE, SHARE, SHARE)):
        found = {
            name: whole(records, lambda r, n, s=step: (0, r["masks"][s][n]), name, shapes[name], cuts.get(name))
            for name in plain["masks"][step]
        }
        elements = sum(mask.numel() for mask in found.values())
        assert sum(int((~mask).sum()) for mask in found.values()) == round(share * elements)
        differing = sum(int((mask != plain["masks"][step][name]).sum()) for name, mask in found.items())
        assert differing <= 1e-3 * elements, "more than rounding turns"
    held = [record["bytes"] for record in records]
    matrices, small = (
        sum(shapes[n].numel() for n in plain["masks"][0] if (len(shapes[n]) > 1) is is_matrix) / 8
        for is_matrix in (True, False)
    )
    parameters = len(plain["masks"][0])
    if config.parallel.tensor == 2:  # norms, and biases of what is summed over tensor ranks, lie on both
        assert all(matrices / 2 <= one <= matrices / 2 + small + parameters for one in held)
    elif config.parallel.zero_stage == 3:
        assert all(one <= (matrices + small) / 2 + parameters for one in held)
    elif config.parallel.zero_stage == 0:
        assert held == [matrices + small] * 2
    assert config.parallel.zero_stage == 0 or sum(held) <= matrices + 2 * small + 2 * parameters


@pytest.mark.slow
def test_masks_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    config = run_config(
        tmp_path, steps=4, batch=BatchConfig(images=4, texts=4, pairs=0, accumulation=2),
        parallel=ParallelConfig(zero_stage=3), checkpoint=CheckpointConfig(every=2),
        gradient_masking=GradientMaskingConfig(every=1, share_per_update=0.2),
    )  # fmt: skip
    with Workers(2) as workers:
        workers.run(train_in_turn, [config, second_half(config)])
    assert reproducible(f"{config.out}-resumed") == reproducible(config.out)[2:]
    last = Path("checkpoints", "step_0000004")
    ours, theirs = (StoredShards(Path(out) / last) for out in (config.out, f"{config.out}-resumed"))
    zeros = elements = 0
    for name, value in read_weights(Path(config.out) / last).items():
        assert torch.equal(value, theirs.whole(name, ""))
        assert (TEXT_MASK in ours.suffixes(name)) == is_shared(name)
        if is_shared(name):
            mask = ours.whole(name, TEXT_MASK)
            assert torch.equal(mask, theirs.whole(name, TEXT_MASK)) and mask.unique().tolist() in ([0, 1], [0], [1])
            zeros, elements = zeros + int((mask == 0).sum()), elements + mask.numel()
    assert zeros == round(0.5 * elements)


def test_each_stream_has_the_objectives_that_read_it() -> None:
    """Of ViT-BERT's recipe: one of them would refuse a run of images alone."""
    recipe = ["--config", "launchers/recipes/vit_bert_base.yaml", "--out", "unused", "--text_tokenizer", "unused"]
    recipe += ["--data.images", "unused", "--data.texts", "unused"]
    config = parse(RunConfig, "", "", recipe, SECTIONS)
    losses = {stream: own.losses for stream, own in objectives_by_stream(config, ("texts", "images")).items()}
    assert {stream: [loss.name for loss in some] for stream, some in losses.items()} == {
        "texts": ["text", "distilled_text"], "images": ["image_class", "distilled_image"]
    }  # fmt: skip
    with pytest.raises(ValueError, match="gradient_masking.every=1: no objective reads images"):
        objectives_by_stream(replace(config_of(), objectives={"prefix_language_modeling": PrefixConfig()}), ["images"])


def test_a_bit_for_each_weight() -> None:
    mask = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = packed(mask)
    assert bits.dtype is torch.uint8 and len(bits) == 126 and torch.equal(unpacked(bits, 1003), mask)


def test_what_has_no_two_streams_is_refused() -> None:
    config = config_of()
    for told, change in {
        "give both batch.images and batch.texts, and batch.pairs=0": {"batch": replace(config.batch, pairs=8)},
        "model.attention=shared": {"model": replace(MODEL, attention="per_modality", vl_expert_layers=0)},
        "parallel.pipeline=1": {"parallel": ParallelConfig(pipeline=2, zero_stage=1)},
    }.items():
        with pytest.raises(ValueError, match=f"gradient_masking.every=1.*{told}"):
            replace(config, **change)
