# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The graph algorithms behind a mask: Hall sets, total support, a spanning forest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import bmat, csr_matrix
from scipy.sparse.csgraph import connected_components, maximum_bipartite_matching

__all__ = ["BoolArray", "IntArray", "MaskAnalysis", "analyse", "may_stay_unmatched"]

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


class MaskAnalysis(NamedTuple):
    """The analysis of one mask; nodes are numbered rows first, then columns.

    Where something may stay unmatched there is one more row and column, the slack: the
    last column of a row is its being unmatched, the last row of a column likewise, and
    their corner is the wire between the two, which makes them one node.
    """

    cells: BoolArray  # (N, M), what some matching uses
    matching: IntArray  # (n,), -1 where unmatched
    row_component: IntArray  # (N,)
    column_component: IntArray  # (M,)
    root: BoolArray  # (M,)
    cell: IntArray  # (N + M,) flat cell of the edge to the parent; a child's at roots
    parent: IntArray  # (N + M,) a root is its own parent
    depth: int  # edges between a root and the node that is farthest from it


def analyse(
    allowed: BoolArray,  # (n, m)
    free: tuple[BoolArray, BoolArray] | None,  # (n,), (m,): may stay unmatched
    element: tuple[int, ...],
) -> MaskAnalysis:
    """Find what one mask allows; ``element`` is its place in a batch, for errors."""
    n, m = allowed.shape
    if free is None:
        cells, matching = _total_support(allowed)
        if cells is None:
            raise ValueError(_hall(allowed, matching, element))
    else:
        # Unmatched is matched to a dummy of one's own; dummies go with any dummy.
        rows, columns = np.diag(free[0]), np.diag(free[1])
        square = np.block([[allowed, rows], [columns, np.ones((m, n), np.bool_)]])
        support, matching = _total_support(square)
        if support is None:
            raise ValueError(_hall_with_slack(allowed, free, element))
        cells = np.ones((n + 1, m + 1), dtype=np.bool_)
        cells[:n, :m] = support[:n, :m]
        cells[:n, m] = support[:n, m:].diagonal()
        cells[n, :m] = support[n:, :m].diagonal()
        matching = np.where(matching[:n] < m, matching[:n], -1)
    size, width = cells.shape
    edges = csr_matrix(cells)
    graph = bmat([[None, edges], [edges.T, None]])
    _, label = connected_components(graph, directed=False)
    _, first, label = np.unique(label, return_index=True, return_inverse=True)
    label = np.argsort(np.argsort(first))[label]  # numbered by first row
    row_component, column_component = label[:size], label[size:]
    # The root is the column with most cells, which keeps the trees shallow; the last
    # of equals, here and for parents, so that a full mask gets its last row and column.
    # The slack is always one, and the slack row the first choice for a parent.
    weight = cells.sum(0)
    if free is not None:
        weight[m] = size + 1
    order = np.lexsort((np.arange(width), weight, column_component))
    last = np.flatnonzero(np.diff(column_component[order], append=len(first)))
    roots = np.sort(order[last])
    root = np.zeros(width, dtype=np.bool_)
    root[roots] = True
    parent, depth = _breadth_first(cells, roots)
    nodes = np.arange(size + width)
    rows = np.where(nodes < size, nodes, parent)
    columns = np.where(nodes < size, parent, nodes) - size
    rows[size + roots] = size - 1 - np.argmax(cells[::-1, roots], axis=0)
    cell = rows * width + columns
    return MaskAnalysis(
        cells, matching, row_component, column_component, root, cell, parent, depth
    )


def may_stay_unmatched(
    allowed: BoolArray,  # (*batch, n, m)
) -> tuple[BoolArray, BoolArray]:  # (*batch, n), (*batch, m)
    """Rows and columns that may, where nobody says: all that can be is matched.

    A row or column without a pair is padding, and not counted. Of more columns than
    rows any may be left over. Where the shape is square a row without a pair is
    padding only if that leaves as many columns, and nothing is where all would be.
    """
    n, m = allowed.shape[-2:]
    rows, columns = allowed.any(-1), allowed.any(-2)
    height, width = rows.sum(-1)[..., None], columns.sum(-1)[..., None]
    padding = (height == width) if n == m else (height <= width)
    padding = padding & (height > 0)
    return ~rows & padding, (~columns | (height < width)) & padding


def _total_support(allowed: BoolArray) -> tuple[BoolArray | None, IntArray]:
    """Cells that lie on a perfect matching, and one; None where there is none."""
    n = len(allowed)
    edges = csr_matrix(allowed)
    matching = maximum_bipartite_matching(edges, perm_type="column").astype(np.int64)
    if (matching < 0).any():
        return None, matching
    # Row i may take the column of row k if (i, matching[k]) is allowed. A cell lies on
    # a perfect matching exactly if it is matched or on a cycle of such exchanges.
    owner = np.argsort(matching)
    exchanges = csr_matrix((edges.data, owner[edges.indices], edges.indptr), (n, n))
    _, label = connected_components(exchanges, connection="strong")
    return allowed & (label[:, None] == label[owner]), matching


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
        pairs = _too_few(allowed, rows, "rows", "columns")
    else:
        pairs = _too_few(allowed.T, columns, "columns", "rows")
    hint = ""
    if not (allowed.any(-1).all() and allowed.any(-2).all()):
        hint = " (Padding of a square has as many empty rows as columns; else say what"
        hint += " may stay unmatched.)"
    return (
        f"mask has no perfect matching: {pairs}{_where(element)}. Allow more pairs"
        f" for them.{hint}"
    )


def _hall_with_slack(
    allowed: BoolArray, free: tuple[BoolArray, BoolArray], element: tuple[int, ...]
) -> str:
    # If one matching covers all rows that have to be matched and another all such
    # columns, one covers both (Mendelsohn and Dulmage, 1958): one side falls short.
    for table, bound, names in (
        (allowed, ~free[0], ("rows", "columns")),
        (allowed.T, ~free[1], ("columns", "rows")),
    ):
        index = np.flatnonzero(bound)
        edges = csr_matrix(table[index])
        found = maximum_bipartite_matching(edges, perm_type="column").astype(np.int64)
        if (found < 0).any():
            short = index[_deficient(table[index], found)]
            pairs = _too_few(table, short, *names)
            break
    return (
        f"mask leaves no matching of all that has to be matched: {pairs}"
        f"{_where(element)}. Allow more pairs for them, or let them stay unmatched."
    )


def _too_few(allowed: BoolArray, rows: IntArray, name: str, others: str) -> str:
    few = np.flatnonzero(allowed[rows].any(0))
    return f"{name} {_braces(rows)} can only use {others} {_braces(few)}"


def _where(element: tuple[int, ...]) -> str:
    return f" (batch element {', '.join(map(str, element))})" if element else ""


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
