# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The fractional entropy of one row at its maximum, and its curvature there."""

from __future__ import annotations

__all__ = ["Rows", "curvature", "solve_rows"]

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Log odds of the largest entry are found to this, relative; in at most so many steps.
_PRECISION = 1e-14
_MOST_STEPS = 60


class Rows(NamedTuple):
    """Rows at their maximum; each sums to one with its slack."""

    log_b: Tensor  # (b, s, t), of pairs; -inf where forbidden
    log_slack: Tensor  # (b, s)
    odds: Tensor  # (b, s), log p - log(1 - p) of the largest entry p of pairs
    largest: Tensor  # (b, s, t) bool, which that is
    value: Tensor  # (b, s)


def solve_rows(
    y: Tensor,  # (b, s, t), -inf where forbidden
    a: Tensor,  # (b, s), -inf where there is no slack
    gamma: Tensor,  # (b, 1), from 0 to 1
    odds: Tensor | None,  # (b, s), to start from
) -> Rows:
    r"""Maximise a row's score and fractional entropy over the simplex.

    .. math:: \sum_j (y_j b_j - b_j \log b_j + \gamma (1 - b_j) \log (1 - b_j))
        + a r - r \log r

    It is concave there (Vontobel, 2013, for gamma = 1; less gamma adds entropy). At the
    maximum phi(b_j) = log b_j + gamma log(1 - b_j) is y_j up to a constant. Phi rises
    to its largest value at b = 1 / (1 + gamma) and falls from there, where only the
    largest entry, that of the largest y, can be. So its log odds are the unknown, and
    the others follow on the rising branch; of one minus it, only the log is used.
    """
    top, k = y.max(-1)
    largest = torch.zeros_like(y, dtype=torch.bool).scatter_(-1, k[..., None], True)
    gap = torch.where(largest, -torch.inf, y - top[..., None])
    gap_slack = a - top
    total = torch.logaddexp(gap.logsumexp(-1), gap_slack)
    if odds is None:
        odds = torch.where(total > 0, -total, -total / (1 - gamma).clamp_min(1e-3))
    low, high = torch.full_like(odds, -torch.inf), torch.full_like(odds, torch.inf)
    for _ in range(_MOST_STEPS):
        log_p, log_q = -softplus(-odds), -softplus(odds)
        phi = log_p + gamma * log_q
        log_b = _inverse(gap + phi[..., None], gamma[..., None])
        log_slack = gap_slack + phi + gamma
        rest = torch.logaddexp(log_b.logsumexp(-1), log_slack)
        h = rest - log_q
        p, q = log_p.exp(), log_q.exp()
        growth = (log_b - rest[..., None]).exp() * _growth(log_b, gamma[..., None])
        mean = growth.sum(-1) + (log_slack - rest).exp()
        slope = mean * (q - gamma * p) + p
        low = torch.where(h < 0, torch.maximum(low, odds), low)
        high = torch.where(h > 0, torch.minimum(high, odds), high)
        done = h.abs() <= _PRECISION * (1 + odds.abs())
        if bool(done.all()):
            break
        step = torch.where(slope > 1e-3, h / slope, h.sign() * (1 + odds.abs()))
        new = odds - step
        middle = (low + high) / 2
        new = torch.where((new > low) & (new < high) | ~middle.isfinite(), new, middle)
        odds = torch.where(done, odds, new)
    log_b = torch.where(largest, log_p[..., None], log_b)
    b, slack = log_b.exp(), log_slack.exp()
    log_left = torch.where(largest, log_q[..., None], torch.log1p(-b))
    left = torch.where(largest, q[..., None], 1 - b)
    inside = y > -torch.inf
    terms = (
        b * (torch.where(inside, y - log_b, 0.0)) + gamma[..., None] * left * log_left
    )
    value = torch.where(inside, terms, 0.0).sum(-1)
    alone = torch.where(a > -torch.inf, slack * (a - log_slack), 0.0)
    return Rows(log_b, log_slack, odds, largest, value + alone)


def _inverse(z: Tensor, gamma: Tensor) -> Tensor:
    """The log of b with log b + gamma log(1 - b) = z, on the rising branch."""
    # At the maximum no entry but the largest exceeds a half.
    top = (-torch.log1p(gamma)).clamp_max(-0.1)
    most = top + gamma * torch.log1p(-top.exp())
    known = z > -torch.inf
    z = torch.minimum(torch.where(known, z, 0.0), most)
    # Near the top a parabola, far from it z itself is close, and from below.
    near = top - (2 * (most - z) * gamma / (1 + gamma)).sqrt()
    log_b = torch.where((most - z < 0.7) & (gamma > 0.5), near, torch.minimum(z, top))
    for _ in range(12):
        b = log_b.exp()
        f = log_b + gamma * torch.log1p(-b) - z
        slope = ((1 - (1 + gamma) * b) / (1 - b)).clamp_min(1e-8)
        step = f / slope
        log_b = torch.minimum(log_b - step, top)
        if bool((step.abs() <= 1e-15 * (1 + log_b.abs())).all()):
            break
    return torch.where(known, log_b, -torch.inf)


def _growth(log_b: Tensor, gamma: Tensor) -> Tensor:
    """How log b grows with phi(b) on the rising branch."""
    b = log_b.exp()
    return (1 - b) / (1 - (1 + gamma) * b).clamp_min(1e-12)


class Curvature(NamedTuple):
    r"""The derivative of each row with respect to its y, in factors.

    .. math:: H = \text{diag}(d) - \alpha u u^\top - \beta (u k^\top + k u^\top)
    """

    diagonal: Tensor  # (b, s, t)
    u: Tensor  # (b, s, t)
    alpha: Tensor  # (b, s)
    beta: Tensor  # (b, s)
    k: Tensor  # (b, s, t)

    def times(self, x: Tensor) -> Tensor:
        """H x for each row."""
        ux, kx = (self.u * x).sum(-1, keepdim=True), (self.k * x).sum(-1, keepdim=True)
        alpha, beta = self.alpha[..., None], self.beta[..., None]
        return (
            self.diagonal * x - (alpha * ux + beta * kx) * self.u - beta * ux * self.k
        )

    def total(self) -> Tensor:  # (b, t, t)
        """The sum over rows."""
        cross = (self.beta[..., None] * self.u).mT @ self.k
        square = (self.alpha[..., None] * self.u).mT @ self.u
        return torch.diag_embed(self.diagonal.sum(-2)) - square - cross - cross.mT


def curvature(rows: Rows, gamma: Tensor) -> Curvature:
    r"""How rows change with their scores: the inverse of minus the Hessian.

    With e_j = b_j (1 - b_j) / (1 - (1 + gamma) b_j) the inverse diagonal of minus the
    Hessian it is diag(e) - e e^T / sum(e), on the simplex. That of the largest entry
    may be infinite or negative; its inverse, A / (1 - p), takes its place.
    """
    log_p, log_q = -softplus(-rows.odds), -softplus(rows.odds)
    p, q = log_p.exp(), log_q.exp()
    log_b = torch.where(rows.largest, -torch.inf, rows.log_b)
    share = (log_b - log_q[..., None]).exp()
    share = share * _growth(log_b, gamma[..., None])
    mean = share.sum(-1) + (rows.log_slack - log_q).exp()
    A = (q - gamma * p) / p
    beta = 1 / (1 + A * mean).clamp_min(1e-12)
    k = rows.largest.to(share.dtype)
    q = q[..., None]
    diagonal = q * (share + (beta * mean)[..., None] * k)
    return Curvature(diagonal, share, q[..., 0] * A * beta, q[..., 0] * beta, k)
