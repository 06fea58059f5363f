# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The law of noisy scores without their shifts: values, density, masks."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from distributions.contract import SIGMAS, DistributionContract
from scipy import stats
from torch import Tensor

from pyro_permutations.constraints import contrasts
from pyro_permutations.distributions import GumbelContrasts
from pyro_permutations.matching_graph import matching_graph

CLOSED_FORM = 1e-8  # of two items
QUADRATURE = 1e-3  # the integral is believed when two rules agree to this
SERIES = 0.01  # of the second order on own draws at five items and more


def graph_of(mask: Tensor | None, n: int):
    return matching_graph(mask, (n, n), torch.device("cpu"))


class TestGumbelContrasts(DistributionContract):
    cls = GumbelContrasts


def test_support_is_the_set_of_contrasts_and_never_all_reals() -> None:
    d = GumbelContrasts(torch.randn(4, 4))
    assert d.support == contrasts()
    Z = d.rsample((100,))
    assert not Z[:, -1].any()
    assert not Z[:, :, -1].any()
    assert Z[:, :-1, :-1].all()
    mask = torch.eye(4).bool() | torch.eye(4).roll(1, 0).bool()
    masked = GumbelContrasts(torch.randn(4, 4), mask=mask)
    assert masked.support == contrasts(mask)
    assert (masked.rsample((100,)) != 0).sum((1, 2)).unique().tolist() == [1]


def test_draws_of_two_items_are_sums_of_logistics() -> None:
    """A Kolmogorov-Smirnov test against the density, integrated on a grid."""
    X = torch.tensor([[0.5, -1.0], [0.3, 0.2]])
    z = GumbelContrasts(X).sample((4000,))[:, 0, 0] - (0.5 + 1.0 - 0.3 + 0.2)
    grid = np.linspace(-45, 45, 4001)
    f = np.array([float(oracles.logistic_sum_density(s)) for s in grid])
    cdf = np.cumsum(np.exp(f)) * (grid[1] - grid[0])
    assert abs(cdf[-1] - 1) < 1e-6
    result = stats.kstest(z.numpy(), lambda s: np.interp(s, grid, cdf))
    assert result.pvalue > 1e-4


def test_moments_are_those_of_contrasts_of_gumbel_noise() -> None:
    """Means are the contrasts of the logits; variances those of four Gumbels."""
    X = torch.randn(4, 4)
    Z = GumbelContrasts(X).sample((20000,))[:, :-1, :-1]
    expected = graph_of(None, 4).contrasts(X)[:-1, :-1]
    variance = 4 * math.pi**2 / 6
    error = (variance / 20000) ** 0.5
    assert ((Z.mean(0) - expected).abs() < SIGMAS * error).all()
    # The fourth moment of a sum of four Gumbels is below four times the Gaussian one.
    spread = variance * (8 / 20000) ** 0.5
    assert ((Z.var(0) - variance).abs() < SIGMAS * spread).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
def test_density_of_two_items(scale: float) -> None:
    X = scale * torch.randn(50, 2, 2)
    Z = torch.zeros(50, 2, 2)
    Z[:, 0, 0] = torch.cat([torch.linspace(-400, 400, 25), torch.randn(25)])
    value = GumbelContrasts(X).log_prob(Z)
    z = Z[:, 0, 0] - (X[:, 0, 0] + X[:, 1, 1] - X[:, 0, 1] - X[:, 1, 0])
    expected = torch.tensor([float(oracles.logistic_sum_density(float(s))) for s in z])
    assert ((value - expected).abs() < CLOSED_FORM * (1 + expected.abs())).all()


@pytest.mark.parametrize("s", [0.0, 1e-9, 1e-5, 1e-2, 0.029, 0.031, 0.5, 30.0, 4e3])
def test_density_of_two_items_does_not_cancel(s: float) -> None:
    """The textbook form loses all its digits near zero and overflows far out."""
    expected = float(oracles.logistic_sum_density(s))
    for sign in (1.0, -1.0):
        Z = torch.zeros(2, 2)
        Z[0, 0] = sign * s
        value = GumbelContrasts(torch.zeros(2, 2)).log_prob(Z)
        assert abs(value - expected) < CLOSED_FORM * (1 + abs(expected))


