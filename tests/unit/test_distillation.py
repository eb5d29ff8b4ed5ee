"""Distillation: losses against plain derivations from whole passes, what they cost, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, kl_div, linear, log_softmax, smooth_l1_loss
from torch.utils.flop_counter import FlopCounterMode

from beit3_dist.checkpoint.model_folder import save_model_folder
from beit3_dist.config import BatchConfig, ModelConfig, RunConfig
from beit3_dist.data.batch import MicroBatch, MixedBatches, Request
from beit3_dist.model import BEiT3
from beit3_dist.model.initialization import initial_value, materialize
from beit3_dist.objectives.distillation import NAME, DistillationConfig
from beit3_dist.objectives.image_classification import ImageClassificationConfig
from beit3_dist.objectives.lessons import LessonConfig
from beit3_dist.objectives.masked_data_modeling import MaskedDataModelingConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.soft_targets import divergence
from beit3_dist.objectives.together import Objectives, PretrainingModule
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.preflight import prepare_run
from beit3_dist.teachers.build import build_teacher
from beit3_dist.teachers.config import TeacherConfig
from beit3_dist.train.totals import host_totals
from tests.integration.runs import run_config
from tests.micro_batches import CPU, precomputed_codes
from tests.unit import test_teachers as clip
from tests.unit.test_image_classification import CLASSES, labelled, opened

MASKING = MaskedDataModelingConfig.__module__.rpartition(".")[2]
WIDTH = 16
ALONE = Mesh(0, 1, 0, 1, CPU)


def teacher_folder(folder: Path, run: RunConfig, seed: int = 5, **changes: Any) -> str:
    """A teacher of another size than the run's model, that tells classes apart, too."""
    settings: dict[str, Any] = {"layers": 1, "width": WIDTH, "heads": 2, "ffn_width": 24, "vl_expert_layers": 0}
    config = replace(run.model, **settings | changes)
    model = BEiT3(config, device="meta")
    weights = {name: initial_value(name, p.shape, config, seed) * 5 for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(seed)
    weights["objective_heads.image_classification.weight"] = torch.randn(CLASSES, config.width, generator=draw)
    weights["objective_heads.image_classification.bias"] = torch.randn(CLASSES, generator=draw)
    path = folder / f"teacher-{seed}"
    if not path.exists():
        save_model_folder(path, weights, config, text_tokenizer=Path(run.text_tokenizer))
    return str(path)


def beit3(folder: Path, run: RunConfig, **lesson: Any) -> LessonConfig:
    return LessonConfig(teacher=TeacherConfig(kind="beit3", weights=teacher_folder(folder, run)), **lesson)


def with_clip(folder: Path) -> TeacherConfig:
    path = clip.write(clip.clip_file(), "pth", folder)
    return TeacherConfig(kind="clip", weights=path, head_dim=clip.HEAD)


def distilled(run: RunConfig, lessons: Mapping[str, LessonConfig], **others: Any) -> RunConfig:
    return replace(run, objectives=others | {NAME: DistillationConfig(**lessons)})


def taught(run: RunConfig) -> tuple[Objectives, PretrainingModule]:
    """The objectives with their teachers, and a model whose values are large enough to tell apart."""
    objectives = objectives_of(run)
    for objective in objectives:
        objective.use_teachers(objective.open_teachers(), CPU, None)
    model = objectives.build()
    materialize(model, lambda name, shape: initial_value(name, shape, run.model, 0) * 5, "cpu")
    return objectives, PretrainingModule(model, objectives, seed=0).eval()


def statistics(objectives: Objectives, module: PretrainingModule, batch: MicroBatch) -> dict[str, tuple[float, float]]:
    """Loss -> its sum and its hits."""
    prepared = objectives.prepare(batch, CPU, precomputed_codes(module.model.config))
    counts = torch.tensor(objectives.counts(batch))
    contribution, found = module(*prepared, counts, 0)
    weights = torch.tensor([loss.weight for loss in objectives.losses])
    torch.testing.assert_close(contribution, (weights * found[0] / counts).sum())
    names = [loss.name for loss in objectives.losses]
    return dict(zip(names, zip(*found.tolist(), strict=True), strict=True))


def loaded(path: str) -> BEiT3:
    teacher = build_teacher("beit3", 4, weights=path)
    return teacher.model  # type: ignore[attr-defined]


def whitened(features: Tensor) -> Tensor:
    centred = features - features.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_losses_equal_plain_derivations(tmp_path: Path) -> None:
    """Masked features of images from CLIP; distributions of hidden words; all features of pairs: beside masking."""
    run = run_config(tmp_path, batch=BatchConfig(images=4, texts=4, pairs=4))
    lessons = {
        "images": LessonConfig(learns="masked_features", teacher=with_clip(tmp_path), channels=clip.JOINT, weight=0.5),
        "texts": beit3(tmp_path, run, learns="masked_logits", temperature=2.0),
        "pairs": beit3(tmp_path, run, learns="features", compared="smooth_l1", channels=WIDTH),
    }
    run = distilled(run, lessons, **{MASKING: MaskedDataModelingConfig()})
    objectives, module = taught(run)
    batch = MixedBatches(run, 32, 0, 1, annotators=[*objectives])[Request((0, 0, 0), 0)]
    found, model = statistics(objectives, module, batch), module.model
    heads = model.objective_heads[NAME]
    assert set(heads) == {"distilled_image", "distilled_pair_image", "distilled_pair_text"}
    streams, teacher = batch.streams, loaded(lessons["texts"].teacher.weights)
    padding = {name: torch.arange(s.text.shape[1]) >= s.lengths[:, None]
               for name, s in streams.items() if s.text is not None}  # fmt: skip
    seen = objectives.prepare(batch, CPU, precomputed_codes(model.config))[0].images  # after the jitter
    pixels = {"images": seen[:4], "pairs": seen[4:8]}

    drawn = streams["images"].annotations[MASKING]
    hidden = model.encode(pixels["images"], image_mask=drawn["image_mask"])[:, 1:][drawn["image_mask"]]
    network = build_teacher("clip", 4, weights=lessons["images"].teacher.weights, head_dim=clip.HEAD)
    target = whitened(network((pixels["images"] + 1) / 2)[drawn["image_mask"]])
    expected = (1 - cosine_similarity(heads["distilled_image"](hidden), target)).sum()
    assert found["distilled_image"] == (pytest.approx(expected.item(), rel=1e-5), 0)

    drawn = streams["texts"].annotations[MASKING]
    both = [m.encode(text=drawn["text"], text_padding=padding["texts"])[drawn["text_mask"]] for m in (model, teacher)]
    ours, theirs = (log_softmax(m.text_head.logits(h) / 2, 1) for m, h in zip((model, teacher), both, strict=True))
    expected = kl_div(ours, theirs, log_target=True, reduction="sum")
    alike = (ours.argmax(1) == theirs.argmax(1)).sum()
    assert found["distilled_text"] == (pytest.approx(expected.item(), rel=1e-5), alike.item())

    whole = [m.encode(pixels["pairs"], streams["pairs"].text, padding["pairs"]) for m in (model, teacher)]
    patches, words = slice(1, 1 + model.config.patches), slice(1 + model.config.patches, None)
    real = ~padding["pairs"]
    for side, where, keep in (("image", patches, torch.ones(4, 16, dtype=torch.bool)), ("text", words, real)):
        ours, theirs = (hidden[:, where][keep] for hidden in whole)
        predicted = heads[f"distilled_pair_{side}"](ours)
        expected = smooth_l1_loss(predicted, whitened(theirs), reduction="none", beta=2.0).mean(1).sum()
        assert found[f"distilled_pair_{side}"][0] == pytest.approx(expected.item(), rel=1e-5)
    distilling = next(objective for objective in objectives if objective.name == NAME)
    assert distilling.counts(batch)[1:3] == [4 * 16, int(real.sum())]
    assert distilling.target_flops({"images": 2, "texts": 0, "pairs": 0}) > 2 * 2 * 9 * 12 * clip.WIDTH**2
    assert not any("teacher" in name for name, _ in module.named_parameters())


@pytest.mark.parametrize("kind", ["beit3", "timm"])
def test_classes_are_learnt_by_the_head_that_classifies(kind: str, tmp_path: Path) -> None:
    run = labelled(tmp_path, [f"{n % CLASSES}".encode() for n in range(16)])
    if kind == "timm":
        import timm

        torch.manual_seed(0)
        torch.save(timm.create_model("resnet10t", num_classes=CLASSES).state_dict(), tmp_path / "resnet.pth")
        teacher = TeacherConfig(kind="timm", name="resnet10t", weights=str(tmp_path / "resnet.pth"))
        lesson = LessonConfig(learns="classes", teacher=teacher, temperature=4.0)
    else:
        lesson = beit3(tmp_path, run, learns="classes", temperature=4.0)
    classification = ImageClassificationConfig(classes=CLASSES, weight=0.3)
    run = distilled(run, {"images": lesson}, image_classification=classification)
    objectives, module = taught(run)
    batch = opened(run)[Request((0, 0, 0), 0)]
    found = statistics(objectives, module, batch)
    images = objectives.prepare(batch, CPU)[0].images
    ours = module.model.objective_heads["image_classification"](module.model.encode(images)[:, 0])
    if kind == "timm":
        network = timm.create_model("resnet10t", num_classes=CLASSES).eval()
        network.load_state_dict(torch.load(tmp_path / "resnet.pth", weights_only=True))
        config = timm.data.resolve_model_data_config(network)
        side, mean, std = config["input_size"][-1], *(torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
        larger = torch.nn.functional.interpolate((images + 1) / 2, (side, side), mode="bicubic", antialias=True)
        theirs = network((larger.clamp(0, 1) - mean) / std)
    else:
        network = build_teacher("beit3", 4, weights=lesson.teacher.weights)
        draw = torch.Generator().manual_seed(5)
        weight, bias = torch.randn(CLASSES, WIDTH, generator=draw), torch.randn(CLASSES, generator=draw)
        theirs = linear(network.model.encode(images)[:, 0], weight, bias)
    both = [log_softmax(logits / 4, 1) for logits in (ours, theirs)]
    expected = kl_div(*both, log_target=True, reduction="sum").item()
    assert found["distilled_image"][0] == pytest.approx(expected, rel=1e-4)
    assert found["distilled_image"][1] == (ours.argmax(1) == theirs.argmax(1)).sum()


def test_masked_features_take_the_place_of_codes(tmp_path: Path) -> None:
    """Images alone, of which nothing else is learnt, as EVA does; beside masked words, as in pairs."""
    alone = replace(run_config(tmp_path), image_tokenizer="", batch=BatchConfig(images=4, texts=0, pairs=0))
    masking = MaskedDataModelingConfig(predict_codes=False)
    lesson = LessonConfig(learns="masked_features", teacher=with_clip(tmp_path), channels=clip.JOINT)
    for run, stream in ((alone, "images"), (replace(alone, batch=BatchConfig(images=0, texts=0, pairs=4)), "pairs")):
        with pytest.raises(ValueError, match="masked_data_modeling.predict_codes=false: nobody says .*distillation"):
            objectives_of(replace(run, objectives={MASKING: masking}))
        run = distilled(run, {stream: lesson}, **{MASKING: masking})
        assert prepare_run(run, ALONE).image_tokenizer is None
        objectives, module = taught(run)
        batch = MixedBatches(run, 32, 0, 1, annotators=[*objectives])[Request((0, 0, 0), 0)]
        own = {"distilled_image"} if stream == "images" else {"pair_text", "distilled_pair_image"}
        assert statistics(objectives, module, batch).keys() == own and not objectives.coded
        drawn, pixels = batch.streams[stream].annotations[MASKING], objectives.prepare(batch, CPU)[0].images
        samples, text = batch.streams[stream], {}
        if stream == "pairs":
            text = {
                "text": drawn["text"],
                "text_padding": torch.arange(drawn["text"].shape[1]) >= samples.lengths[:, None],
            }
        hidden = module.model.encode(pixels, image_mask=drawn["image_mask"], **text)[:, 1:17][drawn["image_mask"]]
        name = (own - {"pair_text"}).pop()
        network = build_teacher("clip", 4, weights=lesson.teacher.weights, head_dim=clip.HEAD)
        target = whitened(network((pixels + 1) / 2)[drawn["image_mask"]])
        expected = (1 - cosine_similarity(module.model.objective_heads[NAME][name](hidden), target)).sum()
        assert statistics(objectives, module, batch)[name][0] == pytest.approx(expected.item(), rel=1e-5)


def test_divergence_is_torchs_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit3_dist.objectives.soft_targets.CHUNK", 20)
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 7, 9, generator=draw)
    leaf = ours.clone().requires_grad_()
    losses = kl_div(log_softmax(leaf / 3, 1), log_softmax(theirs / 3, 1), log_target=True, reduction="none").sum(1)
    factors = torch.rand(7, generator=draw)
    (losses * factors).sum().backward()
    mine = ours.clone().requires_grad_()
    found = divergence(mine * 1, lambda rows: theirs[rows], 3.0)
    (found[0] * factors).sum().backward()
    torch.testing.assert_close(found, torch.stack([losses, (ours.argmax(1) == theirs.argmax(1)).float()]))
    torch.testing.assert_close(mine.grad, leaf.grad)
    assert divergence(ours[:0].clone(), lambda rows: theirs[rows]).shape == (2, 0)


def test_flops_equal_torchs_counter(tmp_path: Path) -> None:
    """Of the student; the teacher's own are told apart."""
    run = run_config(tmp_path, batch=BatchConfig(images=4, texts=4, pairs=4))
    lessons = {
        "images": beit3(tmp_path, run, learns="features", channels=WIDTH),
        "texts": beit3(tmp_path, run, learns="masked_logits"),
    }
    run = distilled(run, lessons, **{MASKING: MaskedDataModelingConfig()})
    objectives, module = taught(run)
    batch = MixedBatches(run, 32, 0, 1, annotators=[*objectives])[Request((0, 0, 0), 0)]
    for name in ("texts", "pairs"):  # no padding, which torch would count inside attention
        batch.streams[name].lengths[:] = batch.streams[name].text.shape[1]
    prepared = objectives.prepare(batch, CPU, precomputed_codes(run.model))
    counts = torch.tensor(objectives.counts(batch))
    distilling = next(objective for objective in objectives if objective.name == NAME)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*prepared, counts, 0)[0].backward()
    words, codes = run.model.vocab_size, run.model.visual_vocab_size
    assert distilling.head_flops([10, 3]) == 2 * 32 * (10 * WIDTH + 3 * words) and codes != words
    teachers_head = 2 * int(counts[-1]) * WIDTH * words
    embedded = 3 * 4 * run.model.patches * 3 * run.model.patch_size**2 * run.model.width  # masked, whole, of pairs
    assert host_totals([batch], objectives).flops - 2 * embedded == counter.get_total_flops() - teachers_head


