# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Probabilities of rankings, and of ranks, of items that arrive at random times."""

from __future__ import annotations

__all__ = ["rank_marginals", "ranking_log_probability"]

import torch
from torch import Tensor

# The trapezoidal rule in log time. The integrand is analytic, so its error falls as
# exp(-pi^2 / step); beyond these limits there is less than 1e-16 of the mass.
_STEP, _FROM, _TO = 1 / 10, -38.0, 4.0
_CHUNK = 2**21  # numbers that are held at once


def ranking_log_probability(
    logits: Tensor,  # (*batch, n)
    perm: Tensor,  # (*lead, k) long, -1 for an empty rank
) -> Tensor:  # (*lead,) float64
    r"""Return the log probability of rankings, or of their first k ranks.

    .. math:: \sum_{r=1}^{k} x_{i_r} - \log \sum_{s \ge r} e^{x_{i_s}}

    with :math:`i_1, \dots, i_n` all items, those without a rank last, in O(n log n)
    steps. Rankings are not checked.

    Args:
        logits: Log rates x of shape ``(*batch, n)``, ``-inf`` for an item that is not
            there.
        perm: The item at each rank, of shape ``(*lead, k)``; -1 for an empty rank.

    Example:
        >>> ranking_log_probability(torch.tensor([1.0, 0.0]), torch.tensor([0])).exp()
        tensor(0.7311, dtype=torch.float64)
    """
    n, top = logits.shape[-1], perm.shape[-1]
    lead = torch.broadcast_shapes(logits.shape[:-1], perm.shape[:-1])
    logits, perm = logits.double().expand(*lead, n), perm.expand(*lead, top)
    # All items by rank, those without one last and -1 left out.
    ranks = torch.arange(top, device=perm.device).expand_as(perm)
    rank = torch.full((*lead, n + 1), top, device=perm.device)
    rank = rank.scatter(-1, torch.where(perm < 0, n, perm), ranks)[..., :n]
    score = logits.gather(-1, rank.argsort(dim=-1, stable=True))
    # Not -inf, whose gradient is NaN; absent items come last, and weigh nothing.
    score = torch.where(score > -torch.inf, score, torch.finfo(score.dtype).min / 8)
    left = score.flip(-1).logcumsumexp(-1).flip(-1)  # in each rank, of who is left
    terms = torch.where(perm >= 0, (score - left)[..., :top], 0)
    return terms.sum(-1)


def rank_marginals(
    logits: Tensor,  # (*batch, n)
    ranks: int,
) -> Tensor:  # (*batch, ranks, n) float64
    r"""Return the probability that item i is at rank r in a Plackett-Luce ranking.

    Items arrive at independent exponential times with rates :math:`w = e^x`, with x the
    logits, and are ranked as they arrive. If item i comes at time t, each other item j
    is there already with probability :math:`1 - e^{-w_j t}`, independently, so

    .. math:: p(r, i) = \int_0^\infty w_i e^{-w_i t} \,
        \text{PoissonBinomial}_{j \ne i}(r; \, 1 - e^{-w_j t}) \, dt,

    ranks counted from zero. The integral is one-dimensional and smooth in log t: the
    trapezoidal rule is right to 1e-12 up to 64 items, whatever the logits. It takes
    O(n^2 ranks) steps for each of its 420 nodes, and is differentiable.

    Args:
        logits: Shape ``(*batch, n)``; ``-inf`` for an item that is not there.
        ranks: The number of ranks, from the first.

    Example:
        >>> rank_marginals(torch.tensor([1.0, 0.0]), 2)  # sigmoid(1) is .731
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]], dtype=torch.float64)
    """
    n = logits.shape[-1]
    there = (logits > -torch.inf).expand(logits.shape)
    score = torch.where(there, logits, 0).double()
    # One problem for each batch element and item, in chunks.
    relative = (score[..., None, :] - score[..., None]).flatten(0, -2)
    other = there[..., None, :] & ~torch.eye(n, dtype=torch.bool, device=score.device)
    other = other.expand(*there.shape, n).flatten(0, -2)
    nodes = round((_TO - _FROM) / _STEP)
    size = max(1, _CHUNK // (nodes * ranks))
    pairs = zip(relative.split(size), other.split(size), strict=True)
    parts = [_of_one(x, others, ranks, nodes) for x, others in pairs]
    result = torch.cat(parts).unflatten(0, there.shape) if parts else score
    result = result.reshape(*there.shape, ranks)  # empty batches have no parts
    return torch.where(there[..., None], result, 0).mT


def _of_one(
    relative: Tensor,  # (b, n) float64, the logits of all less that of the item
    other: Tensor,  # (b, n) bool, who may come before it
    ranks: int,
    nodes: int,
) -> Tensor:  # (b, ranks)
    """Rank probabilities of one item for each row, in units of its own time."""
    x = torch.arange(nodes, dtype=relative.dtype, device=relative.device)
    x = _FROM + _STEP * x  # log time
    # The probabilities of 0, 1, ... items before it; all terms are positive.
    before = torch.zeros((len(relative), nodes, ranks), dtype=x.dtype, device=x.device)
    before = torch.cat([torch.ones_like(before[..., :1]), before[..., 1:]], -1)
    for j in range(relative.shape[-1]):
        # Above exp(700) the item has come for certain; no infinity, for the gradient.
        passed = (relative[:, j, None] + x).clamp(max=700).exp()
        passed = torch.where(other[:, j, None], passed, 0)[..., None]
        come, late = -torch.expm1(-passed), torch.exp(-passed)
        shifted = torch.cat([torch.zeros_like(late), before[..., :-1]], -1)
        before = before * late + shifted * come
    weight = _STEP * (x - x.exp()).exp()
    return (before * weight[:, None]).sum(-2)
