"""What is used rather than trained: visual codes, captions and answers, on the GPU as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import ImageTargets
from beit3_dist.inference import Model
from tests.device import DEVICE, ON_GPU
from tests.unit.test_inference import SENTENCES, save
from tests.unit.test_inference import tokenizer as tokenizer


def pictures(number: int, size: int) -> torch.Tensor:
    """Smooth ones, uint8 [number, 3, size, size]."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (number, 3, 7, 7), generator=draw).float()
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return smooth.round().clamp(0, 255).to(torch.uint8)


def test_codes_are_those_of_the_cpu() -> None:
    """A network of base size whose codes are well spread, in bf16; where the two differ, both codes are nearly equally
    near. The CPU computes in fp32."""
    geometry = dict(patch_size=16, width=768, layers=12, heads=12, codebook_size=8192, code_dim=32)
    small = dict(patch_size=8, width=16, layers=1, heads=2, codebook_size=40, code_dim=8)
    size = 224 if ON_GPU else 32
    network = VQKD(size, **(geometry if ON_GPU else small), decoder_layers=1, target_dim=8)
    network.initialize(0)
    views = pictures(8, size)
    exact = ImageTargets(network, torch.device("cpu"))(views)
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        vectors = unit(network.embed(views.float() / 255).flatten(0, -2), dim=-1)
        table = unit(network.quantize.embedding.weight, dim=-1)
    ours = ImageTargets(network, DEVICE)(views.to(DEVICE)).cpu()
    assert ours.shape == exact.shape and len(exact.unique()) > 10
    near = (vectors * (table[exact.flatten()] - table[ours.flatten()])).sum(-1)
    assert near.max() < 0.01, "a code that lies further away"
    assert (ours == exact).float().mean() > 0.9


def test_captions_and_answers_are_those_of_the_cpu(tmp_path: Path, tokenizer: Path) -> None:
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(12)]
    for task in ("captioning", "vqa", "retrieval"):
        folder = save(tmp_path / task, task, tokenizer)
        on_cpu, ours = Model.load(folder, "cpu"), Model.load(folder, DEVICE)
        if task == "captioning":
            assert ours.caption(images, max_words=6) == on_cpu.caption(images, max_words=6)
        elif task == "vqa":
            asked = (images, (SENTENCES * 2)[: len(images)])
            assert ours.answer(*asked) == on_cpu.answer(*asked)
        else:
            torch.testing.assert_close(ours.embed_images(images), on_cpu.embed_images(images), atol=1e-5, rtol=0)
            torch.testing.assert_close(ours.embed_texts(SENTENCES), on_cpu.embed_texts(SENTENCES), atol=1e-5, rtol=0)
