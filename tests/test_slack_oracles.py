# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The slack references against closed forms, other algorithms, and each other."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import oracles
import pytest
import slack_oracles
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import expit, gammaln, logsumexp
from slack_oracles import (
    best_partial,
    gibbs_marginals,
    log_density_injection,
    log_density_mixed,
    log_density_partial,
    partial_matchings,
    relaxed,
    usable,
)

# allowed, row_free, column_free: nothing but slack, masks, Hall sets, closed components
PROBLEMS = {
    "partial": (np.ones((2, 3)), [1, 1], [1, 1, 1]),
    "injection": (np.ones((2, 3)), [0, 0], [1, 1, 1]),
    "perfect": (np.ones((3, 3)), [0, 0, 0], [0, 0, 0]),
    "empty row and column": ([[1, 0, 1], [0, 0, 0]], [1, 1], [1, 1, 1]),
    "mixed": (np.ones((3, 3)), [0, 1, 1], [1, 0, 1]),
    "mixed mask": ([[1, 1, 0], [1, 1, 1], [0, 1, 1]], [0, 0, 1], [0, 1, 1]),
    # rows 0 and 1 need columns 0 and 1: cells (2, 0), (2, 1) and their slack are out
    "Hall set": ([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], [0, 0, 0], [1] * 4),
    "known pair": ([[1, 0, 0], [0, 1, 1], [0, 1, 1]], [0, 1, 1], [0, 1, 1]),
    # row 0 and column 0 may be left out only if they are free, and one alone is
    "one slack": (np.ones((2, 2)), [1, 0], [1, 0]),
    "unusable row slack": ([[1, 1], [1, 1]], [1, 1], [0, 0]),
}


def problem(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.asarray(x, dtype=bool) for x in PROBLEMS[name])


def augmented(
    allowed: np.ndarray, row_free: np.ndarray, column_free: np.ndarray
) -> np.ndarray:
    """A square problem with a dummy for each row and column, to stay unmatched with."""
    n, m = allowed.shape
    top = np.concatenate([allowed, np.diag(row_free)], 1)
    bottom = np.concatenate([np.diag(column_free), np.ones((m, n), bool)], 1)
    return np.concatenate([top, bottom])


