# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Scaling a positive kernel to given sums, at falling temperatures."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

from pyro_permutations.kernel_newton import (
    MOST_STEPS,
    STAGE_TOLERANCE,
    System,
    Ties,
    conjugate_gradients,
    factorized,
    few,
    large,
    mapped,
    newton,
    replaced,
    small,
    times,
)
from pyro_permutations.kernel_squaring import depth, scale_by_squaring
from pyro_permutations.matching_graph import WIRE

__all__ = ["Scaling", "scale_kernel", "solve_marginals"]

# Exponents below this are raised to it: arithmetic on denormal numbers is several
# times slower, and exp(-300) is nothing beside a row sum of one.
_FLOOR = -300.0
# The first temperature, in terms of how far scores are below the best of their row.
_FIRST = 0.25
# Slack is at most one where the sums are right; on the way it is read as no more than
# the exponential of this.
_HIGHEST = 50.0


class Scaling(NamedTuple):
    """A scaled matrix and how it was reached."""

    p: Tensor  # (b, n, m)
    potentials: Tensor  # (b, 1, m), g
    error: Tensor  # (b, 1, 1), the largest of a sum
    iterations: int

    def short_of(self, tol: float) -> Tensor:  # (k,)
        """Indices of those that have not got there; NaN has not."""
        return (~(self.error <= tol)).flatten().nonzero()[:, 0]


