# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Sinkhorn operator S(X / tau), converged, with the gradient of its limit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from pyro_permutations.kernel_newton import mapped
from pyro_permutations.kernel_scaling import scale_kernel, solve_marginals
from pyro_permutations.matching_graph import WIRE, MatchingGraph
from pyro_permutations.matching_parts import falls_apart, flattened, parts, put, take
from pyro_permutations.sinkhorn_arguments import LARGEST, NOT_FINITE, checked
from pyro_permutations.sinkhorn_solvers import Solution, last_step, solve
from pyro_permutations.spanning_trees import currents, to_front
from pyro_permutations.unmatched_scores import Unmatched
from pyro_permutations.warnings import ConvergenceWarning, warn

__all__ = ["log_scaling", "log_sinkhorn", "log_sinkhorn_with_slack", "sinkhorn"]


def log_sinkhorn(
    logits: Tensor,  # (*batch, n, m)
    temperature: Tensor | float = 1.0,  # () or (*batch)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
    unmatched: Unmatched | None = None,  # (*batch, n), (*batch, m)
    tol: float | None = None,
) -> Tensor:  # (*batch, n, m)
    r"""Log of the matrix of unit row and column sums that is nearest to the scores.

    .. math:: \log P_{ij} = X_{ij} / \tau + f_i + g_j, \quad
        \textstyle\sum_j P_{ij} = \sum_i P_{ij} = 1

    the limit of normalising rows and columns of ``exp(logits / temperature)`` in turn
    (Sinkhorn, 1964), reached by Newton's method at falling temperatures. The potentials
    f, g are converged relative to the mass that is left off the best matching, so that
    small entries have right logarithms too. All arithmetic is in float64.

    What may stay unmatched has slack beside its pairs: columns if n < m, all that has a
    finite score in ``unmatched``. With :math:`r_i` that of a row and :math:`s_j` that
    of a column,

    .. math:: \textstyle\sum_j P_{ij} + r_i = \sum_i P_{ij} + s_j = 1, \qquad
        \log r_i = a_i / \tau + f_i, \quad \log s_j = b_j / \tau + g_j

    with a and b the scores of being unmatched. (Where n < m the rows have none, and
    the b_j are zero.)

    The gradient is that of the limit, from the implicit function theorem: one solve,
    whose memory does not depend on the number of steps. It can be differentiated
    again and mapped by ``torch.func.vmap`` (with one mask for all; a pair that is
    forbidden in some elements only belongs in a batch). Forward mode is not there.

    At low temperatures this takes many times as long as :func:`sinkhorn`, since flows
    that the sums do not see have to balance, too (``benchmarks/sinkhorn.py``).

    Args:
        logits: Scores (log weights before they are divided by the temperature),
            ``(*batch, n, m)``. ``-inf`` forbids a pair; NaN and ``inf`` raise.
        temperature: Positive, a scalar or of batch shape.
        mask: Boolean, True where a pair is allowed; or what :func:`matching_graph`
            makes of it.
        unmatched: Scores of unmatched rows and columns, numbers or tensors; ``-inf``
            for those that have to be matched.
        tol: The largest error of a row or column sum that passes without a
            ``ConvergenceWarning``; 1e-6 by default. The logarithm needs more than the
            sums: Newton goes on until a step is below 3e-6, or ``sqrt(tol) / 10`` if
            that is less, and what is left is about its square.

    Returns:
        log P in the dtype of ``logits``, ``-inf`` on forbidden pairs and on those that
        no matching can use.

    Raises:
        ValueError: If logits are NaN or ``inf``, the temperature is not positive and
            finite, the mask allows no matching, or n > m and nothing is said of
            unmatched rows.

    Example:
        >>> log_sinkhorn(torch.tensor([[0.0, -1.0], [-3.0, 0.0]]), 0.01)
        tensor([[   0., -200.],
                [-200.,    0.]])
    """
    problem = checked(logits, temperature, mask, unmatched, tol)
    log_P = _by_component(_LogSinkhorn, *problem)
    return _pairs(log_P, logits).to(logits.dtype)


def sinkhorn(
    logits: Tensor,  # (*batch, n, m)
    temperature: Tensor | float = 1.0,  # () or (*batch)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
    unmatched: Unmatched | None = None,  # (*batch, n), (*batch, m)
    tol: float | None = None,
) -> Tensor:  # (*batch, n, m)
    r"""The Sinkhorn operator: a doubly stochastic matrix from scores.

    .. math:: P_{ij} = \exp(X_{ij} / \tau + f_i + g_j)

    Each row and each column sums to one (not to 1/n), to the tolerance, and forbidden
    pairs are exactly zero. As the temperature falls it tends to :func:`matching`, the
    best permutation matrix. It stops where the sums are right, so that it takes less
    time than :func:`log_sinkhorn`, whose arguments it has and whose exponential it is,
    up to what the tolerance leaves open: that counts for more the lower the temperature
    is, and for the gradient more than for P.
    What rows and columns lack to one is how much they are unmatched, where they may.

    References:
        Sinkhorn, "A relationship between arbitrary positive matrices and doubly
        stochastic matrices" (1964). Mena, Belanger, Linderman and Snoek, "Learning
        latent permutations with Gumbel-Sinkhorn networks" (2018).

    Example:
        >>> sinkhorn(torch.zeros(2, 2))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
        >>> sinkhorn(torch.zeros(1, 2), unmatched=(0.0, 0.0))  # the root of x = (1-x)^2
        tensor([[0.2929, 0.2929]])
    """
    problem = checked(logits, temperature, mask, unmatched, tol)
    return _pairs(_by_component(_Sinkhorn, *problem), logits).to(logits.dtype)


