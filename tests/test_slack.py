# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Matchings with unmatched items: injections, partial matchings and padding."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import slack_oracles as oracles
import torch
from scipy.integrate import quad
from test_certificates import imbalance
from torch import Tensor
from torch.distributions import (
    Binomial,
    Categorical,
    Poisson,
    biject_to,
    constraints,
    transform_to,
)
from torch.func import grad, vmap

from pyro_permutations import (
    BirkhoffTransform,
    GumbelContrasts,
    GumbelSinkhorn,
    GumbelSinkhornStraightThrough,
    MatchingGraph,
    doubly_stochastic,
    link_count_prior,
    log_of,
    log_sinkhorn,
    matching,
    matching_graph,
    noise_kl,
    permutation_matrix,
    sinkhorn,
    slack_of,
    to_indices,
    to_matrix,
)
from pyro_permutations.matching_graph import WIRE
from pyro_permutations.sinkhorn import log_sinkhorn_with_slack
from pyro_permutations.spanning_trees import log_spanning_trees

SUMS = 2e-6  # twice the default tolerance: of both sums of an entry
LOGS = 1e-9  # log P of a solve that has converged quadratically
DENSITY = 1e-9  # closed forms in float64 against Jacobians and quadrature of the same
ROUNDING = 1e-12
BOTH = (0.0, 0.0)


