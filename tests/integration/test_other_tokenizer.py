"""A run with Hugging Face's tokenizer.json, as of a model on a hub: trained, resumed, fine-tuned, in use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from beit3_dist.config import RunConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.inference import Model
from beit3_dist.objectives.masked_data_modeling import MaskedDataModelingConfig
from beit3_dist.objectives.prefix_language_modeling import PrefixLanguageModelingConfig
from beit3_dist.run.preflight_finetuning import prepare_finetuning
from beit3_dist.run.recorded_config import pretraining_config
from beit3_dist.tasks.config import FinetuneConfig, TaskBatchConfig, TaskDataConfig
from beit3_dist.train.finetuning import finetune
from tests.integration.runs import run_config, second_half, train
from tests.parallel.workers import run_workers
from tests.unit.tar_fixtures import exit_code, picture
from tests.unit.test_json_tokenizer import train_json_tokenizer
from tools import convert_checkpoint


def journey(groups: Any, folder: Path) -> str:
    """Trains, goes on from the half, and says why it does not with another tokenizer of as many words."""
    config = run(folder)
    assert train(groups, config) == ""
    resumed = second_half(config)
    assert train(groups, resumed) == ""
    other = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (folder / "other.json").write_text(json.dumps(other))
    changed = replace(resumed, text_tokenizer=str(folder / "other.json"), out=f"{config.out}-other")
    try:
        return train(groups, changed)
    except ValueError as error:
        return str(error)


def run(folder: Path) -> RunConfig:
    path = train_json_tokenizer(folder / "tokenizer.json")
    config = run_config(folder, steps=4)
    return replace(
        config, text_tokenizer=str(path), checkpoint=replace(config.checkpoint, every=2),
        model=replace(config.model, vocab_size=TextTokenizer(str(path)).rows),
        objectives={
            "masked_data_modeling": MaskedDataModelingConfig(whole_words=True),
            "prefix_language_modeling": PrefixLanguageModelingConfig(),
        },
    )  # fmt: skip


def fine_tuned(groups: Any, config: FinetuneConfig) -> None:
    finetune(prepare_finetuning(config, groups.mesh))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    [error] = run_workers(1, journey, folder)
    assert error.startswith("text_tokenizer: ") and "was trained with text_tokenizer=" in error
    return folder


def test_a_resumed_run_is_the_same(folder: Path) -> None:
    two, resumed = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "run-resumed")
    )
    for before, after in zip(two[2:], resumed, strict=True):
        for name in before:
            if name.startswith(("loss", "acc", "sample_hash", "grad")):
                assert before[name] == after[name], name
    state = json.loads((folder / "run/checkpoints/step_0000004/state.json").read_text())
    assert state["sources"]["text_tokenizer"] == TextTokenizer(str(folder / "tokenizer.json")).fingerprint[:16]
    assert pretraining_config(folder / "run", "test").text_tokenizer == str(folder / "tokenizer.json")


@torch.no_grad()
def test_the_model_writes_captions_here_and_in_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for form, name in (("safetensors", "model"), ("hub", "hub")):
        assert exit_code(convert_checkpoint.main, [str(folder / "run"), str(folder / name), "--to", form]) == 0
    assert (folder / "model" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    (folder / "p.png").write_bytes(picture(3))
    image = Image.open(folder / "p.png").convert("RGB")
    ours = Model.load(folder / "model", device="cpu")
    [caption] = ours.caption([image], beams=1, max_words=6)
    assert isinstance(caption, str)
    assert Model.load(folder / "hub", device="cpu").caption([image], beams=1, max_words=6) == [caption]
    processor = transformers.AutoProcessor.from_pretrained(folder / "hub")
    tokenizer, tokens = TextTokenizer(str(folder / "tokenizer.json")), processor.tokenizer
    text = "The import statement combines two operations"
    assert tokens(text)["input_ids"] == [0, *tokenizer.encode(text), 2]
    assert tokens("a <mask>")["input_ids"][-2] == tokenizer.mask == tokens.mask_token_id
    assert (tokens.bos_token_id, tokens.pad_token_id, tokens.eos_token_id, tokens.unk_token_id) == (0, 1, 2, 3)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder / "hub").eval()
    written = theirs.generate(**processor([image], return_tensors="pt"), num_beams=1, max_new_tokens=6)
    assert processor.batch_decode(written, skip_special_tokens=True)[0].strip() == caption


def test_fine_tuning_reads_the_same_words(folder: Path) -> None:
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for number in range(4):
        (pictures / f"{number}.png").write_bytes(picture(number))
    tokenizer = TextTokenizer(str(folder / "tokenizer.json"))
    lines = [
        {"image_path": f"{n}.png", "text_segment": tokenizer.encode("The import statement"), "image_id": n}
        for n in range(4)
    ]
    index = folder / "captions.jsonl"
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = run(folder)
    data = TaskDataConfig(train=str(index), images=str(pictures), workers=0, text_length=10)
    config = FinetuneConfig(
        task="captioning", out=str(folder / "captions"), text_tokenizer=before.text_tokenizer, model=before.model,
        init_from=str(folder / "run"), precision="fp32", steps=4, epochs=0, data=data, batch=TaskBatchConfig(size=4),
        parallel=before.parallel, optim=before.optim,
    )  # fmt: skip
    run_workers(1, fine_tuned, config)
    model = Model.load(folder / "captions", device="cpu")
    assert isinstance(model.caption([Image.open(pictures / "0.png")], beams=1, max_words=4)[0], str)
    assert model.task.tokenizer.decode(lines[0]["text_segment"]) == "The import statement"
