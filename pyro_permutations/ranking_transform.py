# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""From the scores of items to a soft ranking of them, and back."""

from __future__ import annotations

__all__ = ["RankingTransform", "is_ranking_sample", "soft_ranking"]

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.constraints import Constraint, real_vector
from torch.distributions.transforms import Transform
from torch.nn.functional import pad

from pyro_permutations.carried_log import log_with_slack
from pyro_permutations.constraints import doubly_stochastic
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.sinkhorn import log_sinkhorn_with_slack
from pyro_permutations.transforms import (
    BirkhoffTransform,
    graph_for,
    log_cells,
    relative,
    with_log,
)

# How far log P may be from that of scores, relative to its largest entry. It is 1e-9
# for samples of this package; rounding P to float32 makes 1e-4 of it, at most.
_TOLERANCE = 1e-3


class _SoftRanking(Constraint):
    """Doubly stochastic matrices that are the entropic ranking of some scores.

    There are n - 1 dimensions of them, in (n - 1)^2 of doubly stochastic matrices.
    ``soft_ranking`` is the set for all ranks, and ``soft_ranking(top)`` that for the
    first ones, of matrices whose columns may sum to less than one.

    Args:
        top: The number of ranks; None for as many as there are items.

    Example:
        >>> P = RankingTransform(0.5)(torch.tensor([1.0, -1.0]))
        >>> soft_ranking.check(P)
        tensor(True)
        >>> soft_ranking.check(0.9 * torch.eye(3) + 0.1 * torch.ones(3, 3) / 3)
        tensor(False)
    """

    is_discrete = False
    event_dim = 2

    def __init__(self, top: int | None = None) -> None:
        self.top = top
        super().__init__()

    def __call__(self, top: int) -> _SoftRanking:
        return _SoftRanking(top)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SoftRanking) and self.top == other.top

    def __hash__(self) -> int:
        return hash((_SoftRanking, self.top))

    def __repr__(self) -> str:
        return "soft_ranking" if self.top is None else f"soft_ranking({self.top})"

    def check(
        self,
        value: Tensor,  # (*lead, k, n)
    ) -> Tensor:  # (*lead,) bool
        """Whether each is doubly stochastic, with a log of scores by positions.

        The log is that which the value carries. A copy that has lost it, with entries
        below the square root of its precision, can be told only by its sums.
        """
        n = value.shape[-1] if value.dim() >= 2 else 0
        if n == 0 or value.shape[-2] != (n if self.top is None else self.top):
            return value.new_zeros(value.shape[:-2], dtype=torch.bool)
        graph = matching_graph(None, (value.shape[-2], n), value.device)
        log_P, lost = log_with_slack(value, graph)
        X = relative(log_P, graph)
        weight = _positions(graph)
        fitted = weight[:, None] * _scores(X, weight)[..., None, :]
        # Row shifts do not matter, nor column shifts where columns have no slack.
        rest = X - fitted
        rest = rest - rest.mean(-1, keepdim=True)
        if not graph.has_slack:
            rest = rest - rest.mean(-2, keepdim=True)
        largest = 1 + X.abs().amax((-2, -1))
        right = rest.abs().amax((-2, -1)) <= _TOLERANCE * largest
        if lost is not None:
            tiny = torch.finfo(value.dtype).eps ** 0.5
            cells = torch.where(graph.cells, log_P, 0).exp()
            right = right | (cells < tiny).any(-1).any(-1)
        return right & doubly_stochastic(graph).check(value)


soft_ranking = _SoftRanking()


