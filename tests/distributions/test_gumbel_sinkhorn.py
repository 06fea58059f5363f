# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Gumbel-Sinkhorn: samples, density against references, straight-through child, KL."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import oracles
import pyro
import pytest
import scipy.optimize
import torch
from distributions.contract import SIGMAS, DistributionContract
from pyro import poutine
from torch import Tensor
from torch.distributions import Gumbel, kl_divergence

from pyro_permutations.carried_log import carry_log, log_of
from pyro_permutations.constraints import doubly_stochastic
from pyro_permutations.distributions import (
    GumbelContrasts,
    GumbelSinkhorn,
    GumbelSinkhornStraightThrough,
    noise_kl,
)
from pyro_permutations.matching import matching
from pyro_permutations.matching_graph import matching_graph
from pyro_permutations.spanning_trees import log_spanning_trees
from pyro_permutations.warnings import LostLogWarning

CLOSED_FORM = 1e-8  # of two items, relative to 1 + |log p|
PRINTED = 1e-6  # a reference value given to six decimals
QUADRATURE = 1e-3  # the integral is believed when two rules agree to this
SERIES = 0.01  # of the second order on own draws at five items and more
STATED = 0.003  # standard error that a reference by sampling may have
UNSURE = 0.05  # error that three items may state, whatever the scale of the guide
PRECISE = 1e-6  # log P and log T against high precision, in nats
SUMMED = 1e-9  # relative, of log p as a sum of terms that grow as the temperature falls
FLOAT32 = 1e-3  # relative, of a log density scored in float32
SECONDS = 1.0  # bad input is refused at once


def graph_of(mask: Tensor | None, n: int):
    return matching_graph(mask, (n, n), torch.device("cpu"))


class Relaxed(DistributionContract):
    """What the two classes with a temperature share."""

    def params(self, batch, dtype):
        temperature = torch.linspace(0.4, 1.2, max(1, math.prod(batch)))
        scalar = temperature.reshape(batch) if math.prod(batch) else torch.ones(batch)
        return {**super().params(batch, dtype), "temperature": scalar.to(dtype)}

    @pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
    def test_bad_temperature_is_named(self, bad: float) -> None:
        for value in (bad, torch.tensor(bad), torch.tensor([0.5, bad])):
            with pytest.raises(ValueError, match="temperature"):
                self.make((2,), temperature=value)

    @pytest.mark.parametrize("bad", ["cold", None, 1j])
    def test_temperature_of_a_wrong_type_is_named(self, bad) -> None:
        with pytest.raises(ValueError, match="temperature"):
            self.make(temperature=bad)

    def test_unknown_moments_say_what_to_do(self) -> None:
        d = self.make()
        with pytest.raises(NotImplementedError, match=r"mean.*rsample"):
            _ = d.mean
        for name in ("variance", "stddev"):
            with pytest.raises(NotImplementedError, match=r"variance.*rsample"):
                getattr(d, name)
        with pytest.raises(NotImplementedError, match=r"log_prob.*noise_kl"):
            d.entropy()

    def test_temperature_of_a_wrong_shape_is_named(self) -> None:
        with pytest.raises(ValueError, match="temperature"):
            self.make((2,), temperature=torch.ones(5))

    def test_temperature_takes_any_form(self) -> None:
        """A float, an integer, a tensor of either size and either dtype."""
        for dtype in (torch.float32, torch.float64):
            logits = torch.zeros(2, self.n, self.n, dtype=dtype)
            for value in (1, 1.0, torch.tensor(1.0), torch.ones(2).double()):
                d = self.cls(logits, value)
                assert d.batch_shape == (2,)
                assert d.rsample().dtype == dtype
                assert d.temperature.dtype == dtype
        one = torch.tensor([0.5])
        assert self.cls(torch.zeros(3, 3), one).batch_shape == (1,)
        assert self.cls(torch.zeros(3, 3), torch.ones(4)).batch_shape == (4,)

    def test_mode_is_the_hard_matching_of_the_logits(self) -> None:
        d = self.make((2,))
        assert torch.equal(d.mode, matching(d.logits))
        mask = ~torch.eye(self.n, dtype=torch.bool)
        masked = self.make((2,), mask=mask)
        assert torch.equal(masked.mode, matching(masked.logits, mask=mask))


class TestGumbelSinkhorn(Relaxed):
    cls = GumbelSinkhorn


