# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Scaling a positive kernel to given sums: Newton steps in the exp domain."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_permutations.matching_graph import WIRE

__all__ = ["Scaling", "scale_kernel", "solve_marginals", "spread"]

# Up to this size a factorization beats conjugate gradients.
_SMALL = 48
# Exponents below this are raised to it: arithmetic on denormal numbers is several
# times slower, and exp(-300) is nothing beside a row sum of one.
_FLOOR = -300.0
# The first temperature, in standard deviations of the scores, and the largest error of
# a sum that a temperature on the way is left with.
_FIRST = 0.62
_STAGE_TOLERANCE = 0.1
_MOST_STEPS = 60
# No potential moves further in one step; and none further than that since the kernel
# was made, which is raised to the floor where it is less.
_LONGEST = 20.0
# Slack is at most one where the sums are right; on the way it is read as no more than
# the exponential of this.
_HIGHEST = 50.0
_FARTHEST = 60.0


class Scaling(NamedTuple):
    """A scaled matrix and how it was reached."""

    p: Tensor  # (b, n, m)
    potentials: Tensor  # (b, 1, m), g
    residual: float  # largest error of a sum
    iterations: int


def scale_kernel(
    scores: Tensor,  # (b, n, m), -inf where forbidden
    rows: Tensor,  # (b, 1, n)
    columns: Tensor,  # (b, 1, m)
    tol: float,
    *,
    slack: bool,
    masked: bool,
) -> Scaling:
    """Matrix exp(scores + f_i + g_j) of given sums to an absolute tolerance, float64.

    Row potentials are eliminated: with K of unit row sums and v over columns,
    u = r / (K v) makes rows exact, and c - v K'u is the whole error. Products with a
    vector are all that a step costs. Temperatures fall to one from where the scores
    are mild, and the potentials, nearly linear in the temperature, are extrapolated.

    With slack the last row and column are those of a matching graph. No sums are asked
    of them and their potentials stay zero: what is in them leaks from the rows and
    drains into the columns.
    """
    first = _FIRST * spread(scores, slack=slack, masked=masked)
    ties = None
    if slack:
        scores, ties = _apart(scores)
        rows, columns = rows[..., :-1], columns[..., :-1]
    top = scores.amax(-1, keepdim=True)
    if ties is not None:
        top = torch.maximum(top, ties[0].mT)
        ties = ties[0].mT - top, ties[1]
    base = scores - top
    forbidden = base == -torch.inf if masked else None
    t = torch.where(first < 2, 1.0, first)
    shrink = 0.25 if scores.shape[-1] <= _SMALL else 0.5
    potential = torch.zeros_like(columns)
    before, t_before = potential, t
    steps, direct = 0, scores.shape[-1] <= _SMALL
    while True:
        kernel, leaks = _kernel(base, potential, t, forbidden, ties)
        target = torch.where(t == 1, tol, _STAGE_TOLERANCE)
        v, u, error, taken, direct = _newton(
            kernel, leaks, rows, columns, target, steps == 0, direct
        )
        steps += taken
        now = potential + t * v.log()
        done = bool((error <= target).all()) or steps >= _MOST_STEPS
        if done and bool((t == 1).all()):
            break
        if not done:  # v has left the range in which the kernel holds
            potential = now
            continue
        if taken == 1:  # the path is straight by now
            shrink *= shrink
        smaller = (t * shrink).clamp_min(1.0)
        smaller = torch.where(smaller < 1.4, 1.0, smaller)
        slope = (now - before) / torch.where(t_before > t, t - t_before, torch.inf)
        potential = now + slope * (smaller - t)
        before, t_before, t = now, t, smaller
    p = kernel.mul_(u.mT).mul_(v)
    if leaks is not None:
        p, now = _together(p, leaks[0] * u, leaks[1] * v), pad(now, (0, 1))
    residual = float(error.amax()) if error.numel() else 0.0
    return Scaling(p, now, residual, steps)


def spread(
    scores: Tensor,  # (b, n, m)
    *,
    slack: bool,
    masked: bool,
) -> Tensor:  # (b, 1, 1)
    """Standard deviation of the scores of the allowed pairs, and of slack."""
    count = scores[:, :1, :1].new_full((), scores.shape[-2] * scores.shape[-1])
    if not (masked or slack):
        centred = scores - scores.mean((-2, -1), keepdim=True)
    else:
        forbidden = scores == -torch.inf
        if slack:
            forbidden[:, -1, -1] = True  # the wire
        count = count - forbidden.sum((-2, -1), keepdim=True)
        values = scores.masked_fill(forbidden, 0.0)
        centred = values - values.sum((-2, -1), keepdim=True) / count
        centred = centred.masked_fill_(forbidden, 0.0)
    # Relative to the largest: the squares of scores of 1e200 would overflow.
    largest = centred.abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    norm: Tensor = torch.linalg.vector_norm(
        centred.div_(largest), dim=(-2, -1), keepdim=True
    )
    return largest * norm / count.sqrt()


