"""What is drawn for samples on the host beside their views, without `data` knowing by whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from beit3_dist.data.order import Stream
from beit3_dist.data.streams import Sample
from beit3_dist.data.text import TextTokenizer


class Annotator(Protocol):
    """Draws for the samples of a stream what an objective needs: masks, say."""

    name: str
    hashes_images: bool
    """Whether it reads `Sample.image_hash`."""
    label_classes: int
    """Whether it reads `Sample.label` of images alone: how many classes there are; 0: no."""

    def annotate(
        self, stream: Stream, samples: Sequence[Sample], text: np.ndarray | None, tokenizer: TextTokenizer
    ) -> dict[str, Tensor]:
        """Field -> tensor [samples, ...] for n samples and their text [n, L] (None: the stream has none). What is drawn
        for a sample is a function of its key alone. A field whose name begins with `text` has an entry for each token,
        [n, L]: where batches are joined it is padded: int64 with <pad>, else with 0 (False)."""
