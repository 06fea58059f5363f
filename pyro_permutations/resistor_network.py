# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Laplacian of a bipartite network of resistors, at weights of any range."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import threshold

from pyro_permutations.log_elimination import eliminate_in_logs

__all__ = ["Network"]

# A factorization may be off by so much, as its test shows, where the result has to be
# right, rather than a direction for a next step.
_ACCURATE = 1e-11
_ACCURATE_SOLVE = 1e-9  # for gradients
# Below this elimination may have lost conductances to underflow.
_WEAKEST_PIVOT = 1e-250


class Network:
    """A batch of bipartite networks of resistors, flattened to (batch, n, m).

    The rows are eliminated first: with K = r p (p of unit row sums) the columns see
    the conductances p' diag(r) p, sums of positive terms. What is left is a Laplacian
    over the columns, factored by Cholesky where that is accurate and eliminated
    without subtraction where it is not.
    """

    def __init__(
        self, log_weights: Tensor, root: Tensor, log_rows: Tensor | None = None
    ) -> None:
        """Log weights (*batch, n, m), roots (*batch, m), row sums if they are known."""
        n, m = log_weights.shape[-2:]
        self.root = root.expand(*log_weights.shape[:-2], m).reshape(-1, m)
        self.log_weights = log_weights = log_weights.reshape(-1, n, m)
        if log_rows is None:
            log_rows = torch.logsumexp(log_weights, -1)
        self.log_scale = log_rows.amax(-1)
        self.p = (log_weights - log_rows[..., None]).exp()
        self.rows = (log_rows - self.log_scale[..., None]).exp()
        self.log_rows = log_rows
        self.conductances = _products(self.p, self.rows)
        self.conductances.diagonal(dim1=-2, dim2=-1).zero_()
        self._elimination: tuple[Tensor, Tensor, Tensor] | None = None

    def subset(self, index: Tensor) -> Network:
        """The networks of some batch elements."""
        part = copy(self)
        part._elimination = None
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(part, name, value[index])
        return part

    def cholesky(
        self, tolerance: float | Tensor = _ACCURATE
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Factor of the scaled, grounded Laplacian, its scaling, and who may use it.

        Grounded, the Laplacian maps ones to the conductances between each column and
        its root. These are had without a subtraction, so that solving for them must
        give ones, and shows what rounding has done to the pivots.
        """
        ground = self.root.to(self.p.dtype)
        free = 1 - ground
        diagonal = self.conductances.sum(-1) * free + ground
        scale = diagonal.clamp_min(1e-300).rsqrt()
        off = scale * free
        laplacian = (self.conductances * off[..., None, :]).mul_(-off[..., :, None])
        laplacian.diagonal(dim1=-2, dim2=-1).copy_(diagonal > 0)
        factor, info = torch.linalg.cholesky_ex(laplacian)
        accurate = (info == 0) & (diagonal.amin(-1) > _WEAKEST_PIVOT)
        if not bool(accurate.all()):
            identity = torch.eye(factor.shape[-1]).to(factor)
            factor = torch.where(accurate[:, None, None], factor, identity)
        tied = (self.conductances @ ground[..., None])[..., 0] * free + ground
        ones = torch.cholesky_solve((tied * scale)[..., None], factor)[..., 0] * scale
        accurate &= (ones - 1).abs().amax(-1) < tolerance
        return factor, scale, accurate

    def apart(self, accurate: Tensor) -> Iterator[tuple[Tensor, Network, bool]]:
        """Where Cholesky will not do: index, network, whether float64 is too narrow.

        Elimination keeps every pivot to full relative accuracy, as long as none of
        them leaves the range of float64.
        """
        bad = (~accurate).nonzero()[:, 0]
        if not len(bad):
            return
        part = self.subset(bad)
        fits = part.eliminate()[0].amin(-1) > _WEAKEST_PIVOT
        for chosen, extreme in ((fits, False), (~fits, True)):
            k = chosen.nonzero()[:, 0]
            if len(k):
                yield bad[k], part if len(k) == len(bad) else part.subset(k), extreme

    def inverse(self, factor: Tensor, scale: Tensor) -> Tensor:
        """Inverse Laplacian over the columns, zero at the roots."""
        s = torch.cholesky_inverse(factor) * scale[..., None, :] * scale[..., :, None]
        return torch.where(self.root[..., None, :] | self.root[..., :, None], 0.0, s)

    def trees(self) -> tuple[Tensor, Tensor]:
        """Log of the tree sum, and each edge's probability to be in a random tree."""
        factor, scale, accurate = self.cholesky()
        log_det = 2 * (factor.diagonal(dim1=-2, dim2=-1).log() - scale.log()).sum(-1)
        s = self.inverse(factor, scale)
        d = s.diagonal(dim1=-2, dim2=-1)
        resistances = d[..., None, :] + d[..., :, None] - 2 * s
        free = (~self.root).sum(-1)
        log_trees = self.log_rows.sum(-1) + log_det + free * self.log_scale
        leverages = self.leverages(resistances)
        for index, part, extreme in self.apart(accurate):
            better = _extreme_trees(part) if extreme else part._eliminated_trees()
            log_trees = log_trees.index_copy(0, index, better[0])
            leverages = leverages.index_copy(0, index, better[1])
        return log_trees, leverages

    def _eliminated_trees(self) -> tuple[Tensor, Tensor]:
        pivots, steps, grounding = self.eliminate()
        log_trees = self.log_rows.sum(-1) + pivots[..., 1:].log().sum(-1) - grounding
        log_trees = log_trees + (~self.root).sum(-1) * self.log_scale
        return log_trees, self.leverages(_resistances(pivots, steps))

    def leverages(self, resistances: Tensor) -> Tensor:
        """K_ij times the resistance between row i and column j.

        Row i is tied to the columns with probabilities p_i, so its resistance to j is
        1/r_i + E R(J, j) - E R(J, J') / 2; nothing cancels where p_i is decided.
        """
        mean = self.p @ resistances
        spread = (mean * self.p).sum(-1, keepdim=True) / 2
        return self.p * (1 + self.rows[..., None] * (mean - spread))

    def currents(self, flow: Tensor) -> Tensor:
        """The current with the row and column sums of a flow."""
        return self._solve(flow.reshape(self.p.shape), as_current=True)

    def response(self, change: Tensor) -> Tensor:
        """What the potentials do when log weights change; the adjoint of currents."""
        return self._solve(change.reshape(self.p.shape), as_current=False)

    def _solve(self, x: Tensor, *, as_current: bool) -> Tensor:
        factor, scale, accurate = self.cholesky(_ACCURATE_SOLVE)
        flow = x if as_current else self.rows[..., None] * self.p * x
        a = flow.sum(-1, keepdim=True)
        b = flow.sum(-2) - (self.p.mT @ a)[..., 0]
        h = self.potentials(factor, scale, b)
        if not as_current:
            # Potentials are divided by weak conductances, and so is what rounding
            # leaves of their source where it cancels inside of clusters.
            size = flow.abs().sum(-2)
            size += (self.p.mT @ flow.abs().sum(-1, keepdim=True))[..., 0]
            noise = self.potentials(factor, scale, 1e-16 * size).amax((-2, -1))
            accurate &= noise <= _ACCURATE_SOLVE * x.abs().amax((-2, -1))
        # Relative to the column that row i is mostly tied to, nothing cancels.
        most = self.p.argmax(-1, keepdim=True)
        h = h.mT - h[..., 0].gather(-1, most[..., 0])[..., None]
        r = self.rows[..., None]
        potentials = r * (h - (self.p * h).sum(-1, keepdim=True))
        y = self.p * (a + potentials) if as_current else (a + potentials) / r
        for index, part, extreme in self.apart(accurate):
            solve = _extreme_solve if extreme else Network._eliminated_solve
            y = y.index_copy(0, index, solve(part, x[index], as_current=as_current))
        return y

    def _eliminated_solve(self, x: Tensor, *, as_current: bool) -> Tensor:
        flow = x if as_current else self.rows[..., None] * self.p * x
        a = flow.sum(-1, keepdim=True)
        # The source of column j as a sum of pairwise terms, antisymmetric in (j, k):
        # b_j - sum_i p_ij a_i = sum_k sum_i (G_ij p_ik - p_ij G_ik).
        source = flow.mT @ self.p
        source = source - source.mT
        differences = self.differences(source)
        mean = self.p @ differences.mT
        r = self.rows[..., None]
        return self.p * (a + r * mean) if as_current else a / r + mean

    def differences(self, source: Tensor) -> Tensor:
        """h_j - h_k of the column potentials that carry off an antisymmetric source."""
        pivots, steps, _ = self.eliminate()
        return _substitute(steps, _handed_on(pivots, steps, source), sign=-1)

    def carried_off(self, source: Tensor) -> Tensor:  # (b, m)
        """The column potentials themselves, accurate in terms of the largest.

        h_p = b_p / s_p + sum_k u_k h_k over the nodes k before p: a triangular system.
        """
        pivots, steps, _ = self.eliminate()
        b = _handed_on(pivots, steps, source)[..., None]
        solve = torch.linalg.solve_triangular
        h: Tensor = solve(-steps, b, upper=False, unitriangular=True)
        return h[:, 1:, 0]

    def potentials(self, factor: Tensor, scale: Tensor, b: Tensor) -> Tensor:
        """Column potentials (b, m, 1) that carry off a source at the columns."""
        b = (b * scale).masked_fill(self.root, 0.0)
        h = torch.cholesky_solve(b[..., None], factor) * scale[..., None]
        return torch.where(self.root[..., None], 0.0, h)

    def eliminate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pivots (b, m + 1), steps (b, m + 1, m + 1) and the log of the grounding.

        Grassmann-Taksar-Heyman elimination: each pivot is a sum of conductances. Node
        0 is the ground, tied to the root of each component; that edge is in every
        tree, so its weight (the root's own conductance) is divided out again.
        """
        if self._elimination is not None:
            return self._elimination
        size = self.p.shape[-1] + 1
        own = self.conductances.sum(-1)
        tie = torch.where(own > 0, own, 1.0)
        ground = torch.where(self.root, tie, 0.0)
        c = torch.zeros(
            len(self.p), size, size, dtype=self.p.dtype, device=self.p.device
        )
        c[:, 1:, 1:] = self.conductances
        c[:, 0, 1:] = ground
        c[:, 1:, 0] = ground
        pivots = torch.ones_like(c[:, 0])
        for low, high in _panels(size):
            for k in range(high - 1, low - 1, -1):
                row, pivot = c[:, k, :k], pivots[:, k : k + 1]
                torch.sum(row, -1, keepdim=True, out=pivot).clamp_min_(1e-320)
                step = row / pivot
                c[:, low:k, :k].addcmul_(row[:, low:, None], step[:, None])
                row.copy_(step)
            panel = c[:, low:high, :low]
            weighted = panel * pivots[:, low:high, None]
            c[:, :low, :low].baddbmm_(panel.mT, weighted)
        grounding = torch.where(self.root, tie.log(), 0.0).sum(-1)
        self._elimination = pivots, c, grounding
        return self._elimination


def _products(p: Tensor, rows: Tensor) -> Tensor:
    """P' diag(r) p, on numbers that are large enough.

    Products of denormal numbers take a hundred times as long, and below the weakest
    pivot no conductance counts: so the smallest p are zero, and the others so large
    that none of their products is denormal.
    """
    p = threshold(p * 2.0**500, 1e-300 * 2.0**500, 0.0, inplace=True)
    c = p.mT @ (rows[..., None] * p)
    return threshold(c, 1.0, 0.0, inplace=True).mul_(2.0**-500).mul_(2.0**-500)


def _handed_on(pivots: Tensor, steps: Tensor, source: Tensor) -> Tensor:
    """What elimination leaves of an antisymmetric source at each node, over its pivot.

    Eliminating node p hands its sources on pair by pair: N_qk += u_q N_pk - u_k N_pq,
    in which what clusters exchange inside cancels before it is added up.
    """
    n = torch.zeros_like(steps)
    n[:, 1:, 1:] = source
    for low, high in _panels(pivots.shape[-1]):
        for k in range(high - 1, low, -1):
            u, own, others = steps[:, k, :k], n[:, k, :k], n[:, low:k, :k]
            others.addcmul_(u[:, low:, None], own[:, None])
            others.addcmul_(own[:, low:, None], u[:, None], value=-1)
        handed = steps[:, low:high, :low].mT @ n[:, low:high, :low]
        n[:, :low, :low] += handed - handed.mT
    return n.tril(-1).sum(-1) / pivots


def _resistances(pivots: Tensor, steps: Tensor) -> Tensor:
    """Effective resistances between columns by back substitution.

    R(p, j) = 1 / s_p + E R(J, j) - E R(J, J') / 2 with J drawn from the step of p.
    """
    return _substitute(steps, 1 / pivots, sign=1)


def _substitute(steps: Tensor, constant: Tensor, sign: int) -> Tensor:
    """Solve x(p, j) = constant_p + E x(J, j) for j < p, x(j, p) = sign * x(p, j).

    With sign = -1 for differences of potentials, each to its own accuracy. With sign =
    1, for resistances, half of E x(J, J') is taken off the constant.
    """
    x = torch.zeros_like(steps)
    for first, high in reversed(_panels(steps.shape[-1])):
        x[:, first:high, :first] = steps[:, first:high, :first] @ x[:, :first, :first]
        for k in range(first, high):
            u = steps[:, k, None, :k]
            before, inside = x[:, first:k, :first], x[:, first:k, first:k]
            left = x[:, k, None, :first] + u[..., first:] @ before
            right = sign * (u[..., :first] @ before.mT) + u[..., first:] @ inside
            row = torch.cat([left, right], -1)
            own = constant[:, k, None, None]
            if sign > 0:
                own = own - (row * u).sum(-1, keepdim=True) / 2
            row = (row + own)[:, 0]
            x[:, k, :k] = row
            x[:, :k, k] = sign * row
    return x[:, 1:, 1:]


def _panels(size: int) -> list[tuple[int, int]]:
    """Nodes size - 1 down to 1 in panels, so that most of the work is in products."""
    edges = [*range(size, 1, -32), 1]
    return [(low, high) for high, low in pairwise(edges)]


def _extreme_trees(network: Network) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        log_weights = network.log_weights.detach().requires_grad_()
        log_trees, _ = eliminate_in_logs(log_weights, network.root)
        (leverages,) = torch.autograd.grad(log_trees.sum(), log_weights)
    return log_trees.detach(), torch.where(log_weights > -torch.inf, leverages, 0.0)


def _extreme_solve(network: Network, x: Tensor, *, as_current: bool) -> Tensor:
    if not as_current:
        return eliminate_in_logs(network.log_weights, network.root, x)[1]
    with torch.enable_grad():
        change = torch.zeros_like(x).requires_grad_()
        _, q = eliminate_in_logs(network.log_weights, network.root, change)
        (y,) = torch.autograd.grad((q * x).sum(), change)
    return y