class RankingTransform(Transform):
    r"""Scores of items to a soft ranking of them, with the highest score first.

    .. math:: P = S(c \, z^\top / \tau), \qquad c = (k, k - 1, \dots, 1)

    with z the vector x and a zero: the score of an item less that of the last one. S
    is the Sinkhorn operator, so P is the doubly stochastic matrix of the entropic
    optimal transport of the scores to the ranks; with fewer ranks than items, k < n,
    an item without a rank is at position zero. ``P[r, i]`` near one says that item i
    has rank r; as :math:`\tau \to 0` it is the descending sort.

    P has the n - 1 coordinates :math:`y = x / \tau`, which do not depend on the
    temperature: log P is their product with the positions, up to row and column
    shifts. Volume is that of y, so the log-determinant is :math:`-(n - 1) \log \tau`.
    P carries its log in float64.

    Args:
        temperature: Positive; a number, or a tensor of batch shape.
        top: The number k of ranks; all n if not given.
        cache_size: As in torch: 0, or 1 to remember the last pair.

    Raises:
        ValueError: If the temperature is not positive and finite.

    References:
        Cuturi, Teboul and Vert, "Differentiable ranks and sorting using optimal
        transport" (2019), https://arxiv.org/abs/1905.11885.

    Example:
        >>> transform = RankingTransform(0.5)
        >>> P = transform(torch.tensor([1.0, -1.0]))  # and zero: the order is 0, 2, 1
        >>> P
        tensor([[0.753, 0.014, 0.233],
                [0.233, 0.233, 0.534],
                [0.014, 0.753, 0.233]])
        >>> transform.inv(P)
        tensor([ 1., -1.])
    """

    domain = real_vector
    bijective = True

    def __init__(
        self,
        temperature: float | Tensor,
        top: int | None = None,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.birkhoff = BirkhoffTransform(temperature)
        self.top = top
        self.codomain = soft_ranking if top is None else soft_ranking(top)

    def with_cache(self, cache_size: int = 1) -> RankingTransform:
        """Return the transform with a cache of another size."""
        if cache_size == self._cache_size:
            return self
        return RankingTransform(self.birkhoff.temperature, self.top, cache_size)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RankingTransform)
            and self.top == other.top
            and self.birkhoff == other.birkhoff
        )

    def __hash__(self) -> int:
        return hash((RankingTransform, self.top))

    def __repr__(self) -> str:
        return f"RankingTransform({self.birkhoff.temperature}, top={self.top})"

    def _call(self, x: Tensor) -> Tensor:
        n = x.shape[-1] + 1
        graph = matching_graph(None, (n if self.top is None else self.top, n), x.device)
        z = pad(x.double(), (0, 1))[..., None, :]
        tau = self.birkhoff._tau(x)
        # In units of the temperature here: its batch may be larger than that of x.
        X = _positions(graph)[:, None] * z / tau[..., None, None]
        P = with_log(log_sinkhorn_with_slack(X, 1.0, graph), graph, x.dtype)
        P._soft_ranking = True  # type: ignore[attr-defined]
        return P

    def _inverse(self, y: Tensor) -> Tensor:
        graph = graph_for(None, y)
        X = self.birkhoff.scores(log_cells(y, graph), graph)
        z = _scores(X, _positions(graph))
        return (z[..., :-1] - z[..., -1:]).to(y.dtype)

    def log_abs_det_jacobian(
        self,
        x: Tensor,  # (*lead, n - 1)
        y: Tensor,  # (*lead, k, n)
    ) -> Tensor:  # (*lead,)
        """The log of the volume change, with respect to the coordinates."""
        volume = -x.shape[-1] * self.birkhoff._tau(y).log()
        return volume.to(y.dtype) + y.new_zeros(y.shape[:-2])

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of P for a shape of the scores."""
        n = shape[-1] + 1
        return torch.Size(
            (*self._lead(shape[:-1]), n if self.top is None else self.top, n)
        )

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the scores for a shape of P."""
        return torch.Size((*self._lead(shape[:-2]), shape[-1] - 1))

    def _lead(self, shape: torch.Size) -> torch.Size:
        tau = torch.as_tensor(self.birkhoff.temperature)
        return torch.Size(torch.broadcast_shapes(shape, tau.shape))


def is_ranking_sample(value: Tensor) -> bool:
    """Whether a value, or what it is a view of, was made by a RankingTransform.

    Its density has n - 1 dimensions, and ratios to one of (n - 1)^2 mean nothing.
    """
    base = value._base
    sources = (value,) if base is None else (value, base)
    return any(getattr(source, "_soft_ranking", False) for source in sources)


def _positions(graph: MatchingGraph) -> Tensor:  # (k,) float64
    """The positions of the ranks, relative to that without a rank or to their mean."""
    k = graph.shape[0]
    c = torch.arange(k, 0, -1, dtype=torch.float64, device=graph.device)
    return c if graph.has_slack else c - c.mean()


def _scores(
    X: Tensor,  # (*lead, k, n) float64
    weight: Tensor,  # (k,)
) -> Tensor:  # (*lead, n)
    """Least squares of X = weight z^T + shifts, up to a constant in z."""
    return weight @ X / weight.square().sum().clamp_min(0.5)  # 0 if there is one rank


def _bijection_for(constraint: Any) -> RankingTransform:
    return RankingTransform(1.0, constraint.top)


biject_to.register(soft_ranking, _bijection_for)
transform_to.register(soft_ranking, _bijection_for)
