# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Cycles of any length: a row takes a column, whose row takes another, until it closes.

Swaps cannot reach every matching that a mask allows: where each row has two candidates
in a ring there are two matchings, and all rows change between them.
"""

from __future__ import annotations

__all__ = [
    "Cycle",
    "apply_cycle",
    "draw_cycle",
    "log_cycle_proposal",
    "reverse_cycle",
    "row_logits",
]

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_permutations.infer.matching_space import MatchingSpace
from pyro_permutations.infer.swap_moves import LARGEST, draw


class Cycle(NamedTuple):
    """Rows in order, and the columns that they take; padded beyond their length.

    The first row gives its column up and takes that of the second, and so on. A cycle
    ends with the first row's column, a path with an unused column or with none.
    """

    rows: Tensor  # (*lead, n) long
    columns: Tensor  # (*lead, n) long
    length: Tensor  # (*lead,) long; 0 where the walk came to a dead end


def row_logits(
    space: MatchingSpace,
    column: Tensor,  # (K, n)
    gradient: Tensor,  # (K, n (m + 1))
    curvature: Tensor | None,  # (B, n (m + 1), n (m + 1))
    element: Tensor,  # (K,) long, whose curvature it is
) -> Tensor:  # (K, n, m + 1)
    """Half of what each row alone would gain by each column, to second order."""
    n, m = space.shape[1:]
    gain: Tensor = gradient.unflatten(-1, (n, m + 1))
    if curvature is not None:
        taken = torch.arange(n * (m + 1), device=column.device).reshape(n, m + 1)
        left = (taken[:, :1] + column[..., None]).expand(-1, -1, m + 1)
        both = curvature[element[:, None, None], taken, left]
        alone = curvature.diagonal(dim1=-2, dim2=-1)[element].unflatten(-1, (n, m + 1))
        gain = gain + alone / 2 - both  # and a constant in each row
    return (gain / 2).nan_to_num(0.0, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)


def draw_cycle(
    space: MatchingSpace,  # of one graph: B = 1, or as many as there are states
    column: Tensor,  # (K, n) long
    logits: Tensor,  # (K, n, m + 1)
) -> Cycle:
    """Walk from a random row; each row chooses among the columns that are left."""
    lead, n = column.shape
    m = logits.shape[-1] - 1
    owner = space.owners(column[:, None])[:, 0]
    state = torch.arange(lead, device=column.device)
    row = torch.randint(n, (lead,), device=column.device)
    first = column[state, row]
    taken = torch.zeros(lead, m + 1, dtype=torch.bool, device=column.device)
    length = torch.zeros_like(row)
    going = torch.ones_like(row, dtype=torch.bool)
    rows, columns = [], []
    for _ in range(n):
        possible = _possible(space, column, owner, row[:, None], first, taken[:, None])
        weight = torch.where(possible[:, 0], logits[state, row], -torch.inf)
        choice = draw(weight)
        alive = going & possible[:, 0].any(-1)
        length = torch.where(alive, length + 1, torch.where(going, 0, length))
        rows.append(row)
        columns.append(choice)
        taken[state, choice] = True
        after = owner[state, choice]
        going = alive & (after < n) & (choice != first)
        if not going.any():
            break
        row = torch.where(going, after, row)
    missing = [rows[-1]] * (n - len(rows))
    return Cycle(
        torch.stack([*rows, *missing], -1),
        torch.stack([*columns, *missing], -1),
        length,
    )


def log_cycle_proposal(
    space: MatchingSpace,
    column: Tensor,  # (K, n), the state in which the walk starts
    logits: Tensor,  # (K, n, m + 1), there
    cycle: Cycle,
) -> Tensor:  # (K,)
    """Log probability of the columns that a walk chooses, given its first row."""
    n = column.shape[-1]
    state = torch.arange(len(column), device=column.device)[:, None]
    first = column[state[:, 0], cycle.rows[:, 0]]
    steps = torch.arange(n, device=column.device) < cycle.length[:, None]
    own = torch.zeros(*column.shape, logits.shape[-1], device=column.device).long()
    own.scatter_(-1, torch.where(steps, cycle.columns, 0)[..., None], 1)
    taken = (own.cumsum(-2) - own) > 0
    owner = space.owners(column[:, None])[:, 0]
    possible = _possible(space, column, owner, cycle.rows, first, taken)
    weight = torch.where(possible, logits[state, cycle.rows], -torch.inf)
    log_choice = weight.log_softmax(-1).gather(-1, cycle.columns[..., None])[..., 0]
    log_choice = log_choice.nan_to_num(
        -torch.inf, neginf=-torch.inf
    )  # NaN is a choice of nothing
    return torch.where(steps, log_choice, 0).sum(-1)


def apply_cycle(
    column: Tensor,  # (K, n)
    cycle: Cycle,
) -> Tensor:  # (K, n)
    """The state after every row of the cycle has its new column."""
    place = torch.arange(column.shape[-1], device=column.device)
    steps = place < cycle.length[:, None]
    # Padding writes to a place that is cut off.
    wide = torch.cat([column, column[:, :1]], -1)
    rows = torch.where(steps, cycle.rows, column.shape[-1])
    return wide.scatter(-1, rows, cycle.columns)[:, :-1]


def reverse_cycle(
    space: MatchingSpace,
    column: Tensor,  # (K, n), before the cycle
    cycle: Cycle,
) -> Cycle:
    """The walk that undoes a walk: backwards, each row takes what it had.

    That of a cycle begins at the same row, and that of a path at its end. To reverse
    twice changes nothing, so for a chain that draws the first row uniformly the ratio
    of the two log proposals is all that the acceptance needs.
    """
    n = column.shape[-1]
    last = (cycle.length - 1).clamp_min(0)[:, None]
    first = column.gather(-1, cycle.rows[:, :1])
    closed = (cycle.columns.gather(-1, last) == first) & (first < space.shape[2])
    place = torch.arange(n, device=column.device)
    back = torch.where(closed, (last + 1 - place) % (last + 1), last - place)
    rows = cycle.rows.gather(-1, back.clamp_min(0))
    return Cycle(rows, column.gather(-1, rows), cycle.length)


def _possible(
    space: MatchingSpace,
    column: Tensor,  # (K, n)
    owner: Tensor,  # (K, m + 1)
    rows: Tensor,  # (K, T)
    first: Tensor,  # (K,) column of the first row
    taken: Tensor,  # (K, T, m + 1) bool, columns that were chosen before
) -> Tensor:  # (K, T, m + 1) bool
    """Which columns a row may choose."""
    lead, n = column.shape
    m = owner.shape[-1] - 1
    state = torch.arange(lead, device=column.device)
    names = torch.arange(m + 1, device=column.device)
    allowed = space.allowed.expand(lead, n, m + 1)[state[:, None], rows]
    own = column.gather(-1, rows)[..., None] == names
    # Where the first row's column may not stay over, only that row's end is one.
    free = space.free_columns.expand(lead, m + 1)[state, first]
    goes_on = (owner < n) | (names == first[:, None]) | free[:, None]
    return allowed & ~own & ~taken & goes_on[:, None]
