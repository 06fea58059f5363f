# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What a mask allows: feasibility, total support, components and free cells."""

from __future__ import annotations

__all__ = ["WIRE", "ComponentGroup", "Free", "MatchingGraph", "matching_graph"]

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from pyro_permutations.mask_analysis import (
    BoolArray,
    IntArray,
    MaskAnalysis,
    analyse,
    may_stay_unmatched,
)
from pyro_permutations.outside import outside

# Log weight of the wire between the slack of the rows and that of the columns: its
# inverse is nothing beside a sum of one, and it is far from the range of float64.
WIRE = 40.0
# What may stay unmatched: rows (*batch, n) and columns (*batch, m), bool.
Free = tuple[Tensor, Tensor]


class ComponentGroup(NamedTuple):
    """All components of one size, s rows and t columns each."""

    element: Tensor  # (C,) long, flat index into the batch
    rows: Tensor  # (C, s) long, increasing
    columns: Tensor  # (C, t) long, increasing
    mask: Tensor  # (C, s, t) bool, the cells inside each component
    slack: bool  # the last row and column are the slack


@dataclass(frozen=True, eq=False, repr=False)
class MatchingGraph:
    r"""The bipartite graph of a mask, analysed once; built by :func:`matching_graph`.

    Cells that no matching uses are dropped; what is left, the ``support``, falls apart
    into connected components. Scores matter up to a constant per row and per column
    that have to be matched, so they can be shifted to zero on a spanning forest of the
    support. The cells that remain are free:

    .. math:: \text{dim} = |E| - (n + m - k),

    for a support :math:`E` with :math:`k` components, if everything is matched.

    Where something may stay unmatched, the slack is a node more: a pair of unmatched
    row and slack is a cell like others. ``cells`` has them in one more column and row,
    whose corner is a wire, which makes of both ends one node. Its potential is zero,
    so its cells are the forest's: rows and columns with slack have no shift.
    """

    allowed: Tensor  # (*batch, n, m) bool, as given
    free_rows: Tensor  # (*batch, n) bool, rows that may stay unmatched
    free_columns: Tensor  # (*batch, m) bool
    cells: Tensor  # (*batch, N, M) bool, what some matching uses; N, M = n, m or 1 more
    matching: Tensor  # (*batch, n) long, one matching: row i to matching[i], or -1
    forest: Tensor  # (*batch, N, M) bool, a spanning forest of the cells
    row_component: Tensor  # (*batch, N) long, labels 0..k-1
    column_component: Tensor  # (*batch, M) long, labels 0..k-1
    root: Tensor  # (*batch, M) bool, one column per component
    support: Tensor  # (*batch, n, m) bool, pairs that some matching uses
    free: Tensor  # (*batch, n, m) bool, the support without the forest
    dim: Tensor  # (*batch,) long, number of free cells
    row_counts: Tensor  # (*batch, n) long, pairs of the support in each row
    column_counts: Tensor  # (*batch, m) long
    is_full: bool  # no pair is forbidden, and everything has to be matched
    has_slack: bool  # something may stay unmatched
    # The forest as pointers, for nodes 0..N-1 (rows) and N..N+M-1 (columns):
    _cell: Tensor  # (*batch, N + M) long, flat cell of the edge to the parent
    _sign: Tensor  # (*batch, N + M) int8: 1 for rows, -1 for columns, 0 for roots
    _jumps: Tensor  # (*batch, h, N + M) long, ancestor 1, 2, 4, ... edges away

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return int(self.allowed.shape[-2]), int(self.allowed.shape[-1])

    @property
    def size(self) -> tuple[int, int]:
        """The same with the slack: N and M."""
        return int(self.cells.shape[-2]), int(self.cells.shape[-1])

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of masks."""
        return self.dim.shape

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.allowed.device

    def contrasts(
        self,
        scores: Tensor,  # (*lead, n, m)
    ) -> Tensor:  # (*lead, n, m)
        r"""Take row and column shifts out of scores.

        .. math:: Z_{ij} = L_{ij} - u_i - v_j

        with the shifts that make Z zero on the forest. With no cell forbidden that is
        :math:`Z_{ij} = L_{ij} - L_{in} - L_{nj} + L_{nn}`. Z is exactly zero on the
        forest and on cells outside the support, whatever the scores are there, and
        linear in the scores on the support.

        Args:
            scores: Shape ``(*lead, n, m)``; ``lead`` broadcasts with the batch of the
                graph.
        """
        if self.is_full:
            corner = scores[..., -1:, -1:]
            Z = (scores - scores[..., -1:]) - (scores[..., -1:, :] - corner)
            return torch.where(self.free, Z, 0)
        (n, m), scores = self.shape, torch.where(self.support, scores, 0)
        scores, lead = self.with_slack(scores, 0.0), scores.shape[:-2]
        # A node's shift is its edge's score less its parent's shift. With the sign
        # of columns turned that is a sum along the path to the root, and adding the
        # sum of the ancestor 1, 2, 4, ... edges away doubles the path that is done.
        index = self._cell.expand(lead + self._cell.shape[-1:])
        shift = self._sign * scores.flatten(-2).gather(-1, index)
        for jump in self._jumps.unbind(-2):
            shift = shift + shift.gather(-1, jump.expand(shift.shape))
        u, v = shift[..., :n, None], -shift[..., None, self.size[0] :][..., :m]
        return torch.where(self.free, scores[..., :n, :m] - u - v, 0)

    def with_slack(
        self,
        x: Tensor,  # (*lead, n, m)
        wire: float,
    ) -> Tensor:  # (*lead, N, M)
        """Values of pairs with those of slack beside them, zero, and that of the wire.

        Unchanged where there is no slack.
        """
        if not self.has_slack:
            return x
        x = pad(x, (0, 1, 0, 1))
        corner = x.new_zeros(self.size)
        corner[-1, -1] = wire
        return x + corner if wire else x

    def components(self) -> list[ComponentGroup]:
        """List the components of two or more rows, grouped by their size."""
        return self._components

    def expand(self, batch_shape: Sequence[int]) -> MatchingGraph:
        """Return the graph with a larger batch; nothing is copied or analysed again."""
        batch = torch.Size([int(size) for size in batch_shape])
        if batch == self.batch_shape:
            return self
        if batch not in self._expanded:
            if len(self._expanded) >= 8:  # more shapes than one model uses
                self._expanded.clear()
            self._expanded[batch] = _expanded(self, batch)
        return self._expanded[batch]

    def __eq__(self, other: object) -> bool:
        """Whether both allow the same cells, in the same batch, on the same device."""
        if not isinstance(other, MatchingGraph):
            return NotImplemented
        return self is other or (
            self.allowed.shape == other.allowed.shape
            and self.device == other.device
            and self.has_slack == other.has_slack
            and torch.equal(self.allowed, other.allowed)
            and torch.equal(self.free_rows, other.free_rows)
            and torch.equal(self.free_columns, other.free_columns)
        )

    def __hash__(self) -> int:
        """Hash of the allowed cells."""
        return self._hash

    def __repr__(self) -> str:
        """Shape, batch, and the range of components and free cells over the batch."""
        components = _span(self.root.sum(-1).flatten().tolist())
        free = _span(self.dim.flatten().tolist())
        rows, columns = (
            _span(x.sum(-1).flatten().tolist()) for x in self.slack_cells()
        )
        slack = f", slack=({rows}, {columns})" if self.has_slack else ""
        return (
            f"MatchingGraph(shape={self.shape}, batch_shape={tuple(self.batch_shape)}, "
            f"components={components}, free={free}{slack})"
        )

    def slack_cells(self) -> Free:
        """Rows and columns that some matching leaves unmatched."""
        n, m = self.shape
        if not self.has_slack:
            return torch.zeros_like(self.free_rows), torch.zeros_like(self.free_columns)
        return self.cells[..., :n, m], self.cells[..., n, :m]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is cached, and the dead wrappers that torch.func leaves."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: part.detach() if isinstance(part, Tensor) else part
            for name, part in parts.items()
        }

    @cached_property
    def _expanded(self) -> dict[torch.Size, MatchingGraph]:
        return {}

    @cached_property
    def _hash(self) -> int:
        bits = np.packbits(_array(self.allowed))
        return hash((tuple(self.allowed.shape), crc32(bits.tobytes())))

    @cached_property
    @outside
    def _components(self) -> list[ComponentGroup]:
        n, m = self.size
        cells = _array(self.cells).reshape(-1, n, m)
        row_component = _array(self.row_component).reshape(-1, n)
        column_component = _array(self.column_component).reshape(-1, m)
        # Number the components through the whole batch; sorting by that number puts
        # the rows of a component side by side, and its columns likewise.
        label = n * np.arange(len(cells))[:, None] + row_component
        other = n * np.arange(len(cells))[:, None] + column_component
        rows, columns = (np.argsort(x.ravel(), kind="stable") for x in (label, other))
        heights, widths = (
            np.bincount(x.ravel(), minlength=n * len(cells)) for x in (label, other)
        )
        # Nothing is undecided where a component is one pair, or has none.
        height, width = self.shape
        alone = cells.sum(-1, keepdims=True) == 1
        alone = alone & (cells.sum(-2, keepdims=True) == 1)
        pairs = (cells & ~alone)[:, :height, :width].any(-1)
        undecided = np.bincount(label[:, :height][pairs], minlength=len(heights)) > 0
        slack = np.zeros(len(heights), dtype=np.bool_)
        if self.has_slack:
            slack[label[:, -1]] = True
        top, left = np.cumsum(heights) - heights, np.cumsum(widths) - widths
        groups = []
        kinds = np.stack([heights, widths, slack], -1)[undecided]
        for height, width, kind in np.unique(kinds, axis=0).tolist():
            chosen = undecided & (heights == height) & (widths == width)
            chosen &= slack == bool(kind)
            row = rows[top[chosen, None] + np.arange(height)]
            column = columns[left[chosen, None] + np.arange(width)]
            element, i, j = row[:, 0] // n, row % n, column % m
            mask = cells[element[:, None, None], i[:, :, None], j[:, None, :]]
            place = partial(_tensor, device=self.device)
            group = place(element), place(i), place(j), place(mask), bool(kind)
            groups.append(ComponentGroup(*group))
        return groups


def matching_graph(
    mask: Tensor | MatchingGraph | None,  # (*batch, n, m) bool
    shape: tuple[int, int],
    device: torch.device | str | None = None,
    *,
    unmatched: Free | None = None,  # (*batch, n) bool, (*batch, m) bool
) -> MatchingGraph:
    """Find out, once, what a mask allows.

    Every row is matched to one column, and every column to one row if there are as
    many; of more columns than rows some stay unmatched. ``unmatched`` says instead
    which may. Where it does not, a row or column without an allowed pair is padding: it
    stays unmatched, and is not counted. (In a square shape only if these are as many
    rows as columns; else such a row is an error.)

    A cell is kept if some matching uses it (total support): with one at hand these are
    the cells whose row and column lie in one strongly connected component of its
    alternating digraph (Dulmage and Mendelsohn, 1958). Results are remembered by the
    content of the mask. All of it is exact.

    Args:
        mask: Shape ``(*batch, n, m)``, True where a pair is allowed; None allows all
            pairs. A :class:`MatchingGraph` is returned as it is.
        shape: The expected ``(n, m)``.
        device: Where the result lives; by default where the mask is.
        unmatched: Rows and columns that may stay unmatched, both of type bool.

    Raises:
        ValueError: If the mask is not of type bool or not of this shape, or if it has
            no matching: then the message names rows that have too few columns between
            them, or columns that have too few rows (Hall, 1935).

    Example:
        >>> mask = torch.ones(3, 3, dtype=torch.bool).tril()
        >>> graph = matching_graph(mask, (3, 3))
        >>> graph
        MatchingGraph(shape=(3, 3), batch_shape=(), components=3, free=0)
        >>> graph.support.int()  # only the identity is left
        tensor([[1, 0, 0],
                [0, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    n, m = (int(size) for size in shape)
    if n < 1 or m < 1:
        raise ValueError(f"expected at least one row and one column, got {n} and {m}.")
    if isinstance(mask, MatchingGraph):
        if unmatched is not None:
            raise ValueError(
                "a MatchingGraph says itself what may stay unmatched, with scores of "
                "zero: leave out unmatched=. For other scores pass the Boolean mask "
                "in place of the graph, and unmatched scores beside it, -inf for what "
                "has to be matched."
            )
        _check_shape(mask.allowed, n, m)
        if device is None or mask.device == torch.device(device):
            return mask
        free = (mask.free_rows, mask.free_columns) if mask.has_slack else None
        return matching_graph(mask.allowed, (n, m), device, unmatched=free)
    if n > m and unmatched is None:
        raise ValueError(
            f"expected logits of no more rows than columns, got {n} and {m}: every row "
            "is matched to a column of its own. Transpose the problem, or say what may "
            "stay unmatched (unmatched=...)."
        )
    place = None if device is None else torch.device(device)
    if mask is None:
        place = torch.device("cpu") if place is None else place
        if unmatched is None and n == m:
            return _full(n, m, place)
        allowed = np.ones((n, m), dtype=np.bool_)
    elif not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask must be a bool tensor, True where a pair is allowed, got {given}. "
            "Convert it, for example with mask.bool()."
        )
    else:
        _check_shape(mask, n, m)
        place = mask.device if place is None else place
        allowed = _array(mask)
    if unmatched is None:
        return _from_bits(np.packbits(allowed).tobytes(), allowed.shape, None, place)
    rows, columns = _checked_free(unmatched, (n, m), allowed)
    lead = np.broadcast_shapes(allowed.shape[:-2], rows.shape[:-1], columns.shape[:-1])
    shapes = (*lead, n, m), (*lead, n), (*lead, m)
    allowed_bits, row_bits, column_bits = (
        np.packbits(np.broadcast_to(x, shape)).tobytes()
        for x, shape in zip((allowed, rows, columns), shapes, strict=True)
    )
    return _from_bits(allowed_bits, shapes[0], (row_bits, column_bits), place)


def _checked_free(
    unmatched: Free, shape: tuple[int, int], allowed: BoolArray
) -> tuple[BoolArray, BoolArray]:
    found = []
    for free, size, name in zip(unmatched, shape, ("rows", "columns"), strict=True):
        if (
            not isinstance(free, Tensor)
            or free.dtype != torch.bool
            or free.shape[-1:] != (size,)
        ):
            raise ValueError(
                f"unmatched {name} must be bool of shape (*batch, {size}), got "
                f"{getattr(free, 'dtype', type(free).__name__)} of shape "
                f"{tuple(getattr(free, 'shape', ()))}."
            )
        found.append(_array(free))
    try:
        np.broadcast_shapes(allowed.shape[:-2], *(x.shape[:-1] for x in found))
    except ValueError:
        raise ValueError(
            f"unmatched of shapes {found[0].shape} and {found[1].shape} does not "
            f"broadcast with a mask of shape {allowed.shape}."
        ) from None
    return found[0], found[1]


def _check_shape(mask: Tensor, n: int, m: int) -> None:
    if mask.dim() < 2 or (int(mask.shape[-2]), int(mask.shape[-1])) != (n, m):
        raise ValueError(
            f"mask must have shape (*batch, {n}, {m}), got {tuple(mask.shape)}."
        )


@lru_cache(maxsize=64)
def _full(n: int, m: int, device: torch.device) -> MatchingGraph:
    return _build(np.ones((n, m), dtype=np.bool_), None, device)


@lru_cache(maxsize=64)
def _from_bits(
    bits: bytes,
    shape: tuple[int, ...],
    free: tuple[bytes, bytes] | None,
    device: torch.device,
) -> MatchingGraph:
    allowed = _bools(bits, shape)
    if free is not None:
        wide = (*shape[:-2], shape[-1])
        return _build(
            allowed, (_bools(free[0], shape[:-1]), _bools(free[1], wide)), device
        )
    n, m = shape[-2:]
    if n == m and allowed.all():
        return _full(n, m, device).expand(shape[:-2])
    rows, columns = may_stay_unmatched(allowed)
    if n == m and not rows.any():
        return _build(allowed, None, device)
    return _build(allowed, (rows, columns), device)


def _bools(bits: bytes, shape: tuple[int, ...]) -> BoolArray:
    size = int(np.prod(shape))
    found = np.unpackbits(np.frombuffer(bits, np.uint8), count=size)
    return found.reshape(shape).astype(np.bool_)


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)


@outside
def _expanded(graph: MatchingGraph, batch: torch.Size) -> MatchingGraph:
    own = len(graph.batch_shape)
    parts: dict[str, Any] = {
        name: part.expand(batch + part.shape[own:])
        for name, part in graph.__getstate__().items()
        if isinstance(part, Tensor)
    }
    return replace(graph, **parts)


def _array(tensor: Tensor) -> NDArray[Any]:
    try:
        return tensor.cpu().numpy()
    except RuntimeError:  # under torch.func.grad there are values but no storage
        dtype = np.bool_ if tensor.dtype == torch.bool else np.int64
        return np.array(tensor.tolist(), dtype=dtype).reshape(tensor.shape)


@outside
def _build(
    allowed: BoolArray, free: tuple[BoolArray, BoolArray] | None, device: torch.device
) -> MatchingGraph:
    batch, (n, m) = allowed.shape[:-2], allowed.shape[-2:]
    slack = free is not None
    known: dict[bytes, MaskAnalysis] = {}
    each = []
    for index in np.ndindex(batch):
        one = None if free is None else (free[0][index], free[1][index])
        parts = (allowed[index], *(one or ()))
        content = b"".join(np.packbits(part).tobytes() for part in parts)
        if content not in known:
            known[content] = analyse(allowed[index], one, index)
        each.append(known[content])

    def stack(name: str, *event: int) -> NDArray[Any]:
        dtype = np.bool_ if name in ("cells", "root") else np.int64
        found = [getattr(part, name) for part in each]
        return np.array(found, dtype=dtype).reshape(*batch, *event)

    N, M = n + slack, m + slack
    cells, root = stack("cells", N, M), stack("root", M)
    cell, parent = stack("cell", N + M), stack("parent", N + M)
    sign = np.ones((*batch, N + M), dtype=np.int8)
    sign[..., N:] = root.astype(np.int8) - 1
    forest = np.zeros((*batch, N * M), dtype=np.bool_)
    np.put_along_axis(forest, cell, True, -1)
    forest = forest.reshape(cells.shape)
    support = cells[..., :n, :m]
    pairs = support & ~forest[..., :n, :m]
    jumps: list[IntArray] = []
    depth = max((part.depth for part in each), default=1)
    while 2 ** len(jumps) < depth:
        jumps.append(parent)
        parent = np.take_along_axis(parent, parent, -1)
    if free is None:
        free = np.zeros((*batch, n), np.bool_), np.zeros((*batch, m), np.bool_)
    arrays = {
        "allowed": allowed,
        "free_rows": free[0],
        "free_columns": free[1],
        "cells": cells,
        "matching": stack("matching", n),
        "forest": forest,
        "row_component": stack("row_component", N),
        "column_component": stack("column_component", M),
        "root": root,
        "support": support,
        "free": pairs,
        "dim": pairs.sum((-2, -1)),
        "row_counts": support.sum(-1),
        "column_counts": support.sum(-2),
        "_cell": cell,
        "_sign": sign,
        "_jumps": np.moveaxis(
            np.array(jumps, dtype=np.int64).reshape(len(jumps), *cell.shape), 0, -2
        ),
    }
    tensors: dict[str, Any] = {k: _tensor(a, device) for k, a in arrays.items()}
    full = bool(allowed.all()) and not slack
    return MatchingGraph(is_full=full, has_slack=slack, **tensors)


def _span(counts: list[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}..{high}"
