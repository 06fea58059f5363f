# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Between vectors of free numbers and matrices of contrasts: cells are copied."""

from __future__ import annotations

__all__ = ["ContrastsTransform", "Mask"]

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.constraints import independent, real
from torch.distributions.transforms import Transform
from torch.nn.functional import pad

from pyro_permutations.constraints import contrasts
from pyro_permutations.matching_graph import MatchingGraph

Mask = Tensor | MatchingGraph | None


class ContrastsTransform(Transform):
    r"""A vector of free numbers to a matrix of contrasts: puts them on the free cells.

    The log-determinant is zero. With no mask the vector is the upper left block of
    :math:`(n - 1)^2` cells, row by row, and n is taken from the length of the vector;
    with a mask it is the free cells of its graph, in the same order.

    Args:
        mask: Shape ``(*batch, n, m)``, bool, True where a pair is allowed, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`. The free cells of
            batch elements may differ in place, but not in number.
        cache_size: As in torch: 0, or 1 to remember the last pair.

    Raises:
        NotImplementedError: If batch elements have different numbers of free cells.

    Example:
        >>> ContrastsTransform()(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([[1., 2., 0.],
                [3., 4., 0.],
                [0., 0., 0.]])
    """

    domain = independent(real, 1)
    bijective = True

    def __init__(self, mask: Mask = None, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.codomain = contrasts(mask)
        self.graph = graph = self.codomain.graph
        if graph is not None:
            self._dim = int(graph.dim.max()) if graph.dim.numel() else 0
            if (graph.dim != self._dim).any():
                raise NotImplementedError(
                    "the masks of this batch have different numbers of free cells "
                    f"({int(graph.dim.min())} to {self._dim}), so their elements "
                    "cannot share one unconstrained vector. Use a GumbelSinkhorn guide "
                    "for this site, or one site per mask."
                )
            # Free cells first, each kind in its order: the first dim are the free ones.
            order = (
                (~graph.free).flatten(-2).to(torch.int8).argsort(dim=-1, stable=True)
            )
            self._cells = order[..., : self._dim]

    def with_cache(self, cache_size: int = 1) -> ContrastsTransform:
        """Return the transform with a cache of another size."""
        if cache_size == self._cache_size:
            return self
        return ContrastsTransform(self.graph, cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContrastsTransform) and self.codomain == other.codomain

    def __hash__(self) -> int:
        return hash((ContrastsTransform, self.codomain))

    def _call(self, x: Tensor) -> Tensor:
        shape = self.forward_shape(x.shape)
        if self.graph is None:
            block = x.reshape((*x.shape[:-1], shape[-1] - 1, shape[-1] - 1))
            return pad(block, (0, 1, 0, 1))
        cells, flat = self._cells.to(x.device), shape[-2] * shape[-1]
        zeros = x.new_zeros((*shape[:-2], flat))
        cells = cells.expand((*shape[:-2], self._dim))
        return zeros.scatter(-1, cells, x.expand(cells.shape)).reshape(shape)

    def _inverse(self, y: Tensor) -> Tensor:
        shape = self.inverse_shape(y.shape)
        if self.graph is None:
            return y[..., :-1, :-1].reshape(shape)
        cells = self._cells.to(y.device).expand(shape)
        return y.flatten(-2).expand((*shape[:-1], -1)).gather(-1, cells)

    def log_abs_det_jacobian(
        self,
        x: Tensor,  # (*lead, dim)
        y: Tensor,  # (*lead, n, m)
    ) -> Tensor:  # (*lead,)
        """Zero: cells are copied."""
        return y.new_zeros(y.shape[:-2])

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of Z for a shape of the vector."""
        if len(shape) < 1:
            raise ValueError("expected a shape (*batch, dim), got ().")
        graph, dim = self.graph, shape[-1]
        if graph is None:
            n = math.isqrt(dim) + 1
            if (n - 1) ** 2 != dim:
                raise ValueError(
                    f"a vector of length {dim} is not the contrasts of a square "
                    "matrix: expected a length of (n - 1)^2, that is 0, 1, 4, 9, ..."
                )
            return torch.Size((*shape[:-1], n, n))
        if dim != self._dim:
            raise ValueError(
                f"a vector of length {dim} does not fit a mask with {self._dim} free "
                f"cells. Pass vectors of length {self._dim}."
            )
        lead = torch.broadcast_shapes(shape[:-1], graph.batch_shape)
        return torch.Size(lead + graph.shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the vector for a shape of Z."""
        graph = self.graph
        if graph is None:
            if len(shape) < 2 or shape[-1] != shape[-2]:
                raise ValueError(
                    f"expected a shape (*batch, n, n), got {tuple(shape)}. For other "
                    "shapes pass matching_graph(None, (n, m)) as the mask, here or in "
                    "doubly_stochastic(mask)."
                )
            return torch.Size((*shape[:-2], (shape[-2] - 1) * (shape[-1] - 1)))
        lead = torch.broadcast_shapes(shape[:-2], graph.batch_shape)
        return torch.Size((*lead, self._dim))


def _contrasts_for(constraint: Any) -> ContrastsTransform:
    return ContrastsTransform(constraint.graph)


biject_to.register(contrasts, _contrasts_for)
transform_to.register(contrasts, _contrasts_for)
