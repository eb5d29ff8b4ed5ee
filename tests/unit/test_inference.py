"""A model folder in use: batches give what single samples give, and what a task does not offer is one line."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

from beit3_dist.checkpoint.model_folder import read_model_folder, save_model_folder
from beit3_dist.config import ModelConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.inference import Model, image_features, open_image
from beit3_dist.model import BEiT3
from beit3_dist.objectives.contrast import ContrastHead
from beit3_dist.objectives.matching import HeadForm, MatchingHead
from beit3_dist.tasks.data.augmentation import IMAGENET
from beit3_dist.tasks.parts import generation
from beit3_dist.tasks.registry import task_class

SENTENCES = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]
ANSWERS = ["yes", "no", "red", "green"]
PIECES = 40
TASKS = ("retrieval", "vqa", "captioning", "imagenet", "nlvr2", "text")


def save(folder: Path, task: str | None, tokenizer: Path | None, **changes: object) -> Path:
    """A tiny model with random weights of ordinary size."""
    fields = dict(layers=2, width=32, heads=2, ffn_width=48, patch_size=8, image_size=16, vl_expert_layers=1)
    config = ModelConfig(**{**fields, "vocab_size": PIECES + 10, "visual_vocab_size": 8, "max_text_length": 12})
    network, draw = task_class(task or "retrieval").network(config, len(ANSWERS)), torch.Generator().manual_seed(0)
    weights = {n: p.detach() + 0.2 * torch.randn(p.shape, generator=draw) for n, p in network.named_parameters()}
    answers = ANSWERS if task and task_class(task).needs_names else []
    entry = None if task is None else {"name": task, "classes": len(ANSWERS), "answers": answers, **changes}
    save_model_folder(folder, weights, config, task=entry, text_tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tiny.spm"
    with open(file, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 20), model_writer=out, vocab_size=PIECES, hard_vocab_limit=True,
            model_type="bpe", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        )  # fmt: skip
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {task: save(root / task, task, tokenizer) for task in TASKS}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Files of several sizes and modes."""
    draw = np.random.default_rng(0)
    files = []
    for number, (mode, width, height) in enumerate([("RGB", 40, 30), ("RGB", 16, 16), ("L", 9, 70), ("RGBA", 33, 20)]):
        pixels = draw.integers(0, 256, (height, width, len(mode)), dtype=np.uint8).squeeze()
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels, mode).save(files[-1])
    return files


def test_embeddings_are_unit_vectors_of_each_sample(folders: dict[str, Path], pictures: list[Path]) -> None:
    model = Model.load(folders["retrieval"], device="cpu")
    images, texts = model.embed_images(pictures * 20), model.embed_texts(SENTENCES)
    assert images.shape == (80, 32) and texts.shape == (6, 32) and images.dtype == torch.float32
    for vectors in (images, texts):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    for number, picture in enumerate(pictures):  # 80 pictures are three batches
        torch.testing.assert_close(images[number::4], model.embed_images([picture]).expand(20, -1))
    for number, sentence in enumerate(SENTENCES):  # padding changes nothing
        torch.testing.assert_close(texts[number], model.embed_texts([sentence])[0], atol=1e-6, rtol=0)
    assert (images[:4] @ images[:4].T).tril(-1).max() < 0.999, "all pictures look alike"
    assert model.embed_images([]).shape == (0, 32)


def test_a_runs_folder_means_its_model(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match="run is a run's folder without a model: fine-tuning writes .*run/model"
    ):
        Model.load(tmp_path / "run", device="cpu")
    save(tmp_path / "run/model", "retrieval", tokenizer)
    ours, expected = (Model.load(tmp_path / name, device="cpu") for name in ("run", "run/model"))
    assert torch.equal(ours.embed_texts(SENTENCES), expected.embed_texts(SENTENCES))


def test_any_form_of_a_picture(folders: dict[str, Path], pictures: list[Path]) -> None:
    model = Model.load(folders["retrieval"], device="cpu")
    opened = Image.open(pictures[0])
    forms = [str(pictures[0]), pictures[0], opened, np.asarray(opened), pictures[0].as_uri()]
    vectors = model.embed_images(forms)
    assert torch.equal(vectors, vectors[:1].expand_as(vectors))