def fixed_point(
    L: np.ndarray,
    tau: float,
    allowed: np.ndarray,
    row_free: np.ndarray,
    column_free: np.ndarray,
    iterations: int = 3000,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P, r, s by exp(a_i) = 1 / (row_free_i + sum_j K_ij exp(b_j)) and its mirror."""
    cells, rows, columns = usable(allowed, row_free, column_free)
    K = np.where(cells, np.exp(L / tau), 0.0)
    s = np.ones(K.shape[1])
    for _ in range(iterations):
        r = 1 / (rows + K @ s)
        s = 1 / (columns + r @ K)
    return K * r[:, None] * s, r * rows, s * columns


# Enumeration


def test_counts_of_matchings() -> None:
    for n, m in [(1, 1), (2, 3), (4, 4), (4, 3)]:
        ones = np.ones((n, m))
        partial = sum(
            math.comb(n, k) * math.comb(m, k) * math.factorial(k)
            for k in range(min(n, m) + 1)
        )
        assert len(partial_matchings(ones, np.ones(n), np.ones(m))) == partial
        injections = partial_matchings(ones, np.zeros(n), np.ones(m))
        assert len(injections) == math.perm(m, n)
        perfect = partial_matchings(ones, np.zeros(n), np.zeros(m))
        assert len(perfect) == (math.factorial(n) if n == m else 0)
    found = partial_matchings([[1, 0], [1, 1]], [1, 0], [1, 1])
    assert {tuple(x) for x in found} == {(0, 1), (-1, 0), (-1, 1)}
    assert partial_matchings([[1], [1]], [0, 0], [1]).shape == (0, 2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_usable_is_the_total_support_of_the_augmented_square(name: str) -> None:
    allowed, row_free, column_free = problem(name)
    n, m = allowed.shape
    support = oracles.total_support(
        torch.tensor(augmented(allowed, row_free, column_free))
    ).numpy()
    cells, rows, columns = usable(allowed, row_free, column_free)
    assert (cells == support[:n, :m]).all()
    assert (rows == np.diag(support[:n, m:])).all()
    assert (columns == np.diag(support[n:, :m])).all()


def test_usable_in_a_hall_set() -> None:
    cells, rows, columns = usable(*problem("Hall set"))
    assert (cells == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]).all()
    assert not rows.any()
    assert (columns == [0, 0, 1, 1]).all()


@pytest.mark.parametrize("name", PROBLEMS)
def test_best_matching_is_that_of_the_augmented_square(name: str) -> None:
    allowed, row_free, column_free = problem(name)
    n, m = allowed.shape
    rng = np.random.default_rng(0)
    square = augmented(allowed, row_free, column_free)
    for _ in range(5):
        scores = 2 * rng.normal(size=(n, m))
        row_scores = np.where(row_free, rng.normal(size=n), -np.inf)
        column_scores = np.where(column_free, rng.normal(size=m), -np.inf)
        matching, total = best_partial(scores, row_scores, column_scores, allowed)
        value = np.zeros((n + m, m + n))
        value[:n, :m] = scores
        value[:n, m:] += np.diag(np.where(row_free, row_scores, 0))
        value[n:, :m] += np.diag(np.where(column_free, column_scores, 0))
        i, j = linear_sum_assignment(np.where(square, value, -1e6), maximize=True)
        assert total == pytest.approx(value[i, j].sum(), abs=1e-12)
        assert (matching == np.where(j[:n] < m, j[:n], -1)).all()


def test_gibbs_marginals() -> None:
    # one pair: matched with weight e^x, unmatched with e^(a + b)
    out = gibbs_marginals([[0.7]], [0.2], [-0.1])
    p = expit(0.7 - 0.1)
    assert out == pytest.approx(np.array([[p, 1 - p], [1 - p, 0]]))
    # the gradient of the log of the sum of all weights, by finite differences
    rng = np.random.default_rng(1)
    x, a, b = rng.normal(size=(3, 4)), rng.normal(size=3), rng.normal(size=4)
    a[1] = -np.inf
    allowed = np.ones((3, 4), bool)
    allowed[0, 2] = False

    def log_sum(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
        matchings = partial_matchings(allowed, np.isfinite(a), np.isfinite(b))
        weights = []
        for matching in matchings:
            pairs = sum(x[i, j] if j >= 0 else a[i] for i, j in enumerate(matching))
            weights.append(pairs + sum(b[j] for j in set(range(4)) - set(matching)))
        return float(logsumexp(weights))

    out = gibbs_marginals(x, a, b, allowed)
    assert out[:3].sum(1) == pytest.approx(np.ones(3))
    assert out[:, :4].sum(0) == pytest.approx(np.ones(4))
    h = 1e-5
    for k, shape in enumerate([(3, 4), (3,), (4,)]):
        for index in np.ndindex(shape):
            up, down = [x.copy(), a.copy(), b.copy()], [x.copy(), a.copy(), b.copy()]
            up[k][index] += h
            down[k][index] -= h
            slope = (log_sum(*up) - log_sum(*down)) / (2 * h)
            where = [index, (*index, 4), (3, *index)][k]
            assert out[where] == pytest.approx(slope, abs=1e-9)


# The relaxation


@pytest.mark.parametrize("name", PROBLEMS)
def test_relaxed_is_the_fixed_point(name: str) -> None:
    allowed, row_free, column_free = problem(name)
    cells, rows, columns = usable(allowed, row_free, column_free)
    L = np.random.default_rng(2).normal(size=allowed.shape)
    log_P, log_r, log_s = relaxed(L, 0.7, allowed, row_free, column_free)
    P, r, s = fixed_point(L, 0.7, allowed, row_free, column_free)
    assert np.exp(log_P) == pytest.approx(P, abs=1e-12)
    assert np.exp(log_r) == pytest.approx(r, abs=1e-12)
    assert np.exp(log_s) == pytest.approx(s, abs=1e-12)
    assert (np.isfinite(log_P) == cells).all()
    assert (np.isfinite(log_r) == rows).all()
    assert (np.isfinite(log_s) == columns).all()


@pytest.mark.parametrize("name", PROBLEMS)
def test_relaxed_sums_are_one_relative_to_the_smallest_flow(name: str) -> None:
    allowed, row_free, column_free = problem(name)
    n, m = allowed.shape
    L = 5 * np.random.default_rng(3).normal(size=allowed.shape)
    tau = 0.01
    found = slack_oracles.solve_relaxed(L, tau, allowed, row_free, column_free)
    assert found.error < 1e-34
    with mpmath.workdps(found.digits + 20):
        flows = [*found.P.values(), *found.r.values(), *found.s.values()]
        tiny = min(flows) * mpmath.mpf(10) ** -30
        zero = mpmath.mpf(0)
        for i in range(n):
            row = [x for e, x in found.P.items() if e[0] == i]
            assert abs(1 - mpmath.fsum(row) - found.r.get(i, zero)) < tiny
        for j in range(m):
            column = [x for e, x in found.P.items() if e[1] == j]
            assert abs(1 - mpmath.fsum(column) - found.s.get(j, zero)) < tiny
        for (i, j), x in found.P.items():
            log = mpmath.mpf(L[i, j]) / mpmath.mpf(tau) + found.a[i] + found.b[j]
            assert abs(mpmath.log(x) - log) < 1e-30
        for i, x in found.r.items():
            assert abs(mpmath.log(x) - found.a[i]) < 1e-30
        for j, x in found.s.items():
            assert abs(mpmath.log(x) - found.b[j]) < 1e-30


def test_relaxed_pair_in_closed_form_down_to_e_minus_5000() -> None:
    for L in [-5000.0, -40.0, -0.3, 2.0, 300.0, 5000.0]:
        log_P, log_r, log_s = relaxed([[L]], 1.0, [[1]], [1], [1])
        with mpmath.workdps(5100):  # r + e^L r^2 = 1
            r = 2 / (1 + mpmath.sqrt(1 + 4 * mpmath.exp(mpmath.mpf(L))))
            log = float(mpmath.log(r)), float(mpmath.log(1 - r))
        assert (log_r[0], log_s[0]) == pytest.approx((log[0], log[0]), rel=1e-14)
        assert log_P[0, 0] == pytest.approx(log[1], rel=1e-14)


def test_relaxed_injection_is_sinkhorn_with_a_row_for_the_slack() -> None:
    # a slack row with total m - n and score 0 is the same problem, to another solver
    n, m = 3, 4
    for scale, tau in [(1.0, 1.0), (3.0, 0.1), (5.0, 0.02)]:
        L = scale * np.random.default_rng(4).normal(size=(n, m))
        log_P, _, log_s = relaxed(L, tau, np.ones((n, m)), np.zeros(n), np.ones(m))
        rows = torch.tensor([1.0] * n + [m - n], dtype=torch.float64)
        expected = oracles.precise_sinkhorn(
            torch.tensor(np.concatenate([L, np.zeros((1, m))])),
            tau,
            (rows, torch.ones(m, dtype=torch.float64)),
        ).numpy()
        assert log_P == pytest.approx(expected[:n], rel=1e-12, abs=1e-12)
        assert log_s == pytest.approx(expected[n], rel=1e-12, abs=1e-12)


def test_relaxed_without_slack_is_sinkhorn() -> None:
    L = torch.tensor(np.random.default_rng(5).normal(size=(3, 3)) * 4)
    expected = oracles.precise_sinkhorn(L, 0.02).numpy()
    log_P, log_r, log_s = relaxed(L, 0.02, np.ones((3, 3)), np.zeros(3), np.zeros(3))
    assert log_P == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert np.isneginf(log_r).all()
    assert np.isneginf(log_s).all()


# Densities


def draw(name: str, tau: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits X and a draw of the relaxation at X + Gumbel noise."""
    rng = np.random.default_rng(seed)
    allowed, row_free, column_free = problem(name)
    X = rng.normal(size=allowed.shape)
    L = X + rng.gumbel(size=X.shape)
    return X, np.exp(relaxed(L, tau, allowed, row_free, column_free)[0])


def log_g(z: np.ndarray) -> np.ndarray:
    return -z - np.exp(-z)


def partial_formula(P: np.ndarray, X: np.ndarray, tau: float, E: np.ndarray) -> float:
    r, s = 1 - P.sum(1), 1 - P.sum(0)
    out = E.sum() * math.log(tau) - np.log(P[E]).sum()
    out += np.linalg.slogdet(np.eye(len(P)) - P @ P.T)[1]
    out -= np.log(r).sum() + np.log(s).sum()
    noise = tau * (np.log(np.where(E, P, 1)) - np.log(r)[:, None] - np.log(s)) - X
    return float(out + log_g(noise[E]).sum())


def injection_formula(P: np.ndarray, X: np.ndarray, tau: float, E: np.ndarray) -> float:
    s, k = 1 - P.sum(0), E.sum(1)
    out = (E.sum() - len(P)) * math.log(tau) - np.log(P[E]).sum() - np.log(s).sum()
    out += np.linalg.slogdet(np.eye(len(P)) - P @ P.T)[1] + gammaln(k).sum()
    M = np.where(E, X - tau * (np.log(np.where(E, P, 1)) - np.log(s)), -np.inf)
    return float(out + M[E].sum() - (k * logsumexp(M, axis=1)).sum())


@pytest.mark.parametrize("name", ["partial", "empty row and column"])
def test_partial_density_in_closed_form(name: str) -> None:
    E, row_free, column_free = problem(name)
    for seed, tau in enumerate([0.4, 1.0, 2.0]):
        X, P = draw(name, tau, seed)
        expected = partial_formula(P, X, tau, E)
        assert log_density_partial(P, X, tau, E) == pytest.approx(expected, abs=1e-9)
        mixed = log_density_mixed(P, X, tau, E, row_free, column_free)
        assert mixed == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_injection_density_in_closed_form(masked: bool) -> None:
    E = np.ones((3, 4), bool)
    if masked:
        E[0, 1] = E[2, 0] = E[2, 1] = False
    none, every = np.zeros(3, bool), np.ones(4, bool)
    for seed, tau in enumerate([0.4, 1.0, 2.0]):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=E.shape)
        P = np.exp(relaxed(X + rng.gumbel(size=X.shape), tau, E, none, every)[0])
        expected = pytest.approx(injection_formula(P, X, tau, E), abs=1e-9)
        assert log_density_injection(P, X, tau, E) == expected
        # whichever cell of each row is not free
        first = [int(np.flatnonzero(row)[0]) for row in E]
        assert log_density_injection(P, X, tau, E, first) == expected
        assert log_density_mixed(P, X, tau, E, none, every) == expected
        assert log_density_mixed(P.T, X.T, tau, E.T, every, none) == expected


