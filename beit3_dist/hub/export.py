"""Graphs of a model for other runtimes: ONNX, or programs of torch.export; any batch, padded texts.

    vision        pixel_values -> hidden states         text    input_ids, attention_mask -> hidden states
    fusion        all three -> hidden states
    classes (imagenet, text), answers (vqa), truths (nlvr2), image_vectors and text_vectors (contrast), next_words
    (captioning: after the last word), masked (pretraining: words and visual codes): what a model's heads make of them

Each graph is whole by itself, with its own weights, and is compared with the model on other inputs than those it was
traced by: in another batch, and texts of another length with padding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from beit3_dist.checkpoint.files import folder_made_aside, write_json
from beit3_dist.checkpoint.model_folder import ModelFolder
from beit3_dist.config import require
from beit3_dist.hub.folder import config_for, models_of
from beit3_dist.hub.modeling_beit3 import (
    Beit3ForCaptioning,
    Beit3ForImageClassification,
    Beit3ForPreTraining,
    Beit3ForRetrieval,
    Beit3ForSequenceClassification,
    Beit3ForVisualQuestionAnswering,
    Beit3ForVisualReasoning,
    Beit3Model,
)
from beit3_dist.optional import optional_module

IMAGES, WORDS, REAL = "pixel_values", "input_ids", "attention_mask"
PAIR = (IMAGES, WORDS, REAL)
TOLERANCE = 1e-4
"""Largest difference from torch, as a share of the largest result."""
TRACED, CHECKED = (2, 5), ((3, 8), (1, 3))
"""Samples and words of the inputs that a graph is traced by, and of those it is compared on."""
INT8_SAMPLES = 32
"""Samples that the results in 8 bits are compared on."""

SUFFIX = {"onnx": "onnx", "torch_export": "pt2"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One graph."""

    kind: type[Beit3Model]
    """The model that it is of."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., tuple[Tensor, ...]]
    """(model, *inputs) -> outputs."""


def _hidden(model: Any, *inputs: Tensor | None) -> tuple[Tensor]:
    return (model.encode(*inputs).last_hidden_state,)


def _logits(model: Any, *inputs: Tensor) -> tuple[Tensor]:
    return (model(*inputs).logits,)


PARTS = {
    "vision": Part(Beit3Model, (IMAGES,), ("hidden_states",), _hidden),
    "text": Part(
        Beit3Model, (WORDS, REAL), ("hidden_states",), lambda model, words, real: _hidden(model, None, words, real)
    ),
    "fusion": Part(Beit3Model, PAIR, ("hidden_states",), _hidden),
    "classes": Part(Beit3ForImageClassification, (IMAGES,), ("logits",), _logits),
    "sentence_classes": Part(Beit3ForSequenceClassification, (WORDS, REAL), ("logits",), _logits),
    "answers": Part(Beit3ForVisualQuestionAnswering, PAIR, ("logits",), _logits),
    "truths": Part(Beit3ForVisualReasoning, PAIR, ("logits",), _logits),
    "image_vectors": Part(
        Beit3ForRetrieval, (IMAGES,), ("image_embeds",), lambda model, images: (model.get_image_features(images),)
    ),
    "text_vectors": Part(
        Beit3ForRetrieval, (WORDS, REAL), ("text_embeds",),
        lambda model, words, real: (model.get_text_features(words, real),),
    ),
    "next_words": Part(
        Beit3ForCaptioning, PAIR, ("logits",),
        lambda model, images, words, real: (model(images, words, real, ask=True).logits[:, 0],),
    ),
    "masked": Part(
        Beit3ForPreTraining, PAIR, ("logits", "image_logits"), lambda model, *given: model(*given).to_tuple()
    ),
}  # fmt: skip
"""File name -> the graph."""


class _Traced(nn.Module):
    def __init__(self, model: Beit3Model, part: Part) -> None:
        super().__init__()
        self.model = model
        self.run: Callable[..., tuple[Tensor, ...]] = part.run

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.run(self.model, *inputs)


def parts_of(model: ModelFolder) -> Iterator[tuple[str, Part, Beit3Model]]:
    """The graphs that a folder's weights serve, each with its model in fp32."""
    config = config_for(model)
    kinds: list[type[Beit3Model]] = [Beit3Model, *models_of(model)]
    for kind in dict.fromkeys(kinds):
        with torch.device("meta"):
            network = kind(config)
        needed = network.state_dict().keys()
        network.load_state_dict({n: w.float() for n, w in model.weights.items() if n in needed}, assign=True)
        network.requires_grad_(False).eval()
        for name, part in PARTS.items():
            if part.kind is kind:
                yield name, part, network