@pytest.mark.parametrize("task", ["retrieval", "vqa", "captioning", "imagenet", "nlvr2", "text"])
def test_less_precision(task: str, folders: dict[str, Path], pictures: list[Path]) -> None:
    exact, half = (Model.load(folders[task], "cpu", precision=precision) for precision in ("fp32", "bf16"))
    assert {weight.dtype for weight in half.network.parameters()} == {torch.bfloat16}
    images = [pictures[:2]] if exact.task.images == 2 else pictures[:1] if exact.task.images else ()
    texts = SENTENCES[:1] if exact.task.reads_text else ()
    if task == "retrieval":
        assert (half.embed_images(pictures) - exact.embed_images(pictures)).abs().max() < 0.02
        assert half.embed_texts(SENTENCES).dtype == torch.float32
    elif task == "captioning":
        assert len(half.caption(pictures, max_words=3)) == len(pictures)
    else:
        assert len(half.predict(images, texts)) == 1
    with pytest.raises(ValueError, match="precision='int8': it is one of fp32, bf16, fp16"):
        Model.load(folders[task], "cpu", precision="int8")  # type: ignore[arg-type]


def test_the_view_is_the_whole_picture_squashed(folders: dict[str, Path]) -> None:
    """Against the definition: bicubic to 16 x 16, then (level / 255 - 0.5) / 0.5."""
    model = Model.load(folders["retrieval"], device="cpu")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 50, 3), dtype=np.uint8))
    levels = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    pixels = torch.from_numpy((levels / 255 - 0.5) / 0.5).float()[None]
    torch.testing.assert_close(model.embed_images([picture]), model.task.embed_images(model.network, pixels))


def test_answers(folders: dict[str, Path], pictures: list[Path]) -> None:
    model = Model.load(folders["vqa"], device="cpu")
    asked = [(picture, sentence) for picture in pictures for sentence in SENTENCES * 2]
    answers = model.answer(*zip(*asked, strict=True))
    assert answers == [model.answer([picture], [sentence])[0] for picture, sentence in asked]
    assert set(answers) <= set(ANSWERS) and len(set(answers)) > 1
    with pytest.raises(ValueError, match="1 images and 2 questions"):
        model.answer(pictures[:1], SENTENCES[:2])


def test_captions(folders: dict[str, Path], pictures: list[Path]) -> None:
    model = Model.load(folders["captioning"], device="cpu")
    captions = model.caption(pictures, max_words=6)
    assert captions == [model.caption([picture], max_words=6)[0] for picture in pictures]
    assert len(set(captions)) > 1
    words = generation.generate(model.network, model._pixels(pictures), model.task.tokenizer, max_words=6)
    assert captions == [model.task.tokenizer.decode(caption) for caption in words]