@pytest.mark.parametrize(
    ("lesson", "words"),
    [
        ({"learns": "features", "channels": WIDTH + 1}, "channels=17, but this teacher's features have 16"),
        ({"learns": "features"}, "distillation.pairs.channels=0: give the number"),
        ({"learns": "classes"}, "distillation.pairs.learns=classes: images alone have classes"),
        ({"learns": "masked_logits", "teacher": {"model": {"visual_vocab_size": 9}}}, "tells 9 codes of 16 patches"),
        ({"learns": "masked_logits", "teacher": {"model": {"vocab_size": 300}}}, "has another text tokenizer"),
        ({"learns": "features", "channels": WIDTH, "teacher": {"model": {"max_text_length": 9}}}, "at most 9 tokens"),
        ({"learns": "masked_logits", "teacher": {"kind": "efficientnet_lite0"}}, "does not say: use beit3"),
        ({"learns": "features", "channels": 3, "teacher": {"kind": "beit3", "weights": "no"}}, "teacher.weights: .*no"),
        ({}, "learns nothing"),
    ],
)
def test_what_does_not_fit_is_one_line(lesson: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = run_config(tmp_path)
    teacher = dict(lesson.pop("teacher", {}))
    changes = teacher.pop("model", {})
    weights = teacher_folder(tmp_path, run, **changes)
    of = TeacherConfig(**(teacher or {"kind": "beit3", "weights": weights}))
    run = distilled(run, {"pairs": LessonConfig(teacher=of, **lesson)}, **{MASKING: MaskedDataModelingConfig()})
    with pytest.raises(ValueError, match=words) as refusal:
        prepare_run(run, ALONE)
    assert "objectives.distillation" in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_it_lacks_is_named(tmp_path: Path) -> None:
    run = run_config(tmp_path)
    classes = {"images": beit3(tmp_path, run, learns="classes")}
    with pytest.raises(ValueError, match="learns=classes by the head of .*image_classification: give that section"):
        objectives_of(distilled(run, classes, **{MASKING: MaskedDataModelingConfig()}))
    masked = {"texts": beit3(tmp_path, run, learns="masked_logits")}
    with pytest.raises(ValueError, match="reads what masked_data_modeling hides: give the section"):
        objectives_of(distilled(run, masked))
    whole = MaskedDataModelingConfig(text_mask_ratio=0)
    with pytest.raises(ValueError, match="distillation.texts.learns=masked_logits: masked_data_modeling hides nothing"):
        objectives_of(distilled(run, masked, **{MASKING: whole}))
    with pytest.raises(ValueError, match="distillation.texts.teacher.kind=efficientnet_lite0 reads no text"):
        objectives_of(distilled(run, {"texts": LessonConfig(learns="features", channels=3)}))
    other = ModelConfig(**vars(run.model) | {"patch_size": 16})
    finer = distilled(replace(run, model=other), {"images": beit3(tmp_path, run, learns="features", channels=WIDTH)})
    assert prepare_run(finer, ALONE).teachers[NAME]  # features are resampled to the student's patches
