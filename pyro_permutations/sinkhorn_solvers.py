# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The algorithm behind the Sinkhorn operator: temperature scaling and Newton steps."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_permutations.kernel_scaling import scale_kernel
from pyro_permutations.log_elimination import eliminate_in_logs
from pyro_permutations.matching import best_assignments
from pyro_permutations.matching_graph import WIRE
from pyro_permutations.resistor_network import Network

__all__ = ["Solution", "last_step", "solve"]

# Newton stops when its next step would move no log potential by more than this; it has
# converged quadratically by then, so that what is left is about the square.
_LAST_STEP = 3e-6
# At a stage on the way it is enough that the next one starts within reach. Not one: far
# from balance, where flows differ by a gap, a step is 1 - exp(-gap) whatever the gap.
_STAGE_STEP = 0.5
# How exact a step is: two digits will do far from the end, not after a step of 1e-2.
_ROUGH = 1e-2
_EXACT = 1e-10
_NEAR = 1e-2
# And how far rounding of the flows themselves may move it.
_ROUNDED = 3e-7
# No log potential moves by more in one step, relative to the others.
_LONGEST_STEP = 4.0
_MOST_STEPS = 200
# The first inverse temperature is such that no score is further below the best of its
# row. No tie is too weak for a kernel then, and products with a vector do better than
# factorizations. (In standard deviations that is colder the heavier the tails are; from
# there those of Cauchy's do not converge.)
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
    best = _BestMatching(scores, slack) if square else None
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


class _BestMatching:
    """The best matching of the scores, found when it is first asked for.

    Any matching may serve as the reference for flows; this one is where P tends to.
    What is unmatched is matched to the slack, and the slack row to its column.
    """

    def __init__(self, scores: Tensor, slack: bool) -> None:
        self.scores, self.slack = scores, slack

    @cached_property
    def indices(self) -> Tensor:  # (b, n)
        scores = self.scores.cpu().numpy()
        if self.slack:
            free = scores[:, :-1, -1] > -np.inf, scores[:, -1, :-1] > -np.inf
            found = best_assignments(scores[:, :-1, :-1], free)
            last = scores.shape[-1] - 1
            found = np.pad(found, ((0, 0), (0, 1)), constant_values=-1)
            found = np.where(found < 0, last, found)
        else:
            found = best_assignments(scores)
        return torch.from_numpy(found).to(self.scores.device)


def _newton(
    log_p: Tensor,
    log_rows: Tensor,
    columns: Tensor,
    root: Tensor,
    target: Tensor,
    best: _BestMatching | None,
    active: Tensor,  # (k,) of the batch
) -> tuple[Tensor, int, Tensor]:
    """Newton steps until the last one was below the target, element by element.

    Returns log P, the number of steps and, where these ran out, the length of the last.
    """
    chosen, tolerance = active, torch.full_like(target[active], _ROUGH)
    steps, left = 0, torch.zeros_like(target, dtype=log_p.dtype)
    while len(active) and steps < _MOST_STEPS:
        everyone = len(active) == len(log_p)
        part = log_p if everyone else log_p[active]
        # Named nowhere, so that it is gone before the next.
        given = part, root[active], log_rows[active][..., 0]
        if best is None:
            move = _filling_step(Network(*given), columns[active], tolerance)
        else:
            move = _balancing_step(Network(*given), tolerance, best, active)
        size = move.abs().amax((-2, -1))
        move *= (_LONGEST_STEP / size.clamp_min(_LONGEST_STEP))[:, None, None]
        part = _normalise_rows(part + move, log_rows[active])
        log_p = part if everyone else log_p.index_copy(0, active, part)
        # The first steps need a direction only, the last ones an exact one; a step is
        # the last if it was exact and short.
        rounding = 1e-15 * part.nan_to_num(neginf=0.0).abs_().amax((-2, -1))
        short = size < target[active]
        exact = (tolerance == _EXACT) | (target[active] == _STAGE_STEP)
        tolerance = torch.where(size < _NEAR, _EXACT, tolerance)
        going = ~(short & exact) & (size > rounding)
        left[active] = torch.where(going, size, 0.0)
        active, tolerance = active[going], tolerance[going]
        steps += 1
    return log_p, steps, left[chosen]


def _balancing_step(
    network: Network, tolerance: Tensor, best: _BestMatching, active: Tensor
) -> Tensor:
    """The Newton step h of the column potentials to unit sums, as h_j - h_pi(i).

    With pi a matching and F_jk = P_ij, pi(i) = j, the flow from j to k, the sums are
    one where flows balance: sum_k F_jk = sum_k F_kj. So nothing is subtracted from one,
    and what is nearly decided changes by a small number, not by a difference of large
    ones. What the clusters of a near-permutation exchange among themselves cancels pair
    by pair in :meth:`Network.carried_off`.
    """
    slack = best.slack
    unit = (-network.log_scale).exp()[:, None]
    matching = network.p.argmax(-1)
    decided = _owners(network, matching, slack)[1]
    ties = network.conductances.sum(-1) / unit
    weak = (ties.masked_fill(network.root, 1.0) < 1e-6).any(-1)
    ask = weak & ~decided
    if bool(ask.any()):
        matching = torch.where(ask[:, None], best.indices[active], matching)
    # Undecided but nowhere weak: one less the column sum is as good.
    sums = _column_sums(network, slack)
    b, summed = (1 - sums) * unit, (1 + sums) * unit
    flows = (decided | ask)[:, None]
    if bool(flows.any()):
        source = _imbalance(network, matching, slack)
        b = torch.where(flows, source.sum(-1), b)
        summed = torch.where(flows, source.abs_().sum(-1), summed)
        del source
    factor, scale, accurate = network.cholesky(tolerance)
    accurate &= _resolves(network, factor, scale, summed, tolerance)
    move = _relative(network.potentials(factor, scale, b)[..., 0], matching)
    del factor
    for index, part, extreme in network.apart(accurate):
        pi = matching[index]
        other = (~(decided | ask))[index]
        if bool(other.any()):
            pi = torch.where(other[:, None], best.indices[active[index]], pi)
        if extreme:
            better = _extreme_step(part, pi, slack)
        else:
            better = _relative(part.carried_off(_imbalance(part, pi, slack)), pi)
        move = move.index_copy(0, index, better)
    return move