def test_captions_are_as_long_as_in_training(folders: dict[str, Path], tokenizer: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    pictures = [Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(8)]
    taught = Model.load(save(tmp_path / "taught", "captioning", tokenizer, text_length=5), device="cpu")
    assert taught.caption(pictures) == taught.caption(pictures, max_words=4) != taught.caption(pictures, max_words=8)
    silent = Model.load(folders["captioning"], device="cpu")  # its folder does not say, and it has room for 12
    assert silent.caption(pictures) == silent.caption(pictures, max_words=11)


def test_classes_of_pictures(folders: dict[str, Path], pictures: list[Path]) -> None:
    """Against the definition: the largest centred square, normalised by ImageNet's mean and deviation."""
    model = Model.load(folders["imagenet"], device="cpu")
    for file in pictures:
        picture = open_image(file)
        side, (mean, deviation) = min(picture.size), map(np.array, IMAGENET)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        pixels = torch.from_numpy(((np.asarray(square) / 255 - mean) / deviation).transpose(2, 0, 1)).float()
        torch.testing.assert_close(model._pixels([file])[0], pixels, atol=1e-5, rtol=0)
        assert model.classify([file]) == [
            ANSWERS[int(model.network.task_head(model.network.encode(model._pixels([file]))).argmax())]
        ]
    many = model.classify(pictures * 20)
    assert many == model.classify(pictures) * 20 and len(set(many)) > 1


def test_classes_of_sentences(folders: dict[str, Path], tokenizer: Path, tmp_path: Path) -> None:
    model = Model.load(folders["text"], device="cpu")
    usual = model.network.task_head(model.network.encode(None, *model._words(SENTENCES))).mean(0)
    model.network.task_head.head[3].bias -= usual  # or one class is the likeliest of all sentences
    classes = model.classify(SENTENCES)
    assert classes == [model.classify([sentence])[0] for sentence in SENTENCES] and len(set(classes)) > 1
    nameless = Model.load(save(tmp_path / "nameless", "text", tokenizer, answers=[]), device="cpu")
    with pytest.raises(ValueError, match=r"nameless/config.json names 0 of 4 classes"):
        nameless.classify(SENTENCES)


def test_truths_of_sentences(folders: dict[str, Path], pictures: list[Path]) -> None:
    model = Model.load(folders["nlvr2"], device="cpu")
    asked = [((one, other), sentence) for one in pictures for other in pictures for sentence in SENTENCES]
    truths = model.is_true(*zip(*asked, strict=True))
    assert truths == [model.is_true([two], [sentence])[0] for two, sentence in asked]
    assert set(truths) == {True, False}
    with pytest.raises(ValueError, match="1 pairs of images and 2 sentences"):
        model.is_true([(pictures[0], pictures[1])], SENTENCES[:2])


def test_long_texts_are_cut(folders: dict[str, Path]) -> None:
    model = Model.load(folders["retrieval"], device="cpu")
    vectors = model.embed_texts([" ".join(SENTENCES), " ".join(SENTENCES) + " red"])
    torch.testing.assert_close(vectors[0], vectors[1])


def test_what_a_task_does_not_offer(folders: dict[str, Path], pictures: list[Path]) -> None:
    retrieval, vqa = (Model.load(folders[task], device="cpu") for task in ("retrieval", "vqa"))
    for model, use in (
        (retrieval, lambda m: m.answer(pictures[:1], ["what?"])),
        (retrieval, lambda m: m.caption(pictures)),
        (vqa, lambda m: m.embed_images(pictures)),
        (vqa, lambda m: m.embed_texts(SENTENCES)),
        (vqa, lambda m: m.classify(pictures)),
        (retrieval, lambda m: m.is_true([(pictures[0], pictures[1])], ["both are red"])),
    ):
        with pytest.raises(ValueError, match=r"was fine-tuned for (retrieval|vqa); .* need a model of task") as error:
            use(model)
        assert "\n" not in str(error.value)


OBJECTIVES = ("masked_data_modeling", "prefix_language_modeling", "contrastive")


def pretrained(
    folder: Path, tokenizer: Path, objectives: tuple[str, ...], length: int = 24, matching: HeadForm = "pooler"
) -> Path:
    """A model as pretraining by these objectives leaves it, with the heads of all of them; contrast by vectors of this
    length, matching by a head of this form."""
    config = ModelConfig(layers=2, width=32, heads=2, ffn_width=48, patch_size=8, image_size=16, vl_expert_layers=1,
                         vocab_size=PIECES + 10, visual_vocab_size=8, max_text_length=12)  # fmt: skip
    network, draw = BEiT3(config), torch.Generator().manual_seed(0)
    values = {name: parameter.detach() for name, parameter in network.named_parameters()}
    if "contrastive" in objectives:
        head = ContrastHead(config.width, length, bias=True).requires_grad_(False)
        for parameter in head.parameters():
            parameter.zero_()
        values |= {f"objective_heads.contrastive.{name}": p.detach() for name, p in head.named_parameters()}
    if "matching" in objectives:
        match = MatchingHead(config.width, matching)
        values |= {f"objective_heads.matching.{name}": p.detach() for name, p in match.named_parameters()}
    weights = {name: value + 0.2 * torch.randn(value.shape, generator=draw) for name, value in values.items()}
    save_model_folder(folder, weights, config, text_tokenizer=tokenizer, objectives=objectives)
    return folder


def test_a_pretrained_model_writes_captions(tmp_path: Path, tokenizer: Path, pictures: list[Path]) -> None:
    """After prefix language modelling, in its own form: what is next is told at the last word."""
    model = Model.load(pretrained(tmp_path / "model", tokenizer, OBJECTIVES[:2]), device="cpu")
    written = model.caption(pictures, max_words=5)
    words, pixels = TextTokenizer(str(tokenizer)), model._pixels(pictures)
    expected = generation.generate(model.network, pixels, words, max_words=5, at_mask=False)
    at_mask = generation.generate(model.network, pixels, words, max_words=5)
    assert written == [words.decode(caption) for caption in expected] and expected != at_mask
    with pytest.raises(ValueError, match="embeddings need a model of task"):
        model.embed_images(pictures)


def test_a_pretrained_models_contrast_is_used(tmp_path: Path, tokenizer: Path, pictures: list[Path]) -> None:
    folder = pretrained(tmp_path / "model", tokenizer, OBJECTIVES)
    model = Model.load(folder, device="cpu", task="retrieval")
    vectors, heads = model.embed_images(pictures), read_model_folder(folder).weights
    cls = (
        model.network.encode(model._pixels(pictures))[:, 0] @ heads["objective_heads.contrastive.vision_head.weight"].T
    )
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(cls, dim=1))
    assert len(Model.load(folder, device="cpu", task="captioning").caption(pictures[:1], max_words=2)) == 1
    with pytest.raises(ValueError, match="is a pretrained model that serves for captioning and retrieval: name one, t"):
        Model.load(folder, device="cpu").embed_images(pictures)
    with pytest.raises(ValueError, match="a pretrained model that none of its objectives fits for vqa; launchers/fin"):
        Model.load(folder, device="cpu", task="vqa")
    with pytest.raises(ValueError, match="was fine-tuned for vqa, not for captioning"):
        Model.load(save(tmp_path / "vqa", "vqa", tokenizer), task="captioning")