def test_mixed_density_of_a_square_without_slack() -> None:
    X, P = np.array([[0.3, -0.5], [0.2, 0.9]]), np.array([[0.7, 0.3], [0.3, 0.7]])
    none = np.zeros(2, bool)
    for tau in [1.0, 0.5]:
        expected = oracles.density_n2(torch.tensor(X), torch.tensor(P).log(), tau)
        value = log_density_mixed(P, X, tau, np.ones((2, 2)), none, none)
        assert value == pytest.approx(expected, abs=1e-9)
    X = np.array([[1, 0, -1], [0.5, 0.2, 0], [-0.3, 0.4, 0.8]])
    P = np.array([[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.2, 0.7]])
    none = np.zeros(3, bool)
    integral = oracles.shift_integral_grid(X - np.log(P))
    expected = oracles.log_density(
        torch.tensor(X), torch.tensor(P).log(), 1.0, integral
    )
    value = log_density_mixed(P, X, 1.0, np.ones((3, 3)), none, none)
    assert value == pytest.approx(expected, abs=1e-9)


def test_mixed_density_is_the_product_over_components() -> None:
    # a Hall set: a 2 x 2 without slack and a 1 x 2 injection
    X, P = draw("Hall set", 0.8, 0)
    square = oracles.density_n2(
        torch.tensor(X[:2, :2]), torch.tensor(P[:2, :2]).log(), 0.8
    )
    injection = log_density_injection(P[2:, 2:], X[2:, 2:], 0.8)
    value = log_density_mixed(P, X, 0.8, *problem("Hall set"))
    assert value == pytest.approx(square + injection, abs=1e-9)


