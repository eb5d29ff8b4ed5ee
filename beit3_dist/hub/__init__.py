"""BEiT-3 in transformers: `import beit3_dist.hub`, and its Auto classes know the folders that `tools/
convert_checkpoint.py --to hub` writes. Needs the extra `hub`."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

from beit3_dist.hub.configuration_beit3 import Beit3Config
from beit3_dist.hub.image_processing_beit3 import Beit3ImageProcessor
from beit3_dist.hub.modeling_beit3 import (
    Beit3ForCaptioning,
    Beit3ForImageClassification,
    Beit3ForPreTraining,
    Beit3ForRetrieval,
    Beit3ForSequenceClassification,
    Beit3ForVisualQuestionAnswering,
    Beit3ForVisualReasoning,
    Beit3Model,
)
from beit3_dist.hub.processing_beit3 import Beit3Processor
from beit3_dist.hub.tokenization_beit3 import Beit3Tokenizer

__all__ = [
    "Beit3Config",
    "Beit3ForCaptioning",
    "Beit3ForImageClassification",
    "Beit3ForPreTraining",
    "Beit3ForRetrieval",
    "Beit3ForSequenceClassification",
    "Beit3ForVisualQuestionAnswering",
    "Beit3ForVisualReasoning",
    "Beit3ImageProcessor",
    "Beit3Model",
    "Beit3Processor",
    "Beit3Tokenizer",
]

MODELS = {
    AutoModel: Beit3Model,
    AutoModelForPreTraining: Beit3ForPreTraining,
    AutoModelForMaskedLM: Beit3ForPreTraining,
    AutoModelForImageClassification: Beit3ForImageClassification,
    AutoModelForVisualQuestionAnswering: Beit3ForVisualQuestionAnswering,
    AutoModelForImageTextToText: Beit3ForCaptioning,
    AutoModelForZeroShotImageClassification: Beit3ForRetrieval,
}
"""What each Auto class makes of the config."""

AutoConfig.register(Beit3Config.model_type, Beit3Config)
AutoImageProcessor.register(Beit3Config, slow_image_processor_class=Beit3ImageProcessor)
AutoTokenizer.register(Beit3Config, slow_tokenizer_class=Beit3Tokenizer)
AutoProcessor.register(Beit3Config, Beit3Processor)
for auto_class, model_class in MODELS.items():
    auto_class.register(Beit3Config, model_class)
# Sentences have two models: of themselves, and of two images. The config's `architectures` says which.
SENTENCES = (Beit3ForSequenceClassification, Beit3ForVisualReasoning)
AutoModelForSequenceClassification._model_mapping.register(Beit3Config, SENTENCES, exist_ok=True)
Beit3Config.register_for_auto_class()
Beit3ImageProcessor.register_for_auto_class("AutoImageProcessor")
Beit3Tokenizer.register_for_auto_class("AutoTokenizer")
Beit3Processor.register_for_auto_class("AutoProcessor")