@pytest.mark.parametrize("form", ["pooler", "two_layers", "linear"])
def test_a_pretrained_model_tells_what_matches(
    form: HeadForm, tmp_path: Path, tokenizer: Path, pictures: list[Path]
) -> None:
    folder = pretrained(tmp_path / "model", tokenizer, (*OBJECTIVES, "matching"), matching=form)
    model, weights = Model.load(folder, device="cpu", task="retrieval"), read_model_folder(folder).weights
    matches = model.match(pictures, SENTENCES[:4])
    head = {name.rpartition("matching.")[2]: w for name, w in weights.items() if "heads.matching." in name}
    start = model.network.encode(model._pixels(pictures), *model._words(SENTENCES[:4]))[:, 5]  # <s>, after 4 patches
    if form == "pooler":
        start = torch.tanh(start @ head["pooler.weight"].T + head["pooler.bias"])
    elif form == "two_layers":
        start = torch.nn.functional.gelu(start @ head["hidden.weight"].T + head["hidden.bias"])
    logits = start @ head["score.weight"].T + head["score.bias"]
    torch.testing.assert_close(matches, logits[:, 1] - logits[:, 0])
    with pytest.raises(ValueError, match="4 images and 1 texts"):
        model.match(pictures, SENTENCES[:1])
    without = Model.load(pretrained(tmp_path / "other", tokenizer, OBJECTIVES), device="cpu", task="retrieval")
    with pytest.raises(ValueError, match="was not pretrained by objectives.matching"):
        without.match(pictures, SENTENCES[:4])


