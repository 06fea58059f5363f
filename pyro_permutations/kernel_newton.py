# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Newton steps that scale a positive kernel of unit row sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MOST_STEPS",
    "STAGE_TOLERANCE",
    "State",
    "System",
    "Ties",
    "conjugate_gradients",
    "factorized",
    "few",
    "large",
    "mapped",
    "newton",
    "replaced",
    "small",
    "times",
]

# The largest error of a sum that a temperature on the way is left with.
STAGE_TOLERANCE = 0.1
MOST_STEPS = 60
# No potential moves further in one step; and none further than that since the kernel
# was made, which is raised to a floor where it is less.
_LONGEST = 20.0
_FARTHEST = 60.0
# Elements that are done are left out where at most this share goes on, and where there
# are more entries than this.
_SHARE = 0.5
_MANY = 2**15


# What rows (b, 1, n) have in common with the slack, and columns (b, 1, m).
Ties = tuple[Tensor, ...]


class System(NamedTuple):
    """A kernel, or its logarithm, and what its scaling is to add up to."""

    kernel: Tensor  # (b, n, m)
    leaks: Ties | None
    rows: Tensor  # (b, 1, n)
    columns: Tensor  # (b, 1, m)
    scratch: Tensor | None = None  # (b, n, m), for squares: fresh memory is slow

    def at(self, index: Tensor) -> System:
        """The systems of some batch elements."""
        everyone = len(index) == len(self.kernel)
        # Far faster than kernel[index].
        some = self.kernel if everyone else self.kernel.index_select(0, index)
        leaks = None if self.leaks is None else tuple(x[index] for x in self.leaks)
        return System(some, leaks, self.rows[index], self.columns[index])


class State(NamedTuple):
    """Where the scaling of a system has come to."""

    v: Tensor  # (b, 1, m)
    u: Tensor  # (b, 1, n), so that rows are exact
    sums: Tensor  # (b, 1, m), of columns
    error: Tensor  # (b, 1, 1)
    direct: Tensor  # (b, 1, 1) bool


def newton(
    system: System, target: Tensor, direct: Tensor, mild: bool
) -> tuple[State, int]:
    """Scale a kernel from nothing; and the number of steps."""
    v = torch.ones_like(system.columns)
    u, sums = system.rows.clone(), times(system.rows, system.kernel)  # of unit rows
    if system.leaks is not None:
        sums += system.leaks[1]
    # Sweeps converge linearly; while they cut the error they are cheaper.
    steps = 1
    while mild and steps < 5:
        v = v * (system.columns / sums)
        u, sums = _sweep(system, v)
        steps += 1
    state = State(v, u, sums, _error(sums, system.columns), direct)
    return _iterated(system, state, target, mild, steps, 0.0)


def small(kernel: Tensor) -> bool:
    """Whether to factorize rather than iterate: the rule that chooses.

    Up to 48 columns a Cholesky factorization costs less than the few products with a
    vector that conjugate gradients take. Larger ones iterate, and where that is slow
    an element is factorized from then on.
    """
    return int(kernel.shape[-1]) <= 48


def few(going: Tensor) -> bool:
    """Whether it pays to leave out the others."""
    return int(going.count_nonzero()) <= _SHARE * len(going)


def large(kernel: Tensor) -> bool:
    """Whether a copy costs less than the calls that make it."""
    return kernel.numel() > _MANY


def mapped(x: Tensor) -> bool:
    """Whether ``vmap`` maps over a tensor, which has no numbers of its own then."""
    try:
        x.data_ptr()
    except RuntimeError:
        return True
    return False


