# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Sets of matrices: doubly stochastic ones, contrasts, permutation matrices."""

from __future__ import annotations

__all__ = [
    "SUM_TOLERANCE",
    "contrasts",
    "doubly_stochastic",
    "permutation_matrix",
    "straight_through",
]

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_permutations.matching_graph import MatchingGraph, matching_graph

# How far a row or column sum may be from one. Sinkhorn runs in float64 to 1e-6, of
# which this leaves ten times; rounding the entries then moves a sum of one by at most
# half an epsilon: 6e-8 in float32, 5e-4 in half, 4e-3 in bfloat16. It does not grow
# with n, because the sums are accumulated in float64. Other types are exact.
SUM_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


class _MatrixSet(Constraint):
    """A set of n x m matrices, on all cells or on those that a mask leaves."""

    is_discrete = False
    event_dim = 2
    _name = ""

    def __init__(self, mask: Tensor | MatchingGraph | None = None) -> None:
        if isinstance(mask, Tensor):
            if mask.dim() < 2:
                raise ValueError(
                    f"mask must have shape (*batch, n, m), got {tuple(mask.shape)}."
                )
            mask = matching_graph(mask, (mask.shape[-2], mask.shape[-1]))
        self.graph = mask
        super().__init__()

    def __eq__(self, other: object) -> bool:
        """Whether both are the same kind of set on the same cells."""
        return type(self) is type(other) and self.graph == getattr(other, "graph", None)

    def _graph_for(self, value: Tensor) -> MatchingGraph | None:
        """The graph for a value, or that of its shape; None for other shapes."""
        if value.dim() < 2:
            return None
        shape = (value.shape[-2], value.shape[-1])
        if self.graph is not None:
            return self.graph if self.graph.shape == shape else None
        return matching_graph(None, shape) if 1 <= shape[0] <= shape[1] else None

    def __hash__(self) -> int:
        return hash((type(self), self.graph))

    def __repr__(self) -> str:
        return self._name if self.graph is None else f"{self._name}({self.graph})"


class _DoublyStochastic(_MatrixSet):
    """Non-negative matrices whose rows and columns sum to one, or less.

    ``doubly_stochastic`` is the set for matrices of any size, in which columns may sum
    to less than one if there are fewer rows. ``doubly_stochastic(mask)`` is the one for
    a mask: cells outside its support, those that no matching can use, are exactly
    zero, and what may stay unmatched may sum to less than one.

    Args:
        mask: Shape ``(*batch, n, m)``, bool, True where a pair is allowed, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`.

    Example:
        >>> doubly_stochastic.check(torch.tensor([[0.7, 0.3], [0.3, 0.7]]))
        tensor(True)
        >>> identity = torch.eye(2, dtype=torch.bool)
        >>> doubly_stochastic(identity).check(torch.tensor([[0.7, 0.3], [0.3, 0.7]]))
        tensor(False)
    """

    _name = "doubly_stochastic"

    def __call__(self, mask: Tensor | MatchingGraph) -> _DoublyStochastic:
        return type(self)(mask)

    def check(
        self,
        value: Tensor,  # (*lead, n, m)
    ) -> Tensor:  # (*lead,) bool
        """Whether each matrix is in the set, up to :data:`SUM_TOLERANCE`."""
        tolerance = SUM_TOLERANCE.get(value.dtype, 0.0)
        graph = self._graph_for(value)
        if graph is None:
            return value.new_zeros(value.shape[:-2], dtype=torch.bool)
        support = graph.support.to(value.device)
        allowed = (value >= 0) & (support | (value == 0))
        result = allowed.all(-1).all(-1)
        for dim, slack in zip((-1, -2), graph.slack_cells(), strict=True):
            missing = 1 - value.sum(dim, dtype=torch.float64)
            below = slack.to(value.device) & (missing > 0)
            result = result & (below | (missing.abs() <= tolerance)).all(-1)
        return result


class _StraightThrough(_DoublyStochastic):
    """The same set, for values that stay hard: it has no bijection.

    ``transform_to`` gives hard values with the gradient of relaxed ones.
    """

    _name = "straight_through"


class _Contrasts(_MatrixSet):
    """Score matrices with their row and column shifts taken out.

    They are zero on a spanning forest of the allowed cells and on forbidden cells. With
    no mask, ``contrasts()``, the forest is the last row and the last column, or the
    last column alone if there are fewer rows. What may stay unmatched has no shift.

    Args:
        mask: Shape ``(*batch, n, m)``, bool, True where a pair is allowed, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`.

    Example:
        >>> contrasts().check(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        tensor(True)
        >>> contrasts().check(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor(False)
    """

    _name = "contrasts"

    def check(
        self,
        value: Tensor,  # (*lead, n, m)
    ) -> Tensor:  # (*lead,) bool
        """Whether each matrix is finite, and exactly zero where it has to be."""
        finite = torch.isfinite(value).all(-1).all(-1)
        graph = self._graph_for(value)
        if graph is None:
            return torch.zeros_like(finite)
        zero = graph.free.to(value.device) | (value == 0)
        return finite & zero.all(-1).all(-1)


class _PermutationMatrix(_DoublyStochastic):
    """Matrices of zeros and ones, with a single one in every row and column.

    Like :data:`doubly_stochastic` it is a set for matrices of any size, and
    ``permutation_matrix(mask)`` the one for a mask: what may stay unmatched may have no
    one.

    Example:
        >>> permutation_matrix.check(torch.eye(3))
        tensor(True)
        >>> permutation_matrix.check(torch.eye(2, 3))  # more columns than rows
        tensor(True)
    """

    is_discrete = True
    _name = "permutation_matrix"

    def check(
        self,
        value: Tensor,  # (*lead, n, m)
    ) -> Tensor:  # (*lead,) bool
        """Whether each matrix is exactly a permutation matrix, or a partial one."""
        binary = (value == 0) | (value == 1)
        return binary.all(-1).all(-1) & super().check(value)


doubly_stochastic = _DoublyStochastic()
straight_through = _StraightThrough()
contrasts = _Contrasts
permutation_matrix = _PermutationMatrix()