def test_a_pretrained_model_fills_in_what_is_hidden(tmp_path: Path, tokenizer: Path, pictures: list[Path]) -> None:
    """Against the network: the heads of masked data modelling on what it encodes, with an image or without."""
    model = Model.load(pretrained(tmp_path / "model", tokenizer, OBJECTIVES[:1]), device="cpu")
    words, square = TextTokenizer(str(tokenizer)), model._square(pictures)
    asked = ["a [MASK] circle", "[MASK] [MASK]", "a red [MASK]", "[MASK] square"]
    for images in (None, pictures):
        found = model.fill_words(asked, images, top=3)
        assert [len(some) for some in found] == [1, 2, 1, 1] and found[3] == model.fill_words(
            asked[3:], images and images[3:], top=3
        )[0]
        text = [words.bos, *words.encode("a"), words.mask, *words.encode("circle"), words.eos]
        place = text.index(words.mask) - len(text)
        states = model.network.encode(images and square[:1], torch.tensor([text]))[0, place]
        chances = model.network.text_head(states[None])[0].softmax(0)[words.words.start : words.words.stop]
        best = chances.topk(3)
        expected = [words.decode([words.words.start + int(place)]) for place in best.indices]
        assert [guess.what for guess in found[0][0]] == expected
        torch.testing.assert_close(torch.tensor([guess.score for guess in found[0][0]]), best.values)

    hidden = torch.tensor([[True, False, False, True]]).expand(4, -1)
    codes = model.fill_patches(pictures, hidden)
    states = model.network.encode(square, image_mask=hidden)[:, 1:]
    assert codes.shape == (4, 4) and torch.equal(
        codes, model.network.image_head(states.flatten(0, 1)).argmax(1).view(4, 4)
    )
    assert not torch.equal(codes, model.fill_patches(pictures, torch.ones(4, 4, dtype=torch.bool)))
    assert model.fill_patches(pictures, hidden, SENTENCES[:4]).shape == (4, 4)
    for ask, message in {
        lambda: model.fill_words(["a red circle"]): r"texts\[0\] has no \[MASK\]",
        lambda: model.fill_words(["[MASK] " + "a red circle " * 9]): r"texts\[0\] has \d+ tokens: the model reads 10",
        lambda: model.fill_words(asked, pictures[:1]): "1 images and 4 texts",
        lambda: model.fill_words(asked, top=0): "top=0: give the number of guesses",
        lambda: model.fill_patches(pictures, hidden[:, :3]): r"not bool \[4, 4\]",
        lambda: model.fill_patches(pictures, hidden, SENTENCES[:1]): "4 images and 1 texts",
        lambda: model.caption(pictures): "pretrained model without a task; .*; captions need one",
    }.items():
        with pytest.raises(ValueError, match=message):
            ask()


def test_features_are_those_of_the_encoder(tmp_path: Path, tokenizer: Path, pictures: list[Path]) -> None:
    """With a task or without, in either precision; what is learnt from them tells classes that were seen."""
    folder = pretrained(tmp_path / "model", tokenizer, OBJECTIVES)
    model = Model.load(folder, device="cpu", task="retrieval")
    features = model.features(pictures)
    torch.testing.assert_close(features, model.network.encode(model._square(pictures))[:, 1:].mean(1))
    assert torch.equal(features, Model.load(folder, device="cpu").features(pictures))
    assert torch.equal(features, image_features(read_model_folder(folder), "model", "cpu")(pictures))
    assert (Model.load(folder, "cpu", precision="bf16").features(pictures) - features).abs().max() < 0.2
    texts = model.text_features(SENTENCES)
    torch.testing.assert_close(texts[:1], model.text_features(SENTENCES[:1]))  # padding changes nothing
    assert texts.shape == (6, 32) and model.features([]).shape == (0, 32)
    seen, classes = pictures * 5, ["noise", "square", "tall", "wide"] * 5
    for by in ("probe", "neighbours"):
        classify = model.learn_classes(seen, classes, by, neighbours=3)
        assert classify(pictures) == classes[:4]
        (best, *rest), *_ = classify(pictures, top=4)
        assert best.what == "noise" and best.score > rest[0].score and sum(g.score for g in [best, *rest]) <= 1.001
    with pytest.raises(ValueError, match="4 images and 20 classes"):
        model.learn_classes(pictures, classes)
    with pytest.raises(ValueError, match="classes: 1 of them"):
        model.learn_classes(pictures, ["one"] * 4)


