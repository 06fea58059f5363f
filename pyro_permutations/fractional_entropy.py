# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The entropy of a law over matchings from its marginals alone, calibrated."""

from __future__ import annotations

__all__ = ["COUNTED", "calibrated_entropy", "entropy_terms", "fraction"]

import math
from functools import lru_cache

import torch
from torch import Tensor

from pyro_permutations.fractional_solver import fractional_maximum
from pyro_permutations.matching_blocks import Block, blocks, sum_blocks, take_block
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.matching_parts import flattened
from pyro_permutations.outside import holds, outside
from pyro_permutations.subset_recursion import log_sum

# With a mask the matchings of blocks of up to this many items are counted, so many
# masks at a time.
COUNTED = 16
_TOGETHER = 64
# The log of the number of matchings is met to this.
_PRECISION = 1e-9
_MOST_STEPS = 50
# Marginals are frequencies, and means of matrices that are doubly stochastic to 1e-3
# in half precision.
_ROUNDING = 1e-3


def calibrated_entropy(
    marginals: Tensor,  # (*batch, n, m)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
) -> Tensor:  # (*batch,)
    r"""Entropy of a law over matchings with given marginals, approximately.

    .. math:: H_g(B) = -\sum B \log B - g \sum (1 - B) \log (1 - B)

    with -r log r for the slack of rows and columns that may stay unmatched. It is zero
    at a permutation whatever g is, between -1 (Bethe's entropy) and 0 (mean field); g
    is chosen so that the largest entropy is the log of the number of matchings. So it
    is exact for the uniform law, and a divergence from that is never negative. For
    n x n

    .. math:: g_n = (n \log n - \log n!) / (n (n - 1) \log (1 - 1/n))

    which is -1/2, and exact for every B, for n = 2. With a mask each block, a set of
    items that hang together, has its own g, from the exact number of its matchings if
    it has up to 16 items on the smaller side; larger ones have that of a full matrix of
    their size. The exact entropy is that of the Gibbs law with marginals B.

    Args:
        marginals: How likely each pair is, B of shape ``(*batch, n, m)``; rows and
            columns that have to be matched sum to one.
        mask: Allowed pairs, or a :class:`~pyro_permutations.MatchingGraph`, which says
            what may stay unmatched, too.

    Returns:
        Nats, ``(*batch,)``. The slope at marginals of zero is large, but finite.

    Raises:
        ValueError: If marginals are NaN, negative, larger than one or not zero where no
            matching has the pair, by more than rounding, 1e-3 (NaN counts as that).

    References:
        Chertkov and Yedidia, "Approximating the permanent with fractional belief
        propagation" (2013), for the family.

    Example:
        >>> B = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
        >>> calibrated_entropy(B)  # -.75 log .75 - .25 log .25
        tensor(0.5623)
        >>> calibrated_entropy(torch.ones(4, 4) / 4).exp()  # 4!
        tensor(24.0000)
    """
    n, m = marginals.shape[-2:]
    graph = matching_graph(mask, (n, m), marginals.device)
    lead = torch.broadcast_shapes(marginals.shape[:-2], graph.batch_shape)
    flat, graph = flattened(torch.Size(lead), graph)
    B = marginals.double().expand(*lead, n, m).reshape(*flat, n, m)
    most = torch.where(graph.support, 1 + _ROUNDING, _ROUNDING)
    if not holds((B >= -_ROUNDING) & (most >= B)):
        raise ValueError(
            "marginals must be probabilities, between 0 and 1 and 0 where no matching "
            "has the pair, got other entries or NaN."
        )
    values = []
    for k, block in enumerate(blocks(graph)):
        pairs, rest = entropy_terms(take_block(B, block), block)
        values.append((block, pairs - fraction(graph, k) * rest))
    return sum_blocks(values, B[..., 0, 0]).reshape(lead).to(marginals.dtype)


