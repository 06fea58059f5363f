# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Sums over all matchings by recursion over subsets, and draws from its tables."""

from __future__ import annotations

__all__ = ["Weights", "log_sum", "reduced_weights", "sample_matching", "subset_tables"]

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_permutations.dual_prices import dual_prices
from pyro_permutations.outside import outside

# Tables of indices for more items than this are made anew for each call.
_KEPT = 16


class Weights(NamedTuple):
    """Weights of pairs and of being unmatched; the best matching has weight one.

    Rows are the smaller side. The weight of a matching is the product of those of its
    pairs and of what it leaves unmatched.
    """

    pairs: Tensor  # (b, s, t)
    rows: Tensor  # (b, s)
    columns: Tensor  # (b, t)
    loose: tuple[bool, bool]  # whether some row, some column may stay unmatched


def log_sum(
    scores: Tensor,  # (b, s, t) float64
    mask: Tensor,  # (b, s, t) bool
    free: tuple[Tensor, Tensor],  # (b, s), (b, t) bool
) -> Tensor:  # (b,)
    """Log of the sum of exp(score) over all matchings, exactly.

    Subsets of the smaller side, of k items: k 2^(k-1) products for a square one, and
    all terms are positive. Differentiable any number of times.
    """
    weights, constant = reduced_weights(scores, mask, free)
    *_, (last, low) = _recursion(weights)
    return constant + _ends(weights, last, low).sum(-1).log()


def reduced_weights(
    scores: Tensor,  # (b, s, t) float64
    mask: Tensor,  # (b, s, t) bool
    free: tuple[Tensor, Tensor],  # (b, s), (b, t) bool
) -> tuple[Weights, Tensor]:  # and (b,), the log of what was divided out
    """Weights relative to the best matching, in which nothing over- or underflows.

    With prices of rows and columns taken off, no weight exceeds one, and the best
    matching has weight one. Matchings that underflow are nothing beside it. The prices
    are constants: a sum over matchings has the same gradient with any.
    """
    if scores.shape[-2] > scores.shape[-1]:
        scores, mask, free = scores.mT, mask.mT, free[::-1]
    inside = torch.where(mask, scores, -torch.inf)
    u, v = dual_prices(inside.detach(), *(x.expand(inside.shape[0], -1) for x in free))
    # In this order pairs of the best matching come to zero exactly; and what rounding
    # makes of scores of 1e20 is not to overflow.
    cost = torch.where(mask, scores - v[..., None, :] - u[..., None], 0.0)
    cost = cost - cost.detach().clamp_min(0.0)
    weights = Weights(
        torch.where(mask, cost.exp(), 0.0),
        torch.where(free[0], (-u).exp(), 0.0),
        torch.where(free[1], (-v).exp(), 0.0),
        (bool(free[0].any()), bool(free[1].any())),
    )
    return weights, u.sum(-1) + v.sum(-1)


def subset_tables(weights: Weights) -> list[tuple[Tensor, int]]:
    """The recursion's table after each column, for :func:`sample_matching`."""
    return list(_recursion(weights))


def sample_matching(
    weights: Weights,
    tables: list[tuple[Tensor, int]],
    count: int,
) -> Tensor:  # (count, b, s) long, -1 for unmatched
    """Draw matchings with probability proportional to their weights, exactly.

    Backwards through the tables: the set of rows that the columns from j on have left
    over says how likely each of them is to go with column j - 1.
    """
    b, s, t = weights.pairs.shape
    device = weights.pairs.device
    offset, position, masks = (x.to(device) for x in _numbering(s))
    bits = 2 ** torch.arange(s, device=device)
    last, low = tables[-1]
    ends = _ends(weights, last, low)
    state = masks[offset[low] + _draw(ends.expand(count, *ends.shape))]  # (count, b)
    perm = torch.full((count, b, s), -1, device=device)
    for j in range(t - 1, -1, -1):
        table, low = tables[j]
        first, end = int(offset[low]), int(offset[low]) + table.shape[-1]
        inside = (state[..., None] & bits) > 0
        before = torch.cat([state[..., None] - bits * inside, state[..., None]], -1)
        place = position[before]
        known = (place >= first) & (place < end)
        ways = table.expand(count, *table.shape).gather(
            -1, (place - first).clamp(0, table.shape[-1] - 1)
        )
        ways = torch.where(known, ways, 0.0)
        weight = torch.cat(
            [
                torch.where(inside, weights.pairs[..., j], 0.0),
                weights.columns[:, j, None].expand(count, b, 1),
            ],
            -1,
        )
        chosen = _draw(ways * weight)
        state = before.gather(-1, chosen[..., None])[..., 0]
        taken = torch.arange(s, device=device) == chosen[..., None]
        perm = torch.where(taken, j, perm)
    return perm


