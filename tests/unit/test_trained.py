"""Which parameters `train_only` leaves trained, and what is refused."""

from __future__ import annotations

import pytest

from beit3_dist.model.trained import trained_names
from beit3_dist.parallel.pipeline import StagePlan, check_trained_stages

NAMES = ["blocks.0.ffn.language.fc1.weight", "blocks.0.ffn.vision.fc1.weight", "blocks.1.ffn.vision.fc1.weight",
         "norm.shared.weight", "text_head.weight"]  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        ([], {0, 1, 2, 3, 4}),
        (["*.language.*", "text_head.*"], {0, 4}),
        (["!*.vision.*"], {0, 3, 4}),
        (["!blocks.1.*", "blocks.*"], {0, 1}),
    ],
)
def test_plain_patterns_name_what_trains_and_others_leave_out_of_it(patterns: list[str], trained: set[int]) -> None:
    assert trained_names(NAMES, patterns) == {NAMES[number] for number in trained}


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["blocks.*", "language_head.*"], "'language_head.*' matches no parameter"),
        (["text_head.*", "!text_head.*"], "leaves nothing to train"),
        (["*"], "freezes nothing"),
    ],
)
def test_patterns_that_say_nothing_are_refused(patterns: list[str], told: str) -> None:
    with pytest.raises(ValueError, match="^train_only") as refused:
        trained_names(NAMES, patterns)
    assert told in str(refused.value)


def test_every_stage_of_a_pipeline_trains_something() -> None:
    plan = StagePlan([range(0, 1), range(1, 2)], pipeline=2, tokens=1)
    check_trained_stages(plan, [NAMES[0], NAMES[4]])
    check_trained_stages(plan, ["vision_embedding.projection.weight", NAMES[2]])
    with pytest.raises(ValueError, match=r"train_only .* stage 1 of 2 \(layers 0 to 0\): use a smaller parallel.pipe"):
        check_trained_stages(plan, NAMES[2:])
