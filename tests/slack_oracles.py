# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Slow references for matchings that may leave items unmatched, for up to 4 x 4.

Written from the mathematics, without sight of the package. Throughout, ``allowed``
(n, m) says which pairs exist and ``row_free`` (n,), ``column_free`` (m,) which rows and
columns may stay unmatched, that is, have slack. All free: partial matchings. Columns
free only: injections of the rows. None free: perfect matchings.

The relaxation at temperature tau of scores L (unmatched: 0) is

    P_ij = exp(L_ij / tau + a_i + b_j),   r_i = exp(a_i),   s_j = exp(b_j)
    sum_j P_ij + r_i = 1,                 sum_i P_ij + s_j = 1

with r_i = 0 where row i is not free or no matching leaves it out, s_j likewise, and
P_ij = 0 in cells that no matching uses; the potential of a row or column without slack
is whatever makes its sum 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mpmath
import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import gammaln, logsumexp
from torch import Tensor

__all__ = [
    "best_partial",
    "gibbs_marginals",
    "log_density_injection",
    "log_density_mixed",
    "log_density_partial",
    "partial_matchings",
    "relaxed",
    "usable",
]

ArrayLike = np.ndarray | Tensor | Sequence[bool] | Sequence[float]

DIGITS = 45  # that are left after the worst cancellation


def _floats(x: ArrayLike) -> np.ndarray:
    x = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    return np.array(x, dtype=np.float64)


def _bools(x: ArrayLike) -> np.ndarray:
    x = x.detach().cpu().numpy() if isinstance(x, Tensor) else x
    return np.array(x, dtype=bool)


def _mask(allowed: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, dtype=bool) if allowed is None else _bools(allowed)


# Hard matchings, by enumeration


