# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The best matching of given scores, and the two forms of a permutation."""

from __future__ import annotations

__all__ = ["matching", "to_indices", "to_matrix"]

from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph, matching_graph

try:
    from lap import lapjvr_batch
except ImportError:  # scipy does the same, one by one
    lapjvr_batch = None


def matching(
    logits: Tensor,  # (*batch, n, n)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, n) bool
) -> Tensor:  # (*batch, n, n)
    r"""Return the perfect matching with the largest total score.

    .. math:: M(X) = \arg\max_{P} \sum_{ij} P_{ij} X_{ij}

    over the permutation matrices P. ``P[i, j] = 1`` says that row item i is matched
    to column item j. The answer is exact, up to rounding in float64, and a maximiser
    also where there are ties; it takes O(n^3) steps for each matrix, on the CPU. It is
    piecewise constant in the logits and carries no gradient. Works under
    ``torch.func.vmap``, and ``torch.jit.trace`` records it as a call.

    Args:
        logits: Scores of shape ``(*batch, n, n)``. Entries of ``-inf`` forbid pairs.
        mask: Allowed pairs, of a shape whose batch broadcasts with that of the
            logits, or a :class:`~pyro_permutations.matching_graph.MatchingGraph`.
            Forbidden pairs are never used, and the logits there are not looked at.

    Raises:
        ValueError: If allowed logits are NaN or ``+inf``, if the matrix is not square
            or is empty, or if the allowed pairs have no perfect matching.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0], [0.0, 4.0, 3.0]])
        >>> to_indices(matching(logits))
        tensor([2, 0, 1])
    """
    n, m = logits.shape[-2:] if logits.dim() >= 2 else (0, 0)
    if n != m or n == 0:
        raise ValueError(
            f"logits must have shape (*batch, n, n) with n >= 1, got "
            f"{tuple(logits.shape)}."
        )
    scores = logits.detach()
    if mask is not None:
        allowed = matching_graph(mask, (n, m), logits.device).allowed
        scores = torch.where(allowed, scores, -torch.inf)
    return _one_hot(_best(scores), logits.dtype)


def to_indices(
    P: Tensor,  # (*batch, n, n)
) -> Tensor:  # (*batch, n) long
    """Return ``perm`` with ``perm[i] = j`` where ``P[i, j] = 1``.

    The inverse of :func:`to_matrix`, which shows the orientation.

    Args:
        P: Permutation matrices of shape ``(*batch, n, n)``. Entries may miss 0 and 1
            by eight units of rounding, as those of straight-through values do.

    Raises:
        ValueError: If a matrix is not a permutation matrix. The largest entries of
            the rows of a soft matrix need not form a permutation: use
            :func:`matching` for the nearest one.

    Example:
        >>> to_indices(torch.eye(3)[[2, 0, 1]])
        tensor([2, 0, 1])
    """
    if P.dim() < 2 or P.shape[-2] != P.shape[-1] or P.shape[-1] == 0:
        raise ValueError(
            "expected matrices of shape (*batch, n, n) with n >= 1, got "
            f"{tuple(P.shape)}."
        )
    slack = 8 * torch.finfo(P.dtype).eps if P.is_floating_point() else 0
    ones = (P - 1).abs() <= slack if P.dtype != torch.bool else P
    binary = ones | (P.abs() <= slack) if P.dtype != torch.bool else torch.ones_like(P)
    if not (binary.all() and (ones.sum(-1) == 1).all() and (ones.sum(-2) == 1).all()):
        raise ValueError(
            "expected permutation matrices, one 1 per row and column and 0 elsewhere, "
            "got other values. The largest entries of the rows of a soft matrix need "
            "not form a permutation: pass it through matching(...) first."
        )
    return ones.long().argmax(-1)


def to_matrix(
    perm: Tensor,  # (*batch, n) of integers
    dtype: torch.dtype | None = None,
) -> Tensor:  # (*batch, n, n)
    """Return P with ``P[i, perm[i]] = 1``, so that ``(P @ x)[i] = x[perm[i]]``.

    Args:
        perm: Permutations of 0..n-1, of shape ``(*batch, n)``.
        dtype: Type of the result; the default floating point type if not given.

    Raises:
        ValueError: If the entries are not integers, or not each of 0..n-1 once.

    Example:
        >>> to_matrix(torch.tensor([2, 0, 1]))  # ones at (0, 2), (1, 0), (2, 1)
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]])

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
    n = perm.shape[-1]
    perm = perm.long()
    if not (perm.sort(-1).values == torch.arange(n, device=perm.device)).all():
        raise ValueError(
            f"perm must hold each of 0..{n - 1} once in its last dimension, "
            f"got {perm.tolist() if perm.numel() <= 20 else 'other entries'}."
        )
    return _one_hot(perm, torch.get_default_dtype() if dtype is None else dtype)


def _one_hot(perm: Tensor, dtype: torch.dtype) -> Tensor:
    columns = torch.arange(perm.shape[-1], device=perm.device)
    return (perm.unsqueeze(-1) == columns).to(dtype)


# An operator of its own, so that a trace records a call and not one assignment, and so
# that vmap reaches it as one batch. It sees real numbers: values are checked inside.
@torch.library.custom_op(
    "pyro_permutations::matching", mutates_args=(), schema="(Tensor logits) -> Tensor"
)
def _best(
    logits: Tensor,  # (*batch, n, m), -inf for forbidden pairs
) -> Tensor:  # (*batch, n) long
    scores = logits.double()
    if not (scores < torch.inf).all():  # also false for NaN
        raise ValueError(
            "logits must be numbers or -inf (a forbidden pair), got "
            f"{int(scores.isnan().sum())} NaN and {int(scores.isposinf().sum())} +inf "
            f"among {scores.numel()} entries."
        )
    *batch, n, m = logits.shape
    perm = best_assignments(scores.cpu().numpy().reshape(-1, n, m)).reshape(*batch, n)
    if (perm < 0).any():
        try:
            matching_graph(scores > -torch.inf, (n, m))
        except ValueError as error:
            raise ValueError(
                f"logits are -inf for forbidden pairs, and this {error}"
            ) from None
    return torch.from_numpy(perm).to(logits.device)


@_best.register_fake
def _(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.long)


@_best.register_vmap
def _(
    info: object, in_dims: tuple[int | None], logits: Tensor
) -> tuple[Tensor, int | None]:
    assert in_dims[0] is not None
    return _best(logits.movedim(in_dims[0], 0)), 0


def best_assignments(
    scores: NDArray[np.float64],  # (b, n, m), -inf for forbidden pairs
) -> NDArray[np.int64]:  # (b, n), -1 where there is no matching
    """Solve the assignments of a batch; the only place where that is done.

    Forbidden pairs stay infinite, so no sum of finite scores can pay for one. The batch
    solver of lapx is the faster one, where it is installed; scipy's takes infinite
    scores.
    """
    finite = np.isfinite(scores)
    size = np.abs(scores, where=finite, out=np.zeros_like(scores))
    if size.max(initial=0) > 1e290:  # keep the sums of n scores finite
        scores = np.ldexp(scores, -64)
    perm = np.full(scores.shape[:-1], -1)
    if lapjvr_batch is not None and finite.all() and perm.size:
        threads = torch.get_num_threads()
        _, _, found = lapjvr_batch(-scores, n_threads=threads)
        perm[:] = found
        return perm
    for k, each in enumerate(scores):
        with suppress(ValueError):  # "cost matrix is infeasible"
            perm[k] = linear_sum_assignment(each, maximize=True)[1]
    return perm
