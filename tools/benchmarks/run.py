#!/usr/bin/env python3
"""Times launchers/pretrain.py itself on one device, DeepSpeed, loader, image tokenizer and metrics included.

    python tools/benchmarks/run.py make FOLDER --recipe RECIPE.yaml
    python tools/benchmarks/run.py measure FOLDER --recipe RECIPE.yaml --samples 32 --zero_stage 1 [ARGUMENT ...]

`make`: what a run of the recipe's geometry reads, of noise: JPEGs, captions and documents of as many different words as
the recipe's vocabulary has, a text tokenizer and an image tokenizer of base size with random weights. Recipes of equal
vocabularies and patch numbers can share a folder. `measure`: starts the launcher with so many images, texts and pairs a
step, without recomputation, and ends it once it has recorded enough steps. Figures are medians of the last steps in
metrics.jsonl. What is not known here goes to the launcher: `--kernels compiled`.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).parents[2]
STREAMS = ("images", "texts", "pairs")
SPECIAL_ROWS = 10
"""Rows of the word embedding beyond the tokenizer's pieces."""
SHORTEST_CAPTION = 8
FIGURES = ("step_s", "tokens_per_s", "tflops_per_device", "mfu", "memory_gb", "data_wait_s")


def read(recipe: Path) -> dict[str, Any]:
    """The recipe's sections. Raises ValueError where it is no recipe."""
    sys.path.insert(0, str(REPOSITORY))
    from beit3_dist.recipe import read_sections

    return read_sections(recipe, "model", "data")


# --------------------------------------------------------------------------------------------------------------- make


def make(options: Namespace) -> None:
    """Everything that `measure` needs in the folder, unless it is there."""
    recipe, folder = read(options.recipe), options.folder
    if (folder / "made").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model, data = recipe["model"], recipe["data"]
    words = vocabulary(model["vocab_size"] - SPECIAL_ROWS, folder / "text.spm")
    draw = random.Random(0)
    longest = data["caption_length"] - 2  # beside <s> and </s>
    captions = (draw.choices(words, k=draw.randint(min(SHORTEST_CAPTION, longest), longest)) for _ in iter(int, 1))
    documents = (draw.choices(words, k=4 * data["text_length"]) for _ in iter(int, 1))
    images = [image(draw) for _ in range(64)]  # each many times: decoding takes no notice
    shard(folder / "images.tar", ({"jpg": draw.choice(images)} for _ in range(options.pictures)))
    shard(
        folder / "pairs.tar",
        ({"jpg": draw.choice(images), "txt": " ".join(next(captions)).encode()} for _ in range(options.pictures)),
    )
    shard(folder / "texts.tar", ({"txt": " ".join(next(documents)).encode()} for _ in range(options.pictures)))
    image_tokenizer(folder / "image_tokenizer.pth", model, options.pictures < 256)
    (folder / "made").touch()


def vocabulary(pieces: int, path: Path) -> list[str]:
    """Writes a SentencePiece model of so many pieces, each but the control ones a word; the words."""
    import sentencepiece

    words = ["".join(letters) for letters in islice(product(string.ascii_lowercase, repeat=4), pieces - 3)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(words[i : i + 100]) for i in range(0, len(words), 100)),
        model_writer=file, vocab_size=pieces, model_type="word", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(file.getvalue())
    return words


def image(draw: random.Random) -> bytes:
    """A JPEG of smooth colours, of a size that images of the web have."""
    from PIL import Image

    coarse, file = Image.frombytes("RGB", (12, 9), draw.randbytes(12 * 9 * 3)), io.BytesIO()
    coarse.resize((400, 300), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def shard(path: Path, samples: Iterator[dict[str, bytes]]) -> None:
    import webdataset

    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for number, sample in enumerate(samples):
            tar.write({"__key__": f"{number:06d}", **sample})


def image_tokenizer(path: Path, model: dict[str, Any], tiny: bool) -> None:
    """A network of base size for patches of 16 pixels, with random weights; `tiny`: a small one."""
    from beit3_dist.image_tokenizer.files import save_vqkd
    from beit3_dist.image_tokenizer.network import VQKD

    patch = model["patch_size"] if tiny else 16
    geometry = {"width": 16, "layers": 1, "heads": 2} if tiny else {"width": 768, "layers": 12, "heads": 12}
    side = model["image_size"] // model["patch_size"] * patch
    codes = model["visual_vocab_size"]
    network = VQKD(side, patch_size=patch, codebook_size=codes, code_dim=32, decoder_layers=1, target_dim=8, **geometry)
    save_vqkd(network, path)


# ------------------------------------------------------------------------------------------------------------ measure


def command(options: Namespace, arguments: list[str], out: Path) -> list[str]:
    recipe, folder = read(options.recipe), options.folder
    settings: dict[str, object] = {
        "config": options.recipe,
        "out": out,
        "text_tokenizer": folder / "text.spm",
        "image_tokenizer": folder / "image_tokenizer.pth",
        **{f"data.{name}": folder / f"{name}.tar" for name in STREAMS},
        "data.cache": folder / "cache",
        "data.workers": max(1, min(12, (os.cpu_count() or 1) - 3)),
        **{f"batch.{name}": options.samples for name in STREAMS},
        "parallel.zero_stage": options.zero_stage,
        "activation_checkpointing": "none",
        "checkpoint.every": 10**9,
        "steps": 10**9,
    }
    if "eval" in recipe:
        settings["eval.every"] = 0
    if recipe.get("deepspeed_config"):
        settings["deepspeed_config"] = f"ds_configs/zero{options.zero_stage}_bf16.json"
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, str(REPOSITORY / "launchers" / "pretrain.py"), *flags, *arguments]


