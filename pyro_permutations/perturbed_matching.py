# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""How likely a matching is to be the best one of scores with Gumbel noise."""

from __future__ import annotations

__all__ = ["log_prob_best", "log_prob_two_items"]

import math

import numpy as np
import torch
from torch import Tensor

# Numbers in one go.
_MOST = 2**22
# An exponential of minus this much is exact by its first terms.
_SMALL = 30.0


def log_prob_two_items(
    gap: Tensor,  # (*batch,)
) -> Tensor:  # (*batch,)
    r"""Log probability that the better of two permutations by ``gap`` stays it.

    .. math:: P(\ell_1 + \ell_2 < s) = 1 - Q(s), \quad
        Q(s) = e^{-s} \frac{s - 1 + e^{-s}}{(1 - e^{-s})^2}

    The gap of the noise is the sum of two logistic numbers, whose distribution function
    is this: the integral of their density over w = e^-x is that of w / ((1 + w)^2
    (w + e^-s)), by partial fractions. Negative gaps are as likely to be overcome.
    """
    s = torch.where(gap < 0, -gap, gap)  # with a slope at zero
    near = s < 0.05
    # Q is 1/2 less the integral of the density's series about zero.
    series = 0.5 - s / 6 + s**3 / 180 - s**5 / 5040 + s**7 / 151200
    far = torch.where(near, 1.0, s)
    rest = (far + torch.expm1(-far)) / torch.expm1(-far) ** 2
    upset = torch.where(near, series, rest * (-far).exp())
    log_upset = torch.where(near, series.clamp_min(0.1).log(), rest.log() - far)
    return torch.where(gap < 0, log_upset, torch.log1p(-upset))


