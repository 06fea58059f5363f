# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""All matchings of a few items, as a list."""

from __future__ import annotations

__all__ = ["can_be_listed", "list_matchings"]

import math

import torch
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph

# Up to this many rows, and as many matchings as they have permutations.
_ROWS = 8


def can_be_listed(graph: MatchingGraph) -> bool:
    """Whether there are at most 8 rows, and 8! matchings if no pair is forbidden."""
    n, m = graph.shape
    if n > _ROWS:
        return False
    partial = graph.has_slack and bool(graph.free_rows.any())
    pairs = range(n + 1) if partial else (n,)
    count = sum(math.comb(n, k) * math.perm(m, k) for k in pairs)
    return count <= math.factorial(_ROWS)


def list_matchings(graph: MatchingGraph) -> Tensor:  # (k, n) long, -1 for unmatched
    """Every matching of a mask, in order; of a batch, those of any of its masks."""
    n, m = graph.shape
    allowed = graph.allowed.reshape(-1, n, m).any(0)
    free_rows = graph.free_rows.reshape(-1, n).any(0)
    free_columns = graph.free_columns.reshape(-1, m).any(0)
    options = torch.cat([free_rows[:, None], allowed], -1)
    column = torch.arange(-1, m, device=graph.device)
    found = torch.zeros(1, 0, dtype=torch.long, device=graph.device)
    for row in options:
        fresh = (found[:, :, None] != column).all(1)
        fresh[:, 0] = True
        one, j = (fresh & row).nonzero(as_tuple=True)
        found = torch.cat([found[one], column[j][:, None]], -1)
    used = (found[:, :, None] == column[1:]).any(1)
    return found[(used | free_columns).all(-1)]