def measure(options: Namespace, arguments: list[str]) -> dict[str, Any]:
    """The figures, or under `left_out` why there are none."""
    record: dict[str, Any] = {"recipe": options.recipe.stem, "samples": options.samples}
    record |= {"zero_stage": options.zero_stage, "arguments": arguments}
    if not (options.folder / "made").exists():
        raise ValueError(f"{options.folder} holds no data: call `make` first")
    out = options.folder / f"run-{os.getpid()}"
    log = options.log or out.with_suffix(".log")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command(options, arguments, out), cwd=REPOSITORY, env=environment, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        started = time.monotonic()
        left_out = wait(process, out / "metrics.jsonl", options.steps, started + options.limit)
        steps = records(out / "metrics.jsonl")
        if left_out:
            record["left_out"] = reason(log) if left_out == "it ended" else left_out
            if len(steps) <= options.last:
                return record
        record["seconds"] = time.monotonic() - started
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # it would save
        process.wait()
        shutil.rmtree(out, ignore_errors=True)
    last = steps[-options.last :]
    record |= {name: median(s[name] for s in last) for name in FIGURES if last[0].get(name) is not None}
    record |= {"steps": len(steps), "fastest_s": min(s["step_s"] for s in last), "loss": last[-1]["loss"]}
    return record | ({"computes": last[-1]["computes"]} if "computes" in last[-1] else {})


def wait(process: subprocess.Popen[bytes], metrics: Path, steps: int, deadline: float) -> str:
    """Returns when so many steps are recorded: ''; otherwise why they are not."""
    while len(records(metrics)) < steps:
        if process.poll() is not None:
            return "it ended"
        if time.monotonic() > deadline:
            return f"it had taken {len(records(metrics))} of {steps} steps when its time was over"
        time.sleep(0.1)
    return ""


def records(metrics: Path) -> list[dict[str, Any]]:
    lines = io.BytesIO(metrics.read_bytes()) if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def reason(log: Path) -> str:
    """Why a run ended by itself: its last line that says so."""
    lines = [line.strip() for line in log.read_bytes().decode(errors="replace").split("\n") if line.strip()]
    if any("OutOfMemoryError" in line or "out of memory" in line for line in lines):
        return "it does not fit"
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line) or ": error: " in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def line(record: dict[str, Any]) -> str:
    name = f"{record['recipe']:6} ZeRO-{record['zero_stage']}  3 x {record['samples']:<4}"
    name += "".join(f" {argument}" for argument in record["arguments"])
    if "step_s" not in record:
        return f"{name} left out: {record['left_out']}"
    parts = [
        f"{record['step_s']:.4f} s/step (fastest {record['fastest_s']:.4f})",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        f"{record['tflops_per_device']:.1f} TFLOP/s",
        *([f"{record['mfu']:.1%} of peak"] if "mfu" in record else []),
        f"{record['memory_gb']:.1f} GB",
        f"waits {record['data_wait_s'] * 1e3:.0f} ms for data",
        f"loss {record['loss']:.2f}",
        f"{record['steps']} steps in {record['seconds']:.0f} s" if "seconds" in record else "",
    ]
    return f"{name} " + "  ".join(filter(None, parts))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 where nothing could be measured, 2 for a mistake."""
    parser = ArgumentParser(prog="run.py", description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name in ("make", "measure"):
        sub = commands.add_parser(name, formatter_class=ArgumentDefaultsHelpFormatter)
        sub.add_argument("folder", type=lambda path: Path(path).absolute(), help="of the data")
        sub.add_argument("--recipe", type=lambda path: Path(path).absolute(), required=True, help="a YAML file")
    commands.choices["make"].add_argument("--pictures", type=int, default=1024, help="of images and of pairs")
    sub = commands.choices["measure"]
    sub.add_argument("--samples", type=int, required=True, help="images, texts and pairs of a step, each")
    sub.add_argument("--zero_stage", type=int, choices=(1, 3), default=1, help="of DeepSpeed")
    sub.add_argument("--steps", type=int, default=30, help="recorded before the run is ended")
    sub.add_argument("--last", type=int, default=10, help="steps that the figures are medians of")
    sub.add_argument("--limit", type=float, default=120, help="seconds after which it is ended")
    sub.add_argument("--log", type=Path, help="file for what the launcher prints")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    options, rest = parser.parse_known_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the launcher is ended too
    try:
        if options.command == "make":
            if rest:
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            make(options)
            return 0
        record = measure(options, rest)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record) if options.json else line(record))
    if options.json:
        print(line(record), file=sys.stderr)
    return 0 if "step_s" in record else 1


if __name__ == "__main__":
    sys.exit(main())