@pytest.mark.parametrize("name", ["mixed", "mixed mask", "Hall set", "one slack"])
def test_mixed_density_does_not_depend_on_the_free_cells(name: str) -> None:
    allowed, row_free, column_free = problem(name)
    X, P = draw(name, 0.8, 1)
    value = log_density_mixed(P, X, 0.8, allowed, row_free, column_free)
    rng = np.random.default_rng(0)
    for _ in range(4):
        order = list(rng.permutation(allowed.size))
        other = log_density_mixed(P, X, 0.8, allowed, row_free, column_free, order)
        assert other == pytest.approx(value, abs=1e-9)
    order = list(rng.permutation(allowed.size))
    flipped = log_density_mixed(P.T, X.T, 0.8, allowed.T, column_free, row_free, order)
    assert flipped == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("allowed", "row_free", "column_free", "line"),
    [
        # each has one free cell, x, and P = line(x)
        ([[1]], [1], [1], lambda x: [[x]]),
        ([[1, 1]], [0], [1, 1], lambda x: [[x, 1 - x]]),
        ([[1], [1]], [1, 1], [0], lambda x: [[x], [1 - x]]),
        ([[1, 1], [1, 0]], [0, 1], [0, 1], lambda x: [[x, 1 - x], [1 - x, 0]]),
        ([[1, 1], [1, 1]], [0, 0], [0, 0], lambda x: [[x, 1 - x], [1 - x, x]]),
    ],
)
def test_densities_integrate_to_one(allowed, row_free, column_free, line) -> None:
    X = np.random.default_rng(6).normal(size=np.shape(allowed))
    y = np.arange(-14, 14.01, 0.4)  # x = 1 / (1 + exp(-y))
    total = 0.0
    for x in expit(y):
        P = np.array(line(x))
        log_p = log_density_mixed(P, X, 0.9, allowed, row_free, column_free)
        total += 0.4 * x * (1 - x) * math.exp(log_p)
    assert total == pytest.approx(1, abs=1e-5)


