"""What the README and the pages of docs/ tell to type, typed: in a folder with a few drawn pictures, by a tiny model.

A block that is not run here says so in a comment before it, and why: it needs a GPU, a cluster or a download, or takes
minutes; what else runs it then is named. Commands keep all that the page says but sizes, which `SMALLER` changes. Tools
are called in this process, launchers in forked ones: several Pythons would take most of the time.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from beit3_dist.__main__ import MODULES
from beit3_dist.use.served import open_models
from tests.launching import launch
from tests.unit.tar_fixtures import picture, sentences, write_tar
from tests.unit.test_inference import save, tokenizer  # noqa: F401 (a fixture)
from tests.unit.test_readme import PAGES, REPOSITORY

BLOCK = re.compile(r"(?:^<!-- (not run here: [^\n]*?) -->\n)?^```(bash|python)\n(.*?)^```", re.M | re.S)
REASONS = ("needs a GPU", "needs a cluster", "needs a download", "needs the demo", "takes ", "it ", "CI runs", "run by")
MODEL = """
    --model.layers 2 --model.width 32 --model.heads 2 --model.ffn_width 64 --model.image_size 32 --model.patch_size 8
    --model.vocab_size 310 --data.workers 0 --data.cache cache --data.text_length 16
    --model.max_text_length 18
""".split()
SMALLER = {
    "train_text_tokenizer": ["--pieces", "300"],
    "train_image_tokenizer": """
        --model.layers 1 --model.width 16 --model.heads 2 --model.image_size 32 --model.patch_size 8
        --model.codebook_size 16 --model.code_dim 8 --model.decoder_layers 1 --steps 2 --batch 4 --precision fp32
        --data.workers 0 --data.cache cache --optim.warmup_steps 1 --checkpoint.every 2
    """.split(),
    "pretrain": [
        *MODEL, *"""--model.visual_vocab_size 16 --steps 2 --batch.images 4 --batch.texts 4 --batch.pairs 4
        --data.caption_length 16 --optim.warmup_steps 1 --eval.every 0 --checkpoint.every 2""".split(),
    ],
    "finetune": [*MODEL, *"--epochs 1 --batch.size 4 --warmup_epochs 0 --checkpoint.every 100 --eval.batch 2".split()],
    "evaluate": ["--cache", "cache"],
    "search_images": ["--cache", "cache"],
    "check_shards": ["--cache", "cache"],
}  # fmt: skip
"""Program -> what is added to its arguments, whose later ones count."""
LEFT_OUT = """
    --data.texts data/texts/train/*.tar --data.pairs data/pairs/train/*.tar --text_tokenizer text.spm
    --image_tokenizer tokenizer/image_tokenizer.pth
""".split()
"""What "..." stands for."""


def blocks() -> list[tuple[str, str, str, str]]:
    """Page, why it is not run (empty: it is), language and text of each block."""
    return [(page.name, *found.groups(default="")) for page in PAGES for found in BLOCK.finditer(page.read_text())]


def commands(block: str) -> list[tuple[str, str, list[str]]]:
    """Folder, program and arguments of each line, whatever launches it."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if "beit3" in words[:1] or "beit3_dist" in words:
            start = 1 if words[0] == "beit3" else words.index("beit3_dist") + 1
            folder, _, program = MODULES[words[start]].partition(".")
        else:
            start = next(n for n, word in enumerate(words) if word.endswith(".py"))
            folder, _, program = words[start].removesuffix(".py").partition("/")
        arguments = [*words[start + 1 :]]
        if "..." in arguments:
            arguments[arguments.index("...") :] = LEFT_OUT
        found.append((folder, program, arguments))
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:  # noqa: F811
    """The files that a reader of the pages has, and models of tasks that no page trains."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "PHOTOS").mkdir()
    (folder / "corpus").mkdir()
    names = [f"PHOTOS/{number}.png" for number in range(40)]
    for number, name in enumerate([*names, "photo.jpg", "left.jpg", "right.jpg"]):
        (folder / name).write_bytes(picture(number, kind="JPEG" if name.endswith("jpg") else "PNG"))
    lines = sentences()
    captions = "".join(f"{name}\t{lines[n % len(lines)]}\n" for n, name in enumerate(names))
    (folder / "captions.tsv").write_text("image\tcaption\n" + captions)
    (folder / "corpus/a.txt").write_text("\n".join(lines * 8))
    rows = "".join(f"{name},what is on the table?,{('a cup', 'a plate')[n % 2]}\n" for n, name in enumerate(names))
    (folder / "questions.csv").write_text("image,question,answer\n" + rows)
    (folder / "classes.txt").write_text("cat\ndog\n")
    for side, first in (("train", 0), ("val", 40)):
        (folder / side).mkdir()
        numbers = range(first, first + 20)
        samples: list[Any] = [{"__key__": str(n), "png": picture(n), "cls": str(n % 2).encode()} for n in numbers]
        write_tar(folder / side / "0.tar", samples)
    for name in ("retrieval", "captions", "imagenet", "nlvr2"):
        save(folder / "runs" / name / "model", {"captions": "captioning"}.get(name, name), tokenizer)
    return folder


def test_a_block_that_is_not_run_says_why() -> None:
    """By a reason of those that count, and what it says runs it exists."""
    skipped = [(page, why) for page, why, _, _ in blocks() if why]
    assert skipped
    for page, why in skipped:
        assert why.removeprefix("not run here: ").startswith(REASONS) or "installs the same" in why, (page, why)
        for path in re.findall(r"(?:tests|launchers)/[\w/.]*\w", why):
            assert (REPOSITORY / path).exists(), (page, path)


def run_once(folder: str, program: str, arguments: list[str]) -> None:
    words = [path for word in arguments for path in (sorted(glob.glob(word)) if "corpus" in word else [word])]
    words += SMALLER.get(program, [])
    if folder == "launchers":
        ended = launch(program, *words)
        assert ended.returncode == 0, f"{program} {shlex.join(words)}\n{ended.stderr[-3000:]}"
        return
    module: Any = importlib.import_module(f"{folder}.{program}")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            code = getattr(module, "program", module.main)(words)
    except SystemExit as end:
        code = end.code
    assert not code, f"{program} {shlex.join(words)}\n{printed.getvalue()[-2000:]}"


@pytest.mark.slow
def test_commands_do_what_the_pages_say(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the pages, each once, README first: what one leaves behind the next ones take."""
    monkeypatch.chdir(here)
    done: set[str] = set()
    for page, why, language, text in blocks():
        if why:
            continue
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(text, page, "exec"), {"__name__": "page"})
            continue
        for folder, program, arguments in commands(text):
            key = f"{program} {shlex.join(arguments)}"
            out = arguments[arguments.index("--out") + 1] if "--out" in arguments else ""
            again = program == "pretrain" and f"pretrain --out {out}" in done
            if key not in done and not again and not (program == "convert_checkpoint" and Path(arguments[1]).exists()):
                run_once(folder, program, arguments)
            done |= {key, f"{program} --out {out}"}
    for name in ("runs/base", "runs/pairs", "runs/vqa/model", "matches.html", "beit3_base.pth", "vision.safetensors"):
        assert Path(name).exists(), name
    assert len(done) > 20
    # The page of try.md, without its server: a run that may still train, and one that has left its model.
    models = open_models(
        [Path("runs/base"), Path("runs/vqa")], Path("PHOTOS"), None, None, "cache", "cpu", lambda line: None
    )
    assert [*models.asking.models] == ["vqa"] and [*models.rebuilding.models] == ["base"] == [*models.filling.models]
