# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The integral over row and column shifts: the density of Gumbel contrasts."""

from __future__ import annotations

__all__ = ["log_shift_integral"]

import torch
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.matching_parts import flattened, parts, take
from pyro_permutations.shift_integral_cubature import cubature
from pyro_permutations.shift_integral_series import laplace_series
from pyro_permutations.sinkhorn import log_scaling

# Where the series fails, in thin components, those of at most so many rows are sampled.
# In more dimensions points are too few.
_MOST_ROWS = 32


def log_shift_integral(
    scores: Tensor,  # (*lead, n, m)
    graph: MatchingGraph,
    *,
    samples: int = 0,
) -> tuple[Tensor, Tensor]:  # (*lead,), (*lead,)
    r"""Log density of the contrasts of Gumbel noise, and an estimate of its error.

    .. math::
        \log \int \prod_{(i,j) \in E} g(M_{ij} - u_i - v_j) \, du \, dv,
        \qquad g(x) = e^{x - e^x}

    over all row shifts u and over all column shifts v but one per connected component
    of E; rows and columns that may stay unmatched have none. With M = X - Z this is
    the log density, at the contrasts Z, of the contrasts of X + standard Gumbel noise.
    Adding a constant to a row or a column of M that has a shift changes nothing. Every
    connected component is integrated by itself:

    ==================== ============================================ =============
    rows                 method                                       error (nats)
    ==================== ============================================ =============
    with slack           closed form: what may stay unmatched has no  1e-13
                         shift, other shifts are Gamma integrals
    1                    the integral is one                          none
    2                    closed form                                  1e-13
    3, 4                 Gauss-Hermite; importance sampling where     1e-4
                         that cannot be believed
    5 and more           Laplace with second order                    .006 at n = 5,
                                                                      .002 at n >= 10
    5 to 32, thin        importance sampling                          .01
    ==================== ============================================ =============

    A component is thin if a row or column of it has fewer than four cells; one of more
    than 32 rows has the series all the same. The errors are the worst of 50 to 2000
    draws of the distribution itself, for which exp(M) is, up to shifts, a matrix of
    independent standard exponentials. A flat prior at a draw of a guide with logits of
    variance 25 is another matter: there the series is off by .07 at n = 5 and by .01
    at n = 20 in the mean, by nats at sharper ones. The estimate of the error says so
    (``benchmarks/density.py`` counts how often), and ``samples`` buys a better value.

    Args:
        scores: M in float64, ``(*lead, n, m)``; entries outside the support of the
            graph are ignored.
        graph: What a mask allows; its batch broadcasts against the last dimensions of
            ``lead``.
        samples: If positive, importance sampling with so many points, at least 2048,
            in each of two rounds replaces the series. With 4096 points a flat prior at
            draws of guides with logits of variance 1 to 25 is right to .007 (n = 3 to
            20, worst of 20), of variance 100 to .08.

    Returns:
        The logarithm, deterministic and twice differentiable in the scores, and the
        estimate of its error, which carries no gradient.

    Example:
        >>> from pyro_permutations import matching_graph
        >>> graph = matching_graph(None, (2, 2))
        >>> scores = torch.zeros(2, 2, dtype=torch.float64)
        >>> value, _ = log_shift_integral(scores, graph)  # two logistics sum to zero
        >>> round(float(value.exp()), 6)
        0.166667
    """
    n = graph.shape[-1]
    lead = torch.broadcast_shapes(scores.shape[:-2], graph.batch_shape)
    scores = torch.where(graph.support, scores.double(), 0.0)
    scores = scores.expand(*lead, *graph.shape)
    if graph.is_full and n > 1:
        log_q = _scaled(scores, graph) if n > 2 else scores
        return _component(scores, log_q, graph, False, samples)
    flat, graph = flattened(lead, graph)
    scores = scores.reshape(*flat, *graph.shape)
    value = scores[..., 0, 0] * 0  # what decided cells give: nothing, nor a gradient
    error = torch.zeros_like(value).detach()
    pieces = take(graph.with_slack(scores, 0.0), graph)
    for part, inside in zip(parts(graph), pieces, strict=True):
        if part.graph.has_slack:
            v = _beside_slack(inside[..., :-1, :-1], part.graph)
            value = value.index_add(1, part.element, v)
            continue
        log_q = _scaled(inside, part.graph) if part.rows.shape[-1] > 2 else inside
        v, e = _component(inside, log_q, part.graph, part.thin, samples)
        value = value.index_add(1, part.element, v)
        error = error.index_add(1, part.element, e)
    return value.reshape(lead), error.reshape(lead)


