# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A matching problem taken apart into blocks that share no pair."""

from __future__ import annotations

__all__ = ["Block", "blocks", "sum_blocks", "take_block"]

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.outside import outside


class Block(NamedTuple):
    """All blocks of one size, s rows and t columns each, joined by pairs.

    The number of matchings of a mask is the product of those of its blocks. Unlike the
    parts of a matching graph they do not hang together by their slack: whether a row is
    unmatched in one block says nothing of another.
    """

    element: Tensor  # (C,) long, flat index into the graph's batch
    rows: Tensor  # (C, s) long, increasing
    columns: Tensor  # (C, t) long, increasing
    mask: Tensor  # (C, s, t) bool, pairs that some matching uses
    free_rows: Tensor  # (C, s) bool, may stay unmatched
    free_columns: Tensor  # (C, t) bool
    slack: bool  # something may

    @property
    def size(self) -> int:
        """Number of items on the smaller side."""
        return min(self.mask.shape[-2:])


def blocks(graph: MatchingGraph) -> list[Block]:
    """The connected components of the pairs of a mask, grouped by their size.

    Rows and columns without a pair are in none: they are unmatched whatever happens.
    """
    return _blocks(graph, str(graph.device))


def take_block(
    x: Tensor,  # (a, b, n, m)
    block: Block,
) -> Tensor:  # (a, C, s, t)
    """The cells of a block, zero on forbidden pairs."""
    i, j = block.rows[:, :, None], block.columns[:, None, :]
    return torch.where(block.mask, x[:, block.element[:, None, None], i, j], 0.0)


def sum_blocks(
    values: list[tuple[Block, Tensor]],  # (a, C) for each block
    like: Tensor,  # (a, b)
) -> Tensor:  # (a, b)
    """What the blocks of each element add up to."""
    total = torch.zeros_like(like)
    for block, value in values:
        total = total.index_add(1, block.element, value)
    return total


@lru_cache(maxsize=64)
@outside
def _blocks(graph: MatchingGraph, device: str) -> list[Block]:
    n, m = graph.shape
    # Under torch.func transforms tensors have no storage, but arrays can be made.
    support = np.array(graph.support.tolist(), dtype=np.bool_).reshape(-1, n, m)
    free_rows, free_columns = (
        np.array(x.tolist(), dtype=np.bool_).reshape(-1, x.shape[-1])
        for x in graph.slack_cells()
    )
    where = np.nonzero(support)
    row = where[0] * n + where[1]
    column = len(support) * n + where[0] * m + where[2]
    nodes = len(support) * (n + m)
    edges = csr_matrix((np.ones(len(row), np.int8), (row, column)), (nodes, nodes))
    _, label = connected_components(edges, directed=False)
    rows, columns = np.split(label, [len(support) * n])
    # Sorting by label puts the rows of a block side by side, and its columns likewise.
    order, other = (np.argsort(x, kind="stable") for x in (rows, columns))
    count = int(label.max(initial=-1)) + 1
    heights, widths = (np.bincount(x, minlength=count) for x in (rows, columns))
    top, left = np.cumsum(heights) - heights, np.cumsum(widths) - widths
    paired = np.flatnonzero((heights > 0) & (widths > 0))
    kinds = np.stack([heights[paired], widths[paired]], -1)
    found = []
    for s, t in np.unique(kinds, axis=0).tolist():
        chosen = paired[(kinds == (s, t)).all(-1)]
        r = order[top[chosen, None] + np.arange(s)]
        c = other[left[chosen, None] + np.arange(t)]
        element, r, c = r[:, 0] // n, r % n, c % m
        each = element[:, None]
        mask = support[element[:, None, None], r[:, :, None], c[:, None, :]]
        loose = free_rows[each, r], free_columns[each, c]
        slack = bool(loose[0].any() or loose[1].any())
        tensors = [
            torch.from_numpy(np.array(x)).to(device)
            for x in (element, r, c, mask, *loose)
        ]
        e, i, j, cells, free, unfilled = tensors
        found.append(Block(e, i, j, cells, free, unfilled, slack))
    return found
