# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Draws from the Gibbs law of matchings: exact for few items, else by chains."""

from __future__ import annotations

__all__ = ["EXACT", "sample_gibbs"]

import torch
from torch import Tensor

from pyro_permutations.matching import best_assignments
from pyro_permutations.matching_blocks import Block, blocks, take_block
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.subset_recursion import (
    Weights,
    reduced_weights,
    sample_matching,
    subset_tables,
)

# Blocks with this many items on the smaller side are summed over exactly.
EXACT = 12
# So are, where some row or column has few pairs, those of up to this many, for as far
# as the tables are small: there matchings differ by rings too long for a group of rows.
_FEW = 4
_LARGEST, _LARGEST_WITH_SLACK = 20, 16
# In larger ones so many rows are drawn anew together, with at most so many unmatched
# columns to choose from, this many times.
_GROUP = 8
_SPARE = 32
ROUNDS = 100
# Numbers in the tables of one go.
_MOST = 2**24


def sample_gibbs(
    scores: Tensor,  # (b, n, m) float64
    graph: MatchingGraph,  # batch of b elements
    count: int,
) -> Tensor:  # (count, b, n) long, -1 for unmatched
    """Matchings with probability proportional to the exponential of their score."""
    perm = torch.full((count, *scores.shape[:-1]), -1, device=scores.device)
    for block in blocks(graph):
        draw = _exactly if block.size <= _most_exact(block) else _by_chain
        inside = take_block(scores[None], block)[0]
        free = block.free_rows, block.free_columns
        s, t = inside.shape[-2:]
        if s <= t:
            chosen = draw(inside, block.mask, free, count)
        else:
            chosen = draw(inside.mT, block.mask.mT, free[::-1], count)
            chosen = _other_way(chosen, s)
        column = block.columns.expand(count, *block.columns.shape)
        column = column.gather(-1, chosen.clamp_min(0))
        column = torch.where(chosen < 0, -1, column)
        perm[:, block.element[:, None], block.rows] = column
    return perm


def _most_exact(block: Block) -> int:
    fewest = min(int(block.mask.sum(dim).min()) for dim in (-1, -2))
    if fewest >= _FEW:
        return EXACT
    return _LARGEST_WITH_SLACK if block.slack else _LARGEST


def _exactly(
    scores: Tensor,  # (C, s, t), s <= t
    mask: Tensor,
    free: tuple[Tensor, Tensor],  # (C, s), (C, t)
    count: int,
) -> Tensor:  # (count, C, s)
    s, t = scores.shape[-2:]
    slack = bool(free[0].any() or free[1].any())
    size = max(1, _MOST // (2**s * (t if slack else 2) + count * s))
    pieces = []
    for start in range(0, len(scores), size):
        some = slice(start, start + size)
        loose = free[0][some], free[1][some]
        weights, _ = reduced_weights(scores[some], mask[some], loose)
        pieces.append(sample_matching(weights, subset_tables(weights), count))
    return torch.cat(pieces, 1)


def _by_chain(
    scores: Tensor,  # (C, s, t), s <= t
    mask: Tensor,
    free: tuple[Tensor, Tensor],  # (C, s), (C, t)
    count: int,
) -> Tensor:  # (count, C, s)
    """Chains that start at best matchings of noisy scores, one for each draw."""
    C, s, t = scores.shape
    weights, _ = reduced_weights(scores, mask, free)
    element = torch.arange(C, device=scores.device).repeat(count)
    width = _GROUP + (min(_SPARE, t) if weights.loose[1] else 0)
    cost = (s // _GROUP) * 2**_GROUP * (width if weights.loose[1] else 4)
    pieces = []
    for some in element.split(max(1, _MOST // cost)):
        noise = torch.empty_like(scores[some]).exponential_().clamp_min(1e-300)
        noisy = torch.where(mask[some], scores[some] - noise.log(), -torch.inf)
        loose = None
        if weights.loose[1]:
            loose = free[0][some].cpu().numpy(), free[1][some].cpu().numpy()
        perm = torch.from_numpy(best_assignments(noisy.cpu().numpy(), loose))
        perm = perm.to(scores.device)
        for _ in range(ROUNDS):
            perm = _round(perm, weights, some)
        pieces.append(perm)
    return torch.cat(pieces).reshape(count, C, s)


def _round(
    perm: Tensor,  # (N, s)
    weights: Weights,  # of C blocks
    element: Tensor,  # (N,) long, which of them
) -> Tensor:  # (N, s)
    """Draw groups of rows anew, each exactly from its law given the rest.

    A group has rows at random, the columns that they are matched to, and some of the
    unmatched columns; what goes on inside does not concern the other groups.
    """
    (N, s), t = perm.shape, weights.pairs.shape[-1]
    groups = s // _GROUP
    order = torch.rand(N, s, device=perm.device).argsort(-1)
    rows = order[:, : groups * _GROUP].reshape(N, groups, _GROUP)
    columns = perm.gather(-1, rows.flatten(1)).reshape(rows.shape)
    if weights.loose[1]:
        taken = torch.zeros(N, t + 1, device=perm.device)
        taken = taken.scatter_(-1, torch.where(perm < 0, t, perm), 2.0)[:, :t]
        most = t - int((perm >= 0).sum(-1).min())
        spare = groups * min(_SPARE, -(-most // groups))
        last = (taken + torch.rand_like(taken)).argsort(-1)[:, :spare]
        last = torch.where(taken.gather(-1, last) > 0, -1, last)
        last = torch.nn.functional.pad(last, (0, spare - last.shape[-1]), value=-1)
        columns = torch.cat([columns, last.reshape(N, groups, -1)], -1)
    known, place = columns >= 0, columns.clamp_min(0)
    each = element[:, None, None]
    pairs = weights.pairs[each[..., None], rows[..., :, None], place[..., None, :]]
    inner = Weights(
        torch.where(known[..., None, :], pairs, 0.0).flatten(0, 1),
        weights.rows[each, rows].flatten(0, 1),
        torch.where(known, weights.columns[each, place], 1.0).flatten(0, 1),
        weights.loose,
    )
    drawn = sample_matching(inner, subset_tables(inner), 1)[0]
    drawn = drawn.reshape(rows.shape)
    new = columns.gather(-1, drawn.clamp_min(0))
    new = torch.where(drawn < 0, -1, new)
    return perm.scatter(-1, rows.flatten(1), new.flatten(1))


def _other_way(perm: Tensor, size: int) -> Tensor:  # (*lead, s) -> (*lead, size)
    """The same matching, told from the other side."""
    other = perm.new_full((*perm.shape[:-1], size + 1), -1)
    index = torch.where(perm < 0, size, perm)
    rows = torch.arange(perm.shape[-1], device=perm.device).expand_as(perm)
    return other.scatter_(-1, index, rows)[..., :size]
