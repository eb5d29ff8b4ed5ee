"""The runs whose every bit is recorded: small, with all that a run has, and started through the launchers alone.

Recipes are written as users write them, so that they also show that recipes stay readable.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from beit3_dist.data.text import TextTokenizer
from tests.integration.runs import save_random_tokenizer
from tests.launching import launch
from tests.unit.tar_fixtures import image_tar, pair_tar, picture, sentences, text_tar, train_tokenizer, write_tar

STEPS = 10
CHANGING = {"tokens_per_s", "samples_per_s", "tflops_per_device", "data_wait_s", "step_s", "memory_gb", "computes"}
"""Fields of records that depend on the clock, the process and the machine."""
EXAMPLES, IMAGES = 22, 10
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> processes, `parallel` section
    "one_process": (1, {"zero_stage": 1}),
    "dp2_zero3": (2, {"zero_stage": 3}),
    "dp2tp2": (4, {"zero_stage": 1, "tensor": 2}),
    "dp2tp2pp2": (8, {"zero_stage": 1, "tensor": 2, "pipeline": 2, "sequence": True}),
}
MODEL = {
    "layers": 4, "width": 32, "heads": 2, "ffn_width": 64, "patch_size": 8, "image_size": 32, "vocab_size": 310,
    "visual_vocab_size": 40, "max_text_length": 18, "drop_path": 0.2,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "demo": {"attention": "shared", "sub_layernorm": False, "vl_expert_layers": 2},
    "base": {"attention": "per_modality", "sub_layernorm": True, "vl_expert_layers": 0},
}
TASKS: dict[str, dict[str, Any]] = {  # task -> what its recipe has beside the common settings
    "imagenet": {"mixup": 0.8, "cutmix": 1.0, "layer_decay": 0.7},
    "imagenet_retrieval": {"ema_decay": 0.5},
    "vqa": {"head_lr_scale": 5.0, "ema_decay": 0.5},
    "nlvr2": {},
    "captioning": {"drop_worst_after": 1, "activation_checkpointing": "full"},
    "retrieval": {"activation_checkpointing": "full"},
    "itc": {},
    "text": {"ema_decay": 0.9, "layer_decay": 0.5},
}
CONTRASTIVE = ("imagenet_retrieval", "retrieval", "itc")
WITH_CLASSES = ("imagenet", "imagenet_retrieval", "vqa", "text")
CASES = [
    *(f"{name}-{layout}" for name in ARCHITECTURES for layout in ("one_process", "dp2_zero3", "dp2tp2pp2")),
    *(f"{task}-{layout}" for task in TASKS for layout in ("one_process", "dp2tp2")),  # fine-tuning has no pipeline
    *(f"image_tokenizer-{layout}" for layout in ("one_process", "dp2_zero3")),
]


def make_data(folder: Path) -> None:
    """Shards, indexes, a text tokenizer, an image tokenizer of random weights; the same bytes at every call."""
    words = sentences()
    for number, count in enumerate((6, 5)):
        image_tar(folder / f"images-{number}.tar", count, seed=100 * number)
        pair_tar(folder / f"pairs-{number}.tar", count + 1, seed=200 * number)
        text_tar(folder / f"texts-{number}.tar", words[12 * number : 12 * number + 12])
    train_tokenizer(folder / "text.spm")
    save_random_tokenizer(folder / "image_tokenizer.pth")
    for number in range(IMAGES):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "classes.txt").write_text("red\ngreen\nblue\nblack\nwhite\n")
    tokenizer = TextTokenizer(str(folder / "text.spm"))
    for task in TASKS:
        lines = [json.dumps(record) for record in _examples(task, tokenizer)]
        (folder / f"{task}.train.jsonl").write_text("\n".join(lines) + "\n")
        (folder / f"{task}.validation.jsonl").write_text("\n".join(lines[:7]) + "\n")
    draw = np.random.default_rng(0)
    colours = [draw.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(24)]
    for number, colour in enumerate(colours):
        Image.fromarray(colour).save(folder / "one.bmp")
        colours[number] = (folder / "one.bmp").read_bytes()
    write_tar(folder / "noise.tar", [{"__key__": f"{n:03d}", "bmp": c} for n, c in enumerate(colours)])


def _examples(task: str, tokenizer: TextTokenizer) -> Iterator[dict[str, Any]]:
    """Lines of a task's index, in unilm's form."""
    words = [tokenizer.encode(line)[: 4 + n % 9] for n, line in enumerate(sentences()[:EXAMPLES])]
    for n in range(EXAMPLES):
        image, text = {"image_path": f"{n % IMAGES}.png"}, {"text_segment": words[n]}
        number, other = {"image_id": n % IMAGES}, {"image2_path": f"{(n + 3) % IMAGES}.png"}
        yield {
            "imagenet": {**image, "label": n % 5},
            "imagenet_retrieval": {**image, "label": n % 5},
            "vqa": {**image, **text, "labels": [n % 5, (n + 1) % 5], "scores": [1.0, 0.3], "qid": n},
            "nlvr2": {**image, **other, **text, "label": n % 2, "identifier": f"id-{n}"},
            "captioning": {**image, **text, **number},
            "retrieval": {**image, **text, **number},
            "itc": {**image, **text, **number},
            "text": {**text, "label": n % 5},
        }[task]


def recipe(case: str, data: Path, out: Path) -> tuple[str, int, dict[str, Any]]:
    """The launcher, the number of processes and the recipe of a case."""
    name, layout = case.split("-")
    processes, parallel = LAYOUTS[layout]
    common = {"out": str(out), "steps": STEPS, "seed": 3, "precision": "fp32", "checkpoint": {"every": STEPS}}
    if name == "image_tokenizer":
        return "train_image_tokenizer", processes, common | {
            "batch": 8, "pictures_every": 0, "teacher": {"kind": "efficientnet_lite0"},
            "data": {"images": str(data / "noise.tar"), "cache": str(data / "cache"), "workers": 0},
            "model": {"image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "layers": 1, "codebook_size": 16,
                      "code_dim": 8, "decoder_layers": 1},
            "optim": {"lr": 2e-3, "min_lr": 1e-5, "warmup_steps": 3, "clip_norm": 1.0},
        }  # fmt: skip
    common |= {"parallel": parallel, "text_tokenizer": str(data / "text.spm")}
    if name in TASKS:
        train = data / ("pairs-*.tar" if name == "itc" else f"{name}.train.jsonl")
        answers = {"answers": str(data / "classes.txt")} if name in WITH_CLASSES else {}
        return "finetune", processes, common | {
            "task": name, "model": MODEL | ARCHITECTURES["demo"],
            "batch": {"size": 8, "accumulation": 1 if name in CONTRASTIVE else 2},
            "data": {"train": str(train), "validation": str(data / f"{name}.validation.jsonl"), "images": str(data),
                     "text_length": 12, "workers": 0, "cache": str(data / "cache"), **answers},
            "eval": {"batch": 2, **({"beams": 2} if name == "captioning" else {})},
            "optim": {"lr": 1e-3, "warmup_steps": 2, "eps": 1e-6, "clip_norm": 1.0},
        } | TASKS[name]  # fmt: skip
    streams = {s: str(data / f"{s}-*.tar") for s in ("images", "texts", "pairs")}
    pipeline = "pipeline" in parallel
    return "pretrain", processes, common | {
        "image_tokenizer": str(data / "image_tokenizer.pth"), "model": MODEL | ARCHITECTURES[name],
        "activation_checkpointing": "full" if pipeline and name == "base" else "none",
        "data": {**streams, "text_length": 18, "caption_length": 12, "workers": 0, "cache": str(data / "cache")},
        "objective": {"mask_pairs": "one" if name == "base" else "both", "pair_image_weight": 0.5},
        "batch": {"images": 8, "texts": 8, "pairs": 8, "accumulation": 2},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "clip_norm": 1.0},
        "eval": {**streams, "every": 5, "batches": 1},
    } | ({"parallel": parallel | {"sequence": name == "demo"}} if pipeline else {})  # fmt: skip


def small_recipe(case: str, data: Path, out: Path) -> tuple[str, int, dict[str, Any]]:
    """A case with the small model of the files in old/, which were written by the code before the first move."""
    launcher, processes, settings = recipe(case, data, out)
    settings["model"] |= {"layers": 2, "width": 16, "ffn_width": 32, "vl_expert_layers": 1}
    settings["batch"]["accumulation"] = 1
    return launcher, processes, settings


def run(case: str, data: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Runs a case in OUT and gives what it left: see `result`. `arguments` go behind the recipe's."""
    launcher, processes, settings = recipe(case, data, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    ended = launch(launcher, "--config", str(file), *arguments, processes=processes)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return result(out, launcher)


def result(out: Path, launcher: str) -> dict[str, Any]:
    """What a run left, by what may not change: records without clocks, digests of weights and predictions."""
    kept: dict[str, Any] = {}
    for name in ("metrics", "eval"):
        if (file := out / f"{name}.jsonl").exists():
            kept[name] = [_exact(json.loads(line)) for line in file.read_text().splitlines()]
    if launcher == "train_image_tokenizer":
        weights = torch.load(out / "image_tokenizer.pth", weights_only=True)["model"]
    else:
        from tools.convert_checkpoint import main

        folder = out.with_suffix(".neutral")
        main(
            [
                str(out / "checkpoints" / (out / "checkpoints/latest").read_text().strip()),
                str(folder),
                "--to",
                "neutral",
            ]
        )
        weights = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    kept["weights"] = {name: _digest(weights[name]) for name in sorted(weights)}
    predictions = sorted((out / "predictions").glob("*")) if (out / "predictions").exists() else []
    kept["predictions"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in predictions}
    return kept


def _exact(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in CHANGING}


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def machine() -> dict[str, str]:
    """What the bits of fp32 depend on: which code torch and its libraries choose on this processor."""
    with open("/proc/cpuinfo") as lines:
        first = dict(map(str.strip, line.split(":", 1)) for line in lines.read().split("\n\n")[0].splitlines())
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    about = hashlib.sha256(json.dumps([first.get(name, "") for name in names]).encode()).hexdigest()[:16]
    cpu = f"{first.get('model name', platform.machine())}, {about}"
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "cpu": cpu}
