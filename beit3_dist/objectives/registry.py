"""The objectives that there are, and those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from beit3_dist.config import STREAMS, GradientMaskingConfig, RunConfig, require
from beit3_dist.objectives.base import Objective
from beit3_dist.objectives.contrastive import Contrastive
from beit3_dist.objectives.distillation import Distillation
from beit3_dist.objectives.image_classification import ImageClassification
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.objectives.matching import Matching
from beit3_dist.objectives.momentum_distillation import MomentumDistillation
from beit3_dist.objectives.prefix_language_modeling import PrefixLanguageModeling
from beit3_dist.objectives.together import Objectives

BUILT_IN: list[type[Objective]] = [
    MaskedDataModeling,
    Contrastive,
    Matching,
    PrefixLanguageModeling,
    ImageClassification,
    Distillation,
    MomentumDistillation,
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
    return Objectives(config, objectives_of_run(config))


def objectives_of_run(config: RunConfig) -> list[Objective]:
    """Each of them alone."""
    chosen = config.objectives or {MaskedDataModeling.name: MaskedDataModeling.Config()}
    return [OBJECTIVES[name](section, config) for name, section in chosen.items()]


def objectives_by_stream(config: RunConfig, streams: Sequence[str]) -> dict[str, Objectives]:
    """For each stream the objectives of a run that has it alone: those of the run's that read something of it. Raises
    ValueError where there is none."""
    of_all, found = objectives_of_run(config), {}
    for stream in streams:
        batch = replace(config.batch, **{other: 0 for other in STREAMS if other != stream})
        alone = replace(config, batch=batch, gradient_masking=GradientMaskingConfig())
        reading = [one for one in of_all if any(view.stream == stream for view in one.views)]
        chosen = [type(one)(one.config, alone) for one in reading]
        require(bool(chosen), f"gradient_masking.every={config.gradient_masking.every}: no objective reads {stream}")
        found[stream] = Objectives(alone, chosen)
    return found
