"""Examples of what a run's newest checkpoint makes of hidden parts."""

from __future__ import annotations

import torch

from beit3_dist.checkpoint.read import read_weights
from beit3_dist.data.batch import Request
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.reports.opened import Run
from beit3_dist.reports.targets import codes_of
from beit3_dist.train.guesses import Example, guess


@torch.no_grad()
def examples(run: Run, device: torch.device, number: int) -> dict[str, list[Example]]:
    """`number` examples each of the image stream and of pairs, where the run masks them, spread evenly over the shown
    streams."""
    masked = next((objective for objective in run.objectives if isinstance(objective, MaskedDataModeling)), None)
    if masked is None or not masked.coded:
        return {}
    model = run.objectives.build()
    model.load_state_dict(read_weights(run.checkpoint), assign=True)
    model.to(device).eval()
    images, _, pairs = run.shown.lengths()
    number = min(number, *(length for length in (images, pairs) if length))
    shown: dict[str, list[Example]] = {}
    for i in range(number):
        batch = run.shown[Request((i * images // number, 0, i * pairs // number), 0)]
        codes = codes_of(run, batch, device)
        assert codes is not None
        for name, example in guess(model, masked, batch, codes, run.config, run.shown.tokenizer).items():
            shown.setdefault(name, []).append(example)
    return shown
