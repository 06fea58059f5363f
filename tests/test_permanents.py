# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Log permanents: exact against enumeration and known integers, approximate ones."""

from __future__ import annotations

import itertools
import math
import time
import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import pyro_permutations as pp
from pyro_permutations import fractional_solver
from pyro_permutations.dual_prices import dual_prices
from pyro_permutations.fractional_entropy import fraction
from pyro_permutations.matching_blocks import blocks
from pyro_permutations.matching_graph import matching_graph
from pyro_permutations.permanents import marginals

EXACT = 1e-10  # of sums whose terms are all positive, relative to 1 + |log permanent|
BOUND = 1e-9  # by which rounding may break an inequality
SOLVED = 1e-8  # of a convex program, in nats, by two algorithms
STATIONARY = 1e-6  # of the conditions of a maximum, where column sums hold to 1e-10
CALIBRATED = 0.6  # nats, mean over draws, up to 12 items and scale 4
WORST = 0.75  # the largest of 100 draws there was .67
PARTIAL = 0.2  # the same for partial matchings of 6 and 8 items: .16

APPROXIMATE = [
    pp.calibrated_log_permanent,
    pp.bethe_log_permanent,
    pp.sinkhorn_log_permanent,
]
EVERY = [pp.log_permanent, *APPROXIMATE]


def all_matchings(n: int, m: int, partial: bool) -> list[tuple[int, ...]]:
    columns = range(-1 if partial else 0, m)
    found = itertools.product(columns, repeat=n)
    return [p for p in found if len({j for j in p if j >= 0}) == sum(j >= 0 for j in p)]


