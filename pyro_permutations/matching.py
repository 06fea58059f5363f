# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The best matching of given scores, and the two forms of a permutation."""

from __future__ import annotations

__all__ = ["matching", "to_indices", "to_matrix"]

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_permutations.mask_analysis import may_stay_unmatched
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.unmatched_scores import Unmatched, relative_scores

try:
    from lap import lapjvr_batch
except ImportError:  # scipy does the same, one by one
    lapjvr_batch = None  # type: ignore[assignment, unused-ignore]


def matching(
    logits: Tensor,  # (*batch, n, m)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m) bool
    unmatched: Unmatched | None = None,  # (*batch, n), (*batch, m)
) -> Tensor:  # (*batch, n, m)
    r"""Return the matching with the largest total score.

    .. math:: M(X) = \arg\max_{P} \sum_{ij} P_{ij} X_{ij}

    over the permutation matrices P, or, with n < m, over the matrices that match every
    row to a column of its own. ``P[i, j] = 1`` says that row item i is matched to
    column item j. With ``unmatched`` any row or column may stay without a partner, and
    then counts with that score. The answer is exact, up to rounding in float64, and a
    maximiser also where there are ties; it takes O(n m^2) steps for each matrix, on
    the CPU. It is piecewise constant in the logits and carries no gradient. Works
    under ``torch.func.vmap``, and ``torch.jit.trace`` records it as a call.

    Args:
        logits: Scores of shape ``(*batch, n, m)``. Entries of ``-inf`` forbid pairs.
        mask: Allowed pairs, of a shape whose batch broadcasts with that of the
            logits, or a :class:`~pyro_permutations.matching_graph.MatchingGraph`.
            Forbidden pairs are never used, and the logits there are not looked at.
        unmatched: Scores of unmatched rows and of unmatched columns, numbers or
            tensors; ``-inf`` for those that have to be matched.

    Raises:
        ValueError: If allowed logits are NaN or ``+inf``, if there are more rows than
            columns that all have to be matched, or if the allowed pairs have no
            matching.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0], [0.0, 4.0, 3.0]])
        >>> to_indices(matching(logits))
        tensor([2, 0, 1])
        >>> to_indices(matching(logits[:2]))
        tensor([2, 0])
        >>> to_indices(matching(logits, unmatched=(0.0, 2.5)))
        tensor([ 2, -1,  1])
    """
    n, m = logits.shape[-2:] if logits.dim() >= 2 else (0, 0)
    if n == 0 or m == 0:
        raise ValueError(
            "logits must have shape (*batch, n, m) with n, m >= 1, got "
            f"{tuple(logits.shape)}."
        )
    scores, free = relative_scores(logits.detach(), unmatched)
    graph = None
    if mask is not None or (free is None and n > m):
        graph = matching_graph(mask, (n, m), logits.device, unmatched=free)
        scores = torch.where(graph.allowed, scores, -torch.inf)
    if graph is not None and graph.has_slack:
        free = graph.free_rows, graph.free_columns
    if free is not None:
        lead = scores.shape[:-2]
        free = free[0].expand(*lead, n), free[1].expand(*lead, m)
    return _one_hot(_best(scores, *(free or (None, None))), m, logits.dtype)


def to_indices(
    P: Tensor,  # (*batch, n, m)
) -> Tensor:  # (*batch, n) long
    """Return ``perm`` with ``perm[i] = j`` where ``P[i, j] = 1``; -1 for no partner.

    The inverse of :func:`to_matrix`, which shows the orientation.

    Args:
        P: Matrices of zeros and ones of shape ``(*batch, n, m)``, with at most a one
            in every row and column. Entries may miss 0 and 1 by eight units of
            rounding, as those of straight-through values do.

    Raises:
        ValueError: If a matrix is not of that kind. The largest entries of the rows of
            a soft matrix need not form a matching: use :func:`matching` for the
            nearest one.

    Example:
        >>> to_indices(torch.eye(3)[[2, 0, 1]])
        tensor([2, 0, 1])
    """
    if P.dim() < 2 or P.shape[-2] == 0 or P.shape[-1] == 0:
        raise ValueError(
            "expected matrices of shape (*batch, n, m) with n, m >= 1, got "
            f"{tuple(P.shape)}."
        )
    slack = 8 * torch.finfo(P.dtype).eps if P.is_floating_point() else 0
    ones = (P - 1).abs() <= slack if P.dtype != torch.bool else P
    binary = ones | (P.abs() <= slack) if P.dtype != torch.bool else torch.ones_like(P)
    if not (binary.all() and (ones.sum(-1) <= 1).all() and (ones.sum(-2) <= 1).all()):
        raise ValueError(
            "expected permutation matrices or partial ones, at most one 1 per row and "
            "column and 0 elsewhere, got other values. The largest entries of the rows "
            "of a soft matrix need not form a matching: pass it through matching(...) "
            "first."
        )
    return torch.where(ones.any(-1), ones.long().argmax(-1), -1)