class TestGumbelSinkhornStraightThrough(Relaxed):
    cls = GumbelSinkhornStraightThrough

    def outside(self, inside):
        return torch.ones_like(inside) / 2

    def test_every_slice_has_its_own_noise(self) -> None:
        """Hard values coincide; the relaxed ones behind them do not."""
        value = self.make((2,)).expand((3, 2)).rsample((4,))
        relaxed = log_of(value).reshape(24, -1)
        assert len(torch.unique(relaxed[:, 0])) == 24

    def test_vmap(self) -> None:
        d = self.make((5,))
        value = d.rsample()
        expected = d.log_prob(value)
        each = torch.stack(
            [
                GumbelSinkhornStraightThrough(x, t).log_prob(v)
                for x, t, v in zip(d.logits, d.temperature, value, strict=True)
            ]
        )
        assert torch.allclose(each, expected, rtol=1e-6)


# Samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("n", [1, 2, 5, 60])
def test_samples_pass_their_own_support_check(
    n: int, tau: float, dtype: torch.dtype
) -> None:
    d = GumbelSinkhorn(torch.randn(n, n, dtype=dtype), tau)
    P = d.rsample((10,))
    assert d.support.check(P).all()
    assert d.log_prob(P).isfinite().all()
    if n > 1:
        off = P.clone()
        off[:, 0] *= 1.01
        assert not d.support.check(off).any()


def test_draws_of_many_float32_items_are_in_the_support() -> None:
    d = GumbelSinkhorn(torch.zeros(300, 300), 0.5)
    P = GumbelSinkhorn(torch.zeros(300, 300).float(), 0.5).sample((5,))
    assert d.support.check(P).all()
    P[:, 3] *= 1.01
    assert not d.support.check(P).any()


def test_samples_need_no_tiling() -> None:
    d = GumbelSinkhorn(torch.randn(7, 4, 4), 0.7)
    assert d.batch_shape == (7,)
    assert d.event_shape == (4, 4)
    P = d.rsample((5,))
    assert P.shape == (5, 7, 4, 4)
    assert len(torch.unique(P[..., 0, 0])) == 35


def test_low_temperature_draws_are_the_hard_matchings_of_noisy_scores() -> None:
    """A chi-square test against the best matching of scores with torch's own Gumbel."""
    X = torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.3, 0.0], [-0.5, 0.0, 1.0]])
    index = torch.tensor(
        [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    )
    noise = Gumbel(0.0, 1.0).sample((20000, 3, 3))
    totals = (X + noise)[:, torch.arange(3), index].sum(-1)
    reference = torch.bincount(totals.argmax(-1), minlength=6)
    P = matching(GumbelSinkhorn(X, 0.1).sample((5000,)))
    found = torch.bincount(
        (P.argmax(-1)[:, None] == index).all(-1).long().argmax(-1), minlength=6
    )
    table = np.stack([reference.numpy(), found.numpy()])
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def test_share_of_hard_draws_of_two_items() -> None:
    """P(anti-diagonal) = F(contrast of the scores), F the law of two logistics."""
    X = torch.tensor([[0.1, 0.9], [0.9, 0.1]]).log()
    s = float(2 * (X[0, 1] - X[0, 0]))
    expected = (math.exp(2 * s) - math.exp(s) * (1 + s)) / (math.exp(s) - 1) ** 2
    P = GumbelSinkhorn(X, 0.5).sample((20000,))
    share = float((P[:, 0, 1] > 0.5).double().mean())
    assert abs(share - expected) < SIGMAS * (expected * (1 - expected) / 20000) ** 0.5


def test_ties_are_broken_evenly_by_the_noise() -> None:
    X = torch.outer(torch.tensor([1.0, 1.0, 2.0]), 20 * torch.tensor([1.0, 2.0, 3.0]))
    P = GumbelSinkhorn(X, 0.01).sample((2000,))
    hard = matching(P)
    assert (P - hard).abs().amax((1, 2)).median() < 1e-6
    assert torch.equal(hard[:, 2], torch.tensor([0.0, 0.0, 1.0]).expand(2000, 3))
    assert abs(float(hard[:, 0, 0].mean()) - 0.5) < SIGMAS * 0.5 / 2000**0.5


@pytest.mark.parametrize("extreme", [0.0, 1e-45, 110.0])
def test_extreme_noise_is_finite(extreme: float, monkeypatch) -> None:
    """A generator that returns its rarest values gives no infinity and no NaN."""
    for dtype in (torch.float32, torch.float64):
        d = GumbelSinkhorn(torch.randn(4, 4, dtype=dtype), 0.3)
        drawn: list[Tensor] = []

        def exponential_(self: Tensor, *args, drawn=drawn, **kwargs) -> Tensor:
            drawn.append(self)
            self.fill_(1.0).flatten()[::3] = extreme
            return self

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "exponential_", exponential_)
            P = d.rsample()
        assert drawn  # or the noise comes from elsewhere and this tests nothing
        assert P.isfinite().all()
        assert d.support.check(P)
        assert d.log_prob(P).isfinite()


