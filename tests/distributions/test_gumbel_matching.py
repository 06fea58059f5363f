# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Perturb-and-MAP draws: closed forms, estimates with their errors, never Gibbs."""

from __future__ import annotations

import math

import mpmath
import pyro
import pytest
import torch
from distributions.contract import SIGMAS, DistributionContract
from torch import Tensor
from torch.autograd import gradcheck

import pyro_permutations as pp
from pyro_permutations import GumbelMatching
from pyro_permutations.matching_list import list_matchings
from pyro_permutations.perturbed_matching import log_prob_two_items

CLOSED_FORM = 1e-10  # relative
DRAWS = 100_000


class Drawn(GumbelMatching):
    """With the name that the contract draws by."""

    def rsample(self, sample_shape=()):
        return self.sample(sample_shape)


class TestGumbelMatching(DistributionContract):
    cls = Drawn
    is_discrete = True

    def outside(self, inside):
        return (inside + 1) / 4

    def make(self, batch=(), dtype=torch.float64, **changes):
        return super().make(batch, dtype, **{"density_samples": 64, **changes})

    def test_every_slice_has_its_own_noise(self) -> None:
        value = self.make((2,)).expand((3, 2)).sample((40,))
        perm = pp.to_indices(value).reshape(40, -1)
        assert len(torch.unique(perm, dim=1).mT) > 1
        assert len(torch.unique(perm[:, :3], dim=0)) > 3

    def test_gradients_reach_every_parameter(self) -> None:
        X = self.params((2,), torch.float64)["logits"].requires_grad_()
        value = self.make((2,)).sample()
        score = lambda x: GumbelMatching(x, density_samples=16).log_prob(value)  # noqa: E731
        assert gradcheck(score, (X,))
        assert not GumbelMatching(X).sample().requires_grad
        assert not GumbelMatching(X).log_prob_error(value).requires_grad

    def test_score_parts(self) -> None:
        """A score function, as there is no path derivative."""
        d = self.make()
        assert not GumbelMatching.has_rsample
        parts = d.score_parts(d.sample())
        assert torch.equal(parts.score_function, parts.log_prob)

    def test_vmap(self) -> None:
        X = self.params((5,), torch.float64)["logits"]
        d = GumbelMatching(X, density_samples=32)
        value = d.sample()
        score = torch.func.vmap(
            lambda x, v: GumbelMatching(x, density_samples=32).log_prob(v)
        )
        assert torch.allclose(score(X, value), d.log_prob(value))


def test_two_items_in_closed_form():
    """Against the integral of the density, at forty digits."""
    gaps = [-700.0, -40.0, -3.0, -0.0501, -0.0499, -1e-9, 0.0, 1e-5, 0.06, 2.0, 45.0]
    found = log_prob_two_items(torch.tensor(gaps))
    with mpmath.workdps(600):
        for gap, log_p in zip(gaps, found.tolist(), strict=True):
            b = mpmath.exp(-mpmath.mpf(gap))
            p = 0.5 if gap == 0 else (1 - b + b * mpmath.log(b)) / (1 - b) ** 2
            assert abs(log_p - float(mpmath.log(p))) <= CLOSED_FORM * abs(log_p)
    x = torch.tensor(gaps[1:-1], requires_grad=True)
    assert gradcheck(log_prob_two_items, (x,), eps=1e-7)


def test_reference_value_of_two_items():
    """Report 54: how often the anti-diagonal is the best matching."""
    d = GumbelMatching(torch.tensor([[0.1, 0.9], [0.9, 0.1]]).log())
    swapped = torch.eye(2).flip(0)
    p = d.log_prob(swapped).exp().item()
    assert p == pytest.approx(0.956883, abs=1e-6)
    assert d.log_prob(torch.eye(2)).exp().item() == pytest.approx(1 - p)
    share = d.sample((DRAWS,))[:, 0, 1].mean().item()
    assert abs(share - p) <= SIGMAS * math.sqrt(p * (1 - p) / DRAWS)
    probability, error = d.marginals(20_000)
    assert abs(probability[0, 1].item() - p) <= SIGMAS * error[0, 1].item()
    # The relaxed one has the same hard matchings, at any temperature.
    relaxed = pp.GumbelSinkhorn(d.logits, 1.0).sample((2000,))
    share = pp.matching(relaxed)[:, 0, 1].mean().item()
    assert abs(share - p) <= SIGMAS * math.sqrt(p * (1 - p) / 2000)


def test_one_row_is_gumbel_max():
    X = 2 * torch.randn(3, 1, 4)
    d = GumbelMatching(X)
    value = torch.eye(4)[:, None, None]
    assert torch.allclose(d.log_prob(value), X.log_softmax(-1)[:, 0].mT)
    assert not d.log_prob_error(value).any()
    assert torch.allclose(d.log_prob(value), pp.GibbsMatching(X).log_prob(value))


