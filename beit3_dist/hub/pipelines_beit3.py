"""Pipelines that transformers 5 no longer has: `visual-question-answering` and `image-to-text`.

A folder names them in its config, so that `pipeline(NAME, FOLDER, trust_remote_code=True)` finds them.
"""

from __future__ import annotations

from typing import Any

from transformers import Pipeline
from transformers.image_utils import load_image


class Beit3VisualQuestionAnsweringPipeline(Pipeline):
    """Answers, the best first: `pipe(image=..., question=..., top_k=5)`, or a list of such dictionaries."""

    _load_processor = _load_feature_extractor = False
    _load_image_processor = _load_tokenizer = True

    def __call__(self, image: Any, question: Any = None, **settings: Any) -> Any:
        """-> [{"score": ..., "answer": ...}, ...] of one question, or a list of such lists."""
        return super().__call__(image if question is None else {"image": image, "question": question}, **settings)

    def _sanitize_parameters(self, top_k: int | None = None, **others: Any) -> tuple[dict, dict, dict]:
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, inputs: dict[str, Any]) -> Any:
        words = self.tokenizer(inputs["question"], return_tensors="pt", truncation=True)
        images = self.image_processor(load_image(inputs["image"]), return_tensors="pt").to(self.dtype)
        return {**words, **images}

    def _forward(self, inputs: dict[str, Any]) -> Any:
        return self.model(**inputs)

    def postprocess(self, outputs: Any, top_k: int = 5) -> list[dict[str, Any]]:
        scores = outputs.logits[0].float().sigmoid()
        best = scores.topk(min(top_k, len(scores)))
        names = self.model.config.id2label
        return [
            {"score": score, "answer": names[number]}
            for score, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


class Beit3ImageToTextPipeline(Pipeline):
    """Captions: `pipe(image)`, or a list of images; settings of `generate` by their names."""

    _load_processor = _load_feature_extractor = False
    _load_image_processor = _load_tokenizer = True
    _pipeline_calls_generate = True

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict, dict, dict]:
        return {}, settings, {}

    def preprocess(self, inputs: Any) -> Any:
        return self.image_processor(load_image(inputs), return_tensors="pt").to(self.dtype)

    def _forward(self, inputs: Any, **settings: Any) -> Any:
        return self.model.generate(pixel_values=inputs["pixel_values"], **settings)

    def postprocess(self, outputs: Any) -> list[dict[str, str]]:
        texts = self.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return [{"generated_text": text.strip()} for text in texts]
