# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""From relaxed matchings to hard ones, with the gradient of the relaxed ones."""

from __future__ import annotations

__all__ = ["HardenTransform"]

from typing import Any

from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.transforms import Transform

from pyro_permutations.carried_log import carry_log
from pyro_permutations.constraints import doubly_stochastic, straight_through
from pyro_permutations.contrasts_transform import Mask
from pyro_permutations.matching import matching
from pyro_permutations.transforms import (
    SinkhornTransform,
    graph_for,
    log_cells,
    relative,
    with_log,
)


class HardenTransform(Transform):
    """A doubly stochastic matrix to its best matching, with the gradient of the former.

    The value is exactly 0 or 1 and carries the log of what it was made from, so this
    has an inverse; its log-determinant is zero. Densities are therefore those of the
    relaxed value. A permutation matrix that carries no log is its own inverse.

    Args:
        mask: Shape ``(*batch, n, m)``, bool, True where a pair is allowed, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`.
        cache_size: As in torch: 0, or 1 to remember the last pair.

    Example:
        >>> import torch
        >>> P = SinkhornTransform()(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        >>> hard = HardenTransform()(P)
        >>> hard
        tensor([[1., 0.],
                [0., 1.]])
        >>> HardenTransform().inv(hard)
        tensor([[0.622, 0.378],
                [0.378, 0.622]])
    """

    bijective = True

    def __init__(self, mask: Mask = None, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.domain = doubly_stochastic if mask is None else doubly_stochastic(mask)
        self.codomain = straight_through if mask is None else straight_through(mask)
        self.graph = self.domain.graph

    def with_cache(self, cache_size: int = 1) -> HardenTransform:
        """Return the transform with a cache of another size."""
        if cache_size == self._cache_size:
            return self
        return HardenTransform(self.graph, cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HardenTransform) and self.codomain == other.codomain

    def __hash__(self) -> int:
        return hash((HardenTransform, self.codomain))

    def _call(self, x: Tensor) -> Tensor:
        graph = graph_for(self.graph, x)
        log_P = log_cells(x, graph)
        # Of log P, not of P: that is the matching of the scores, M(X + noise).
        hard = matching(relative(log_P, graph), mask=graph).to(x.dtype)
        # In this order the bracket is exactly zero, and the sum exactly 0 or 1.
        return carry_log(hard + (x - x.detach()), log_P)

    def _inverse(self, y: Tensor) -> Tensor:
        graph = graph_for(self.graph, y)
        return with_log(log_cells(y, graph), graph, y.dtype)

    def log_abs_det_jacobian(
        self,
        x: Tensor,  # (*lead, n, m)
        y: Tensor,  # (*lead, n, m)
    ) -> Tensor:  # (*lead,)
        """Zero: the density is that of the relaxed value."""
        return y.new_zeros(y.shape[:-2])


class _StraightThroughTransform(SinkhornTransform):
    """Any score matrix to its best matching, with the gradient of Sinkhorn."""

    def __init__(self, mask: Mask = None, cache_size: int = 0) -> None:
        super().__init__(mask, cache_size)
        self.codomain = straight_through if mask is None else straight_through(mask)

    def _call(self, x: Tensor) -> Tensor:
        hard: Tensor = HardenTransform(self.graph)(super()._call(x))
        return hard

    def _inverse(self, y: Tensor) -> Tensor:
        # Many scores have this matching: moderate ones, to leave Sinkhorn a gradient.
        return y.clone()


def _no_bijection_for(constraint: Any) -> Transform:
    raise NotImplementedError(
        "GumbelSinkhornStraightThrough has no bijection to unconstrained space: an "
        "autoguide or sampler would give relaxed values in place of hard ones. Use a "
        "GumbelSinkhornStraightThrough guide for this site; or poutine.reparam(model, "
        'config={"<site>": TransformReparam()}), whose values stay hard; or '
        "GumbelSinkhorn, if relaxed values are meant."
    )


def _straight_through_for(constraint: Any) -> _StraightThroughTransform:
    return _StraightThroughTransform(constraint.graph)


biject_to.register(straight_through, _no_bijection_for)
transform_to.register(straight_through, _straight_through_for)
