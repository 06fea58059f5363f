# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Log permanents: exact, calibrated, Bethe's and Sinkhorn's, four different numbers."""

from __future__ import annotations

__all__ = [
    "bethe_log_permanent",
    "calibrated_entropy",
    "calibrated_log_permanent",
    "log_partition",
    "log_permanent",
    "sinkhorn_log_permanent",
]

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyro_permutations.fractional_entropy import (
    calibrated_entropy,
    entropy_terms,
    fraction,
)
from pyro_permutations.fractional_solver import fractional_maximum
from pyro_permutations.matching_blocks import Block, blocks, sum_blocks, take_block
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.matching_parts import flattened
from pyro_permutations.matching_sampler import EXACT
from pyro_permutations.sinkhorn_arguments import checked
from pyro_permutations.subset_recursion import log_sum
from pyro_permutations.unmatched_scores import Unmatched

# The smaller side of a block may have this many items in an exact sum: 2^20 subsets.
LARGEST_EXACT = 20
# Bethe's objective is linear where two entries of a row compete, and its maximum often
# at a corner. The maximum at 1 - this in place of one is right to its square.
_ALMOST = 1e-5

# Scores (a, C, s, t) of a block, and how to find its fractions (C,), to values (a, C).
_Fraction = Callable[[], Tensor]
_Solver = Callable[[Tensor, Block, _Fraction], Tensor]


def log_permanent(
    logits: Tensor,  # (*batch, n, m)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
    unmatched: Unmatched | None = None,  # (*batch, n), (*batch, m)
) -> Tensor:  # (*batch,)
    r"""Log of the sum over all matchings of the exponential of their scores, exactly.

    .. math:: \log \text{per}(e^X) = \log \sum_P \exp \sum_{ij} P_{ij} X_{ij}

    over permutation matrices P; with n < m over matrices that match every row to a
    column of its own; with ``unmatched`` over all partial matchings, whose score counts
    those of unmatched rows and columns. It is the log of the evidence of a matching
    whose log likelihood is the sum of the scores of its pairs.

    By recursion over the subsets of the smaller side, n 2^(n-1) products for n x n,
    after the prices of rows and columns at the best matching have been taken off. All
    terms are positive: nothing cancels, overflows or vanishes. With a gradient it keeps
    about n 2^n numbers. A mask is taken apart into blocks first. The gradient with
    respect to X are the marginals, P(i is matched to j), and it can be differentiated
    any number of times.

    Args:
        logits: Scores X of shape ``(*batch, n, m)``. ``-inf`` forbids a pair.
        mask: Allowed pairs, or a :class:`~pyro_permutations.MatchingGraph`.
        unmatched: Scores of unmatched rows and of unmatched columns, numbers or
            tensors; ``-inf`` for those that have to be matched.

    Raises:
        ValueError: If a block has more than 20 items on its smaller side; if logits are
            NaN or ``inf``, or the mask has no matching.

    References:
        Ryser, "Combinatorial Mathematics" (1963), for the other formula, whose terms
        alternate in sign.

    Example:
        >>> log_permanent(torch.zeros(4, 4)).exp()
        tensor(24.0000)
        >>> log_permanent(torch.zeros(2, 2), unmatched=(0.0, 0.0)).exp()
        tensor(7.0000)
    """
    scores, graph, constant = _problem(logits, mask, unmatched)
    most = max((block.size for block in blocks(graph)), default=0)
    if most > LARGEST_EXACT:
        raise ValueError(
            f"an exact log permanent takes up to {LARGEST_EXACT} items on the smaller "
            f"side, but here {most} hang together. Use calibrated_log_permanent(...), "
            "which is off by some tenths of a nat."
        )
    return (_by_block(_exact, scores, graph) + constant).to(logits.dtype)


