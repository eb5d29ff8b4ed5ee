"""Models scored as they are: each score against a plain count, on tars and indexes; what cannot be is one line."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from beit3_dist.checkpoint.formats import read_source
from beit3_dist.checkpoint.model_folder import read_model_folder
from beit3_dist.inference import Model, image_features
from beit3_dist.tasks.parts.frozen import class_accuracies, names_as_vectors, neighbours_votes, probe_scores
from tests.unit.tar_fixtures import picture, write_tar
from tests.unit.test_inference import OBJECTIVES, pretrained, tokenizer  # noqa: F401 (a fixture)
from tests.unit.test_neutral import write_checkpoint
from tools.evaluate import main

NAMES = ["red", "green", "blue"]
CAPTIONS = [["a red circle", "a red square"], ["a green circle"], ["a blue circle", "a blue square", "a red square"]]


def vectors(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def test_accuracies_by_hand() -> None:
    scores = torch.tensor([[3.0, 1, 2], [3, 1, 2], [1, 1, 0], [0, 1, 5]])
    # The third is wrong, as a wrong class has the same score: of class 0 one of two is right.
    found = class_accuracies(scores, torch.tensor([0, 1, 0, 2]))
    assert found == pytest.approx({"acc1": 0.5, "mean_per_class_recall": (1 / 2 + 0 + 1) / 3})
    many = class_accuracies(torch.arange(7.0).repeat(2, 1), torch.tensor([2, 1]))
    assert many["acc5"] == 0.5 and many["acc1"] == 0.0
    assert class_accuracies(torch.eye(4), torch.tensor([0, 1, 2, 3]))["mean_per_class_recall"] == 1.0
    absent = class_accuracies(torch.eye(4)[:2], torch.tensor([0, 1]))
    assert absent["mean_per_class_recall"] == 1.0  # classes without an example do not count


def test_names_in_all_templates() -> None:
    table = dict(zip(["a red", "red!", "a blue", "blue!"], vectors(4), strict=True))
    found = names_as_vectors(lambda texts: torch.stack([table[t] for t in texts]), ["red", "blue"], ["a {}", "{}!"])
    for row, name in enumerate(("red", "blue")):
        mean = (normalize(table[f"a {name}"], dim=0) + normalize(table[f"{name}!"], dim=0)) / 2
        torch.testing.assert_close(found[row], normalize(mean, dim=0))


def test_votes_of_neighbours() -> None:
    train, labels, test = vectors(40), torch.arange(40) % 3, vectors(5, seed=1)
    votes = neighbours_votes(train, labels, test, 3, k=7)
    for row, one in enumerate(test):
        near = sorted(zip(torch.cosine_similarity(one, train).tolist(), labels.tolist(), strict=True))
        expected = torch.zeros(3)
        for similarity, label in near[-7:]:
            expected[label] += torch.tensor((similarity - 1) / 0.07).exp()
        torch.testing.assert_close(votes[row], expected, rtol=1e-4, atol=1e-7)
    assert class_accuracies(neighbours_votes(train, labels, train, 3, k=1), labels)["acc1"] == 1.0


def test_a_probe_finds_the_best_linear_classes() -> None:
    """On classes of a plane with noise it is nearly always right where a plane through other dimensions is not."""
    train, test = 5 * vectors(300) + 100, 5 * vectors(200, seed=1) + 100
    planes = vectors(3, seed=2)
    labels, truth = ((some - 100) @ planes.T for some in (train, test))
    scores, decay = probe_scores(train, labels.argmax(1), test, 3)
    assert class_accuracies(scores, truth.argmax(1))["acc1"] > 0.93 and decay < 1e-2
    noise, chosen = probe_scores(train, torch.arange(300) % 3, test, 3)
    assert class_accuracies(noise, truth.argmax(1))["acc1"] < 0.6 and chosen >= decay


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with several captions, and images with classes."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [
        {"__key__": str(n), "png": picture(n), "txt": "\n".join(texts).encode()} for n, texts in enumerate(CAPTIONS)
    ]
    write_tar(folder / "pairs.tar", pairs)
    for side, count in (("train", 30), ("test", 12)):
        images = [{"__key__": str(n), "png": picture(n % 3), "cls": str(n % 3).encode()} for n in range(count)]
        write_tar(folder / f"{side}.tar", images)
    (folder / "names.txt").write_text("\n".join(NAMES))
    (folder / "templates.txt").write_text("a {} circle\n\na {} square\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:  # noqa: F811
    return pretrained(tmp_path_factory.mktemp("models") / "all", tokenizer, (*OBJECTIVES, "matching"))


def scored(data: Path, *arguments: str | Path) -> dict[str, float]:
    main([*map(str, arguments), "--cache", str(data / "cache"), "--device", "cpu", "--json", str(data / "scores.json")])
    result = json.loads((data / "scores.json").read_text())
    assert result.keys() == {"dataset", "model", "task", "metrics"}
    return result["metrics"]


def images(numbers: range | list[int]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(picture(n))) for n in numbers]


def test_retrieval_of_images_with_several_captions(data: Path, model: Path) -> None:
    found = scored(data, model, "retrieval", "--data", data / "pairs.tar")
    assert [*found] == [f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)]
    used, owners = Model.load(model, "cpu", "retrieval"), [0, 0, 1, 2, 2, 2]
    scores = used.embed_images(images(range(3))) @ used.embed_texts([text for some in CAPTIONS for text in some]).T
    assert found["image_retrieval_recall@1"] == pytest.approx(
        sum(int(scores[:, text].argmax()) == owner for text, owner in enumerate(owners)) / 6
    )
    # "a red square" is said of two images: with equal scores the wrong one comes first.
    hits = [(scores[i][[o == i for o in owners]].max() > scores[i][[o != i for o in owners]].max()) for i in range(3)]
    assert found["text_retrieval_recall@1"] == pytest.approx(sum(map(bool, hits)) / 3)
    assert found["image_retrieval_recall@5"] == 1.0
    merged = scored(data, model, "retrieval", "--data", data / "pairs.tar", "--merge_captions")
    texts = [*dict.fromkeys(text for some in CAPTIONS for text in some)]
    best = (used.embed_images(images(range(3))) @ used.embed_texts(texts).T).argmax(1).tolist()
    share = sum(texts[place] in CAPTIONS[image] for image, place in enumerate(best)) / 3
    assert merged["text_retrieval_recall@1"] == pytest.approx(share)


def test_the_best_are_put_in_order_by_matching(data: Path, model: Path) -> None:
    arguments = (data, model, "retrieval", "--data", data / "pairs.tar")
    used, texts = Model.load(model, "cpu", "retrieval"), [text for some in CAPTIONS for text in some]
    scores = used.embed_images(images(range(3))) @ used.embed_texts(texts).T
    pairs = [(image, text) for image in range(3) for text in range(6)]
    logits = used.match([images([image])[0] for image, _ in pairs], [texts[text] for _, text in pairs]).view(3, 6)
    by_both, right = scores + logits, torch.tensor([0, 0, 1, 2, 2, 2])
    everything = scored(*arguments, "--rerank", "6")  # of all
    assert everything["image_retrieval_recall@1"] == pytest.approx((by_both.argmax(0) == right).float().mean().item())
    alone, one = (scored(*arguments, *more) for more in ((), ("--rerank", "1")))
    assert all(one[name] == alone[name] for name in alone if "image" in name)  # the best stays so
    two = scores.topk(2, dim=0).indices
    best = two.gather(0, by_both.gather(0, two).argmax(0)[None])[0]
    found = scored(*arguments, "--rerank", "2")["image_retrieval_recall@1"]
    assert found == pytest.approx((best == right).float().mean().item())


def test_retrieval_of_an_index_is_that_of_tars(data: Path, model: Path) -> None:
    """Whose texts are token ids."""
    words = Model.load(model, "cpu", "retrieval").task.tokenizer
    lines = []
    for number, texts in enumerate(CAPTIONS):
        (data / f"{number}.png").write_bytes(picture(number))
        for text in texts:
            record = {"image_path": f"{number}.png", "text_segment": words.encode(text), "image_id": 10 + number}
            lines.append(json.dumps(record))
    (data / "index.jsonl").write_text("\n".join(lines))
    from_index = scored(data, model, "retrieval", "--data", data / "index.jsonl", "--images", data)
    assert from_index == scored(data, model, "retrieval", "--data", data / "pairs.tar")


def test_classes_by_names_in_templates(data: Path, model: Path) -> None:
    options = ("--names", data / "names.txt", "--templates", data / "templates.txt")
    found = scored(data, model, "classes", "--data", data / "test.tar", *options)
    used = Model.load(model, "cpu", "retrieval")
    names = normalize(sum(used.embed_texts([f"a {n} {s}" for n in NAMES]) for s in ("circle", "square")), dim=1)
    guesses = (used.embed_images(images([n % 3 for n in range(12)])) @ names.T).argmax(1)
    assert found["acc1"] == pytest.approx((guesses == torch.arange(12) % 3).float().mean().item())
    assert found.keys() == {"acc1", "mean_per_class_recall"}


def test_captions(data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used = Model.load(model, "cpu", "captioning")
    own = used.caption(images(range(3)), max_words=6)
    write_tar(data / "own.tar", [{"__key__": str(n), "png": picture(n), "txt": f"{text}\nother".encode()}
                                 for n, text in enumerate([*own[:2], "never"])])  # fmt: skip
    found = scored(data, model, "captions", "--data", data / "own.tar", "--max_words", "6")
    assert found == {"exact_match": pytest.approx(2 / 3)}
    assert "exact_match 0.6667" in capsys.readouterr().out


def test_frozen_features_of_a_running_training(data: Path, model: Path, tmp_path: Path) -> None:
    """Of its newest checkpoint; the three pictures of three classes come again and again."""
    folder = read_model_folder(model)
    recipe = "text_tokenizer: none\nobjectives: {masked_data_modeling: {}}\n"
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    values = {n: w for n, w in folder.weights.items() if not n.startswith("objective_heads")}
    write_checkpoint(run / "checkpoints" / "step_0000007", values=values, model=folder.config, recipe=recipe)
    options = ("--data", data / "test.tar", "--train", data / "train.tar", "--names", data / "names.txt")
    assert scored(data, run, "knn", *options) == {
        f"knn{k}_{name}": 1.0 for k in (10, 20) for name in ("acc1", "mean_per_class_recall")
    }
    assert scored(data, run, "probe", *options, "--features", "cls") == {
        "lp_acc1": 1.0,
        "lp_mean_per_class_recall": 1.0,
    }
    features = image_features(read_source(run), "run", "cpu", cls=True)
    assert features(images(range(3))).shape == (3, 32)
    with pytest.raises(SystemExit):
        scored(data, run, "retrieval", "--data", data / "pairs.tar")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classes", "--data", "pairs.tar"], "--names is not given, which classes needs"),
        (["knn", "--data", "test.tar", "--names", "names.txt"], "--train is not given, which knn needs"),
        (["retrieval", "--data", "nothing.tar"], "--data: no file matches"),
        (["retrieval", "--data", "pairs.tar", "--rerank", "-1"], "--rerank -1 is negative"),
        (["retrieval", "--data", "pairs.tar", "--at_most", "-3"], "--at_most -3 is negative"),
        (["retrieval", "--data", "pairs.tar", "--json", "nowhere/a.json"], "--json .*: there is no folder nowhere"),
        (["classes", "--data", "pairs.tar", "--names", "names.txt"], "--data: 3 faults: .*without a .cls member"),
        (
            ["classes", "--data", "test.tar", "--names", "names.txt", "--templates", "names.txt"],
            "lines that have {}",
        ),
        (["retrieval", "--data", "pairs.tar", "--of", "masked"], "none of its objectives fits for retrieval"),
        (["captions", "--data", "pairs.tar", "--of", "masked"], "none of its objectives fits for captioning"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    arguments: list[str],
    message: str,
    data: Path,
    model: Path,
    tokenizer: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--of" in arguments:
        model, arguments = pretrained(tmp_path / "masked", tokenizer, OBJECTIVES[:1]), arguments[:-2]
    there = [str(data / a) if a.endswith((".tar", ".txt")) else a for a in arguments]
    with pytest.raises(SystemExit) as ended:
        main([str(model), *there, "--cache", str(data / "cache"), "--device", "cpu"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert re.search(message.replace("{}", r"\{\}"), line), line
