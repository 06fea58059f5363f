# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What a mask allows: feasibility, total support, components and free cells."""

from __future__ import annotations

__all__ = ["ComponentGroup", "MatchingGraph", "matching_graph"]

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_permutations.mask_analysis import BoolArray, IntArray, MaskAnalysis, analyse


class ComponentGroup(NamedTuple):
    """All components of one size, s rows and s columns each."""

    element: Tensor  # (C,) long, flat index into the batch
    rows: Tensor  # (C, s) long, increasing
    columns: Tensor  # (C, s) long, increasing
    mask: Tensor  # (C, s, s) bool, the support inside each component


@dataclass(frozen=True, eq=False, repr=False)
class MatchingGraph:
    r"""The bipartite graph of a mask, analysed once; built by :func:`matching_graph`.

    Cells that no perfect matching uses are dropped; what is left, the ``support``,
    falls apart into square connected components. Scores matter up to a constant per
    row and per column, so they can be shifted to zero on a spanning forest of the
    support. The cells that remain are free:

    .. math:: \text{dim} = |E| - (n + m - k),

    for a support :math:`E` with :math:`k` components.
    """

    allowed: Tensor  # (*batch, n, m) bool, as given
    support: Tensor  # (*batch, n, m) bool, cells that some perfect matching uses
    matching: Tensor  # (*batch, n) long, one perfect matching: row i to matching[i]
    forest: Tensor  # (*batch, n, m) bool, a spanning forest of the support
    row_component: Tensor  # (*batch, n) long, labels 0..k-1
    column_component: Tensor  # (*batch, m) long, labels 0..k-1
    root: Tensor  # (*batch, m) bool, one column per component
    free: Tensor  # (*batch, n, m) bool, the support without the forest
    dim: Tensor  # (*batch,) long, number of free cells
    row_counts: Tensor  # (*batch, n) long, cells of the support in each row
    column_counts: Tensor  # (*batch, m) long
    is_full: bool  # no cell is forbidden
    # The forest as pointers, for nodes 0..n-1 (rows) and n..n+m-1 (columns):
    _cell: Tensor  # (*batch, n + m) long, flat cell of the edge to the parent
    _sign: Tensor  # (*batch, n + m) int8: 1 for rows, -1 for columns, 0 for roots
    _jumps: Tensor  # (*batch, h, n + m) long, ancestor 1, 2, 4, ... edges away

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return int(self.allowed.shape[-2]), int(self.allowed.shape[-1])

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
        scores = torch.where(self.support, scores, 0)
        n, lead = self.shape[0], scores.shape[:-2]
        # A node's shift is its edge's score less its parent's shift. With the sign
        # of columns turned that is a sum along the path to the root, and adding the
        # sum of the ancestor 1, 2, 4, ... edges away doubles the path that is done.
        index = self._cell.expand(lead + self._cell.shape[-1:])
        shift = self._sign * scores.flatten(-2).gather(-1, index)
        for jump in self._jumps.unbind(-2):
            shift = shift + shift.gather(-1, jump.expand(shift.shape))
        u, v = shift[..., :n, None], -shift[..., None, n:]
        return torch.where(self.free, scores - u - v, 0)

    def components(self) -> list[ComponentGroup]:
        """List the components of two or more rows, grouped by their size."""
        return self._components

    def expand(self, batch_shape: Sequence[int]) -> MatchingGraph:
        """Return the graph with a larger batch; nothing is copied or analysed again."""
        batch = torch.Size([int(size) for size in batch_shape])
        own = len(self.batch_shape)
        if batch == self.batch_shape:
            return self
        if batch not in self._expanded:
            if len(self._expanded) >= 8:  # more shapes than one model uses
                self._expanded.clear()
            parts: dict[str, Any] = {
                name: part.expand(batch + part.shape[own:])
                for name, part in self.__getstate__().items()
                if isinstance(part, Tensor)
            }
            self._expanded[batch] = replace(self, **parts)
        return self._expanded[batch]

    def __eq__(self, other: object) -> bool:
        """Whether both allow the same cells, in the same batch, on the same device."""
        if not isinstance(other, MatchingGraph):
            return NotImplemented
        return self is other or (
            self.allowed.shape == other.allowed.shape
            and self.device == other.device
            and torch.equal(self.allowed, other.allowed)
        )

    def __hash__(self) -> int:
        """Hash of the allowed cells."""
        return self._hash

    def __repr__(self) -> str:
        """Shape, batch, and the range of components and free cells over the batch."""
        components = _span(self.root.sum(-1).flatten().tolist())
        free = _span(self.dim.flatten().tolist())
        return (
            f"MatchingGraph(shape={self.shape}, batch_shape={tuple(self.batch_shape)}, "
            f"components={components}, free={free})"
        )

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
    def _components(self) -> list[ComponentGroup]:
        n, m = self.shape
        support = _array(self.support).reshape(-1, n, m)
        row_component = _array(self.row_component).reshape(-1, n)
        column_component = _array(self.column_component).reshape(-1, m)
        # Number the components through the whole batch; sorting by that number puts
        # the rows of a component side by side, and its columns likewise.
        first = n * np.arange(len(support))[:, None]
        rows = np.argsort((first + row_component).ravel(), kind="stable")
        columns = np.argsort((first + column_component).ravel(), kind="stable")
        sizes = np.bincount((first + row_component).ravel())
        starts = np.cumsum(sizes) - sizes
        groups = []
        for size in np.unique(sizes[sizes > 1]).tolist():
            members = starts[sizes == size, None] + np.arange(size)
            element = rows[members[:, 0]] // n
            i, j = rows[members] % n, columns[members] % m
            mask = support[element[:, None, None], i[:, :, None], j[:, None, :]]
            parts = (_tensor(part, self.device) for part in (element, i, j, mask))
            groups.append(ComponentGroup(*parts))
        return groups


