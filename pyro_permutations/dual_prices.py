# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Prices of rows and columns under which the best matching of scores costs nothing."""

from __future__ import annotations

__all__ = ["dual_prices"]

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_permutations.matching import IMPOSSIBLE, best_assignments


# An operator of its own, as the best matching is one: a trace records a call, and vmap
# reaches it as one batch.
@torch.library.custom_op(
    "pyro_permutations::dual_prices",
    mutates_args=(),
    schema="(Tensor scores, Tensor rows, Tensor columns) -> (Tensor, Tensor)",
)
def dual_prices(
    scores: Tensor,  # (*batch, n, m) float64, -inf where forbidden
    rows: Tensor,  # (*batch, n) bool, may stay unmatched for a score of zero
    columns: Tensor,  # (*batch, m) bool
) -> tuple[Tensor, Tensor]:  # (*batch, n), (*batch, m)
    r"""Solution of the linear program that is dual to the best matching.

    .. math:: u_i + v_j \geq x_{ij}, \quad u_i, v_j \geq 0 \text{ where free}

    with equality for the pairs of the best matching, and for what it leaves unmatched.
    So with weights :math:`e^{x_{ij} - u_i - v_j}` of pairs, :math:`e^{-u_i}` of
    unmatched rows and :math:`e^{-v_j}` of unmatched columns, none exceeds one, and the
    best matching has weight one: sums over matchings neither overflow nor vanish.
    """
    *batch, n, m = scores.shape
    x = scores.cpu().numpy().reshape(-1, n, m)
    free = rows.cpu().numpy().reshape(-1, n), columns.cpu().numpy().reshape(-1, m)
    perfect = n == m and not free[0].any() and not free[1].any()
    perm = best_assignments(x, None if perfect else free)
    if (perm == IMPOSSIBLE).any():
        raise ValueError("a mask without a matching came through: file a bug.")
    u, v = _prices(x, perm, free)
    return (
        torch.from_numpy(u.reshape(*batch, n)).to(scores.device),
        torch.from_numpy(v.reshape(*batch, m)).to(scores.device),
    )


def _prices(
    x: NDArray[np.float64],  # (b, n, m)
    perm: NDArray[np.int64],  # (b, n), -1 for unmatched
    free: tuple[NDArray[np.bool_], NDArray[np.bool_]],  # (b, n), (b, m)
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Longest paths over columns and the state of being unmatched, which costs zero.

    A matched row has u_i = x_ik - v_k with k its column, which leaves of the
    conditions differences v_j - v_k >= x_ij - x_ik. An unmatched row has u_i = 0. There
    is no cycle of positive length, or the matching could be improved along it. Of all
    solutions, a polytope, this is the middle of the least and the largest: there no
    pair costs nothing that need not.
    """
    b, _, m = x.shape
    matched = perm >= 0
    own = np.take_along_axis(x, np.where(matched, perm, 0)[..., None], -1)
    length = np.full((b, m + 1, m + 1), -np.inf)
    alone = np.where(matched[..., None], -np.inf, x).max(-2, initial=-np.inf)
    length[:, m, :m] = np.maximum(alone, np.where(free[1], 0.0, -np.inf))
    element, row = np.nonzero(matched)
    k = perm[element, row]
    length[element, k, :m] = x[element, row] - own[element, row]
    length[element, k, m] = np.where(
        free[0][element, row], -own[element, row, 0], -np.inf
    )
    taken = np.zeros((b, m), dtype=np.bool_)
    taken[element, k] = True
    length[:, :m, m] = np.where(taken, length[:, :m, m], 0.0)
    least, most = _longest(length), -_longest(length.swapaxes(-1, -2))
    v = (least + most) / 2
    v = v[:, :m] - v[:, m:]
    price = np.take_along_axis(v, np.where(matched, perm, 0), -1)
    return np.where(matched, own[..., 0] - price, 0.0), v


def _longest(length: NDArray[np.float64]) -> NDArray[np.float64]:  # (b, k, k), (b, k)
    """The longest path to each node, from anywhere."""
    v = np.zeros(length.shape[:-1])
    for _ in range(length.shape[-1]):
        longer = np.maximum(v, (v[..., None] + length).max(-2))
        if np.array_equal(longer, v):
            break
        v = longer
    return v


@dual_prices.register_fake
def _(scores: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape[:-1]), scores.new_empty(
        (*scores.shape[:-2], scores.shape[-1])
    )


@dual_prices.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    moved = [
        x.movedim(d, 0) if d is not None else x.expand(info.batch_size, *x.shape)
        for x, d in zip(arguments, in_dims, strict=True)
    ]
    return dual_prices(*moved), (0, 0)