def calibrated_log_permanent(
    logits: Tensor,  # (*batch, n, m)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
) -> Tensor:  # (*batch,)
    r"""Log permanent by an entropy that is exact for two items and for equal scores.

    .. math:: \max_B \sum_{ij} B_{ij} X_{ij} + H_g(B)

    over the doubly stochastic B on the mask, with :func:`calibrated_entropy`, whose g
    is exact at permutations and for the uniform law. It takes one convex program, of
    which the residual is checked. For normal scores it is low: for 12 x 12 by .04 nats
    in the mean and .09 at worst at standard deviation 1, and .3 and .7 at 4
    (``benchmarks/permanents.py``); where all of 12 items but two are certain by .49 of
    their log 2 (there, too). The gradient is B, which approximates the marginals; it
    can be differentiated once more.

    Args:
        logits: Scores X of shape ``(*batch, n, m)``. ``-inf`` forbids a pair.
        mask: Allowed pairs, or a :class:`~pyro_permutations.MatchingGraph`; that of a
            partial matching has logits relative to being unmatched.

    Raises:
        ValueError: If logits are NaN or ``inf``, or the mask has no matching.

    Warns:
        ConvergenceWarning: If a column sum of B is off by more than 1e-6.

    Example:
        >>> calibrated_log_permanent(torch.zeros(30, 30))  # log 30!
        tensor(74.6582)
    """
    scores, graph, _ = _problem(logits, mask, None)
    return _by_block(_fractional, scores, graph).to(logits.dtype)


def bethe_log_permanent(
    logits: Tensor,  # (*batch, n, m)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
) -> Tensor:  # (*batch,)
    r"""The log of Bethe's permanent, a lower bound.

    .. math:: \max_B \sum_{ij} B_{ij} X_{ij} - \sum B \log B
        + \sum (1 - B) \log (1 - B)

    which is what belief propagation converges to. It is at most the log permanent, and
    for n x n at least that less n/2 log 2; with equal scores it is lower by about
    1/2 log(2 pi n / e). Near corners the marginals, its gradient, jump to zero and one.

    Arguments, errors and warnings are those of :func:`calibrated_log_permanent`. It can
    be differentiated once.

    References:
        Vontobel, "The Bethe permanent of a nonnegative matrix" (2013); Gurvits and
        Samorodnitsky, "Bounds on the permanent and some applications" (2014); Anari and
        Rezaei, "A tight analysis of Bethe approximation for permanent" (2019).

    Example:
        >>> bethe_log_permanent(torch.zeros(2, 2))  # the log permanent is log 2
        tensor(0.)
    """
    scores, graph, _ = _problem(logits, mask, None)
    return _by_block(_bethe, scores, graph).to(logits.dtype)


def sinkhorn_log_permanent(
    logits: Tensor,  # (*batch, n, m)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
) -> Tensor:  # (*batch,)
    r"""The log of the capacity of exp(X), an upper bound.

    .. math:: \max_B \sum_{ij} B_{ij} X_{ij} - \sum B \log B
        = \log \inf_{x > 0} \prod_i (e^X x)_i / \prod_j x_j

    taken at B = :func:`sinkhorn` of X. For n x n it is at least the log permanent, and
    the log permanent is at least this plus log(n! / n^n), by van der Waerden's bound.

    Arguments, errors and warnings are those of :func:`calibrated_log_permanent`.

    References:
        Linial, Samorodnitsky and Wigderson, "A deterministic strongly polynomial
        algorithm for matrix scaling and approximate permanents" (2000).

    Example:
        >>> sinkhorn_log_permanent(torch.zeros(4, 4)).exp()  # 4^4
        tensor(256.)
    """
    scores, graph, _ = _problem(logits, mask, None)
    return _by_block(_capacity, scores, graph).to(logits.dtype)


def log_partition(
    scores: Tensor,  # (*lead, n, m) float64, finite
    graph: MatchingGraph,
) -> Tensor:  # (*lead,)
    """Log permanent, exact for blocks of up to 12 items and calibrated for others."""
    return _by_block(_best_known, scores, graph)


