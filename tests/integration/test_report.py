"""The report of a real small run: its numbers against plain re-computations, its picture, and mistakes as one line."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from beit3_dist.checkpoint.find import find
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.command_line import to_yaml
from beit3_dist.config import BatchConfig, CheckpointConfig, EvalConfig, RunConfig
from beit3_dist.data.batch import MixedBatches, Request, requests_from
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.image_tokenizer.drawing import mean_patches
from beit3_dist.image_tokenizer.files import load_vqkd
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.masked_data_modeling import NAME
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.reports import examples, figure, opened, targets
from beit3_dist.reports.opened import Record
from beit3_dist.train import guesses as guesses_of
from beit3_dist.train.target_watch import entropy
from tests.integration.runs import metrics, run_config, write_recipe
from tests.launching import launch
from tools import report

STEPS = 24
PICTURES = 4

STREAMS = ("image", "text", "pair_image", "pair_text")
TITLES = dict(zip(STREAMS, ("images", "texts", "images of pairs", "captions of pairs"), strict=True))
PICTURES_TOP = figure.PANELS_TOP + figure.ROW_OF_PANELS


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 24 steps, three validations and its report."""
    folder = tmp_path_factory.mktemp("report")
    config = run_config(folder, steps=STEPS, checkpoint=CheckpointConfig(every=8))
    held_out = {name: str(folder / f"{name}-1.tar") for name in ("images", "texts", "pairs")}
    config = replace(config, eval=EvalConfig(every=8, batches=1, **held_out))
    trained = launch("pretrain", "--config", str(write_recipe(config, folder / "recipe.yaml")))
    assert trained.returncode == 0, trained.stderr
    reported = launch("tools.report", config.out, "--pictures", str(PICTURES))
    assert reported.returncode == 0, reported.stderr
    (folder / "summary.txt").write_text(reported.stdout)
    return config


@pytest.fixture(scope="module")
def content(config: RunConfig) -> Record:
    """report.json."""
    return json.loads((Path(config.out) / "report.json").read_text())


def documented_keys() -> set[str]:
    """The names in the left column of the docstring's table, without what stands in braces."""
    left = [line.strip().partition("  ")[0] for line in (report.__doc__ or "").split("is null:")[1].splitlines()]
    while any("{" in line for line in left):
        left = [re.sub(r"\{[^{}]*\}", "", line) for line in left]
    return {name.strip() for line in left if line for name in line.split(",")}


def test_the_json_has_the_documented_keys(content: Record) -> None:
    assert set(content) == {
        "run", "checkpoint", "checkpoint_step", "steps", "planned_steps", "wall_s", "samples", "sets", "samples_per_s",
        "data_wait_share", "losses", "accuracies", "entropies", "baselines", "targets", "sampled", "held_out_step",
        "zero_shot", "pictures", "codes_right", "collapsed",
    }  # fmt: skip
    assert set(content) == documented_keys()
    for name in ("losses", "accuracies", "entropies", "baselines", "targets"):
        assert set(content[name]) == set(STREAMS)
    assert content["checkpoint_step"] == content["steps"] == content["held_out_step"] == STEPS
    assert content["pictures"] == "held-out"


def test_losses_and_times_are_those_of_the_metrics(config: RunConfig, content: Record) -> None:
    records = metrics(config.out)
    held_out = json.loads((Path(config.out) / "eval.jsonl").read_text().splitlines()[-1])
    for field, prefix in (("losses", "loss"), ("accuracies", "acc")):
        for name in STREAMS:
            values = [record[f"{prefix}_{name}"] for record in records]
            assert content[field][name]["first"] == values[0]
            assert content[field][name]["last"] == pytest.approx(sum(values[4:]) / 20, rel=1e-12)
            assert content[field][name]["held_out"] == held_out[f"{prefix}_{name}"]
    assert content["samples"] == dict.fromkeys(("images", "texts", "pairs"), 4 * STEPS)
    assert content["wall_s"] == pytest.approx(sum(record["step_s"] for record in records))
    assert content["samples_per_s"] == pytest.approx(12 * STEPS / content["wall_s"])


