"""Words after a prefix are told from what comes before them, and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from beit3_dist.config import BatchConfig, DataConfig, ModelConfig, RunConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.order import Stream
from beit3_dist.model import BEiT3
from beit3_dist.model.encoder import kind_of
from beit3_dist.model.text_decoder import decoder_group
from beit3_dist.model.token_layout import prefix_mask
from beit3_dist.objectives.momentum_distillation import NAME as MOMENTUM
from beit3_dist.objectives.momentum_distillation import MomentumDistillationConfig
from beit3_dist.objectives.prefix_language_modeling import NAME, PrefixLanguageModelingConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.train.totals import host_totals
from tests.equality import assert_close
from tests.micro_batches import CPU, counts_of, precomputed_codes, random_micro_batch
from tests.parallel.training import FUSION

MODEL = ModelConfig(layers=3, width=32, heads=4, ffn_width=48, patch_size=8, image_size=16, vocab_size=60,
                    visual_vocab_size=20, max_text_length=20, vl_expert_layers=1, drop_path=0.0)  # fmt: skip
PATCHES = 1 + MODEL.patches


def module(config: ModelConfig = MODEL, batch: BatchConfig | None = None, **section: Any) -> PretrainingModule:
    """A model of weights of ordinary size under the objective alone."""
    streams = DataConfig(images="unused", texts="unused", pairs="unused", text_length=14, caption_length=9)
    objectives: dict[str, Any] = {NAME: PrefixLanguageModelingConfig(**section)}
    run = RunConfig(out="unused", text_tokenizer="unused", data=streams, model=config, objectives=objectives)
    model, draw = BEiT3(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return PretrainingModule(model, objectives_of(replace(run, batch=batch or run.batch)), seed=0)


def batch_of(prefixes: dict[str, list[int]]) -> MicroBatch:
    """Random pairs and texts with these prefixes."""
    batch = random_micro_batch(MODEL)
    for name, prefix in prefixes.items():
        batch.streams[name].annotations[NAME] = {"prefix": torch.tensor(prefix)}
    return batch


def read(of: PretrainingModule, batch: MicroBatch) -> tuple[Tensor, Tensor, list[int]]:
    """Logits [M, V] of the read tokens, their targets [M], and how many each loss has."""
    inputs, reading, _ = of.objectives.prepare(replace(batch), CPU)  # what is known of a batch is remembered
    assert reading is not None
    (targets,) = reading.targets
    return of.model.text_logits(of.model.hidden(inputs, reading.selection)), targets.words, targets.counts


def test_the_blocks_of_the_mask() -> None:
    nothing, two_words = prefix_mask(2, 3, torch.tensor([0, 2])).int().tolist()
    assert nothing == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert two_words == [[1, 1, 1, 1, 0]] * 4 + [[1, 1, 1, 1, 1]]
    assert prefix_mask(0, 3, torch.tensor([0]))[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_what_is_told_begins_after_the_prefix() -> None:
    batch = batch_of({"pairs": [0, 2], "texts": [0, 2, 2, 0]})
    _, words, counts = read(module(texts=True), batch)
    expected = []
    for name in ("pairs", "texts"):
        samples = batch.streams[name]
        rows = zip(samples.text, samples.lengths.tolist(), samples.annotations[NAME]["prefix"].tolist(), strict=True)
        expected.append(torch.cat([text[max(prefix, 1) : length] for text, length, prefix in rows]))
    assert torch.equal(words, torch.cat(expected)) and counts == [len(some) for some in expected]
    assert counts_of(module(texts=True), batch).tolist() == counts


def test_a_later_word_changes_nothing_before_it() -> None:
    model = module()
    batch = batch_of({"pairs": [0, 2]})
    samples = batch.streams["pairs"]
    samples.lengths[:] = samples.text.shape[1]
    before, words, _ = read(model, batch)
    length, changed = samples.text.shape[1], 5  # the caption's sixth token
    for sample, prefix in enumerate((0, 2)):
        text = samples.text.clone()
        samples.text[sample, changed] = 4 + (samples.text[sample, changed] - 3) % 50
        after, _, _ = read(model, batch)
        samples.text = text
        first = [0, length - 1][sample]  # the first of the sample's rows, which begin at the prefix's last token
        row = first + changed - max(prefix, 1) + 1  # the changed token's own
        others = torch.ones(len(words), dtype=torch.bool)
        others[row : [length - 1, len(words)][sample]] = False
        assert torch.equal(before[others], after[others])
        assert ((before[row:] - after[row:]).abs().amax(1) > 1e-4)[: int((~others).sum())].all()


def test_the_prefix_sees_itself_and_image_patches_see_it() -> None:
    """Its last word changes what is told at <s> in the prefix no less than the image does: both ways."""
    model = module()
    batch = batch_of({"pairs": [3, 3]})
    before, _, _ = read(model, batch)
    samples = batch.streams["pairs"]
    hidden = {}
    for prefix in (3, 0):
        samples.annotations[NAME]["prefix"][:] = prefix
        hidden[prefix] = model.model.hidden(model.objectives.prepare(replace(batch), CPU)[0])
    assert (hidden[3] - hidden[0])[: 2 * PATCHES].abs().amax(1).min() > 1e-4  # patches saw words
    samples.annotations[NAME]["prefix"][:] = 3
    samples.text[:, 2] = 4 + (samples.text[:, 2] - 3) % 50
    assert ((read(model, batch)[0] - before).abs().amax(1) > 1e-4).all()


def test_a_prefix_of_all_but_the_last_is_its_language_model() -> None:
    """Against everything before the last token encoded without any mask."""
    model = module()
    batch = batch_of({"pairs": [0, 0]})
    samples = batch.streams["pairs"]
    samples.lengths[:] = torch.tensor([6, 9])
    samples.annotations[NAME]["prefix"] = samples.lengths - 1
    logits, words, _ = read(model, batch)
    pixels = samples.images.float() / 127.5 - 1
    for row, length in enumerate([6, 9]):
        given = model.model.encode(pixels[row : row + 1], samples.text[row : row + 1, : length - 1])
        expected = model.model.text_head.logits(given[:, -1])
        assert_close(logits[row : row + 1], expected, "logits")
        assert words[row] == samples.text[row, length - 1]
    inputs, reading, ids = model.objectives.prepare(batch, CPU)
    counts = counts_of(model, batch)
    contribution, statistics = model(inputs, reading, ids, counts, 0)
    assert contribution.item() == pytest.approx(cross_entropy(logits, words).item(), rel=1e-6)
    assert statistics[1].item() == int((logits.argmax(1) == words).sum())


def test_an_image_alone_is_captionings_mask() -> None:
    model = module(prefix="image")
    batch = batch_of({"pairs": [0, 0]})
    samples = batch.streams["pairs"]
    samples.lengths[:] = samples.text.shape[1]
    logits, _, _ = read(model, batch)
    pixels, words = samples.images.float() / 127.5 - 1, samples.text.shape[1]
    mask = prefix_mask(PATCHES, words, torch.zeros(2, dtype=torch.int64))
    expected = model.model.encode(pixels, samples.text, attention_mask=mask)[:, PATCHES:-1]
    assert_close(logits, model.model.text_head.logits(expected.flatten(0, 1)), "logits")


def draw(lengths: list[int], first: int = 0, **section: Any) -> list[int]:
    """The prefixes of texts of so many tokens."""
    (objective,) = module(**section).objectives
    samples: Any = [SimpleNamespace(key=first + key, words=np.zeros(n)) for key, n in enumerate(lengths)]
    return objective.annotate(Stream.PAIRS, samples, None, None)["prefix"].tolist()


def test_prefixes_are_drawn_by_each_samples_key_alone() -> None:
    drawn = draw([6] * 2000)
    assert draw([6] * 10, first=100) == drawn[100:110]
    counts = {prefix: drawn.count(prefix) for prefix in sorted(set(drawn))}
    assert list(counts) == [0, 2, 3, 4, 5]  # none of its four words, or <s> and one to four of them
    assert all(330 < count < 470 for count in counts.values())
    assert draw([2, 2, 3]) in ([0, 0, 0], [0, 0, 2])  # no word: nothing to draw
    assert draw([6, 7], prefix="image") == [0, 0]


@pytest.mark.parametrize("fusion", [False, True])
def test_flops_count_the_ones_of_the_mask(fusion: bool) -> None:
    """Torch counts whole squares of scores, and the patch embedding's backward pass once, since pixels need none."""
    config = replace(MODEL, **FUSION) if fusion else MODEL
    model = module(config, texts=True)
    prefixes = {"pairs": [0, 4], "texts": [0, 2, 5, 0]}
    batch = batch_of(prefixes)
    for name in prefixes:
        batch.streams[name].lengths[:] = batch.streams[name].text.shape[1]
    inputs, reading, ids = model.objectives.prepare(batch, CPU, precomputed_codes(config))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(inputs, reading, ids, counts_of(model, batch), 0)[0].backward()

    def zeros(stream: str, patches: int, first: int = 0) -> int:
        """In the masks of a stream's samples, without `first` tokens."""
        words, prefix = batch.streams[stream].text.shape[1], torch.tensor(prefixes[stream])
        return int((~prefix_mask(patches, words, prefix))[:, first:, first:].sum())

    pairs, captions, texts = zeros("pairs", PATCHES), zeros("pairs", PATCHES, PATCHES), zeros("texts", 0)
    of_layer = {"joint": pairs + texts, "images": 0, "alone": captions + texts, "co_attention": captions,
                "connected": pairs}  # fmt: skip
    unseen = sum(of_layer[kind_of(config, layer)] for layer in range(config.layers))
    patches = 2 * 2 * config.patches * 3 * config.patch_size**2 * config.width
    expected = counter.get_total_flops() - 3 * 4 * config.width * unseen + patches
    assert host_totals([batch], model.objectives).flops == expected