def inputs_for(part: Part, network: Beit3Model, samples: int, words: int) -> tuple[Tensor, ...]:
    """Drawn inputs; each text but the first is shorter than the one before, down to <s> and </s>."""
    config, draw = network.config, torch.Generator().manual_seed(words)
    pair = (2,) if part.kind is Beit3ForVisualReasoning else ()
    images = torch.randn(samples, *pair, 3, config.image_size, config.image_size, generator=draw)
    text = torch.randint(4, config.mask_token_id, (samples, words), generator=draw)
    lengths = (words - torch.arange(samples)).clamp(min=2)
    real = torch.arange(words) < lengths[:, None]
    text[:, 0] = config.bos_token_id
    if part.kind is Beit3ForCaptioning:  # the words that are there stand at the end
        real, text = real.flip(1), text.where(real.flip(1), torch.tensor(config.pad_token_id))
    else:
        text = text.where(real, torch.tensor(config.pad_token_id))
    given = {IMAGES: images, WORDS: text, REAL: real.long()}
    return tuple(given[name] for name in part.inputs)


def program_of(part: Part, network: Beit3Model) -> ExportedProgram:
    """What torch.export makes of a graph: any number of samples, texts up to the model's longest."""
    batch, length = Dim("samples", min=1, max=1 << 16), Dim("words", min=2, max=network.config.max_text_length - 1)
    shapes = tuple({0: batch} if name == IMAGES else {0: batch, 1: length} for name in part.inputs)
    samples, words = TRACED
    longest = min(words, network.config.max_text_length - 1)
    with torch.no_grad():
        return torch.export.export(
            _Traced(network, part), inputs_for(part, network, samples, longest), dynamic_shapes=(shapes,)
        )


def save_exported(folder: Path, model: ModelFolder, form: str, int8: bool) -> None:
    """Writes a new folder of graphs, `form` onnx or torch_export, whole or not at all, and index.json with their inputs
    and outputs. Raises ValueError where the folder exists, or a graph computes something else than the model."""
    for package in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
        optional_module(package, "--to onnx", "pip install 'beit3-dist[hub]'")
    with folder_made_aside(folder) as partial:
        index = {}
        for name, part, network in parts_of(model):
            program = program_of(part, network)
            write = _write_onnx if form == "onnx" else _write_program
            run = write(partial / f"{name}.{SUFFIX[form]}", part, program)
            for samples, words in CHECKED:
                given = inputs_for(part, network, samples, min(words, network.config.max_text_length - 1))
                off = deviation(part.run(network, *given), run(given))
                require(off <= TOLERANCE, f"{name}: {form} differs from torch by {off:.1e} of the largest result")
            log.info("%s: as torch within %.0e on batches of other sizes", name, TOLERANCE)
            index[name] = {"inputs": part.inputs, "outputs": part.outputs}
            if int8:
                _write_int8(partial / f"{name}.onnx", part, network)
        write_json(partial / "index.json", {"graphs": index, "image_size": model.config.image_size})


def deviation(expected: tuple[Tensor, ...], found: list[Tensor]) -> float:
    """The largest difference, as a share of the largest result."""
    pairs = zip(expected, found, strict=True)
    return max(float((one - other).abs().max() / one.abs().max().clamp(min=1e-6)) for one, other in pairs)


Run = Callable[[tuple[Tensor, ...]], list[Tensor]]


def _write_program(path: Path, part: Part, program: ExportedProgram) -> Run:
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    return lambda given: list(module(*given))


def _write_onnx(path: Path, part: Part, program: ExportedProgram) -> Run:
    made = torch.onnx.export(program, input_names=part.inputs, output_names=part.outputs, optimize=True, verbose=False)
    assert made is not None
    made.save(path, external_data=True)
    return runner(path, part)


def runner(path: Path, part: Part) -> Run:
    """A graph under onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(given: tuple[Tensor, ...]) -> list[Tensor]:
        named = {name: value.numpy() for name, value in zip(part.inputs, given, strict=True)}
        return [torch.from_numpy(np.asarray(found)) for found in session.run(None, named)]

    return run


def _write_int8(path: Path, part: Part, network: Beit3Model) -> None:
    """Writes NAME.int8.onnx: matrices in 8 bits, activations at run time (dynamic). Logs how far its results are from
    torch's on drawn inputs."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = path.with_suffix(".int8.onnx")
    model = onnx.load(path)
    model.graph.ClearField("value_info")  # onnxruntime before 1.32 finds shapes of folded weights to differ
    # Weights of 7 bits: without AVX-VNNI an x86 adds two products of 8 bits in 16, which overflow.
    quantize_dynamic(model, small, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    given = inputs_for(part, network, INT8_SAMPLES, min(CHECKED[0][1], network.config.max_text_length - 1))
    expected, found = part.run(network, *given)[0], runner(small, part)(given)[0]
    off = float((found - expected).norm() / expected.norm())
    told = f"results off by {off:.1%} (relative L2 norm, drawn inputs)"
    if expected.ndim == 2 and part.outputs == ("logits",):
        told += f", the first choice is the same in {float((found.argmax(1) == expected.argmax(1)).float().mean()):.0%}"
    log.info("%s: %s", small.name, told)
