# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Scaling a positive kernel to given sums: Newton steps in the exp domain."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

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
# At low temperatures gradients feel errors of the sums many times over. Errors of more
# than this share of the tolerance are taken away, where there is a factorization.
_SHARP = 1e-2
_MOST_STEPS = 60
# No potential moves further in one step; and none further than that since the kernel
# was made, which is raised to the floor where it is less.
_LONGEST = 20.0
# Slack is at most one where the sums are right; on the way it is read as no more than
# the exponential of this.
_HIGHEST = 50.0
_FARTHEST = 60.0
# Elements that are done are left out where at most this share goes on, and where there
# are more entries than this.
_SHARE = 0.75
_MANY = 2**15


class Scaling(NamedTuple):
    """A scaled matrix and how it was reached."""

    p: Tensor  # (b, n, m)
    potentials: Tensor  # (b, 1, m), g
    residual: float  # largest error of a sum
    iterations: int


# What rows (b, 1, n) have in common with the slack, and columns (b, 1, m).
_Ties = tuple[Tensor, ...]


class _System(NamedTuple):
    """A kernel, or its logarithm, and what its scaling is to add up to."""

    kernel: Tensor  # (b, n, m)
    leaks: _Ties | None
    rows: Tensor  # (b, 1, n)
    columns: Tensor  # (b, 1, m)

    def at(self, index: Tensor) -> _System:
        everyone = len(index) == len(self.kernel)
        # Far faster than kernel[index].
        some = self.kernel if everyone else self.kernel.index_select(0, index)
        leaks = None if self.leaks is None else tuple(x[index] for x in self.leaks)
        return _System(some, leaks, self.rows[index], self.columns[index])


class _Path(NamedTuple):
    """How potentials follow the temperature."""

    potential: Tensor  # (b, 1, m), to start from
    t: Tensor  # (b, 1, 1)
    before: Tensor  # (b, 1, m), what it came to at the temperature before
    t_before: Tensor  # (b, 1, 1)
    direct: Tensor  # (b, 1, 1) bool, where conjugate gradients are too slow


class _State(NamedTuple):
    """Where the scaling of a system has come to."""

    v: Tensor  # (b, 1, m)
    u: Tensor  # (b, 1, n), so that rows are exact
    sums: Tensor  # (b, 1, m), of columns
    error: Tensor  # (b, 1, 1)
    direct: Tensor  # (b, 1, 1) bool


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
    t = torch.where(first < 2, 1.0, first)
    start = torch.zeros_like(columns)
    direct = torch.full_like(t, scores.shape[-1] <= _SMALL, dtype=torch.bool)
    shrink = 0.25 if scores.shape[-1] <= _SMALL else 0.5
    (p, g, error, *slacks), steps = _cooled(
        _System(scores - top, ties, rows, columns),
        _Path(start, t, start, t, direct),
        tol,
        shrink,
        steps=0,
        masked=masked,
    )
    if slack:
        p, g = _together(p, *slacks), pad(g, (0, 1))
    return Scaling(p, g, float(error.amax()) if error.numel() else 0.0, steps)


def _cooled(
    system: _System,
    path: _Path,
    tol: float,
    shrink: float,
    *,
    steps: int,
    masked: bool,
) -> tuple[tuple[Tensor, ...], int]:
    """Matrix, potentials, errors, what leaks and drains; and the number of steps."""
    base, ties, rows, columns = system
    potential, t, before, t_before, direct = path
    rest = None
    while True:
        kernel, leaks = _kernel(base, potential, t, ties)
        last = t == 1
        target = torch.where(last, tol, _STAGE_TOLERANCE)
        state, taken = _newton(
            _System(kernel, leaks, rows, columns), target, direct, steps == 0
        )
        v, u, _, error, direct = state
        steps += taken
        now = potential + t * v.log()
        # Not done is also where v has left the range in which the kernel holds.
        done = error <= target
        if steps >= _MOST_STEPS:  # NaN too is given up
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
        if _large(kernel) and _few(going):
            rest = going.flatten().nonzero()[:, 0]
            break
    if masked:  # forbidden pairs are at the floor: exp of -inf is slow, masks slower
        threshold(kernel, math.exp(_FLOOR) * (1 + 1e-9), 0.0, inplace=True)
    result: tuple[Tensor, ...] = kernel.mul_(u.mT).mul_(v), now, error
    if leaks is not None:
        result += leaks[0] * u, leaks[1] * v
    if rest is not None:
        path = _Path(potential, t, before, t_before, direct)
        some = system.at(rest), _Path(*(x[rest] for x in path))
        inner, steps = _cooled(*some, tol, shrink, steps=steps, masked=masked)
        result = _replaced(result, rest, inner)
    return result, steps


def _large(kernel: Tensor) -> bool:
    """Whether a copy costs less than the calls that make it."""
    return kernel.numel() > _MANY


def _few(going: Tensor) -> bool:
    """Whether it pays to leave out the others."""
    return int(going.count_nonzero()) <= _SHARE * len(going)


