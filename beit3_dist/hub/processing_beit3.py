"""Images and texts to what BEiT-3 reads."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature, ProcessorMixin


class Beit3Processor(ProcessorMixin):
    """An image processor and a tokenizer. Texts are padded to the longest and cut to the model's longest."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **others: Any) -> None:
        super().__init__(image_processor, tokenizer, **others)

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str | None = None, **settings: Any
    ) -> BatchFeature:
        """`images` as the image processor takes them, `text` one or a list; `settings` are the tokenizer's."""
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        data: dict[str, Any] = {}
        if text is not None:
            settings = {"padding": True, "truncation": True} | settings
            data |= self.tokenizer(text, return_tensors=return_tensors, **settings)
        if images is not None:
            data |= self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature(data)
