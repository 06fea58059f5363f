# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The largest score plus fractional entropy over the doubly stochastic matrices."""

from __future__ import annotations

__all__ = ["fractional_maximum"]

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_permutations.dual_prices import dual_prices
from pyro_permutations.row_simplex import Rows, curvature, solve_rows
from pyro_permutations.spanning_trees import to_front
from pyro_permutations.warnings import ConvergenceWarning, warn

# Rows are exact; Newton stops where no column sum is off by more, and warns if rounding
# stops it at more than the second.
_TOLERANCE = 1e-10
_ACCEPTED = 1e-6
_MOST_STEPS = 200
_MOST_HALVINGS = 20
# No price moves by more than about so many nats in a step.
_LONGEST_STEP = 10.0
# Curvature that is added throughout, far below the tolerance.
_TINY = 1e-13
# As gamma tends to one rows become linear where two entries compete. So it is taken
# there in stages, 1 - gamma at most this at first and then falling by this factor;
# prices are nearly linear in it, and extrapolated.
_FIRST_STAGE = 0.03
_SHRINK = 0.1
# And at least this.
_LAST_STAGE = 1e-9


class _Problem(NamedTuple):
    """Scores from which prices are taken off; those of slack are -inf if there is none.

    The best matching has score zero, and no pair and no slack has more.
    """

    pairs: Tensor  # (b, s, t)
    rows: Tensor  # (b, s)
    columns: Tensor  # (b, t)
    perfect: bool


class _State(NamedTuple):
    """Prices, what rows and slack of columns make of them, and the dual objective."""

    v: Tensor  # (b, t)
    rows: Rows
    slack: Tensor  # (b, t)
    value: Tensor  # (b,)
    error: Tensor  # (b, t), what columns lack


def fractional_maximum(
    scores: Tensor,  # (*lead, s, t) float64
    mask: Tensor,  # (*lead, s, t) bool
    free: tuple[Tensor, Tensor],  # (*lead, s), (*lead, t) bool
    gamma: Tensor,  # (*lead)
) -> tuple[Tensor, Tensor]:  # (*lead), (*lead, s, t)
    r"""Value and place of a maximum over matrices of unit row and column sums.

    .. math:: \max_B \sum_{ij} B_{ij} X_{ij} - \sum B \log B
        + \gamma \sum (1 - B) \log (1 - B)

    with the entropies -r log r of slack where there is some. For gamma at most one this
    is concave in B, row by row, though not cell by cell. So the multipliers of the
    column sums are left: their dual function is convex and smooth for gamma < 1, and
    Newton's method on it, with a line search, converges from anywhere. The column sums
    certify the solution: all other conditions hold exactly.

    Differentiable twice; the gradient of the value is B.
    """
    value, B, *_ = _Maximum.apply(  # type: ignore[no-untyped-call]
        scores, mask, free[0][..., None], free[1][..., None, :], gamma[..., None, None]
    )
    return value, B


class _Maximum(torch.autograd.Function):
    """Value, B, and what the derivative of B needs."""

    @staticmethod
    def forward(
        scores: Tensor,  # (*lead, s, t)
        mask: Tensor,  # (*lead, s, t)
        free_rows: Tensor,  # (*lead, s, 1)
        free_columns: Tensor,  # (*lead, 1, t)
        gamma: Tensor,  # (*lead, 1, 1)
    ) -> tuple[Tensor, ...]:
        *lead, s, t = scores.shape
        x = torch.where(mask, scores, -torch.inf).reshape(-1, s, t)
        rows = free_rows.expand(*lead, s, 1).reshape(-1, s)
        columns = free_columns.expand(*lead, 1, t).reshape(-1, t)
        u, v = dual_prices(x, rows, columns)
        problem = _Problem(
            (x - v[:, None, :] - u[..., None]).clamp_max(0.0),  # but for rounding
            torch.where(rows, -u, -torch.inf),
            torch.where(columns, -v, -torch.inf),
            not bool(rows.any() or columns.any()),
        )
        state = _solve(problem, gamma.expand(*lead, 1, 1).reshape(-1, 1))
        log_b = state.rows.log_b
        return (
            (state.value + u.sum(-1) + v.sum(-1)).reshape(lead),
            log_b.exp().reshape(scores.shape),
            log_b.reshape(scores.shape),
            state.rows.log_slack.reshape(*lead, s, 1),
            state.rows.odds.reshape(*lead, s, 1),
            state.slack.reshape(*lead, 1, t),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[1:], inputs[4])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        to_value, to_B = gradients[:2]
        B, *state = ctx.saved_tensors
        g = None if to_value is None else to_value[..., None, None] * B
        if to_B is not None:
            change = _Response.apply(to_B, B, *state)  # type: ignore[no-untyped-call]
            g = change if g is None else g + change
        return g, *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        moved = to_front(info, in_dims, arguments)
        return _Maximum.apply(*moved), (0,) * 6  # type: ignore[no-untyped-call]