def partial_matchings(
    allowed: ArrayLike, row_free: ArrayLike, column_free: ArrayLike
) -> np.ndarray:  # (K, n) int, -1 for unmatched
    """All ways to match rows to distinct columns that leave only free ones unmatched.

    ``M_i in {j : allowed_ij} + {-1 if row_free_i}``, no column twice, and every column
    that is not free once.
    """
    allowed, row_free, column_free = map(_bools, (allowed, row_free, column_free))
    n, m = allowed.shape
    required = set(map(int, np.flatnonzero(~column_free)))

    def extend(prefix: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        i = len(prefix)
        if i == n:
            if required <= set(prefix):
                yield prefix
            return
        if row_free[i]:
            yield from extend((*prefix, -1))
        for j in range(m):
            if allowed[i, j] and j not in prefix:
                yield from extend((*prefix, j))

    found = list(extend(()))
    return np.array(found, dtype=np.int64).reshape(len(found), n)


def _totals(
    matchings: np.ndarray,
    scores: np.ndarray,
    row_scores: np.ndarray,
    column_scores: np.ndarray,
) -> np.ndarray:  # (K,)
    """Score of each matching: its pairs, its unmatched rows, its unmatched columns."""
    n, m = scores.shape
    totals = []
    for matching in matchings:
        total = 0.0
        for i in range(n):
            j = matching[i]
            total += row_scores[i] if j == -1 else scores[i, j]
        for j in range(m):
            if j not in matching:
                total += column_scores[j]
        totals.append(total)
    return np.array(totals, dtype=np.float64)


def _enumerate(
    scores: ArrayLike,
    row_scores: ArrayLike,
    column_scores: ArrayLike,
    allowed: ArrayLike | None,
) -> tuple[np.ndarray, np.ndarray]:  # (K, n), (K,)
    scores, row_scores, column_scores = map(
        _floats, (scores, row_scores, column_scores)
    )
    mask = _mask(allowed, scores.shape) & (scores > -np.inf)
    matchings = partial_matchings(mask, row_scores > -np.inf, column_scores > -np.inf)
    if not len(matchings):
        raise ValueError("no matching leaves only free rows and columns unmatched")
    return matchings, _totals(matchings, scores, row_scores, column_scores)


def best_partial(
    scores: ArrayLike,
    row_scores: ArrayLike,
    column_scores: ArrayLike,
    allowed: ArrayLike | None = None,
) -> tuple[np.ndarray, float]:  # (n,) int with -1 for unmatched, its total
    """The matching with the highest total score, and that total, by enumeration.

    ``max_M sum_{(i, j) in M} scores_ij + sum_{i unmatched} row_scores_i
    + sum_{j unmatched} column_scores_j``; an unmatched score of -inf is a row or column
    that must be matched, a score of -inf a pair that is not allowed.
    """
    matchings, totals = _enumerate(scores, row_scores, column_scores, allowed)
    best = int(totals.argmax())
    return matchings[best], float(totals[best])


def gibbs_marginals(
    scores: ArrayLike,
    row_scores: ArrayLike,
    column_scores: ArrayLike,
    allowed: ArrayLike | None = None,
) -> np.ndarray:  # (n + 1, m + 1)
    """Exact marginals of p(M) proportional to exp(total score), by enumeration.

    ``[i, j]: p(i matched to j)``, ``[i, m]: p(row i unmatched)``, ``[n, j]: p(column j
    unmatched)``, and 0 in the corner; so the first n rows and first m columns sum to 1.
    """
    matchings, totals = _enumerate(scores, row_scores, column_scores, allowed)
    n, m = _floats(scores).shape
    probabilities = np.exp(totals - logsumexp(totals))
    out = np.zeros((n + 1, m + 1))
    for matching, p in zip(matchings, probabilities, strict=True):
        for i in range(n):
            out[i, matching[i]] += p  # -1 is the last column
        for j in range(m):
            if j not in matching:
                out[n, j] += p
    return out


def usable(
    allowed: ArrayLike, row_free: ArrayLike, column_free: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (n, m), (n,), (m,) bool
    """Which cells, row slacks and column slacks at least one matching uses.

    ``cells_ij = any_M [M_i = j]``, ``rows_i = any_M [M_i = -1]``, ``columns_j =
    any_M [j not in M]``.
    """
    matchings = partial_matchings(allowed, row_free, column_free)
    n, m = _bools(allowed).shape
    cells, rows, columns = np.zeros((n, m), bool), np.zeros(n, bool), np.zeros(m, bool)
    for matching in matchings:
        for i in range(n):
            if matching[i] == -1:
                rows[i] = True
            else:
                cells[i, matching[i]] = True
        for j in range(m):
            if j not in matching:
                columns[j] = True
    return cells, rows, columns


def _grounded(cells: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> list[int]:
    """One column of each connected component that has no slack (and has cells)."""
    n, m = cells.shape
    seen: set[int] = set()
    grounded = []
    for start in range(m):
        if start in seen:
            continue
        in_rows: set[int] = set()
        in_columns = {start}
        for _ in range(n + m):
            in_rows |= {i for i in range(n) if any(cells[i, j] for j in in_columns)}
            in_columns |= {j for j in range(m) if any(cells[i, j] for i in in_rows)}
        seen |= in_columns
        if not any(rows[i] for i in in_rows) and not any(
            columns[j] for j in in_columns
        ):
            grounded.append(start)
    return grounded


# The relaxation, in high precision


@dataclass
class Solution:
    """The relaxation in mpmath: potentials, and the flows by edge."""

    a: list[mpmath.mpf]
    b: list[mpmath.mpf]
    P: dict[tuple[int, int], mpmath.mpf]
    r: dict[int, mpmath.mpf]
    s: dict[int, mpmath.mpf]
    error: mpmath.mpf  # bound on the error of every log flow
    digits: int  # that were carried at the end


def relaxed(
    L: ArrayLike,
    tau: float,
    allowed: ArrayLike,
    row_free: ArrayLike,
    column_free: ArrayLike,
    digits: int = DIGITS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (n, m), (n,), (m,)
    """log P, log r, log s of the relaxation by damped Newton in mpmath, -inf for zero.

    Minimises ``sum_ij exp(L_ij / tau + a_i + b_j) + sum_i exp(a_i) + sum_j exp(b_j) -
    sum a - sum b`` over the usable cells and slacks. ``digits`` are those carried
    beyond the digits between the largest and the smallest flow, however far apart
    these are; each flow is relatively right to ``10^-(digits - 10)`` before rounding.
    """
    solution = solve_relaxed(L, tau, allowed, row_free, column_free, digits)
    n, m = _bools(allowed).shape
    log_P = np.full((n, m), -np.inf)
    log_r, log_s = np.full(n, -np.inf), np.full(m, -np.inf)
    with mpmath.workdps(solution.digits):
        for (i, j), x in solution.P.items():
            log_P[i, j] = float(mpmath.log(x))
        for i in solution.r:
            log_r[i] = float(solution.a[i])
        for j in solution.s:
            log_s[j] = float(solution.b[j])
    return log_P, log_r, log_s


def solve_relaxed(
    L: ArrayLike,
    tau: float,
    allowed: ArrayLike,
    row_free: ArrayLike,
    column_free: ArrayLike,
    digits: int = DIGITS,
) -> Solution:
    """The relaxation with its potentials, all in mpmath.

    Newton's method at temperatures that halve down to tau; each starts at ``t * g``
    extrapolated linearly in t, since t times the potentials is piecewise linear in the
    limit. A component without slack has one column potential held at 0.
    """
    L = _floats(L)
    cells, rows, columns = usable(allowed, row_free, column_free)
    if not (cells.any() or rows.any() or columns.any()):
        raise ValueError("no matching leaves only free rows and columns unmatched")
    n, m = cells.shape
    grounded = {n + j for j in _grounded(cells, rows, columns)}
    scores = np.append(L[cells], 0.0)
    spread = float(scores.max() - scores.min())
    t = max(spread, tau)
    history: list[tuple[float, list[mpmath.mpf]]] = []
    while True:
        tolerance = mpmath.mpf(10) ** (10 - digits if t == tau else -3)
        g = _extrapolate(history[-2:], t, n + m)
        solution = _newton(L, t, g, cells, rows, columns, grounded, digits, tolerance)
        if t == tau:
            return solution
        history.append((t, solution.a + solution.b))
        t = max(t / 2, tau)


def _extrapolate(
    history: list[tuple[float, list[mpmath.mpf]]], t: float, size: int
) -> list[mpmath.mpf]:
    if not history:
        return [mpmath.mpf(0)] * size
    t1, g1 = history[-1]
    if len(history) == 1:
        return [x * t1 / t for x in g1]
    t0, g0 = history[0]
    return [
        (x1 * t1 + (x1 * t1 - x0 * t0) / (t1 - t0) * (t - t1)) / t
        for x0, x1 in zip(g0, g1, strict=True)
    ]


def _newton(
    L: np.ndarray,
    t: float,
    g: list[mpmath.mpf],
    cells: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    grounded: set[int],
    digits: int,
    tolerance: mpmath.mpf,
) -> Solution:
    """Damped Newton until the sums are right relative to the smallest flow.

    With w the smallest flow, the inverse of the Hessian (a grounded Laplacian with
    weights of at least w, up to signs) has no entry above (n + m) / w: a path of that
    many resistances. So ``(n + m) * sum |gap| / w`` bounds the Newton step of each
    potential, and twice that the step of each log flow, which is its distance from the
    solution once it is small. A step with
    largest change d of an exponent is scaled by ``log(1 + d) / d``, with which a sum
    of exponentials cannot increase.
    """
    n, m = cells.shape
    edges = [(int(i), int(j)) for i, j in zip(*np.nonzero(cells), strict=True)]
    left = [int(i) for i in np.flatnonzero(rows)]
    right = [int(j) for j in np.flatnonzero(columns)]
    moving = [k for k in range(n + m) if k not in grounded]
    carried = digits + 10
    for _ in range(100_000):
        with mpmath.workdps(carried):
            P = {
                (i, j): mpmath.exp(mpmath.mpf(L[i, j]) / t + g[i] + g[n + j])
                for i, j in edges
            }
            r = {i: mpmath.exp(g[i]) for i in left}
            s = {j: mpmath.exp(g[n + j]) for j in right}
            flows = [*P.values(), *r.values(), *s.values()]
            smallest, largest = min(flows), max(*flows, mpmath.mpf(1))
            needed = digits + 10 + int(mpmath.log10(largest / smallest))
            if needed > carried:
                carried = needed + needed // 10
                continue
            H = [[mpmath.mpf(0)] * (n + m) for _ in range(n + m)]
            for (i, j), x in P.items():
                H[i][i] += x
                H[n + j][n + j] += x
                H[i][n + j] += x
                H[n + j][i] += x
            for i, x in r.items():
                H[i][i] += x
            for j, x in s.items():
                H[n + j][n + j] += x
            gap = [1 - H[k][k] for k in range(n + m)]
            error = 2 * (n + m) * mpmath.fsum(map(abs, gap)) / smallest
            if error < tolerance:
                return Solution(g[:n], g[n:], P, r, s, error, carried)
            A = mpmath.matrix([[H[k][l] for l in moving] for k in moving])
            step = [mpmath.mpf(0)] * (n + m)
            solved = mpmath.lu_solve(A, mpmath.matrix([gap[k] for k in moving]))
            for k, x in zip(moving, solved, strict=True):
                step[k] = x
            d = max(
                *(abs(step[i] + step[n + j]) for i, j in edges),
                *(abs(step[i]) for i in left),
                *(abs(step[n + j]) for j in right),
                mpmath.mpf(10) ** -carried,
            )
            scale = mpmath.log1p(d) / d
            g = [x + scale * y for x, y in zip(g, step, strict=True)]
    raise AssertionError("the high-precision reference did not converge")


# Densities: L = X + standard Gumbel noise on the allowed cells
#
# All take P of moderate size in float64: slacks are formed as 1 - sum.


def _log_gumbel(z: np.ndarray) -> np.ndarray:
    """log g(z) = -z - exp(-z), which may be -inf."""
    with np.errstate(over="ignore"):
        return -z - np.exp(-z)


def _log_volume(f: Callable[[Tensor], Tensor], x: np.ndarray) -> float:
    """log |det| of the Jacobian of f at x, by autograd."""
    J = torch.autograd.functional.jacobian(f, torch.tensor(x, dtype=torch.float64))
    assert J.shape == (len(x), len(x))
    return float(torch.linalg.slogdet(J).logabsdet)


def _place(values: Tensor, where: np.ndarray) -> Tensor:
    """A matrix with the values in the cells of a mask, row by row, and 0 elsewhere."""
    return torch.zeros(where.shape, dtype=torch.float64).masked_scatter(
        torch.tensor(where), values
    )


def log_density_partial(
    P: ArrayLike, X: ArrayLike, tau: float, allowed: ArrayLike | None = None
) -> float:
    """log density of P when all rows and columns are free, Lebesgue on allowed cells.

    ``L_ij = tau (log P_ij - log r_i - log s_j)`` is a bijection between the allowed
    cells of P and of L: ``log p = sum log g(L - X) + log |det dL / dP|``.
    """
    P, X = _floats(P), _floats(X)
    mask = _mask(allowed, P.shape)
    assert (P[mask] > 0).all()
    assert (P[~mask] == 0).all()

    def scores(cells: Tensor) -> Tensor:
        Q = _place(cells, mask)
        log_r, log_s = (1 - Q.sum(1)).log(), (1 - Q.sum(0)).log()
        shift = log_r[:, None] + log_s
        return tau * (cells.log() - shift[torch.tensor(mask)])

    L = scores(torch.tensor(P[mask])).numpy()
    return float(_log_gumbel(L - X[mask]).sum()) + _log_volume(scores, P[mask])


def log_density_injection(
    P: ArrayLike,
    X: ArrayLike,
    tau: float,
    allowed: ArrayLike | None = None,
    dropped: Sequence[int] | None = None,
) -> float:
    """log density of P when the columns are free and the rows are not.

    ``L_ij = tau (log P_ij - log s_j) + u_i`` is a bijection between the free cells of P
    with the row shifts u, and L: ``log p = log |det dL / d(P, u)| + sum_i log integral
    prod_j g(L_ij(u_i) - X_ij) du_i``, one quadrature for each row. The reference
    measure is Lebesgue on the allowed cells but one in each row, ``dropped`` (by
    default the last); which one does not matter, since a cell of a row is 1 minus the
    others. All column slack must be usable.
    """
    P, X = _floats(P), _floats(X)
    mask = _mask(allowed, P.shape)
    n, m = P.shape
    _, _, slack = usable(mask, np.zeros(n, bool), np.ones(m, bool))
    assert slack.all(), "some column slack is zero: see log_density_mixed"
    assert (P[mask] > 0).all()
    assert (P[~mask] == 0).all()
    if dropped is None:
        dropped = [int(np.flatnonzero(row)[-1]) for row in mask]
    free = mask.copy()
    for i, j in enumerate(dropped):
        assert mask[i, j]
        free[i, j] = False
    last = torch.zeros(n, m, dtype=torch.float64)
    last[range(n), list(dropped)] = 1.0

    def scores(variables: Tensor) -> Tensor:
        cells, u = variables[:-n], variables[-n:]
        Q = _place(cells, free)
        Q = Q + last * (1 - Q.sum(1, keepdim=True))
        log_s = (1 - Q.sum(0)).log()
        Q = Q + (~torch.tensor(mask)).double()  # for the log; not read
        return (tau * (Q.log() - log_s) + u[:, None])[torch.tensor(mask)]

    at = np.concatenate([P[free], np.zeros(n)])
    Z = np.zeros((n, m))
    Z[mask] = scores(torch.tensor(at)).numpy() - X[mask]
    total = _log_volume(scores, at)
    for i in range(n):
        z = Z[i, mask[i]]
        total += log_integral(lambda u, z=z: _log_gumbel(u + z).sum(-1), 1)
    return total


def log_density_mixed(
    P: ArrayLike,
    X: ArrayLike,
    tau: float,
    allowed: ArrayLike,
    row_free: ArrayLike,
    column_free: ArrayLike,
    order: Sequence[int] | None = None,
) -> float:
    """log density of P with any rows and columns free.

    ``L_ij = tau log P_ij + u_i + v_j`` on the usable cells, where u_i is ``-tau log
    r_i`` if row i has (usable) slack and a free shift if not, v_j likewise, and one v_j
    is 0 in each component without any slack: ``log p = log |det dL / d(P, u, v)| + log
    integral prod g(L - X) d(u, v)``. The shift of a row integrates to ``Gamma(k)
    exp(-sum_j c_j) (sum_j exp(-c_j))^-k`` with c_j the rest of its k arguments of g;
    those of the columns are integrated on a grid (of the rows where these are fewer).

    The reference measure is Lebesgue on the usable cells but one for each row and
    column without slack (n + m - 1 in a component without any): those of a spanning
    forest that has all the slack edges in it, as these tie the rows and columns with
    slack to one node. The forest does not matter, since the sums are a totally
    unimodular system; it is grown by taking cells in ``order`` (of their flat index).
    """
    P, X, allowed = _floats(P), _floats(X), _bools(allowed)
    cells, rows, columns = usable(allowed, row_free, column_free)
    n, m = P.shape
    assert (P[cells] > 0).all()
    assert (P[~cells] == 0).all()
    grounded = _grounded(cells, rows, columns)
    u_index = [i for i in range(n) if not rows[i]]
    v_index = [j for j in range(m) if not columns[j] and j not in grounded]
    if len(v_index) > len(u_index) - len(grounded):
        if order is not None:
            order = [k % m * n + k // m for k in order]
        return log_density_mixed(P.T, X.T, tau, allowed.T, column_free, row_free, order)

    # The sums that are 1, as equations A x = 1 in the usable cells x.
    edges = [(int(i), int(j)) for i, j in zip(*np.nonzero(cells), strict=True)]
    A = np.zeros((len(u_index) + len(v_index), len(edges)))
    for e, (i, j) in enumerate(edges):
        if i in u_index:
            A[u_index.index(i), e] = 1
        if j in v_index:
            A[len(u_index) + v_index.index(j), e] = 1
    # The cells of the forest are those that the equations give from the others.
    forest: list[int] = []
    for k in range(n * m) if order is None else order:
        edge = (k // m, k % m)
        if edge in edges:
            trial = [*forest, edges.index(edge)]
            if np.linalg.matrix_rank(A[:, trial]) == len(trial):
                forest = trial
    assert len(forest) == len(A)
    free = [e for e in range(len(edges)) if e not in forest]
    row_of, column_of = torch.tensor(edges, dtype=torch.long).T
    system = torch.tensor(A)

    def scores(variables: Tensor) -> Tensor:
        x, u, v = variables.split([len(free), len(u_index), len(v_index)])
        y = torch.linalg.solve(system[:, forest], 1 - system[:, free] @ x)
        Q = torch.zeros(len(edges), dtype=torch.float64)
        Q = Q.index_put((torch.tensor(free, dtype=torch.long),), x)
        Q = Q.index_put((torch.tensor(forest, dtype=torch.long),), y)
        full = torch.zeros(n, m, dtype=torch.float64).index_put((row_of, column_of), Q)
        r, s = 1 - full.sum(1), 1 - full.sum(0)
        U = [-tau * r[i].log() if rows[i] else u[u_index.index(i)] for i in range(n)]
        V = [
            -tau * s[j].log() if columns[j]
            else torch.zeros_like(Q[0]) if j in grounded
            else v[v_index.index(j)]
            for j in range(m)
        ]  # fmt: skip
        return tau * Q.log() + torch.stack(U)[row_of] + torch.stack(V)[column_of]

    at = np.array([P[edges[e]] for e in free] + [0.0] * len(A))
    base = np.zeros((n, m))
    base[cells] = scores(torch.tensor(at)).numpy() - X[cells]

    def rest(v: np.ndarray) -> np.ndarray:  # (*S, len(v_index)) -> (*S)
        total = np.zeros(v.shape[:-1])
        for i in range(n):
            c = np.zeros((*v.shape[:-1], m)) + base[i]
            for k, j in enumerate(v_index):
                c[..., j] += v[..., k]
            c = c[..., cells[i]]
            k = c.shape[-1]
            if i in u_index:
                total += gammaln(k) - c.sum(-1) - k * logsumexp(-c, axis=-1)
            else:
                total += _log_gumbel(c).sum(-1)
        return total

    return _log_volume(scores, at) + log_integral(rest, len(v_index))


def log_integral(
    F: Callable[[np.ndarray], np.ndarray], d: int, step: float | None = None
) -> float:
    """log of the integral of exp(F) over R^d for a concave F, by the trapezoidal rule.

    F takes (*S, d). The box has the axes of the Hessian at the mode and holds all that
    is above e^-45 of the peak; the rule's error is about exp(-pi^2 / step), since the
    integrands here are analytic for imaginary parts of less than pi / 2.
    """
    if d == 0:
        return float(F(np.zeros(0)))
    assert d <= 3, "too many dimensions for a grid"
    step = (0.1, 0.2, 0.3)[d - 1] if step is None else step
    mode = np.zeros(d)  # need not be exact: F is concave, so the box is safe anyway
    with np.errstate(invalid="ignore"):  # of -inf less -inf
        for _ in range(d):
            mode = minimize(lambda v: -F(v), mode, method="Nelder-Mead").x
    peak = float(F(mode))
    h = 1e-3 * np.eye(d)
    H = np.array(
        [[F(mode + x + y) - F(mode + x - y) - F(mode - x + y) + F(mode - x - y)
          for x in h] for y in h]
    )  # fmt: skip
    U = np.linalg.eigh(H)[1]
    low, high = np.full(d, -1.0), np.full(d, 1.0)
    grown = True
    while grown:
        grown = False
        axes = [np.linspace(low[k], high[k], 25) for k in range(d)]
        value = F(mode + np.stack(np.meshgrid(*axes, indexing="ij"), -1) @ U.T) - peak
        for k in range(d):
            if np.take(value, 0, axis=k).max() > -45:
                low[k] *= 1.2
                grown = True
            if np.take(value, -1, axis=k).max() > -45:
                high[k] *= 1.2
                grown = True
    axes = [np.arange(low[k], high[k] + step, step) for k in range(d)]
    # of three dimensions, one slice of the grid at a time, for the memory
    chunks = axes[0][:, None] if d == 3 else [axes[0]]
    parts = []
    for chunk in chunks:
        grid = np.meshgrid(chunk, *axes[1:], indexing="ij")
        parts.append(logsumexp(F(mode + np.stack(grid, -1) @ U.T)))
    return float(logsumexp(parts)) + d * math.log(step)
