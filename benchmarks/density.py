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
    root = np.linalg.cholesky(hessian[:-1, :-1])
    size, values = len(root), []
    for nodes in {1: (199, 299), 2: (79, 119), 3: (41, 61)}[size]:
        t, step = np.linspace(-4, 4, nodes, retstep=True)
        grid = np.stack(np.meshgrid(*[t] * size), -1).reshape(-1, size)
        b = np.sinh(grid) @ np.linalg.inv(root)
        logs = log_integrand(b, kernel, r, c) + np.log(np.cosh(grid) * step).sum(1)
        values.append(float(logsumexp(logs) - np.log(np.diag(root)).sum()))
    return values[1], abs(values[1] - values[0])


def by_sampling(M: Array, mask: Array, seed: int) -> tuple[float, float]:
    """Importance sampling from a t distribution, and its standard error.

    Given the column shifts, exp of the row shifts is Gamma, and the other way round:
    Gibbs sampling is Sinkhorn with random sums. It finds the moments for the proposal.
    """
    kernel, r, c = centred(M, mask)
    rng, chains, steps, points = np.random.default_rng(seed), 64, 1000, 60_000
    beta, kept = np.ones((chains, len(M))), []
    for step in range(steps):
        alpha = rng.standard_gamma(r, beta.shape) / (beta @ kernel.T)
        beta = rng.standard_gamma(c, beta.shape) / (alpha @ kernel)
        if step >= steps // 4 and step % 3 == 0:
            kept.append(np.log(beta[:, :-1] / beta[:, -1:]))
    found = np.concatenate(kept)
    size = found.shape[1]
    freedom = 6 + size
    scale = 1.1 * (freedom - 2) / freedom
    root = np.linalg.cholesky(scale * np.atleast_2d(np.cov(found.T)))
    z = rng.standard_normal((points, size))
    z /= np.sqrt(rng.chisquare(freedom, (points, 1)) / freedom)
    constant = float(gammaln((freedom + size) / 2) - gammaln(freedom / 2))
    constant -= size / 2 * math.log(freedom * math.pi) + np.log(np.diag(root)).sum()
    density = constant - (freedom + size) / 2 * np.log1p((z**2).sum(1) / freedom)
    logs = log_integrand(found.mean(0) + z @ root.T, kernel, r, c) - density
    weights = np.exp(logs - logs.max())
    error = weights.std() / weights.mean() / math.sqrt(points)
    return float(logs.max() + np.log(weights.mean())), float(error)


def reference(M: Tensor, blocks: list[Array], seed: int) -> tuple[float, float]:
    """Log of the integral for a mask of these connected blocks, and its error."""
    value, variance, start = 0.0, 0.0, 0
    for mask in blocks:
        end = start + len(mask)
        part = M[start:end, start:end].numpy()
        if len(mask) > 4:
            log, error = by_sampling(part, mask, seed)
        elif len(mask) > 1:
            log, error = by_quadrature(part, mask)
        else:
            log, error = 0.0, 0.0
        value, variance, start = value + log, variance + error**2, end
    return value, math.sqrt(variance)


# %% Reference for the volume change
def precise(scores: Tensor, log_P: Tensor) -> tuple[Tensor, float]:
    """Log Sinkhorn of scores and its log T by mpmath: Newton's method from log P.

    The dual is convex, so any start will do. As many digits are carried as the smallest
    cell can take away in every pivot.
    """
    n, spread = len(scores), float(-log_P.min())
    with mpmath.workdps(40 + int(2 * n * spread / math.log(10))):
        x, start = mpmath.matrix(scores.tolist()), mpmath.matrix(log_P.tolist())
        u = [start[i, n - 1] - x[i, n - 1] for i in range(n)]
        v = [start[0, j] - x[0, j] - u[0] for j in range(n)]
        size = mpmath.inf
        while size > mpmath.mpf(10) ** -20:
            log = [[x[i, j] + u[i] + v[j] for j in range(n)] for i in range(n)]
            P = [[mpmath.exp(cell) for cell in row] for row in log]
            sums = [mpmath.fsum(row) for row in P]
            sums += [mpmath.fsum(column) for column in zip(*P, strict=True)]
            laplacian = mpmath.diag(sums)
            for i, j in itertools.product(range(n), range(n)):
                laplacian[i, n + j] = laplacian[n + j, i] = -P[i][j]
            laplacian = laplacian[: 2 * n - 1, : 2 * n - 1]  # the last v is zero
            signs = [1] * n + [-1] * (n - 1)
            gap = [s * (1 - t) for s, t in zip(signs, sums[:-1], strict=True)]
            solved = mpmath.lu_solve(laplacian, mpmath.matrix(gap))
            change = [s * t for s, t in zip(signs, solved, strict=True)]
            size = max(abs(t) for t in change)
            length = min(1, 3 / size) if size else 0
            u = [a + length * t for a, t in zip(u, change[:n], strict=True)]
            v[:-1] = [a + length * t for a, t in zip(v, change[n:], strict=False)]
        exact = torch.tensor([[float(c) for c in row] for row in log]).double()
        return exact, float(mpmath.log(mpmath.det(laplacian)))


