"""One pass over the mixed batch against three plain passes: losses, statistics and every gradient, drop path on."""

from __future__ import annotations

import pytest
import torch

from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.objectives.three_passes import prepare_passes, three_passes
from beit3_dist.objectives.together import PretrainingModule
from tests.equality import assert_close, assert_tensors_close
from tests.micro_batches import (
    counts_of,
    encoded_one_by_one,
    fused_and_alone,
    precomputed_codes,
    prepared,
    pretraining,
    random_micro_batch,
)

SMALL = dict(
    layers=4,
    width=48,
    heads=4,
    ffn_width=96,
    patch_size=8,
    image_size=32,
    vocab_size=120,
    visual_vocab_size=40,
    max_text_length=20,
    drop_path=0.3,
)
PAPER = ModelConfig(**SMALL, attention="shared", sub_layernorm=False, vl_expert_layers=2)
RELEASED = ModelConfig(**SMALL, attention="per_modality", sub_layernorm=True, vl_expert_layers=0)


def objective_and_step(config: ModelConfig):
    objective = pretraining(BEiT3(config, seed=3), 5, pair_text_weight=0.5).train()
    with torch.no_grad():
        for parameter in objective.parameters():  # zero biases and tiny weights would hide mistakes
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.05
            )
    batch = random_micro_batch(config)
    return objective, batch, (*prepared(objective, batch), counts_of(objective, batch), 7)


def gradients(objective: PretrainingModule) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in objective.named_parameters()}


@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
def test_one_pass_equals_three(config: ModelConfig) -> None:
    objective, batch, step = objective_and_step(config)
    loss, statistics = objective(*step)
    loss.backward()
    ours = gradients(objective)
    objective.zero_grad()
    passes = prepare_passes(objective, batch, torch.device("cpu"), precomputed_codes(config))
    reference, reference_statistics = three_passes(passes, *step[-2:])
    reference.backward()
    assert_close(loss, reference, "loss")
    assert_close(statistics[0], reference_statistics[0], "sums of cross-entropies")
    assert torch.equal(statistics[1], reference_statistics[1]) and statistics[0].min() > 0
    assert_tensors_close(ours, gradients(objective))


@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
def test_words_that_belong_to_no_sample_change_nothing(config: ModelConfig) -> None:
    """Captions are filled up to multiples of so many words on CUDA; 64 is more than one of them has. For CUDA graphs
    all words are filled up to those of the longest micro-batch so far. They count in no
    loss and no statistic, and no parameter learns from them."""
    results = []
    for multiple, fullest in ((1, None), (7, None), (64, None), (10, {1: 90, 2: 90})):
        objective, batch, (*_, counts, number) = objective_and_step(config)
        objective.objectives.multiple, objective.objectives.fullest = multiple, fullest
        batch = random_micro_batch(config)  # of the other one the layout is known
        loss, statistics = objective(*prepared(objective, batch), counts, number)
        loss.backward()
        layout = objective.objectives.on_host(batch).layout
        words = layout.segments[2]
        assert fullest is None or layout.segments[2:] == (fullest[1], fullest[2]) == (90, 90)
        assert words % multiple == 0 and layout.tokens == sum(layout.segments) - sum(
            group.words for group in layout.groups if group.filler
        )
        results.append((loss, statistics, gradients(objective), layout.tokens, words))
    (loss, statistics, plain, tokens, words), *filled = results
    assert len({words, *(one[-1] for one in filled)}) == 4
    for of_loss, of_statistics, of_gradients, of_tokens, _ in filled:
        assert of_tokens == tokens
        assert_close(of_loss, loss, "loss")
        assert_close(of_statistics[0], statistics[0], "sums of cross-entropies")
        assert torch.equal(of_statistics[1], statistics[1])
        assert_tensors_close(of_gradients, plain)


@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
def test_a_pair_is_encoded_fused_and_alone(config: ModelConfig) -> None:
    """Its image and its caption by themselves beside the pair: hidden states and gradients are those of one `encode`
    for each kind. They differ where products of other sizes add in another order: the bound of tests/equality.py."""
    model = objective_and_step(config)[0].model
    inputs, kinds = fused_and_alone(config)
    results = []
    for encode in (lambda: model.norm(model.hidden(inputs), inputs.layout), lambda: encoded_one_by_one(model, kinds)):
        hidden_TD = encode()
        hidden_TD.backward(torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(1)))
        results.append((hidden_TD, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (ours, our_gradients), (theirs, their_gradients) = results
    assert_close(ours, theirs, "hidden states")
    assert_tensors_close(our_gradients, their_gradients)


def test_drop_path_is_on_and_depends_on_the_step_and_not_on_the_place_in_the_batch() -> None:
    objective, _, step = objective_and_step(PAPER)
    losses = [objective(*step[:-1], number)[0].item() for number in (7, 7, 8)]
    assert losses[0] == losses[1] != losses[2]
    objective.eval()
    assert objective(*step)[0].item() != losses[0]


def test_vl_expert_takes_both_sides_of_pairs_and_nothing_else() -> None:
    """Changing an expert of the top layer must change exactly the samples that it serves."""
    model = BEiT3(PAPER, seed=3).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = torch.randint(4, 120, (2, 6), generator=torch.Generator().manual_seed(1))
    uses = {"image": dict(images=images), "text": dict(text=text), "pair": dict(images=images, text=text)}
    before = {use: model.encode(**given) for use, given in uses.items()}
    served = {"vision": {"image"}, "language": {"text"}, "vl": {"pair"}}
    for expert, expected in served.items():
        weight = model.blocks["3"].ffn[expert].fc2.weight
        kept = weight.data.clone()
        weight.data.normal_(generator=torch.Generator().manual_seed(2))
        changed = {use for use, given in uses.items() if not torch.equal(model.encode(**given), before[use])}
        assert changed == expected, f"the {expert} expert serves {changed}"
        weight.data.copy_(kept)