def solve_marginals(
    p: Tensor,  # (b, n, m)
    a: Tensor,  # (b, 1, n)
    b: Tensor,  # (b, 1, m)
    *,
    slack: bool,
) -> tuple[Tensor, Tensor]:  # (b, 1, n), (b, 1, m)
    """Solve r_i x_i + sum_j P_ij y_j = a_i, sum_i P_ij x_i + c_j y_j = b_j.

    With r and c the sums of P, one more solve with the Laplacian of the scaling. It is
    singular along constants, where a and b balance, and near a permutation, where its
    ridge of 1e-14 keeps x and y finite: they are multiplied by entries that vanish.
    With slack x and y are zero in the last row and column.
    """
    leaks = None
    if slack:
        p, leaks = _apart(p)
        a, b = a[..., :-1], b[..., :-1]
    r, c = p.sum(-1)[:, None, :], p.sum(-2)[:, None, :]
    if leaks is not None:
        r, c = r + leaks[0], c + leaks[1]
    one_n, one_m = torch.ones_like(r), torch.ones_like(c)
    rest = b - _times(a / r, p)
    if p.shape[-1] <= _SMALL:
        y = _factorized(p, leaks, one_n, one_m, r, rest)
    else:
        stop = 1e-8 * rest.abs().amax(-1, keepdim=True)
        y, slow = _conjugate_gradients(p, one_n, one_m, c, r, rest, stop)
        if slow:
            y = _factorized(p, leaks, one_n, one_m, r, rest)
    x = (a - _times(y, p.mT)) / r
    return (pad(x, (0, 1)), pad(y, (0, 1))) if slack else (x, y)


# What rows (b, 1, n) have in common with the slack, and columns (b, 1, m).
_Ties = tuple[Tensor, Tensor]


def _apart(x: Tensor) -> tuple[Tensor, _Ties]:
    return x[:, :-1, :-1], (x[:, None, :-1, -1], x[:, -1:, :-1])


def _together(p: Tensor, leaks: Tensor, drains: Tensor) -> Tensor:
    p = torch.cat([p, leaks.mT], -1)
    corner = p.new_full((len(p), 1, 1), math.exp(WIRE))
    return torch.cat([p, torch.cat([drains, corner], -1)], -2)


def _kernel(
    base: Tensor,
    potential: Tensor,
    t: Tensor,
    forbidden: Tensor | None,
    ties: _Ties | None,
) -> tuple[Tensor, _Ties | None]:
    """The kernel, of unit row sums, and what leaks from rows and drains into columns.

    The leaks are part of the row sums. They are kept apart from the kernel because no
    equation belongs to the slack.
    """
    x = (base + potential).div_(t)
    top = x.amax(-1, keepdim=True)
    if ties is not None:
        top = torch.maximum(top, ties[0] / t)
    x -= top
    x = x.clamp_min_(_FLOOR).exp_()
    if forbidden is not None:
        x.masked_fill_(forbidden, 0.0)
    total = x.sum(-1, keepdim=True)
    if ties is None:
        return x.div_(total), None
    leak = (ties[0] / t - top).exp()
    total += leak
    drain = ((ties[1] + potential) / t).clamp_max(_HIGHEST).exp()
    return x.div_(total), ((leak / total).mT, drain)


def _newton(
    kernel: Tensor,
    leaks: _Ties | None,
    rows: Tensor,
    columns: Tensor,
    target: Tensor,
    mild: bool,
    direct: bool,
) -> tuple[Tensor, Tensor, Tensor, int, bool]:
    """v, u, the errors, the number of steps, and whether to factorize from now on."""
    v = torch.ones_like(columns)
    u, sums = _sweep(kernel, leaks, v, rows)
    # Sweeps converge linearly; while they cut the error they are cheaper.
    steps, travelled = 1, 0.0
    while mild and steps < 5:
        v = v * (columns / sums)
        u, sums = _sweep(kernel, leaks, v, rows)
        steps += 1
    error = _error(sums, columns)
    while (
        steps < _MOST_STEPS and travelled < _FARTHEST and bool((error > target).any())
    ):
        if mild and steps < 12:
            v = v * (columns / sums)
            u, sums = _sweep(kernel, leaks, v, rows)
            smaller = _error(sums, columns)
            mild = bool((smaller < 0.6 * error).all())
            error = smaller
        else:
            lacking = columns - sums
            if not direct:
                stop = _close_enough(lacking, target)
                move, direct = _conjugate_gradients(
                    kernel, u, v, sums, rows, lacking, stop
                )
            if direct:
                move = _factorized(kernel, leaks, u, v, rows, lacking)
            length = float(move.abs().amax())
            if length > 1.5:
                v, sums = _line_search(kernel, leaks, v, rows, columns, lacking, move)
                v = v * (columns / sums)
            else:
                v = v * move.exp()
            travelled += min(length, _LONGEST)
            u, sums = _sweep(kernel, leaks, v, rows)
            error = _error(sums, columns)
        steps += 1
    return v, u, error, steps, direct


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """A row vector times a matrix: on CPUs far faster than the other way round."""
    return torch.bmm(x, matrix)


