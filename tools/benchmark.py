#!/usr/bin/env python3
"""Measures this project against others, in one process and interleaved, after showing that both compute the same.

    python tools/benchmark.py model [--json] [--profile] [--layers 12 ...]
    python tools/benchmark.py attention [--json]
    python tools/benchmark.py kernels [--json]
    python tools/benchmark.py growth [--json]
    python tools/benchmark.py data [--json] [--workers 1 2 ...]
    python tools/benchmark.py checkpoint [--json] [--recipe RECIPE.yaml]

`model`: a whole training step (forward, backward, AdamW) of the masked data modelling of images, texts and pairs by
our one pass over the mixed batch, by our model in three passes, and by torchscale's BEiT3 in three passes. Ours has
torch's fused AdamW, as in training; torchscale has torch's AdamW as it comes, and in a second row the fused one too.
`attention`, `kernels`: our operations against their definitions in plain torch.
`growth`: the step's time against its FLOPs, as depth, width, batch and sequence length grow.
`checkpoint`: the pause of a training that saves, and how soon what it saved is on the disk.
`data`: pictures per second and core of bare decoding and cropping, of our loader, and of webdataset beneath our
transforms.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from beit3_dist.checkpoint.formats import to_released
from beit3_dist.config import SPECIAL_ROWS, ModelConfig, ObjectiveConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.model import BEiT3
from beit3_dist.objectives.masked_data_modeling import STREAMS, MaskedDataModeling, three_passes
from beit3_dist.objectives.masking import Numbers, block_masks, mask_count, mask_words
from beit3_dist.parallel.kernels import use_kernels
from beit3_dist.training.flops import peak_flops
from beit3_dist.training.inputs import host_totals, layout_of, masked_counts, normalize, prepare

sys.path.insert(0, str(Path(__file__).parent))  # for tests, which import this file by its path
import benchmark_checkpoint  # noqa: E402
import benchmark_data  # noqa: E402
import benchmark_growth  # noqa: E402
import benchmark_kernels  # noqa: E402
from benchmark_measure import MatrixProducts, in_turns, peak_bytes, profile_table, threads  # noqa: E402

PADDING = 1
"""Id of <pad>."""
TOLERANCE = 1e-5
"""Largest relative difference of losses that counts as equal: fp32 noise at base width is ten times smaller."""

GEOMETRY = {
    "layers": 6,
    "width": 768,
    "heads": 12,
    "ffn_width": 3072,
    "patch_size": 16,
    "image_size": 224,
    "vocab_size": 64010,
    "visual_vocab_size": 8192,
}
"""Fields of the model that `model` takes, and its defaults: base at half its depth, for a step of seconds on a CPU."""

# ------------------------------------------------------------------------------------------------------- torchscale


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    return module


def _identity(module: Any, *_: Any, **__: Any) -> Any:
    return module


# torchscale is installed without its dependencies, whose versions are years old. These stand for what it imports of
# them, only while it is imported; drop path is off in every comparison with it.
_STUBS = {
    "timm": _module("timm"),
    "timm.models": _module("timm.models"),
    "timm.models.layers": _module("timm.models.layers", drop_path=_identity),
    "fairscale": _module("fairscale"),
    "fairscale.nn": _module("fairscale.nn", checkpoint_wrapper=_identity, wrap=_identity),
}
_torchscale: dict[str, types.ModuleType] = {}
"""torchscale's modules and the stubs, which are there only while it is imported."""