def problem(seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Scores, a mask, and what may stay unmatched, for up to 3 x 4 items."""
    rng = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 4, (), generator=rng))
    m = int(torch.randint(n, 5, (), generator=rng))
    X = torch.randn(n, m, generator=rng) * (1 + 4 * (seed % 2))
    mask = torch.rand(n, m, generator=rng) < 0.8
    rows, columns = torch.rand(n, generator=rng), torch.rand(m, generator=rng)
    free = [
        (torch.zeros(n).bool(), torch.full((m,), n < m)),
        (torch.ones(n).bool(), torch.ones(m).bool()),
        (rows < 0.5, columns < 0.5),
    ]
    return X, mask, free[seed % 3]


def solvable(seeds: range) -> list[tuple[int, Tensor, MatchingGraph]]:
    found = []
    for seed in seeds:
        X, mask, free = problem(seed)
        arrays = mask.numpy(), free[0].numpy(), free[1].numpy()
        if len(oracles.partial_matchings(*arrays)):
            shape = X.shape[0], X.shape[1]
            found.append((seed, X, matching_graph(mask, shape, unmatched=free)))
        else:
            with pytest.raises(ValueError, match="match"):
                matching_graph(mask, tuple(X.shape), unmatched=free)
    return found


def arrays_of(graph: MatchingGraph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        graph.allowed.numpy(),
        graph.free_rows.numpy(),
        graph.free_columns.numpy(),
    )


# What a mask allows


def test_cells_and_slack_agree_with_enumeration() -> None:
    for seed, _, graph in solvable(range(300)):
        cells, rows, columns = oracles.usable(*arrays_of(graph))
        assert np.array_equal(graph.support.numpy(), cells), seed
        slack = graph.slack_cells()
        assert np.array_equal(slack[0].numpy(), rows), seed
        assert np.array_equal(slack[1].numpy(), columns), seed
        # The forest has all slack in it: what may stay unmatched has no shift.
        if graph.has_slack:
            n, m = graph.shape
            beside = graph.cells.clone()
            beside[:n, :m] = False
            assert (graph.forest | ~beside).all()


def test_dimension_of_partial_matchings_and_injections() -> None:
    free = torch.ones(3).bool(), torch.ones(5).bool()
    assert matching_graph(None, (3, 5), unmatched=free).dim == 15
    assert matching_graph(None, (3, 5)).dim == 3 * 4


def test_what_cannot_be_matched_is_named() -> None:
    mask = torch.zeros(3, 5).bool()
    mask[:2, 1] = True
    mask[2] = True
    with pytest.raises(ValueError, match=r"rows \{0, 1\} can only use columns \{1\}"):
        matching_graph(mask, (3, 5))
    free = torch.ones(3).bool(), torch.zeros(5).bool()
    with pytest.raises(ValueError, match=r"columns \{0, 2\} can only use rows \{2\}"):
        matching_graph(mask, (3, 5), unmatched=free)


# The operator


def test_logs_against_high_precision() -> None:
    for seed, X, graph in solvable(range(36)):
        n, m = graph.shape
        for tau in (1.0, 0.1, 0.02):
            expected = oracles.relaxed(X.numpy(), tau, *arrays_of(graph))
            log_P = log_sinkhorn_with_slack(X, tau, graph).numpy()
            found = [log_P[:n, :m]]
            if graph.has_slack:
                found += [log_P[:n, m], log_P[n, :m]]
            for a, b in zip(found, expected, strict=False):
                assert np.array_equal(np.isneginf(a), np.isneginf(b)), seed
                assert np.allclose(a, b, rtol=0, atol=LOGS), (seed, tau)
            P = sinkhorn(X, tau, mask=graph)
            assert np.allclose(P.numpy(), np.exp(expected[0]), rtol=0, atol=SUMS)


def certified(log_P: Tensor) -> float:
    """Log imbalance of flows, of a matrix that is doubly stochastic only if this is.

    Unmatched is matched to a dummy of one's own, and the dummies as their owners are.
    """
    pairs, n, m = log_P[:-1, :-1], len(log_P) - 1, log_P.shape[-1] - 1
    rows = torch.full((n, n), -torch.inf).diagonal_scatter(log_P[:-1, -1])
    columns = torch.full((m, m), -torch.inf).diagonal_scatter(log_P[-1, :-1])
    square = torch.cat([torch.cat([pairs, rows], 1), torch.cat([columns, pairs.mT], 1)])
    return imbalance(square.numpy())


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (12, 9), (30, 30), (20, 60)])
def test_larger_problems_carry_a_certificate(shape, tau) -> None:
    n, m = shape
    free = torch.rand(n) < 0.9, torch.rand(m) < 0.9
    for scale in (1.0, 30.0):
        for mask in (None, (torch.rand(n, m) < 0.4) | (torch.eye(n, m) > 0)):
            X = scale * torch.randn(n, m)
            kinds = [(~torch.zeros(n).bool(), ~torch.zeros(m).bool())]
            if mask is None and n < m:
                kinds += [None, (free[0], torch.ones(m).bool())]
            for unmatched in kinds:
                graph = matching_graph(mask, shape, unmatched=unmatched)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    log_P = log_sinkhorn_with_slack(X, tau, graph)
                    x = X.clone().requires_grad_()
                    P = sinkhorn(x, tau, mask=graph)
                    (gradient,) = torch.autograd.grad((P * X).sum(), x)
                assert torch.isfinite(gradient).all()
                rows = log_P[:-1].exp().sum(-1)
                columns = log_P[:, :-1].exp().sum(-2)
                assert (rows - 1).abs().max() < SUMS
                assert (columns - 1).abs().max() < SUMS
                assert (P - log_P[:-1, :-1].exp()).abs().max() < SUMS
                pairs = torch.where(graph.support, log_P[:-1, :-1], 0.0)
                edge = torch.where(graph.cells, log_P, 0.0)
                L = pairs - edge[:-1, -1:] - edge[-1:, :-1]
                Z, expected = graph.contrasts(L), graph.contrasts(X / tau)
                close = 1e-9 * max(1.0, float(expected.abs().max()))
                assert (Z - expected).abs().max() < close
                assert certified(log_P) < 1e-6


def test_cold_batches_have_no_nan() -> None:
    """A column without a row, of tiny slack: the step's plan must not rest on that."""
    for tau in (0.03, 0.003):
        X = torch.randn(200, 24, 24) - 3 - torch.rand(200, 24, 24).log().neg().log()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            P = log_sinkhorn(X, tau, unmatched=BOTH).exp()
        assert (P - sinkhorn(X, tau, unmatched=BOTH)).abs().max() < SUMS


def test_injections_are_squares_with_rows_of_no_score() -> None:
    X = 3 * torch.randn(4, 7)
    log_P = log_sinkhorn(torch.cat([X, torch.zeros(3, 7)]), 0.05)
    assert torch.allclose(log_sinkhorn(X, 0.05), log_P[:4], rtol=0, atol=LOGS)


@pytest.mark.parametrize("unmatched", [None, BOTH])
@pytest.mark.parametrize("function", [sinkhorn, log_sinkhorn])
def test_gradcheck(function, unmatched) -> None:
    X = torch.randn(2, 3, 4).requires_grad_()
    tau = torch.tensor([0.7, 0.4], requires_grad=True)

    def solved(x: Tensor, t: Tensor) -> Tensor:
        return function(x, t, unmatched=unmatched, tol=1e-13)

    assert torch.autograd.gradcheck(solved, (X, tau))
    assert torch.autograd.gradgradcheck(solved, (X, tau))


def test_gradient_flows_to_the_scores_of_being_unmatched() -> None:
    scores = torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)
    P = sinkhorn(torch.randn(3, 4), unmatched=scores)
    rows, columns = torch.autograd.grad(P.sum(), scores)
    assert (rows < 0).all()
    assert (columns < 0).all()