def log_sinkhorn_with_slack(
    logits: Tensor,  # (*batch, n, m) float64
    temperature: Tensor | float,  # () or (*batch)
    graph: MatchingGraph,
) -> Tensor:  # (*batch, N, M)
    """:func:`log_sinkhorn`, and beside it the logs of the slack where there is some."""
    return _by_component(_LogSinkhorn, *checked(logits, temperature, graph, None, None))


def log_scaling(
    scores: Tensor,  # (*lead, N, M) float64
    graph: MatchingGraph,
    marginals: tuple[Tensor, Tensor] | None = None,  # (*batch, n), (*batch, m)
) -> Tensor:  # (*lead, N, M)
    """:func:`log_sinkhorn` of checked scores with slack beside them, and of any sums.

    With slack (that of :meth:`MatchingGraph.with_slack`) sums are one. No gradient
    flows into the sums; those of a component have to be possible.
    """
    return _by_component(_LogSinkhorn, scores, graph, 1e-6, marginals)


def _by_component(
    solver: type[_LogSinkhorn] | type[_Sinkhorn],
    scores: Tensor,  # (*lead, N, M)
    graph: MatchingGraph,
    tol: float,
    marginals: tuple[Tensor, Tensor] | None = None,  # (*batch, n), (*batch, m)
) -> Tensor:  # (*lead, N, M)
    """Solve the whole, or its components one by one where that is less work."""
    rows, columns = _sums(graph, marginals)
    lead, shape = scores.shape[:-2], scores.shape[-2:]
    others = graph.batch_shape, rows.shape[:-2], columns.shape[:-2]
    if any(others):  # not at once: torch takes its time
        lead = torch.broadcast_shapes(lead, *others)
    scores = scores.expand(*lead, *shape)
    if not falls_apart(graph):
        return _solved(solver, scores, graph, rows, columns, tol)
    flat, graph = flattened(lead, graph)
    # A decided pair has what its row has to have; so has the wire, and slack one.
    alone, none = rows.log(), -torch.inf
    if graph.has_slack:
        alone = graph.with_slack(rows.new_zeros(graph.shape), WIRE)
    if solver is _Sinkhorn:
        alone, none = alone.exp(), 0.0
    result = torch.where(graph.cells, alone, none)
    result = result.expand(*lead, *shape).reshape(*flat, *shape)
    scores = scores.reshape(*flat, *shape)
    rows = rows.expand(*lead, *rows.shape[-2:]).reshape(*flat, -1)
    columns = columns.expand(*lead, *columns.shape[-2:]).reshape(*flat, -1)
    pieces = []
    for part, inside in zip(parts(graph), take(scores, graph), strict=True):
        element = part.element[:, None]
        r, c = rows[:, element, part.rows], columns[:, element, part.columns]
        sums = r[..., :, None], c[..., None, :]
        pieces.append(_solved(solver, inside, part.graph, *sums, tol))
    # Where all is decided there still is a gradient, of zero.
    result = put(result, pieces, graph) if pieces else result + 0 * scores
    return result.reshape(*lead, *shape)


