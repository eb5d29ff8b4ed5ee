"""The tasks by their names."""

from __future__ import annotations

from beit3_dist.tasks.captioning import Captioning
from beit3_dist.tasks.class_names import ImageNetRetrieval
from beit3_dist.tasks.imagenet import ImageNet
from beit3_dist.tasks.nlvr2 import NLVR2
from beit3_dist.tasks.retrieval import Retrieval
from beit3_dist.tasks.task import Task
from beit3_dist.tasks.text import Sentences
from beit3_dist.tasks.vqa import VQA

TASKS: dict[str, type[Task]] = {
    "imagenet": ImageNet,
    "imagenet_retrieval": ImageNetRetrieval,
    "vqa": VQA,
    "nlvr2": NLVR2,
    "captioning": Captioning,
    "retrieval": Retrieval,
    "itc": Retrieval,
    "text": Sentences,
}
