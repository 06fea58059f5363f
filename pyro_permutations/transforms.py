# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Between scores and doubly stochastic matrices, and a log that travels with a value.

    vector --ContrastsTransform--> Z --BirkhoffTransform--> P --HardenTransform--> 0/1
    (dim)    scores without shifts    (n, n)    doubly stochastic, (n, n)

The first two are bijections: a doubly stochastic matrix is a score matrix up to a
constant per row and per column. The last is one as long as a value carries its log.
"""

from __future__ import annotations

__all__ = [
    "BirkhoffTransform",
    "SinkhornTransform",
    "as_temperature",
    "graph_for",
    "log_cells",
    "relative",
    "with_log",
]

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.constraints import independent, real
from torch.distributions.transforms import ComposeTransform, Transform

from pyro_permutations.carried_log import carry_log, log_with_slack, warn_if_lost
from pyro_permutations.constraints import (
    contrasts,
    doubly_stochastic,
    permutation_matrix,
)
from pyro_permutations.contrasts_transform import ContrastsTransform, Mask
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.outside import holds
from pyro_permutations.sinkhorn import log_sinkhorn_with_slack
from pyro_permutations.spanning_trees import log_spanning_trees


class SinkhornTransform(Transform):
    r"""Any score matrix to a doubly stochastic one, by the Sinkhorn operator.

    .. math:: P = S(X) = \operatorname{diag}(u) \, e^{X} \operatorname{diag}(v)

    The 2n - 1 row and column shifts of X do not matter, so this is not a bijection; it
    is to :class:`BirkhoffTransform` what torch's ``SoftmaxTransform`` is to
    ``StickBreakingTransform``: for coordinate-wise optimisers, and what
    ``transform_to(doubly_stochastic)`` gives. Its inverse is the log of P, with zero on
    forbidden cells.

    Args:
        mask: Shape ``(*batch, n, m)``, bool, True where a pair is allowed, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`.
        cache_size: As in torch: 0, or 1 to remember the last pair.

    Example:
        >>> SinkhornTransform()(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([[0.622, 0.378],
                [0.378, 0.622]])
    """

    domain = independent(real, 2)

    def __init__(self, mask: Mask = None, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.codomain = doubly_stochastic if mask is None else doubly_stochastic(mask)
        self.graph = self.codomain.graph

    def with_cache(self, cache_size: int = 1) -> SinkhornTransform:
        """Return the transform with a cache of another size."""
        if cache_size == self._cache_size:
            return self
        return type(self)(self.graph, cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SinkhornTransform) and self.codomain == other.codomain

    def __hash__(self) -> int:
        return hash((SinkhornTransform, self.codomain))

    def _call(self, x: Tensor) -> Tensor:
        graph = graph_for(self.graph, x)
        log_P = log_sinkhorn_with_slack(x.double(), 1.0, graph)
        return with_log(log_P, graph, x.dtype)

    def _inverse(self, y: Tensor) -> Tensor:
        graph = graph_for(self.graph, y)
        # No warning where the log is lost: the scores are a starting point, no density.
        log_P, _ = log_with_slack(y, graph)
        return relative(log_P, graph).to(y.dtype)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of P for a shape of X: batches of masks broadcast."""
        return _broadcast(shape, self.graph)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of X for a shape of P."""
        return _broadcast(shape, self.graph)


class BirkhoffTransform(Transform):
    r"""Contrasts to doubly stochastic matrices: a bijection.

    .. math:: P = S(Z / \tau), \qquad Z = \text{contrasts}(\tau \log P)

    Z is a score matrix that is zero on a spanning forest of the allowed cells (in the
    last row and column, with no mask) and P is inside the Birkhoff polytope. With E
    the allowed cells, dim the number of free ones and T the weighted number of
    spanning forests,

    .. math:: \log |dP / dZ| = - \dim \log \tau + \sum_E \log P - \log T(P).

    Both directions are exact up to the convergence of Sinkhorn. The determinant is that
    of (free P, u, v) -> L with :math:`L_{ij} = \tau \log P_{ij} + u_i + v_j`, which is
    :math:`\tau^{\dim} T(P) / \prod_E P` by the matrix-tree theorem, because
    (Z, u, v) -> L has determinant one. P carries its log in float64 (:func:`log_of`).

    Args:
        temperature: Positive; a number, or a tensor of batch shape.
        mask: Shape ``(*batch, n, m)``, bool, True where a pair is allowed, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`.
        cache_size: As in torch: 0, or 1 to remember the last pair.

    Raises:
        ValueError: If the temperature is not positive and finite.

    Example:
        >>> transform = BirkhoffTransform(0.5)
        >>> P = transform(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        >>> P
        tensor([[0.731, 0.269],
                [0.269, 0.731]])
        >>> transform.inv(P)
        tensor([[1., 0.],
                [0., 0.]])
    """

    bijective = True

    def __init__(
        self, temperature: float | Tensor, mask: Mask = None, cache_size: int = 0
    ) -> None:
        super().__init__(cache_size=cache_size)
        _check_temperature(as_temperature(temperature))
        self.temperature = temperature
        self.codomain = doubly_stochastic if mask is None else doubly_stochastic(mask)
        self.graph = self.codomain.graph
        self.domain = contrasts(self.graph)

    def with_cache(self, cache_size: int = 1) -> BirkhoffTransform:
        """Return the transform with a cache of another size."""
        if cache_size == self._cache_size:
            return self
        return BirkhoffTransform(self.temperature, self.graph, cache_size)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BirkhoffTransform)
            and self.codomain == other.codomain
            and (
                self.temperature is other.temperature
                or torch.equal(
                    torch.as_tensor(self.temperature, dtype=torch.float64),
                    torch.as_tensor(other.temperature, dtype=torch.float64),
                )
            )
        )

    def __hash__(self) -> int:
        return hash((BirkhoffTransform, self.codomain))

    def __repr__(self) -> str:
        return f"BirkhoffTransform(temperature={self.temperature})"

    def _call(self, x: Tensor) -> Tensor:
        graph = graph_for(self.graph, x)
        log_P = log_sinkhorn_with_slack(x.double(), self._tau(x), graph)
        return with_log(log_P, graph, x.dtype)

    def _inverse(self, y: Tensor) -> Tensor:
        graph = graph_for(self.graph, y)
        log_P = log_cells(y, graph)
        return graph.contrasts(self.scores(log_P, graph)).to(y.dtype)

    def log_abs_det_jacobian(
        self,
        x: Tensor,  # (*lead, n, m)
        y: Tensor,  # (*lead, n, m)
    ) -> Tensor:  # (*lead,)
        """The log of the volume change, with respect to the free cells."""
        graph = graph_for(self.graph, y)
        return self.log_volume(log_cells(y, graph), graph).to(y.dtype)

    def scores(
        self,
        log_P: Tensor,  # (*lead, N, M) float64
        graph: MatchingGraph,
    ) -> Tensor:  # (*lead, n, m) float64
        """Scores, up to row and column shifts, of which P is the image."""
        return self._tau(log_P)[..., None, None] * relative(log_P, graph)

    def log_volume(
        self,
        log_P: Tensor,  # (*lead, N, M) float64
        graph: MatchingGraph,
    ) -> Tensor:  # (*lead,) float64
        """The same from log P, in its precision."""
        finite = torch.where(graph.cells, log_P, 0)
        total = finite.sum((-2, -1))
        if graph.has_slack:
            total = total - finite[..., -1, -1]  # the wire is no cell
        scale = graph.dim * self._tau(log_P).log()
        return total - log_spanning_trees(log_P, graph) - scale

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of P for a shape of Z: batches of masks and temperatures broadcast."""
        tau = torch.as_tensor(self.temperature).shape
        return _broadcast(shape, self.graph, tau)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of Z for a shape of P."""
        return self.forward_shape(shape)

    def _tau(self, like: Tensor) -> Tensor:
        return torch.as_tensor(
            self.temperature, dtype=torch.float64, device=like.device
        )


def as_temperature(
    temperature: float | Tensor,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Tensor:
    """Return a temperature as a tensor, or say that it is none."""
    try:
        return torch.as_tensor(temperature, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            "temperature must be a number or a tensor, got "
            f"{type(temperature).__name__}."
        ) from None


def _check_temperature(temperature: Tensor) -> None:
    if not holds((temperature > 0) & (temperature < torch.inf)):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature.tolist()}. For "
            "the limit of zero, the hard matching, use matching(logits) or the "
            "distribution's mode."
        )


def log_cells(
    P: Tensor,  # (*lead, n, m)
    graph: MatchingGraph,
) -> Tensor:  # (*lead, N, M) float64
    """:func:`log_of` with the logs of the slack beside it, where there is some."""
    log_P, lost = log_with_slack(P, graph)
    warn_if_lost(lost)
    return log_P


def relative(log_P: Tensor, graph: MatchingGraph) -> Tensor:
    """Log P on pairs, less the slack of their rows and columns; zero elsewhere.

    Zero in place of -inf before any product or difference: those would be NaN.
    """
    finite = torch.where(graph.cells, log_P, 0)
    if not graph.has_slack:
        return finite
    pairs = finite[..., :-1, :-1] - finite[..., :-1, -1:] - finite[..., -1:, :-1]
    return torch.where(graph.support, pairs, 0)


def with_log(log_P: Tensor, graph: MatchingGraph, dtype: torch.dtype) -> Tensor:
    """P from its log, which it carries."""
    n, m = graph.shape
    return carry_log(log_P[..., :n, :m].exp().to(dtype), log_P)


def graph_for(graph: MatchingGraph | None, value: Tensor) -> MatchingGraph:
    """The graph of a mask, or that of the shape of a value."""
    return matching_graph(graph, (value.shape[-2], value.shape[-1]), value.device)


def _broadcast(
    shape: torch.Size, graph: MatchingGraph | None, *batch: torch.Size
) -> torch.Size:
    if graph is None:
        _check_matrices(shape)
    elif len(shape) < 2:
        raise ValueError(f"expected a shape (*batch, n, m), got {tuple(shape)}.")
    masks = [] if graph is None else [graph.batch_shape]
    lead = torch.broadcast_shapes(shape[:-2], *masks, *batch)
    return torch.Size(lead + shape[-2:])


def _check_matrices(shape: torch.Size) -> None:
    if len(shape) < 2 or shape[-1] < shape[-2]:
        raise ValueError(
            "expected a shape (*batch, n, m) with no more rows than columns, got "
            f"{tuple(shape)}. With more rows, pass a mask that says what may stay "
            "unmatched."
        )


def _bijection_for(constraint: Any) -> ComposeTransform:
    birkhoff = BirkhoffTransform(1.0, constraint.graph)
    return ComposeTransform([ContrastsTransform(constraint.graph), birkhoff])


def _sinkhorn_for(constraint: Any) -> SinkhornTransform:
    return SinkhornTransform(constraint.graph)


def _no_transform_for(constraint: Any) -> Transform:
    # A NotImplementedError would be replaced by Pyro's advice on small discrete sites.
    raise ValueError(
        "permutation matrices are discrete: there is no transform to them from real "
        "numbers, which an autoguide, HMC or NUTS needs. With GibbsMatching or "
        "UniformPermutation as the prior relax the model, relax(model, temperature); "
        "or keep it discrete, with MCMC(InformedSwaps(model)), or with DiscreteKL_ELBO "
        "and a GumbelSinkhorn guide. Up to 8 items can be enumerated: an autoguide of "
        "the other sites, AutoNormal(poutine.block(model, hide=[name])), with "
        "TraceEnum_ELBO on config_enumerate(model); NUTS(model) does it by itself."
    )


biject_to.register(doubly_stochastic, _bijection_for)
transform_to.register(doubly_stochastic, _sinkhorn_for)
biject_to.register(permutation_matrix, _no_transform_for)
transform_to.register(permutation_matrix, _no_transform_for)