def marginals(
    scores: Tensor,  # (*lead, n, m) float64, finite
    graph: MatchingGraph,
) -> Tensor:  # (*lead, n, m)
    """The gradient of :func:`log_partition`, differentiable in turn."""
    lead = torch.broadcast_shapes(scores.shape[:-2], graph.batch_shape)
    scores = scores.expand(
        *lead, *graph.shape
    )  # each element has a gradient of its own
    gradient: Tensor = torch.func.grad(lambda x: log_partition(x, graph).sum())(scores)
    return gradient


def is_exact(graph: MatchingGraph) -> Tensor:  # (n, m) bool
    """The pairs for which :func:`marginals` are exact."""
    exact = torch.ones(
        (*graph.batch_shape, *graph.shape), dtype=torch.bool, device=graph.device
    ).reshape(-1, *graph.shape)
    for block in blocks(graph):
        if block.size > EXACT:
            rows, columns = block.rows[:, :, None], block.columns[:, None, :]
            exact[block.element[:, None, None], rows, columns] = False
    return exact.reshape(*graph.batch_shape, *graph.shape)


def _exact(scores: Tensor, block: Block, gamma: _Fraction) -> Tensor:
    lead, shape = scores.shape[:2], scores.shape[2:]
    mask, *free = (
        x.expand(lead[0], *x.shape).flatten(0, 1)
        for x in (block.mask, block.free_rows, block.free_columns)
    )
    return log_sum(scores.reshape(-1, *shape), mask, (free[0], free[1])).reshape(lead)


def _fractional(scores: Tensor, block: Block, gamma: _Fraction) -> Tensor:
    return _maximum(scores, block, gamma())[0]


def _capacity(scores: Tensor, block: Block, gamma: _Fraction) -> Tensor:
    return _maximum(scores, block, scores.new_zeros(scores.shape[1]))[0]


def _bethe(scores: Tensor, block: Block, gamma: _Fraction) -> Tensor:
    almost = scores.new_full(scores.shape[1:2], 1 - _ALMOST)
    value, B = _maximum(scores, block, almost)
    return value - _ALMOST * entropy_terms(B, block)[1]


def _best_known(scores: Tensor, block: Block, gamma: _Fraction) -> Tensor:
    return (_exact if block.size <= EXACT else _fractional)(scores, block, gamma)


def _maximum(scores: Tensor, block: Block, gamma: Tensor) -> tuple[Tensor, Tensor]:
    if scores.shape[-2:] == (1, 1) and not block.slack:  # a pair that is decided
        return scores[..., 0, 0], torch.ones_like(scores)
    free = block.free_rows, block.free_columns
    if scores.shape[-2] < scores.shape[-1]:  # the multipliers on the smaller side
        value, B = fractional_maximum(scores.mT, block.mask.mT, free[::-1], gamma)
        return value, B.mT
    return fractional_maximum(scores, block.mask, free, gamma)


def _by_block(solver: _Solver, scores: Tensor, graph: MatchingGraph) -> Tensor:
    lead = torch.Size(torch.broadcast_shapes(scores.shape[:-2], graph.batch_shape))
    flat, graph = flattened(lead, graph)
    x = scores.expand(*lead, *graph.shape).reshape(*flat, *graph.shape)
    values = [
        (block, solver(take_block(x, block), block, partial(fraction, graph, k)))
        for k, block in enumerate(blocks(graph))
    ]
    return sum_blocks(values, x[..., 0, 0]).reshape(lead)


def _problem(
    logits: Tensor,
    mask: Tensor | MatchingGraph | None,
    unmatched: Unmatched | None,
) -> tuple[Tensor, MatchingGraph, Tensor]:
    """Scores over being unmatched, what the mask allows, and the score of no pair."""
    scores, graph, _ = checked(logits, 1.0, mask, unmatched, None)
    n, m = graph.shape
    constant = scores.new_zeros(())
    for score, size in zip(unmatched or (), (n, m), strict=False):
        x = torch.as_tensor(score, dtype=scores.dtype, device=scores.device)
        x = torch.where(x > -torch.inf, x, 0.0)
        constant = constant + (x.sum(-1) if x.dim() else x * size)
    return scores[..., :n, :m], graph, constant
