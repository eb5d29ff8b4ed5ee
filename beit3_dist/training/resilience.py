"""When a run has to stop by itself."""

from __future__ import annotations

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import RunConfig
from beit3_dist.training.tokenizer_config import TokenizerConfig

FEWEST_SAMPLES = 10_000
"""A share of bad samples is taken of at least so many, or one bad picture could stop a run at its first step."""


class RunStopped(RuntimeError):
    """The run ended itself for a reason that its message tells the user; nothing is wrong with the program."""


def check_bad_samples(config: RunConfig | TokenizerConfig, state: TrainState) -> None:
    """Raises RunStopped when more than `data.max_bad_fraction` of the samples had to be replaced."""
    samples = sum(state.consumed)
    if state.bad_samples > config.data.max_bad_fraction * max(samples, FEWEST_SAMPLES):
        raise RunStopped(
            f"data.max_bad_fraction={config.data.max_bad_fraction}: {state.bad_samples:,} of {samples:,} samples "
            f"had to be replaced by step {state.step}; {config.out}/quarantine.jsonl names them and the reasons"
        )
