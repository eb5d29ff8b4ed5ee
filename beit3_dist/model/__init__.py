"""The Multiway Transformer of BEiT-3."""

from beit3_dist.config import ModelConfig
from beit3_dist.model.beit3 import BEiT3, MixedInputs, parameter_counts

__all__ = ["BEiT3", "MixedInputs", "ModelConfig", "parameter_counts"]
