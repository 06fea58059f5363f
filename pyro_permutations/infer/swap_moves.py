# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""All swaps of a matching, scored at once: locally balanced proposals of one move."""

from __future__ import annotations

__all__ = [
    "LARGEST",
    "Moves",
    "apply_move",
    "draw",
    "log_proposal",
    "moves_from",
    "reverse_of",
    "score",
]

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_permutations.infer.matching_space import MatchingSpace

# A gradient says little about changes of so many nats; beyond, all count alike.
LARGEST = 1e6


class Moves(NamedTuple):
    """Every move from a state: two cells are left for two others.

    First the n (n - 1) / 2 swaps of the columns of two rows. Where something may stay
    unmatched there follow n (m + 1) moves of one row to an unused column or to none.
    A row without column is one whose column is ``none``, so a swap also hands a column
    from one row to another, which adds a pair where it drops one; moves of a row add a
    pair, drop one or shift it. Any matching of a graph without forbidden pairs can be
    reached by these.
    """

    cells: Tensor  # (*lead, B, M, 4) long: left, left, taken, taken
    feasible: Tensor  # (*lead, B, M) bool


def moves_from(
    space: MatchingSpace,
    column: Tensor,  # (*lead, B, n) long
) -> Moves:
    """List the moves from a state and say which of them the graph allows."""
    (n, m), lead = space.shape[1:], column.shape[:-2]
    i, k = torch.triu_indices(n, n, 1, device=column.device)
    first, second = column[..., i], column[..., k]
    row, other = i * (m + 1), k * (m + 1)
    cells = torch.stack([row + first, other + second, row + second, other + first], -1)
    allowed = space.allowed.flatten(-2).expand(*lead, -1, -1)
    feasible = allowed.gather(-1, cells[..., 2]) & allowed.gather(-1, cells[..., 3])
    if n > 1:
        feasible = feasible & (first != second)  # both may be unmatched
    if not space.has_slack:
        return Moves(cells, feasible)

    taken = torch.arange(n * (m + 1), device=column.device)
    taken = taken.expand(*column.shape[:-1], -1)
    rows = taken // (m + 1)
    left = rows * (m + 1) + column.gather(-1, rows)
    none = rows * (m + 1) + m  # left and taken: no second change
    unused = space.owners(column) == n
    free = space.free_columns.expand_as(unused)
    single = torch.stack([left, none, taken, none], -1)
    possible = allowed & (left != taken)
    possible &= unused.gather(-1, taken % (m + 1))
    possible &= free.gather(-1, left % (m + 1))
    return Moves(torch.cat([cells, single], -2), torch.cat([feasible, possible], -1))


def score(
    moves: Moves,  # M moves
    gradient: Tensor,  # (*lead, B, n (m + 1)), zero at the cells for being unmatched
    curvature: Tensor | None,  # (B, n (m + 1), n (m + 1))
) -> Tensor:  # (*lead, B, M)
    r"""The change of a function f(P) by each move D, to second order.

    .. math:: \delta = \langle \nabla f, D \rangle + \tfrac12 \langle D, H D \rangle

    Both terms are read off the four cells of a move. Without curvature it is the first
    order, exact where f is linear. Squared distances |x - P y|^2 are not: to first
    order a swap of two far points looks as good as a swap of two near ones.
    """
    left, also, taken, too = moves.cells.unbind(-1)
    change = gradient.gather(-1, taken) + gradient.gather(-1, too)
    change = change - gradient.gather(-1, left) - gradient.gather(-1, also)
    if curvature is not None:
        batch = torch.arange(len(curvature), device=left.device)
        batch = batch[:, None, None, None]
        cells = moves.cells
        block = curvature[batch, cells[..., :, None], cells[..., None, :]]
        left, taken = block[..., :2, :].sum(-2), block[..., 2:, :].sum(-2)
        row = taken - left
        change = change + 0.5 * (row[..., 2:].sum(-1) - row[..., :2].sum(-1))
    return change.nan_to_num(0.0, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)


def log_proposal(
    change: Tensor,  # (*lead, B, M)
    feasible: Tensor,  # (*lead, B, M) bool
) -> Tensor:  # (*lead, B M)
    r"""Locally balanced proposal over all moves of all B matchings.

    .. math:: q(y \mid x) \propto \exp(\delta(x, y) / 2)

    The square root is one of the balancing functions of Zanella (2020): were the
    scores exact and the state space large, hardly any proposal would be rejected.
    """
    logits = torch.where(feasible, change / 2, -torch.inf).flatten(-2)
    total = logits.logsumexp(-1, keepdim=True)
    return torch.where(total > -torch.inf, logits - total, -torch.inf)


def draw(
    log_weight: Tensor,  # (*lead, k)
) -> Tensor:  # (*lead,) long
    """Draw an index from unnormalized log probabilities; never one of -inf."""
    noise = torch.empty_like(log_weight).exponential_()
    tiny = torch.finfo(noise.dtype).tiny  # a zero would make NaN of -inf
    return (log_weight - noise.clamp_min(tiny).log()).argmax(-1)


def apply_move(
    space: MatchingSpace,
    column: Tensor,  # (*lead, B, n)
    moves: Moves,
    chosen: Tensor,  # (*lead,) long, of the B M moves
) -> Tensor:  # (*lead, B, n)
    """The state after one move."""
    n, m = space.shape[1:]
    cells = moves.cells.flatten(-3, -2)
    index = chosen[..., None, None].expand(*chosen.shape, 1, 4)
    cells = cells.gather(-2, index)[..., 0, :]
    element = chosen[..., None] // moves.feasible.shape[-1] * n
    flat = column.flatten(-2)
    # The second cell first: for a move of one row both are in that row.
    for cell in (cells[..., 3:], cells[..., 2:3]):
        flat = flat.scatter(-1, element + cell // (m + 1), cell % (m + 1))
    return flat.reshape(column.shape)


def reverse_of(
    space: MatchingSpace,
    column: Tensor,  # (*lead, B, n), before the move
    chosen: Tensor,  # (*lead,)
) -> Tensor:  # (*lead,)
    """The move that undoes a move: the same swap, or the row's old column."""
    if not space.has_slack:
        return chosen
    n, m = space.shape[1:]
    swaps = n * (n - 1) // 2
    count = swaps + n * (m + 1)
    element, move = chosen // count, chosen % count
    row = (move - swaps).clamp_min(0) // (m + 1)
    old = column.flatten(-2).gather(-1, (element * n + row)[..., None])[..., 0]
    back = element * count + swaps + row * (m + 1) + old
    return torch.where(move < swaps, chosen, back)