def _owners(
    network: Network, matching: Tensor, slack: bool
) -> tuple[Tensor, Tensor]:  # (b, m), (b,)
    """The row of each column, and whether no column has two rows or none.

    With slack a column without a row has that of the slack, if that is its largest.
    """
    n, m = network.p.shape[-2:]
    rows = torch.arange(n, device=matching.device).expand_as(matching)
    ones = torch.ones_like(matching)
    count = matching.new_zeros(len(matching), m).scatter_add_(-1, matching, ones)
    owner = matching.new_full((len(matching), m), n - 1)
    owner.scatter_(-1, matching, rows)
    if not slack:
        return owner, (count == 1).all(-1)
    owner[:, -1] = n - 1
    most = network.log_weights[:, :-1].amax(-2)
    left = (count == 0) & (network.log_weights[:, -1] >= most)
    return owner, ((count == 1) | left)[:, :-1].all(-1)


def _column_sums(network: Network, slack: bool) -> Tensor:
    if not slack:
        return network.p.sum(-2)
    return network.p[:, :-1].sum(-2) + math.exp(WIRE) * network.p[:, -1]


def _resolves(
    network: Network, factor: Tensor, scale: Tensor, summed: Tensor, tolerance: Tensor
) -> Tensor:  # (b,)
    """Whether a source stands out from the rounding of what was summed for it.

    The inverse Laplacian has no negative entry, so that the potentials of the sizes
    bound those of the errors.
    """
    noise = network.potentials(factor, scale, 1e-16 * summed).amax((-2, -1))
    return noise < torch.where(tolerance == _EXACT, _ROUNDED, _ROUGH)


def _extreme_step(network: Network, matching: Tensor, slack: bool) -> Tensor:
    """The same from logarithms: the step carries off the flow of the matching."""
    log_p, pi = network.log_weights, matching[..., None]
    relative = torch.full_like(log_p, -torch.inf)
    relative.scatter_(-1, pi, -log_p.gather(-1, pi))
    if slack:
        # To each column without a row a unit comes from the slack, over the wire.
        owner, _ = _owners(network, matching, slack)
        unmatched = owner == log_p.shape[-2] - 1
        relative[:, -1] = torch.where(unmatched, -log_p[:, -1], -torch.inf)
        relative[:, -1, -1] = 0.0
    # Of a step that would be longer than exp(600) the direction will do.
    change = (
        relative - (relative.amax((-2, -1), keepdim=True) - 600.0).clamp_min(0)
    ).exp()
    moved = eliminate_in_logs(log_p, network.root, change)[1]
    return moved - moved.gather(-1, pi)


def _imbalance(network: Network, matching: Tensor, slack: bool) -> Tensor:
    """F_jk - F_kj, where F_jk is the flow from j to k: p in the row matched to j.

    All that is matched to the slack flows out of the slack column. In the unit of the
    network's conductances.
    """
    p = network.p
    owner, _ = _owners(network, matching, slack)
    flow = p.gather(1, owner[..., None].expand(*owner.shape, p.shape[-1]))
    if slack:
        weight = (matching == p.shape[-1] - 1).to(p.dtype)
        weight[:, -1] = math.exp(WIRE)
        flow[:, -1] = (weight[:, None, :] @ p)[:, 0]
    return (flow - flow.mT).mul_((-network.log_scale).exp()[:, None, None])


def _filling_step(network: Network, columns: Tensor, tolerance: Tensor) -> Tensor:
    """The Newton step to any column sums, relative to each row's largest entry."""
    largest = network.log_weights.argmax(-1)
    sums = (network.p.mT @ network.rows[..., None])[..., 0]
    columns = columns * (-network.log_scale).exp()[:, None]
    b = columns - sums
    factor, scale, accurate = network.cholesky(tolerance)
    move = _relative(network.potentials(factor, scale, b)[..., 0], largest)
    for index, part, _ in network.apart(accurate):
        # What a column lacks comes from the root of its component.
        lacking = b[index] * (network.log_scale[index] - part.log_scale).exp()[:, None]
        source = lacking[:, :, None] * part.root[:, None, :].to(b.dtype)
        h = part.carried_off(source - source.mT)
        move = move.index_copy(0, index, _relative(h, largest[index]))
    return move


def _relative(h: Tensor, columns: Tensor) -> Tensor:  # (b, m), (b, n) -> (b, n, m)
    """Potentials relative to that of a column of each row."""
    return h[:, None, :] - h.gather(-1, columns)[..., None]
