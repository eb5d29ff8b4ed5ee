"""What all workers find imported: what runs import at their start, and what DeepSpeed imports once it makes an engine.

Without garbage collection, which would search again and again what is imported, and stays. That is a quarter of the
time of importing, and in the workers, which find it frozen, as much of a step under ZeRO-3.
"""

from __future__ import annotations

import gc
import importlib

gc.disable()

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401  # brings torch's compiler along
import pytest  # noqa: E402, F401
import torch.distributed.pipelining  # noqa: E402, F401

import beit3_dist.train.finetuning  # noqa: E402
import beit3_dist.train.image_tokenizer  # noqa: E402
import beit3_dist.train.pretraining  # noqa: E402, F401
import tests.conftest  # noqa: E402, F401

importlib.import_module("timm")  # of augmentation and teachers; conftest has defined what it needs
gc.freeze()
gc.enable()