def test_rsample_gradient_with_frozen_noise() -> None:
    X = torch.randn(4, 4, requires_grad=True)
    t = torch.tensor(0.5, requires_grad=True)

    def draw(x: Tensor, temperature: Tensor) -> Tensor:
        pyro.set_rng_seed(5)
        return GumbelSinkhorn(x, temperature).rsample()

    assert torch.autograd.gradcheck(draw, (X, t), eps=1e-4, atol=1e-4)


# Density: reference values


TWO = [[0.3, -0.5], [0.2, 0.9]]
THREE = [[1, 0, -1], [0.5, 0.2, 0], [-0.3, 0.4, 0.8]]


@pytest.mark.parametrize(
    ("p", "tau", "expected"),
    [
        (0.7, 1.0, 0.458250),
        (0.99, 1.0, -0.640969),
        (0.05, 1.0, -1.961437),
        (0.7, 0.5, -0.273542),
        (0.99, 0.1, 1.180378),
    ],
)
def test_reference_values_of_two_items(p: float, tau: float, expected: float) -> None:
    P = torch.tensor([[p, 1 - p], [1 - p, p]])
    X = torch.tensor(TWO)
    value = GumbelSinkhorn(X, tau).log_prob(P)
    assert abs(value - expected) < PRINTED
    assert abs(value - oracles.density_n2(X, P.log(), tau)) < CLOSED_FORM


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 3.5188), (0.5, 0.7832)])
def test_reference_values_of_three_items(tau: float, expected: float) -> None:
    P = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.2, 0.7]])
    value = GumbelSinkhorn(torch.tensor(THREE).double(), tau).log_prob(P)
    assert abs(value - expected) < QUADRATURE


def test_density_of_two_items_integrates_to_one() -> None:
    for tau in (1.0, 0.3):
        z = torch.linspace(-60, 60, 4001)  # logit of P11: dP = P (1 - P) dz
        log_P = torch.stack([-torch.nn.functional.softplus(s * z) for s in (-1, 1)])
        L = torch.stack([log_P[0], log_P[1], log_P[1], log_P[0]], -1).reshape(-1, 2, 2)
        P = carry_log(L.exp(), L)
        log_p = GumbelSinkhorn(torch.tensor(TWO), tau).log_prob(P)
        total = (log_p + log_P.sum(0)).exp().sum() * (z[1] - z[0])
        assert abs(total - 1) < 1e-6


@pytest.mark.parametrize("scale", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01])
def test_two_items_equal_the_closed_form(tau: float, scale: float) -> None:
    X = scale * torch.randn(20, 2, 2)
    d = GumbelSinkhorn(X, tau)
    P = d.rsample()
    value = d.log_prob(P)
    for k in range(20):
        expected = oracles.density_n2(X[k], log_of(P)[k], tau)
        assert abs(value[k] - expected) < CLOSED_FORM * (1 + abs(expected))