def _replaced(
    tensors: tuple[Tensor, ...], index: Tensor, others: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    pairs = zip(tensors, others, strict=True)
    return tuple(x.index_copy_(0, index, y) for x, y in pairs)


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
        count = (scores > -torch.inf).sum((-2, -1), keepdim=True, dtype=scores.dtype)
        values = scores.nan_to_num(neginf=0.0)  # far faster than masked_fill
        if slack:  # less the wire
            count -= 1
            values[:, -1, -1] = 0.0
        mean = values.sum((-2, -1), keepdim=True) / count
        centred = torch.sub(scores, mean, out=values).nan_to_num_(neginf=0.0)
        if slack:
            centred[:, -1, -1] = 0.0
    norm: Tensor = torch.linalg.vector_norm(centred, dim=(-2, -1), keepdim=True)
    if bool((norm == torch.inf).any()):  # the squares of scores of 1e200 overflow
        centred *= 2.0**-500
        norm = torch.linalg.vector_norm(centred, dim=(-2, -1), keepdim=True) * 2.0**500
    return norm / count.sqrt()


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
    system = _System(p, leaks, r, c)
    rest = b - _times(a / r, p)
    if p.shape[-1] <= _SMALL:
        y, _ = _factorized(system, one_n, one_m, rest)
    else:
        stop = 1e-8 * rest.abs().amax(-1, keepdim=True)
        y, slow = _conjugate_gradients(system, one_n, one_m, c, rest, stop)
        if bool(slow.any()):
            index = slow.flatten().nonzero()[:, 0]
            some = (x[index] for x in (one_n, one_m, rest))
            y[index], _ = _factorized(system.at(index), *some)
    x = (a - _times(y, p.mT)) / r
    return (pad(x, (0, 1)), pad(y, (0, 1))) if slack else (x, y)


def _apart(x: Tensor) -> tuple[Tensor, _Ties]:
    return x[:, :-1, :-1], (x[:, None, :-1, -1], x[:, -1:, :-1])


def _together(p: Tensor, leaks: Tensor, drains: Tensor) -> Tensor:
    p = torch.cat([p, leaks.mT], -1)
    corner = p.new_full((len(p), 1, 1), math.exp(WIRE))
    return torch.cat([p, torch.cat([drains, corner], -1)], -2)


def _kernel(
    base: Tensor, potential: Tensor, t: Tensor, ties: _Ties | None
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
    total = x.sum(-1, keepdim=True)
    if ties is None:
        return x.div_(total), None
    leak = (ties[0] / t - top).exp()
    total += leak
    drain = ((ties[1] + potential) / t).clamp_max(_HIGHEST).exp()
    return x.div_(total), ((leak / total).mT, drain)


def _newton(
    system: _System, target: Tensor, direct: Tensor, mild: bool
) -> tuple[_State, int]:
    """Scale a kernel from nothing; and the number of steps."""
    v = torch.ones_like(system.columns)
    u, sums = system.rows.clone(), _times(system.rows, system.kernel)  # of unit rows
    if system.leaks is not None:
        sums += system.leaks[1]
    # Sweeps converge linearly; while they cut the error they are cheaper.
    steps = 1
    while mild and steps < 5:
        v = v * (system.columns / sums)
        u, sums = _sweep(system, v)
        steps += 1
    state = _State(v, u, sums, _error(sums, system.columns), direct)
    return _iterated(system, state, target, mild, steps, 0.0)


def _iterated(
    system: _System,
    state: _State,
    target: Tensor,
    mild: bool,
    steps: int,
    travelled: float,
) -> tuple[_State, int]:
    """Steps until errors are below the target or v is far from where it was."""
    kernel, _, _, columns = system
    squares = factor = None
    small = kernel.shape[-1] <= _SMALL
    while steps < _MOST_STEPS and travelled < _FARTHEST:
        left = state.error > target
        if not bool(left.any()):
            if factor is not None:
                sharp = torch.where(target < _STAGE_TOLERANCE, _SHARP * target, target)
                state = _sharpened(system, state, factor, sharp)
            break
        # On the way further steps improve what is done, for the next temperature.
        if (
            not small
            and _large(kernel)
            and _few(left := left | (target >= _STAGE_TOLERANCE))
        ):
            squares, index = None, left.flatten().nonzero()[:, 0]
            some = system.at(index), _State(*(x[index] for x in state)), target[index]
            inner, steps = _iterated(*some, mild, steps, travelled)
            state = _State(*_replaced(state, index, inner))
            break
        v, u, sums, error, direct = state
        if mild and steps < 12:
            v = v * (columns / sums)
            u, sums = _sweep(system, v)
            smaller = _error(sums, columns)
            mild = bool(((smaller < 0.6 * error) | (smaller <= target)).all())
        else:
            lacking = columns - sums
            if not small and not bool(direct.all()):
                squares = kernel.square() if squares is None else squares
                stop = _close_enough(lacking, target)
                stop = torch.where(direct, torch.inf, stop)
                move, slow = _conjugate_gradients(
                    system, u, v, sums, lacking, stop, squares
                )
                direct = direct | slow
            if small or bool(direct.all()):
                move, factor = _factorized(system, u, v, lacking)
            elif bool(direct.any()):
                squares, index = None, direct.flatten().nonzero()[:, 0]
                slow_ones = (x[index] for x in (u, v, lacking))
                move[index], _ = _factorized(system.at(index), *slow_ones)
            length = float(move.abs().amax())
            if length > 1.5:
                v, sums = _line_search(system, v, lacking, move)
                v = v * (columns / sums)
            else:
                v = v * move.exp()
            travelled += min(length, _LONGEST)
            u, sums = _sweep(system, v)
        state = _State(v, u, sums, _error(sums, columns), direct)
        steps += 1
    return state, steps


def _sharpened(
    system: _System, state: _State, factor: Tensor, target: Tensor
) -> _State:
    """A few steps more with an old factor, which costs little."""
    for _ in range(3):
        if not bool((state.error > target).any()):
            break
        lacking = (system.columns - state.sums).mT
        move = torch.cholesky_solve(lacking, factor).mT
        v = state.v * move.clamp_(-1.0, 1.0).exp()  # what is hardly tied may run away
        u, sums = _sweep(system, v)
        error = _error(sums, system.columns)
        if not bool((error <= state.error.amax()).all()):
            break
        state = _State(v, u, sums, error, state.direct)
    return state


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """A row vector times a matrix: on CPUs far faster than the other way round."""
    return torch.bmm(x, matrix)


def _sweep(system: _System, v: Tensor) -> tuple[Tensor, Tensor]:
    """U that makes the rows exact, and what the columns add up to then."""
    kernel, leaks, rows, _ = system
    if leaks is None:
        u = rows / _times(v, kernel.mT)
        return u, v * _times(u, kernel)
    u = rows / (_times(v, kernel.mT) + leaks[0])
    return u, v * (_times(u, kernel) + leaks[1])


def _error(sums: Tensor, columns: Tensor) -> Tensor:  # (b, 1, 1)
    return (sums - columns).abs().amax(-1, keepdim=True)


def _line_search(
    system: _System, v: Tensor, lacking: Tensor, move: Tensor
) -> tuple[Tensor, Tensor]:
    """Shorten the step until the dual's slope along it has not turned too far."""
    longest = move.abs().amax(-1, keepdim=True).clamp_min(_LONGEST)
    length = _LONGEST / longest
    slope = (move * lacking).sum(-1, keepdim=True)
    for _ in range(8):
        ahead = v * (length * move).exp()
        _, sums = _sweep(system, ahead)
        turned = (move * (system.columns - sums)).sum(-1, keepdim=True)
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
    system: _System, u: Tensor, v: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve (diag(sums) - P' diag(1 / r) P) d = b for P = diag(u) K diag(v).

    By Cholesky, the diagonal a sum of what is off it, with a ridge of 1e-14; slack is
    a tie to the ground, by way of a row or of its own.
    """
    kernel, leaks, rows, _ = system
    p = (kernel * (u * rows.rsqrt()).mT).mul_(v)
    laplacian = torch.bmm(p.mT, p).neg_()
    diagonal = laplacian.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    off = laplacian.sum(-1)
    if leaks is not None:
        ground = _times(leaks[0] * u * rows.rsqrt(), p) + v * leaks[1]
        off -= ground[:, 0]
    del p
    diagonal.copy_(1e-14 - off)
    ridge = 1e-14
    factor, failed = torch.linalg.cholesky_ex(laplacian)
    # Rounding took clusters that are hardly tied to the rest. NaN fails whatever is
    # added, and is left to show in the errors.
    while ridge < 1 and bool(failed.any()):
        ridge *= 100
        diagonal.add_(ridge * (failed > 0)[:, None])
        factor, failed = torch.linalg.cholesky_ex(laplacian)
    return torch.cholesky_solve(b.mT, factor).mT, factor


def _conjugate_gradients(
    system: _System,
    u: Tensor,
    v: Tensor,
    sums: Tensor,
    b: Tensor,
    stop: Tensor,
    squares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # (b, 1, m), (b, 1, 1)
    """The same by conjugate gradients through the kernel; and where they were slow.

    A factorization costs as much as about n / 4 products.
    """
    kernel, _, rows, _ = system
    w = u.square() / rows
    squares = kernel.square() if squares is None else squares
    diagonal = (sums - v.square() * _times(w, squares)).clamp_min(1e-10)
    x, r = torch.zeros_like(b), b
    z = r / diagonal
    p, rz = z, (r * z).sum(-1, keepdim=True)
    largest = r.abs().amax(-1, keepdim=True)
    for _ in range(max(32, kernel.shape[-1] // 4)):
        if bool((largest <= stop).all()):
            break
        ap = sums * p - v * _times(w * _times(v * p, kernel.mT), kernel)
        step = rz / (p * ap).sum(-1, keepdim=True).clamp_min(1e-300)
        step = torch.where(largest > stop, step, 0.0)
        x = x + step * p
        r = r - step * ap
        z = r / diagonal
        rz, last = (r * z).sum(-1, keepdim=True), rz
        p = z + rz / last.clamp_min(1e-300) * p
        largest = r.abs().amax(-1, keepdim=True)
    return x, ~(largest <= stop)  # NaN too
