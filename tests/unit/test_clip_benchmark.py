"""CLIP_benchmark measures our model: its own functions and its own registry, on a few drawn pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from beit3_dist.hub.clip_benchmark import MODEL_TYPE, load_beit3, register
from beit3_dist.inference import Model
from tests.unit.test_inference import (  # noqa: F401 (fixtures)
    OBJECTIVES,
    SENTENCES,
    pictures,
    pretrained,
    save,
    tokenizer,
)

pytest.importorskip("clip_benchmark", reason="needs clip-benchmark: pip install --no-deps clip-benchmark")


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """Its measures of classes and of retrieval. scikit-learn, which is large, has a part in a table alone."""
    for name in ("sklearn", "sklearn.metrics"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("classification_report", "balanced_accuracy_score"):
        monkeypatch.setattr(sys.modules["sklearn.metrics"], name, None, raising=False)
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    return zeroshot_classification, zeroshot_retrieval


def test_it_measures_a_model(
    tmp_path: Path, tokenizer: Path, pictures: list[Path], measures: tuple[ModuleType, ModuleType]  # noqa: F811
) -> None:
    """Retrieval and classes by names, loaded by its own `load_clip`; the figures are those of our own vectors."""
    from clip_benchmark.models import MODEL_TYPES, load_clip

    register()
    register()
    assert MODEL_TYPES.count(MODEL_TYPE) == 1
    folder = pretrained(tmp_path / "model", tokenizer, OBJECTIVES)
    model, transform, words_of = load_clip(MODEL_TYPE, "beit3", str(folder), "cache", "cpu")
    model.eval()
    ours = Model.load(folder, "cpu", "retrieval")
    opened = [Image.open(picture) for picture in pictures]
    images = torch.stack([transform(image) for image in opened])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), ours.embed_images(pictures))
        torch.testing.assert_close(model.encode_text(words_of(SENTENCES)), ours.embed_texts(SENTENCES))
        torch.testing.assert_close(model.encode_text(words_of(SENTENCES[0])), ours.embed_texts(SENTENCES[:1]))
    classification, retrieval = measures
    texts = [SENTENCES[:2], SENTENCES[2:3], SENTENCES[3:4], SENTENCES[4:]]
    found = retrieval.evaluate(model, [(images, texts)], words_of, "cpu", amp=False, recall_k_list=[1])
    cosines = ours.embed_texts(SENTENCES) @ ours.embed_images(pictures).T
    owners = torch.tensor([0, 0, 1, 2, 3, 3])
    assert found["image_retrieval_recall@1"] == pytest.approx((cosines.argmax(1) == owners).float().mean().item())
    assert found["text_retrieval_recall@1"] == pytest.approx(
        (owners[cosines.argmax(0)] == torch.arange(4)).float().mean().item()
    )
    by_name = classification.zero_shot_classifier(model, words_of, SENTENCES, ["{c}", "so {c}"], "cpu", amp=False)
    logits, labels = classification.run_classification(model, by_name, [(images, torch.arange(4))], "cpu", amp=False)
    ours_by_name = ours.classify_by_names(pictures, SENTENCES, ["{}", "so {}"])
    assert [SENTENCES[best] for best in logits.argmax(1)] == ours_by_name
    assert torch.equal(labels, torch.arange(4))


def test_a_model_without_contrast_is_refused(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="was fine-tuned for vqa; vectors need a model of task"):
        load_beit3(pretrained=str(save(tmp_path / "vqa", "vqa", tokenizer)))
    with pytest.raises(ValueError, match="that none of its objectives fits for retrieval"):
        load_beit3(pretrained=str(pretrained(tmp_path / "masked", tokenizer, OBJECTIVES[:1])))