@pytest.mark.parametrize("scale", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_density_end_to_end_against_high_precision(
    n: int, tau: float, scale: float
) -> None:
    """Own draws: log P is that of a high-precision solution, and log p(P) is a volume
    change whose log T comes from high precision and a base density that comes from
    the closed form (two items) or a grid (three and four); float32 agrees."""
    X = scale * torch.randn(n, n)
    d = GumbelSinkhorn(X, tau)
    P = d.rsample()
    log_P = log_of(P)
    precise = oracles.precise_sinkhorn(tau * log_P, tau)
    assert (log_P - precise).abs().max() < PRECISE
    assert abs(log_P.sum() - precise.sum()) < PRECISE
    volume = oracles.log_density(X, precise, tau, 0.0)
    trees = volume - (n - 1) ** 2 * math.log(tau) + precise.sum()
    assert abs(log_spanning_trees(log_P) - trees) < PRECISE
    Z = graph_of(None, n).contrasts(tau * log_P)
    base = GumbelContrasts(X).log_prob(Z)
    value = d.log_prob(P)
    # Nothing is lost or added between the parts.
    assert abs(value - (volume + base)) < PRECISE + SUMMED * abs(value)
    # Two items have only the rounding of that sum. With more, the base is integrated
    # by quadrature, whose promise is absolute and does not depend on the temperature.
    M = X - tau * precise
    if n == 2:
        contrast = float(M[0, 0] + M[1, 1] - M[0, 1] - M[1, 0])
        integral = float(oracles.logistic_sum_density(contrast))
        bound = PRECISE + SUMMED * abs(value)
    else:
        integral = oracles.shift_integral_grid(M, nodes=401 if n == 3 else 61)
        bound = QUADRATURE
    assert abs(value - oracles.log_density(X, precise, tau, integral)) < bound
    single = GumbelSinkhorn(X.float(), tau)
    replayed = carry_log(P.float(), log_P)
    double = GumbelSinkhorn(X.float().double(), tau).log_prob(P)
    assert abs(single.log_prob(replayed) - double) < FLOAT32 * (1 + abs(double))
    own = single.rsample()
    value = GumbelSinkhorn(X.float().double(), tau).log_prob(
        carry_log(own.double(), log_of(own))
    )
    assert abs(single.log_prob(own) - value) < FLOAT32 * (1 + abs(value))


@pytest.mark.parametrize("n", [5, 10])
def test_own_draws_of_more_items_against_importance_sampling(n: int) -> None:
    X = 4 * torch.randn(n, n)
    d = GumbelSinkhorn(X, 0.5)
    for P in d.sample((4,)):
        log_P = log_of(P)
        integral, error = oracles.shift_integral(X - 0.5 * log_P, samples=50_000)
        assert error < STATED
        trees = oracles.precise_log_trees(log_P) if n == 5 else None
        expected = (
            (n - 1) ** 2 * math.log(0.5)
            - float(log_P.sum())
            + (trees if trees is not None else log_trees_by_gauss(log_P))
            + integral
        )
        assert abs(d.log_prob(P) - expected) < SERIES + SIGMAS * error


def log_trees_by_gauss(log_P: Tensor) -> float:
    """log T of a matrix whose cells are not too small for a determinant."""
    K = np.exp(log_P.numpy())
    n = len(K)
    A = np.diag(np.concatenate([K.sum(1), K.sum(0)]))
    A[:n, n:], A[n:, :n] = -K, -K.T
    # Eliminate without subtraction: every pivot is the sum of what is left of its row.
    total = 0.0
    W = -A + np.diag(np.diag(A))
    for k in range(2 * n - 1):
        pivot = W[k, k + 1 :].sum()
        total += math.log(pivot)
        W[k + 1 :, k + 1 :] += np.outer(W[k + 1 :, k], W[k, k + 1 :]) / pivot
        np.fill_diagonal(W, 0.0)
    return total


@pytest.mark.parametrize("n", [2, 3, 5])
def test_density_ratios_average_to_one(n: int) -> None:
    """E_a[p_b / p_a] = 1 for neighbouring scores and temperatures."""
    count = {2: 20000, 3: 1000, 5: 10000}[n]
    for ratio in (0.8, 1.0, 1.25):
        X = torch.randn(n, n)
        a = GumbelSinkhorn(X, 0.6)
        b = GumbelSinkhorn(X + torch.rand(n, n) - 0.5, 0.6 * ratio)
        P = a.sample((count,))
        weight = (b.log_prob(P) - a.log_prob(P)).exp()
        error = weight.std() / count**0.5
        assert error < 0.5
        assert abs(weight.mean() - 1) < SIGMAS * error


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_density_is_invariant_to_shifts_and_labels(n: int) -> None:
    X = 2 * torch.randn(n, n)
    d = GumbelSinkhorn(X, 0.4)
    P = d.sample((3,))
    expected = d.log_prob(P)
    shifted = X + 20 * torch.randn(n, 1) + 20 * torch.randn(1, n)
    assert (GumbelSinkhorn(shifted, 0.4).log_prob(P) - expected).abs().max() < 1e-6
    rows, columns = torch.randperm(n), torch.randperm(n)
    Q = carry_log(P[:, rows][:, :, columns], log_of(P)[:, rows][:, :, columns])
    relabelled = GumbelSinkhorn(X[rows][:, columns], 0.4)
    # The gauge moves with the labels, and quadrature sees other axes.
    assert (relabelled.log_prob(Q) - expected).abs().max() < QUADRATURE
    turned = carry_log(P.mT, log_of(P).mT)
    transposed = GumbelSinkhorn(X.mT, 0.4).log_prob(turned)
    # Rows are integrated exactly and columns are not, so this compares two errors.
    assert (transposed - expected).abs().max() < 2 * SERIES


def test_model_and_guide_share_the_volume_change() -> None:
    """At one temperature the difference of two scores depends on Z alone."""
    X, Y = torch.randn(4, 4), torch.randn(4, 4)
    for tau in (1.0, 0.05):
        pyro.set_rng_seed(2)
        q, p = GumbelSinkhorn(X, tau), GumbelSinkhorn(Y, tau)
        P = q.sample()
        Z = graph_of(None, 4).contrasts(tau * log_of(P))
        base = GumbelContrasts(X).log_prob(Z) - GumbelContrasts(Y).log_prob(Z)
        assert abs((q.log_prob(P) - p.log_prob(P)) - base) < 1e-6


def test_density_derivatives() -> None:
    """First order by gradcheck in scores, temperature and value; a Hessian-vector
    product against differences of gradients."""
    for n in (2, 3, 5):
        X = torch.randn(n, n, requires_grad=True)
        t = torch.tensor(0.7, requires_grad=True)
        P = GumbelSinkhorn(X.detach(), 0.7).sample()

        def score(x: Tensor, temperature: Tensor, P: Tensor = P) -> Tensor:
            return GumbelSinkhorn(x, temperature).log_prob(P)

        assert torch.autograd.gradcheck(score, (X, t), eps=1e-5, atol=1e-5)

    X = torch.randn(3, 3)
    P = GumbelSinkhorn(X, 0.7).sample()
    v = torch.randn(3, 3)

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        value = GumbelSinkhorn(x, 0.7).log_prob(P)
        return torch.autograd.grad(value, x, create_graph=True)[0]

    x = X.clone().requires_grad_()
    value = GumbelSinkhorn(x, 0.7).log_prob(P)
    (g,) = torch.autograd.grad(value, x, create_graph=True)
    (product,) = torch.autograd.grad((g * v).sum(), x)
    step = 1e-4
    expected = (gradient(X + step * v) - gradient(X - step * v)).detach() / (2 * step)
    assert (product - expected).abs().max() < 1e-5


def test_path_derivative_through_a_sample_and_its_score() -> None:
    """What an ELBO differentiates: log_prob of an rsample, at low temperature too."""
    for n, tau in ((3, 0.5), (5, 0.5), (5, 0.05)):
        X = torch.randn(n, n, requires_grad=True)

        def entropy(x: Tensor, n: int = n, tau: float = tau) -> Tensor:
            pyro.set_rng_seed(3)
            d = GumbelSinkhorn(x, tau)
            return d.log_prob(d.rsample()) / n

        assert torch.autograd.gradcheck(entropy, (X,), eps=1e-5, atol=1e-4)


# Stability


@pytest.mark.parametrize(
    ("n", "tau"), [(50, 0.1), (50, 0.05), (30, 0.01), (8, 0.001), (5, 1e-4), (1, 0.1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_and_gradients_stay_finite(
    n: int, tau: float, dtype: torch.dtype
) -> None:
    X = torch.randn(n, n, dtype=dtype, requires_grad=True)
    t = torch.tensor(tau, dtype=dtype, requires_grad=True)
    d = GumbelSinkhorn(X, t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        P = d.rsample((4,))
        log_p = d.log_prob(P)
    assert log_p.isfinite().all()
    cost = torch.randn(n, n, dtype=dtype)
    total = log_p.mean() + (P * cost).sum() + (log_of(P) * cost).mean()
    gx, gt = torch.autograd.grad(total, (X, t))
    assert gx.isfinite().all()
    assert gt.isfinite()


def test_float32_scores_agree_with_float64() -> None:
    X = torch.randn(50, 50)
    for tau in (0.5, 0.05):
        single = GumbelSinkhorn(X.float(), tau)
        P = single.rsample((4,))
        double = GumbelSinkhorn(X.float().double(), tau)
        expected = double.log_prob(carry_log(P.double(), log_of(P)))
        value = single.log_prob(P)
        assert ((value - expected).abs() < FLOAT32 * expected.abs()).all()


def test_sharp_scores_give_finite_densities() -> None:
    for n in (2, 5):
        X = 5 * torch.eye(n) - 5
        d = GumbelSinkhorn(X, 0.05)
        assert d.log_prob(d.sample((100,))).isfinite().all()
        big = GumbelSinkhorn(300 * torch.randn(n, n), 0.05)
        assert big.log_prob(big.sample((10,))).isfinite().all()
        vertex = torch.eye(n)
        with pytest.warns(LostLogWarning):
            assert d.log_prob(vertex).isfinite()


def test_prior_at_the_draws_of_a_sharp_guide_is_finite_and_smooth() -> None:
    """Atypical points: the correction is damped, so that no term can explode."""
    for n in (3, 5, 10):
        for scale in (1.0, 5.0, 10.0, 100.0):
            q = GumbelSinkhorn(scale * torch.randn(n, n), 0.5)
            X = torch.zeros(n, n, requires_grad=True)
            value = GumbelSinkhorn(X, 0.5).log_prob(q.sample((4,)))
            assert value.isfinite().all()
            (g,) = torch.autograd.grad(value.sum(), X)
            assert g.isfinite().all()


def test_error_estimate_covers_the_error() -> None:
    """Three items, where a grid gives the truth: own draws, and a flat prior at the
    draws of ever sharper guides, with and without importance samples."""
    for scale in (0.0, 1.0, 2.0, 5.0, 10.0):
        q = GumbelSinkhorn(scale * torch.randn(3, 3), 0.5)
        P = q.sample((6,))
        log_P = log_of(P)
        for samples in (0, 2000):
            prior = GumbelSinkhorn(torch.zeros(3, 3), 0.5, density_samples=samples)
            value, error = prior.log_prob(P), prior.log_prob_error(P)
            assert error.shape == (6,)
            assert (error >= 0).all()
            assert error.max() < UNSURE
            for k in range(6):
                M = -0.5 * log_P[k]
                integral = oracles.shift_integral_grid(M)
                expected = oracles.log_density(M, log_P[k], 0.5, integral)
                assert abs(value[k] - expected) < QUADRATURE + 3 * error[k]
        if scale <= 1:
            assert error.max() < SERIES


# Masks


def test_masked_samples_and_scores_equal_those_of_the_submatrix() -> None:
    """Four valid rows of six: the same noise gives the same sample and score."""
    X = torch.randn(6, 6, requires_grad=True)
    mask = torch.eye(6, dtype=torch.bool)
    mask[:4, :4] = True
    d = GumbelSinkhorn(X, 0.5, mask=mask)
    P = d.rsample((3,))
    assert torch.equal(P[:, 4:, 4:], torch.eye(2).expand(3, 2, 2))
    assert not P[:, :4, 4:].any()
    part = carry_log(P[:, :4, :4].clone(), log_of(P)[:, :4, :4])
    expected = GumbelSinkhorn(X[:4, :4], 0.5).log_prob(part)
    value = d.log_prob(P)
    assert torch.allclose(value, expected, atol=QUADRATURE)
    for scalar in (value.sum(), (P * torch.randn(6, 6)).sum()):
        (g,) = torch.autograd.grad(scalar, X, retain_graph=True)
        assert g[:4, :4].any()
        assert not g[4:].any()
        assert not g[:, 4:].any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_forbidden_cells_are_zero_and_get_zero_gradient() -> None:
    """By a mask or by scores of minus infinity: no NaN on the way, first or second."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 2] = mask[3, 0] = False
    X = torch.randn(4, 4)
    results = []
    with torch.autograd.detect_anomaly(check_nan=True):
        for x, m in ((X, mask), (X.masked_fill(~mask, -math.inf), None)):
            x = x.clone().requires_grad_()
            pyro.set_rng_seed(1)
            d = GumbelSinkhorn(x, 0.5, mask=m)
            P = d.rsample()
            value = d.log_prob(P)
            assert not P[~mask].any()
            total = value + (P * torch.arange(16.0).reshape(4, 4)).sum()
            (g,) = torch.autograd.grad(total, x)
            assert g.isfinite().all()
            assert not g[~mask].any()
            results.append((P, value, g))
    assert torch.allclose(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1])
    assert torch.allclose(results[0][2], results[1][2])


def test_forbidden_pairs_are_never_drawn() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = False
    P = GumbelSinkhorn(torch.randn(4, 4), 0.3, mask=mask).sample((10000,))
    assert not P[:, ~mask].any()
    assert not matching(P[:1000])[:, ~mask].any()


def test_masked_density_against_high_precision() -> None:
    """Blocks, cycles, a missing cell, a known pair: trees from mpmath, the integral
    from importance sampling."""
    missing = torch.ones(4, 4, dtype=torch.bool)
    missing[0, 1] = missing[2, 3] = False
    cycle = torch.eye(4).bool() | torch.eye(4).roll(1, 0).bool()
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool()
    known = torch.block_diag(torch.ones(1, 1), torch.ones(3, 3)).bool()
    for mask in (missing, cycle, blocks, known):
        X = 2 * torch.randn(4, 4)
        for tau in (0.5, 0.05):
            d = GumbelSinkhorn(X, tau, mask=mask)
            P = d.sample()
            log_P = log_of(P)
            M = (X - tau * log_P).masked_fill(~mask, 0.0)
            integral, error = oracles.shift_integral(M, mask, samples=50_000)
            assert error < STATED
            expected = oracles.log_density(X, log_P, tau, integral, mask)
            assert abs(d.log_prob(P) - expected) < SERIES + SIGMAS * error


def test_masked_density_of_two_blocks_is_the_sum() -> None:
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool()
    X = torch.randn(4, 4)
    d = GumbelSinkhorn(X, 0.3, mask=mask)
    P = d.sample((5,))
    log_P = log_of(P)
    for k in range(5):
        expected = sum(
            oracles.density_n2(X[a, a], log_P[k][a, a], 0.3)
            for a in (slice(0, 2), slice(2, 4))
        )
        assert abs(d.log_prob(P)[k] - expected) < CLOSED_FORM * (1 + abs(expected))


def test_fully_decided_mask_has_density_one() -> None:
    perm = torch.eye(4)[[2, 0, 3, 1]].bool()
    d = GumbelSinkhorn(torch.randn(3, 4, 4), 0.1, mask=perm)
    P = d.sample()
    assert torch.equal(P, perm.double().expand(3, 4, 4))
    assert torch.equal(d.log_prob(P), torch.zeros(3))


def test_masks_that_differ_across_the_batch() -> None:
    masks = torch.stack(
        [
            torch.ones(4, 4).bool(),
            torch.eye(4).bool() | torch.eye(4).roll(1, 0).bool(),
            torch.eye(4).bool(),
        ]
    )
    X = torch.randn(3, 4, 4)
    d = GumbelSinkhorn(X, 0.5, mask=masks)
    P = d.rsample((2,))
    assert d.support == doubly_stochastic(masks)
    value = d.log_prob(P)
    assert value.shape == (2, 3)
    for k in range(3):
        one = GumbelSinkhorn(X[k], 0.5, mask=masks[k])
        part = carry_log(P[:, k].clone(), log_of(P)[:, k])
        assert torch.allclose(one.log_prob(part), value[:, k], atol=1e-6)
    expanded = d.expand((5, 3))
    assert expanded.log_prob(expanded.rsample()).shape == (5, 3)
    shared = GumbelSinkhorn(X[0], 0.5, mask=masks)
    assert shared.batch_shape == (3,)


def test_mask_may_be_a_graph() -> None:
    mask = torch.eye(4).bool() | torch.eye(4).roll(1, 0).bool()
    X = torch.randn(4, 4)
    d, e = (
        GumbelSinkhorn(X, 0.5, mask=mask),
        GumbelSinkhorn(X, 0.5, mask=graph_of(mask, 4)),
    )
    P = d.sample()
    assert torch.equal(d.log_prob(P), e.log_prob(P))


def test_value_off_the_mask_is_refused() -> None:
    mask = torch.eye(4).bool() | torch.eye(4).roll(1, 0).bool()
    d = GumbelSinkhorn(torch.zeros(4, 4), 0.5, mask=mask)
    with pytest.raises(ValueError, match=r"support|value"):
        d.log_prob(torch.full((4, 4), 0.25))


def test_infeasible_minus_infinity_is_refused_at_construction() -> None:
    X = torch.zeros(4, 4)
    X[:2] = -math.inf
    X[:2, 1] = 0.0
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"rows.*0, 1.*column.*1"):
        GumbelSinkhorn(X, 0.5)
    assert time.perf_counter() - start < SECONDS


# The log that a sample carries


def paths(d: GumbelSinkhorn) -> dict[str, Tensor]:
    """Values as the inference engines of Pyro hand them from guide to model."""

    def guide() -> Tensor:
        return pyro.sample("P", d)

    def model() -> Tensor:
        return pyro.sample("P", d)

    trace = poutine.trace(guide).get_trace()
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    conditioned = poutine.condition(model, data={"P": d.rsample()})
    P = d.rsample((3,))
    return {
        "own": d.rsample(),
        "replayed": replayed.nodes["P"]["value"],
        "conditioned": poutine.trace(conditioned).get_trace().nodes["P"]["value"],
        "indexed": P[1],
        "expanded": P[0].expand(2, 5, 5),
        "viewed": P.reshape(3, 1, 5, 5)[2, 0],
    }


def test_the_log_survives_on_every_path_from_guide_to_model() -> None:
    d = GumbelSinkhorn(torch.randn(5, 5).float(), 0.01)
    for name, P in paths(d).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", LostLogWarning)
            value = d.log_prob(P)
        double = GumbelSinkhorn(d.logits.double(), 0.01)
        expected = double.log_prob(carry_log(P.double(), log_of(P)))
        assert (P == 0).any(), name
        assert ((value - expected).abs() < FLOAT32 * expected.abs()).all(), name


def test_lost_log_is_scored_finitely_and_warned_about_once() -> None:
    d = GumbelSinkhorn(torch.randn(10, 10).float(), 0.02)
    P = d.sample()
    assert (P == 0).any()
    with pytest.warns(LostLogWarning) as caught:
        value = d.log_prob(P.clone())
    assert len([w for w in caught if w.category is LostLogWarning]) == 1
    assert value.isfinite()


def test_lost_log_is_exact_where_nothing_underflowed() -> None:
    d = GumbelSinkhorn(torch.randn(6, 6), 0.5)
    P = d.sample((5,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (d.log_prob(P.clone()) - d.log_prob(P)).abs().max() < 1e-4


# Straight-through


def test_straight_through_value_is_hard_and_exact() -> None:
    for dtype in (torch.float32, torch.float64):
        d = GumbelSinkhornStraightThrough(torch.randn(20, 6, 6, dtype=dtype), 0.7)
        P = d.rsample((10,))
        assert ((P == 0) | (P == 1)).all()
        assert (P.sum(-1) == 1).all()
        assert (P.sum(-2) == 1).all()
        assert torch.equal(P, matching(log_of(P)).to(dtype))


def test_straight_through_gradient_and_score_are_those_of_the_relaxed_value() -> None:
    X = torch.randn(5, 5)
    weight = torch.randn(5, 5)
    results = []
    for cls in (GumbelSinkhorn, GumbelSinkhornStraightThrough):
        pyro.set_rng_seed(4)
        x = X.clone().requires_grad_()
        t = torch.tensor(0.6, requires_grad=True)
        d = cls(x, t)
        P = d.rsample()
        value = d.log_prob(P)
        gradients = torch.autograd.grad((P * weight).sum(), (x, t), retain_graph=True)
        scores = torch.autograd.grad(value, (x, t))
        results.append((log_of(P), value, *gradients, *scores))
    for soft, hard in zip(*results, strict=True):
        assert torch.allclose(soft, hard, atol=1e-8)


def test_straight_through_is_a_child() -> None:
    d = GumbelSinkhornStraightThrough(torch.randn(4, 4), 0.5)
    assert isinstance(d, GumbelSinkhorn)
    assert type(d.expand((3,))) is GumbelSinkhornStraightThrough
    P = d.rsample()
    relaxed = GumbelSinkhorn(d.logits, 0.5)
    assert torch.allclose(relaxed.log_prob(P), d.log_prob(P))


def test_straight_through_respects_masks() -> None:
    mask = torch.eye(5).bool() | torch.eye(5).roll(1, 0).bool()
    P = GumbelSinkhornStraightThrough(torch.randn(5, 5), 0.5, mask=mask).sample((50,))
    assert not P[:, ~mask].any()
    assert ((P == 0) | (P == 1)).all()


# Noise bound


def gumbel_kl(X: Tensor, tau: float, Y: Tensor, tau0: float) -> Tensor:
    """KL between the scores over their temperatures, cell by cell, by torch."""
    q, p = Gumbel(X / tau, 1 / tau), Gumbel(Y / tau0, 1 / tau0)
    return kl_divergence(q, p).sum((-1, -2))


def test_noise_bound_is_the_least_over_shifts() -> None:
    """Scores are only defined up to shifts, so the best shift of the prior counts."""
    n = 4
    X, Y = torch.randn(n, n), 0.3 * torch.randn(n, n)

    def bound(shift: np.ndarray) -> float:
        a, b = torch.tensor(shift[:n]), torch.tensor(shift[n:])
        return float(gumbel_kl(X, 0.5, Y + a[:, None] + b, 1.0))

    best = scipy.optimize.minimize(bound, np.zeros(2 * n), tol=1e-12).fun
    q, p = GumbelSinkhorn(X, 0.5), GumbelSinkhorn(Y, 1.0)
    assert abs(noise_kl(q, p) - best) < 1e-4
    shifted = GumbelSinkhorn(Y + torch.randn(n, 1) + torch.randn(1, n), 1.0)
    assert abs(noise_kl(q, shifted) - best) < 1e-4
    plain = noise_kl(q, p, up_to_shifts=False)
    assert abs(plain - gumbel_kl(X, 0.5, Y, 1.0)) < 1e-8 * plain
    assert noise_kl(q, p) < plain
    assert abs(noise_kl(q, q)) < 1e-8


def test_noise_bound_is_a_bound() -> None:
    for n in (2, 3):
        q = GumbelSinkhorn(torch.randn(2, n, n), 0.5)
        p = GumbelSinkhorn(torch.zeros(2, n, n), 1.0)
        P = q.sample((500,))
        kl = q.log_prob(P) - p.log_prob(P)
        error = kl.std(0) / 500**0.5
        bound = noise_kl(q, p)
        assert bound.shape == (2,)
        assert (bound > kl.mean(0) - SIGMAS * error).all()


def test_noise_bound_names_shapes_that_differ() -> None:
    q = GumbelSinkhorn(torch.zeros(2, 3, 3), 1.0)
    for shape in [(4, 4), (5, 3, 3)]:
        p = GumbelSinkhorn(torch.zeros(shape), 1.0)
        with pytest.raises(ValueError, match=r"\(2, 3, 3\).*" + str(shape)[1:-1]):
            noise_kl(q, p)


def test_noise_bound_is_differentiable() -> None:
    X = torch.randn(3, 3, requires_grad=True)

    def value(x: Tensor) -> Tensor:
        p = GumbelSinkhorn(torch.zeros(3, 3), 1.0)
        return noise_kl(GumbelSinkhorn(x, 0.5), p)

    assert torch.autograd.gradcheck(value, (X,), eps=1e-4, atol=1e-4)
