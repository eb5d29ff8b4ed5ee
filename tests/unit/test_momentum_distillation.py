"""Momentum distillation: its losses from a plain derivation, a queue by brute force, what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, normalize
from torch.utils.flop_counter import FlopCounterMode

from beit3_dist.data.batch import MicroBatch
from beit3_dist.model.initialization import initial_value, materialize
from beit3_dist.objectives.contrast import Vectors
from beit3_dist.objectives.momentum_distillation import NAME, MomentumDistillationConfig
from beit3_dist.objectives.pair_queue import PIECES, PairQueue
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.soft_targets import mixed_cross_entropy
from beit3_dist.objectives.together import Objectives, PretrainingModule
from beit3_dist.parallel.replicas import ALONE
from beit3_dist.train.totals import host_totals
from tests.micro_batches import CPU, precomputed_codes, random_micro_batch
from tests.unit.test_contrastive import PAIRS, objectives_with
from tests.unit.test_flops import CONFIGS, patch_embedding

ALPHA, QUEUE, LENGTH = 0.3, 6, 12
MODEL = CONFIGS["paper"]


def distilled() -> Objectives:
    run = objectives_with("softmax", dim=LENGTH).run
    momentum = MomentumDistillationConfig(alpha=ALPHA, queue=QUEUE)
    objectives = objectives_of(replace(run, objectives=run.objectives | {NAME: momentum}))
    for objective in objectives:
        objective.use_teachers(None, CPU, None)
    return objectives


def module_of(objectives: Objectives, seed: int) -> PretrainingModule:
    model = objectives.build()
    values = {"logit_scale": torch.tensor([1.5])}
    materialize(
        model,
        lambda n, shape: values.get(n.rpartition(".")[2], initial_value(n, shape, objectives.model, seed) * 3),
        CPU,
    )
    return PretrainingModule(model, objectives, 0)


def batch_of(seed: int, hashes: list[list[int]]) -> MicroBatch:
    batch = random_micro_batch(MODEL, pairs=PAIRS, seed=seed)
    for name in ("pairs", "texts"):  # no padding, which torch would count inside attention
        batch.streams[name].lengths[:] = batch.streams[name].text.shape[1]
    batch.streams["pairs"].annotations["contrastive"] = {"labels": torch.tensor(hashes)}
    return batch


def seen_by(module: PretrainingModule, batch: MicroBatch) -> Any:
    """What the objectives that look back see of a micro-batch."""
    back = module.objectives.back
    assert back is not None
    inputs, reading, ids = back.prepare(batch, CPU, precomputed_codes(MODEL))
    assert reading is not None
    with torch.no_grad():
        return module.eval()(inputs, replace(reading, objectives=back), ids, None, 0)


def test_losses_equal_a_plain_derivation() -> None:
    objectives = distilled()
    student, teacher = module_of(objectives, 0), module_of(objectives, 1)
    before, batch = (
        batch_of(0, [[2, -2], [3, 3], [4, 4], [-(2**60) - 3, 5]]),
        batch_of(1, [[1, 1], [3, 7], [8, 8], [9, 5]]),
    )
    back = objectives.back
    assert back is not None
    back.looked([seen_by(teacher, before)], 0)
    assert not any(value.any() for value in objectives.state().values())  # nothing is kept before the step is over
    objectives.after_step()
    (own,) = back.looked([seen_by(teacher, batch)], 0)
    inputs, reading, ids = objectives.prepare(batch, CPU, precomputed_codes(MODEL))
    assert reading is not None
    reading = objectives.with_looked(reading, own)
    counts = torch.tensor(objectives.counts(batch))
    student.train().with_drop_path = lambda inputs, ids, step: inputs  # type: ignore[method-assign]
    contribution, found = student(inputs, reading, ids, counts, 0)
    sums = dict(zip([loss.name for loss in objectives.losses], found[0].tolist(), strict=True))

    def vectors(module: PretrainingModule, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        model, images = module.model, objectives.prepare(batch, CPU, precomputed_codes(MODEL))[0].images[-PAIRS:]
        head = model.objective_heads["contrastive"]
        firsts = model.encode(images)[:, 0], model.encode(text=batch.streams["pairs"].text)[:, 0]
        return normalize(head.vision_head(firsts[0])), normalize(head.language_head(firsts[1]))

    (v, t), (vm, tm), (vq, tq) = vectors(student, batch), vectors(teacher, batch), vectors(teacher, before)
    every_image, every_text = torch.cat([vm, vq]), torch.cat([tm, tq])
    scale = torch.tensor(1.5).exp()
    total = 0.0
    kept = torch.ones(PAIRS, 2 * PAIRS, dtype=torch.bool)
    kept[1, 5] = kept[3, 7] = False  # an equal image, an equal caption of the step before
    for mine, teachers, candidates in ((v, vm, every_text), (t, tm, every_image)):
        for i in range(PAIRS):
            logits, theirs = (scale * (x[i] @ candidates[kept[i]].T) for x in (mine, teachers))
            shares = ALPHA * theirs.softmax(0)
            shares[i] += 1 - ALPHA
            total += cross_entropy(logits[None], shares[None]).item() / 2
    assert sums["contrastive"] == pytest.approx(total, rel=1e-5)

    drawn = batch.streams["texts"].annotations["masked_data_modeling"]
    true = batch.streams["texts"].text[drawn["text_mask"]]
    ours, theirs = (m.model.text_head.logits(m.model.encode(text=drawn["text"]))[drawn["text_mask"]]
                    for m in (student, teacher))  # fmt: skip
    hard = cross_entropy(ours, true, reduction="sum")
    soft = cross_entropy(ours, theirs.softmax(1), reduction="sum")
    assert sums["text"] == pytest.approx(((1 - ALPHA) * hard + ALPHA * soft).item(), rel=1e-5)
    contribution.backward()
    assert all(p.grad is None for p in teacher.parameters())
    student.eval()
    plain = student(*objectives.prepare(batch, CPU, precomputed_codes(MODEL)), counts, 0)[1]
    names = [loss.name for loss in objectives.losses]
    assert plain[0, names.index("text")].item() == pytest.approx(hard.item(), rel=1e-5)


def test_mixed_cross_entropys_gradient_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit3_dist.objectives.soft_targets.CHUNK", 20)
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 7, 9, generator=draw)
    true, factors = torch.arange(7), torch.rand(7, generator=draw)
    leaf, mine = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    losses = 0.6 * cross_entropy(leaf, true, reduction="none")
    losses = losses + 0.4 * cross_entropy(leaf, theirs.softmax(1), reduction="none")
    (losses * factors).sum().backward()
    found = mixed_cross_entropy(mine * 1, true, theirs, 0.4)
    (found[0] * factors).sum().backward()
    torch.testing.assert_close(found, torch.stack([losses, (ours.argmax(1) == true).float()]))
    torch.testing.assert_close(mine.grad, leaf.grad)


@pytest.mark.parametrize("size", [0, 3, 4, 10])
def test_the_queue_is_the_last_pairs_in_the_order_of_their_places(size: int) -> None:
    draw, queue, everything = torch.Generator().manual_seed(0), PairQueue(size, 5, CPU), []
    for step in range(4):
        images, texts = normalize(torch.randn(2, 4, 5, generator=draw), dim=2)
        labels = torch.randint(-(2**63), 2**63 - 1, (4, 2), generator=draw)
        places = torch.randperm(4, generator=draw)
        parts = [Vectors(images[rows], texts[rows], torch.ones(1), labels=labels[rows]) for rows in places.split(2)]
        taught = queue.teach(parts, places.split(2), ALONE, 0.4)
        assert torch.equal(taught[0].images[:4], images) and torch.equal(taught[1].right, places[2:])
        assert len(taught[0].texts) == 4 + size
        filled = min(size, 4 * step)
        assert (taught[0].out.sum(1) == size - filled).all()  # no hash comes twice
        everything.append((images, texts))
        queue.keep()
        newest = torch.cat([torch.cat(pair, 1) for pair in everything])[-size:] if size else torch.zeros(0, 10)
        kept = queue.rows[size - len(newest) :]
        assert torch.equal(kept[:, :10], newest) and (kept[:, -1] == 1).all()


class Two:
    """Two replicas, of which it is known what each gives away in the calls to come."""

    def __init__(self, given: list[list[Tensor]]) -> None:
        self._given = zip(*given, strict=True)

    def gather_constant(self, mine: Tensor) -> Tensor:
        return torch.cat(next(self._given))


def test_two_replicas_are_taught_as_one_is() -> None:
    """Losses and gradients of their own pairs add up, and their queues are the same."""
    draw = torch.Generator().manual_seed(0)
    teacher, student = normalize(torch.randn(2, 2, 6, 5, generator=draw), dim=3)
    labels, places = torch.arange(12).view(6, 2) // 3, torch.randperm(6, generator=draw)
    halves = [places[:3], places[3:]]

    def sums(queue: PairQueue, replicas: Any, rows: list[Tensor]) -> list[Tensor]:
        parts = [Vectors(teacher[0][r], teacher[1][r], torch.ones(1), labels=labels[r]) for r in rows]
        taught = queue.teach(parts, rows, replicas, 0.4)
        leaves = student.clone().requires_grad_()
        losses = [own.contrast(Vectors(leaves[0][r], leaves[1][r], torch.full((1,), 3.0)), own.alpha)
                  for own, r in zip(taught, rows, strict=True)]  # fmt: skip
        total = torch.cat(losses, 1)[0].sum()
        total.backward()
        queue.keep()
        assert leaves.grad is not None
        return [total.detach(), leaves.grad, queue.rows]

    whole = sums(PairQueue(8, 5, CPU), ALONE, halves)
    given: list[list[Tensor]] = []
    for rows in halves:
        pieces = torch.stack([labels[rows] >> shift & 0xFFFF for shift in PIECES], 2).flatten(1).float()
        given.append([torch.cat([teacher[0][rows], teacher[1][rows], pieces, torch.ones(3, 1)], 1), rows])
    parts = [sums(PairQueue(8, 5, CPU), Two(given), [rows]) for rows in halves]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(parts[0][1] + parts[1][1], whole[1])
    assert torch.equal(parts[0][2], whole[2]) and torch.equal(parts[1][2], whole[2])


def test_flops_equal_torchs_counter() -> None:
    """Of the student: what the average computes is told apart."""
    objectives = distilled()
    module, batch = module_of(objectives, 0), batch_of(0, [[n, n] for n in range(PAIRS)])
    back = objectives.back
    assert back is not None
    (own,) = back.looked([seen_by(module, batch)], 0)
    inputs, reading, ids = objectives.prepare(batch, CPU, precomputed_codes(MODEL))
    assert reading is not None
    counts = torch.tensor(objectives.counts(batch))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.train()(inputs, objectives.with_looked(reading, own), ids, counts, 0)[0].backward()
    embedded_again = 2 * PAIRS * MODEL.patches * 3 * MODEL.patch_size**2 * MODEL.width
    of_the_average = 2 * 2 * PAIRS * (PAIRS + QUEUE) * LENGTH
    uncounted = patch_embedding(MODEL, batch) + embedded_again - of_the_average
    assert host_totals([batch], objectives).flops - counter.get_total_flops() == uncounted
