# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The algorithm behind the Sinkhorn operator: temperature scaling and Newton steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_permutations.balancing_step import (
    EXACT,
    ROUGH,
    BestMatching,
    balancing_step,
    filling_step,
)
from pyro_permutations.kernel_scaling import scale_kernel
from pyro_permutations.matching_graph import WIRE
from pyro_permutations.resistor_network import Network

__all__ = ["Solution", "last_step", "solve"]

# Newton stops when its next step would move no log potential by more than this; it has
# converged quadratically by then, so that what is left is about the square.
_LAST_STEP = 3e-6
# At a stage on the way it is enough that the next one starts within reach. Not one: far
# from balance, where flows differ by a gap, a step is 1 - exp(-gap) whatever the gap.
_STAGE_STEP = 0.5
# After a step below this the next ones are exact.
_NEAR = 1e-2
# No log potential moves by more in one step, relative to the others.
_LONGEST_STEP = 4.0
_MOST_STEPS = 200
# The first inverse temperature is such that no score is further than this below the
# best of its row. No tie is too weak for a kernel then, and products with a vector do
# better than factorizations. (In standard deviations that is colder the heavier the
# tails are; from there those of Cauchy's do not converge.)
_WARM = 60.0
_WARM_TOLERANCE = 1e-3


class Solution(NamedTuple):
    """A scaled matrix and how it was reached."""

    log_p: Tensor  # (b, n, m)
    residual: float  # largest error of a sum
    left: float  # the last step of a log potential, where steps ran out; else zero
    iterations: int


def last_step(tol: float) -> float:
    """Below which step of the log potentials Newton stops."""
    return min(_LAST_STEP, math.sqrt(tol) / 10)


def solve(
    scores: Tensor,  # (b, n, m), -inf where forbidden
    rows: Tensor,  # (b, 1, n)
    columns: Tensor,  # (b, 1, m)
    root: Tensor,  # (b, m)
    tol: float,
    *,
    slack: bool,
    masked: bool,
) -> Solution:
    """Scale exp(scores) to the given row and column sums, in float64.

    The state is log P itself, with rows exact: dividing the temperature by two doubles
    it, up to a new balancing. Each stage balances it by Newton steps on the column
    potentials; the first stage is at a temperature where that converges from nothing.

    With slack the last row and column are those of a matching graph: their corner, the
    wire, has its weight at every temperature, and makes of the slack row one more row
    whose sum is known. The slack column is a root, so that its sum is not asked for.
    """
    log_rows = rows.mT.log()
    scale = (_WARM / _range(scores[:, :-1] if slack else scores)).clamp_max(1.0)
    log_p = _wired(scores * scale[:, None, None], slack)
    warm = scale_kernel(
        log_p, rows, columns, _WARM_TOLERANCE, slack=slack, masked=masked
    )
    iterations = warm.iterations
    columns = columns[:, 0]
    log_p = _normalise_rows(log_p.add_(warm.potentials), log_rows)
    growth = 2.0
    previous, previous_scale = log_p, torch.zeros_like(scale)
    square = slack or bool((rows == 1).all() and (columns == 1).all())
    best = BestMatching(scores, slack) if square else None
    left, active = torch.zeros_like(scale), torch.arange(len(scale)).to(root.device)
    while True:
        last = scale == 1
        target = torch.where(last, last_step(tol), _STAGE_STEP)
        log_p, steps, size = _newton(
            log_p, log_rows, columns, root, target, best, active
        )
        left = left.index_copy(0, active, size)
        active = (~last).nonzero()[:, 0]  # what is done waits
        iterations += steps
        if bool(last.all()):
            break
        if steps == 1 and bool((previous_scale > 0).any()):  # the path is straight
            growth *= 1.5
        larger = (scale * growth).clamp_max(1.0)
        larger = torch.where(larger > 0.7, 1.0, larger)
        ahead = _extrapolate(log_p, previous, scale, previous_scale, larger)
        ahead = _wired(ahead, slack)
        previous, previous_scale = log_p, scale
        log_p, scale = _normalise_rows(ahead, log_rows), larger
    error = (log_p.exp().sum(-2) - columns).abs()
    error = error[..., :-1] if slack else error
    residual = float(error.amax()) if error.numel() else 0.0
    # For other sums than one there are no flows to balance, only sums to get right.
    moving = float(left.amax()) if square and left.numel() else 0.0
    return Solution(log_p, residual, moving, iterations)


def _range(scores: Tensor) -> Tensor:  # (b,)
    """How far the scores of a row go, those of forbidden pairs left out."""
    low = torch.where(scores > -torch.inf, scores, torch.inf).amin(-1)
    return (scores.amax(-1) - low).amax(-1)


def _extrapolate(
    log_p: Tensor, previous: Tensor, scale: Tensor, previous_scale: Tensor, to: Tensor
) -> Tensor:
    """Log P at a larger scale: proportional to it, then linear in it.

    As the temperature falls log P = scale * (reduced scores) + constant, up to what is
    exponentially small, so that two stages tell the third.
    """
    started = (previous_scale > 0) & (scale > previous_scale)
    slope = (to - scale) / torch.where(started, scale - previous_scale, 1.0)
    before = torch.where(log_p > -torch.inf, log_p - previous, 0.0)
    linear = log_p + slope[:, None, None] * before
    return torch.where(
        started[:, None, None], linear, log_p * (to / scale)[:, None, None]
    )


def _normalise_rows(x: Tensor, log_rows: Tensor) -> Tensor:
    return torch.log_softmax(x, -1) + log_rows


def _wired(x: Tensor, slack: bool) -> Tensor:
    if slack:
        x[:, -1, -1] = WIRE
    return x


def _newton(
    log_p: Tensor,
    log_rows: Tensor,
    columns: Tensor,
    root: Tensor,
    target: Tensor,
    best: BestMatching | None,
    active: Tensor,  # (k,) of the batch
) -> tuple[Tensor, int, Tensor]:
    """Newton steps until the last one was below the target, element by element.

    Returns log P, the number of steps and, where these ran out, the length of the last.
    """
    chosen, tolerance = active, torch.full_like(target[active], ROUGH)
    steps, left = 0, torch.zeros_like(target, dtype=log_p.dtype)
    while len(active) and steps < _MOST_STEPS:
        everyone = len(active) == len(log_p)
        part = log_p if everyone else log_p[active]
        # Named nowhere, so that it is gone before the next.
        given = part, root[active], log_rows[active][..., 0]
        if best is None:
            move = filling_step(Network(*given), columns[active], tolerance)
        else:
            move = balancing_step(Network(*given), tolerance, best, active)
        size = move.abs().amax((-2, -1))
        move *= (_LONGEST_STEP / size.clamp_min(_LONGEST_STEP))[:, None, None]
        part = _normalise_rows(part + move, log_rows[active])
        log_p = part if everyone else log_p.index_copy(0, active, part)
        # The first steps need a direction only, the last ones an exact one; a step is
        # the last if it was exact and short.
        rounding = 1e-15 * part.nan_to_num(neginf=0.0).abs_().amax((-2, -1))
        short = size < target[active]
        exact = (tolerance == EXACT) | (target[active] == _STAGE_STEP)
        tolerance = torch.where(size < _NEAR, EXACT, tolerance)
        going = ~(short & exact) & (size > rounding)
        left[active] = torch.where(going & ~short, size, 0.0)
        active, tolerance = active[going], tolerance[going]
        steps += 1
    return log_p, steps, left[chosen]