def test_partial_jacobian_is_that_of_the_solver() -> None:
    # d P / d L of the high-precision relaxation, by central differences
    X, P = draw("partial", 0.8, 3)
    h = 1e-4
    J = []
    L = 0.8 * (np.log(P) - np.log(1 - P.sum(1))[:, None] - np.log(1 - P.sum(0)))
    for index in np.ndindex(L.shape):
        step = np.zeros(L.shape)
        step[index] = h
        up, down = (
            np.exp(relaxed(L + x, 0.8, *problem("partial"))[0]) for x in (step, -step)
        )
        J.append((up - down).reshape(-1) / (2 * h))
    noise = log_g(L - X).sum()
    log_p = noise - np.linalg.slogdet(np.array(J))[1]
    assert log_density_partial(P, X, 0.8) == pytest.approx(log_p, abs=1e-6)


@pytest.mark.parametrize("name", ["mixed", "mixed mask", "one slack"])
def test_mean_ratio_of_mixed_densities_is_one(name: str) -> None:
    # E_a[p_b(P) / p_a(P)] = 1 for draws of a; b is near a, so the error is small
    allowed, row_free, column_free = problem(name)
    rng = np.random.default_rng(7)
    X = rng.normal(size=allowed.shape)
    Y = X + 0.15 * rng.normal(size=allowed.shape)
    ratios = []
    for _ in range(100):
        L = X + rng.gumbel(size=X.shape)
        P = fixed_point(L, 1.0, allowed, row_free, column_free, 300)[0]
        p, q = (
            log_density_mixed(P, Z, 1.0, allowed, row_free, column_free) for Z in (X, Y)
        )
        ratios.append(math.exp(q - p))
    error = np.std(ratios) / math.sqrt(len(ratios))
    assert error < 0.04
    assert abs(np.mean(ratios) - 1) < 4 * error


def test_grid_has_enough_nodes() -> None:
    rng = np.random.default_rng(8)
    for d in [1, 2]:
        c = rng.normal(size=(4, d + 1)) * 3

        def rows_done(v, c=c):  # the last column's shift is held
            shifted = np.concatenate([v, np.zeros((*v.shape[:-1], 1))], -1)
            z = c + shifted[..., None, :]
            return -z.sum((-1, -2)) - c.shape[1] * logsumexp(-z, axis=-1).sum(-1)

        coarse, fine = (
            slack_oracles.log_integral(rows_done, d, step) for step in (None, 0.05)
        )
        assert coarse == pytest.approx(fine, abs=1e-10)
