# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Numerical integration over the column shifts of one connected component."""

from __future__ import annotations

__all__ = [
    "RIDGE",
    "column_coupling",
    "cubature",
    "gauss_hermite",
    "importance",
    "raised_factor",
]

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial.hermite import hermgauss
from numpy.typing import NDArray
from scipy.special import gammaincinv, ndtri
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph

Array = NDArray[np.float64]

# Points of each round of sampling: in thin components, and in 2 and 3 dimensions.
_POINTS = 4096
_FEW_POINTS = 2048
# Quadrature is believed if two rules agree to the first, and with the sampled value,
# whose own error is below .005, to the second: rules can agree by accident.
_AGREEMENT = 1e-3
_SAMPLED_AGREEMENT = 0.01
# What the error of sampling did not see at 3 and 4 rows, where it missed most
# (benchmarks/density.py, fifth part).
_SAMPLED_FLOOR = 0.006
# Points times rows that are handled in one go: 32 MiB a tensor.
_CHUNK = 2**22
# See raised_factor.
RIDGE = 1e-4
# Row sums below this are read as this, where column shifts differ by over 345 nats: the
# integrand is then too small, never too large. Its square is still a float64.
_SMALLEST_SUM = 1e-150


def cubature(
    log_q: Tensor,  # (*batch, n, n)
    graph: MatchingGraph,
    *,
    samples: int = 0,
) -> tuple[Tensor, Tensor]:  # (*batch,), (*batch,)
    r"""Log of the integral over shifts of a connected component, and its error.

    The row shifts are integrated exactly, each a Gamma integral; what is left is

    .. math:: \sum_E \log Q + \sum_i [\log \Gamma(r_i) - r_i \log r_i]
        + \log \int e^{F(b)} \, db.

    In two and three dimensions that is :func:`gauss_hermite` with 16 nodes where 12
    nodes give the same within .001 and :func:`importance` within .01, and it blends
    smoothly into the latter where they do not; in more it is :func:`importance`.

    Args:
        log_q: Log of the scaling Q to row sums r and column sums c, the counts of
            cells; entries outside the support are ignored.
        graph: One component per batch element; its batch broadcasts.
        samples: Points of each round of sampling; 0 is 4096 (2048 in two and three
            dimensions). Fewer than 2048 are not used: they would be worse than none.
    """
    size, batch = int(log_q.shape[-1]), log_q.shape[:-2]
    rows, columns = graph.row_counts.double(), graph.column_counts.double()
    start = torch.where(graph.support, log_q, 0.0).sum((-2, -1))
    start = start + (torch.lgamma(rows) - rows * rows.log()).sum(-1)
    log_q = torch.where(graph.support, log_q, -torch.inf)
    q = (log_q - rows.log()[..., None]).exp().reshape(-1, size, size)
    rows, columns = (x.expand(*batch, size).reshape(-1, size) for x in (rows, columns))
    fewest = _FEW_POINTS if size <= 4 or samples else _POINTS
    points = max(samples, fewest)
    step = max(1, _CHUNK // (points * size))
    pieces = [
        _blend(q[k : k + step], rows[k : k + step], columns[k : k + step], points)
        for k in range(0, max(1, int(q.shape[0])), step)
    ]
    value, error = (torch.cat(x).reshape(batch) for x in zip(*pieces, strict=True))
    return start + value, error


def gauss_hermite(
    q: Tensor,  # (*batch, n, n)
    rows: Tensor,  # (*batch, n)
    columns: Tensor,  # (*batch, n)
    *,
    nodes: int,
) -> Tensor:  # (*batch,)
    r"""Log of the integral of exp(F) by a product rule about the mode.

    .. math:: F(b) = \sum_j c_j b_j - \sum_i r_i \log \sum_j q_{ij} e^{b_j}

    over all b but the last, which is zero; F and its gradient vanish at b = 0. The
    rule substitutes :math:`b = \sqrt 2 R t` with :math:`R R^\top` the inverse Hessian.

    Args:
        q: Rows that sum to one, zero outside the component's cells.
        rows: Counts r of cells per row.
        columns: Counts c of cells per column; ``columns = rows @ q``.
        nodes: Nodes per dimension; the rule has ``nodes ** (n - 1)``.
    """
    factor = raised_factor(column_coupling(q, rows), columns)
    t, log_weights = _tensors(_hermite(nodes, int(q.shape[-1]) - 1), q.device)
    b = torch.linalg.solve_triangular(factor.mT, math.sqrt(2) * t.mT, upper=True).mT
    log_volume = -factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    exponent = _exponent(b, q, rows, columns) + log_weights
    return torch.logsumexp(exponent, -1) + log_volume


def importance(
    q: Tensor,  # (*batch, n, n)
    rows: Tensor,  # (*batch, n)
    columns: Tensor,  # (*batch, n)
    *,
    points: int,
) -> tuple[Tensor, Tensor]:  # (*batch,), (*batch,)
    """Log of the same integral by importance sampling in two rounds, and its error.

    The points are Sobol points, shifted at random but always the same, so that the
    value is deterministic and smooth. They are sent through a t distribution: in the
    first round about the mode with the inverse Hessian as covariance, in the second
    with the mean and covariance that the weights of the first have found.

    Args:
        q: As for :func:`gauss_hermite`.
        rows: As there.
        columns: As there.
        points: Number of points of each round, best a power of two.

    Returns:
        The value, and twice the standard error of independent points (Sobol points
        do better) plus the difference between the rounds.
    """
    size = int(q.shape[-1]) - 1
    start = torch.cholesky_inverse(raised_factor(column_coupling(q, rows), columns))
    factor = torch.linalg.cholesky(1.5 * start)
    mean = q.new_zeros((*q.shape[:-2], 1, size))
    values = []
    for stage in range(2):
        x, log_density = _tensors(_student(size, points, stage), q.device)
        b = mean + x @ factor.mT
        log_volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_ratio = _exponent(b, q, rows, columns) - log_density
        total = torch.logsumexp(log_ratio, -1)
        values.append(total + log_volume - math.log(points))
        weights = (log_ratio - total[..., None]).exp()
        concentration = weights.square().sum(-1)
        if stage == 1:
            break
        mean = weights[..., None, :] @ b
        away = b - mean
        found = away.mT @ (weights[..., None] * away)
        # A covariance of d dimensions from N points costs d^2 / 4 N nats: where the
        # points are too few for that, it stays near the one of the first round.
        trust = 1 / (1 + size**2 / 4 * concentration)
        trust = trust[..., None, None]
        factor = torch.linalg.cholesky(1.3 * (trust * found + (1 - trust) * start))
    standard_error = (concentration - 1 / points).clamp_min(0).sqrt()
    return values[1], (2 * standard_error + (values[1] - values[0]).abs()).detach()


def column_coupling(
    q: Tensor,  # (*batch, n, n)
    rows: Tensor,  # (*batch, n)
) -> Tensor:  # (*batch, n, n)
    """N = q' diag(r) q: minus the Hessian of F at the mode is diag(columns) - N."""
    return q.mT @ (rows[..., None] * q)


def raised_factor(
    coupling: Tensor,  # (*batch, n, n)
    columns: Tensor,  # (*batch, n)
) -> Tensor:  # (*batch, n - 1, n - 1)
    """Cholesky factor of minus the Hessian, slightly raised, without the last column.

    All pairs of columns are coupled by 1e-4 c_j c_k / sum(c) more, so that no
    direction is wider than 100 nats over the root of the count. Where the integrand is
    flat, the walls of exp(F), which fall exponentially, are closer than the curvature
    says. The diagonal is added up from the other entries: nothing cancels.
    """
    more = columns[..., :, None] * columns[..., None, :]
    total = columns.sum(-1)[..., None, None]
    coupling = coupling + RIDGE * more / total
    coupling = coupling - torch.diag_embed(coupling.diagonal(dim1=-2, dim2=-1))
    laplacian = torch.diag_embed(coupling.sum(-1)) - coupling
    factor: Tensor = torch.linalg.cholesky_ex(laplacian[..., :-1, :-1])[0]
    return factor


def _blend(
    q: Tensor, rows: Tensor, columns: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    """Importance sampling, or quadrature in its place where that can be believed."""
    sampled, error = importance(q, rows, columns, points=points)
    if q.shape[-1] > 4:
        return sampled, error
    coarse = gauss_hermite(q, rows, columns, nodes=12)
    fine = gauss_hermite(q, rows, columns, nodes=16)
    # A smooth switch, so that the value stays differentiable.
    ratio = ((fine - coarse) / _AGREEMENT).square()
    ratio = ratio + ((fine - sampled) / _SAMPLED_AGREEMENT).square()
    trust = 1 / (1 + ratio.clamp_max(1e6) ** 4)
    value = trust * fine + (1 - trust) * sampled
    # Far from the mode the finer rule was off by up to four times what they differ.
    doubt = 4 * (fine - coarse).abs() + (fine - sampled).square() / _SAMPLED_AGREEMENT
    error = error + _SAMPLED_FLOOR
    return value, (trust * doubt + (1 - trust) * error).detach()


def _exponent(b: Tensor, q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """F at points b (*batch, N, n - 1), the last column shift zero."""
    b = torch.nn.functional.pad(b, (0, 1))
    # F does not depend on the shift, and so neither does its gradient.
    shift = b.detach().amax(-1, keepdim=True)
    sums = ((b - shift).exp() @ q.mT).clamp_min(_SMALLEST_SUM)
    linear = ((b - shift) @ columns[..., None])[..., 0]
    return linear - (sums.log() @ rows[..., None])[..., 0]


def _tensors(arrays: tuple[Array, Array], device: torch.device) -> list[Tensor]:
    # Arrays are kept, not tensors: those remember the mode in which they were made.
    return [torch.from_numpy(x).to(device) for x in arrays]


@lru_cache(maxsize=16)
def _hermite(nodes: int, size: int) -> tuple[Array, Array]:
    """Product nodes (N, size), and log weights without the Gaussian factor."""
    t, w = hermgauss(nodes)
    grid = np.stack(np.meshgrid(*[t] * size, indexing="ij"), -1).reshape(-1, size)
    log_w = np.stack(np.meshgrid(*[np.log(w)] * size, indexing="ij"), -1)
    log_weights = log_w.reshape(-1, size).sum(-1) + (grid**2).sum(-1)
    log_weights += size / 2 * math.log(2)
    return grid, log_weights


@lru_cache(maxsize=16)
def _student(size: int, points: int, stage: int) -> tuple[Array, Array]:
    """Points of a t distribution of unit covariance, and their log density."""
    freedom = 5.0 + size
    # Importing scipy.stats takes a second, which not every user of a mask needs.
    from scipy.stats import qmc

    sobol = qmc.Sobol(size + 1, scramble=False, bits=30)
    u = sobol.random_base2(math.ceil(math.log2(points)))[:points]
    u = (u + np.random.default_rng(stage).random(size + 1)) % 1
    u = u.clip(1e-10, 1 - 1e-10)
    scale = 2 * gammaincinv(freedom / 2, u[:, -1:]) / (freedom - 2)
    x = ndtri(u[:, :-1]) / np.sqrt(scale)
    log_density = (
        math.lgamma((freedom + size) / 2)
        - math.lgamma(freedom / 2)
        - size / 2 * math.log((freedom - 2) * math.pi)
        - (freedom + size) / 2 * np.log1p((x**2).sum(-1) / (freedom - 2))
    )
    return x, log_density