def test_vmap_and_its_gradient() -> None:
    X = torch.randn(5, 3, 4)

    def loss(x: Tensor) -> Tensor:
        return sinkhorn(x, 0.3, unmatched=BOTH, tol=1e-12).square().sum()

    mapped = vmap(grad(loss))(X)
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        sinkhorn(x, 0.3, unmatched=BOTH, tol=1e-12).square().sum(), x
    )
    assert torch.allclose(mapped, expected, rtol=0, atol=ROUNDING * 1e3)


def test_many_components_are_those_of_the_whole(monkeypatch) -> None:
    blocks = [torch.ones(4, 5).bool() for _ in range(12)]
    mask = torch.block_diag(*blocks)
    free = torch.zeros(48).bool(), torch.zeros(60).bool()
    free[1][:] = True
    free[0][:8] = True
    graph = matching_graph(mask, (48, 60), unmatched=free)
    X = torch.randn(48, 60)
    log_P = log_sinkhorn(X, 0.3, mask=graph)
    for k in range(12):
        i, j = slice(4 * k, 4 * k + 4), slice(5 * k, 5 * k + 5)
        part = matching_graph(None, (4, 5), unmatched=(free[0][i], free[1][j]))
        expected = log_sinkhorn(X[i, j], 0.3, mask=part)
        assert torch.allclose(log_P[i, j], expected, rtol=0, atol=LOGS)


def test_known_pairs_stand_alone() -> None:
    """A pair is known if it is alone and both have to be matched."""
    mask = torch.ones(4, 5).bool()
    mask[1] = mask[:, 2] = False
    mask[1, 2] = True
    a, b = torch.zeros(4), torch.zeros(5)
    a[1] = b[2] = -torch.inf
    d = GumbelSinkhorn(torch.randn(4, 5), 0.5, mask=mask, unmatched=(a, b))
    P = d.rsample((3,))
    assert (P[:, 1, 2] == 1).all()
    rest = torch.ones(5).bool()
    rest[2] = False
    other = GumbelSinkhorn(
        d.logits[[0, 2, 3]][:, rest], 0.5, unmatched=(torch.zeros(3), torch.zeros(4))
    )
    inner = P[:, [0, 2, 3]][:, :, rest]
    assert torch.allclose(d.log_prob(P), other.log_prob(inner), rtol=0, atol=1e-7)


# Hard matchings


def test_best_matching_agrees_with_enumeration() -> None:
    for seed, X, graph in solvable(range(200)):
        allowed = arrays_of(graph)[0]
        n, m = graph.shape
        a = torch.randn(n).masked_fill(~graph.free_rows, -torch.inf)
        b = torch.randn(m).masked_fill(~graph.free_columns, -torch.inf)
        _, best = oracles.best_partial(X.numpy(), a.numpy(), b.numpy(), allowed)
        mask = graph.allowed
        found = to_indices(matching(X, mask=mask, unmatched=(a, b)))
        used = found[found >= 0]
        total = X[found >= 0, used].sum() + a[found < 0].sum()
        alone = torch.ones(m).bool()
        alone[used] = False
        total = total + b[alone].sum()
        assert math.isclose(float(total), float(best), abs_tol=1e-9), seed


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (4, 5)])
@pytest.mark.parametrize("unmatched", [None, (0.3, -0.4)])
def test_low_temperature_is_the_best_matching(shape, unmatched) -> None:
    X = torch.randn(20, *shape)
    hard = matching(X, unmatched=unmatched)
    n, m = shape
    score = unmatched or (-torch.inf, 0.0 if n < m else -torch.inf)
    for k in range(20):
        rows, columns = np.full(n, score[0]), np.full(m, score[1])
        best, _ = oracles.best_partial(X[k].numpy(), rows, columns)
        assert to_indices(hard[k]).tolist() == list(best)
    # The gap of the scores over the temperature is at least 50 in all of these.
    cold = sinkhorn(X, 1e-4, unmatched=unmatched)
    assert (cold - hard).abs().max() < 1e-3


def test_indices_and_matrices() -> None:
    perm = torch.tensor([[2, -1], [0, 4]])
    P = to_matrix(perm, columns=5)
    assert P.shape == (2, 2, 5)
    assert torch.equal(to_indices(P), perm)
    assert permutation_matrix.check(P).tolist() == [False, True]
    free = torch.ones(2).bool(), torch.ones(5).bool()
    partly = permutation_matrix(matching_graph(None, (2, 5), unmatched=free))
    assert partly.check(P).all()


