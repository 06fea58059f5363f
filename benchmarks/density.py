# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""How exact the density is: every part of it beside a reference that shares no code.

    log p(P) = dim log tau - sum log P + log T(P) + log I(X - tau log P)

    pip install -e ".[test]"
    python benchmarks/density.py --quick    # a minute
    python benchmarks/density.py            # ten

All errors are in nats. T counts weighted spanning trees, and with sum log P it is held
against mpmath; I is the integral of the noise density over row and column shifts, held
against quadrature (components of up to 4 rows) or importance sampling with moments from
Gibbs sampling, whose standard error is stated. A line MISSES if an error exceeds its
bound by more than four standard errors of the reference; the exit status is the number
of such lines. A ConvergenceWarning or LostLogWarning ends the run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
import warnings

import mpmath
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp
from scipy.stats import multivariate_t
from torch import Tensor

from pyro_permutations import (
    BirkhoffTransform,
    ConvergenceWarning,
    GumbelContrasts,
    GumbelSinkhorn,
    LostLogWarning,
    log_of,
    matching_graph,
)

Array = NDArray[np.float64]

SIGMAS = 4  # standard errors that count as chance
CLOSED, QUADRATURE, SERIES = 1e-8, 1e-3, 0.01  # of I: 2 rows, 3 and 4 rows, more
SAMPLED = 0.02  # of a flat prior under a mild guide, with density samples
PRECISE = 1e-6  # of log P, log T and the identity
FLOAT32 = 1e-3  # relative to 1 + |log p|
AGREEMENT = 1e-5  # of quadrature with a coarser rule, for it to be a reference
ROUNDING = 1e-12  # of a sum of some hundred terms
STATED = 3e-3  # the largest standard error of a reference at own draws
POINTS = 4096  # density samples