WRITING = replace(MODEL, layers=4, attention="per_modality", vl_expert_layers=0, fusion_layers=2, decoder_layers=2)


def test_a_decoder_tells_what_follows_the_prefix() -> None:
    """Against image and prefix encoded alone, caption by caption. FLOPs are torch's, but for what a mask parts."""
    model = module(WRITING)
    batch = batch_of({"pairs": [0, 3]})
    samples = batch.streams["pairs"]
    samples.lengths[:] = torch.tensor([7, 9])
    pixels, text = samples.images.float() / 127.5 - 1, samples.text
    losses = 0.0
    for row, (prefix, length) in enumerate([(1, 7), (3, 9)]):
        memory = model.model.encode(pixels[row : row + 1], text[row : row + 1, :prefix])
        words = torch.cat([text[row, :1], text[row, prefix : length - 1]])
        group = decoder_group(
            torch.ones(memory.shape[:2], dtype=torch.bool), torch.zeros(1, len(words), dtype=torch.bool)
        )
        logits = model.model.text_head.logits(model.model.decoder(memory, words, torch.arange(len(words)), group))
        losses += cross_entropy(logits, text[row, prefix:length], reduction="sum").item()
    inputs, reading, ids = model.objectives.prepare(batch, CPU)
    counts = counts_of(model, batch)
    assert counts.tolist() == [6 + 6] and sum(inputs.layout.segments) == 2 * PATCHES + 1 + 3
    contribution, statistics = model(inputs, reading, ids, counts, 0)
    assert contribution.item() == pytest.approx(losses / 12, rel=1e-5)
    model.objectives.multiple = 13  # of which the captions' words are filled up to be one
    inputs, reading, ids = model.objectives.prepare(replace(batch), CPU)
    assert sum(inputs.layout.segments) == 2 * PATCHES + 13
    assert model(inputs, reading, ids, counts, 0)[0].item() == pytest.approx(losses / 12, rel=1e-5)
    model.objectives.multiple = 1

    samples.annotations[NAME]["prefix"][:], samples.lengths[:] = 3, 9
    inputs, reading, ids = model.objectives.prepare(replace(batch), CPU)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(inputs, reading, ids, counts, 0)[0].backward()
    parted = 3 * WRITING.decoder_layers * 4 * WRITING.width * 2 * (6 * 5 // 2)
    patches = 2 * 2 * MODEL.patches * 3 * MODEL.patch_size**2 * MODEL.width
    assert host_totals([replace(batch)], model.objectives).flops == counter.get_total_flops() - parted + patches


@pytest.mark.parametrize("config", [MODEL, WRITING], ids=["alone", "decoder"])
def test_a_moving_average_teaches_next_words(config: ModelConfig) -> None:
    """In training (1 - alpha) times the truth's cross-entropy and alpha times that with what the average says (mPLUG);
    in validation the truth's alone."""
    alpha, student, teacher = 0.3, module(config), module(config)
    momentum = {MOMENTUM: MomentumDistillationConfig(alpha=alpha, ramp_steps=2)}
    run = student.objectives.run
    taught = PretrainingModule(student.model, objectives_of(replace(run, objectives=run.objectives | momentum)), 0)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.mul_(1.3)
    batch, logits = batch_of({"pairs": [0, 3]}), []
    counts, back = counts_of(student, batch), taught.objectives.back
    assert back is not None
    for of in (student, teacher):
        inputs, reading, ids = back.prepare(replace(batch), CPU)
        assert reading is not None
        with torch.no_grad():
            (seen,) = PretrainingModule(of.model, back, 0).eval()(inputs, replace(reading, objectives=back), ids)
        logits.append(seen)
    words = reading.targets[0].words
    hard = cross_entropy(logits[0], words).item()
    soft = cross_entropy(logits[0], logits[1].softmax(1)).item()
    for step, share in ((0, 0.0), (1, alpha / 2), (5, alpha)):
        (own,) = back.looked([[logits[1]]], step)
        inputs, reading, ids = taught.objectives.prepare(replace(batch), CPU)
        assert reading is not None
        inputs_of = inputs, taught.objectives.with_looked(reading, own), ids, counts, step
        contribution, statistics = taught.train()(*inputs_of)
        assert contribution.item() == pytest.approx((1 - share) * hard + share * soft, rel=1e-5)
        assert statistics[1].item() == int((logits[0].argmax(1) == words).sum())
        assert taught.eval()(*inputs_of)[0].item() == pytest.approx(hard, rel=1e-5)


@pytest.mark.parametrize(
    ("section", "batch", "words"),
    [
        ({"pair_weight": -1.0}, None, "objectives.prefix_language_modeling.pair_weight=-1.0 is negative"),
        ({"texts": True}, BatchConfig(texts=0), "prefix_language_modeling.texts: the run has no texts, batch.texts=0"),
        (
            {"texts": True, "model": WRITING},
            None,
            "the decoder of model.decoder_layers=2 looks at images, which texts lack",
        ),
        ({}, BatchConfig(pairs=0), "objectives.prefix_language_modeling reads none of the streams that batch has"),
    ],
)
def test_what_cannot_be_is_named(section: dict[str, Any], batch: BatchConfig | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        module(section.pop("model", MODEL), batch=batch, **section)
