"""The image tokenizer under the name that scripts know from before it had a package."""

from beit3_dist.image_tokenizer.files import load_vqkd, save_vqkd
from beit3_dist.image_tokenizer.network import VQKD

__all__ = ["VQKD", "load_vqkd", "save_vqkd"]