# %% Tables
MISSED = []


def line(text: str, errors: list[float], bounds: list[float]) -> None:
    """Print a line of a table, and remember it if an error is beyond its bound."""
    missed = any(not e <= b for e, b in zip(errors, bounds, strict=True))
    print(text + ("  MISSES" if missed else ""), flush=True)
    if missed:
        MISSED.append(text)


INTEGRAL = (
    f"{'mean':>20}{'worst':>10}{'reference':>11}{'bound':>10}"
    f"{'estimate: median':>18}{'max':>8}{'covers':>8}"
)


def integral(
    title: str,
    blocks: list[Array],
    scores: Tensor,  # (count, n, n)
    prior: GumbelContrasts,
    bound: float,
) -> None:
    """One line: log_prob of the base at contrasts of scores beside the reference."""
    Z = prior.graph.contrasts(scores)
    value, estimate = prior.log_prob(Z), prior.log_prob_error(Z)
    found = [reference(M, blocks, k) for k, M in enumerate(prior.logits - Z)]
    expected, chance = torch.tensor(found).double().unbind(-1)
    signed = value - expected
    error = signed.abs()
    slack = SIGMAS * chance + (CLOSED if bound == CLOSED else 1e-4)
    covered = int((error <= estimate + slack).sum())
    excess = (error - SIGMAS * chance).max().item()
    text = (
        f"{title:<10}{signed.mean():>10.1e}{error.max():>10.1e}{chance.max():>11.1e}"
        f"{bound:>10.0e}{estimate.median():>18.1e}{estimate.max():>8.0e}"
        f"{covered:>5}/{len(error)}"
    )
    line(text, [excess, len(error) - covered], [bound, 0])


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


def noisy(logits: Tensor) -> Tensor:
    """Scores with Gumbel noise."""
    return logits - torch.empty_like(logits).exponential_().log()


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
    bounds = {1: CLOSED, 2: CLOSED, 3: QUADRATURE, 4: QUADRATURE}
    for title, blocks in cases.items():
        mask = torch.block_diag(*[torch.from_numpy(x).double() for x in blocks]).bool()
        X = 4 * torch.randn(count, *mask.shape)
        bound = max(bounds.get(len(x), SERIES) for x in blocks)
        integral(title, blocks, noisy(X), GumbelContrasts(X, mask=mask), bound)


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
                (value[k] - base[k] - truth) / (1 + 1e-3 * value[k].abs()),
                value[k] - truth - by_quadrature(M.numpy(), full(n))[0],
                single_precision(X[k].float(), tau),
            ]
            worst = torch.maximum(worst, torch.stack(errors).abs())
        text = f"{n:>2}{tau:>6g}{scale:>7}" + "".join(f"{x:>11.0e}" for x in worst)
        text += f"{log_P.min():>11.0f}"
        line(text, worst.tolist(), [*[PRECISE] * 4, QUADRATURE, FLOAT32])


def single_precision(X: Tensor, tau: float) -> Tensor:
    """Relative difference of a draw's density in float32 from that in float64."""
    P = GumbelSinkhorn(X, tau).rsample()
    Z = matching_graph(None, X.shape, X.device).contrasts(tau * log_of(P))
    double = GumbelSinkhorn(X.double(), tau).log_prob(BirkhoffTransform(tau)(Z))
    return (GumbelSinkhorn(X, tau).log_prob(P) - double) / (1 + double.abs())


TWO = [[0.3, -0.5], [0.2, 0.9]]
THREE = [[1, 0, -1], [0.5, 0.2, 0], [-0.3, 0.4, 0.8]]
AT_THREE = [[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.2, 0.7]]
VALUES = [
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
    cases += [
        (THREE, AT_THREE, tau, e, QUADRATURE)
        for tau, e in ((1.0, 3.5188), (0.5, 0.7832))
    ]
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
    for s, n, samples in itertools.product((1, 2, 5, 10), sizes, (0, POINTS)):
        prior = GumbelContrasts(torch.zeros(count, n, n), density_samples=samples)
        bound = SAMPLED if samples and s <= 2 else math.inf
        title = f"{s:>2}{n:>4}" + (" with" if samples else "")
        integral(title, [full(n)], noisy(s * torch.randn(count, n, n)), prior, bound)


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
    own_draws(4 if args.quick else 50)
    print(f"{time.perf_counter() - begin:.0f} s")
    volume(1 if args.quick else 10)
    print(f"{time.perf_counter() - begin:.0f} s")
    reference_values(1000 if args.quick else 10_000)
    print(f"{time.perf_counter() - begin:.0f} s")
    flat_prior(*((3, [3, 5, 20]) if args.quick else (20, [3, 4, 5, 8, 12, 20])))
    print(f"\n{len(MISSED)} lines miss, {time.perf_counter() - begin:.0f} s")
    sys.exit(len(MISSED))


if __name__ == "__main__":
    main()