def to_matrix(
    perm: Tensor,  # (*batch, n) of integers
    dtype: torch.dtype | None = None,
    *,
    columns: int | None = None,
) -> Tensor:  # (*batch, n, m)
    """Return P with ``P[i, perm[i]] = 1``, so that ``(P @ x)[i] = x[perm[i]]``.

    Args:
        perm: Permutations of 0..n-1, of shape ``(*batch, n)``; or columns, none of
            them twice, with -1 for a row without a partner.
        dtype: Type of the result; the default floating point type if not given.
        columns: The number m of columns, n if not given.

    Raises:
        ValueError: If the entries are not integers, or not of 0..m-1, or the same
            column twice.

    Example:
        >>> to_matrix(torch.tensor([2, 0, 1]))  # ones at (0, 2), (1, 0), (2, 1)
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]])
        >>> to_matrix(torch.tensor([2, -1]), columns=3)
        tensor([[0., 0., 1.],
                [0., 0., 0.]])

        The permutation that sorts:

        >>> x = torch.tensor([3.0, 1.0, 2.0])
        >>> to_matrix(x.argsort()) @ x  # argsort is [1, 2, 0]
        tensor([1., 2., 3.])
    """
    integers = not (
        perm.is_floating_point() or perm.is_complex() or perm.dtype == torch.bool
    )
    if perm.dim() < 1 or not integers:
        raise ValueError(
            f"perm must be integers of shape (*batch, n), got {perm.dtype} of shape "
            f"{tuple(perm.shape)}."
        )
    m = perm.shape[-1] if columns is None else columns
    perm = perm.long()
    P = _one_hot(perm, m, torch.get_default_dtype() if dtype is None else dtype)
    unknown = (perm < -1) | (perm >= m)
    if unknown.any() or (P.sum(-2, dtype=torch.float64) > 1).any():
        raise ValueError(
            f"perm must hold each of 0..{m - 1} at most once in its last dimension, "
            "and -1 for no partner, "
            f"got {perm.tolist() if perm.numel() <= 20 else 'other entries'}."
        )
    return P


def _one_hot(perm: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return (perm.unsqueeze(-1) == torch.arange(columns, device=perm.device)).to(dtype)


# An operator of its own, so that a trace records a call and not one assignment, and so
# that vmap reaches it as one batch. It sees real numbers: values are checked inside.
@torch.library.custom_op(
    "pyro_permutations::matching",
    mutates_args=(),
    schema="(Tensor logits, Tensor? rows, Tensor? columns) -> Tensor",
)
def _best(
    logits: Tensor,  # (*batch, n, m), -inf for forbidden pairs
    rows: Tensor | None,  # (*batch, n) bool, may stay unmatched
    columns: Tensor | None,  # (*batch, m) bool
) -> Tensor:  # (*batch, n) long
    scores = logits.double()
    if not (scores < torch.inf).all():  # also false for NaN
        raise ValueError(
            "logits must be numbers or -inf (a forbidden pair), got "
            f"{int(scores.isnan().sum())} NaN and {int(scores.isposinf().sum())} +inf "
            f"among {scores.numel()} entries."
        )
    *batch, n, m = logits.shape
    free = None if rows is None or columns is None else (rows, columns)
    arrays = None
    if free is not None:
        arrays = tuple(x.cpu().numpy().reshape(-1, x.shape[-1]) for x in free)
    perm = best_assignments(scores.cpu().numpy().reshape(-1, n, m), arrays)
    if (perm == IMPOSSIBLE).any():
        try:
            matching_graph(scores > -torch.inf, (n, m), unmatched=free)
        except ValueError as error:
            raise ValueError(
                f"logits are -inf for forbidden pairs, and this {error}"
            ) from None
    return torch.from_numpy(perm.reshape(*batch, n)).to(logits.device)


@_best.register_fake
def _(logits: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.long)


@_best.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    logits: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, int | None]:
    moved = [
        x
        if x is None
        else x.movedim(d, 0)
        if d is not None
        else x.expand(info.batch_size, *x.shape)
        for x, d in zip((logits, rows, columns), in_dims, strict=True)
    ]
    return _best(*moved), 0