def test_classes_by_ones_own_names(tmp_path: Path, tokenizer: Path, pictures: list[Path]) -> None:
    model = Model.load(pretrained(tmp_path / "model", tokenizer, OBJECTIVES), device="cpu", task="retrieval")
    cosines = model.embed_images(pictures) @ model.embed_texts(SENTENCES).T
    assert model.classify_by_names(pictures, SENTENCES) == [SENTENCES[best] for best in cosines.argmax(1)]
    scale = model.network.task_head.logit_scale.exp()
    guesses = model.classify_by_names(pictures, SENTENCES, top=6)
    scores = torch.tensor([[guess.score for guess in some] for some in guesses])
    torch.testing.assert_close(scores, (scale * cosines).softmax(1).sort(1, descending=True).values)
    of_many = model.classify_by_names(pictures, ["red", "blue"], ["a {} circle", "a {} square"], top=2)
    assert {guess.what for guess in of_many[0]} == {"red", "blue"}
    with pytest.raises(ValueError, match="templates: each has {}"):
        model.classify_by_names(pictures, SENTENCES, ["a"])


def test_scores_of_the_likeliest(folders: dict[str, Path], pictures: list[Path]) -> None:
    models = {task: Model.load(folders[task], device="cpu") for task in ("vqa", "imagenet", "text", "nlvr2")}
    found = {
        "vqa": models["vqa"].answer(pictures[:2], SENTENCES[:2], top=4),
        "imagenet": models["imagenet"].classify(pictures[:2], top=4),
        "text": models["text"].classify(SENTENCES[:2], top=4),
        "nlvr2": models["nlvr2"].is_true([pictures[:2]] * 2, SENTENCES[:2], top=9),
    }
    for task, some in found.items():
        for guesses in some:
            scores = [guess.score for guess in guesses]
            assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
            assert {guess.what for guess in guesses} == ({True, False} if task == "nlvr2" else set(ANSWERS))
            assert task == "vqa" or sum(scores) == pytest.approx(1)
    assert [some[0].what for some in found["vqa"]] == models["vqa"].answer(pictures[:2], SENTENCES[:2])
    assert [some[0].what for some in found["nlvr2"]] == models["nlvr2"].is_true([pictures[:2]] * 2, SENTENCES[:2])
    with pytest.raises(ValueError, match="top=0"):
        models["vqa"].answer(pictures[:2], SENTENCES[:2], top=0)


def test_folders_that_cannot_be_used(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder"):
        Model.load(tmp_path)
    encoder = Model.load(save(tmp_path / "pretrained", None, tokenizer))
    assert encoder.features([Image.new("RGB", (5, 5))]).shape == (1, 32)
    with pytest.raises(ValueError, match="pretrained model without a task; launchers/finetune.py teaches it one; embe"):
        encoder.embed_texts(["red"])
    with pytest.raises(ValueError, match="pretrained model without a task"):
        encoder.predict(["a.jpg"])
    with pytest.raises(ValueError, match="has no head for words: a model that was pretrained by masking has one"):
        encoder.fill_words(["a [MASK]"])
    with pytest.raises(ValueError, match="do not fit together.*task_head") as error:
        Model.load(save(tmp_path / "other", "vqa", tokenizer, classes=7))
    assert "\n" not in str(error.value)
    wordless = Model.load(save(tmp_path / "wordless", "retrieval", None))
    assert wordless.embed_images([Image.new("RGB", (5, 5))]).shape == (1, 32)
    with pytest.raises(ValueError, match=r"no tokenizer\.spm"):
        wordless.embed_texts(["red"])


def test_pictures_that_cannot_be_opened(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.jpg: undecodable"):
        open_image(broken)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match="uint8"):
        open_image(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"not uint8 \[0, 4, 3\]"):
        open_image(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="it has no pixels"):
        open_image(Image.new("RGB", (4, 0)))
    for form in (Image.new("RGB", (20, 20)), tmp_path / "large.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
        with pytest.raises(ValueError, match="20 x 20|more pixels"):
            open_image(form, max_pixels=300)


def test_pictures_stand_upright() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8))
    turned, file = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6  # the camera was turned by 90 degrees
    picture.save(file, "PNG", exif=turned)
    upright = open_image(Image.open(file))
    assert upright.size == (4, 8)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(picture), -1))