def _scaled(scores: Tensor, graph: MatchingGraph) -> Tensor:
    """Scores shifted to rows and columns whose mean is one; the integral's mode."""
    counts = graph.row_counts.double(), graph.column_counts.double()
    return log_scaling(scores, graph, counts)


def _beside_slack(
    scores: Tensor,  # (*batch, s, t)
    graph: MatchingGraph,  # one component with slack per element
) -> Tensor:  # (*batch,)
    """The same for a component with slack, whose scores are fixed: exact.

    A row or column with slack has no shift to integrate over. The shift of another one
    meets only such, and is a Gamma integral.
    """
    rows, columns = (x.double() for x in graph.slack_cells())
    support = graph.support.double()
    open_rows = support * (1 - rows)[..., :, None]
    open_columns = support * (1 - columns)[..., None, :]
    if bool((open_rows * open_columns).any()):
        raise NotImplementedError(
            "the density is not known where a row and a column that both have to be "
            "matched are a pair of a component in which others may stay unmatched. "
            "Give one of them a finite score for that, well below those of its pairs."
        )
    # Of a density below exp(-exp(600)) no more need be known.
    fixed = support * rows[..., :, None] * columns[..., None, :]
    value = (fixed * (scores - scores.clamp_max(600.0).exp())).sum((-2, -1))
    return value + _gamma(scores, open_rows) + _gamma(scores.mT, open_columns.mT)


def _gamma(scores: Tensor, cells: Tensor) -> Tensor:
    """Integrals over the shifts of rows, on cells (*batch, s, t) of zeros and ones."""
    count = cells.sum(-1)
    masked = torch.where(cells > 0, scores, -torch.inf)
    masked = torch.where(count[..., None] > 0, masked, 0.0)
    each = torch.lgamma(count.clamp_min(1)) - count * torch.logsumexp(masked, -1)
    return ((cells * scores).sum(-1) + each).sum(-1)


def _component(
    scores: Tensor, log_q: Tensor, graph: MatchingGraph, thin: bool, samples: int
) -> tuple[Tensor, Tensor]:
    """Value and error of connected components (*batch, s, s), s >= 2."""
    size = log_q.shape[-1]
    if size == 2:
        value = _log_two_logistics(
            scores[..., 0, 0]
            - scores[..., 0, 1]
            - scores[..., 1, 0]
            + scores[..., 1, 1]
        )
        return value, torch.zeros_like(value).detach()
    if size <= 4 or samples or (thin and size <= _MOST_ROWS):
        return cubature(log_q, graph, samples=samples)
    value, error = laplace_series(log_q, graph)
    # What the estimate did not see where it missed most: three times its size, up to
    # .06 (benchmarks/density.py, fifth part).
    return value, error + 0.06 * error / (error + 0.02)


# The density of a sum of two logistic variables, as a series in the square.
_SERIES = (
    1 / 6,
    -1 / 60,
    1 / 1008,
    -1 / 21600,
    1 / 532224,
    -691 / 9906624000,
    1 / 410572800,
    -3617 / 44460928512000,
)


def _log_two_logistics(z: Tensor) -> Tensor:
    r"""Log density at z of the sum of two standard logistic variables.

    .. math:: f(z) = \frac{(z - 2) + (z + 2) e^{-z}}{e^z (1 - e^{-z})^3}, \quad z > 0

    Numerator and denominator vanish together at zero; below 1/2 the Taylor series is
    used, right to 1e-16.
    """
    z = z.abs()
    small = z < 0.5
    square = torch.where(small, z, 0.0).square()
    series = torch.zeros_like(square)
    for coefficient in reversed(_SERIES):
        series = series * square + coefficient
    safe = torch.where(small, 1.0, z)
    decay = (-safe).exp()
    far = (safe - 2 + (safe + 2) * decay).log() - safe - 3 * torch.log1p(-decay)
    return torch.where(small, series.log(), far)