def test_density_of_three_items_equals_the_grid() -> None:
    X = torch.randn(3, 3)
    d = GumbelContrasts(X)
    for Z in d.sample((10,)):
        expected = oracles.shift_integral_grid(X - Z)
        assert abs(d.log_prob(Z) - expected) < QUADRATURE


@pytest.mark.parametrize("n", [4, 5, 8])
def test_density_of_more_items_equals_importance_sampling(n: int) -> None:
    """The change from scores to contrasts and shifts has determinant one."""
    X = 2 * torch.randn(n, n)
    d = GumbelContrasts(X)
    for Z in d.sample((4,)):
        expected, error = oracles.shift_integral(X - Z, samples=50_000)
        assert error < 0.003
        assert abs(d.log_prob(Z) - expected) < SERIES + SIGMAS * error


def test_density_does_not_depend_on_shifts_of_the_logits() -> None:
    for n in (2, 3, 5):
        X = torch.randn(n, n)
        Z = GumbelContrasts(X).sample()
        shifted = X + 30 * torch.randn(n, 1) + 30 * torch.randn(1, n)
        value = GumbelContrasts(X).log_prob(Z)
        assert abs(GumbelContrasts(shifted).log_prob(Z) - value) < 1e-7


def test_density_of_masked_scores() -> None:
    """Cycles, blocks and a known pair against importance sampling."""
    cycle = torch.eye(5).bool() | torch.eye(5).roll(1, 0).bool()
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    known = torch.block_diag(torch.ones(1, 1), torch.ones(4, 4)).bool()
    for mask in (cycle, blocks, known):
        X = torch.randn(5, 5)
        d = GumbelContrasts(X, mask=mask)
        for Z in d.sample((3,)):
            expected, error = oracles.shift_integral(X - Z, mask, samples=50_000)
            tolerance = SERIES + SIGMAS * error
            assert abs(d.log_prob(Z) - expected) < tolerance, (mask, error)


def test_components_are_independent() -> None:
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    X = torch.randn(5, 5)
    whole = GumbelContrasts(X, mask=mask)
    Z = whole.sample((6,))
    scores = X - Z  # any scores with these contrasts do for a part
    parts = 0.0
    for a, b in ((0, 2), (2, 5)):
        part = graph_of(None, b - a).contrasts(Z[:, a:b, a:b])
        parts = parts + GumbelContrasts(X[a:b, a:b]).log_prob(part)
    assert scores.isfinite().all()
    assert torch.allclose(whole.log_prob(Z), parts, atol=QUADRATURE)


def test_decided_components_contribute_nothing() -> None:
    identity = torch.eye(4, dtype=torch.bool)
    d = GumbelContrasts(torch.randn(2, 4, 4), mask=identity)
    assert torch.equal(d.sample(), torch.zeros(2, 4, 4))
    assert d.log_prob(torch.zeros(2, 4, 4)).abs().max() < 1e-12
    known = torch.eye(4, dtype=torch.bool)
    known[:3, :3] = True
    X = torch.randn(4, 4)
    Z = GumbelContrasts(X, mask=known).sample()
    part = graph_of(None, 3).contrasts(Z[:3, :3])
    expected = GumbelContrasts(X[:3, :3]).log_prob(part)
    value = GumbelContrasts(X, mask=known).log_prob(Z)
    assert abs(value - expected) < QUADRATURE


@pytest.mark.parametrize("n", [2, 3, 5])
def test_density_is_smooth(n: int) -> None:
    """First derivatives in value and logits are those of finite differences."""
    X = torch.randn(n, n, requires_grad=True)
    Z = GumbelContrasts(X.detach()).sample()

    def value(x: Tensor, free: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(free, (0, 1, 0, 1))
        return GumbelContrasts(x).log_prob(padded)

    free = Z[:-1, :-1].clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (X, free), eps=1e-5, atol=1e-5)