def entropy_terms(
    B: Tensor,  # (*lead, C, s, t)
    block: Block,
) -> tuple[Tensor, Tensor]:  # (*lead, C), (*lead, C)
    """Entropies of all marginals, and of what is left of pairs: -sum (1-B) log(1-B)."""
    pairs = _entropy(B).sum((-2, -1))
    if block.slack:
        for dim, free in ((-1, block.free_rows), (-2, block.free_columns)):
            pairs = pairs + torch.where(free, _entropy(1 - B.sum(dim)), 0.0).sum(-1)
    rest = torch.where(block.mask, _entropy(1 - B), 0.0)
    return pairs, rest.sum((-2, -1))


def _entropy(x: Tensor) -> Tensor:
    """Minus x log x; its slope at zero is large, but finite."""
    return -x * x.clamp_min(torch.finfo(x.dtype).tiny).log()


def fraction(graph: MatchingGraph, index: int) -> Tensor:  # (C,)
    """The number -g of the blocks of one size, between 0 and 1."""
    return _kept_fraction(graph, str(graph.device), index)


@lru_cache(maxsize=256)
@outside
def _kept_fraction(graph: MatchingGraph, device: str, index: int) -> Tensor:
    with torch.no_grad():
        return _fraction(blocks(graph)[index])


def _fraction(block: Block) -> Tensor:  # (C,)
    """The fraction whose largest entropy is the log of the number of matchings.

    The largest entropy falls with it, convexly, and its slope is minus what is left of
    the pairs: Newton's method, which comes from one side after the first step.
    """
    (C, s, t), device = block.mask.shape, block.mask.device
    free = block.free_rows, block.free_columns
    some = [bool(x.any()) for x in free]
    alike = all(bool(x.all()) for x, loose in zip(free, some, strict=True) if loose)
    # Not for partial matchings: there the largest entropy has another number of pairs.
    closed = alike and not all(some) and bool(block.mask.all())
    if block.size > COUNTED or closed:
        known = _full(min(s, t), max(s, t), all(some))
        return torch.full((C,), known, dtype=torch.float64, device=device)
    zeros = torch.zeros(C, s, t, dtype=torch.float64, device=device)
    log_count = torch.cat(
        [
            log_sum(x, mask, (rows, columns))
            for x, mask, rows, columns in zip(
                *(x.split(_TOGETHER) for x in (zeros, block.mask, *free)), strict=True
            )
        ]
    )
    gamma = zeros[:, 0, 0] + _full(min(s, t), max(s, t), False)
    for _ in range(_MOST_STEPS):
        entropy, B = fractional_maximum(zeros, block.mask, free, gamma)
        _, rest = entropy_terms(B, block)
        # Where all is decided nothing is left, and any number will do.
        excess = torch.where(rest > _PRECISION, entropy - log_count, 0.0)
        done = excess.abs() < _PRECISION
        # It is one where the pairs form a tree, and Bethe's entropy is exact.
        done |= (gamma == 1) & (excess > 0)
        if bool(done.all()):
            break
        step = torch.where(done, 0.0, excess / rest.clamp_min(_PRECISION))
        gamma = (gamma + step).clamp(0.0, 1.0)
    return gamma


@lru_cache(maxsize=256)
def _full(n: int, m: int, partial: bool) -> float:
    """The fraction if no pair is forbidden, n <= m; of n x n it is -g_n.

    All pairs have the same marginal p then, of the uniform law and at the maximum.
    """
    if m == 1 and not partial:
        return 0.0
    k = [float(n)]
    if partial:
        k = [float(links) for links in range(n + 1)]
    log_ways = [
        math.lgamma(n + 1) - math.lgamma(n - x + 1) - math.lgamma(x + 1)
        + math.lgamma(m + 1) - math.lgamma(m - x + 1)
        for x in k
    ]  # fmt: skip
    top = max(log_ways)
    weights = [math.exp(x - top) for x in log_ways]
    log_count = top + math.log(sum(weights))
    p = sum(w * x for w, x in zip(weights, k, strict=True)) / sum(weights) / (n * m)
    entropy = n * m * _plogp(p) + n * _plogp(1 - m * p) + m * _plogp(1 - n * p)
    return min(1.0, (entropy - log_count) / (n * m * _plogp(1 - p)))


def _plogp(x: float) -> float:
    return -x * math.log(x) if x > 1e-12 else 0.0
