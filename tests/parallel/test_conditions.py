"""What composing ZeRO, tensor and pipeline parallelism needs from DeepSpeed, left out one by one.

Most of these mistakes run, or hang, without an error of DeepSpeed's own. Here each is made on purpose in a layout
that the table in test_layouts.py shows to be right; the comparison with one process, or the time limit, must catch it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from beit3_dist.config import RunConfig
from beit3_dist.parallel import engine, pipeline
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.token_norms import TokenNorms
from tests.parallel.test_layouts import LAYOUTS, compare
from tests.parallel.training import assemble, engine_run
from tests.parallel.workers import run_workers


def _direct_backward(self: Any, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False) -> Any:
    """A stage's backward from its output tensor instead of from a scalar."""
    self.submod.engine.set_gradient_accumulation_boundary(self.pipeline.count_backward())
    output, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
    if self.is_last:
        self.submod.engine.backward(output.sum(), scale_wrt_gas=False)
    else:
        output[0].backward(gradients[0])
    return tuple(getattr(v, "grad", None) for v in bwd_kwargs["input_values"]), None


def _boundary_of_each_chunk(self: Any) -> bool:
    self._backwards += 1
    return self._backwards % self.micro_batches == 0


MISTAKES = {  # what is left out -> (a layout of the table, where to put what instead)
    "order checked over the world": ("pp4-zero3-by-rank", engine, "check_order_within", lambda group: None),
    "backward flag not cleared": ("pp4-zero3-by-rank", pipeline, "allow_another_backward", lambda engine: None),
    "every backward a boundary": ("pp4-zero2-interleaved-clip", pipeline.Pipeline, "count_backward", lambda self: True),
    "backward from a tensor": (
        "pp2-zero0-by-rank",
        pipeline._ZeroStage,
        "backward_maybe_with_nosync",
        _direct_backward,
    ),
    "norm over the tensor ranks only": (
        "dp2tp2pp2-zero3-selective",
        Groups,
        "get_model_parallel_group",
        lambda self: self.tensor,
    ),
    "parameters not marked": (
        "tp2pp2-zero3-sequence-every-second",
        engine,
        "mark_model_parallel",
        lambda model, rank, cuts: None,
    ),
    "boundary of each chunk": (
        "dp2tp2pp2-zero1-sequence-interleaved-clip",
        pipeline.Pipeline,
        "count_backward",
        _boundary_of_each_chunk,
    ),
    "norms' gradients not added up": (
        "tp2-zero0-sequence-sgd",
        TokenNorms,
        "add_up",
        lambda self, optimizer: None,
    ),
    "gradient buffer not zeroed": ("pp2-zero3-interleaved-sgd", pipeline.Pipeline, "after_step", lambda self: None),
}


HANGS = {"order checked over the world"}


def mistaken_run(groups: Groups, config: RunConfig, sgd: bool, mistake: str) -> dict[str, Any]:
    """`engine_run` in a worker where something is left out."""
    _, owner, name, instead = MISTAKES[mistake]
    setattr(owner, name, instead)
    return engine_run(groups, config, sgd)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str) -> None:
    layout = replace(LAYOUTS[MISTAKES[mistake][0]], steps=2)
    world = layout.data * layout.tensor * layout.pipeline
    with pytest.raises(AssertionError):
        records = run_workers(
            world,
            mistaken_run,
            layout.config(),
            layout.sgd,
            mistake,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            timeout_s=20 if mistake in HANGS else 120,
        )
        compare(assemble(records, layout.config()), layout)