def torchscale_beit3(config: ModelConfig) -> nn.Module:
    """torchscale's BEiT3 of the same geometry, drop path off, with `mim_head` and `mlm_head` added as the released
    wrapper has them. Without sub-LayerNorm it stands for the shared architecture (its two sides given equal values)."""
    with mock.patch.dict(sys.modules, _STUBS):
        encoder_config = importlib.import_module("torchscale.architecture.config").EncoderConfig
        beit3 = importlib.import_module("torchscale.model.BEiT3").BEiT3
        _torchscale.clear()
        _torchscale.update({name: it for name, it in sys.modules.items() if name in _STUBS or "torchscale" in name})
    arguments = encoder_config(
        img_size=config.image_size,
        patch_size=config.patch_size,
        vocab_size=config.vocab_size,
        multiway=True,
        layernorm_embedding=False,
        normalize_output=True,
        no_output_layer=True,
        drop_path_rate=0.0,
        encoder_embed_dim=config.width,
        encoder_attention_heads=config.heads,
        encoder_ffn_embed_dim=config.ffn_width,
        encoder_layers=config.layers,
        subln=config.sub_layernorm,
        encoder_normalize_before=True,
        max_source_positions=config.max_text_length + 2,
        checkpoint_activations=False,
    )
    model = nn.Module()
    model.beit3 = beit3(arguments)
    model.mim_head = nn.Linear(config.width, config.visual_vocab_size)
    model.mlm_head = nn.Linear(config.width, config.vocab_size)
    return model