def test_entropies_and_baselines_equal_a_plain_count(config: RunConfig, content: Record) -> None:
    """The same samples, one target after the other."""
    at_once = opened.SAMPLES_AT_ONCE
    batch = BatchConfig(images=at_once, texts=at_once, pairs=at_once)
    batches = MixedBatches(replace(config, batch=batch), 32, 0, 1, annotators=[*objectives_of(config)])
    tokenizer = load_vqkd(config.image_tokenizer)
    counts: dict[str, Counter[int]] = {name: Counter() for name in STREAMS}
    number = content["sampled"]["images"] // at_once
    assert number * at_once >= 2000
    for request in islice(requests_from((0, 0, 0), batches.config.batch), number):
        micro_batch = batches[request]
        seen = SeenImages(micro_batch, torch.device("cpu"))
        codes = seen.by_stream(tokenizer.encode(seen.tokenizer.float() / 255))
        for stream, of_images, of_texts in (
            ("images", "image", ""),
            ("pairs", "pair_image", "pair_text"),
            ("texts", "", "text"),
        ):
            samples = micro_batch.streams[stream]
            drawn = samples.annotations[NAME]
            for picture, hidden in zip(codes.get(stream, []), drawn.get("image_mask", []), strict=True):
                counts[of_images].update(picture[hidden].tolist())
            for words, hidden in zip(samples.text if of_texts else [], drawn.get("text_mask", []), strict=True):
                counts[of_texts].update(words[hidden].tolist())
    for name, count in counts.items():
        total = count.total()
        assert content["targets"][name] == total > 2000
        expected = -sum(n / total * math.log(n / total) for n in count.values())
        # Both sum in float64, in another order.
        assert content["entropies"][name] == pytest.approx(expected, rel=1e-9)
        assert content["baselines"][name] == pytest.approx(count.most_common(1)[0][1] / total, rel=1e-6)


