"""BEiT-3 pretraining in the open."""

__version__ = "0.1.0"
