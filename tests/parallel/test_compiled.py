"""Compiled blocks under ZeRO-3: what the backward pass needs of a block's parameters is not kept until then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from beit3_dist.config import RunConfig
from beit3_dist.model.block import Block
from beit3_dist.parallel import compiled
from beit3_dist.parallel.mesh import Groups
from tests.parallel.test_layouts import COMPILED
from tests.parallel.training import engine_run
from tests.parallel.workers import run_workers


def kept_views(groups: Groups, config: RunConfig) -> tuple[int, list[list[int]]]:
    """Of what the graphs of a run's compiled pieces save: how many are gathered parameters themselves, which DeepSpeed
    empties, and the shapes of others in the same memory, which would hold it."""
    parameters, views = 0, []

    def watched(piece: Callable[..., Any]) -> Callable[..., Any]:
        def run(block: Block, *arguments: Any) -> Any:
            memory = {p.untyped_storage().data_ptr() for p in block.parameters()}

            def pack(tensor: Tensor) -> Tensor:
                nonlocal parameters
                if isinstance(tensor, nn.Parameter):
                    parameters += 1
                elif tensor.untyped_storage().data_ptr() in memory:
                    views.append(list(tensor.shape))
                return tensor

            with saved_tensors_hooks(pack, lambda tensor: tensor):
                return piece(block, *arguments)

        return run

    compiled._before, compiled._after = watched(compiled._before), watched(compiled._after)
    engine_run(groups, config)
    return parameters, views


@pytest.mark.slow
def test_zero3_can_release_what_compiled_blocks_gathered() -> None:
    for parameters, views in run_workers(2, kept_views, COMPILED["dp2-zero3-compiled"].config()):
        assert parameters > 0 and views == []
