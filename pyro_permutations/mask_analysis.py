# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The graph algorithms behind a mask: Hall sets, total support, a spanning forest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, maximum_bipartite_matching

__all__ = ["BoolArray", "IntArray", "MaskAnalysis", "analyse"]

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


class MaskAnalysis(NamedTuple):
    """The analysis of one mask; nodes are numbered rows first, then columns."""

    support: BoolArray  # (n, m)
    matching: IntArray  # (n,)
    row_component: IntArray  # (n,)
    column_component: IntArray  # (m,)
    root: BoolArray  # (m,)
    cell: IntArray  # (n + m,) flat cell of the edge to the parent; a child's at roots
    parent: IntArray  # (n + m,) a root is its own parent
    depth: int  # edges between a root and the node that is farthest from it


def analyse(allowed: BoolArray, element: tuple[int, ...]) -> MaskAnalysis:
    """Find what one mask allows; ``element`` is its place in a batch, for errors."""
    n, m = allowed.shape
    edges = csr_matrix(allowed)
    matching = maximum_bipartite_matching(edges, perm_type="column").astype(np.int64)
    if (matching < 0).any():
        raise ValueError(_hall(allowed, matching, element))
    # Row i may take the column of row k if (i, matching[k]) is allowed. A cell lies on
    # a perfect matching exactly if it is matched or on a cycle of such exchanges.
    owner = np.argsort(matching)
    exchanges = csr_matrix((edges.data, owner[edges.indices], edges.indptr), (n, n))
    _, label = connected_components(exchanges, connection="strong")
    _, first, label = np.unique(label, return_index=True, return_inverse=True)
    row_component = np.argsort(np.argsort(first))[label]  # numbered by first row
    column_component = row_component[owner]
    support = allowed & (row_component[:, None] == column_component)
    # The root is the column with most cells, which keeps the trees shallow; the last
    # of equals, here and for parents, so that a full mask gets its last row and column.
    order = np.lexsort((np.arange(m), support.sum(0), column_component))
    last = np.flatnonzero(np.diff(column_component[order], append=len(first)))
    roots = np.sort(order[last])
    root = np.zeros(m, dtype=np.bool_)
    root[roots] = True
    parent, depth = _breadth_first(support, roots)
    nodes = np.arange(n + m)
    rows = np.where(nodes < n, nodes, parent)
    columns = np.where(nodes < n, parent, nodes) - n
    rows[n + roots] = owner[roots]
    cell = rows * m + columns
    return MaskAnalysis(
        support, matching, row_component, column_component, root, cell, parent, depth
    )


def _breadth_first(support: BoolArray, roots: IntArray) -> tuple[IntArray, int]:
    n, m = support.shape
    parent = np.arange(n + m)
    reached = np.isin(parent, n + roots)
    frontier, depth = roots, 0
    while True:
        # Even steps go from columns to new rows, odd steps from rows to new columns.
        table, here, there = (support, 0, n) if depth % 2 else (support.T, n, 0)
        found = table[frontier]
        new = ~reached[there : there + found.shape[1]] & found.any(0)
        if not new.any():
            return parent, depth
        behind = np.argmax(found[::-1, new], axis=0)
        parent[there + np.flatnonzero(new)] = (
            here + frontier[len(frontier) - 1 - behind]
        )
        frontier = np.flatnonzero(new)
        reached[there + frontier] = True
        depth += 1


def _hall(allowed: BoolArray, matching: IntArray, element: tuple[int, ...]) -> str:
    rows = _deficient(allowed, matching)
    owner = np.full(allowed.shape[1], -1)
    owner[matching[matching >= 0]] = np.flatnonzero(matching >= 0)
    columns = _deficient(allowed.T, owner)
    # Rows are named, unless they are too many to read and the columns are fewer.
    if len(rows) <= _READABLE or len(rows) <= len(columns):
        few = np.flatnonzero(allowed[rows].any(0))
        pairs = f"rows {_braces(rows)} can only use columns {_braces(few)}"
    else:
        few = np.flatnonzero(allowed[:, columns].any(1))
        pairs = f"columns {_braces(columns)} can only use rows {_braces(few)}"
    where = f" (batch element {', '.join(map(str, element))})" if element else ""
    return f"mask has no perfect matching: {pairs}{where}. Allow more pairs for them."


def _deficient(allowed: BoolArray, matching: IntArray) -> IntArray:
    # The rows that alternating paths reach from an unmatched row use only columns that
    # are matched among them, else the matching could grow: one column too few.
    best = np.arange(len(matching))
    owner = np.full(allowed.shape[1], -1)
    owner[matching[matching >= 0]] = np.flatnonzero(matching >= 0)
    for start in np.flatnonzero(matching < 0):
        rows = np.array([start])
        while True:
            more = np.union1d(rows, owner[allowed[rows].any(0)])
            if len(more) == len(rows):
                break
            rows = more
        if len(rows) < len(best):
            best = rows
    return best


_READABLE = 8


def _braces(indices: IntArray) -> str:
    text = ", ".join(map(str, indices[:_READABLE].tolist()))
    more = f", ... ({len(indices)} in all)" if len(indices) > _READABLE else ""
    return "{" + text + more + "}"
