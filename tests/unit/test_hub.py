"""Models in transformers: what they compute is what ours compute, and folders load with and without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

import beit3_dist.hub  # noqa: F401
from beit3_dist.checkpoint.model_folder import read_model_folder, save_model_folder
from beit3_dist.config import ModelConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.inference import Model
from beit3_dist.model import BEiT3
from beit3_dist.objectives.contrast import ContrastHead
from beit3_dist.tasks.base import TaskInputs
from beit3_dist.tasks.registry import task_class
from beit3_dist.tasks.text_classification import pair_words
from tests.unit.test_inference import ANSWERS, PIECES, SENTENCES, tokenizer  # noqa: F401
from tools.convert_checkpoint import main

GIANT = {"attention": "shared", "sub_layernorm": False, "vl_expert_layers": 1}
RELEASED = {"attention": "per_modality", "sub_layernorm": True, "vl_expert_layers": 0}
TOWER = {"attention": "shared", "ffn": "shared", "sub_layernorm": False, "vl_expert_layers": 0}
AUTO: dict[str, Any] = {
    "vqa": AutoModelForVisualQuestionAnswering,
    "nlvr2": AutoModelForSequenceClassification,
    "text": AutoModelForSequenceClassification,
    "imagenet": AutoModelForImageClassification,
    "captioning": AutoModelForImageTextToText,
    "retrieval": AutoModelForZeroShotImageClassification,
    "text_classification": AutoModelForSequenceClassification,
    "retrieval_matching": AutoModelForZeroShotImageClassification,
}
ENDS = (".logit_scale", ".logit_bias")
TEXTS = ["a red circle", "a green square, a blue circle", "a \u2603 square", "blue"]


def config_of(**changes: Any) -> ModelConfig:
    fields = dict(layers=2, width=32, heads=2, ffn_width=48, patch_size=8, image_size=16, max_text_length=12)
    return ModelConfig(**fields, vocab_size=PIECES + 10, visual_vocab_size=8, **changes)


def drawn(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {n: p.detach() + 0.2 * torch.randn(p.shape, generator=draw) for n, p in network.named_parameters()}


def written(folder: Path, spm: Path, task: str | None, objectives: tuple[str, ...] = (), **changes: Any) -> Path:
    """A tiny model folder of ours and, beside it, the one for transformers, whose path is the result."""
    config = config_of(**changes)
    if task is None:
        network: torch.nn.Module = BEiT3(config)
        with torch.device("cpu"):
            network.objective_heads = torch.nn.ModuleDict({"contrastive": ContrastHead(config.width, 16, bias=True)})
        torch.nn.init.zeros_(network.objective_heads["contrastive"].logit_scale)
        torch.nn.init.ones_(network.objective_heads["contrastive"].logit_bias)
        entry = None
    else:
        network = task_class(task).network(config, len(ANSWERS))
        names = ANSWERS if task_class(task).needs_names else []
        entry = {"name": task, "classes": len(ANSWERS) if names else 0, "answers": names, "text_length": 10}
    ours = folder / "ours"
    save_model_folder(ours, drawn(network), config, task=entry, text_tokenizer=spm, objectives=objectives)
    main([str(ours), str(folder / "hub"), "--to", "hub", "--license", "apache-2.0"])
    return folder / "hub"


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    sizes = ((40, 30), (16, 16), (9, 70), (33, 20))
    return [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:  # noqa: F811
    root = tmp_path_factory.mktemp("hub")
    kinds = zip(AUTO, (RELEASED, GIANT, RELEASED, TOWER, GIANT, RELEASED, GIANT, GIANT), strict=True)
    return {task: written(root / task, tokenizer, task, **kind) for task, kind in kinds}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:  # noqa: F811
    objectives = ("masked_data_modeling", "contrastive", "prefix_language_modeling")
    return written(tmp_path_factory.mktemp("pretrained"), tokenizer, None, objectives, **GIANT)


def inputs_of(task: str, folder: Path, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    processor, reads = AutoProcessor.from_pretrained(folder), task_class(task)
    images: Any = list(zip(pictures, pictures[::-1], strict=True)) if reads.images == 2 else pictures
    given = processor(images if reads.images else None, TEXTS if reads.reads_text else None, return_tensors="pt")
    return dict(given)


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "text", "text_classification", "imagenet"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_are_ours(folders: dict[str, Path], pictures: list[Image.Image], task: str, attention: str) -> None:
    """From pictures and texts on, so views, normalisation, words and padding are ours too."""
    theirs = AUTO[task].from_pretrained(folders[task], attn_implementation=attention).eval()
    given = inputs_of(task, folders[task], pictures)
    ours = Model.load(folders[task].parent / "ours", device="cpu")
    words, padding = ours._words(TEXTS)
    seen = ours._pixels(pictures) if ours.task.images else torch.empty(4, 0)
    images = torch.stack([seen, seen.flip(0)], dim=1) if task == "nlvr2" else seen[:, None]
    expected = ours.task.logits(ours.network, TaskInputs(images, words, padding, torch.empty(0), torch.arange(4)))
    torch.testing.assert_close(theirs(**given).logits, expected, atol=1e-5, rtol=1e-5)
    if ours.task.reads_text:
        assert torch.equal(given["input_ids"], words) and torch.equal(given["attention_mask"] == 0, padding)
    assert isinstance(theirs(**given, return_dict=False), tuple)
    if attention == "eager":
        told = theirs(**given, output_hidden_states=True, output_attentions=True)
        assert len(told.hidden_states) == 3 and len(told.attentions) == 2
        torch.testing.assert_close(told.attentions[0].sum(-1), torch.ones(told.attentions[0].shape[:-1]))


@torch.no_grad()
def test_vectors_are_ours(folders: dict[str, Path], pretrained: Path, pictures: list[Image.Image]) -> None:
    """Of a fine-tuned model, and of one that pretraining taught contrast, with a length and a bias of its own."""
    for folder in (folders["retrieval"], folders["retrieval_matching"], pretrained):
        theirs = AutoModelForZeroShotImageClassification.from_pretrained(folder).eval()
        given = AutoProcessor.from_pretrained(folder)(pictures, TEXTS, return_tensors="pt")
        found = theirs(**given, return_loss=True)
        ours = Model.load(folder.parent / "ours", device="cpu", task="retrieval" if folder == pretrained else None)
        images, texts = ours.embed_images(pictures), ours.embed_texts(TEXTS)
        torch.testing.assert_close(found.image_embeds, images, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.text_embeds, texts, atol=1e-5, rtol=0)
        weights = read_model_folder(folder.parent / "ours").weights
        scale, bias = (next((w for n, w in weights.items() if n.endswith(end)), torch.zeros(1)) for end in ENDS)
        logits = scale.exp() * images @ texts.T + bias
        torch.testing.assert_close(found.logits_per_image, logits, atol=1e-4, rtol=1e-5)
        assert found.loss.isfinite()


def test_pairs_of_sentences_are_framed_as_ours(folders: dict[str, Path]) -> None:
    folder = folders["text_classification"]
    tokens, ours = AutoProcessor.from_pretrained(folder).tokenizer, TextTokenizer(str(folder / "tokenizer.spm"))
    first, second = (ours.encode(text) for text in TEXTS[:2])
    assert tokens(*TEXTS[:2])["input_ids"] == [ours.bos, *pair_words(first, second, 99), ours.eos]
    assert tokens.decode(tokens("a red circle")["input_ids"], skip_special_tokens=True) == "a red circle"
    assert tokens("a <mask>")["input_ids"][-2] == ours.mask == tokens.mask_token_id
    assert tokens.vocab_size == ours.rows and tokens.decode([ours.rows - 1]) == ""


@torch.no_grad()
def test_captions_are_ours(folders: dict[str, Path], pretrained: Path, pictures: list[Image.Image]) -> None:
    """Asked at <mask> after fine-tuning, at the last word after prefix language modelling; with a cache or without."""
    for folder in (folders["captioning"], pretrained):
        theirs = AutoModelForImageTextToText.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        ours = Model.load(folder.parent / "ours", device="cpu", task="captioning")
        given = processor(pictures, return_tensors="pt")
        for beams in (1, 3):
            expected = ours.caption(pictures, beams=beams, length_penalty=0.0, max_words=6)
            for cached in (True, False):
                found = theirs.generate(
                    **given, num_beams=beams, length_penalty=0.0, max_new_tokens=6, use_cache=cached
                )
                assert processor.tokenizer.batch_decode(found, skip_special_tokens=True) == expected
        begun = theirs.generate(
            **processor(pictures[:2], ["a red", "a"], return_tensors="pt"), num_beams=1, max_new_tokens=3
        )
        alone = [
            theirs.generate(**processor(image, [text], return_tensors="pt"), num_beams=1, max_new_tokens=3)
            for image, text in zip(pictures[:2], ("a red", "a"), strict=True)
        ]
        assert [row[row > 2].tolist() for row in begun] == [row[0][row[0] > 2].tolist() for row in alone]


@torch.no_grad()
def test_pretrained_heads_and_encoder_are_ours(pretrained: Path, pictures: list[Image.Image]) -> None:
    content = read_model_folder(pretrained.parent / "ours")
    ours = BEiT3(content.config, device="meta")
    ours.load_state_dict({n: w for n, w in content.weights.items() if n in ours.state_dict()}, assign=True)
    given = AutoProcessor.from_pretrained(pretrained)(pictures, TEXTS, return_tensors="pt")
    masked, real = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.5, given["attention_mask"].bool()
    hidden = ours.encode(given["pixel_values"], given["input_ids"], ~real, image_mask=masked)
    found = AutoModelForPreTraining.from_pretrained(pretrained).eval()(**given, bool_masked_pos=masked)
    words = ours.text_head.logits(hidden[:, 5:])
    torch.testing.assert_close(found.logits[real], words[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.image_logits, ours.image_head.logits(hidden[:, 1:5]), atol=1e-5, rtol=1e-5)
    encoder = AutoModel.from_pretrained(pretrained).eval()
    for images, text in ((True, False), (False, True)):
        some = {name: value for name, value in given.items() if (name == "pixel_values") == images}
        alone = ours.encode(
            given["pixel_values"] if images else None, given["input_ids"] if text else None, ~real if text else None
        )
        rows = torch.ones(alone.shape[:2], dtype=torch.bool) if images else real
        torch.testing.assert_close(encoder(**some).last_hidden_state[rows], alone[rows], atol=1e-5, rtol=1e-5)


def test_training_goes_both_ways(folders: dict[str, Path], pictures: list[Image.Image], tmp_path: Path) -> None:
    """A step of the Trainer, with checkpointed blocks, moves all weights; what it saves is a model folder of ours."""
    model = AutoModelForVisualQuestionAnswering.from_pretrained(folders["vqa"])
    given = inputs_of("vqa", folders["vqa"], pictures)
    rows = [{name: value[row] for name, value in given.items()} | {"labels": torch.eye(4)[row]} for row in range(4)]
    settings = TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        learning_rate=1e-2, gradient_checkpointing=True, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Trainer(model, settings, train_dataset=rows).train()  # type: ignore[arg-type]
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    still -= {"vision_embedding.mask_token"}
    assert all(name.startswith("blocks.1.") and ".language." in name for name in still)
    assert "blocks.1.attention.k.language.weight" not in still, "the answer stands on CLS, which looks at the words"
    model.save_pretrained(tmp_path / "tuned")
    AutoProcessor.from_pretrained(folders["vqa"]).save_pretrained(tmp_path / "tuned")
    ours = Model.load(tmp_path / "tuned", device="cpu")
    best = model.eval()(**given).logits.argmax(1)
    assert ours.answer(pictures, TEXTS) == [ANSWERS[number] for number in best]
    again = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "tuned")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_fine_tuning_begins_from_a_pretrained_folder(pretrained: Path, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(pretrained, num_labels=3)
    images = torch.randn(2, 3, 16, 16)
    loss = model(images, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.item() == pytest.approx(np.log(3), abs=0.1), "a new head predicts evenly"
    trained = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert {"vision_embedding.positions", "blocks.0.ffn.vision.fc1.weight", "task_head.head.weight"} <= trained
    model.save_pretrained(tmp_path / "classes")
    written_again = read_model_folder(tmp_path / "classes")
    assert written_again.task == {"name": "imagenet", "text_length": 12, "classes": 3, "answers": []}


def test_pipelines_of_the_library(folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    classes = pipeline("image-classification", str(folders["imagenet"]), device="cpu")(pictures, top_k=1)
    ours = Model.load(folders["imagenet"], device="cpu")
    assert [best[0]["label"] for best in classes] == ours.classify(pictures)
    features = pipeline("image-feature-extraction", str(folders["vqa"]), device="cpu")(pictures[0])
    assert np.shape(features) == (1, 5, 32)
    names = pipeline("zero-shot-image-classification", str(folders["retrieval"]), device="cpu")
    found = names(pictures[0], candidate_labels=["red", "blue"], hypothesis_template="a {} circle")
    assert {entry["label"] for entry in found} == {"red", "blue"} and sum(e["score"] for e in found) == pytest.approx(1)
    sentences = pipeline("text-classification", str(folders["text"]), device="cpu")(TEXTS)
    assert [entry["label"] for entry in sentences] == Model.load(folders["text"], device="cpu").classify(TEXTS)


WITHOUT = """
import sys, torch
sys.modules["beit3_dist"] = None
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import json
from PIL import Image
from transformers import AutoModel, AutoModelForSequenceClassification, AutoProcessor, pipeline