ONE = "are given as a list and have a result each; this is one"
ALONE = {  # task -> what is asked with one input that is in no list
    "a text": ("retrieval", lambda m, p: m.embed_texts("a red circle")),
    "bytes": ("retrieval", lambda m, p: m.embed_texts(b"a red circle")),
    "a picture by name": ("retrieval", lambda m, p: m.embed_images(str(p[0]))),
    "a picture by path": ("retrieval", lambda m, p: m.embed_images(p[0])),
    "a picture of Pillow's": ("retrieval", lambda m, p: m.embed_images(Image.open(p[0]))),
    "an array": ("retrieval", lambda m, p: m.embed_images(np.zeros((8, 8, 3), np.uint8))),
    "a question": ("vqa", lambda m, p: m.answer(p[:1], "w")),
    "a picture to ask about": ("vqa", lambda m, p: m.answer("a", ["what?"])),
    "both": ("vqa", lambda m, p: m.answer(str(p[0]), "what is it?")),
    "a picture to class": ("imagenet", lambda m, p: m.classify(str(p[0]))),
    "a sentence to class": ("text", lambda m, p: m.classify("a red circle")),
    "a picture to tell of": ("captioning", lambda m, p: m.caption(p[0])),
    "a pair": ("nlvr2", lambda m, p: m.is_true((str(p[0]), str(p[1])), ["both", "are red"])),
    "a truth": ("nlvr2", lambda m, p: m.is_true([(p[0], p[1])], "b")),
    "no input": ("captioning", lambda m, p: m.caption(None)),
}


@pytest.mark.parametrize("case", ALONE)
def test_one_input_alone_is_refused(case: str, folders: dict[str, Path], pictures: list[Path]) -> None:
    task, ask = ALONE[case]
    with pytest.raises(ValueError, match=ONE) as error:
        ask(Model.load(folders[task], device="cpu"), pictures)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "ask", "reason"),
    [
        ("text", lambda m, p: m.classify(p), "texts are strings, not PosixPath"),
        ("text", lambda m, p: m.classify([Image.open(p[0])]), "texts are strings, not PngImageFile"),
        ("retrieval", lambda m, p: m.embed_texts([["a", "red"]]), "texts are strings, not list"),
        ("retrieval", lambda m, p: m.embed_texts(["a", "\ud83d"]), r"texts\[1\]: half a surrogate pair"),
        ("vqa", lambda m, p: m.answer(p[:1], [3]), "questions are strings, not int"),
        ("retrieval", lambda m, p: m.embed_images([b"a"]), "an image is a path, a PIL image or an array, not bytes"),
        ("imagenet", lambda m, p: m.classify([p]), "an image is a path, a PIL image or an array, not list"),
        ("captioning", lambda m, p: m.caption([None]), "an image is a path, a PIL image or an array, not NoneType"),
        ("nlvr2", lambda m, p: m.is_true([p[:3]], ["both are red"]), "a sentence is about two images, not 3"),
        ("nlvr2", lambda m, p: m.is_true([p[:1]], ["it is red"]), "a sentence is about two images, not 1"),
    ],
)
def test_inputs_of_another_kind_are_refused(
    task: str, ask: Callable, reason: str, folders: dict[str, Path], pictures: list[Path]
) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        ask(Model.load(folders[task], device="cpu"), pictures)
    assert "\n" not in str(error.value)


def test_lists_may_be_any_that_have_an_order(folders: dict[str, Path], pictures: list[Path]) -> None:
    model = Model.load(folders["retrieval"], device="cpu")
    assert torch.equal(model.embed_texts(text for text in SENTENCES), model.embed_texts(tuple(SENTENCES)))
    assert torch.equal(model.embed_texts(np.array(SENTENCES)), model.embed_texts(SENTENCES))
    batch = np.stack([np.asarray(open_image(pictures[1]))] * 2)
    assert model.embed_images(batch).shape == (2, 32)
    assert model.embed_texts([]).shape == (0, 32)