# %% References for the integral, one connected component of a mask at a time
def centred(M: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Kernel exp(M), shifted to sums that are the counts, and the counts: mode at 0."""
    r, c = mask.sum(1), mask.sum(0)
    x = np.where(mask, M, -np.inf)
    for _ in range(1000):
        x = x - logsumexp(x, axis=1, keepdims=True) + np.log(r)[:, None]
        gap = logsumexp(x, axis=0) - np.log(c)
        x = x - gap
        if np.abs(gap).max() < 1e-13:
            break
    return np.exp(x), r, c


def log_integrand(b: Array, kernel: Array, r: Array, c: Array) -> Array:
    """At column shifts b (N, n - 1), the last one 0; rows are Gamma integrals."""
    b = np.hstack([b, np.zeros((len(b), 1))])
    top = b.max(1, keepdims=True)
    sums = np.log(np.exp(b - top) @ kernel.T) + top
    constant = np.log(kernel[kernel > 0]).sum() + gammaln(r).sum()
    result: Array = constant + b @ c - sums @ r
    return result


def by_quadrature(M: Array, mask: Array) -> tuple[float, float]:
    """Trapezoidal rule in t, b = R sinh(t), and its difference from a coarser one."""
    kernel, r, c = centred(M, mask)
    hessian = np.diag(c) - kernel.T @ (kernel / r[:, None])
    try:
        root = np.linalg.cholesky(hessian[:-1, :-1])
    except np.linalg.LinAlgError:  # a direction without curvature: no scale for a grid
        return math.nan, math.inf
    size, values = len(root), []
    for nodes in {1: (199, 299), 2: (79, 119), 3: (41, 61)}[size]:
        t, step = np.linspace(-4, 4, nodes, retstep=True)
        grid = np.stack(np.meshgrid(*[t] * size), -1).reshape(-1, size)
        b = np.sinh(grid) @ np.linalg.inv(root)
        logs = log_integrand(b, kernel, r, c) + np.log(np.cosh(grid) * step).sum(1)
        values.append(float(logsumexp(logs) - np.log(np.diag(root)).sum()))
    return values[1], abs(values[1] - values[0])


def by_sampling(
    M: Array, mask: Array, seed: int, points: int = 100_000
) -> tuple[float, float]:
    """Importance sampling from a t distribution, and its standard error.

    Given the column shifts, exp of the row shifts is Gamma, and the other way round:
    Gibbs sampling is Sinkhorn with random sums. It finds the moments for the proposal.
    """
    kernel, r, c = centred(M, mask)
    rng, chains, steps = np.random.default_rng(seed), 64, 1000
    beta, kept = np.ones((chains, len(M))), []
    for step in range(steps):
        alpha = rng.standard_gamma(r, beta.shape) / (beta @ kernel.T)
        beta = rng.standard_gamma(c, beta.shape) / (alpha @ kernel)
        if step >= steps // 4 and step % 3 == 0:
            kept.append(np.log(beta[:, :-1] / beta[:, -1:]))
    found = np.concatenate(kept)
    freedom = 6 + found.shape[1]
    shape = 1.05 * (freedom - 2) / freedom * np.atleast_2d(np.cov(found.T))
    proposal = multivariate_t(found.mean(0), shape, freedom, seed=rng)
    b = proposal.rvs(points).reshape(points, -1)
    logs = log_integrand(b, kernel, r, c) - proposal.logpdf(b)
    weights = np.exp(logs - logs.max())
    error = weights.std() / weights.mean() / math.sqrt(points)
    return float(logs.max() + np.log(weights.mean())), float(error)


def reference(M: Array, blocks: list[Array], seed: int) -> tuple[float, float]:
    """Log of the integral for a mask of these connected blocks, and its error."""
    value, variance, start = 0.0, 0.0, 0
    for mask in blocks:
        part = M[start : start + len(mask), start : start + len(mask)]
        start += len(mask)
        log, error = 0.0, 0.0 if len(mask) == 1 else math.inf
        if 2 <= len(mask) <= 4:
            log, error = by_quadrature(part, mask)
        if error > AGREEMENT:
            log, error = by_sampling(part, mask, seed)
        if error > STATED:
            log, error = by_sampling(part, mask, seed, points=800_000)
        value, variance = value + log, variance + error**2
    return value, math.sqrt(variance)


# %% Reference for the volume change
def precise(scores: Tensor, log_P: Tensor) -> tuple[Tensor, float]:
    """Log Sinkhorn of scores and its log T, by mpmath: Newton's method from log P.

    The dual is convex, so any start will do. The Hessian is the Laplacian of the tree
    count but for signs that leave the determinant alone. As many digits are carried as
    the smallest cell can take away in every pivot.
    """
    n, spread, start = len(scores), float(-log_P.min()), log_P - scores
    pairs = list(itertools.product(range(n), range(n)))
    with mpmath.workdps(40 + int(2 * n * spread / math.log(10))):
        g = mpmath.matrix([*start[:, -1].tolist(), *(start[0] - start[0, -1]).tolist()])
        x = mpmath.matrix(scores.tolist())
        for _ in range(500):
            log = mpmath.matrix(n)
            for i, j in pairs:
                log[i, j] = x[i, j] + g[i] + g[n + j]
            P = log.apply(mpmath.exp)
            sums = [mpmath.fsum(P[i, :]) for i in range(n)]
            sums += [mpmath.fsum(P[:, j]) for j in range(n)]
            hessian = mpmath.diag(sums)
            for i, j in pairs:
                hessian[i, n + j] = hessian[n + j, i] = P[i, j]
            hessian = hessian[: 2 * n - 1, : 2 * n - 1]  # the last column shift is zero
            gap = mpmath.matrix([1 - x for x in sums[:-1]])
            change = mpmath.lu_solve(hessian, gap)
            size = mpmath.norm(change, mpmath.inf)
            if size < mpmath.mpf(10) ** -20:
                exact = torch.tensor([float(cell) for cell in log]).reshape(n, n)
                return exact, float(mpmath.log(mpmath.det(hessian)))
            for k in range(2 * n - 1):
                g[k] += min(1, 3 / size) * change[k]
    raise AssertionError("Newton's method did not converge")


# %% Tables
MISSED = []


def line(text: str, errors: list[float], bounds: list[float]) -> None:
    """Print a line of a table, and remember it if an error is beyond its bound."""
    missed = any(not e <= b for e, b in zip(errors, bounds, strict=True))
    print(text + ("  MISSES" if missed else ""), flush=True)
    if missed:
        MISSED.append(text)


INTEGRAL = (
    f"{'mean':>20}{'worst':>10}{'reference':>11}{'bound':>8}"
    f"{'estimate: median':>18}{'max':>8}{'covers':>8}"
)


def integral(
    title: str,
    blocks: list[Array],
    logits: Tensor,  # (count, n, n)
    guide: Tensor,  # (count, n, n), the logits of the draws
    bounds: dict[int, float],  # on the error, by number of density samples
    stated: float = math.inf,
    covers: bool = False,
) -> None:
    """Lines: the density of contrasts for a mask of these blocks, and its error.

    They are to keep the bounds, the standard error to be below the stated one and, if
    ``covers``, the error below the package's own estimate of it.
    """
    mask = torch.block_diag(*[torch.tensor(x) for x in blocks]).bool()
    Z = GumbelContrasts(guide, mask=mask).rsample()
    M = (logits - Z).numpy()
    found = [reference(M[k], blocks, seed=k) for k in range(len(M))]
    expected, chance = torch.tensor(found).unbind(-1)
    for samples, bound in bounds.items():
        prior = GumbelContrasts(logits, mask=mask, density_samples=samples)
        error, estimate = prior.log_prob(Z) - expected, prior.log_prob_error(Z)
        excess = error.abs() - SIGMAS * chance
        missed = int((excess > estimate + ROUNDING).sum())
        text = (
            f"{title + ' with' * (samples > 0):<10}{error.mean():>10.1e}"
            f"{error.abs().max():>10.1e}{chance.max():>11.1e}{bound:>8.0e}"
            f"{estimate.median():>18.1e}{estimate.max():>8.0e}"
            f"{len(Z) - missed:>5}/{len(Z)}"
        )
        errors = [excess.max().item(), chance.max().item(), missed]
        line(text, errors, [bound, stated, 0 if covers else math.inf])


def full(n: int) -> Array:
    """Every pair is allowed."""
    return np.ones((n, n), dtype=bool)


def cycle(n: int, width: int) -> Array:
    """A band that closes."""
    return sum(np.roll(np.eye(n, dtype=bool), k, 1) for k in range(width)) > 0


def sparse(n: int, cells: int) -> Array:
    """A cycle, and other cells at random."""
    rng, mask = np.random.default_rng(0), cycle(n, 2)
    while mask.sum() < cells:
        mask[tuple(rng.integers(n, size=2))] = True
    return mask


def own_draws(count: int) -> None:
    """(1) The integral at draws of the distribution itself, and under masks."""
    print(f"\n1. The integral I, {count} own draws each, logits N(0, 16)\n{INTEGRAL}")
    cases = {f"n = {n}": [full(n)] for n in (2, 3, 4, 5, 10, 20, 50)}
    cases |= {
        "2+2+2": [full(2)] * 3,
        "3+3+2+1": [full(3), full(3), full(2), full(1)],
        "width 2, 5": [cycle(5, 2)],
        "width 2, 8": [cycle(8, 2)],
        "width 3, 5": [cycle(5, 3)],
        "width 3, 8": [cycle(8, 3)],
        "sparse 15": [sparse(15, 84)],
    }
    for title, blocks in cases.items():
        largest = max(len(mask) for mask in blocks)
        bound = {2: CLOSED, 3: QUADRATURE, 4: QUADRATURE}.get(largest, SERIES)
        X = 4 * torch.randn(count, *[sum(len(mask) for mask in blocks)] * 2)
        integral(title, blocks, X, X, {0: bound}, STATED)


def volume(count: int) -> None:
    """(2, 3) The volume change, the whole density, and float32."""
    print(f"\n2, 3. Volume change and density end to end, {count} own draws; worst")
    heads = ["log P", "sum log P", "log T", "identity", "absolute", "float32", "least"]
    print(f"{'n':>2}{'tau':>6}{'scale':>7}" + "".join(f"{x:>11}" for x in heads))
    for n, tau, scale in itertools.product((2, 3, 4), (1.0, 0.1, 0.01), (0, 3, 10)):
        X = scale * torch.randn(count, n, n)
        d = GumbelSinkhorn(X, tau)
        state = torch.get_rng_state()
        Z = d.base_dist.rsample()
        torch.set_rng_state(state)
        P = d.rsample()  # the image of Z
        value, log_P, base = d.log_prob(P), log_of(P), d.base_dist.log_prob(Z)
        # log|dP/dZ| holds log T, which has no public name of its own.
        change = d.transforms[0].log_abs_det_jacobian(Z, P)
        constant = (n - 1) ** 2 * math.log(tau)
        log_T = log_P.sum((-2, -1)) - constant - change
        worst = torch.zeros(6)
        for k in range(count):
            exact, trees = precise(Z[k] / tau, log_P[k])
            total = exact.sum()
            truth = constant - total + trees
            M = X[k] - Z[k]
            errors = [
                (log_P[k] - exact).abs().max(),
                log_P[k].sum() - total,
                log_T[k] - trees,
                value[k] - base[k] - truth,
                value[k] - truth - by_quadrature(M.numpy(), full(n))[0],
                single_precision(X[k].float(), tau),
            ]
            worst = torch.maximum(worst, torch.stack(errors).abs())
        text = f"{n:>2}{tau:>6g}{scale:>7}" + "".join(f"{x:>11.0e}" for x in worst)
        text += f"{log_P.min():>11.0f}"
        absolute = CLOSED if n == 2 else QUADRATURE
        line(text, worst.tolist(), [*[PRECISE] * 4, absolute, FLOAT32])


def single_precision(X: Tensor, tau: float) -> Tensor:
    """Relative difference of a draw's density in float32 from that in float64."""
    P = GumbelSinkhorn(X, tau).rsample()
    Z = matching_graph(None, X.shape, X.device).contrasts(tau * log_of(P))
    double = GumbelSinkhorn(X.double(), tau).log_prob(BirkhoffTransform(tau)(Z))
    return (GumbelSinkhorn(X, tau).log_prob(P) - double) / (1 + double.abs())


TWO = [[0.3, -0.5], [0.2, 0.9]]
THREE = [[1, 0, -1], [0.5, 0.2, 0], [-0.3, 0.4, 0.8]]
AT_THREE = [[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.2, 0.7]]
VALUES_AT_THREE = [(1.0, 3.5188), (0.5, 0.7832)]  # these to 1e-4
VALUES = [  # of P11, tau
    (0.7, 1.0, 0.458250),
    (0.99, 1.0, -0.640969),
    (0.05, 1.0, -1.961437),
    (0.7, 0.5, -0.273542),
    (0.99, 0.1, 1.180378),
]


def reference_values(count: int) -> None:
    """(4) Values worked out by hand, ratios that average to one, and shifts."""
    print(f"\n4. Reference values\n{'n':>2}{'tau':>6}{'log p':>12}{'expected':>12}")
    cases = [(TWO, [[p, 1 - p], [1 - p, p]], tau, e, PRECISE) for p, tau, e in VALUES]
    cases += [(THREE, AT_THREE, tau, e, QUADRATURE) for tau, e in VALUES_AT_THREE]
    for X, P, tau, expected, bound in cases:
        value = float(GumbelSinkhorn(torch.tensor(X), tau).log_prob(torch.tensor(P)))
        text = f"{len(X):>2}{tau:>6g}{value:>12.6f}{expected:>12.6f}"
        line(text, [abs(value - expected)], [bound])
    print("Shifts of rows and columns by N(0, 400)\n n      worst")
    for n in (2, 3, 5, 10):
        X = 2 * torch.randn(20, n, n)
        d, shift = GumbelSinkhorn(X, 0.4), 20 * torch.randn(2, 20, n, 1)
        P = d.sample()
        shifted = GumbelSinkhorn(X + shift[0] + shift[1].mT, 0.4).log_prob(P)
        worst = (shifted - d.log_prob(P)).abs().max().item()
        line(f"{n:>2}{worst:>11.0e}", [worst], [PRECISE])
    print(f"E_a[p_b / p_a] = 1, {count} draws of a, |X_b - X_a| <= .5")
    print(f"{'n':>2}{'tau_b / tau_a':>15}{'mean':>9}{'standard error':>16}")
    for n, ratio in itertools.product((2, 3, 5), (0.8, 1.0, 1.25)):
        X = torch.randn(n, n)
        a = GumbelSinkhorn(X, 0.6)
        b = GumbelSinkhorn(X + torch.rand(n, n) - 0.5, 0.6 * ratio)
        P = a.sample((count,))
        weight = (b.log_prob(P) - a.log_prob(P)).exp()
        mean, error = weight.mean().item(), (weight.std() / count**0.5).item()
        text = f"{n:>2}{ratio:>15g}{mean:>9.4f}{error:>16.4f}"
        line(text, [abs(mean - 1)], [SIGMAS * error])


def flat_prior(count: int, sizes: list[int]) -> None:
    """(5) A flat prior at draws of a guide."""
    print("\n5. A flat prior at draws of a guide with logits N(0, s^2),")
    print(f"{count} draws each, without and with {POINTS} density samples\n{INTEGRAL}")
    for s, n in itertools.product((1, 2, 5, 10), sizes):
        zero, X = torch.zeros(count, n, n), s * torch.randn(count, n, n)
        bounds = {0: math.inf, POINTS: SAMPLED if s <= 2 else math.inf}
        integral(f"{s:>2}{n:>3}", [full(n)], zero, X, bounds, covers=s >= 5)


def main() -> None:
    """Read the command line, print the tables."""
    parser = argparse.ArgumentParser(description="How exact the density is.")
    parser.add_argument("--quick", action="store_true", help="fewer draws")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for kind in (ConvergenceWarning, LostLogWarning):
        warnings.simplefilter("error", kind)
    begin = time.perf_counter()
    quick = args.quick
    own_draws(4 if quick else 50)
    volume(1 if quick else 10)
    reference_values(1000 if quick else 10_000)
    flat_prior(*((4, [3, 5, 20]) if quick else (20, [3, 4, 5, 10, 20])))
    print(f"\n{len(MISSED)} lines miss, {time.perf_counter() - begin:.0f} s")
    sys.exit(len(MISSED))


if __name__ == "__main__":
    main()
