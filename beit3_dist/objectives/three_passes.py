"""What the one pass over a mixed micro-batch is compared with."""

from __future__ import annotations

from torch import Tensor

from beit3_dist.model.beit3 import MixedInputs
from beit3_dist.model.layout import Layout
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling, Targets


def three_passes(
    objective: MaskedDataModeling,
    inputs: MixedInputs,
    targets: Targets,
    sample_ids: Tensor,
    step_counts: Tensor,
    step: int,
) -> tuple[Tensor, Tensor]:
    """The same step as three plain forward passes, one per stream: the reference that tests and benchmarks compare
    the one pass with."""
    layout, image_mask = inputs.layout, inputs.image_mask
    assert image_mask is not None
    num_images, num_pairs = layout.images.samples, layout.pairs.samples
    image, text, pair_image, pair_text = targets.counts
    segments = layout.segments
    pair_rows = lambda rows: rows - segments[0]  # noqa: E731  (rows of the pairs' own token matrix)
    no_words, no_codes = targets.words[:0], targets.codes[:0]
    passes = [
        (
            MixedInputs(
                inputs.images[:num_images],
                inputs.words[:0],
                Layout(images=layout.images),
                image_mask[:num_images],
            ),
            Targets(targets.image_rows[:image], targets.codes[:image], no_words, no_words, (image, 0, 0, 0)),
            sample_ids[:num_images],
        ),
        (
            MixedInputs(inputs.images[:0], inputs.words[segments[2] :], Layout(texts=layout.texts), image_mask[:0]),
            Targets(
                no_codes,
                no_codes,
                targets.text_rows[pair_text:] - sum(segments[:3]),
                targets.words[pair_text:],
                (0, text, 0, 0),
            ),
            sample_ids[num_images + num_pairs :],
        ),
        (
            MixedInputs(
                inputs.images[num_images:],
                inputs.words[: segments[2]],
                Layout(pairs=layout.pairs),
                image_mask[num_images:],
            ),
            Targets(
                pair_rows(targets.image_rows[image:]),
                targets.codes[image:],
                pair_rows(targets.text_rows[:pair_text]),
                targets.words[:pair_text],
                (0, 0, pair_image, pair_text),
            ),
            sample_ids[num_images : num_images + num_pairs],
        ),
    ]
    results = [objective(i, t, ids, step_counts, step) for i, t, ids in passes]
    return sum(r[0] for r in results), sum(r[1] for r in results)