def _draw(weights: Tensor) -> Tensor:  # (*lead, k) -> (*lead,)
    """One index with probability proportional to its weight: a race of exponentials."""
    noise = torch.empty_like(weights).exponential_().clamp_min(1e-300)
    return (weights / noise).argmax(-1)


def _recursion(weights: Weights) -> Iterator[tuple[Tensor, int]]:
    r"""Yield f_0, f_1, ..., f_t, and the size of the smallest sets in each.

    .. math:: f_{j+1}(S) = \beta_j f_j(S) + \sum_{i \in S} w_{ij} f_j(S \setminus i)

    is the sum over matchings of the first j + 1 columns to exactly the rows in S. Only
    sizes of S that can lead to an end are kept, in the order of :func:`_numbering`.
    """
    pairs, (loose_rows, loose_columns) = weights.pairs, weights.loose
    b, s, t = pairs.shape
    layers = [pairs.new_ones(b, 1)]
    low = 0
    yield layers[0], low
    for j in range(t):
        column, beta = pairs[..., j], weights.columns[:, j, None]
        smallest = 0 if loose_rows else max(0, s - (t - j - 1))
        if not loose_columns:
            smallest = j + 1
        largest = min(s, j + 1)
        new = []
        for k in range(smallest, largest + 1):
            total = None
            if 0 <= k - 1 - low < len(layers) and k:
                previous, member = _layer(s, k, str(pairs.device))
                ways = layers[k - 1 - low][:, previous]
                total = (ways * column[:, member]).sum(-1)
            if loose_columns and 0 <= k - low < len(layers):
                alone = beta * layers[k - low]
                total = alone if total is None else total + alone
            assert total is not None
            new.append(total)
        layers, low = new, smallest
        yield torch.cat(layers, -1) if len(layers) > 1 else layers[0], low


def _ends(weights: Weights, last: Tensor, low: int) -> Tensor:  # (b, sets)
    """The sums for each set of matched rows, times the others' being unmatched."""
    if not weights.loose[0]:  # the last table is that of the set of all rows
        return last
    size = weights.rows.shape[-1]
    offset, _, masks = _numbering(size)
    chosen = masks[int(offset[low]) :].to(last.device)
    inside = (chosen[:, None] & 2 ** torch.arange(size, device=last.device)) > 0
    return last * torch.where(inside, 1.0, weights.rows[:, None, :]).prod(-1)


@lru_cache(maxsize=32)
@outside
def _numbering(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sets by size, then as binary numbers: first of each size, place of each, sets."""
    sets = np.arange(2**size)
    count = _count_bits(sets)
    order = np.argsort(count, kind="stable")
    place = np.empty_like(order)
    place[order] = sets
    offset = np.concatenate([[0], np.cumsum(np.bincount(count, minlength=size + 1))])
    return torch.from_numpy(offset), torch.from_numpy(place), torch.from_numpy(order)


def _layer(size: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    return (
        _kept_layer(size, k, device) if size <= _KEPT else _new_layer(size, k, device)
    )


@outside
def _new_layer(size: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    """For each set of k items its items, and the places of the sets without them."""
    offset, place, sets = (x.numpy() for x in _numbering(size))
    chosen = sets[offset[k] : offset[k + 1]]
    inside = (chosen[:, None] >> np.arange(size)) & 1
    member = np.nonzero(inside)[1].reshape(-1, k)
    previous = place[chosen[:, None] ^ (1 << member)] - offset[k - 1]
    return torch.from_numpy(previous).to(device), torch.from_numpy(member).to(device)


_kept_layer = lru_cache(maxsize=512)(_new_layer)


def _count_bits(sets: NDArray[np.int64]) -> NDArray[np.int64]:
    count = np.zeros_like(sets)
    while sets.any():
        count += sets & 1
        sets = sets >> 1
    return count
