# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Masks taken apart into their connected components, to be solved one by one."""

from __future__ import annotations

__all__ = ["Part", "falls_apart", "flattened", "parts", "put", "take", "undecided"]

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.outside import outside

# A row or column with fewer cells than this makes its component thin.
_THIN = 4
# Parts are solved one by one if that leaves at most this share of the cubic cost, where
# a call costs as much as this by itself (16 x 100 in 16 sizes takes as long as whole).
_WORTHWHILE = 0.6
_CALL = 7e5


class Part(NamedTuple):
    """Components of one size and one kind, s rows and t columns each.

    With slack (see :class:`~pyro_permutations.matching_graph.MatchingGraph`) those of
    the slack are the last; without it, s = t >= 2.
    """

    element: Tensor  # (C,) long, flat index into the graph's batch
    rows: Tensor  # (C, s) long
    columns: Tensor  # (C, t) long
    graph: MatchingGraph  # batch (C,), each of one component
    thin: bool


def parts(graph: MatchingGraph) -> list[Part]:
    """The components of a graph, grouped by size and by whether they are thin.

    A component without slack is thin if some row or column has fewer than four cells.
    """
    return _parts(graph, str(graph.device))


def falls_apart(graph: MatchingGraph) -> bool:
    """Whether it pays to solve the components of a graph one by one."""
    return not graph.is_full and _pays(graph, str(graph.device))


def take(
    x: Tensor,  # (a, b, N, M)
    graph: MatchingGraph,  # batch of b elements
) -> list[Tensor]:  # (a, C, s, t) for each part
    """The cells of each part, read in one go: so is their gradient written."""
    packed = x.flatten(1).index_select(1, _cells(graph, str(graph.device)))
    shapes = [part.graph.cells.shape for part in parts(graph)]
    pieces = packed.split([shape.numel() for shape in shapes], 1)
    return [
        piece.reshape(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True)
    ]


def put(
    x: Tensor,  # (a, b, N, M)
    pieces: list[Tensor],  # (a, C, s, t) for each part
    graph: MatchingGraph,
) -> Tensor:  # (a, b, N, M)
    """A copy of a tensor with the cells of each part in their places."""
    packed = torch.cat([piece.flatten(1) for piece in pieces], 1)
    cells = _cells(graph, str(graph.device))
    return x.flatten(1).index_copy(1, cells, packed).reshape(x.shape)


def decided(graph: MatchingGraph) -> Tensor:  # (*batch, N, M)
    """Cells that are in every matching, and in no part; the wire is not one of them."""
    cells = graph.cells.clone()
    inside = [torch.zeros_like(part.graph.cells)[None] for part in parts(graph)]
    if inside:
        flat = cells.reshape(1, -1, *graph.size)
        cells = put(flat, inside, graph).reshape(cells.shape)
    if graph.has_slack:
        cells[..., -1, -1] = False
    return cells


def undecided(graph: MatchingGraph) -> Tensor:  # (*batch, n, m + 1)
    """Pairs that some matchings have and some do not; the last column is no partner."""
    n, m = graph.shape
    open_cells = graph.cells & ~decided(graph)
    pairs = open_cells[..., :n, :m]
    alone = graph.slack_cells()[0] & pairs.any(-1)
    return torch.cat([pairs, alone[..., None]], -1)


def flattened(
    lead: torch.Size, graph: MatchingGraph
) -> tuple[tuple[int, int], MatchingGraph]:
    """Leading dimensions as one that the graph does not know and one that it does."""
    outer = len(lead) - len(graph.batch_shape)
    flat = math.prod(lead[:outer]), math.prod(lead[outer:])
    return flat, graph.expand(lead[outer:])


@lru_cache(maxsize=64)
@outside
def _parts(graph: MatchingGraph, device: str) -> list[Part]:
    found = []
    for group in graph.components():
        arrays = [x.cpu().numpy() for x in group[:4]]
        mask = arrays[-1]
        height = mask.shape[-2]
        fewest = np.minimum(mask.sum(-1).min(-1), mask.sum(-2).min(-1))
        thin = (fewest < _THIN) & (height > 4) & (not group.slack)
        for kind in np.unique(thin).tolist():
            chosen = thin == kind
            element, rows, columns, cells = (
                torch.from_numpy(x[chosen]).to(device) for x in arrays
            )
            inner = _inside(cells, group.slack)
            found.append(Part(element, rows, columns, inner, kind))
    return found


def _inside(cells: Tensor, slack: bool) -> MatchingGraph:
    height, width = cells.shape[-2:]
    if not slack:
        return matching_graph(cells, (height, width))
    free = cells[:, :-1, -1], cells[:, -1, :-1]
    shape = (height - 1, width - 1)
    return matching_graph(cells[:, :-1, :-1], shape, unmatched=free)


@lru_cache(maxsize=64)
@outside
def _cells(graph: MatchingGraph, device: str) -> Tensor:
    """Flat indices into (batch, N, M) of the cells of all parts, in their order."""
    n, m = graph.size
    found = [np.zeros(0, dtype=np.int64)]
    for part in _parts(graph, device):
        element, i, j = (
            x.cpu().numpy() for x in (part.element, part.rows, part.columns)
        )
        row = element[:, None, None] * n + i[:, :, None]
        found.append((row * m + j[:, None, :]).ravel())
    return torch.from_numpy(np.concatenate(found)).to(device)


@lru_cache(maxsize=64)
def _pays(graph: MatchingGraph, device: str) -> bool:
    n, m = graph.size
    whole = n * m**2 * math.prod(graph.batch_shape)
    if whole < _CALL:
        return False
    sizes = [part.graph.cells.shape for part in _parts(graph, device)]
    apart = sum(_CALL + C * s * t**2 for C, s, t in sizes)
    return apart < _WORTHWHILE * (_CALL + whole)