FREE = torch.tensor([0.3, -0.2, 0.0])
CASES = {
    "square": ((3, 3), None, None),
    "four": ((4, 4), None, None),
    "mask": ((4, 4), ~torch.eye(4, dtype=torch.bool), None),
    "injection": ((2, 4), None, None),
    "partial": ((2, 3), None, (0.0, 0.5)),
    "tall": ((3, 2), None, (FREE, -0.5)),
    "some": ((3, 3), None, (torch.tensor([0.0, -torch.inf, 0.4]), FREE)),
}


def shares(draws: Tensor, values: Tensor) -> Tensor:
    """How often each value is drawn."""
    n, m = values.shape[-2:]
    place = torch.arange(1.0, m + 1) * float(m + 1) ** torch.arange(n)[:, None]
    codes = [(x * place).sum((-2, -1)) for x in (draws, values)]
    return (codes[0][:, None] == codes[1]).double().mean(0)


@pytest.mark.parametrize("case", CASES)
def test_estimates_agree_with_frequencies_within_their_errors(case):
    """Of all matchings, also where something may stay unmatched."""
    shape, mask, unmatched = CASES[case]
    d = GumbelMatching(1.5 * torch.randn(shape), mask=mask, unmatched=unmatched)
    values = pp.to_matrix(list_matchings(d.graph), columns=shape[1])
    log_p, error = d.log_prob(values), d.log_prob_error(values)
    p = log_p.exp()
    frequency = shares(d.sample((DRAWS,)), values)
    spread = (frequency * (1 - frequency) / DRAWS + (p * error) ** 2).sqrt()
    assert ((p - frequency).abs() <= SIGMAS * spread + 1 / DRAWS).all()
    assert error.max() <= 0.5
    total = (p * error).square().sum().sqrt()  # errors have common noise
    assert (p.sum() - 1).abs() <= 2 * SIGMAS * total


def test_the_error_is_that_of_the_estimate():
    """Estimates with more samples are nearer, as the errors say they are."""
    X = torch.randn(4, 4)
    values = torch.eye(4)[torch.stack([torch.randperm(4) for _ in range(12)])]
    rough = GumbelMatching(X, density_samples=256)
    fine = GumbelMatching(X, density_samples=65_536)
    z = (rough.log_prob(values) - fine.log_prob(values)) / rough.log_prob_error(values)
    assert z.abs().max() <= SIGMAS
    assert (fine.log_prob_error(values) < rough.log_prob_error(values)).all()
    # No draw is needed that hits: even what hardly ever happens has an estimate.
    rare = GumbelMatching(20 * torch.eye(4)).log_prob(torch.eye(4).roll(1, 0))
    assert rare.isfinite()
    assert rare < -20


def test_it_is_not_the_gibbs_law():
    X = 2 * torch.randn(4, 4)
    d, gibbs = GumbelMatching(X), pp.GibbsMatching(X)
    values = gibbs.enumerate_support()
    distance = (d.log_prob(values).exp() - gibbs.log_prob(values).exp()).abs().sum() / 2
    assert distance >= 0.03


def test_blocks_are_scored_one_by_one():
    """Two blocks of two items: exact, and their probabilities multiply."""
    X = torch.randn(4, 4)
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool()
    d = GumbelMatching(X, mask=mask)
    value = torch.eye(4)
    each = [
        GumbelMatching(X[k, k]).log_prob(torch.eye(2)) for k in (slice(2), slice(2, 4))
    ]
    assert torch.allclose(d.log_prob(value), each[0] + each[1])
    assert d.log_prob_error(value) == 0
    assert d.log_prob(torch.eye(4).roll(1, 0)) == -torch.inf
    assert d.log_prob_error(torch.eye(4).roll(1, 0)) == 0


def test_unknown_moments_say_what_to_do():
    d = GumbelMatching(torch.zeros(3, 3))
    with pytest.raises(NotImplementedError, match=r"mode.*matching\(d.logits\)"):
        _ = d.mode
    with pytest.raises(NotImplementedError, match=r"entropy.*log_prob"):
        d.entropy()
    with pytest.raises(ValueError, match="DiscreteKL_ELBO"):
        d.log_prob(torch.full((3, 3), 1 / 3))


def test_large_and_extreme_scores_stay_finite():
    pyro.set_rng_seed(2)
    for scale in (1e2, 1e4):
        X = (scale * torch.randn(4, 4)).requires_grad_()
        d = GumbelMatching(X, density_samples=64)
        value = torch.eye(4)[torch.stack([torch.randperm(4) for _ in range(6)])]
        log_p = d.log_prob(value)
        assert log_p.isfinite().all()
        assert (log_p <= 0).all()
        (g,) = torch.autograd.grad(log_p.sum(), X)
        assert g.isfinite().all()
    d = GumbelMatching(torch.randn(20, 20))
    value = d.sample()
    assert d.log_prob(value).isfinite()
    assert 0 < d.log_prob_error(value) < 2