def matching_graph(
    mask: Tensor | MatchingGraph | None,  # (*batch, n, m) bool
    shape: tuple[int, int],
    device: torch.device | str | None = None,
) -> MatchingGraph:
    """Find out, once, what a mask allows.

    A cell is kept if some perfect matching uses it (total support): with one perfect
    matching at hand these are the cells whose row and column lie in one strongly
    connected component of its alternating digraph (Dulmage and Mendelsohn, 1958).
    Results are remembered by the content of the mask. All of it is exact.

    Args:
        mask: Shape ``(*batch, n, m)``, True where a pair is allowed; None allows all
            pairs. A :class:`MatchingGraph` is returned as it is.
        shape: The expected ``(n, m)``. Only ``n == m`` is possible.
        device: Where the result lives; by default where the mask is.

    Raises:
        ValueError: If the mask is not of type bool or not of this shape, or if it has
            no perfect matching: then the message names rows that have too few columns
            between them, or columns that have too few rows (Hall, 1935).

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
    if n != m or n < 1:
        raise ValueError(
            f"expected as many rows as columns, and at least one, got {n} and {m}. "
            "Every row is matched to one column and every column to one row."
        )
    if mask is None:
        return _full(n, m, torch.device("cpu" if device is None else device))
    if isinstance(mask, MatchingGraph):
        _check_shape(mask.allowed, n, m)
        if device is None or mask.device == torch.device(device):
            return mask
        return matching_graph(mask.allowed, (n, m), device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask must be a bool tensor, True where a pair is allowed, got {given}. "
            "Convert it, for example with mask.bool()."
        )
    _check_shape(mask, n, m)
    place = mask.device if device is None else torch.device(device)
    allowed = _array(mask)
    if allowed.all():
        return _full(n, m, place).expand(allowed.shape[:-2])
    return _from_bits(np.packbits(allowed).tobytes(), allowed.shape, place)


def _check_shape(mask: Tensor, n: int, m: int) -> None:
    if mask.dim() < 2 or (int(mask.shape[-2]), int(mask.shape[-1])) != (n, m):
        raise ValueError(
            f"mask must have shape (*batch, {n}, {m}), got {tuple(mask.shape)}."
        )


@lru_cache(maxsize=64)
def _full(n: int, m: int, device: torch.device) -> MatchingGraph:
    return _build(np.ones((n, m), dtype=np.bool_), device)


@lru_cache(maxsize=64)
def _from_bits(
    bits: bytes, shape: tuple[int, ...], device: torch.device
) -> MatchingGraph:
    size = int(np.prod(shape))
    allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=size)
    return _build(allowed.reshape(shape).astype(np.bool_), device)


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    # Graphs outlive the mode in which they were first asked for.
    with torch.inference_mode(False):
        return torch.from_numpy(np.array(array)).to(device)


def _array(tensor: Tensor) -> NDArray[Any]:
    try:
        return tensor.cpu().numpy()
    except RuntimeError:  # under torch.func.grad there are values but no storage
        dtype = np.bool_ if tensor.dtype == torch.bool else np.int64
        return np.array(tensor.tolist(), dtype=dtype).reshape(tensor.shape)


def _build(allowed: BoolArray, device: torch.device) -> MatchingGraph:
    batch, (n, m) = allowed.shape[:-2], allowed.shape[-2:]
    known: dict[bytes, MaskAnalysis] = {}
    each = []
    for index in np.ndindex(batch):
        content = np.packbits(allowed[index]).tobytes()
        if content not in known:
            known[content] = analyse(allowed[index], index)
        each.append(known[content])

    def stack(name: str, *event: int) -> NDArray[Any]:
        dtype = np.bool_ if name in ("support", "root") else np.int64
        parts = [getattr(part, name) for part in each]
        return np.array(parts, dtype=dtype).reshape(*batch, *event)

    support, root = stack("support", n, m), stack("root", m)
    cell, parent = stack("cell", n + m), stack("parent", n + m)
    sign = np.ones((*batch, n + m), dtype=np.int8)
    sign[..., n:] = root.astype(np.int8) - 1
    forest = np.zeros((*batch, n * m), dtype=np.bool_)
    np.put_along_axis(forest, cell, True, -1)
    forest = forest.reshape(support.shape)
    free = support & ~forest
    jumps: list[IntArray] = []
    depth = max((part.depth for part in each), default=1)
    while 2 ** len(jumps) < depth:
        jumps.append(parent)
        parent = np.take_along_axis(parent, parent, -1)
    arrays = {
        "allowed": allowed,
        "support": support,
        "matching": stack("matching", n),
        "forest": forest,
        "row_component": stack("row_component", n),
        "column_component": stack("column_component", m),
        "root": root,
        "free": free,
        "dim": free.sum((-2, -1)),
        "row_counts": support.sum(-1),
        "column_counts": support.sum(-2),
        "_cell": cell,
        "_sign": sign,
        "_jumps": np.moveaxis(
            np.array(jumps, dtype=np.int64).reshape(len(jumps), *cell.shape), 0, -2
        ),
    }
    tensors: dict[str, Any] = {k: _tensor(a, device) for k, a in arrays.items()}
    return MatchingGraph(is_full=bool(allowed.all()), **tensors)


def _span(counts: list[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}..{high}"
