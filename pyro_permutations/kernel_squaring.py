# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Scaling small kernels to given sums: the square is that at half the temperature."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_permutations.kernel_newton import few, large, replaced
from pyro_permutations.matching_graph import WIRE

__all__ = ["depth", "scale_by_squaring"]

# The first temperature, in terms of how far scores are below the best of their row.
_FIRST = 0.4
# Elements of a large batch have the same one where those differ by less than this.
_RANGE = 8.0
# Temperatures halve unless an error of a sum is larger than this. What extrapolation
# leaves, mostly .2 to .5, is taken away by the Newton step that goes with it.
_STAGE_TOLERANCE = 1.0
# So many steps at one temperature, before the last one and there, are too many.
_MOST_WAITS = 10
_MOST_STEPS = 40
# No potential moves further in a step of Newton, nor in an extrapolation.
_LONGEST = 1.5
_FARTHEST = 100.0
# Entries are raised to this before they are squared: neither squares, nor what rows and
# columns move then (exp(-100)), nor products of such are denormal, on which arithmetic
# is several times slower. Its square exp(-230), moved by an extrapolation (100) and as
# many steps of Newton (60), still is less than what a sum can see.
_FLOOR = 1e-50
# Ties between columns that are weaker than this share of their sums are left to it.
_RIDGE = 1e-13
# At low temperatures gradients feel errors of the sums many times over. Errors of more
# than this share of the tolerance get one more step, with the factor that is there.
_SHARP = 0.1
# Slack is at most one where the sums are right; on the way it is read as no more than
# the exponential of this.
_HIGHEST = 50.0


class _State(NamedTuple):
    """A kernel at the temperature 2^k, and what its scaling is to add up to."""

    p: Tensor  # (b, n, m), or m + 1 with slack; scores before there is a temperature
    g: Tensor  # (b, 1, m), potentials
    weights: Tensor  # (b, 1, n), square roots of the row sums
    columns: Tensor  # (b, 1, m)
    drains: tuple[Tensor, ...]  # (b, 1, m), logs of the columns' slack, if there is any

    def at(self, index: Tensor) -> _State:
        """Those of some batch elements."""
        p, g, weights, columns = (x.index_select(0, index) for x in self[:4])
        return _State(p, g, weights, columns, tuple(x[index] for x in self.drains))


def scale_by_squaring(
    scores: Tensor,  # (b, n, m), -inf where forbidden
    rows: Tensor,  # (b, 1, n)
    columns: Tensor,  # (b, 1, m)
    *,
    tol: float,
    slack: bool,
    masked: bool,
) -> tuple[tuple[Tensor, ...], int]:
    """Matrix, potentials (b, 1, m), errors (b, 1, 1); and the number of steps.

    Where factorizing a matrix costs no more than the calls of a few operations, these
    have to be few. So all elements, but for those of another range of scores, are at
    one temperature, t = 2^k, and exponentials of matrices are taken once: halving the t
    of P = exp((scores + f + g) / t) squares P, and what g moves multiplies its columns.
    A step solves (diag(c) - P' P) d = 1 - c, with c the sums of columns where those of
    rows are exact. It goes with an extrapolation of g, nearly linear in the
    temperature, from the last two of them.

    Slack is one column more whose potential is zero, and what drains into the columns.
    """
    drains: tuple[Tensor, ...] = ()
    if slack:
        drains = (scores[:, -1:, :-1],)
        scores, rows, columns = scores[:, :-1], rows[..., :-1], columns[..., :-1]
    # What is done in place counts versions for autograd otherwise, 7% of the time.
    with torch.inference_mode():
        base = scores - scores.amax(-1, keepdim=True)
        state = _State(base, torch.zeros_like(columns), rows.sqrt(), columns, drains)
        (p, g, lacking), steps = _cooled(state, depth(base, masked or slack), tol)
        if masked or slack:
            p.masked_fill_(base == -torch.inf, 0.0)
    p, g, error = p * state.weights.mT, g.clone(), _error(lacking)
    if slack:
        corner = p.new_full((len(p), 1, 1), math.exp(WIRE))
        bottom = torch.cat([(drains[0] + g).exp(), corner], -1)
        p, g = torch.cat([p, bottom], -2), pad(g, (0, 1))
    return (p, g, error), steps