def _sweep(
    kernel: Tensor, leaks: _Ties | None, v: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """U that makes the rows exact, and what the columns add up to then."""
    if leaks is None:
        u = rows / _times(v, kernel.mT)
        return u, v * _times(u, kernel)
    u = rows / (_times(v, kernel.mT) + leaks[0])
    return u, v * (_times(u, kernel) + leaks[1])


def _error(sums: Tensor, columns: Tensor) -> Tensor:  # (b, 1, 1)
    return (sums - columns).abs().amax(-1, keepdim=True)


def _line_search(
    kernel: Tensor,
    leaks: _Ties | None,
    v: Tensor,
    rows: Tensor,
    columns: Tensor,
    lacking: Tensor,
    move: Tensor,
) -> tuple[Tensor, Tensor]:
    """Shorten the step until the dual's slope along it has not turned too far."""
    longest = move.abs().amax(-1, keepdim=True).clamp_min(_LONGEST)
    length = _LONGEST / longest
    slope = (move * lacking).sum(-1, keepdim=True)
    for _ in range(8):
        ahead = v * (length * move).exp()
        _, sums = _sweep(kernel, leaks, ahead, rows)
        turned = (move * (columns - sums)).sum(-1, keepdim=True)
        far = turned < -0.5 * slope
        if not bool(far.any()):
            break
        secant = (slope / (slope - turned)).clamp(0.1, 0.7)
        length = torch.where(far, length * secant, length)
    return ahead, sums


def _close_enough(lacking: Tensor, target: Tensor) -> Tensor:  # (b, 1, 1)
    """How exact a direction need be: the more, the nearer to the end."""
    error = lacking.abs().amax(-1, keepdim=True)
    loose = (0.3 * error.sqrt()).clamp(1e-3, 0.3) * error
    return torch.maximum(loose, 0.3 * target)


def _factorized(
    kernel: Tensor,
    leaks: _Ties | None,
    u: Tensor,
    v: Tensor,
    rows: Tensor,
    b: Tensor,
) -> Tensor:
    """Solve (diag(sums) - P' diag(1 / r) P) d = b for P = diag(u) K diag(v).

    By Cholesky, the diagonal a sum of what is off it, with a ridge of 1e-14; slack is
    a tie to the ground, by way of a row or of its own.
    """
    p = kernel * (u * rows.rsqrt()).mT * v
    laplacian = torch.bmm(p.mT, p).neg_()
    diagonal = laplacian.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    off = laplacian.sum(-1)
    if leaks is not None:
        ground = _times(leaks[0] * u * rows.rsqrt(), p) + v * leaks[1]
        off -= ground[:, 0]
    diagonal.copy_(1e-14 - off)
    ridge = 1e-14
    factor, failed = torch.linalg.cholesky_ex(laplacian)
    while bool(failed.any()):  # rounding took clusters that are hardly tied to the rest
        ridge *= 100
        diagonal.add_(ridge * (failed > 0)[:, None])
        factor, failed = torch.linalg.cholesky_ex(laplacian)
    return torch.cholesky_solve(b.mT, factor).mT


def _conjugate_gradients(
    kernel: Tensor,
    u: Tensor,
    v: Tensor,
    sums: Tensor,
    rows: Tensor,
    b: Tensor,
    stop: Tensor,
) -> tuple[Tensor, bool]:
    """The same by conjugate gradients through the kernel; and whether they were slow.

    A factorization costs as much as about n / 4 products.
    """
    w = u.square() / rows
    diagonal = (sums - v.square() * _times(w, kernel.square())).clamp_min(1e-10)
    x, r = torch.zeros_like(b), b
    z = r / diagonal
    p, rz = z, (r * z).sum(-1, keepdim=True)
    largest = r.abs().amax(-1, keepdim=True)
    for _ in range(max(32, kernel.shape[-1] // 4)):
        if bool((largest <= stop).all()):
            return x, False
        ap = sums * p - v * _times(w * _times(v * p, kernel.mT), kernel)
        step = rz / (p * ap).sum(-1, keepdim=True).clamp_min(1e-300)
        step = torch.where(largest > stop, step, 0.0)
        x = x + step * p
        r = r - step * ap
        z = r / diagonal
        rz, last = (r * z).sum(-1, keepdim=True), rz
        p = z + rz / last.clamp_min(1e-300) * p
        largest = r.abs().amax(-1, keepdim=True)
    return x, True
