"""What pretraining learns: an objective is one file that registers itself (base.py, registry.py)."""

from beit3_dist.command_line import Sections


def _classes() -> dict[str, type]:
    from beit3_dist.objectives.registry import OBJECTIVES  # imports torch

    return {name: objective.Config for name, objective in OBJECTIVES.items()}


SECTIONS = Sections("objectives", _classes, default="masked_data_modeling")
"""How a command line reads their sections."""