def fused_attention(self: Any, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, None]:
    """torchscale's MultiheadAttention with torch's fused attention."""
    q, k, v = (
        project(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
    )
    padding = given.get("key_padding_mask")
    mask = None if padding is None else ~padding[:, None, None, :].bool()
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return self.out_proj(mixed if self.inner_attn_ln is None else self.inner_attn_ln(mixed)), None


def torchscale_losses(model: Any, batch: MicroBatch, codes: Tensor, beit3: Any = None) -> Tensor:
    """The four losses [4], in the order of `STREAMS`, by three forward passes and heads at masked positions only.

    `batch` lies on the model's device. `codes`: int64 [I + P, patches]. `beit3`: what runs in place of `model.beit3`.
    """
    beit3 = model.beit3 if beit3 is None else beit3
    images, num_images, mask = normalize(batch.images), batch.num_images, batch.image_mask
    patches = 1 + mask.shape[1]

    def at_patches(hidden: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        return cross_entropy(model.mim_head(hidden[:, 1:patches][mask]), codes[mask])

    def at_words(hidden: Tensor, mask: Tensor, words: Tensor) -> Tensor:
        return cross_entropy(model.mlm_head(hidden[mask]), words[mask])

    def encode(**inputs: Tensor) -> Tensor:
        return beit3(**inputs)["encoder_out"]

    image = encode(visual_tokens=images[:num_images], vision_masked_position=mask[:num_images])
    text = encode(textual_tokens=batch.texts)  # texts are full: no padding
    pair = encode(
        visual_tokens=images[num_images:],
        textual_tokens=batch.captions,
        text_padding_position=batch.captions == PADDING,
        vision_masked_position=mask[num_images:],
    )
    return torch.stack(
        [
            at_patches(image, mask[:num_images], codes[:num_images]),
            at_words(text, batch.text_mask, batch.text_targets),
            at_patches(pair, mask[num_images:], codes[num_images:]),
            at_words(pair[:, patches:], batch.caption_mask, batch.caption_targets),
        ]
    )


# ------------------------------------------------------------------------------------------------------ measurement


@dataclass
class Contender:
    """One way to take the same training step."""

    name: str
    model: nn.Module
    forward: Callable[[], tuple[Tensor, Tensor]]
    """-> the loss to go backward from, and the losses [n] that it is the sum of."""
    optimizer: torch.optim.Optimizer | MasterAdamW

    def step(self) -> None:
        """Forward, one backward from the sum of the losses, AdamW."""
        self.forward()[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW of the paper; options: which of torch's implementations."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, **options)


class MasterAdamW:
    """Fused AdamW of fp32 masters of a bf16 model, as training in bf16 has it."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.masters = nn.ParameterList([p.detach().float() for p in self.parameters])
        self.adamw = adamw(self.masters, fused=True)

    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, list(self.masters))

    def zero_grad(self) -> None:
        for parameter in (*self.parameters, *self.masters):
            parameter.grad = None


def assert_equal_losses(contenders: list[Contender]) -> list[float]:
    """The first contender's losses. Raises AssertionError where another's differ."""
    with torch.no_grad():
        losses = [contender.forward()[1].double() for contender in contenders]
    for contender, theirs in zip(contenders[1:], losses[1:], strict=True):
        difference = ((theirs - losses[0]) / losses[0]).abs().max().item()
        if not difference <= TOLERANCE:
            raise AssertionError(f"the losses of {contender.name} differ by {difference:.1e}: nothing to compare")
    return losses[0].tolist()


def activation_bytes(contender: Contender, device: torch.device) -> int:
    """Peak memory of forward and backward above parameters, gradients and moments, which all are there before."""
    for parameter in contender.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peak = peak_bytes(lambda: contender.forward()[0].backward(), device)
    contender.optimizer.zero_grad()
    return peak


# ------------------------------------------------------------------------------------------------------------ model


def random_micro_batch(
    model: ModelConfig, images: int, texts: int, pairs: int, text_length: int, caption_lengths: tuple[int, int]
) -> MicroBatch:
    """Random pixels and words under the paper's masks; texts are full, captions have uniformly drawn lengths."""
    rng, objective = np.random.default_rng(0), ObjectiveConfig()
    grid = model.image_size // model.patch_size
    last_word = model.vocab_size - SPECIAL_ROWS

    def numbers(samples: int) -> Numbers:
        return lambda first, count: rng.random((samples, count))

    def words(lengths: np.ndarray, ratio: float) -> list[Tensor]:
        targets = np.full((len(lengths), int(lengths.max())), PADDING)
        for row, length in enumerate(lengths):
            targets[row, :length] = 0, *rng.integers(4, last_word + 1, length - 2), 2
        inputs, predict = mask_words(
            targets,
            numbers(len(lengths)),
            ratio=ratio,
            specials=(0, PADDING, 2),
            mask_id=last_word + 1,
            words=range(4, last_word + 1),
            mask_token_share=objective.mask_token_share,
            random_token_share=objective.random_token_share,
        )
        return [torch.from_numpy(array) for array in (inputs, targets, predict, lengths)]

    captions = words(rng.integers(caption_lengths[0], caption_lengths[1] + 1, pairs), objective.caption_mask_ratio)
    full = words(np.full(texts, text_length), objective.text_mask_ratio)
    counts = np.full(images + pairs, mask_count(objective.image_mask_ratio, grid**2))
    masks = block_masks(grid, counts, numbers(images + pairs))
    pixels = rng.integers(0, 256, (images + pairs, 3, model.image_size, model.image_size), dtype=np.uint8)
    samples = images + pairs + texts
    return MicroBatch(
        images=torch.from_numpy(pixels),
        tokenizer_images=None,
        image_mask=torch.from_numpy(masks),
        captions=captions[0],
        caption_targets=captions[1],
        caption_mask=captions[2],
        caption_lengths=captions[3],
        texts=full[0],
        text_targets=full[1],
        text_mask=full[2],
        text_lengths=full[3],
        sample_ids=torch.arange(samples),
        positions=torch.arange(samples),
        streams=torch.tensor([0] * images + [2] * pairs + [1] * texts),
        faults=[],
    )


def model_contenders(
    config: ModelConfig,
    batch: MicroBatch,
    device: torch.device,
    bf16: bool = False,
    compiled: bool = False,
    alone: bool = False,
    kernels: str = "torch",
) -> list[Contender]:
    """Ours in one pass; unless `alone`, also ours in three and torchscale's (`torchscale_contenders`).

    `kernels`: who computes our blocks, as in a run's config. The losses of all are compared, in fp32, those of our
    compiled blocks with our plain ones too. `bf16`: then ours has bf16 weights with fp32 masters, torchscale autocast.
    Codes are drawn: no image tokenizer runs.
    """
    ours = BEiT3(config).to(device)
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(config.visual_vocab_size, batch.image_mask.shape, generator=draw).to(device)
    objective = MaskedDataModeling(ours, ObjectiveConfig(), seed=0)
    counts = torch.tensor(masked_counts(batch), device=device)
    step = (*prepare(batch, device, lambda _: codes), counts, 0)

    def by_us(compute: Callable[..., tuple[Tensor, Tensor]], *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, statistics = compute(*arguments)
        return loss, statistics[0] / counts

    optimizer: Any = adamw(ours, fused=True)
    name = "ours, one pass" if kernels == "torch" else f"ours, one pass, {kernels}"
    contenders = [Contender(name, ours, lambda: by_us(objective, *step), optimizer)]
    if kernels != "torch":
        with torch.no_grad():
            of_plain = contenders[0].forward()
        use_kernels(ours, kernels)
        assert_equal_losses([contenders[0], Contender("our plain blocks", ours, lambda: of_plain, optimizer)])
    if not alone:
        three = Contender("ours, three passes", ours, lambda: by_us(three_passes, objective, *step), optimizer)
        contenders += [three, *torchscale_contenders(ours, batch.to(device), codes, bf16, compiled)]
        assert_equal_losses(contenders)
    if bf16:
        ours.bfloat16()
        optimizer = MasterAdamW(ours)
        for contender in contenders:
            if contender.model is ours:
                contender.optimizer = optimizer
    return contenders


def torchscale_contenders(ours: BEiT3, batch: MicroBatch, codes: Tensor, bf16: bool, compiled: bool) -> list[Contender]:
    """torchscale in three passes, with ours' weights: with torch's AdamW as it comes, with the fused AdamW, and where
    `compiled` also compiled, with fused attention and the fused AdamW. `bf16`: training steps in autocast."""
    try:
        theirs = torchscale_beit3(ours.config)
    except ModuleNotFoundError as error:
        raise ValueError(f"torchscale cannot be imported ({error}); launchers/environment.sh installs it") from error
    theirs.load_state_dict(to_released(ours), strict=True)
    theirs = theirs.to(codes.device)

    def forward(beit3: Any = None) -> tuple[Tensor, Tensor]:
        # Losses are compared without gradients, and in fp32.
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=bf16 and torch.is_grad_enabled()):
            losses = torchscale_losses(theirs, batch, codes, beit3)
        return losses.sum(), losses.detach()

    fused = adamw(theirs, fused=True)
    contenders = [
        Contender(THEIRS, theirs, forward, adamw(theirs)),
        Contender(THEIRS_FUSED, theirs, forward, fused),
    ]
    if compiled:
        attention = next(type(module) for module in theirs.modules() if type(module).__name__ == "MultiheadAttention")
        beit3 = torch.compile(theirs.beit3)

        def forward_compiled() -> tuple[Tensor, Tensor]:
            # The compiler looks modules up by their names, so torchscale's have to be there again.
            with mock.patch.dict(sys.modules, _torchscale), mock.patch.object(attention, "forward", fused_attention):
                return forward(beit3)

        contenders.append(Contender(THEIRS_COMPILED, theirs, forward_compiled, fused))
    return contenders


THEIRS, THEIRS_FUSED = "torchscale, three passes", "torchscale, fused AdamW"
THEIRS_COMPILED = "torchscale, compiled, SDPA"


def benchmark_model(options: Namespace) -> dict[str, Any]:
    """What `model` was asked to compare, and the figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    released = {"attention": "per_modality", "sub_layernorm": True, "vl_expert_layers": 0, "drop_path": 0.0}
    config = ModelConfig(**{name: getattr(options, name) for name in GEOMETRY}, **released)
    batch = random_micro_batch(
        config, options.images, options.texts, options.pairs, options.text_length, tuple(options.caption_lengths)
    )
    with threads(options.threads):
        return _measure(options, config, batch, device)


def _measure(options: Namespace, config: ModelConfig, batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    contenders = model_contenders(
        config, batch, device, options.precision == "bf16", options.compile, options.alone, options.kernels
    )
    with torch.no_grad():
        losses = contenders[0].forward()[1].tolist()
    names = [contender.name for contender in contenders]
    # A dispatch mode sees nothing of compiled code, which has the same products.
    with torch.compiler.set_stance("force_eager"), MatrixProducts() as products:
        contenders[0].forward()[0].backward()
        contenders[0].optimizer.zero_grad()
    seconds = in_turns([contender.step for contender in contenders], options.repeats, device)
    alone = products.seconds(device, options.repeats)
    unseen = [THEIRS_FUSED]
    if device.type == "cpu" and options.kernels == "compiled":  # the CPU's peak is that of a dispatch mode
        unseen += [contender.name for contender in contenders if contender.model is contenders[0].model]
    memory = {c.name: activation_bytes(c, device) / 1e9 for c in contenders if c.name not in unseen}
    wall = {name: median(taken.wall) for name, taken in zip(names, seconds, strict=True)}
    process = {name: median(taken.process) for name, taken in zip(names, seconds, strict=True)}
    ours = names[0]
    ratio = lambda of, name: of[name] / of[ours] if name in of else None  # noqa: E731
    flops = int(host_totals([batch], config)[5])
    peak = peak_flops(device) if options.precision == "bf16" else None
    record = {
        "ratio_vs_torchscale": ratio(wall, THEIRS),
        "ratio_vs_torchscale_fused_adamw": ratio(wall, THEIRS_FUSED),
        "ratio_vs_torchscale_compiled": ratio(wall, THEIRS_COMPILED),
        "ratio_vs_three_passes": ratio(wall, "ours, three passes"),
        "cpu_ratio_vs_torchscale": ratio(process, THEIRS),
        "cpu_ratio_vs_torchscale_fused_adamw": ratio(process, THEIRS_FUSED),
        "activation_memory_ratio_vs_torchscale": (
            memory[ours] / memory[THEIRS] if {ours, THEIRS} <= memory.keys() else None
        ),
        "matmul_share": median(alone.wall) / wall[ours],
        "cpu_matmul_share": median(alone.process) / process[ours],
        "matmul_tflops": products.flops() / median(alone.wall) / 1e12,
        "model_tflops": flops / wall[ours] / 1e12,
        "mfu": None if peak is None else flops / wall[ours] / peak,
        "losses": dict(zip(STREAMS, losses, strict=True)),
        "contenders": [
            {"name": name, **taken.record(), "step_s": median(taken.wall), "activation_gb": memory.get(name)}
            for name, taken in zip(names, seconds, strict=True)
        ],
        "tokens": sum(layout_of(batch).segments),
        "options": {name: value for name, value in vars(options).items() if name not in ("measure", "table", "json")},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "precision": options.precision,
            "torch": torch.__version__,
            "torchscale": version("torchscale"),
        },
    }
    if options.profile:
        record["profile"] = profile_table(contenders[0].step, device)
    return record


def growing_step(layers: int, width: int, batch: int, text_length: int, device: torch.device) -> tuple[Contender, int]:
    """Ours in the paper's architecture, `batch` samples of each stream, and the FLOPs of a training step."""
    config = ModelConfig(
        layers=layers,
        width=width,
        heads=width // 64,
        ffn_width=4 * width,
        patch_size=16,
        vl_expert_layers=0,
        drop_path=0.0,
        vocab_size=8010,
    )
    micro_batch = random_micro_batch(config, batch, batch, batch, text_length, (8, 64))
    objective = MaskedDataModeling(BEiT3(config).to(device), ObjectiveConfig(), seed=0)
    codes = torch.zeros(micro_batch.image_mask.shape, dtype=torch.int64, device=device)
    counts = torch.tensor(masked_counts(micro_batch), device=device)
    step = (*prepare(micro_batch, device, lambda _: codes), counts, 0)
    ours = Contender("ours", objective.model, lambda: objective(*step), adamw(objective, fused=True))
    return ours, int(host_totals([micro_batch], config)[5])


def model_table(record: dict[str, Any]) -> str:
    """`benchmark_model`'s record for people."""
    options, machine, contenders = record["options"], record["machine"], record["contenders"]
    shortest, longest = options["caption_lengths"]
    lines = [
        f"width {options['width']}, {options['layers']} layers, {machine['precision']}; {options['images']} images, "
        f"{options['texts']} texts of {options['text_length']} words, {options['pairs']} pairs with captions of "
        f"{shortest} to {longest} words: {record['tokens']} tokens",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"torchscale {machine['torchscale']}, {options['repeats']} repeats",
        "equal losses: " + ", ".join(f"{name} {loss:.5f}" for name, loss in record["losses"].items()),
        "",
        f"{'':27}{'s/step':>8}{'fastest':>9}{'slowest':>9}{'CPU s':>8}{'its time / ours':>17}{'CPU':>7}"
        f"{'activations':>14}{'ours / its':>12}",
    ]
    ours = contenders[0]
    for it in contenders:
        kept = it["activation_gb"]
        lines.append(
            f"{it['name']:27}{it['step_s']:8.3f}{it['fastest_s']:9.3f}{it['slowest_s']:9.3f}{it['cpu_s']:8.3f}"
            f"{it['step_s'] / ours['step_s']:17.3f}{it['cpu_s'] / ours['cpu_s']:7.3f}"
            + (f"{kept:11.3f} GB" if kept else "")
            + (f"{ours['activation_gb'] / kept:12.3f}" if kept and ours["activation_gb"] else "")
        )
    mfu = "unknown peak" if record["mfu"] is None else f"{record['mfu']:.1%} of the device's peak"
    lines += [
        "",
        f"our matrix products alone take {record['matmul_share']:.1%} of our step ({record['cpu_matmul_share']:.1%} in "
        f"CPU time): {record['matmul_tflops']:.3f} TFLOP/s",
        f"our step: {record['model_tflops']:.3f} TFLOP/s of the model; {mfu}",
    ]
    return "\n".join(lines + (["", record["profile"]] if "profile" in record else []))


# ----------------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None) -> Namespace:
    """The options. Raises ValueError for what cannot be measured; argparse ends the process for what it does not
    know, with exit code 2 as well."""
    parser = ArgumentParser(prog="benchmark.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model = commands.add_parser("model", help="a training step", formatter_class=ArgumentDefaultsHelpFormatter)
    model.set_defaults(measure=benchmark_model, table=model_table)
    for name, default in GEOMETRY.items():
        model.add_argument(f"--{name}", type=int, default=default, help="as in a recipe's model section")
    model.add_argument("--images", type=int, default=4, help="image-only samples of the batch")
    model.add_argument("--texts", type=int, default=4, help="text-only samples")
    model.add_argument("--pairs", type=int, default=4, help="image-text pairs")
    model.add_argument("--text_length", type=int, default=128, help="words of every text")
    model.add_argument(
        "--caption_lengths", type=int, nargs=2, default=(8, 64), metavar="N", help="fewest and most words of a caption"
    )
    model.add_argument("--repeats", type=int, default=7, help="timed steps of each, in turns, after one to warm up")
    model.add_argument("--threads", type=int, help="processor threads; torch's choice if not given")
    model.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: torchscale in autocast")
    model.add_argument(
        "--kernels",
        choices=("torch", "triton", "compiled"),
        default="torch",
        help="who computes our blocks, as in a run's config",
    )
    model.add_argument("--compile", action="store_true", help="also torchscale compiled and with fused attention")
    model.add_argument("--alone", action="store_true", help="only ours: for sizes at which torchscale does not fit")
    model.add_argument("--profile", action="store_true", help="also the operations that our step spends its time in")
    model.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    benchmark_data.add_command(commands)
    benchmark_checkpoint.add_command(commands)
    benchmark_kernels.add_commands(commands)
    benchmark_growth.add_command(commands, growing_step)
    options = parser.parse_args(arguments)
    if options.measure in (benchmark_kernels.benchmark_pairs, benchmark_growth.benchmark_growth):
        options.check(options)
        return options
    if options.measure is benchmark_checkpoint.benchmark_checkpoint:
        benchmark_checkpoint.check(options)
        return options
    if options.measure is benchmark_data.benchmark_data:
        benchmark_data.check(options)
        return options
    for name in ("images", "texts", "pairs", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} is less than 1")
    for name, shortest, longest in (
        ("text_length", options.text_length, options.text_length),
        ("caption_lengths", *options.caption_lengths),
    ):
        if not 3 <= shortest <= longest <= ModelConfig.max_text_length:
            raise ValueError(f"--{name} must lie between 3 and {ModelConfig.max_text_length} words and rise")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; returns the exit code."""
    try:
        options = parse(arguments)
        record = options.measure(options)
    except ValueError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record) if options.json else options.table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
