# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The algorithm behind the Sinkhorn operator: temperature scaling and Newton steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_permutations.log_elimination import eliminate_in_logs
from pyro_permutations.resistor_network import Network

__all__ = ["Solution", "solve"]

# Newton stops when its next step would move no log potential by more than this; it has
# converged quadratically by then, so that what is left is about the square.
_LAST_STEP = 3e-5
# At a stage on the way it is enough that the next one starts within reach.
_STAGE_STEP = 0.3
# No log potential moves by more in one step, relative to the others.
_LONGEST_STEP = 4.0
_MOST_STEPS = 200


class Solution(NamedTuple):
    """A scaled matrix and how it was reached."""

    log_p: Tensor  # (b, n, m)
    residual: float
    iterations: int


def solve(
    scores: Tensor,  # (b, n, m), -inf where forbidden
    rows: Tensor,  # (b, n)
    columns: Tensor,  # (b, m)
    root: Tensor,  # (b, m)
    tol: float,
) -> Solution:
    """Scale exp(scores) to the given row and column sums, in float64.

    The state is log P itself, with rows exact: dividing the temperature by two doubles
    it, up to a new balancing. Each stage balances it by Newton steps on the column
    potentials; the first stage is at a temperature where that converges from nothing.
    """
    log_rows = rows.log()[..., None]
    scale = _first_scale(scores)
    log_p = _normalise_rows(scores * scale[:, None, None], log_rows)
    growth = 4.0 if scores.shape[-1] <= 48 else 2.0
    previous, previous_scale = log_p, torch.zeros_like(scale)
    square = bool((rows == 1).all() and (columns == 1).all())
    iterations = 0
    while True:
        last = scale == 1
        target = torch.where(last, min(_LAST_STEP, tol**0.5 / 10), _STAGE_STEP)
        log_p, steps = _newton(log_p, log_rows, columns, root, target, square)
        iterations += steps
        if bool(last.all()):
            break
        larger = (scale * growth).clamp_max(1.0)
        larger = torch.where(larger > 0.7, 1.0, larger)
        ahead = _extrapolate(log_p, previous, scale, previous_scale, larger)
        previous, previous_scale = log_p, scale
        log_p, scale = _normalise_rows(ahead, log_rows), larger
    residual = (log_p.exp().sum(-2) - columns).abs().amax() if log_p.numel() else None
    return Solution(log_p, 0.0 if residual is None else residual.item(), iterations)


def _first_scale(scores: Tensor) -> Tensor:
    """The inverse temperature of the first stage, 1 where the scores are mild."""
    allowed = scores > -torch.inf
    count = allowed.sum((-2, -1)).clamp_min(1)
    values = torch.where(allowed, scores, 0.0)
    mean = values.sum((-2, -1), keepdim=True) / count[:, None, None]
    centred = torch.where(allowed, values - mean, 0.0)
    # Scale-free: squares of scores of 1e200 would overflow.
    largest = centred.abs().amax((-2, -1)).clamp_min(1e-300)
    relative = (centred / largest[:, None, None]).square().sum((-2, -1)) / count
    return (1.6 / (largest * relative.sqrt()).clamp_min(1e-300)).clamp_max(1.0)


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


def _newton(
    log_p: Tensor,
    log_rows: Tensor,
    columns: Tensor,
    root: Tensor,
    target: Tensor,
    square: bool,
) -> tuple[Tensor, int]:
    """Newton steps until the last one was below the target, element by element."""
    log_p = _normalise_rows(
        log_p + (columns.log() - torch.logsumexp(log_p, -2))[:, None, :], log_rows
    )
    active = torch.arange(len(log_p), device=log_p.device)
    steps = 0
    while len(active) and steps < _MOST_STEPS:
        part = log_p[active]
        move = _step(part, columns[active], root[active], square)
        size = move.abs().amax((-2, -1))
        move = move * (_LONGEST_STEP / size.clamp_min(_LONGEST_STEP))[:, None, None]
        part = _normalise_rows(part + move, log_rows[active])
        log_p = log_p.index_copy(0, active, part)
        active = active[size > target[active]]
        steps += 1
    return log_p, steps


def _step(log_p: Tensor, columns: Tensor, root: Tensor, square: bool) -> Tensor:
    """The Newton step h of the column potentials, as h_j - h_reference(i).

    The reference of row i is the column of its largest entry, so that the change of
    what is nearly decided is a small number and not a difference of large ones.
    """
    network = Network(log_p, root)
    p = log_p.exp()
    reference = log_p.argmax(-1)
    b = columns - p.sum(-2)
    factor, scale, accurate = network.cholesky()
    matched = torch.zeros_like(accurate)
    if square:
        order = reference.argsort(-1)
        counts = reference.gather(-1, order)
        matched = (counts == torch.arange(p.shape[-1], device=p.device)).all(-1)
        flows = _imbalance(p, order)
        b = torch.where(matched[:, None], flows.sum(-1), b)
    accurate = accurate & (matched | (scale.amax(-1) < 1e3))
    h = network.potentials(factor, scale, b * (-network.log_scale).exp()[:, None])
    differences = h - h.mT
    move = differences.mT.gather(1, reference[..., None].expand_as(log_p))
    for index, part, extreme in network.apart(accurate):
        if square:
            better = _balancing(part, matched[index], reference[index], extreme)
        else:
            better = _refilling(part, b[index], reference[index])
        move = move.index_copy(0, index, better)
    return move


def _balancing(
    network: Network, matched: Tensor, matching: Tensor, extreme: bool
) -> Tensor:
    """The same step from pairwise flows, in which what clusters exchange cancels."""
    for k in (~matched).nonzero()[:, 0].tolist():
        cost = -network.log_weights[k].cpu().numpy()
        found = linear_sum_assignment(cost)[1].astype(np.int64)
        matching[k] = torch.from_numpy(found).to(matching.device)
    if extreme:
        # The step carries off the flow of the matching, here relative to P.
        log_p = network.log_weights
        change = torch.zeros_like(log_p)
        matched_log = log_p.gather(-1, matching[..., None])
        change.scatter_(-1, matching[..., None], (-matched_log).exp())
        moved = eliminate_in_logs(log_p, network.root, change)[1]
        return moved - moved.gather(-1, matching[..., None])
    source = _imbalance(network.p * network.rows[..., None], matching.argsort(-1))
    differences = network.differences(source)
    return differences.mT.gather(1, matching[..., None].expand_as(network.p))


def _refilling(network: Network, b: Tensor, reference: Tensor) -> Tensor:
    """The same step for any marginals: what columns lack comes from their root."""
    lacking = b * (-network.log_scale).exp()[:, None]
    to_root = lacking[:, :, None] * network.root[:, None, :].to(b.dtype)
    differences = network.differences(to_root - to_root.mT)
    return differences.mT.gather(1, reference[..., None].expand_as(network.p))


def _imbalance(p: Tensor, order: Tensor) -> Tensor:
    """F_jk - F_kj, where F_jk is the flow from j to k: p in the row matched to j."""
    flow = p.gather(1, order[..., None].expand_as(p))
    return flow - flow.mT