def replaced(
    tensors: tuple[Tensor, ...], index: Tensor, others: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Tensors with those of some batch elements put in their places."""
    pairs = zip(tensors, others, strict=True)
    return tuple(x.index_copy_(0, index, y) for x, y in pairs)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """A row vector times a matrix: on CPUs far faster than the other way round."""
    return torch.bmm(x, matrix)


def factorized(system: System, u: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """Solve (diag(sums) - P' diag(1 / r) P) d = b for P = diag(u) K diag(v).

    By Cholesky, the diagonal a sum of what is off it, with a ridge of 1e-14; slack is
    a tie to the ground, by way of a row or of its own.
    """
    kernel, leaks, rows, *_ = system
    p = (kernel * (u * rows.rsqrt()).mT).mul_(v)
    laplacian = torch.bmm(p.mT, p).neg_()
    diagonal = laplacian.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    off = laplacian.sum(-1)
    if leaks is not None:
        ground = times(leaks[0] * u * rows.rsqrt(), p) + v * leaks[1]
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
    return torch.cholesky_solve(b.mT, factor).mT


def conjugate_gradients(
    system: System,
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
    kernel, _, rows, *_ = system
    w = u.square() / rows
    squares = kernel.square() if squares is None else squares
    inverse = (sums - v.square() * times(w, squares)).clamp_min(1e-10).reciprocal()
    x, r = torch.zeros_like(b), b
    p = z = r * inverse
    rz = (r * z).sum(-1, keepdim=True)
    largest = r.abs().amax(-1, keepdim=True)
    # To look at the error costs nothing on a CPU, and elsewhere a synchronisation.
    every = 1 if kernel.device.type == "cpu" else 8
    for k in range(max(32, kernel.shape[-1] // 4)):
        going = largest > stop
        if k % every == 0 and not bool(going.any()):
            break
        through = times(w * times(v * p, kernel.mT), kernel)
        ap = torch.addcmul(sums * p, v, through, value=-1)
        step = rz / (p * ap).sum(-1, keepdim=True).clamp_min(1e-300)
        step = torch.where(going, step, 0.0)
        x = torch.addcmul(x, step, p)
        r = torch.addcmul(r, step, ap, value=-1)
        z = r * inverse
        rz, last = (r * z).sum(-1, keepdim=True), rz
        p = torch.addcmul(z, rz / last.clamp_min(1e-300), p)
        largest = r.abs().amax(-1, keepdim=True)
    return x, ~(largest <= stop)  # NaN too


def _iterated(
    system: System,
    state: State,
    target: Tensor,
    mild: bool,
    steps: int,
    travelled: float,
) -> tuple[State, int]:
    """Steps until errors are below the target or v is far from where it was."""
    kernel, columns = system.kernel, system.columns
    squares = None
    while steps < MOST_STEPS and travelled < _FARTHEST:
        left = state.error > target
        if not bool(left.any()):
            break
        # On the way further steps improve what is done, for the next temperature.
        if large(kernel) and few(left := left | (target >= STAGE_TOLERANCE)):
            squares, index = None, left.flatten().nonzero()[:, 0]
            some = system.at(index), State(*(x[index] for x in state)), target[index]
            inner, steps = _iterated(*some, mild, steps, travelled)
            state = State(*replaced(state, index, inner))
            break
        v, u, sums, error, direct = state
        if mild and steps < 12:
            v = v * (columns / sums)
            u, sums = _sweep(system, v)
            smaller = _error(sums, columns)
            mild = bool(((smaller < 0.6 * error) | (smaller <= target)).all())
        else:
            lacking = columns - sums
            if not bool(direct.all()):
                if squares is None:
                    squares = torch.square(kernel, out=system.scratch)
                stop = _close_enough(lacking, target)
                stop = torch.where(direct, torch.inf, stop)
                move, slow = conjugate_gradients(
                    system, u, v, sums, lacking, stop, squares
                )
                direct = direct | slow
            if bool(direct.all()):
                move = factorized(system, u, v, lacking)
            elif bool(direct.any()):
                squares, index = None, direct.flatten().nonzero()[:, 0]
                slow_ones = (x[index] for x in (u, v, lacking))
                move[index] = factorized(system.at(index), *slow_ones)
            length = float(move.abs().amax())
            if length > 1.5:
                v, sums = _line_search(system, v, lacking, move)
                v = v * (columns / sums)
            else:
                v = v * move.exp()
            travelled += min(length, _LONGEST)
            u, sums = _sweep(system, v)
        state = State(v, u, sums, _error(sums, columns), direct)
        steps += 1
    return state, steps


def _sweep(system: System, v: Tensor) -> tuple[Tensor, Tensor]:
    """U that makes the rows exact, and what the columns add up to then."""
    kernel, leaks, rows, *_ = system
    if leaks is None:
        u = rows / times(v, kernel.mT)
        return u, v * times(u, kernel)
    u = rows / (times(v, kernel.mT) + leaks[0])
    return u, v * (times(u, kernel) + leaks[1])


def _error(sums: Tensor, columns: Tensor) -> Tensor:  # (b, 1, 1)
    return (sums - columns).abs().amax(-1, keepdim=True)


def _line_search(
    system: System, v: Tensor, lacking: Tensor, move: Tensor
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