class _Path(NamedTuple):
    """How potentials follow the temperature."""

    potential: Tensor  # (b, 1, m), to start from
    t: Tensor  # (b, 1, 1)
    before: Tensor  # (b, 1, m), what it came to at the temperature before
    t_before: Tensor  # (b, 1, 1)
    direct: Tensor  # (b, 1, 1) bool, where conjugate gradients are too slow


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

    By Newton's method on the column potentials, those of the rows eliminated. To begin
    within its reach temperatures fall to one from where the scores are mild, and the
    potentials, nearly linear in the temperature, are extrapolated. Small kernels are
    factorized and squared; large ones, and what that gives up, need products with
    vectors only.

    With slack the last row and column are those of a matching graph. No sums are asked
    of them and their potentials stay zero.
    """
    if not scores.numel():
        return Scaling(scores, columns, scores[:, :1, :1], 0)
    case: dict[str, Any] = {"tol": tol, "slack": slack, "masked": masked}
    method = scale_by_squaring if small(scores) else _scale_by_products
    (p, g, error), steps = method(scores, rows, columns, **case)
    scaling = Scaling(p, g, error, steps)
    if small(scores) and len(index := scaling.short_of(tol)):
        some = (x[index] for x in (scores, rows, columns))
        inner, more = _scale_by_products(*some, **case)
        p, g, error = replaced((p, g, error), index, inner)
        scaling = Scaling(p, g, error, steps + more)
    return scaling


def _scale_by_products(
    scores: Tensor,  # (b, n, m), -inf where forbidden
    rows: Tensor,  # (b, 1, n)
    columns: Tensor,  # (b, 1, m)
    *,
    tol: float,
    slack: bool,
    masked: bool,
) -> tuple[tuple[Tensor, ...], int]:
    """Matrix, potentials (b, 1, m), errors (b, 1, 1); and the number of steps.

    With K of unit row sums and v over columns, u = r / (K v) makes rows exact, and
    c - v K'u is the whole error. Products with a vector are all that a step costs.
    Temperatures halve down to one, and the potentials are extrapolated.

    With slack no sums are asked of the last row and column, and their potentials stay
    zero: what is in them leaks from the rows and drains into the columns.
    """
    ties = None
    if slack:
        scores, ties = _apart(scores)
        rows, columns = rows[..., :-1], columns[..., :-1]
    top = scores.amax(-1, keepdim=True)
    if ties is not None:
        top = torch.maximum(top, ties[0].mT)
        ties = ties[0].mT - top, ties[1]
    base = scores - top
    first = _FIRST * depth(base, masked or slack)[:, None, None]
    t = torch.where(first < 2, 1.0, first)
    start = torch.zeros_like(columns)
    system = System(base, ties, rows, columns)
    path = _Path(start, t, start, t, torch.zeros_like(t, dtype=torch.bool))
    (p, g, error, *slacks), steps = _cooled(
        system, path, tol, 0.5, steps=0, masked=masked
    )
    if slack:
        p, g = _together(p, *slacks), pad(g, (0, 1))
    return (p, g, error), steps


def _cooled(
    system: System,
    path: _Path,
    tol: float,
    shrink: float,
    *,
    steps: int,
    masked: bool,
) -> tuple[tuple[Tensor, ...], int]:
    """Matrix, potentials, errors, what leaks and drains; and the number of steps."""
    base, ties, rows, columns, _ = system
    kernel, scratch = torch.empty_like(base), torch.empty_like(base)
    potential, t, before, t_before, direct = path
    rest = None
    while True:
        leaks = _kernel(kernel, base, potential if steps else None, t, ties)
        last = t == 1
        target = torch.where(last, tol, STAGE_TOLERANCE)
        state, taken = newton(
            System(kernel, leaks, rows, columns, scratch), target, direct, steps == 0
        )
        v, u, _, error, direct = state
        steps += taken
        now = potential + t * v.log()
        # Not done is also where v has left the range in which the kernel holds.
        done = error <= target
        if steps >= MOST_STEPS:  # NaN too is given up
            done = torch.ones_like(done)
        going = ~(done & last)
        if not bool(going.any()):
            break
        if taken == 1:  # the path is straight by now
            shrink *= shrink
        smaller = (t * shrink).clamp_min(1.0)
        smaller = torch.where(done, torch.where(smaller < 1.4, 1.0, smaller), t)
        slope = (now - before) / torch.where(t_before > t, t - t_before, torch.inf)
        potential = now + slope * (smaller - t)
        before = torch.where(done, now, before)
        t, t_before = smaller, torch.where(done, t, t_before)
        if large(kernel) and few(going):
            rest = going.flatten().nonzero()[:, 0]
            break
    if masked:  # forbidden pairs are at the floor: exp of -inf is slow, masks slower
        threshold(kernel, math.exp(_FLOOR) * (1 + 1e-9), 0.0, inplace=True)
    result: tuple[Tensor, ...] = kernel.mul_(u.mT).mul_(v), now, error
    if leaks is not None:
        result += leaks[0] * u, leaks[1] * v
    if rest is not None:
        del scratch
        path = _Path(potential, t, before, t_before, direct)
        some = system.at(rest), _Path(*(x[rest] for x in path))
        inner, steps = _cooled(*some, tol, shrink, steps=steps, masked=masked)
        result = replaced(result, rest, inner)
    return result, steps


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
    system = System(p, leaks, r, c)
    rest = b - times(a / r, p)
    if small(p) or mapped(rest):  # how far iterations go cannot depend on rest
        y = factorized(system, one_n, one_m, rest)
    else:
        stop = 1e-8 * rest.abs().amax(-1, keepdim=True)
        y, slow = conjugate_gradients(system, one_n, one_m, c, rest, stop)
        if bool(slow.any()):
            index = slow.flatten().nonzero()[:, 0]
            some = (x[index] for x in (one_n, one_m, rest))
            y[index] = factorized(system.at(index), *some)
    x = (a - times(y, p.mT)) / r
    return (pad(x, (0, 1)), pad(y, (0, 1))) if slack else (x, y)


def _apart(x: Tensor) -> tuple[Tensor, Ties]:
    return x[:, :-1, :-1], (x[:, None, :-1, -1], x[:, -1:, :-1])


def _together(p: Tensor, leaks: Tensor, drains: Tensor) -> Tensor:
    p = torch.cat([p, leaks.mT], -1)
    corner = p.new_full((len(p), 1, 1), math.exp(WIRE))
    return torch.cat([p, torch.cat([drains, corner], -1)], -2)


def _kernel(
    x: Tensor, base: Tensor, potential: Tensor | None, t: Tensor, ties: Ties | None
) -> Ties | None:
    """Make x the kernel, of unit row sums; give what leaks from rows and into columns.

    The leaks are part of the row sums. They are kept apart from the kernel because no
    equation belongs to the slack.
    """
    if potential is None:  # the best of each row is zero
        torch.mul(base, 1 / t, out=x)
        top = potential = torch.zeros_like(t)
    else:
        torch.add(base, potential, out=x).mul_(1 / t)  # division takes twice as long
        top = x.amax(-1, keepdim=True)
        if ties is not None:
            top = torch.maximum(top, ties[0] / t)
        x -= top
    total = x.clamp_min_(_FLOOR).exp_().sum(-1, keepdim=True)
    if ties is None:
        x *= 1 / total
        return None
    leak = (ties[0] / t - top).exp()
    total += leak
    drain = ((ties[1] + potential) / t).clamp_max(_HIGHEST).exp()
    x *= 1 / total
    return (leak / total).mT, drain