def test_guesses_are_those_that_the_objective_counts(config: RunConfig, content: Record) -> None:
    """Right guesses of the examples, drawn one by one, against the training objective's count over the same samples."""
    run = opened.open_run(Path(config.out), report.PROGRAM)
    shown = examples.examples(run, torch.device("cpu"), PICTURES)
    images, pairs = shown["image"], shown["pair_image"]
    model = BEiT3(config.model, device="meta")
    checkpoint = find("auto", Path(config.out) / "checkpoints")
    assert checkpoint is not None
    model.load_state_dict(read_weights(checkpoint), assign=True)
    objective = PretrainingModule(model.eval(), run.objectives, config.seed).eval()
    right, hidden = torch.zeros(4), torch.zeros(4)
    lengths = run.shown.lengths()
    for i in range(PICTURES):
        batch = run.shown[Request((i * lengths[0] // PICTURES, 0, i * lengths[2] // PICTURES), 0)]
        inputs = run.objectives.prepare(
            batch, torch.device("cpu"), lambda p: run.image_tokenizer.encode(p.float() / 255)
        )
        with torch.no_grad():
            right += objective(*inputs, torch.ones(4), 0)[1][1]
        hidden += torch.tensor(run.objectives.counts(batch))
    image, _, pair_image, pair_text = right.tolist()

    def hits(some: list[guesses_of.Example]) -> int:
        return sum(int((e.guesses == e.codes)[e.hidden].sum()) for e in some)

    captions = " ".join(guesses_of.in_brackets(pair.caption) for pair in pairs)
    words = ["→" not in word for word in re.findall(r"\[[^]]*]", captions)]
    assert (hits(images), hits(pairs), sum(words), len(words)) == (image, pair_image, pair_text, hidden[3])
    shares = {"image": image / float(hidden[0]), "pair_image": pair_image / float(hidden[2])}
    assert content["codes_right"] == pytest.approx(shares)


def test_the_picture_is_drawn(config: RunConfig) -> None:
    pixels = np.asarray(Image.open(Path(config.out) / "report.png").convert("RGB"))
    height, width, _ = pixels.shape
    assert width == 1400 and height > 1400
    curves = pixels[figure.PANELS_TOP : figure.PANELS_TOP + figure.PANELS_HEIGHT].reshape(-1, 3)
    for color in figure.COLORS:
        assert (curves == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(1).any(), f"no curve is {color}"
    first_tile = pixels[PICTURES_TOP + figure.HEADING :, figure.LEFT :][: figure.LARGEST_TILE]
    assert len(np.unique(first_tile.reshape(-1, 3), axis=0)) > 100


def test_the_summary_says_below_or_above(config: RunConfig, content: Record) -> None:
    summary = (Path(config.out).parent / "summary.txt").read_text()
    for name in STREAMS:
        line = next(line for line in summary.splitlines() if line.startswith(f"{TITLES[name]}  "))
        for key in ("last", "held_out"):
            loss = content["losses"][name][key]
            side = "below" if loss < content["entropies"][name] else "above"
            assert f"{loss:.3f} {side}" in line
        assert f"{content['entropies'][name]:.3f}" in line
    assert f"{STEPS} of {STEPS} steps" in summary and "report.png" in summary and "report.json" in summary


def test_a_run_without_validation_shows_training_samples(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "SAMPLES", opened.SAMPLES_AT_ONCE)  # enough for what this test looks at
    out = copied(config, tmp_path, replace(config, eval=EvalConfig()))
    (out / "eval.jsonl").unlink()
    report.main([str(out), "--pictures", "1"])
    content = json.loads((out / "report.json").read_text())
    assert content["pictures"] == "training" and content["held_out_step"] is None
    assert content["losses"]["image"]["held_out"] is None and (out / "report.png").exists()


def copied(config: RunConfig, folder: Path, changed: RunConfig | None = None) -> Path:
    """A copy of the run folder, with another config where one is given."""
    out = Path(shutil.copytree(config.out, folder / "run"))
    (out / "config.yaml").write_text(to_yaml(changed or config))
    return out


def spoil(config: RunConfig, folder: Path, what: str) -> Path:
    """A run folder that cannot be reported."""
    data = replace(config.data, pairs=str(folder / "gone-*.tar"))
    match what:
        case "no folder":
            return folder / "nowhere"
        case "no run":
            return folder
        case "data are gone":
            return copied(config, folder, replace(config, data=data))
        case "tokenizer is gone":
            return copied(config, folder, replace(config, image_tokenizer=str(folder / "gone.pth")))
        case "held-out data are gone":
            return copied(config, folder, replace(config, eval=replace(config.eval, images=str(folder / "gone.tar"))))
    out = copied(config, folder)
    if what == "no checkpoint":
        shutil.rmtree(out / "checkpoints")
    elif what == "no step":
        (out / "metrics.jsonl").write_text("")
    elif what == "damaged metrics":
        (out / "metrics.jsonl").write_text("nonsense\n")
    return out


@pytest.mark.parametrize(("what", "named"), [
    ("no folder", "nowhere"), ("no run", "config.yaml"), ("no checkpoint", "checkpoints"), ("no step", "metrics.jsonl"),
    ("damaged metrics", "line 1"), ("data are gone", "data.pairs"), ("held-out data are gone", "eval.images"),
    ("tokenizer is gone", "image_tokenizer"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, named: str
) -> None:
    with pytest.raises(SystemExit) as end:
        report.main([str(spoil(config, tmp_path, what))])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert named in error and len(error.strip().splitlines()) == 1, error


def test_the_entropy_of_a_known_distribution() -> None:
    assert entropy(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(math.log(4), rel=1e-12)
    assert entropy(torch.tensor([0, 7])) == 0


def test_a_code_without_patches_looks_like_its_nearest_neighbour() -> None:
    sums = torch.tensor([[10.0, 20.0], [0.0, 0.0], [90.0, 60.0]], dtype=torch.float64)
    codebook = torch.tensor([[1.0, 0.0], [0.1, 1.0], [0.0, 1.0]])
    looks = mean_patches(sums, torch.tensor([2, 0, 3]), codebook)
    assert looks.tolist() == [[5, 10], [30, 20], [30, 20]]


def test_the_running_mean_of_few_values() -> None:
    values = np.array([4.0, 1.0, 5.0, 3.0, 7.0])
    expected = [values[max(0, i - 2) : i + 1].mean() for i in range(5)]
    assert figure.running_mean(values, 3) == pytest.approx(expected)


def test_hidden_patches_are_drawn_where_they_are() -> None:
    picture = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4)
    looks = torch.stack([torch.full((3, 2, 2), level, dtype=torch.uint8) for level in (200, 210)])
    hidden: Tensor = torch.tensor([False, True, False, False])  # the upper right patch
    example = guesses_of.Example(picture, hidden, torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 0, 0]))
    original, masked, guessed, true = guesses_of.tiles(example, looks)
    assert (original == picture.permute(1, 2, 0).numpy()).all()
    for drawn, levels in ((masked, {guesses_of.GREY, guesses_of.GREY_EDGE}), (guessed, {200}), (true, {210})):
        assert set(np.unique(drawn[:2, 2:])) == levels
        assert (drawn[2:] == original[2:]).all() and (drawn[:2, :2] == original[:2, :2]).all()


def test_hidden_words_of_a_caption_stand_in_brackets(config: RunConfig) -> None:
    tokenizer = TextTokenizer(config.text_tokenizer)
    words = torch.tensor([tokenizer.bos, *tokenizer.encode("a red dog runs"), tokenizer.eos])
    mask = torch.zeros_like(words, dtype=torch.bool)
    assert guesses_of.in_brackets(guesses_of.pieces_of(tokenizer, words, mask, words)) == "a red dog runs"
    mask[1] = mask[-2] = True
    guesses = words.clone()
    guesses[-2] = tokenizer.unk
    caption = guesses_of.in_brackets(guesses_of.pieces_of(tokenizer, words, mask, guesses))
    assert caption.startswith("[") and "]" in caption.split("red")[0] and "[<unk>→" in caption


def test_a_record_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert opened.read_records(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_page_shows_what_the_model_makes_of_the_same_examples(config: RunConfig, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    report.main([config.out, "--html", str(page), "--pictures", "2"])
    shown = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])["runs"][0]
    assert shown["checkpoint_step"] == shown["step"] == STEPS and shown["pictures"] == "held-out"
    drawn = examples.examples(opened.open_run(Path(config.out), report.PROGRAM), torch.device("cpu"), 2)
    for name, some in drawn.items():
        for example, told in zip(some, shown["examples"][name], strict=True):
            assert told["caption"] == [[piece.text, piece.guess] for piece in example.caption]
            original = Image.open(io.BytesIO(base64.b64decode(told["tiles"][0].split(",")[1])))
            assert np.abs(np.asarray(original, dtype=int) - example.image.permute(1, 2, 0).numpy()).mean() < 8
            assert len({*told["tiles"]}) > 1
    assert shown["losses"]["image"]["title"] == "images" and shown["entropies"].keys() == shown["losses"].keys()


@pytest.mark.parametrize(("arguments", "named"), [
    (["{run}", "{run}"], "--html"), (["{run}", "--html", "page.png"], ".html"),
    (["{run}", "--live", "--out", "a.png"], "--out"),
    (["nowhere", "--html", "page.html"], "nowhere"), (["{run}", "--html", "page.html", "--pictures", "13"], "0 to 12"),
])  # fmt: skip
def test_a_mistake_about_pages_is_one_line(
    config: RunConfig, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as end:
        report.main([argument.format(run=config.out) for argument in arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2 and named in error and len(error.strip().splitlines()) == 1, error