def log_prob_best(
    scores: Tensor,  # (b, s, t) float64
    mask: Tensor,  # (b, s, t) bool
    free: tuple[Tensor, Tensor],  # (b, s), (b, t) bool
    perm: Tensor,  # (b, s) long, -1 for unmatched
    samples: int,
) -> tuple[Tensor, Tensor]:  # (b,), (b,)
    r"""Log probability of each matching, by Monte Carlo, and its standard error.

    The matching is the best one if no cycle of exchanges gains. Given the noise of all
    other pairs, its own pairs are taken one by one: the k-th has to be worth at least
    :math:`t_k`, the longest cycle through it and pairs before it. The probability of
    that, :math:`1 - \exp(-e^{x_k - t_k})`, goes into the weight, and its noise is drawn
    from what is left. So each sample hits, and the mean weight is an unbiased estimate,
    continuous in the scores. Noise is from a generator of its own, always the same.
    """
    (b, s, t), K = scores.shape, samples
    if b == 0:
        return scores.sum((-2, -1)), scores.detach().sum((-2, -1))
    generator = np.random.default_rng(0)  # torch's do not run under torch.func.vmap
    uniform = generator.random((K, s, t + 1)).clip(1e-300, 1 - 1e-16)
    levels = torch.from_numpy(uniform).to(scores.device).log()
    noise, levels = -(-levels[..., :t]).log(), levels[..., t]
    size = max(1, _MOST // (K * (s + 1) ** 2))
    pieces = []
    for start in range(0, b, size):
        some = slice(start, start + size)
        pieces.append(
            _log_weights(
                torch.where(mask[some], scores[some], -torch.inf),
                (free[0][some], free[1][some]),
                perm[some],
                noise,
                levels,
            )
        )
    weights = torch.cat(pieces)
    log_prob = weights.logsumexp(-1) - math.log(K)
    relative = (weights - log_prob[:, None]).exp()
    return log_prob, relative.std(-1) / K**0.5


def _log_weights(
    scores: Tensor,  # (b, s, t), -inf where forbidden
    free: tuple[Tensor, Tensor],
    perm: Tensor,  # (b, s)
    noise: Tensor,  # (K, s, t)
    levels: Tensor,  # (K, s), logs of uniform numbers
) -> Tensor:  # (b, K)
    (b, s, _), K = scores.shape, len(noise)
    matched = perm >= 0
    own = scores.gather(-1, perm.clamp_min(0)[..., None])[..., 0]  # (b, s)
    gains, apart = _exchanges(scores, free, perm, noise)
    total = apart[:, None].expand(b, K)
    # Node 0 is being unmatched; the others are the rows, with their columns.
    path = scores.new_zeros(b, K, 1, 1)
    worth = scores.new_zeros(b, K, 1)
    for k in range(1, s + 1):
        there = gains[..., k, :k]  # from this row to those before it
        back = gains[..., :k, k] - worth
        into = (path + back[..., None, :]).amax(-1)
        least = (there + into).amax(-1)
        mine = torch.where(matched[:, k - 1], own[:, k - 1], 0.0)[:, None]
        # Noise below -50 does not occur.
        log_tail, drawn = _tail((least - mine).clamp_min(-50.0), levels[:, k - 1])
        total = total + log_tail
        d = mine + drawn
        out = ((there - d[..., None])[..., :, None] + path).amax(-2)
        longer = into[..., :, None] + out[..., None, :]
        top = torch.cat([torch.maximum(path, longer), into[..., :, None]], -1)
        bottom = torch.cat([out, torch.zeros_like(out[..., :1])], -1)
        path = torch.cat([top, bottom[..., None, :]], -2)
        worth = torch.cat([worth, d[..., None]], -1)
    return total


def _exchanges(
    scores: Tensor,  # (b, s, t)
    free: tuple[Tensor, Tensor],
    perm: Tensor,  # (b, s)
    noise: Tensor,  # (K, s, t)
) -> tuple[Tensor, Tensor]:  # (b, K, s + 1, s + 1), (b,)
    """What a row is worth with the column of another; and what keeps others apart.

    From node 0 to a row: who is unmatched takes its column, or nobody; from a row to
    node 0: it takes an unmatched column, or none. That no two unmatched ones gain by
    each other is independent of everything else, and has a probability of its own.
    """
    (b, s, t), K = scores.shape, len(noise)
    nothing = scores.new_full((), -torch.inf)
    matched = perm >= 0
    taken = (perm[..., None] == torch.arange(t, device=perm.device)).any(-2)  # (b, t)
    noisy = scores[:, None] + noise  # (b, K, s, t)
    column = perm.clamp_min(0)[:, None, None, :].expand(b, K, s, s)
    pairs = noisy.gather(-1, column)
    both = matched[:, None, :, None] & matched[:, None, None, :]
    both = both & ~torch.eye(s, dtype=torch.bool, device=perm.device)
    inner = torch.where(both, pairs, nothing)
    leave = torch.where(taken[:, None, None, :], nothing, noisy).amax(-1)
    leave = torch.where(free[0][:, None], leave.clamp_min(0.0), leave)
    leave = torch.where(matched[:, None], leave, nothing)
    enter = torch.where(matched[:, None, :, None], nothing, pairs).amax(-2)
    loose = free[1].gather(-1, perm.clamp_min(0))
    enter = torch.where(loose[:, None], enter.clamp_min(0.0), enter)
    enter = torch.where(matched[:, None], enter, nothing)
    top = torch.cat([nothing.expand(b, K, 1), enter], -1)
    gains = torch.cat([leave[..., None], inner], -1)
    gains = torch.cat([top[..., None, :], gains], -2)
    alone = ~matched[:, :, None] & ~taken[:, None, :] & (scores > -torch.inf)
    apart = -torch.where(alone, scores, -torch.inf).exp().sum((-2, -1))
    return gains, apart


def _tail(
    a: Tensor,  # (b, K), at least -50
    level: Tensor,  # (K,)
) -> tuple[Tensor, Tensor]:
    """Log probability that Gumbel noise exceeds a, and noise that does."""
    rate = (-a).exp()
    far = a > _SMALL
    safe = torch.where(far, 1.0, rate)
    log_tail = torch.where(far, -a - rate / 2, (-torch.expm1(-safe)).log())
    at = level + log_tail  # the tail beyond what is drawn
    small = at < -_SMALL
    inside = torch.where(small, -1.0, at)
    drawn = torch.where(small, -at, -(-torch.log1p(-inside.exp())).log())
    return log_tail, drawn