# In place of a column where there is no matching.
IMPOSSIBLE = -2


def best_assignments(
    scores: NDArray[np.float64],  # (b, n, m), -inf for forbidden pairs
    free: tuple[NDArray[np.bool_], ...] | None = None,  # (b, n), (b, m)
) -> NDArray[np.int64]:  # (b, n), -1 for no partner
    """Solve the assignments of a batch; the only place where that is done.

    Rows and columns that are free may stay unmatched, for a score of zero; None is as
    for :func:`matching_graph`. Forbidden pairs stay infinite, so no sum of finite
    scores can pay for one. The batch solver of lapx is the faster one, where it is
    installed; scipy's takes infinite scores.
    """
    b, n, m = scores.shape
    finite = np.isfinite(scores)
    every = bool(finite.all())
    low = (scores if every else np.where(finite, scores, 0.0)).min(initial=0)
    if max(scores.max(initial=0), -low) > 1e290:  # keep the sums of n scores finite
        scores = np.ldexp(scores, -64)
    perm = np.full((b, n), IMPOSSIBLE)
    if free is None and n == m and lapjvr_batch is not None and every and perm.size:
        threads = torch.get_num_threads()
        _, _, found = lapjvr_batch(-scores, n_threads=threads)
        perm[:] = found
        return perm
    rows, columns = may_stay_unmatched(finite) if free is None else free
    # Where every row is matched, and every column or any, scipy needs no help.
    bound = ~rows.any(-1) & (columns.all(-1) | (n == m)) & (n <= m)
    for k, each in enumerate(scores):
        with suppress(ValueError):  # "cost matrix is infeasible"
            if bound[k]:
                perm[k] = linear_sum_assignment(each, maximize=True)[1]
            else:
                perm[k] = _assignment(each, finite[k], (rows[k], columns[k]))
    return perm


def _assignment(
    scores: NDArray[np.float64],  # (n, m)
    finite: NDArray[np.bool_],  # (n, m)
    free: tuple[NDArray[np.bool_], NDArray[np.bool_]],  # (n,), (m,)
) -> NDArray[np.int64]:  # (n,)
    """One assignment of what can be matched; raises ValueError if there is none."""
    if free[0].all() and free[1].all():
        # What is worth less than to stay unmatched is as good as that, and taken apart.
        i, j = linear_sum_assignment(scores.clip(0), maximize=True)
        perm = np.full(len(scores), -1)
        perm[i] = np.where(scores[i, j] > 0, j, -1)
        return perm
    full, wide = finite.any(1), finite.any(0)
    i, j = np.flatnonzero(full | ~free[0]), np.flatnonzero(wide | ~free[1])
    scores, rows, columns = scores[np.ix_(i, j)], free[0][i], free[1][j]
    perm = np.full(full.size, -1)
    bound = not rows.any() and (i.size == j.size or bool(columns.all()))
    if bound and i.size <= j.size:
        perm[i] = j[linear_sum_assignment(scores, maximize=True)[1]]
    else:
        # Unmatched is matched to a dummy of one's own; dummies go with any dummy.
        apart = (
            np.where(np.diag(rows), 0, -np.inf),
            np.where(np.diag(columns), 0, -np.inf),
        )
        block = np.block([[scores, apart[0]], [apart[1], np.zeros(scores.T.shape)]])
        chosen = linear_sum_assignment(block, maximize=True)[1][: i.size]
        perm[i] = np.where(
            chosen < j.size, np.append(j, -1)[chosen.clip(0, j.size)], -1
        )
    return perm