# The density


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 3), (4, 6)])
def test_density_against_its_jacobian(shape, tau) -> None:
    n, m = shape
    X = torch.randn(n, m)
    masks = [torch.ones(n, m).bool(), (torch.rand(n, m) < 0.7) | (torch.eye(n, m) > 0)]
    for mask in masks:
        d = GumbelSinkhorn(X, tau, mask=mask, unmatched=BOTH)
        P = d.rsample()
        expected = oracles.log_density_partial(P.numpy(), X.numpy(), tau, mask.numpy())
        assert math.isclose(d.log_prob(P), expected, abs_tol=DENSITY * n * m)
        assert d.log_prob_error(P) == 0
        if n < m and graph_is_loose(mask):
            d = GumbelSinkhorn(X, tau, mask=mask)
            P = d.rsample()
            expected = oracles.log_density_injection(
                P.numpy(), X.numpy(), tau, mask.numpy()
            )
            assert math.isclose(d.log_prob(P), expected, abs_tol=DENSITY * n * m)


def graph_is_loose(mask: Tensor) -> bool:
    graph = matching_graph(mask, (mask.shape[-2], mask.shape[-1]))
    return bool(graph.slack_cells()[1].all() and graph.support.equal(mask))


def test_density_where_some_have_to_be_matched() -> None:
    X = torch.randn(2, 3)
    a, b = torch.tensor([-torch.inf, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    d = GumbelSinkhorn(X, 0.7, unmatched=(a, b))
    P = d.rsample()
    expected = oracles.log_density_mixed(
        P.numpy(), X.numpy(), 0.7, np.ones((2, 3), bool), [False, True], [True] * 3
    )
    assert math.isclose(d.log_prob(P), expected, abs_tol=1e-7)
    both = GumbelSinkhorn(X, 0.7, unmatched=(a, torch.tensor([-torch.inf, 0.0, 0.0])))
    value = both.rsample()
    with pytest.raises(NotImplementedError, match="Give one of them a finite score"):
        both.log_prob(value)


def density_at(d: GumbelSinkhorn, *x: float) -> float:
    value = torch.tensor(x).reshape(d.event_shape)
    return float(d.log_prob(value).exp())


def test_densities_integrate_to_one() -> None:
    """By quadrature; the tolerance is that of the issue, the quadrature's is less."""
    one = GumbelSinkhorn(torch.tensor([[0.4]]), 0.8, unmatched=BOTH)
    total = quad(lambda p: density_at(one, p), 0, 1, epsabs=1e-9)[0]
    assert abs(total - 1) < 1e-6
    pair = GumbelSinkhorn(torch.tensor([[0.4, -0.3]]), 0.8)
    total = quad(lambda p: density_at(pair, p, 1 - p), 0, 1, epsabs=1e-9)[0]
    assert abs(total - 1) < 1e-6
    # In the coordinates Z, where the density is smooth: sums of a grid converge fast.
    row = GumbelSinkhorn(torch.tensor([[0.4, -0.3]]), 0.8, unmatched=BOTH)
    three = GumbelSinkhorn(torch.tensor([[0.4, -0.3, 0.1]]), 0.8)
    for d, free in ((row, [(0, 0), (0, 1)]), (three, [(0, 0), (0, 1)])):
        assert abs(total_of(d, free) - 1) < 1e-6


def total_of(d: GumbelSinkhorn, free: list[tuple[int, int]]) -> float:
    """Integral of the density of P, on a grid in Z, with its Jacobian."""
    axis = torch.linspace(-22.0, 30.0, 601)
    grid = torch.cartesian_prod(axis, axis)
    Z = torch.zeros(len(grid), *d.event_shape)
    for k, (i, j) in enumerate(free):
        Z[:, i, j] = grid[:, k]
    assert d.graph.free.nonzero().tolist() == [list(cell) for cell in free]
    P = d.transforms[0](Z)

    def cells(z: Tensor) -> Tensor:
        full = torch.zeros(*d.event_shape)
        for k, (i, j) in enumerate(free):
            full = full.index_put((torch.tensor(i), torch.tensor(j)), z[k])
        P = sinkhorn(full, d.temperature, mask=d.graph, tol=1e-13)
        return torch.stack([P[cell] for cell in free])

    inside = (grid.abs() < 8).all(-1).nonzero()[:400:7, 0]
    log_det = d.transforms[0].log_abs_det_jacobian(Z, P)
    for k in inside.tolist()[:12]:
        jacobian = torch.autograd.functional.jacobian(cells, grid[k])
        assert math.isclose(log_det[k], torch.linalg.slogdet(jacobian)[1], abs_tol=1e-8)
    step = float(axis[1] - axis[0])
    return float((d.log_prob(P) + log_det).exp().sum()) * step**2


def test_two_by_two_integrates_to_one() -> None:
    """Importance sampling from another partial matching: mean 1 within 4 errors."""
    p = GumbelSinkhorn(torch.tensor([[0.5, -1.0], [0.3, 0.0]]), 0.7, unmatched=BOTH)
    check_ratio(GumbelSinkhorn(torch.zeros(2, 2), 0.7, unmatched=BOTH), p, 200_000)


def check_ratio(q: GumbelSinkhorn, p: GumbelSinkhorn, draws: int) -> None:
    value = q.rsample((draws,))
    ratio = (p.log_prob(value) - q.log_prob(value)).exp()
    error = float(ratio.std()) / draws**0.5
    assert error < 0.02  # so that four of them see a factor of 1.08
    assert abs(float(ratio.mean()) - 1) < 4 * error


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("unmatched", [None, (0.2, -0.1)])
@pytest.mark.parametrize("shape", [(2, 3), (3, 3), (4, 6)])
def test_expected_ratio_is_one(shape, unmatched, masked) -> None:
    n, m = shape
    if unmatched is None and n == m:
        pytest.skip("everything is matched")
    mask = (torch.rand(n, m) < 0.7) | (torch.eye(n, m) > 0) if masked else None
    X = torch.randn(n, m)
    q = GumbelSinkhorn(X, 0.6, mask=mask, unmatched=unmatched)
    p = GumbelSinkhorn(X + 0.2 * torch.randn(n, m), 0.6, mask=mask, unmatched=unmatched)
    check_ratio(q, p, 20_000)


def test_invariances() -> None:
    X, a, b = torch.randn(3, 5), torch.randn(3), torch.randn(5)
    loose = GumbelSinkhorn(X, 0.5, unmatched=(a, b))
    P = loose.rsample()
    same = GumbelSinkhorn(X - a[:, None] - b, 0.5, unmatched=BOTH)
    assert torch.allclose(loose.log_prob(P), same.log_prob(P), rtol=0, atol=1e-9)
    injection = GumbelSinkhorn(X, 0.5)
    P = injection.rsample()
    shifted = GumbelSinkhorn(X + a[:, None], 0.5)
    value = injection.log_prob(P)
    assert torch.allclose(value, shifted.log_prob(P), rtol=0, atol=1e-9)
    # Columns that may stay over are not the same when they are liked more.
    other = GumbelSinkhorn(X + b, 0.5).log_prob(P)
    assert not torch.allclose(value, other, rtol=0, atol=1e-3)


def test_transposed_partial_matchings_have_the_same_density() -> None:
    X = torch.randn(5, 3)
    d = GumbelSinkhorn(X, 0.4, unmatched=(0.3, -0.2))
    P = d.rsample((4,))
    other = GumbelSinkhorn(X.mT, 0.4, unmatched=(-0.2, 0.3)).log_prob(P.mT.clone())
    assert torch.allclose(d.log_prob(P), other, rtol=0, atol=1e-6)


def test_trees_of_a_partial_matching() -> None:
    """Log det of I - P P' counts trees that the slack is part of."""
    free = torch.ones(3).bool(), torch.ones(4).bool()
    graph = matching_graph(None, (3, 4), unmatched=free)
    log_P = log_sinkhorn_with_slack(torch.randn(3, 4), 0.5, graph)
    assert log_P[-1, -1] == WIRE
    P = log_P[:-1, :-1].exp()
    expected = torch.linalg.slogdet(torch.eye(3) - P @ P.mT)[1]
    found = log_spanning_trees(log_P, graph)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


# Samples, their slack and their logs


def test_slack_is_carried_where_it_underflows() -> None:
    d = GumbelSinkhorn(torch.randn(2, 3, 4), 0.002, unmatched=BOTH)
    P = d.rsample((5,)).float()
    P = GumbelSinkhorn(d.logits.float(), 0.002, unmatched=BOTH).rsample((5,))
    assert (P == 0).any()
    turned = GumbelSinkhorn(d.logits.mT, 0.002, unmatched=BOTH)
    assert torch.allclose(turned.log_prob(P.mT), d.log_prob(P))
    for value, owner in ((P, P), (P[1], P[1]), (P.expand(2, 5, 2, 3, 4), P)):
        rows, columns = slack_of(value)
        assert torch.allclose(value.sum(-1) + rows, torch.ones(()).float(), atol=1e-5)
        assert torch.allclose(
            value.sum(-2) + columns, torch.ones(()).float(), atol=1e-5
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log_prob = d.log_prob(value)
            assert torch.isfinite(log_of(value)).all()
        assert log_prob.shape == value.shape[:-2]
        assert torch.allclose(log_prob, d.log_prob(owner))
    for again in (pickle.loads(pickle.dumps(P)), copy.deepcopy(P)):
        assert torch.allclose(d.log_prob(again), d.log_prob(P))
    before = P.clone()
    P[0, 0, 0, 0] += 0  # a change in place: what was carried is not looked at
    with pytest.warns(UserWarning, match="zero"):
        assert torch.isfinite(d.log_prob(P)).all()
    assert torch.equal(P, before)


def test_a_value_without_log_has_its_slack_from_its_sums() -> None:
    d = GumbelSinkhorn(torch.randn(3, 4), 1.0, unmatched=BOTH)
    P = d.rsample()
    assert torch.allclose(d.log_prob(P), d.log_prob(P.clone()), rtol=0, atol=1e-6)
    for mine, sums in zip(slack_of(P), slack_of(P.clone()), strict=True):
        assert torch.allclose(mine, sums, rtol=0, atol=1e-7)


@pytest.mark.parametrize("unmatched", [None, BOTH])
def test_transforms_of_a_rectangle(unmatched) -> None:
    d = GumbelSinkhorn(torch.randn(3, 5), 0.5, unmatched=unmatched)
    constraint = d.support
    assert constraint.check(d.rsample((4,))).all()
    bijection = biject_to(constraint)
    x = torch.randn(4, int(d.graph.dim))
    P = bijection(x)
    assert bijection.forward_shape(x.shape) == P.shape == (4, 3, 5)
    assert bijection.inverse_shape(P.shape) == x.shape
    assert torch.allclose(bijection.inv(P), x, rtol=0, atol=1e-9)
    assert torch.allclose(bijection.inv(P.clone()), x, rtol=0, atol=1e-4)
    free = d.graph.free.flatten()
    jacobian = torch.autograd.functional.jacobian(
        lambda x: bijection(x[None])[0].flatten()[free], x[0]
    )
    log_det = bijection.log_abs_det_jacobian(x, P)[0]
    expected = torch.linalg.slogdet(jacobian)[1]
    assert torch.allclose(log_det, expected, rtol=0, atol=1e-9)
    scores = transform_to(constraint).inv(P)
    assert torch.allclose(transform_to(constraint)(scores), P, rtol=0, atol=SUMS)
    Z = GumbelContrasts(d.logits, mask=d.graph).rsample()
    assert torch.allclose(BirkhoffTransform(0.5, d.graph).inv(d.transforms[0](Z)), Z)


@pytest.mark.parametrize("shape", [(1, 2), (3, 3), (4, 6)])
@pytest.mark.parametrize("unmatched", [None, BOTH])
def test_jacobians_against_autograd(shape, unmatched) -> None:
    if unmatched is None and shape[0] == shape[1]:
        pytest.skip("everything is matched")
    mask = (torch.rand(shape) < 0.7) | (torch.eye(*shape) > 0)
    for allowed in (None, mask):
        d = GumbelSinkhorn(torch.zeros(shape), 0.6, mask=allowed, unmatched=unmatched)
        Z = GumbelContrasts(d.logits, mask=d.graph).rsample()
        free = d.graph.free.flatten()
        if not free.any():
            continue

        def cells(z: Tensor, d=d, free=free, shape=shape) -> Tensor:
            full = torch.zeros(free.shape).masked_scatter(free, z).reshape(shape)
            return d.transforms[0](full).flatten()[free]

        jacobian = torch.autograd.functional.jacobian(cells, Z.flatten()[free])
        expected = torch.linalg.slogdet(jacobian)[1]
        log_det = d.transforms[0].log_abs_det_jacobian(Z, d.transforms[0](Z))
        assert torch.allclose(log_det, expected, rtol=0, atol=1e-10)


def test_straight_through() -> None:
    X = torch.randn(3, 5, requires_grad=True)
    d = GumbelSinkhornStraightThrough(X, 0.5, unmatched=BOTH)
    P = d.rsample((100,))
    rows, columns = P.detach().sum(-1), P.detach().sum(-2)
    assert ((P == 0) | (P == 1)).all()
    assert ((rows == 0) | (rows == 1)).all()
    assert (columns <= 1).all()
    assert (rows == 0).any()
    assert torch.isfinite(d.log_prob(P)).all()
    (gradient,) = torch.autograd.grad(P.sum(), X, retain_graph=True)
    assert (gradient != 0).all()
    # What it lacks to one is that of the hard value, with the gradient of the soft.
    slack, _ = slack_of(P)
    assert torch.equal(slack.detach(), 1 - rows)
    assert (torch.autograd.grad(slack.sum(), X)[0] != 0).all()


@pytest.mark.filterwarnings("ignore::pyro_permutations.LostLogWarning")
def test_values_of_a_narrower_set_are_scored() -> None:
    """Zeros that a guide's mask made, where the model's allows more."""
    wide = GumbelSinkhorn(torch.zeros(2, 3), 0.5, unmatched=BOTH)
    value = GumbelSinkhorn(torch.zeros(2, 3), 0.5).rsample()
    assert torch.isfinite(wide.log_prob(value))
    narrow = GumbelSinkhorn(torch.zeros(3, 3), 0.5, mask=~torch.eye(3).bool())
    full = GumbelSinkhorn(torch.zeros(3, 3), 0.5)
    assert torch.isfinite(full.log_prob(narrow.rsample()))


def test_mode_and_marginals() -> None:
    X = torch.randn(6, 6)
    d = GumbelSinkhorn(X, 0.5, unmatched=(0.5, 0.0))
    assert torch.equal(d.mode, matching(X, unmatched=(0.5, 0.0)))
    frequency, error = d.marginals(2000)
    assert frequency.shape == error.shape == (6, 7)
    assert torch.allclose(frequency.sum(-1), torch.ones(6))
    again, _ = d.marginals(2000)
    assert ((frequency - again).abs() <= 4 * 2**0.5 * error.clamp_min(1e-3)).all()
    assert d.expand((2,)).marginals(10)[0].shape == (2, 6, 7)


def test_noise_kl_is_a_bound() -> None:
    X = torch.randn(2, 3)
    for unmatched in (None, BOTH):
        q = GumbelSinkhorn(X, 0.7, unmatched=unmatched)
        p = GumbelSinkhorn(torch.zeros(2, 3), 0.7, unmatched=unmatched)
        P = q.rsample((20_000,))
        difference = q.log_prob(P) - p.log_prob(P)
        error = float(difference.std()) / 20_000**0.5
        bound, loose = noise_kl(q, p), noise_kl(q, p, up_to_shifts=False)
        assert difference.mean() < bound + 4 * error
        assert bound <= loose + ROUNDING
    with pytest.raises(ValueError, match="same items that may stay"):
        noise_kl(GumbelSinkhorn(X, 0.7), q)
    shifted = GumbelSinkhorn(X + torch.randn(2, 1), 0.7)
    assert abs(noise_kl(shifted, GumbelSinkhorn(X, 0.7))) < 1e-9


# Problems of different sizes in one batch


def test_padding_changes_nothing() -> None:
    sizes = [(3, 5), (4, 4), (2, 6), (4, 6)]
    mask = torch.zeros(4, 4, 6).bool()
    for k, (n, m) in enumerate(sizes):
        mask[k, :n, :m] = True
    X = torch.randn(4, 4, 6, requires_grad=True)
    noise = -torch.randn(4, 4, 6).exp().log()
    for unmatched in (None, (torch.zeros(4, 4), torch.zeros(4, 6))):
        d = GumbelSinkhorn(X, 0.4, mask=mask, unmatched=unmatched)
        P = d.transforms[0](X + noise)
        log_prob = d.log_prob(P)
        (gradient,) = torch.autograd.grad((P.square().sum() + log_prob.sum()), X)
        hard = to_indices(d.mode)
        assert not gradient[~mask].any()
        assert not P[~mask].any()
        for k, (n, m) in enumerate(sizes):
            x = X[k, :n, :m].detach().requires_grad_()
            one = GumbelSinkhorn(x, 0.4, unmatched=None if unmatched is None else BOTH)
            value = one.transforms[0](x + noise[k, :n, :m])
            expected = one.log_prob(value)
            (own,) = torch.autograd.grad(value.square().sum() + expected, x)
            assert torch.allclose(P[k, :n, :m], value, rtol=0, atol=1e-8)
            assert torch.allclose(log_prob[k], expected, rtol=0, atol=1e-8)
            assert torch.allclose(gradient[k, :n, :m], own, rtol=0, atol=1e-6)
            assert hard[k].tolist() == to_indices(one.mode).tolist() + [-1] * (4 - n)


def test_row_22_the_masked_subset_is_the_small_problem() -> None:
    mask = torch.zeros(6, 6).bool()
    mask[:4, :4] = True
    X = torch.randn(6, 6, requires_grad=True)
    d = GumbelSinkhorn(X, 0.5, mask=mask)
    P = d.rsample()
    small = GumbelSinkhorn(X[:4, :4].detach(), 0.5)
    noise = torch.randn(6, 6)
    same = small.transforms[0](X[:4, :4] + noise[:4, :4])
    assert torch.allclose(d.transforms[0](X + noise)[:4, :4], same, rtol=0, atol=1e-8)
    inner = P[:4, :4].detach().clone()
    assert torch.allclose(d.log_prob(P), small.log_prob(inner), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(P.square().sum() + d.log_prob(P), X)
    assert not gradient[~mask].any()
    assert to_indices(d.mode)[4:].tolist() == [-1, -1]


def test_an_accident_is_no_padding() -> None:
    mask = torch.ones(4, 4).bool()
    mask[2] = False
    with pytest.raises(ValueError, match=r"rows \{2\} can only use columns \{\}"):
        GumbelSinkhorn(torch.zeros(4, 4), 0.5, mask=mask)
    with pytest.raises(ValueError, match=r"rows \{0\} can only use"):
        matching_graph(torch.zeros(2, 3).bool(), (2, 3))
    X = torch.zeros(3, 3)
    X[0] = -torch.inf
    must = torch.tensor([-torch.inf, 0.0, 0.0]), 0.0
    for function in (matching, sinkhorn):
        with pytest.raises(ValueError, match=r"rows \{0\} can only use columns \{\}"):
            function(X, unmatched=must)


# Bad arguments


@pytest.mark.parametrize(
    ("unmatched", "message"),
    [
        (0.0, "pair of scores"),
        ((0.0, torch.zeros(2)), r"unmatched columns must have shape .*, 4\)"),
        ((torch.zeros(5, 3), 0.0), "do not broadcast"),
        ((torch.nan, 0.0), "must not be NaN"),
        ((None, 0.0), "must be a number or a tensor"),
        ((0.0, torch.inf), "must not be NaN or "),
    ],
)
def test_bad_unmatched_is_named(unmatched, message) -> None:
    for function in (sinkhorn, matching, partial(GumbelSinkhorn, temperature=0.5)):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(2, 3, 4), unmatched=unmatched)


# How many links


def test_link_counts_have_the_distribution_they_are_given() -> None:
    for n, m in ((1, 1), (2, 3), (3, 3)):
        allowed = np.ones((n, m), bool)
        every = oracles.partial_matchings(allowed, np.ones(n, bool), np.ones(m, bool))
        P = to_matrix(torch.tensor(every), columns=m)
        p = link_count_prior(P, Poisson(torch.tensor(1.3))).exp()
        assert math.isclose(p.sum(), 1, abs_tol=ROUNDING)
        q = Poisson(torch.tensor(1.3)).log_prob(torch.arange(min(n, m) + 1.0)).exp()
        for k, expected in enumerate(q / q.sum()):
            found = p[P.sum((-2, -1)) == k].sum()
            assert math.isclose(found, expected, abs_tol=ROUNDING)


def test_link_counts_of_padded_problems() -> None:
    inner = torch.rand(2, 3) / 3
    P = torch.nn.functional.pad(inner, (0, 2, 0, 2))
    items = torch.tensor([2, 4]), torch.tensor([3, 5])
    padded = link_count_prior(torch.stack([P, P]), Poisson(1.0), items=items)
    for k, value in enumerate((inner, P)):
        expected = link_count_prior(value, Poisson(1.0))
        assert math.isclose(padded[k], expected, abs_tol=ROUNDING)


def test_link_counts_that_are_not_possible() -> None:
    P = torch.eye(2, 3).requires_grad_()
    for count in (Binomial(2, torch.tensor(0.5)), Categorical(torch.ones(3) / 3)):
        value = link_count_prior(P, count)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, P)[0]).all()
    short = Categorical(torch.tensor([0.5, 0.5]))  # at most one link
    one = torch.zeros(2, 3).index_put(
        (torch.tensor(0), torch.tensor(1)), torch.tensor(1.0)
    )
    one.requires_grad_()
    value = link_count_prior(one, short)
    assert math.isclose(value.detach(), math.log(0.5 / 6), abs_tol=ROUNDING)
    assert torch.isfinite(torch.autograd.grad(value, one)[0]).all()
    assert link_count_prior(P, short) == -torch.inf
    with pytest.raises(ValueError, match="batch shape"):
        link_count_prior(P, Poisson(torch.ones(3)))
    with pytest.raises(ValueError, match="positive probability"):
        link_count_prior(P, Many(torch.tensor(1.0)))


class Many(Poisson):
    support = constraints.integer_interval(5, 9)


def test_relaxed_counts_lie_between() -> None:
    P = torch.full((2, 2), 0.35, requires_grad=True)  # 1.4 links
    value = link_count_prior(P, Poisson(torch.tensor(1.0)))
    ends = [
        link_count_prior(torch.diag(torch.tensor(x)), Poisson(torch.tensor(1.0)))
        for x in ([1.0, 0.0], [1.0, 1.0])
    ]
    assert torch.allclose(value, 0.6 * ends[0] + 0.4 * ends[1])
    (gradient,) = torch.autograd.grad(value, P)
    assert torch.allclose(gradient, ends[1] - ends[0])


def test_pairs_of_the_square_are_untouched() -> None:
    assert doubly_stochastic.check(torch.full((2, 2), 0.5))
    assert not doubly_stochastic.check(torch.full((2, 2), 0.4))
