"""The objectives that there are, and those of a run."""

from __future__ import annotations

from typing import TypeVar

from beit3_dist.config import RunConfig, require
from beit3_dist.objectives.base import Objective
from beit3_dist.objectives.contrastive import Contrastive
from beit3_dist.objectives.distillation import Distillation
from beit3_dist.objectives.image_classification import ImageClassification
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.objectives.matching import Matching
from beit3_dist.objectives.prefix_language_modeling import PrefixLanguageModeling
from beit3_dist.objectives.together import Objectives

BUILT_IN: list[type[Objective]] = [
    MaskedDataModeling,
    Contrastive,
    Matching,
    PrefixLanguageModeling,
    ImageClassification,
    Distillation,
]
OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in BUILT_IN}
"""By name: the section `objectives.NAME` of a run's config."""

Kind = TypeVar("Kind", bound=type[Objective])


def register(objective: Kind) -> Kind:
    """Makes an objective known; to be used as a decorator. Raises ValueError where its name is taken."""
    require(objective.name not in OBJECTIVES, f"there are two objectives named {objective.name}")
    OBJECTIVES[objective.name] = objective
    return objective


def objectives_of(config: RunConfig) -> Objectives:
    """The objectives of a run: those whose sections it has. Raises ValueError naming the field where one cannot be."""
    chosen = config.objectives or {MaskedDataModeling.name: MaskedDataModeling.Config()}
    return Objectives(config, [OBJECTIVES[name](section, config) for name, section in chosen.items()])
