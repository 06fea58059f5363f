# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""One Newton step of the column potentials, on a network of resistors."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyro_permutations.log_elimination import eliminate_in_logs
from pyro_permutations.matching import best_assignments
from pyro_permutations.matching_graph import WIRE
from pyro_permutations.resistor_network import Network

__all__ = ["EXACT", "ROUGH", "BestMatching", "balancing_step", "filling_step"]

# How exact a step is: two digits will do far from the end, not after a step of 1e-2.
ROUGH = 1e-2
EXACT = 1e-10
# And how far rounding of the flows themselves may move it.
_ROUNDED = 3e-7


class BestMatching:
    """The best matching of the scores, found when it is first asked for.

    Any matching may serve as the reference for flows; this one is where P tends to.
    What is unmatched is matched to the slack, and the slack row to its column.
    """

    def __init__(self, scores: Tensor, slack: bool) -> None:
        self.scores, self.slack = scores, slack

    @cached_property
    def indices(self) -> Tensor:  # (b, n)
        """The column of each row."""
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


def balancing_step(
    network: Network, tolerance: Tensor, best: BestMatching, active: Tensor
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


def filling_step(network: Network, columns: Tensor, tolerance: Tensor) -> Tensor:
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
    return noise < torch.where(tolerance == EXACT, _ROUNDED, ROUGH)


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


def _relative(h: Tensor, columns: Tensor) -> Tensor:  # (b, m), (b, n) -> (b, n, m)
    """Potentials relative to that of a column of each row."""
    return h[:, None, :] - h.gather(-1, columns)[..., None]
