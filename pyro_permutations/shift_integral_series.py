# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace's method with its second-order correction for the integral over shifts."""

from __future__ import annotations

__all__ = ["laplace_series", "second_order"]

import math

import torch
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.shift_integral_cubature import (
    RIDGE,
    column_coupling,
    raised_factor,
)
from pyro_permutations.spanning_trees import log_spanning_trees

# Far from any draw the correction is nothing but large. It is cut where its powers
# would overflow.
_LARGEST = 1e15


def laplace_series(
    log_q: Tensor,  # (*batch, n, n)
    graph: MatchingGraph,
) -> tuple[Tensor, Tensor]:  # (*batch,), (*batch,)
    r"""Log of the integral over shifts of a connected component, and its error.

    .. math::
        \sum_E \log Q + \sum_i [\log \Gamma(r_i) - r_i \log r_i]
        + \tfrac{n - 1}{2} \log 2 \pi
        - \tfrac12 [\log T(Q) - \sum_i \log r_i] + \text{correction}

    Q has row sums r and column sums c, the counts of cells. At own draws of the
    distribution the second-order term is close to :math:`s = \sum_j 1 / (12 c_j)`,
    Stirling's, as if every column were a Gamma integral. Its distance d to that says
    how far the expansion can be trusted: it is below .06 in a 5 x 5 square and below
    .02 in larger ones, and in sparse components of 250 rows. At sharper points d is
    large and negative, while the sum of all orders grows like its logarithm, so that

    .. math:: \text{correction} = s - \tfrac{k}{2} \log(1 - 2 d / k),
        \qquad k = \sqrt{12 s},

    equal to s + d to first order, with k = 1 for a full square; for d > 0 it is
    :math:`s + \tfrac{k}{2} \log(1 + 2 d / k + 4 d^2 / k^2)`, which has the same two
    derivatives at 0. Against the bare second order, which explodes there, or none,
    this leaves a quarter of the error at points whose logits have variance 25: .07 in
    a 5 x 5 square, .01 in a 20 x 20 one (mean; the estimate of the error covers it).
    Directions that are flatter than any draw makes them are counted as no wider than
    :func:`raised_factor` has them.

    Args:
        log_q: Log of Q; entries outside the support are ignored.
        graph: One component per batch element; its batch broadcasts.
    """
    rows, columns = graph.row_counts.double(), graph.column_counts.double()
    size = log_q.shape[-1]
    start = torch.where(graph.support, log_q, 0.0).sum((-2, -1))
    start = start + (torch.lgamma(rows) - rows * rows.log()).sum(-1)
    log_det = log_spanning_trees(log_q, graph) - rows.log().sum(-1)
    log_q = torch.where(graph.support, log_q, -torch.inf)
    q = (log_q - rows.log()[..., None]).exp()
    coupling = column_coupling(q, rows)
    factor = raised_factor(coupling, columns)
    raised = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # Below .03 at own draws, where its square does no harm.
    flat = (raised - log_det).clamp_min(0)
    flat = flat.square() / (1 + flat)
    laplace = start + (size - 1) / 2 * math.log(2 * math.pi) - (log_det + flat) / 2
    covariance = torch.cholesky_inverse(factor)
    skew, rest = second_order(q, rows, columns, coupling, covariance)
    stirling = (1 / columns).sum(-1) / 12
    scale = (12 * stirling).sqrt()
    d = (skew + rest - stirling) / scale
    # The two terms can cancel where both are large, so the error counts them apart.
    spread = ((rest - stirling).abs() + skew).clamp_max(_LARGEST) / scale
    spread = scale / 2 * torch.log1p(2 * spread)
    error = 3 * spread.square() / (1 + spread / 4) + flat / 2
    return laplace + stirling + scale * _tempered(d), error.detach()


