"""What vectors of a frozen model are worth: classes by names, by neighbours, by a linear probe; how each is counted.

Shape letters: N examples, M those to learn from, C classes, D the vectors' length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

ROWS_AT_ONCE = 1024
"""Rows of scores that exist at a time."""
TEMPERATURE = 0.07
"""Of a neighbour's vote (DINO, Caron et al. 2021)."""
DECAYS = tuple(10.0**power for power in range(-6, 3))
"""Weights of the probe's squared norm that are tried (Radford et al. 2021, A.3, try 96 between 1e-6 and 1e6)."""
ITERATIONS = 200
"""Of L-BFGS at most; it has converged long before."""
HELD_OUT = 5
"""Every so many-th example chooses the probe's decay."""


def frozen_features(hidden_BND: Tensor, cls: bool = False) -> Tensor:
    """[B, D] of an image's hidden states, CLS and patches: the mean of the patches, or CLS."""
    return hidden_BND[:, 0] if cls else hidden_BND[:, 1:].mean(1)


def class_accuracies(scores_NC: Tensor, labels: Tensor) -> dict[str, float]:
    """acc1, acc5 where there are more than five classes, and the mean over the classes of their share of right ones.

    A wrong class with the same score as the right one comes before it.
    """
    own = scores_NC.gather(1, labels[:, None])
    ranks = (scores_NC >= own).sum(1) - 1
    right, of_class = (ranks < 1).double(), one_hot(labels, scores_NC.shape[1]).double()
    there = of_class.sum(0) > 0
    recall_C = (right @ of_class)[there] / of_class.sum(0)[there]
    tops = {f"acc{k}": (ranks < k).double().mean().item() for k in (1, 5) if k == 1 or scores_NC.shape[1] > k}
    return tops | {"mean_per_class_recall": recall_C.mean().item()}


def names_as_vectors(
    embed: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """[C, D]: each name in the place of `{}` in all templates: unit vectors, averaged, of unit length again (Radford et
    al. 2021, 3.1.4)."""
    of_template = [normalize(embed([template.replace("{}", name) for name in names]), dim=1) for template in templates]
    return normalize(torch.stack(of_template).mean(0), dim=1)


def neighbours_votes(train_MD: Tensor, labels: Tensor, test_ND: Tensor, classes: int, k: int) -> Tensor:
    """[N, C]: votes of the k nearest of the vectors `train_MD` of classes `labels` [M], weighted by exp(cosine / 0.07)
    (DINO's protocol)."""
    train, votes = normalize(train_MD, dim=1), []
    for some in normalize(test_ND, dim=1).split(ROWS_AT_ONCE):
        near, rows = (some @ train.T).topk(min(k, len(train)), dim=1)
        weights = ((near - 1) / TEMPERATURE).exp()  # less 1: the largest is then no more than e^0
        votes.append(some.new_zeros(len(some), classes).scatter_add_(1, labels[rows], weights))
    return torch.cat(votes)


def probe_scores(train_MD: Tensor, labels: Tensor, test_ND: Tensor, classes: int) -> tuple[Tensor, float]:
    """[N, C]: logits of multinomial regression on the vectors `train_MD`, and the decay that every fifth of them, held
    out, has chosen: CLIP's linear probe (Radford et al. 2021, A.3). Dimensions are standardised by those to learn from.
    """
    mean, deviation = train_MD.mean(0), train_MD.std(0).clamp(min=1e-6)
    train, test = (train_MD - mean) / deviation, (test_ND - mean) / deviation
    held_out = torch.arange(len(train), device=train.device) % HELD_OUT == HELD_OUT - 1

    def right(decay: float) -> float:
        logits = _regression(train[~held_out], labels[~held_out], classes, decay)(train[held_out])
        return (logits.argmax(1) == labels[held_out]).double().mean().item()

    best = max(DECAYS, key=right) if held_out.any() else DECAYS[len(DECAYS) // 2]
    return _regression(train, labels, classes, best)(test), best


def _regression(x_MD: Tensor, labels: Tensor, classes: int, decay: float) -> Callable[[Tensor], Tensor]:
    """Multinomial regression with decay / 2 times the squared norm of its matrix beside the mean cross-entropy."""
    weight = x_MD.new_zeros(classes, x_MD.shape[1]).requires_grad_()
    bias = x_MD.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x_MD @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return lambda x_ND: x_ND @ weight.T + bias
