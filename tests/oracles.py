# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Slow references, written from the mathematics and independent of the package.

Everything here is for small inputs. The high-precision functions work in mpmath with
enough digits that a difference of two sums keeps forty of them, whatever the range of
the scores; the enumerations are exact; the importance sampler states its error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache

import mpmath
import numpy as np
import torch
from scipy.special import gammaln, logsumexp
from torch import Tensor

__all__ = [
    "components",
    "density_n2",
    "log_density",
    "log_edge_probabilities",
    "logistic_sum_density",
    "perfect_matchings",
    "permutations",
    "plain_sinkhorn",
    "precise_log_trees",
    "precise_sinkhorn",
    "shift_integral",
    "shift_integral_grid",
    "spanning_trees",
    "total_support",
]

DIGITS = 40  # that are left after the worst cancellation


# Permutations and what a mask allows, by enumeration


def permutations(n: int) -> Tensor:  # (n!, n, n)
    """All permutation matrices of n items."""
    index = torch.tensor(list(itertools.permutations(range(n)))).reshape(-1, n)
    return torch.eye(n, dtype=torch.get_default_dtype())[index]


def perfect_matchings(mask: Tensor) -> Tensor:  # (n, n) -> (k, n)
    """All perfect matchings of a mask, as indices, by depth-first search."""
    rows = [tuple(np.flatnonzero(row)) for row in np.asarray(mask)]
    n = len(rows)

    def extend(prefix: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(prefix) == n:
            yield prefix
            return
        for j in rows[len(prefix)]:
            if j not in prefix:
                yield from extend((*prefix, int(j)))

    found = list(extend(()))
    return torch.tensor(found, dtype=torch.long).reshape(len(found), n)


def total_support(mask: Tensor) -> Tensor:  # (n, n) -> (n, n) bool
    """The cells that some perfect matching uses."""
    found = perfect_matchings(mask)
    support = torch.zeros(tuple(mask.shape), dtype=torch.bool)
    rows = torch.arange(mask.shape[-1]).expand_as(found)
    support[rows.reshape(-1), found.reshape(-1)] = True
    return support


def components(mask: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Labels of rows and columns by connected component of the bipartite graph."""
    mask = np.asarray(mask, dtype=bool)
    n, m = mask.shape
    label = np.arange(n + m)
    for _ in range(n + m):
        for i, j in zip(*np.nonzero(mask), strict=True):
            low = min(label[i], label[n + j])
            label[label == label[i]] = low
            label[label == label[n + j]] = low
    _, label = np.unique(label, return_inverse=True)
    return label[:n], label[n:]


# Spanning trees


@cache
def _forests(n: int, m: int, edges: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Edge subsets that form a spanning forest, one tree for each component."""
    mask = np.zeros((n, m), dtype=bool)
    for i, j in edges:
        mask[i, j] = True
    rows, columns = components(mask)
    size = n + m - len(set(rows) | set(columns))
    found = []
    for subset in itertools.combinations(range(len(edges)), size):
        parent = list(range(n + m))

        def find(node: int, parent: list[int] = parent) -> int:
            while parent[node] != node:
                node = parent[node]
            return node

        for e in subset:
            a, b = find(edges[e][0]), find(n + edges[e][1])
            if a == b:
                break
            parent[a] = b
        else:
            found.append(subset)
    return np.array(found, dtype=int).reshape(len(found), size)


def spanning_trees(log_weights: Tensor, mask: Tensor | None = None) -> float:
    """log T by adding up every spanning tree (forest) of an n x m matrix, n, m <= 4."""
    _, _, terms = _terms(log_weights, mask)
    return float(logsumexp(terms))


def log_edge_probabilities(log_weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gradient of log T: log probability of each cell in a random weighted tree."""
    edges, forests, terms = _terms(log_weights, mask)
    total = logsumexp(terms)
    out = np.full(tuple(log_weights.shape), -np.inf)
    for e, (i, j) in enumerate(edges):
        used = (forests == e).any(-1)
        if used.any():
            out[i, j] = logsumexp(terms[used]) - total
    return torch.tensor(out, dtype=torch.float64)


def _terms(
    log_weights: Tensor, mask: Tensor | None
) -> tuple[tuple[tuple[int, int], ...], np.ndarray, np.ndarray]:
    weights = np.asarray(log_weights.detach(), dtype=float)
    allowed = np.ones(weights.shape, bool) if mask is None else np.asarray(mask)
    edges = tuple((int(i), int(j)) for i, j in zip(*np.nonzero(allowed), strict=True))
    forests = _forests(*weights.shape, edges)
    flat = np.array([weights[e] for e in edges])
    return edges, forests, flat[forests].sum(-1)


def precise_log_trees(log_P: Tensor, mask: Tensor | None = None) -> float:
    """log T as the determinant of the grounded Laplacian, in mpmath.

    The determinant of a Laplacian with weights down to w loses at most the digits of
    w at each of the eliminated nodes; that many are carried.
    """
    weights = np.asarray(log_P.detach(), dtype=float)
    n, m = weights.shape
    allowed = np.isfinite(weights) if mask is None else np.asarray(mask, dtype=bool)
    spread = max(0.0, float(-weights[allowed].min())) if allowed.any() else 0.0
    digits = DIGITS + int((n + m) * spread / math.log(10)) + 1
    with mpmath.workdps(digits):
        K = [
            [mpmath.exp(mpmath.mpf(weights[i, j])) if allowed[i, j] else mpmath.mpf(0)
             for j in range(m)]
            for i in range(n)
        ]  # fmt: skip
        kept = _kept_columns(allowed)
        A = _laplacian(K, kept)
        return float(mpmath.log(_determinant(A)))


def _kept_columns(allowed: np.ndarray) -> list[int]:
    """All columns but the last one of each component."""
    _, columns = components(allowed)
    last = {label: j for j, label in enumerate(columns)}
    return [j for j in range(allowed.shape[1]) if last[columns[j]] != j]


def _laplacian(
    K: Sequence[Sequence[mpmath.mpf]], kept: Sequence[int]
) -> list[list[mpmath.mpf]]:
    n, m = len(K), len(K[0])
    size = n + len(kept)
    A = [[mpmath.mpf(0)] * size for _ in range(size)]
    for i in range(n):
        A[i][i] = mpmath.fsum(K[i])
        for c, j in enumerate(kept):
            A[i][n + c] = A[n + c][i] = -K[i][j]
    for c, j in enumerate(kept):
        A[n + c][n + c] = mpmath.fsum(K[i][j] for i in range(n))
    assert m >= len(kept)
    return A


def _eliminate(
    A: list[list[mpmath.mpf]], b: list[mpmath.mpf]
) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
    """Gauss elimination of a symmetric positive definite system: solution, pivots."""
    size = len(A)
    A = [row[:] for row in A]
    b = b[:]
    for k in range(size):
        for i in range(k + 1, size):
            if A[i][k] == 0:
                continue
            factor = A[i][k] / A[k][k]
            for j in range(k + 1, size):
                A[i][j] -= factor * A[k][j]
            b[i] -= factor * b[k]
    x = [mpmath.mpf(0)] * size
    for i in reversed(range(size)):
        rest = mpmath.fsum(A[i][j] * x[j] for j in range(i + 1, size))
        x[i] = (b[i] - rest) / A[i][i]
    return x, [A[i][i] for i in range(size)]


def _determinant(A: list[list[mpmath.mpf]]) -> mpmath.mpf:
    return mpmath.fprod(_eliminate(A, [mpmath.mpf(0)] * len(A))[1])


# Sinkhorn


def plain_sinkhorn(
    logits: Tensor, temperature: Tensor | float = 1.0, iterations: int = 1000
) -> Tensor:
    """The unrolled loop in the log domain: log P, and its gradient by autograd."""
    temperature = torch.as_tensor(temperature, dtype=logits.dtype)
    log_P = logits / temperature[..., None, None]
    for _ in range(iterations):
        log_P = log_P - log_P.logsumexp(-1, keepdim=True)
        log_P = log_P - log_P.logsumexp(-2, keepdim=True)
    return log_P


def precise_sinkhorn(
    scores: Tensor,
    temperature: float = 1.0,
    marginals: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:  # (n, n) float64, -inf outside the total support
    """log P of one small matrix by Newton's method in mpmath.

    Minimises the convex dual ``sum exp(X/t + u + v) - r.u - c.v`` at a decreasing
    sequence of temperatures t, each started at the extrapolation of the potentials of
    the last two. Digits grow with the range of the scores, so that the smallest cell
    still has forty of them in every sum: then the potentials are right even where all
    the sums are 1 to double precision for a whole range of potentials.
    """
    X = np.asarray(scores.detach(), dtype=float)
    n, m = X.shape
    if mask is None:
        allowed = np.ones(X.shape, dtype=bool)
    else:
        allowed = np.asarray(total_support(mask))
    rows, columns = (np.ones(n), np.ones(m)) if marginals is None else marginals
    kept = _kept_columns(allowed)
    spread = float(X[allowed].max() - X[allowed].min())
    t = max(spread, temperature)
    previous: tuple[float, list[mpmath.mpf]] | None = None
    current: tuple[float, list[mpmath.mpf]] | None = None
    while True:
        # The potentials can stretch the range of the cells by a factor of up to n.
        digits = DIGITS + int(n * spread / t / math.log(10)) + 1
        with mpmath.workdps(digits):
            start = _extrapolate(previous, current, t, n + len(kept))
            log_P, g = _newton(X, allowed, kept, t, start, rows, columns)
        if t == temperature:
            return torch.tensor(log_P, dtype=torch.float64)
        previous, current = current, (t, g)
        t = max(t / 2, temperature)


def _extrapolate(
    previous: tuple[float, list[mpmath.mpf]] | None,
    current: tuple[float, list[mpmath.mpf]] | None,
    t: float,
    size: int,
) -> list[mpmath.mpf]:
    if current is None:
        return [mpmath.mpf(0)] * size
    t1, g1 = current
    if previous is None:
        return [x * t1 / t for x in g1]
    t0, g0 = previous
    slope = [(b * t1 - a * t0) / (t1 - t0) for a, b in zip(g0, g1, strict=True)]
    return [
        (b * t1 + s * (t - t1)) / t for b, s in zip(g1, slope, strict=True)
    ]  # linear in t * potential


def _newton(
    X: np.ndarray,
    allowed: np.ndarray,
    kept: list[int],
    t: float,
    g: list[mpmath.mpf],
    rows: Sequence[float],
    columns: Sequence[float],
) -> tuple[list[list[float]], list[mpmath.mpf]]:
    n, m = X.shape
    kernel = [
        [mpmath.exp(mpmath.mpf(X[i, j]) / mpmath.mpf(t)) if allowed[i, j] else
         mpmath.mpf(0) for j in range(m)]
        for i in range(n)
    ]  # fmt: skip
    r = [mpmath.mpf(float(x)) for x in rows]
    c = [mpmath.mpf(float(x)) for x in columns]
    for _ in range(10_000):
        a = [mpmath.exp(x) for x in g[:n]]
        b = [mpmath.mpf(1)] * m
        for x, j in zip(g[n:], kept, strict=True):
            b[j] = mpmath.exp(x)
        P = [[a[i] * kernel[i][j] * b[j] for j in range(m)] for i in range(n)]
        gap = [r[i] - mpmath.fsum(P[i]) for i in range(n)]
        gap += [mpmath.fsum(P[i][j] for i in range(n)) - c[j] for j in kept]
        # The Hessian in (u, -v) is the Laplacian of P.
        step, _ = _eliminate(_laplacian(P, kept), gap)
        step = step[:n] + [-s for s in step[n:]]
        size = max(abs(s) for s in step)
        if size < mpmath.mpf(10) ** -20:
            log_P = [
                [float(mpmath.log(P[i][j])) if allowed[i, j] else -math.inf
                 for j in range(m)]
                for i in range(n)
            ]  # fmt: skip
            return log_P, g
        scale = min(mpmath.mpf(1), 3 / size)
        g = [x + scale * s for x, s in zip(g, step, strict=True)]
    raise AssertionError("the high-precision reference did not converge")


# Densities


def logistic_sum_density(s: float) -> mpmath.mpf:
    """log density at s of the sum of two standard logistic variables, by mpmath.

    f(s) = e^s ((s - 2) e^s + s + 2) / (e^s - 1)^3, whose limit at 0 is 1/6; the
    textbook form cancels to the third order there, hence the digits.
    """
    with mpmath.workdps(120):
        x = abs(mpmath.mpf(s))
        if x < mpmath.mpf(10) ** -25:
            return -mpmath.log(6)
        d = mpmath.exp(-x)
        return mpmath.log(x - 2 + (x + 2) * d) - x - 3 * mpmath.log(1 - d)


def density_n2(X: Tensor, log_P: Tensor, temperature: float) -> float:
    """log p(P) of two items in closed form, from log P (so P may underflow)."""
    with mpmath.workdps(60):
        x, l = (np.asarray(v.detach(), dtype=float) for v in (X, log_P))
        t = mpmath.mpf(temperature)
        log_x, log_y = mpmath.mpf(l[0, 0]), mpmath.mpf(l[0, 1])
        contrast = mpmath.mpf(x[0, 0]) + x[1, 1] - x[0, 1] - x[1, 0]
        s = 2 * t * (log_x - log_y) - contrast
        return float(logistic_sum_density(s) + mpmath.log(2 * t) - log_x - log_y)


def log_density(
    X: Tensor,
    log_P: Tensor,
    temperature: float,
    log_integral: float,
    mask: Tensor | None = None,
) -> float:
    """log p(P) put together from log T(P) in mpmath and a value of the fibre integral.

    L_ij = tau log P_ij + u_i + v_j has Jacobian tau^dim T(P) / prod P with respect to
    the free cells and the shifts; the noise density is integrated over the shifts.
    """
    allowed = np.isfinite(np.asarray(log_P)) if mask is None else np.asarray(mask)
    n, m = allowed.shape
    rows, columns = components(allowed)
    dim = allowed.sum() - (n + m - len(set(rows) | set(columns)))
    change = dim * math.log(temperature) - np.asarray(log_P)[allowed].sum()
    trees = precise_log_trees(log_P, torch.tensor(allowed))
    return float(change + trees + log_integral)


def _shift_problem(
    M: np.ndarray | Tensor, mask: np.ndarray | Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int], float]:
    M = np.asarray(M, dtype=float)
    allowed = np.ones(M.shape, bool) if mask is None else np.asarray(mask, dtype=bool)
    kept = _kept_columns(allowed)
    r = allowed.sum(1)
    # Integrating the row shifts leaves log Gamma(r_i) and the sum of M.
    constant = float(gammaln(r).sum() + M[allowed].sum())
    return np.where(allowed, M, -np.inf), r, allowed.sum(0), kept, constant


def _shift_value(
    b: np.ndarray, M: np.ndarray, r: np.ndarray, c: np.ndarray, kept: list[int]
) -> np.ndarray:
    """F(b) = sum_j c_j b_j - sum_i r_i logsumexp_j(M_ij + b_j), b (*S, len(kept))."""
    full = np.zeros((*b.shape[:-1], M.shape[1]))
    full[..., kept] = b
    # exp and a matrix product after scaling by the largest cell of each row at b = 0
    top = (M[None] + full.reshape(-1, 1, M.shape[1])).max(-1, initial=-np.inf)
    shifted = np.exp(M[None] + full.reshape(-1, 1, M.shape[1]) - top[..., None]).sum(-1)
    lse = (np.log(shifted) + top).reshape(*b.shape[:-1], len(r))
    return full @ c - lse @ r


def _shift_mode(
    M: np.ndarray, r: np.ndarray, c: np.ndarray, kept: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The maximum of F and its negative Hessian there, by damped Newton."""
    b = np.zeros(len(kept))
    for _ in range(10_000):
        full = np.zeros(M.shape[1])
        full[kept] = b
        q = np.exp(M + full - logsumexp(M + full, axis=1, keepdims=True))
        gradient = (c - r @ q)[kept]
        H = (np.diag(r @ q) - (q * r[:, None]).T @ q)[np.ix_(kept, kept)]
        step = np.linalg.solve(H + 1e-14 * np.eye(len(kept)), gradient)
        value = _shift_value(b, M, r, c, kept)
        scale = min(1.0, 10 / max(np.abs(step).max(), 1e-300))
        while (
            scale > 1e-10
            and _shift_value(b + scale * step, M, r, c, kept) < value - 1e-12
        ):
            scale /= 2
        b = b + scale * step
        if np.abs(step).max() < 1e-11:
            break
    return b, H


def shift_integral(
    M: np.ndarray | Tensor,
    mask: np.ndarray | Tensor | None = None,
    samples: int = 20_000,
    seed: int = 0,
    widths: Sequence[float] | None = None,
) -> tuple[float, float]:
    """log of the integral of prod_E g(eps_ij) over shifts, by importance sampling.

    eps_ij = u_i + v_j - M_ij with one v for each component held at 0, log g(z) = -z -
    exp(-z). The row shifts are integrated exactly; the others are drawn in antithetic
    pairs from Gaussians about the mode with the covariance at the mode times
    ``widths`` squared (by default 1 and a little more, since the tails are heavier than
    a Gaussian's). Returns the value and its standard error.
    """
    M, r, c, kept, constant = _shift_problem(M, mask)
    d = len(kept)
    if d == 0:
        b = np.zeros((1, 0))
        return constant + float(_shift_value(b, M, r, c, kept)[0]), 0.0
    mode, H = _shift_mode(M, r, c, kept)
    peak = float(_shift_value(mode, M, r, c, kept))
    root = np.linalg.cholesky(H)
    half_log_det = np.log(np.diag(root)).sum()
    rng = np.random.default_rng(seed)
    widths = (1.0, 1.0 + 0.5 / math.sqrt(d)) if widths is None else widths
    logs = []
    chunk = max(1, 4_000_000 // M.size)
    share = math.log(len(widths))
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        z = rng.standard_normal((size, d))
        z *= rng.choice(np.asarray(widths), size)[:, None]
        norm = (z**2).sum(-1)
        proposal = logsumexp(
            [-norm / (2 * w * w) - d * math.log(w) for w in widths], axis=0
        )
        proposal += half_log_det - d / 2 * math.log(2 * math.pi) - share
        step = np.linalg.solve(root.T, z.T).T
        pair = [
            _shift_value(mode + sign * step, M, r, c, kept) - peak - proposal
            for sign in (1, -1)
        ]
        logs.append(np.logaddexp(*pair) - math.log(2))
    log_w = np.concatenate(logs)
    top = log_w.max()
    w = np.exp(log_w - top)
    error = w.std(ddof=1) / w.mean() / math.sqrt(len(w))
    return constant + peak + top + math.log(w.mean()), float(error)


def shift_integral_grid(
    M: np.ndarray | Tensor, mask: np.ndarray | Tensor | None = None, nodes: int = 401
) -> float:
    """The same integral by the trapezoidal rule, for one to three column shifts.

    The integrand is smooth and falls exponentially, so the rule on a box that holds
    everything above e^-45 of the peak converges faster than any power of the step:
    61 nodes are enough at draws of the distribution itself.
    """
    M, r, c, kept, constant = _shift_problem(M, mask)
    d = len(kept)
    assert d in (1, 2, 3)
    mode, H = _shift_mode(M, r, c, kept)
    peak = float(_shift_value(mode, M, r, c, kept))
    # Axes of the Hessian, each stretched until F on the boundary is far below.
    lam, U = np.linalg.eigh(H)
    low, high = np.full(d, -1.0), np.full(d, 1.0)
    for _ in range(200):
        axes = [np.linspace(low[k], high[k], 21 if d == 3 else 61) for k in range(d)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
        F = _shift_value(mode + (grid / np.sqrt(lam)) @ U.T, M, r, c, kept) - peak
        grown = False
        for k in range(d):
            if np.take(F, 0, axis=k).max() > -45:
                low[k] *= 1.3
                grown = True
            if np.take(F, -1, axis=k).max() > -45:
                high[k] *= 1.3
                grown = True
        if not grown:
            break
    axes = [np.linspace(low[k], high[k], nodes) for k in range(d)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    F = _shift_value(mode + (grid / np.sqrt(lam)) @ U.T, M, r, c, kept) - peak
    cell = math.log(np.prod([a[1] - a[0] for a in axes])) - np.log(lam).sum() / 2
    return constant + peak + float(logsumexp(F)) + cell
