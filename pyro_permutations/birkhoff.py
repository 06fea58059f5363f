# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A doubly stochastic matrix as a mixture of matchings."""

from __future__ import annotations

__all__ = ["birkhoff_decomposition"]

import torch
from torch import Tensor

from pyro_permutations.matching import matching, to_indices

# How far from doubly stochastic a matrix may be, and how much of it may be left over.
_TOLERANCE = 1e-4


def birkhoff_decomposition(
    P: Tensor,  # (n, m)
) -> tuple[Tensor, Tensor]:  # (k, n) long, (k,)
    r"""Write a doubly stochastic matrix as a mixture of permutation matrices.

    .. math:: P = \sum_k w_k P_k, \qquad w_k > 0, \quad \sum_k w_k = 1

    with at most :math:`(n - 1)^2 + 1` terms if P is square with sums of one, and else
    :math:`(n + m - 1)^2 + 1`. Each takes away as much as it can of the
    matching with the largest product of entries. The mixture has P as its marginals,
    but is one of many that have: it is not the law that P was estimated from.

    Where sums are less than one, what they lack is that of staying unmatched, and the
    terms are partial matchings. Entries and sums may be off by rounding; what is left
    when the other entries have no matching any more is dropped, and the weights are
    scaled to sum to one. It is of the size of the error of the sums.

    Args:
        P: One matrix of shape ``(n, m)``, with entries of at least zero, and sums of
            rows and columns of at most one.

    Returns:
        The matchings as indices, -1 for no partner, and their weights, in the order in
        which they were taken.

    Raises:
        ValueError: If P is not such a matrix, to 1e-4, or what its dtype can tell.

    References:
        Birkhoff, "Tres observaciones sobre el algebra lineal" (1946).

    Example:
        >>> P = torch.tensor([[0.7, 0.3, 0.0], [0.3, 0.5, 0.2], [0.0, 0.2, 0.8]])
        >>> birkhoff_decomposition(P)
        (tensor([[0, 1, 2],
                [1, 0, 2],
                [0, 2, 1]]), tensor([0.5000, 0.3000, 0.2000]))
    """
    if P.dim() != 2 or 0 in P.shape:
        raise ValueError(
            f"P must be one matrix of shape (n, m), got {tuple(P.shape)}; those of "
            "a batch are decomposed one by one."
        )
    exact = P.detach().double()
    largest = max(float(exact.sum(-1).amax()), float(exact.sum(-2).amax()))
    rounding = torch.finfo(P.dtype).eps if P.is_floating_point() else 0.0
    tolerance = max(_TOLERANCE, rounding)
    if not (float(exact.amin()) >= -tolerance and largest <= 1 + tolerance):
        raise ValueError(
            "P must have entries of at least 0, and sums of at most 1; its least entry "
            f"is {float(exact.amin()):.3g} and its largest sum {largest:.3g}. "
            "sinkhorn(logits) makes a doubly stochastic matrix of scores."
        )
    n, m = P.shape
    rest = _with_slack(exact.clamp_min(0), tolerance)
    found, weights = [], []
    while bool((rest > 0).any(-1).all() and (rest > 0).any(-2).all()):
        try:
            perm = to_indices(matching(rest.log()))
        except ValueError:  # what is left has no matching
            break
        size = rest.gather(-1, perm[:, None])
        weight = size.amin()
        # The least is used up exactly, so that every step leaves one entry fewer.
        left = torch.where(size > weight, size - weight, 0.0)
        rest = rest.scatter(-1, perm[:, None], left)
        found.append(torch.where(perm[:n] < m, perm[:n], -1))
        weights.append(weight)
    total = torch.stack(weights)
    return torch.stack(found), (total / total.sum()).to(P.dtype)


def _with_slack(
    P: Tensor,  # (n, m)
    tolerance: float,
) -> Tensor:  # (n, n) or (n + m, n + m)
    """A square matrix with sums of one whose upper left corner is P.

    With r and s what rows and columns lack, [[P, diag r], [diag s, P']] is one.
    """
    # Where a side lacks nothing but rounding, all of it is matched.
    rows, columns = (
        torch.where(lack.amax() <= tolerance, 0.0, lack.clamp_min(0))
        for lack in (1 - P.sum(-1), 1 - P.sum(-2))
    )
    if not (rows.any() or columns.any()):
        return P
    upper = torch.cat([P, rows.diag()], -1)
    return torch.cat([upper, torch.cat([columns.diag(), P.mT], -1)])