def depth(base: Tensor, masked: bool) -> Tensor:  # (b,)
    """How far scores are below the best of their row, in the mean."""
    if not masked:
        return -base.mean((-2, -1))
    allowed = (base > -torch.inf).sum((-2, -1))
    return -base.nan_to_num(neginf=0.0).sum((-2, -1)) / allowed


def _cooled(
    state: _State,
    deep: Tensor,  # (b,)
    tol: float,
) -> tuple[tuple[Tensor, ...], int]:
    """The same as of :func:`_scaled`, from scores; what is far deeper goes alone."""
    low, high = (max(1.0, _FIRST * float(x)) for x in deep.aminmax())
    if high > _RANGE * low and large(state.p):
        hard = _FIRST * deep > (high * low) ** 0.5
        some, others = hard.nonzero()[:, 0], (~hard).nonzero()[:, 0]
        wild, more = _cooled(state.at(some), deep[some], tol)
        mild, steps = _cooled(state.at(others), deep[others], tol)
        both = (x.new_empty(len(deep), *x.shape[1:]) for x in mild)
        result = replaced(replaced(tuple(both), others, mild), some, wild)
        return result, steps + more
    k = math.ceil(math.log2(high))
    return _scaled(state._replace(p=(state.p * 0.5**k).exp_()), k, tol, 0)


def _scaled(
    state: _State, k: int, tol: float, steps: int
) -> tuple[tuple[Tensor, ...], int]:
    """The same p and g at temperature one, errors, and the number of steps."""
    p, g, weights, columns, drains = state
    weight, m = weights.mT, columns.shape[-1]
    before = factor = None
    close, begun = False, steps + k
    while True:
        p *= weight / p.sum(-1, keepdim=True)
        sums = torch.bmm(weights, p)
        if drains:
            drain = torch.add(g, drains[0], alpha=0.5**k).clamp_max_(_HIGHEST).exp_()
            sums = sums[..., :m] + drain
        lacking = columns - sums
        worst = float(lacking.abs().amax())
        steps += 1
        most = _MOST_STEPS if k == 0 else _MOST_WAITS
        if not worst < torch.inf or steps + k > begun + most:
            if k == 0:
                break
            good = (_error(lacking) <= _STAGE_TOLERANCE).flatten()
            result = p, g, torch.full_like(lacking, torch.inf)
            if not bool(good.any()):
                return result, steps
            index = good.nonzero()[:, 0]
            state = _State(p, g, weights, columns, drains).at(index)
            inner, steps = _scaled(state, k, tol, steps)
            return replaced(result, index, inner), steps
        if k == 0 and (worst <= _SHARP * tol or (worst <= tol and close)):
            break
        if k == 0 and large(p) and few(left := _error(lacking) > _SHARP * tol):
            index = left.flatten().nonzero()[:, 0]
            state = _State(p, g, weights, columns, drains).at(index)
            inner, steps = _scaled(state, k, tol, steps)
            return replaced((p, g, lacking), index, inner), steps
        close = k == 0 and worst <= tol
        if steps == 1:
            move = (columns / sums).log_()
        else:
            if factor is None or not close:
                factor = _factor(p[..., :m] if drains else p, sums)
            move = torch.cholesky_solve(lacking.mT, factor).mT
            move = move.clamp_(-_LONGEST, _LONGEST)
        now = g + move
        if k > 0 and (worst <= _STAGE_TOLERANCE or steps == 1):
            k -= 1
            p.clamp_min_(_FLOOR)
            p *= p
            # At half the temperature potentials count twice.
            ahead = 2 * now if before is None else torch.lerp(before, now, 3)
            move = torch.sub(ahead, g, alpha=2).clamp_(-_FARTHEST, _FARTHEST)
            before, now = now, torch.add(move, g, alpha=2)
        g, move = now, move.exp_()
        p *= pad(move, (0, 1), value=1.0) if drains else move
    return (p, g, lacking), steps


def _error(lacking: Tensor) -> Tensor:  # (b, 1, 1)
    return lacking.abs().amax(-1, keepdim=True)


def _factor(p: Tensor, sums: Tensor) -> Tensor:
    laplacian = torch.bmm(p.mT, p).neg_()
    laplacian.diagonal(dim1=-2, dim2=-1).add_(sums[:, 0], alpha=1 + _RIDGE)
    factor: Tensor = torch.linalg.cholesky_ex(laplacian)[0]
    return factor
