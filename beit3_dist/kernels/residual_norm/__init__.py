"""A residual connection and the LayerNorm behind it, and the LayerNorm of tokens that lie in another order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from beit3_dist.kernels.layer_norm import EPS
from beit3_dist.kernels.registry import Case, Function, Operation, Sizes, register
from beit3_dist.kernels.residual_norm.definition import Branch, Norms, plain_gathered_norm, plain_residual_norm
from beit3_dist.kernels.triton import in_triton


def _shares(rows: int, experts: int) -> list[int]:
    """Uneven ones of the rows, an empty one among three."""
    return {0: [], 1: [rows], 2: [rows // 3, rows - rows // 3], 3: [rows // 2, 0, rows - rows // 2]}[experts]


def _norms(rows: int, vectors: Sequence[Tensor], place: Tensor | None = None) -> Norms:
    """Weights of the experts, then their biases."""
    experts = len(vectors) // 2
    return Norms(_shares(rows, experts), list(vectors[:experts]), list(vectors[experts:]), EPS, place)


def _order(x: Tensor) -> Tensor:
    """A permutation of the rows."""
    return x.detach()[:, 0].argsort()


def _case(sizes: Sizes, branches: int, norms: int, keep: bool, moved: str = "", kept: bool = False) -> Case:
    """Of so many experts' projections (0: no branch) and norms, with or without drop path; `moved`: the branch or y;
    `kept`: drop path is in the branch already."""
    rows, width, matrices = sizes.tokens, sizes.width, 1 + (branches > 0)

    def call(compute: Function, x: Tensor, *leaves: Tensor) -> list[Tensor]:
        vectors, branch, order = leaves[matrices - 1 :], None, _order(x)
        if branches:
            slices, biases = list(leaves[0].split(_shares(len(x), branches))), list(vectors[:branches])
            branch = Branch(slices, biases, order if moved == "branch" else None, kept)
        factors = (x.detach()[:, 0] > 0).to(x.dtype) * 1.25 if keep else None
        after = _norms(len(x), vectors[branches:], order if moved == "y" else None) if norms else None
        r, y = compute(x, branch, factors, after)
        return [r, *y]

    return Case(
        [(rows, width)] * matrices + [(width,)] * (branches + 2 * norms),
        call,
        f"{branches} + {norms} experts" + ", drop path" * keep + " in it" * kept + f", {moved} moved" * bool(moved),
        rowwise=matrices,
        separate=branches == norms == 1 and not moved,
    )


def _cases(sizes: Sizes) -> list[Case]:
    usual = [(1, 1, True), (1, 2, True), (2, 3, False), (3, 0, True), (0, 2, False)]
    moved = [(1, 2, True, "branch"), (1, 0, True, "branch"), (0, 1, False, "y"), (3, 1, True, "y"), (2, 1, False, "y")]
    kept = [_case(sizes, 2, norms, True, "y" * norms, kept=True) for norms in (0, 1)]
    return [_case(sizes, *kind) for kind in usual + moved] + kept


def _gathered(compute: Function, x: Tensor, *vectors: Tensor) -> list[Tensor]:
    return compute(x * 1, _order(x), _norms(len(x), vectors))  # a copy, which nobody else reads


def _gathered_cases(sizes: Sizes) -> list[Case]:
    return [Case([(sizes.tokens, sizes.width), *[(sizes.width,)] * 4], _gathered, separate=False)]


_TRITON = f"{__name__}.triton"
# r is rounded before its norm is taken.
register(Operation("residual_norm", plain_residual_norm, _cases, [in_triton(_TRITON, 2)]))
register(Operation("gathered_norm", plain_gathered_norm, _gathered_cases, [in_triton(_TRITON)]))