def _sums(
    graph: MatchingGraph, marginals: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:  # (*batch, N, 1), (*batch, 1, M)
    if marginals is not None:
        return marginals[0][..., :, None], marginals[1][..., None, :]
    N, M = graph.size
    rows = torch.ones(N, 1, dtype=torch.float64, device=graph.device)
    columns = torch.ones(1, M, dtype=torch.float64, device=graph.device)
    if graph.has_slack:  # the row of the slack has the wire
        rows[-1] = math.exp(WIRE)
    return rows, columns


def _pairs(P: Tensor, logits: Tensor) -> Tensor:
    n, m = logits.shape[-2:]
    return P if P.shape[-2:] == (n, m) else P[..., :n, :m]


def _solved(
    solver: type[_LogSinkhorn] | type[_Sinkhorn],
    scores: Tensor,
    graph: MatchingGraph,
    rows: Tensor,
    columns: Tensor,
    tol: float,
) -> Tensor:
    support = None if graph.is_full else graph.cells
    root = graph.root[..., None, :]
    arguments = scores, support, root, rows, columns, tol, graph.has_slack
    if _stands_alone(scores, rows, columns):
        with torch.no_grad():
            return solver.forward(*arguments)
    result: Tensor = solver.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def _stands_alone(scores: Tensor, *sums: Tensor) -> bool:
    """Whether nobody asks for a derivative, or maps: then autograd can be left out.

    It takes as long as two Newton steps for small matrices.
    """
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or (torch.is_grad_enabled() and scores.requires_grad):
        return False
    if any(map(mapped, (scores, *sums))):
        return False
    return unpack_dual(scores).tangent is None


class _LogSinkhorn(torch.autograd.Function):
    """The limit, and its derivative d log P = dX - (what the potentials take up)."""

    @staticmethod
    def forward(
        scores: Tensor,  # (*batch, n, m)
        support: Tensor | None,  # (*batch, n, m), None for all cells
        root: Tensor,  # (*batch, 1, m)
        rows: Tensor,  # (*batch, n, 1)
        columns: Tensor,  # (*batch, 1, m)
        tol: float,
        slack: bool,
    ) -> Tensor:
        x, r, c = _flattened(scores, support, rows, columns)
        root = root.expand(*scores.shape[:-2], 1, -1).reshape(-1, x.shape[-1])
        solution = solve(x, r, c, root, tol, slack=slack, masked=support is not None)
        _warn(solution, tol)
        return solution.log_p.reshape(scores.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, support, root, *_ = inputs
        ctx.save_for_backward(output, support, root)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        log_p, support, root = ctx.saved_tensors
        if support is not None:
            g = torch.where(support, g, 0.0)
        return g - currents(log_p, g, root), *(None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _LogSinkhorn.apply(*to_front(info, in_dims, arguments)), 0  # type: ignore[no-untyped-call]


class _Sinkhorn(torch.autograd.Function):
    """The same without the logarithm: small entries need no relative accuracy."""

    @staticmethod
    def forward(
        scores: Tensor,  # (*batch, n, m)
        support: Tensor | None,  # (*batch, n, m), None for all cells
        root: Tensor,  # (*batch, 1, m)
        rows: Tensor,  # (*batch, n, 1)
        columns: Tensor,  # (*batch, 1, m)
        tol: float,
        slack: bool,
    ) -> Tensor:
        x, r, c = _flattened(scores, support, rows, columns)
        masked = support is not None
        scaling = scale_kernel(x, r, c, tol, slack=slack, masked=masked)
        p = scaling.p
        if len(index := scaling.short_of(tol)):
            root = root.expand(*scores.shape[:-2], 1, -1).reshape(len(x), -1)
            x, r, c, root = (y[index] for y in (x, r, c, root))
            solution = solve(x, r, c, root, tol, slack=slack, masked=masked)
            _warn(solution, tol)
            p = p.index_copy(0, index, solution.log_p.exp())
        return p.reshape(scores.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.slack = inputs[-1]
        ctx.save_for_backward(output, *inputs[1:3])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        p, support, root = ctx.saved_tensors
        g = p * g
        if torch.is_grad_enabled():
            # To be differentiated again: entries that underflowed are taken as tiny.
            log_p = torch.where(p > 0, p, 1e-300).log()
            if support is not None:
                log_p = torch.where(support, log_p, -torch.inf)
            return g - currents(log_p, g, root), *(None,) * 6
        n, m = p.shape[-2:]
        a, b = g.sum(-1).reshape(-1, 1, n), g.sum(-2).reshape(-1, 1, m)
        x, y = solve_marginals(p.reshape(-1, n, m), a, b, slack=ctx.slack)
        shifts = (x.mT + y).reshape(p.shape)
        return g.addcmul_(p, shifts, value=-1), *(None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _Sinkhorn.apply(*to_front(info, in_dims, arguments)), 0  # type: ignore[no-untyped-call]


def _flattened(
    scores: Tensor, support: Tensor | None, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked scores (b, n, m), row sums (b, 1, n) and column sums (b, 1, m)."""
    if scores.numel():
        low, high = scores.aminmax()
        if not max(-float(low), float(high)) < LARGEST:  # nor is NaN
            raise ValueError(NOT_FINITE)
    if support is not None:
        scores = torch.where(support, scores, -torch.inf)
    n, m = scores.shape[-2:]
    lead = scores.shape[:-2]
    return (
        scores.reshape(-1, n, m),
        rows.expand(*lead, n, 1).reshape(-1, 1, n),
        columns.expand(*lead, 1, m).reshape(-1, 1, m),
    )


def _warn(solution: Solution, tol: float) -> None:
    steps, left = solution.iterations, solution.left
    if not solution.residual <= tol:
        warn(ConvergenceWarning(solution.residual, steps, tol))
    elif left:
        what = "the log of a small entry"
        remedy = "The sums are right: sinkhorn() needs no more. Raise the temperature."
        target = last_step(tol)
        warn(ConvergenceWarning(left, steps, target, what=what, remedy=remedy))