def second_order(
    q: Tensor,  # (*batch, n, n)
    rows: Tensor,  # (*batch, n)
    columns: Tensor,  # (*batch, n)
    coupling: Tensor,  # (*batch, n, n)
    covariance: Tensor,  # (*batch, n - 1, n - 1)
) -> tuple[Tensor, Tensor]:  # (*batch,), (*batch,)
    r"""The second-order correction to the log of Laplace's approximation.

    With :math:`x_{ij} = e_j - q_i`, S the inverse Hessian, :math:`K_{ij,kl} =
    x_{ij}^\top S x_{kl}` and expectations over cells of a row drawn from q:

    .. math::
        \tfrac18 g^\top S g, \quad g = \sum_i r_i E[K_{ij,ij} x_{ij}]

        \tfrac1{12} \sum_{i,k} r_i r_k E[K_{ij,kl}^3]
        - \tfrac18 \sum_i r_i (\operatorname{Var}[K_{ij,ij}] - 2 E[K_{ij,il}^2])

    Args:
        q: Rows that sum to one, zero outside the component's cells.
        rows: Counts r of cells per row.
        columns: Counts c of cells per column; ``columns = rows @ q``.
        coupling: N = q' diag(r) q.
        covariance: S without its last row and column, which are zero; the inverse of
            what :func:`raised_factor` factors.

    Returns:
        The first line, which is positive, and the second.
    """
    s = torch.nn.functional.pad(covariance, (0, 1, 0, 1))
    # K does not see a + b' added to S. Centring S by w = c / sum(c) keeps its entries
    # as small as K's, and then S H = 1 - 1 w' for the raised Hessian H, that is,
    #     S N = f S diag(c) - 1 + 1 w',   f = 1 + ridge,
    # so that products with N are free.
    total = columns.sum(-1, keepdim=True)
    w = columns / total
    mean = s @ w[..., None]
    s = s - mean - mean.mT + w[..., None, :] @ mean
    a = q @ s
    b = a @ q.mT
    # K_ij,kl = S_jl - A_kj - A_il + B_ik. In the sum of its cubes no product runs over
    # more than two indices: with U = q S^2 and N S as above, S^2 A gives r A U c,
    # S^2 B gives r U (q S N), A^2 B gives r A^2 (q S N) and S A A' gives S * N S * S N.
    f = 1 + RIDGE
    s2, a2 = s.square(), a.square()
    s_own = s.diagonal(dim1=-2, dim2=-1)
    b_own = (a * q).sum(-1)
    c_s3_c = _form(s2 * s, columns, columns)
    c_s2_w = _form(s2, columns, w)
    s2_n = (s2 * coupling).sum((-2, -1))
    a_u = f * c_s3_c - (columns * s_own.square()).sum(-1) + c_s2_w
    r_a3_c = _form(a2 * a, rows, columns)
    r_a2_q = _form(a2 * q, rows, torch.ones_like(columns))
    r_a2_w = _form(a2, rows, w)
    n_s = f * columns[..., None] * s - torch.diag_embed(torch.ones_like(w))
    n_s = n_s + w[..., None]
    cubes = (
        c_s3_c
        - 6 * a_u
        + 3 * (f * a_u - s2_n + c_s2_w)
        + 4 * r_a3_c
        - 12 * (f * r_a3_c - r_a2_q + r_a2_w)
        + 6 * (s * n_s * n_s.mT).sum((-2, -1))
        + 4 * _form(b * b.square(), rows, rows)
    )
    own = s_own[..., None, :] - 2 * a + b_own[..., None]
    own = own - (q * own).sum(-1, keepdim=True)
    g = (rows[..., None, :] @ (q * own))[..., 0, :]
    variance = _form(q * own.square(), rows, torch.ones_like(columns))
    within = s2_n - 2 * r_a2_q + (rows * b_own.square()).sum(-1)
    return _form(s, g, g) / 8, cubes / 12 - (variance - 2 * within) / 8


def _tempered(d: Tensor) -> Tensor:
    """The sum of all orders, guessed from the second; twice differentiable at zero."""
    d = d.clamp(-_LARGEST, _LARGEST)
    below, above = d.clamp_max(0), d.clamp_min(0)
    above = 0.5 * torch.log1p(2 * above + 4 * above.square())
    return torch.where(d < 0, -0.5 * torch.log1p(-2 * below), above)


def _form(matrix: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The bilinear form x' matrix y over the last dimensions."""
    return (x[..., None, :] @ matrix @ y[..., None])[..., 0, 0]
