# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The entropy of a law over matchings from its marginals alone, calibrated."""

from __future__ import annotations

__all__ = ["calibrated_entropy", "entropy_terms", "fractions"]

import math
from functools import lru_cache

import torch
from torch import Tensor

from pyro_permutations.fractional_solver import fractional_maximum
from pyro_permutations.matching_blocks import Block, blocks, sum_blocks, take_block
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.matching_parts import flattened
from pyro_permutations.subset_recursion import log_sum

# With a mask the matchings of blocks of up to this many items are counted, so many
# masks at a time.
_COUNTED = 16
_TOGETHER = 64
# The log of the number of matchings is met to this.
_PRECISION = 1e-9
_MOST_STEPS = 50


def calibrated_entropy(
    marginals: Tensor,  # (*batch, n, m)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
) -> Tensor:  # (*batch,)
    r"""Entropy of a law over matchings with given marginals, approximately.

    .. math:: H_g(B) = -\sum B \log B - g \sum (1 - B) \log (1 - B)
    """
    n, m = marginals.shape[-2:]
    graph = matching_graph(mask, (n, m), marginals.device)
    lead = torch.broadcast_shapes(marginals.shape[:-2], graph.batch_shape)
    flat, graph = flattened(torch.Size(lead), graph)
    B = marginals.double().expand(*lead, n, m).reshape(*flat, n, m)
    values = []
    for block, gamma in zip(blocks(graph), fractions(graph), strict=True):
        pairs, rest = entropy_terms(take_block(B, block), block)
        values.append((block, pairs - gamma * rest))
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


def fractions(graph: MatchingGraph) -> list[Tensor]:
    """The number -g for each of the graph's blocks, (C,) each, between 0 and 1."""
    return _fractions(graph, str(graph.device))


@lru_cache(maxsize=64)
def _fractions(graph: MatchingGraph, device: str) -> list[Tensor]:
    # The numbers outlive the mode in which they were first asked for.
    with torch.inference_mode(False), torch.no_grad():
        return [_fraction(block) for block in blocks(graph)]


def _fraction(block: Block) -> Tensor:  # (C,)
    """The fraction with which the largest entropy is the log of the number of matchings.

    The largest entropy falls with it, convexly, and its slope is minus what is left of
    the pairs: Newton's method, which comes from one side after the first step.
    """
    (C, s, t), device = block.mask.shape, block.mask.device
    free = block.free_rows, block.free_columns
    some = [bool(x.any()) for x in free]
    alike = all(bool(x.all()) for x, loose in zip(free, some, strict=True) if loose)
    # Not for partial matchings: there the largest entropy has another number of pairs.
    closed = alike and not all(some) and bool(block.mask.all())
    if block.size > _COUNTED or closed:
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