def enumerated(
    X: Tensor, unmatched: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Log permanent and marginals of one matrix, from the definition."""
    n, m = X.shape
    totals, P = [], []
    for p in all_matchings(n, m, unmatched is not None):
        total = X.new_zeros(())
        for i, j in enumerate(p):
            total = total + (X[i, j] if j >= 0 else unmatched[0][i])
        if unmatched is not None:
            alone = [j for j in range(m) if j not in p]
            total = total + unmatched[1][alone].sum()
        totals.append(total)
        P.append(pp.to_matrix(torch.tensor(p), columns=m))
    total = torch.stack(totals)
    weight = total.softmax(-1)
    return total.logsumexp(-1), (weight[:, None, None] * torch.stack(P)).sum(0)


def gradient(f, X: Tensor, **arguments) -> Tensor:
    X = X.clone().requires_grad_()
    return torch.autograd.grad(f(X, **arguments).sum(), X)[0]


# Exact


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("n", range(1, 10))
def test_exact_is_the_sum_over_permutations(n, scale):
    X = scale * torch.randn(n, n)
    perm = torch.tensor(list(itertools.permutations(range(n)))).reshape(-1, n)
    total = X[torch.arange(n), perm].sum(-1)
    expected = total.logsumexp(-1)
    assert (pp.log_permanent(X) - expected).abs() <= EXACT * (1 + expected.abs())
    weight = total.softmax(-1)
    pairs = torch.zeros(n, n)
    for i in range(n):
        pairs[i].index_add_(0, perm[:, i], weight)
    assert (gradient(pp.log_permanent, X) - pairs).abs().max() <= EXACT


def test_exact_values_beyond_enumeration():
    """Counts that are known as integers; also where a mask leaves few matchings."""
    ones = torch.zeros(20, 20)
    apart = ~torch.eye(20, dtype=torch.bool)
    band = (torch.arange(20)[:, None] - torch.arange(20)).abs() <= 1
    for value, count in [
        (pp.log_permanent(ones), math.factorial(20)),
        (pp.log_permanent(ones, mask=apart), 895014631192902121),  # derangements
        (pp.log_permanent(ones, mask=band), 10946),  # a Fibonacci number
        (pp.log_permanent(torch.zeros(5, 30)), math.perm(30, 5)),
        (
            pp.log_permanent(torch.zeros(9, 9), unmatched=(0.0, 0.0)),
            sum(math.comb(9, k) ** 2 * math.factorial(k) for k in range(10)),
        ),
        (
            pp.log_permanent(torch.zeros(15, 9), unmatched=(0.0, 0.0)),
            sum(math.comb(9, k) * math.perm(15, k) for k in range(10)),
        ),
    ]:
        assert abs(value.item() - math.log(count)) <= EXACT * math.log(count)


def test_exact_where_weights_have_a_closed_form():
    """A matrix of rank one, 2^20 subsets: n! times the product of its factors."""
    u, v = 3 * torch.randn(20), 3 * torch.randn(20)
    value = pp.log_permanent(u[:, None] + v)
    expected = math.lgamma(21) + u.sum() + v.sum()
    assert (value - expected).abs() <= EXACT * (1 + expected.abs())


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 3), (3, 1), (2, 3), (3, 3), (4, 3)])
def test_partial_matchings_and_injections(n, m):
    X, unmatched = 2 * torch.randn(n, m), (torch.randn(n), torch.randn(m))
    expected, pairs = enumerated(X, unmatched)
    assert (pp.log_permanent(X, unmatched=unmatched) - expected).abs() <= EXACT
    found = gradient(pp.log_permanent, X, unmatched=unmatched)
    assert (found - pairs).abs().max() <= EXACT
    if n <= m:
        expected, pairs = enumerated(X)
        assert (pp.log_permanent(X) - expected).abs() <= EXACT
        assert (gradient(pp.log_permanent, X) - pairs).abs().max() <= EXACT


def test_some_may_stay_unmatched():
    """Scores of -inf say who has to be matched."""
    X = torch.randn(3, 4)
    rows = torch.tensor([0.3, -torch.inf, -0.2])
    columns = torch.tensor([0.1, -torch.inf, 0.5, -1.0])
    expected, pairs = enumerated(X, (rows, columns))
    value = pp.log_permanent(X, unmatched=(rows, columns))
    assert (value - expected).abs() <= EXACT
    found = gradient(pp.log_permanent, X, unmatched=(rows, columns))
    assert (found - pairs).abs().max() <= EXACT


def random_masks(count: int, n: int, density: float) -> Tensor:
    mask = torch.rand(count, n, n) < density
    for _ in range(2):
        mask |= torch.stack([torch.eye(n)[torch.randperm(n)].bool() for _ in mask])
    return mask


def test_masks_that_differ_across_the_batch():
    mask = random_masks(4, 4, 0.3)
    X = 2 * torch.randn(4, 4, 4)
    for f in EVERY:
        together = f(X, mask=mask)
        apart = torch.stack([f(x, mask=k) for x, k in zip(X, mask, strict=True)])
        assert torch.allclose(together, apart, atol=BOUND)
        forbidden = gradient(f, X, mask=mask)[~mask]
        assert not forbidden.any()
        by_scores = f(X.masked_fill(~mask, -torch.inf))
        assert torch.allclose(by_scores, together, atol=BOUND)
    for x, k in zip(X, mask, strict=True):
        expected, pairs = enumerated(x.masked_fill(~k, -torch.inf))
        assert (pp.log_permanent(x, mask=k) - expected).abs() <= EXACT
        found = gradient(pp.log_permanent, x, mask=k)
        assert (found - pairs).abs().max() <= EXACT


def test_large_masks_that_fall_apart_are_exact():
    """Fifty items in blocks of at most four, in any order; and padding."""
    sizes = [4, 4, 3, 2, 1, 1] * 3 + [3, 2]
    mask = torch.block_diag(*(torch.ones(s, s) for s in sizes)).bool()
    n = len(mask)
    order, other = torch.randperm(n), torch.randperm(n)
    mask = mask[order][:, other]
    value = pp.log_permanent(torch.zeros(n, n), mask=mask)
    expected = sum(math.lgamma(s + 1) for s in sizes)
    assert abs(value.item() - expected) <= EXACT * expected
    padded = torch.zeros(3, 6, 6, dtype=torch.bool)
    for k, size in enumerate((2, 4, 6)):
        padded[k, :size, :size] = True
    values = pp.log_permanent(torch.zeros(6, 6), mask=padded).exp()
    assert torch.allclose(values, torch.tensor([2.0, 24.0, 720.0]))


def test_blocks_are_the_components_of_the_pairs():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, :3] = True
    mask[2:, 3:5] = True
    found = {tuple(b.mask.shape): b for b in blocks(matching_graph(mask, (4, 6)))}
    assert set(found) == {(1, 2, 3), (1, 2, 2)}
    assert found[1, 2, 3].columns.tolist() == [[0, 1, 2]]
    assert found[1, 2, 3].slack
    assert not found[1, 2, 2].free_rows.any()


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e20, 1e200])
def test_no_scores_are_too_large(scale):
    """Nothing overflows or vanishes, and no gradient is NaN."""
    X = scale * torch.randn(4, 6, 6)
    best = (pp.matching(X) * X).sum((-2, -1))
    # Beyond 1e12 the differences of scores that a convex program needs are rounding.
    for f in EVERY if scale < 1e12 else [pp.log_permanent]:
        value, B = f(X), gradient(f, X)
        rounding = EXACT * best.abs()
        assert (value >= best - rounding).all()
        assert (value <= best + 6 * math.log(6) + rounding).all()
        assert B.isfinite().all()
        assert (B.sum(-1) - 1).abs().max() <= STATIONARY


def test_prices_certify_the_best_matching():
    for n, m, partial in [(5, 5, False), (4, 7, False), (5, 4, True), (3, 6, True)]:
        X = 3 * torch.randn(20, n, m)
        rows = torch.full((20, n), partial)
        columns = torch.full((20, m), partial or n < m)
        u, v = dual_prices(X, rows, columns)
        unmatched = (0.0, 0.0) if partial else None
        best = (pp.matching(X, unmatched=unmatched) * X).sum((-2, -1))
        assert torch.allclose(u.sum(-1) + v.sum(-1), best)
        assert (X - u[..., None] - v[:, None] <= BOUND).all()
        assert (u[rows] >= -BOUND).all()
        assert (v[columns] >= -BOUND).all()


def test_more_than_twenty_items_are_refused():
    with pytest.raises(ValueError, match=r"20 items.*21.*calibrated_log_permanent"):
        pp.log_permanent(torch.zeros(21, 21))
    assert pp.log_permanent(torch.zeros(2, 40)).isfinite()  # the smaller side counts


@pytest.mark.parametrize("f", EVERY)
def test_bad_scores_are_named(f):
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="logits"):
            f(torch.tensor([[bad, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="mask"):
        f(torch.zeros(2, 2), mask=torch.tensor([[True, False], [True, False]]))
    with pytest.raises(ValueError, match="unmatched"):
        f(torch.zeros(3, 2))


# Approximate


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_bounds(n, scale):
    X = scale * torch.randn(20 if n < 8 else 6, n, n)
    exact = pp.log_permanent(X)
    bethe, capacity = pp.bethe_log_permanent(X), pp.sinkhorn_log_permanent(X)
    assert (bethe <= exact + BOUND).all()
    assert (exact <= bethe + n / 2 * math.log(2) + BOUND).all()
    assert (exact <= capacity + BOUND).all()
    lower = capacity + math.lgamma(n + 1) - n * math.log(n)
    assert (lower <= exact + BOUND).all()


def test_bounds_are_met():
    """Both of Bethe's: a permutation, and blocks of two."""
    blocks_of_two = torch.block_diag(*(torch.ones(2, 2),) * 4).bool()
    two = pp.bethe_log_permanent(torch.zeros(8, 8), mask=blocks_of_two)
    assert two.abs() <= BOUND
    sure = 40 * torch.eye(6)
    assert (pp.bethe_log_permanent(sure) - 240).abs() <= BOUND
    n = 7  # of equal scores it is known
    known = n * math.log(n) + n * (n - 1) * math.log(1 - 1 / n)
    assert abs(pp.bethe_log_permanent(torch.zeros(n, n)).item() - known) <= BOUND


@pytest.mark.parametrize("n", [3, 5, 8, 12])
def test_calibrated_is_close(n):
    for scale in (1.0, 2.0, 4.0):
        X = scale * torch.randn(50, n, n)
        error = (pp.calibrated_log_permanent(X) - pp.log_permanent(X)).abs()
        assert error.mean() <= CALIBRATED
        assert error.max() <= WORST


def test_calibrated_is_exact_where_it_is_calibrated():
    X = torch.randn(50, 2, 2) * torch.linspace(0, 20, 50)[:, None, None]
    assert torch.allclose(pp.calibrated_log_permanent(X), pp.log_permanent(X))
    for n in (1, 3, 12, 100):
        value = pp.calibrated_log_permanent(torch.zeros(n, n))
        assert abs(value.item() - math.lgamma(n + 1)) <= BOUND * (1 + n)
    for n in (4, 9, 14):
        mask = random_masks(3, n, 0.4)
        zeros = torch.zeros(n, n)
        count = pp.log_permanent(zeros, mask=mask)
        value = pp.calibrated_log_permanent(zeros, mask=mask)
        assert (value - count).abs().max() <= SOLVED
    # A matrix of one row, and pairs that form a tree: Bethe's entropy is exact.
    X = 2 * torch.randn(5, 1, 4)
    assert torch.allclose(
        pp.calibrated_log_permanent(X), X.logsumexp((-2, -1)), atol=SOLVED
    )
    free = torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    tree = torch.tensor([[True, True, False], [False, True, True]])
    graph = matching_graph(tree, (2, 3), unmatched=free)
    X = 2 * torch.randn(5, 2, 3)
    exact = pp.log_permanent(X, mask=tree, unmatched=(0.0, 0.0))
    assert torch.allclose(
        pp.calibrated_log_permanent(X, mask=graph), exact, atol=SOLVED
    )


def test_partial_matchings_are_closer_still():
    free = torch.ones(6, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    graph = matching_graph(None, (6, 8), unmatched=free)
    for scale in (0.0, 1.0, 3.0):
        X = scale * torch.randn(20, 6, 8)
        exact = pp.log_permanent(X, unmatched=(0.0, 0.0))
        error = pp.calibrated_log_permanent(X, mask=graph) - exact
        assert error.abs().max() <= PARTIAL
    value = pp.calibrated_log_permanent(torch.zeros(6, 8), mask=graph)
    exact = pp.log_permanent(torch.zeros(6, 8), unmatched=(0.0, 0.0))
    assert abs(value.item() - exact.item()) <= SOLVED


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8, 0.99])
def test_newton_finds_what_a_slow_ascent_finds(gamma):
    """With the convex part made linear at the last B, Sinkhorn's operator ascends."""
    X = torch.randn(4, 4, 4)
    mask, none = torch.ones(4, 4, 4).bool(), torch.zeros(4, 4).bool()
    value, B = fractional_solver.fractional_maximum(
        X, mask, (none, none), torch.full((4,), gamma)
    )
    slow = torch.full_like(X, 0.25)
    for _ in range(3000 if gamma > 0.9 else 500):
        slow = pp.sinkhorn(X - gamma * (1 - slow).log(), tol=1e-12)
    terms = X * slow + torch.special.entr(slow) - gamma * torch.special.entr(1 - slow)
    assert (value - terms.sum((-2, -1))).abs().max() <= SOLVED
    # The conditions of a maximum, with which concavity makes it the largest.
    assert (B.sum(-1) - 1).abs().max() <= BOUND
    assert (B.sum(-2) - 1).abs().max() <= BOUND
    left = B.sum(-1, keepdim=True) - B
    rest = pp.matching_graph(None, (4, 4)).contrasts(X - B.log() - gamma * left.log())
    assert rest.abs().max() <= STATIONARY / (1 - gamma)


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_approximate_marginals_do_not_oscillate(scale):
    """A fixed point of message passing may cycle; this has one maximum, and no warning.

    Started from other scores with the same differences the answer is the same.
    """
    X = scale * torch.randn(30, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        B = gradient(pp.calibrated_log_permanent, X)
        shifted = X + 7 * torch.randn(30, 5, 1) + 7 * torch.randn(30, 1, 5)
        again = gradient(pp.calibrated_log_permanent, shifted)
    assert (B - again).abs().max() <= STATIONARY
    exact = gradient(pp.log_permanent, X)
    distance = (B - exact).abs().sum(-1).mean(-1) / 2
    assert distance.mean() <= 0.05
    # What GibbsMatching reports for five items is exact.
    reported, error = pp.GibbsMatching(X).marginals()
    assert (reported[..., :5] - exact).abs().max() <= EXACT
    assert not error.any()


def test_not_converging_is_a_warning(monkeypatch):
    monkeypatch.setattr(fractional_solver, "_MOST_STEPS", 1)
    with pytest.warns(pp.ConvergenceWarning, match=r"1 steps.*off by.*log_permanent"):
        pp.calibrated_log_permanent(3 * torch.randn(5, 5))


# Entropy


def test_entropy_at_permutations_and_at_the_uniform_law():
    for n in (2, 3, 6, 40):
        entropy = pp.calibrated_entropy(
            torch.stack([torch.eye(n), torch.ones(n, n) / n])
        )
        assert entropy[0].abs() <= BOUND
        assert abs(entropy[1].item() - math.lgamma(n + 1)) <= BOUND * (1 + n)


def test_entropy_is_exact_for_two():
    p = torch.linspace(0, 1, 21)
    B = torch.stack([torch.stack([p, 1 - p], -1), torch.stack([1 - p, p], -1)], -2)
    exact = torch.special.entr(p) + torch.special.entr(1 - p)
    assert torch.allclose(pp.calibrated_entropy(B), exact)


def test_entropy_is_the_dual_of_the_log_permanent():
    """At the marginals of the maximum: log permanent less mean score; nowhere more."""
    mask = random_masks(1, 5, 0.6)[0]
    for k in (None, mask):
        X = 2 * torch.randn(10, 5, 5)
        if k is not None:
            X = X.masked_fill(~k, 0.0)
        value, B = pp.calibrated_log_permanent(X, mask=k), None
        B = gradient(pp.calibrated_log_permanent, X, mask=k)
        score = (X * B).sum((-2, -1))
        entropy = pp.calibrated_entropy(B, mask=k)
        assert torch.allclose(value - score, entropy, atol=SOLVED)
        other = gradient(pp.log_permanent, 2 * torch.randn(10, 5, 5), mask=k)
        bound = (X * other).sum((-2, -1)) + pp.calibrated_entropy(other, mask=k)
        assert (bound <= value + BOUND).all()
        # So a divergence from the uniform law is never negative.
        count = pp.log_permanent(torch.zeros(5, 5), mask=k)
        assert (pp.calibrated_entropy(other, mask=k) <= count + BOUND).all()


def test_entropy_has_finite_gradients_at_corners():
    B = torch.eye(4).requires_grad_()
    (g,) = torch.autograd.grad(pp.calibrated_entropy(B), B)
    assert g.isfinite().all()
    inside = torch.full((3, 3), 1 / 3).requires_grad_()
    assert gradcheck(pp.calibrated_entropy, (inside,))


def test_fractions_of_full_matrices():
    """The closed form, and for rectangles with one row one: Bethe's is exact."""
    for n, g in ((2, 0.5), (3, 0.618252), (5, 0.730404), (10, 0.835379)):
        (found,) = fraction(matching_graph(None, (n, n)), 0)
        assert abs(found.item() - g) <= 1e-6
    (one_row,) = fraction(matching_graph(None, (1, 3)), 0)
    assert abs(one_row.item() - 1) <= BOUND


# Derivatives and modes


@pytest.mark.parametrize("f", EVERY)
@pytest.mark.parametrize("kind", ["full", "mask", "wide", "partial"])
def test_derivatives(f, kind):
    mask, X = None, torch.randn(3, 3, requires_grad=True)
    if kind == "mask":
        mask = random_masks(1, 4, 0.5)[0]
        X = torch.randn(4, 4, requires_grad=True)
    elif kind != "full":
        X = torch.randn(2, 3, requires_grad=True)
    if kind == "partial":
        free = torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
        mask = matching_graph(None, (2, 3), unmatched=free)
    assert gradcheck(lambda x: f(x, mask=mask), (X,))
    if f is not pp.bethe_log_permanent:
        assert gradgradcheck(lambda x: f(x, mask=mask), (X,))


def test_third_derivatives():
    """Exact ones are right; of approximate ones an error says that there is none."""
    X = torch.randn(3, 3, requires_grad=True)
    graph = matching_graph(None, (3, 3))
    assert gradgradcheck(lambda x: marginals(x, graph), (X,))
    first = torch.autograd.grad(pp.calibrated_log_permanent(X), X, create_graph=True)[0]
    (second,) = torch.autograd.grad(first[0, 0], X, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        torch.autograd.grad(second[1, 1], X)


@pytest.mark.parametrize("f", EVERY)
def test_function_transforms(f):
    X = torch.randn(3, 4, 4)
    assert torch.allclose(torch.func.vmap(f)(X), f(X), atol=SOLVED)
    mapped = torch.func.vmap(torch.func.grad(f))(X)
    assert torch.allclose(mapped, gradient(f, X), atol=SOLVED)
    if f is not pp.bethe_log_permanent:
        assert torch.func.jacrev(torch.func.jacrev(f))(X[0]).isfinite().all()
    with torch.inference_mode():
        assert torch.allclose(f(X), f(X.clone()))


@pytest.mark.parametrize("f", EVERY)
def test_batches_and_dtypes(f):
    X = torch.randn(2, 3, 4, 4)
    each = torch.stack([torch.stack([f(x) for x in row]) for row in X])
    assert torch.allclose(f(X), each, atol=BOUND)
    assert f(X.float()).dtype == torch.float32
    assert torch.allclose(f(X.float()).double(), each, rtol=1e-5)
    assert f(torch.zeros(0, 3, 3)).shape == (0,)
    assert f(torch.zeros(2, 1, 1)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("n", [50, 200])
def test_hundreds_of_items_take_seconds(n):
    X = 2 * torch.randn(n, n)
    X.requires_grad_()
    start = time.perf_counter()
    value = pp.calibrated_log_permanent(X)
    (B,) = torch.autograd.grad(value, X)
    assert time.perf_counter() - start <= 60  # .2 s and .9 s
    assert (B.sum(-2) - 1).abs().max() <= STATIONARY
    bethe = pp.bethe_log_permanent(X)
    assert bethe < value < pp.sinkhorn_log_permanent(X)


def test_evidence_and_expected_matching():
    """Report 76: weights exp(N(0, 1)) of six items."""
    X = torch.randn(6, 6)
    expected, pairs = enumerated(X)
    assert (pp.log_permanent(X) - expected).abs() <= EXACT
    probability, error = pp.GibbsMatching(X).marginals()
    assert (probability[:, :6] - pairs).abs().max() <= EXACT
    assert not error.any()
