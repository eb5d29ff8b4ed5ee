"""Our count of a step's FLOPs against torch's own, which looks at every operation that runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.trained import freeze
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.tools.benchmarks.step import objectives_for
from beit3_dist.train import flops
from beit3_dist.train.flops import encoder_flops, peak_flops
from beit3_dist.train.totals import host_totals
from tests.micro_batches import counts_of, prepared, pretraining, random_micro_batch
from tests.parallel.training import FUSION

SIZE = {
    "layers": 3,
    "width": 48,
    "heads": 4,
    "ffn_width": 100,
    "patch_size": 4,
    "image_size": 16,
    "vocab_size": 120,
    "visual_vocab_size": 40,
    "max_text_length": 20,
    "drop_path": 0.0,
}
CONFIGS = {
    "paper": ModelConfig(**SIZE, vl_expert_layers=1),
    "released": ModelConfig(**SIZE, attention="per_modality", sub_layernorm=True, vl_expert_layers=0),
    "tower": ModelConfig(**SIZE, ffn="shared", vl_expert_layers=0),
    "fusion": ModelConfig(**SIZE | FUSION),
    "vision_tower": ModelConfig(
        **SIZE | FUSION | {"language_layers": 0, "vision_layers": 2, "vision_width": 96, "vision_heads": 8}
    ),
}


def counted_by_torch(config: ModelConfig, batch, recompute: str = "none", model: BEiT3 | None = None) -> int:
    objective = pretraining(model or BEiT3(config)).train()
    objective.model.blocks.recompute = recompute
    step = (*prepared(objective, batch), counts_of(objective, batch), 0)
    # The plain attention is a few matrix products; a fused one on the CPU is an operation that torch does not count.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(*step)[0].backward()
    return counter.get_total_flops()


def patch_embedding(config: ModelConfig, batch) -> int:
    """FLOPs of one product of all pixels and the projection."""
    patches = sum(map(len, batch.with_images)) * config.patches
    return 2 * patches * 3 * config.patch_size**2 * (config.vision_width or config.width)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_torchs_counter(config: ModelConfig) -> None:
    batch = random_micro_batch(config)
    for name in ("pairs", "texts"):  # no padding, which torch would count inside attention
        batch.streams[name].lengths[:] = batch.streams[name].text.shape[1]
    ours = host_totals([batch], objectives_for(config)).flops
    theirs = counted_by_torch(config, batch)
    assert theirs == pytest.approx(ours, rel=0.01)
    # What differs is known: pixels need no gradient, so the patch embedding's backward pass costs once, not twice.
    assert ours - theirs == patch_embedding(config, batch)


def test_padding_and_recomputation_do_not_count() -> None:
    """They cost time, so torch counts more; the model's FLOPs, and with them the MFU, must not grow by them."""
    config = CONFIGS["paper"]
    batch = random_micro_batch(config)
    texts = batch.streams["texts"]
    assert texts.lengths.min() < texts.text.shape[1]
    ours = host_totals([batch], objectives_for(config)).flops - patch_embedding(config, batch)
    plain = counted_by_torch(config, batch)
    assert ours < plain < 1.05 * ours  # padding exists inside attention only
    # All blocks run forward once more: a third of what they cost, and they cost most.
    assert 1.25 * plain < counted_by_torch(config, batch, "full") < 4 / 3 * plain


def test_by_hand() -> None:
    """One layer, D = 4, F = 8, one text of 3 words, 2 of them masked, vocabulary 20."""
    config = ModelConfig(
        layers=1,
        width=4,
        heads=1,
        ffn_width=8,
        patch_size=2,
        image_size=2,
        vl_expert_layers=0,
        vocab_size=20,
        visual_vocab_size=5,
    )
    # All words give keys, values and queries; the output projection and the expert run at the two masked words.
    projections, experts = 3 * 2 * 3 * 4 * 4 + 2 * 2 * 4 * 4, 2 * 2 * 2 * 4 * 8
    attention = 2 * 2 * 3 * 3 * 4  # scores, then the mixture
    none = torch.zeros(0, dtype=torch.int64)
    text = encoder_flops(config, 0, none, torch.tensor([3]), 2)
    assert text == 3 * (projections + experts + attention)
    # One picture: CLS and one patch of 12 pixel values, masked, 5 codes.
    picture = encoder_flops(config, 1, none, none, 1)
    assert picture == 3 * (3 * 2 * 2 * 16 + 2 * 16 + 2 * 2 * 32 + 2 * 2 * 2 * 2 * 4 + 2 * 12 * 4)
    heads = objectives_for(config).head_flops([1, 2, 0, 0])  # an image's patch of 5 codes, two words of 20
    assert heads == 2 * 4 * 5 + 2 * 2 * 4 * 20
    # A pair attends jointly: 2 + 3 tokens.
    pair = encoder_flops(config, 0, torch.tensor([3]), none, 1 + 2)
    assert pair - text - picture == 3 * 2 * 2 * 4 * (5 * 5 - 3 * 3 - 2 * 2)


def test_fine_tuning_reads_all_of_the_last_block() -> None:
    """Its FLOPs are those of torch's counter, on pictures without words and on pairs."""
    config = CONFIGS["released"]
    model = BEiT3(config)
    none, lengths = torch.zeros(0, dtype=torch.int64), torch.tensor([5, 5])
    images, words = torch.randn(2, 3, 16, 16), torch.full((2, 5), 7)
    cases = [
        (encoder_flops(config, 2, none, none), None, images),
        (encoder_flops(config, 0, lengths, none), words, images),
    ]
    for ours, text, pictures in cases:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.encode(pictures, text).sum().backward()
        patches = 2 * 2 * config.patches * 3 * config.patch_size**2 * config.width
        assert counter.get_total_flops() == ours - patches  # pixels need no gradient


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in {
        "NVIDIA H200": 989.4e12,
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H800 PCIe": 756e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA GeForce RTX 3090": None,
    }.items():
        monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak


@pytest.mark.parametrize("config", [c for c in CONFIGS.values() if not c.fusion_layers])
@pytest.mark.parametrize(
    "train_only",
    [
        ["!*.fc1.*", "!*.attention*", "!vision_embedding.*"],
        ["blocks.2.*", "norm.*", "*_head.*"],
        ["*.attention.q.*", "*.out.*", "text_head.*"],
        ["*_head.*"],
    ],
)
def test_what_is_frozen_counts_no_gradient_of_weights(config: ModelConfig, train_only: list[str]) -> None:
    batch = random_micro_batch(config)
    for name in ("pairs", "texts"):
        batch.streams[name].lengths[:] = batch.streams[name].text.shape[1]
    objectives = objectives_for(config)
    objectives.run.train_only = train_only
    model = BEiT3(config)
    freeze(model, train_only)
    theirs = counted_by_torch(config, batch, model=model)
    pixels = patch_embedding(config, batch) * any("vision_embedding.projection.weight" == n for n in objectives.trained)
    assert host_totals([batch], objectives).flops - theirs == pixels


def test_blocks_with_fusion_are_trained_as_a_whole() -> None:
    run = objectives_for(CONFIGS["fusion"]).run
    objectives_of(replace(run, train_only=["!image_head.*"]))
    with pytest.raises(
        ValueError, match=r"^train_only freezes blocks\.0\.attention\..*: with model\.fusion_layers, leave blocks out"
    ):
        objectives_of(replace(run, train_only=["!blocks.0.attention.*"]))