class _Response(torch.autograd.Function):
    """How B changes with the scores: a symmetric matrix times a change of them."""

    @staticmethod
    def forward(
        change: Tensor,  # (*lead, s, t)
        B: Tensor,  # (*lead, s, t)
        log_b: Tensor,  # (*lead, s, t)
        log_slack: Tensor,  # (*lead, s, 1)
        odds: Tensor,  # (*lead, s, 1)
        slack: Tensor,  # (*lead, 1, t)
        gamma: Tensor,  # (*lead, 1, 1)
    ) -> Tensor:
        largest = log_b == log_b.amax(-1, keepdim=True)
        largest &= largest.cumsum(-1) == 1  # the first of equals, as the solver has it
        odds, log_slack = odds[..., 0], log_slack[..., 0]
        H = curvature(Rows(log_b, log_slack, odds, largest, odds), gamma[..., 0])
        moved = H.times(change)
        total = H.total() + torch.diag_embed(slack[..., 0, :] + _TINY)
        perfect = bool((slack == 0).all() and (log_slack == -torch.inf).all())
        v = _solved(total, moved.sum(-2), perfect)
        return moved - H.times(v[..., None, :].expand_as(moved))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        raise NotImplementedError(
            "an approximate log permanent can be differentiated twice, not three times."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        moved = to_front(info, in_dims, arguments)
        return _Response.apply(*moved), 0  # type: ignore[no-untyped-call]


def _solve(problem: _Problem, gamma: Tensor) -> _State:
    """Newton's method at falling 1 - gamma, from the prices of the best matching."""
    left = (1 - gamma).clamp_min(_LAST_STAGE)  # (b, 1)
    stage = left.clamp_min(_FIRST_STAGE)
    v = torch.zeros_like(problem.columns)
    before, stage_before = v, stage
    iterations = 0
    while True:
        state, steps = _newton(problem, v, 1 - stage)
        iterations += steps
        if bool((stage <= left).all()):
            break
        smaller = torch.maximum(stage * _SHRINK, left)
        moved = torch.where(stage_before > stage, stage - stage_before, torch.inf)
        v = state.v + (state.v - before) / moved * (smaller - stage)
        before, stage_before, stage = state.v, stage, smaller
    residual = float(state.error.abs().amax()) if state.error.numel() else 0.0
    if not residual <= _ACCEPTED:
        warn(
            ConvergenceWarning(
                residual,
                iterations,
                _ACCEPTED,
                solver="An approximate log permanent",
                remedy="Its value is too large by up to about this times the spread of "
                "the scores. Scale the scores down; up to 20 items, use log_permanent.",
            )
        )
    return state


def _newton(problem: _Problem, v: Tensor, gamma: Tensor) -> tuple[_State, int]:
    """Minimise the dual function; elements that are done stay where they are."""
    state = _evaluate(problem, v, gamma, None)
    steps = 0
    while steps < _MOST_STEPS:
        error, slack = state.error, state.slack
        going = error.abs().amax(-1) > _TOLERANCE
        if not bool(going.any()):
            break
        steps += 1
        # What is added leaves quadratic convergence, as it falls with the error, and
        # keeps steps short where the dual is nearly flat.
        damping = error.abs() / _LONGEST_STEP + _TINY
        total = curvature(state.rows, gamma).total()
        total = total + torch.diag_embed(slack + damping)
        step = -_solved(total, error, problem.perfect)
        slope = (error * step).sum(-1)
        size = torch.ones_like(slope)
        rounding = 1e-14 * (1 + state.value.abs())
        for _ in range(_MOST_HALVINGS):
            new = state.v + size[:, None] * step
            trial = _evaluate(problem, new, gamma, state.rows.odds)
            most = state.value + 1e-4 * size * slope + rounding
            good = ~going | (trial.value <= most)
            if bool(good.all()):
                break
            size = torch.where(good, size, size / 2)
        else:
            # Rounding is all that is left to some: they stop, with the error they have.
            going = going & good
            if not bool(going.any()):
                break
        state = _where(going, trial, state)
    return state, steps


def _evaluate(
    problem: _Problem, v: Tensor, gamma: Tensor, odds: Tensor | None
) -> _State:
    rows = solve_rows(problem.pairs - v[:, None, :], problem.rows, gamma, odds)
    slack = (problem.columns - v - 1).exp()
    value = v.sum(-1) + rows.value.sum(-1) + slack.sum(-1)
    return _State(v, rows, slack, value, 1 - rows.log_b.exp().sum(-2) - slack)


def _where(condition: Tensor, new: _State, old: _State) -> _State:
    """The one state where a condition holds, and the other elsewhere."""

    def chosen(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(condition.reshape(-1, *(1,) * (x.dim() - 1)), x, y)

    rows = Rows(*(chosen(x, y) for x, y in zip(new.rows, old.rows, strict=True)))
    return _State(
        chosen(new.v, old.v),
        rows,
        chosen(new.slack, old.slack),
        chosen(new.value, old.value),
        chosen(new.error, old.error),
    )


def _solved(
    total: Tensor,  # (*lead, t, t)
    right: Tensor,  # (*lead, t)
    perfect: bool,
) -> Tensor:  # (*lead, t)
    """Solve with the curvature of the dual, scaled to a unit diagonal.

    Without slack constants are in its kernel, and orthogonal to the right-hand side.
    """
    scale = total.diagonal(dim1=-2, dim2=-1).rsqrt()
    total = total * scale[..., :, None] * scale[..., None, :]
    if perfect:
        kernel = 1 / scale
        kernel = kernel / torch.linalg.vector_norm(kernel, dim=-1, keepdim=True)
        total = total + kernel[..., :, None] * kernel[..., None, :]
    solution: Tensor = torch.linalg.solve(total, (scale * right)[..., None])
    return scale * solution[..., 0]