vqa, captions, nlvr2, picture, out = sys.argv[1:]
trusted = {"trust_remote_code": True}
answers = pipeline("visual-question-answering", vqa, device="cpu", **trusted)(picture, "a red circle", top_k=2)
caption = pipeline("image-to-text", captions, device="cpu", **trusted)(picture, num_beams=1)
model = AutoModelForSequenceClassification.from_pretrained(nlvr2, **trusted)
processor = AutoProcessor.from_pretrained(nlvr2, **trusted)
image = Image.open(picture)
truth = model.eval()(**processor([[image, image]], ["a red circle"], return_tensors="pt")).logits.argmax(1)
encoder = AutoModel.from_pretrained(vqa, **trusted)
AutoModel.from_pretrained(vqa, **trusted).save_pretrained(out, max_shard_size="1GB")
json.dump([answers, caption, bool(truth), type(encoder).__module__], sys.stdout)
"""


@pytest.mark.slow
def test_folders_load_without_the_package(
    folders: dict[str, Path], pictures: list[Image.Image], tmp_path: Path
) -> None:
    """By the code that lies in them, in another process, where `import beit3_dist` fails."""
    picture = tmp_path / "picture.png"
    pictures[0].save(picture)
    paths = [str(folders[task]) for task in ("vqa", "captioning", "nlvr2")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, *paths, str(picture), str(tmp_path / "saved")],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    answers, caption, truth, module = json.loads(ended.stdout[ended.stdout.index("[[") :])
    ours = {task: Model.load(folders[task], device="cpu") for task in ("vqa", "captioning", "nlvr2")}
    assert answers[0]["answer"] == ours["vqa"].answer([picture], ["a red circle"])[0] and len(answers) == 2
    assert caption == [{"generated_text": ours["captioning"].caption([picture], beams=1)[0].strip()}]
    assert truth == ours["nlvr2"].is_true([(picture, picture)], ["a red circle"])[0]
    assert module.startswith("transformers_modules.")
    assert (tmp_path / "saved" / "modeling_beit3.py").is_file(), "what is saved there brings its code along"


def test_the_card_names_figures_of_the_run(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    network = task_class("vqa").network(config_of(**RELEASED), len(ANSWERS))
    entry = {"name": "vqa", "classes": len(ANSWERS), "answers": ANSWERS, "text_length": 10}
    save_model_folder(run / "model", drawn(network), config_of(**RELEASED), task=entry, text_tokenizer=tokenizer)
    (run / "config.yaml").write_text("epochs: 3\nbatch: 8\nprecision: bf16\n")
    (run / "metrics.jsonl").write_text("")
    (run / "eval.jsonl").write_text('{"step": 1, "vqa_accuracy": 0.25}\n{"step": 2, "vqa_accuracy": 0.5}\n')
    main([str(run), str(tmp_path / "answers"), "--to", "hub", "--license", "mit"])
    text = (tmp_path / "answers/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit" and front["pipeline_tag"] == "visual-question-answering"
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "vqa_accuracy", "value": 0.5}]
    assert "| epochs | 3 |" in text and "| vqa_accuracy | 0.5 |" in text
    config = json.loads((tmp_path / "answers/config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in enumerate(ANSWERS)}
    assert set(config["custom_pipelines"]) == {"visual-question-answering"}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 2
        return capsys.readouterr().err

    yield run


def test_what_the_form_does_not_hold_is_refused(tmp_path: Path, refused: Any) -> None:
    fusion = config_of(attention="per_modality", sub_layernorm=False, vl_expert_layers=0, fusion_layers=1)
    save_model_folder(tmp_path / "fusion", drawn(BEiT3(fusion)), fusion)
    assert "model.fusion_layers" in refused(str(tmp_path / "fusion"), str(tmp_path / "a"), "--to", "hub")
    whole = config_of(**RELEASED)
    vision = {n: w for n, w in drawn(BEiT3(whole)).items() if "language" not in n}
    save_model_folder(tmp_path / "vision", vision, whole)
    assert "the language side" in refused(str(tmp_path / "vision"), str(tmp_path / "b"), "--to", "hub")
    save_model_folder(tmp_path / "other", drawn(BEiT3(whole)), whole, task={"name": "pointing"})
    assert "the task pointing" in refused(str(tmp_path / "other"), str(tmp_path / "c"), "--to", "hub")
    assert "--license" in refused(str(tmp_path / "other"), str(tmp_path / "d"), "--to", "timm", "--license", "mit")
    assert not any((tmp_path / name).exists() for name in "abcd")


@torch.no_grad()
def test_timm_loads_its_folder(folders: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    """The geometry, the classifier and what images are normalised by are in it."""
    import timm

    for name, ours in {"classes": folders["imagenet"].parent / "ours", "encoder": pretrained.parent / "ours"}.items():
        main([str(ours), str(tmp_path / name), "--to", "timm"])
    images = torch.randn(2, 3, 16, 16)
    classes = timm.create_model(f"local-dir:{tmp_path / 'classes'}", pretrained=True).eval()
    expected = AutoModelForImageClassification.from_pretrained(folders["imagenet"]).eval()(images).logits
    torch.testing.assert_close(classes(images), expected, atol=1e-5, rtol=1e-5)
    assert tuple(classes.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    encoder = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    hidden = AutoModel.from_pretrained(pretrained).eval()(images).last_hidden_state
    torch.testing.assert_close(encoder(images), hidden, atol=1e-5, rtol=1e-5)
    for name, right in (("classes", expected), ("encoder", hidden)):  # by the file, as timm's own models are
        config = json.loads((tmp_path / name / "config.json").read_text())
        geometry = config["model_args"] | {key: config[key] for key in ("num_classes", "global_pool")}
        of_file = timm.create_model(
            config["architecture"], pretrained=True, **geometry,
            pretrained_cfg=dict(file=str(tmp_path / name / "model.safetensors")),
        )  # fmt: skip
        torch.testing.assert_close(of_file.eval()(images), right, atol=1e-5, rtol=1e-5)


def test_image_processor_without_words(tmp_path: Path) -> None:
    """A classifier of images needs no tokenizer."""
    network = task_class("imagenet").network(config_of(**RELEASED), len(ANSWERS))
    entry = {"name": "imagenet", "classes": 4, "answers": ANSWERS}
    save_model_folder(tmp_path / "ours", drawn(network), config_of(**RELEASED), task=entry)
    main([str(tmp_path / "ours"), str(tmp_path / "hub"), "--to", "hub"])
    assert AutoImageProcessor.from_pretrained(tmp_path / "hub").do_center_crop
    assert len(SENTENCES) and not (tmp_path / "hub/tokenizer_config.json").exists()
