# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Gibbs law of matchings and the uniform permutation, against enumeration."""

from __future__ import annotations

import itertools
import math
import pickle
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from distributions.contract import SIGMAS, DistributionContract
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import kl_divergence

import pyro_permutations as pp
from pyro_permutations import GibbsMatching, UniformPermutation
from pyro_permutations.matching_sampler import EXACT as LARGEST_EXACT

EXACT = 1e-10  # of a sum with positive terms
RARE = 1e-3  # a chi-square test with a fixed seed fails below this
EXPECTED = 5.0  # fewest draws that a cell of it may expect; rarer values are pooled
CHAINS = 200
CHAIN = 4.5  # standard errors of frequencies that chains may be off, most of 200 cells


class Drawn(GibbsMatching):
    """With the name that the contract draws by."""

    def rsample(self, sample_shape=()):
        return self.sample(sample_shape)


class TestGibbsMatching(DistributionContract):
    cls = Drawn
    is_discrete = True

    def params(self, batch, dtype):
        """Mild scores, so that the contract's draws have every pair often."""
        return {"logits": super().params(batch, dtype)["logits"] / 4}

    def outside(self, inside):
        return (inside + 1) / 4

    def test_every_slice_has_its_own_noise(self) -> None:
        value = self.make((2,)).expand((3, 2)).sample((40,))
        perm = pp.to_indices(value).reshape(40, -1)
        assert len(torch.unique(perm, dim=1).mT) > 1
        assert len(torch.unique(perm[:, :3], dim=0)) > 3

    def test_score_is_deterministic(self) -> None:
        d = self.make((2,))
        value, state = d.sample(), torch.get_rng_state()
        assert torch.equal(d.log_prob(value), d.log_prob(value))
        assert torch.equal(torch.get_rng_state(), state)

    def test_bad_density_samples_are_named(self) -> None:
        """There are none here: nothing is sampled to score."""
        with pytest.raises(TypeError):
            self.make(density_samples=1)

    def test_gradients_reach_every_parameter(self) -> None:
        X = self.params((2,), torch.float64)["logits"].requires_grad_()
        value = self.make((2,)).sample()
        assert gradcheck(lambda x: GibbsMatching(x).log_prob(value), (X,))
        assert gradcheck(lambda x: GibbsMatching(x).entropy(), (X,))
        assert not GibbsMatching(X).sample().requires_grad
        assert not GibbsMatching(X).marginals()[0].requires_grad

    def test_score_parts(self) -> None:
        """A score function, as there is no path derivative."""
        d = self.make()
        assert not GibbsMatching.has_rsample
        parts = d.score_parts(d.sample())
        assert torch.equal(parts.score_function, parts.log_prob)
        assert parts.entropy_term == 0

    @pytest.mark.parametrize("name", ["cdf", "icdf"])
    def test_other_methods_are_unknown_rather_than_wrong(self, name) -> None:
        d = self.make()
        with pytest.raises(NotImplementedError):
            getattr(d, name)(d.sample())

    def test_divergence_is_left_to_the_density(self) -> None:
        """But for two of these: see the divergence below."""
        zeros = torch.zeros(3, 3)
        for other in (dist.Normal(zeros, 1.0), pp.GumbelSinkhorn(zeros, 1.0)):
            for pair in ((self.make(), other), (other, self.make())):
                with pytest.raises(NotImplementedError):
                    kl_divergence(*pair)

    def test_vmap(self) -> None:
        X = self.params((5,), torch.float64)["logits"]
        value = GibbsMatching(X).sample()
        score = torch.func.vmap(lambda x, v: GibbsMatching(x).log_prob(v))
        assert torch.allclose(score(X, value), GibbsMatching(X).log_prob(value))


# The law


def test_log_prob_is_that_of_an_enumeration():
    X = 3 * torch.randn(2, 4, 4)
    d = GibbsMatching(X)
    P = torch.eye(4)[torch.tensor(list(itertools.permutations(range(4))))]
    score = (P[:, None] * X).sum((-2, -1))
    assert torch.allclose(d.log_prob(P[:, None]), score.log_softmax(0))
    assert torch.equal(d.enumerate_support(), P[:, None].expand(-1, 2, -1, -1))
    assert d.enumerate_support(expand=False).shape == (24, 1, 4, 4)
    probability = score.softmax(0)
    pairs = (probability[..., None, None] * P[:, None]).sum(0)
    found, error = d.marginals()
    assert (found[..., :4] - pairs).abs().max() <= EXACT
    assert not error.any()
    assert not found[..., 4].any()
    assert torch.allclose(d.mean, pairs)
    assert torch.allclose(d.variance, pairs * (1 - pairs))
    entropy = -(probability * score.log_softmax(0)).sum(0)
    assert torch.allclose(d.entropy(), entropy)
    best = P[score.argmax(0)]
    assert torch.equal(d.mode, best)


MASKS = {
    "full": lambda n: None,
    "few": lambda n: ~torch.eye(n, dtype=torch.bool),
    "band": lambda n: (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 1,
}


def fits(draws: Tensor, d: GibbsMatching) -> float:
    """The p-value of a chi-square test of draws against the listed probabilities."""
    values = d.enumerate_support()
    expected = d.log_prob(values).exp() * len(draws)
    size = draws.shape[-1] + 1
    weight = float(size) ** torch.arange(draws.shape[-2])
    code, listed = (
        ((x * torch.arange(1.0, size)).sum(-1) * weight).sum(-1)
        for x in (draws, values)
    )
    observed = (code[:, None] == listed).sum(0).double()
    assert observed.sum() == len(draws)
    rare = expected < EXPECTED
    cells = [observed[~rare], expected[~rare]]
    if rare.any() and expected[rare].sum() > 0:
        cells = [
            torch.cat([x, y[rare].sum()[None]])
            for x, y in zip(cells, (observed, expected), strict=True)
        ]
    seen, expected = cells
    statistic = ((seen - expected) ** 2 / expected).sum().item()
    return float(scipy.stats.chi2.sf(statistic, max(1, len(seen) - 1)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("n", [3, 4, 5])
def test_samples_have_the_law(n, kind, scale):
    d = GibbsMatching(scale * torch.randn(n, n), mask=MASKS[kind](n))
    assert fits(d.sample((20_000,)), d) >= RARE


def test_samples_of_partial_matchings_and_injections_have_the_law():
    for shape, unmatched in [
        ((2, 4), None),
        ((3, 2), (0.3, torch.tensor([0.0, -1.0]))),
        ((3, 3), (torch.tensor([0.2, -torch.inf, 0.0]), 0.5)),
    ]:
        d = GibbsMatching(2 * torch.randn(shape), unmatched=unmatched)
        assert fits(d.sample((20_000,)), d) >= RARE
        assert torch.allclose(
            d.log_prob(d.enumerate_support()).exp().sum(), d.logits.new_tensor(1.0)
        )
        probability, _ = d.marginals()
        assert torch.allclose(probability.sum(-1), torch.ones(shape[0]))


def test_the_test_of_the_law_has_power():
    """It tells perturb-and-MAP draws, which are close, from Gibbs draws."""
    X = 2 * torch.randn(4, 4)
    draws = pp.GumbelMatching(X).sample((20_000,))
    assert fits(draws, GibbsMatching(X)) < RARE


@pytest.mark.parametrize("n", [4, 14])  # exact and calibrated
def test_one_matrix_of_scores_with_a_batch_of_masks(n):
    """Elements do not add up: each has the moments that it has alone."""
    masks = torch.stack([torch.ones(n, n).bool(), MASKS["few"](n), MASKS["band"](n)])
    for X in (torch.randn(n, n), torch.zeros(2, 1, n, n)):
        d = GibbsMatching(X, mask=masks)
        other = GibbsMatching(torch.zeros(n, n), mask=masks)
        for k in range(3):
            one = GibbsMatching(X[..., 0, :, :] if X.dim() > 2 else X, mask=masks[k])
            assert torch.allclose(d.entropy()[..., k], one.entropy())
            if n <= 12:
                assert torch.allclose(d.mean[..., k, :, :], one.mean)
                found, error = d.marginals()
                assert torch.allclose(found[..., k, :, :], one.marginals()[0])
                assert not error.any()
                kl = torch.distributions.kl_divergence(d, other)[..., k]
                alone = GibbsMatching(torch.zeros(n, n), mask=masks[k])
                assert torch.allclose(kl, torch.distributions.kl_divergence(one, alone))


def test_masks_may_differ_across_the_batch():
    masks = torch.stack([torch.ones(4, 4).bool(), MASKS["few"](4), MASKS["band"](4)])
    X = torch.randn(3, 4, 4)
    d = GibbsMatching(X, mask=masks)
    draws = d.sample((20_000,))
    values = d.enumerate_support()
    assert values.shape == (24, 3, 4, 4)
    together = d.log_prob(values)
    assert torch.allclose(together.exp().sum(0), torch.ones(3))
    for k in range(3):
        one = GibbsMatching(X[k], mask=masks[k])
        assert fits(draws[:, k], one) >= RARE
        own = one.enumerate_support()
        assert torch.isfinite(together[:, k]).sum() == len(own)
    # Padding: problems of two, three and four items in one batch.
    padded = torch.zeros(3, 4, 4, dtype=torch.bool)
    for k, size in enumerate((2, 3, 4)):
        padded[k, :size, :size] = True
    d = GibbsMatching(X, mask=padded)
    assert torch.allclose(d.log_partition[0], pp.log_permanent(X[0, :2, :2]))
    draws = d.sample((10,))
    assert draws.sum((-2, -1)).mean(0).tolist() == [2.0, 3.0, 4.0]
    assert d.log_prob(draws).isfinite().all()
    assert d.log_prob(draws[:, 2:]).isneginf()[:, :2].all()


# Many items


@pytest.mark.parametrize("kind", ["full", "mask", "injection", "partial"])
def test_chains_have_the_marginals(kind):
    """Fourteen items are more than the exact sampler takes, but can be summed over."""
    X, unmatched, mask = 2 * torch.randn(14, 14), None, None
    if kind == "mask":
        mask = torch.rand(14, 14) < 0.4
        for _ in range(3):
            mask |= torch.eye(14)[torch.randperm(14)].bool()
    elif kind != "full":
        X = 2 * torch.randn(13, 18)
        unmatched = (-0.5, 0.5) if kind == "partial" else None
    d = GibbsMatching(X, mask=mask, unmatched=unmatched)
    assert min(X.shape) > LARGEST_EXACT
    X.requires_grad_()
    total = pp.log_permanent(X, mask=mask, unmatched=unmatched)
    (pairs,) = torch.autograd.grad(total, X)
    probability, error = d.marginals(CHAINS)
    spread = (pairs * (1 - pairs) / CHAINS).sqrt()
    known = pairs * CHAINS >= EXPECTED
    z = ((probability[..., :-1] - pairs) / spread)[known]
    assert z.abs().max() <= CHAIN
    assert 0.6 <= z.square().mean().sqrt() <= 1.25  # of about 100 cells: .7 to 1.1
    # What was never drawn, or always, has an error too, unless it is impossible.
    assert ((error[..., :-1] > 0) == (pairs > 0)).all()
    assert torch.allclose(probability.sum(-1), torch.ones(X.shape[0]))
    # And the calibrated log_prob is close to the exact one.
    value = d.mode
    exact = (d.logits * value).sum() - pp.log_permanent(
        d.logits.detach(),
        mask=d.graph if kind == "mask" else None,
        unmatched=(0.0, 0.0) if kind == "partial" else None,
    )
    assert abs(d.log_prob(value).item() - exact.item()) <= 0.6


def test_long_rings_are_sampled_exactly():
    """Two matchings of thirteen items that differ in all of them, odds e^2."""
    n = 13
    mask = (torch.eye(n) + torch.eye(n).roll(1, 1)).bool()
    share = GibbsMatching(2 / n * torch.eye(n), mask=mask).sample((4000,))[:, 0, 0]
    p = torch.tensor(2.0).sigmoid().item()
    assert abs(share.mean().item() - p) <= SIGMAS * math.sqrt(p * (1 - p) / 4000)


def test_a_batch_of_twelve_items():
    """Report 47: what was a vector of n! numbers, or not there."""
    d = GibbsMatching(torch.randn(5, 12, 12))
    assert d.batch_shape == (5,)
    P = d.sample((3,))
    assert d.support.check(P).all()
    assert (d.log_prob(d.mode) >= d.log_prob(P)).all()
    probability, error = d.marginals()
    assert probability.shape == (5, 12, 13)
    assert not error.any()
    assert not d.has_enumerate_support
    with pytest.raises(NotImplementedError, match="too many"):
        d.enumerate_support()


@pytest.mark.parametrize("n", [50, 200])
def test_hundreds_of_items(n):
    start = time.thread_time()  # not what other processes take
    d = GibbsMatching(2 * torch.randn(n, n))
    P = d.sample()
    assert d.support.check(P)
    assert d.log_prob(P) <= d.log_prob(d.mode)
    # The mean score of the chain's states is that of the calibrated law, roughly.
    score = (d.logits * d.sample((4,))).sum((-2, -1)).mean()
    mean = (d.log_partition - d.entropy()).item()
    assert abs(score.item() - mean) <= 0.1 * abs(mean)
    with pytest.raises(NotImplementedError, match="marginals"):
        _ = d.mean
    assert time.thread_time() - start <= 60  # 1 s and 2 s
    u = UniformPermutation(n)
    assert abs(u.log_prob(u.sample()).item() + math.lgamma(n + 1)) <= 1e-8
    assert torch.allclose(u.mean, torch.full((n, n), 1 / n))


# Values and arguments


def test_values_are_always_checked():
    """Whatever validation says, and the message names the two ways out."""
    soft = torch.full((3, 3), 1 / 3)
    twice = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    for flag in (True, False):
        for d in (
            GibbsMatching(torch.zeros(3, 3), validate_args=flag),
            UniformPermutation(3, validate_args=flag),
        ):
            for bad in (soft, twice, torch.zeros(3, 3), 2 * torch.eye(3)):
                with pytest.raises(
                    ValueError, match=r"relax\(model, temperature\).*DiscreteKL_ELBO"
                ):
                    d.log_prob(bad)
    injection = GibbsMatching(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="permutation"):
        injection.log_prob(torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    partial = GibbsMatching(torch.zeros(2, 3), unmatched=(0.0, 0.0))
    assert partial.log_prob(torch.zeros(2, 3)).exp().item() == pytest.approx(1 / 13)


def test_a_relaxed_guide_is_told_what_to_do():
    """Report 57: the fix is in the message, with validation and without."""

    def model():
        pyro.sample("P", UniformPermutation(3))

    def guide():
        pyro.sample("P", pp.GumbelSinkhorn(torch.zeros(3, 3), 0.5))

    for flag in (True, False):
        with (
            pyro.validation_enabled(flag),
            pytest.raises(ValueError, match="DiscreteKL_ELBO"),
        ):
            Trace_ELBO().loss(model, guide)


def test_forbidden_pairs_have_no_probability():
    mask = ~torch.eye(3, dtype=torch.bool)
    d = GibbsMatching(torch.zeros(3, 3), mask=mask)
    assert d.log_prob(torch.eye(3)) == -torch.inf
    X = torch.zeros(3, 3, requires_grad=True)
    GibbsMatching(X, mask=mask).log_prob(torch.eye(3).roll(1, 0)).backward()
    assert X.grad.isfinite().all()
    assert not X.grad.diagonal().any()


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, torch.tensor(0)])
def test_a_bad_number_of_items_is_named(bad):
    with pytest.raises(ValueError, match="n must be a positive integer"):
        UniformPermutation(bad)


@pytest.mark.parametrize("n", [3, np.int64(3), torch.tensor(3)])
def test_integers_of_other_kinds(n):
    assert UniformPermutation(n).event_shape == (3, 3)


def test_shapes_of_a_uniform_permutation():
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0, 1] = False
    d = UniformPermutation(4, mask=mask)
    assert (d.batch_shape, d.event_shape) == ((2, 1), (4, 4))
    assert UniformPermutation.infer_shapes(mask=mask.shape) == ((2, 1), (4, 4))
    e = d.expand((3, 2, 5))
    assert type(e) is UniformPermutation
    assert e.sample((7,)).shape == (7, 3, 2, 5, 4, 4)
    assert e.log_prob(e.sample()).shape == (3, 2, 5)
    assert torch.allclose(e.entropy()[0, :, 0].exp(), torch.tensor([18.0, 24.0]))
    assert e.to_event(1).log_prob(e.sample()).shape == (3, 2)
    assert e.enumerate_support().shape[1:] == (3, 2, 5, 4, 4)
    copy = pickle.loads(pickle.dumps(e))
    assert torch.equal(copy.log_partition, e.log_partition)
    assert UniformPermutation(3).expand((0,)).sample().shape == (0, 3, 3)
    one = GibbsMatching(torch.randn(1, 3, 3)).expand((4, 2))
    assert one.sample().shape == (4, 2, 3, 3)


def test_prior_draws_are_uniform():
    """Report 60: over the 720 permutations of six items."""
    d = UniformPermutation(6)
    draws = d.sample((50_000,))
    assert fits(draws, d) > RARE
    assert torch.allclose(d.log_prob(draws), torch.tensor(-math.log(720)))
    masked = UniformPermutation(5, mask=MASKS["few"](5))
    assert fits(masked.sample((20_000,)), masked) >= RARE
    assert masked.entropy().exp().item() == pytest.approx(44)


def test_joint_against_greedy_matching():
    """Report 67: the best pair is not part of the best matching."""
    X = torch.tensor([[0.95, 0.94], [0.93, 0.01]]).logit()
    d = GibbsMatching(X)
    assert pp.to_indices(d.mode).tolist() == [1, 0]
    assert d.log_prob(d.mode).exp().item() == pytest.approx(0.9991, abs=5e-5)
    partial = GibbsMatching(X, unmatched=(0.0, 0.0))
    probability, _ = partial.marginals()
    values = partial.enumerate_support()
    weight = (values * X).sum((-2, -1)).softmax(0)
    pairs = (weight[:, None, None] * values).sum(0)
    assert torch.allclose(probability[:, :2], pairs)
    assert torch.allclose(probability[:, 2], 1 - pairs.sum(-1))


def test_every_pair_has_its_probability():
    """Report 69; and report 26: frequencies of draws are those stated."""
    d = GibbsMatching(2 * torch.randn(6, 6))
    probability, error = d.marginals()
    assert torch.allclose(probability.sum(-1), torch.ones(6))
    draws = d.sample((20_000,)).mean(0)
    spread = (probability * (1 - probability) / 20_000).sqrt()[:, :6]
    assert ((draws - probability[:, :6]).abs() <= SIGMAS * spread + 1e-4).all()
    assert not error.any()


# In Pyro


def noisy_order(X: Tensor, mask: Tensor | None, **infer) -> None:
    x = torch.arange(3.0)
    with pyro.plate("copies", 2):
        P = pyro.sample("P", GibbsMatching(X, mask=mask), infer=infer)
        y = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.5]])
        pyro.sample("y", dist.Normal(P @ x, 0.7).to_event(1), obs=y)


@pytest.mark.parametrize("masked", [False, True])
def test_enumeration_is_exact_in_a_plate(masked):
    """The oracle of every inference: TraceEnum_ELBO over the site."""
    X = torch.randn(2, 3, 3)
    mask = None
    if masked:
        mask = torch.ones(2, 3, 3, dtype=torch.bool)
        mask[1, 0, 0] = False
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.loss(lambda: noisy_order(X, mask, enumerate="parallel"), lambda: None)
    P = torch.eye(3)[torch.tensor(list(itertools.permutations(range(3))))][:, None]
    y = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.5]])
    fit = dist.Normal(P @ torch.arange(3.0), 0.7).to_event(1).log_prob(y)
    joint = GibbsMatching(X, mask=mask).log_prob(P) + fit
    assert loss == pytest.approx(-joint.logsumexp(0).sum().item(), abs=1e-9)


@pytest.mark.parametrize("n", [3, 8])
def test_nuts_sums_few_items_out(n):
    """The potential energy of the other sites is that of the sum over matchings."""
    x, y = torch.randn(2, n)

    def model():
        shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
        P = pyro.sample("P", UniformPermutation(n))
        mean = P @ x + shift[..., None]
        pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)

    latent, potential, *_ = initialize_model(model)
    assert latent.keys() == {"shift"}
    shift = torch.tensor(0.3)
    P = torch.eye(n)[torch.tensor(list(itertools.permutations(range(n))))]
    score = dist.Normal(P @ x + shift, 0.5).log_prob(y).sum(-1)
    expected = dist.Normal(0.0, 2.0).log_prob(shift) + score.logsumexp(0)
    expected = expected - math.lgamma(n + 1)
    assert abs(potential({"shift": shift}) + expected) <= EXACT


def test_score_function_learns_a_posterior():
    """A Gibbs guide and Pyro's own ELBO: two items, whose posterior is known."""
    pyro.set_rng_seed(1)
    X = torch.tensor([[1.6, 0.0], [0.0, 1.6]])  # odds of e^3.2

    def model():
        P = pyro.sample("P", UniformPermutation(2))
        pyro.factor("fit", (P * X).sum((-2, -1)))

    def guide():
        logits = pyro.param("logits", torch.zeros(2, 2))
        pyro.sample("P", GibbsMatching(logits))

    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(300):
        svi.step()
    probability, _ = GibbsMatching(pyro.param("logits").detach()).marginals()
    assert abs(probability[0, 0].item() - 0.9608) <= 0.02


def test_predictive_draws_whole_matchings():
    def model():
        with pyro.plate("many", 4):
            pyro.sample("P", GibbsMatching(torch.zeros(3, 3)))

    draws = Predictive(model, num_samples=6, parallel=True)()["P"]
    assert pp.to_indices(draws).shape == (6, 4, 3)


# The divergence


def listed_kl(p: GibbsMatching, q: GibbsMatching) -> Tensor:
    """Of single laws, over the matchings that p allows."""
    P = p.enumerate_support()
    mine, other = p.log_prob(P), q.log_prob(P)
    return (mine.exp() * (mine - other)).sum(0)


@pytest.mark.parametrize("kind", MASKS)
def test_divergence_is_that_of_an_enumeration(kind):
    mask = MASKS[kind](4)
    X, Y = 2 * torch.randn(2, 3, 4, 4)
    found = kl_divergence(GibbsMatching(X, mask=mask), GibbsMatching(Y, mask=mask))
    wide = kl_divergence(GibbsMatching(X, mask=mask), UniformPermutation(4))
    assert found.shape == wide.shape == (3,)
    for k in range(3):
        p, q = GibbsMatching(X[k], mask=mask), GibbsMatching(Y[k], mask=mask)
        assert abs(found[k] - listed_kl(p, q)) <= EXACT
        assert abs(wide[k] - listed_kl(p, UniformPermutation(4))) <= EXACT
        assert kl_divergence(p, p) == 0


def test_divergence_of_partial_matchings_and_injections():
    scores = torch.randn(2, 3, 4)
    free = (torch.randn(3), torch.tensor([0.5, -0.5, -torch.inf, 0.0]))
    injections = [GibbsMatching(x) for x in scores]
    partial = [GibbsMatching(scores[0], unmatched=free)]
    partial.append(GibbsMatching(scores[1], unmatched=(0.3, -0.2)))
    for p, q in (injections, partial, (injections[0], partial[1])):
        assert kl_divergence(p, q).item() == pytest.approx(
            listed_kl(p, q).item(), abs=EXACT
        )


def test_divergence_is_infinite_where_q_forbids_what_p_allows():
    wide, X = UniformPermutation(3), torch.randn(2, 3, 3)
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    mask[1] = MASKS["few"](3)
    found = kl_divergence(wide, GibbsMatching(X, mask=mask))
    assert found[0].isfinite()
    assert found[1] == torch.inf
    assert kl_divergence(GibbsMatching(X, mask=mask), wide).isfinite().all()
    loose = GibbsMatching(X[0], unmatched=(0.0, 0.0))
    assert kl_divergence(loose, wide) == torch.inf
    assert kl_divergence(wide, loose).isfinite()
    # What the mask lets stand, but no matching can use, is no difference.
    triangle = torch.ones(3, 3).tril().bool()
    p = GibbsMatching(X[0], mask=triangle)
    q = GibbsMatching(X[1], mask=torch.eye(3, dtype=torch.bool))
    assert abs(kl_divergence(p, q)) <= EXACT
    with pytest.raises(ValueError, match="one size"):
        kl_divergence(wide, UniformPermutation(4))


def test_divergence_has_gradients_on_both_sides():
    X, Y = torch.randn(2, 3, 3, requires_grad=True)
    assert gradcheck(
        lambda x, y: kl_divergence(GibbsMatching(x), GibbsMatching(y)), (X, Y)
    )


def test_divergence_of_many_items_is_known_only_by_symmetry():
    assert kl_divergence(UniformPermutation(30), UniformPermutation(30)) == 0
    large = GibbsMatching(torch.randn(13, 13))
    for p, q in ((large, large), (UniformPermutation(13), large)):
        with pytest.raises(NotImplementedError, match="from draws"):
            kl_divergence(p, q)


def test_mean_field_has_the_exact_divergence():
    """Of a discrete guide its loss is exact, without noise, and so is its gradient.

    Validation is off: Pyro asks for guides with reparametrised draws, which matter to
    a likelihood, and there is none here.
    """
    X, Y = torch.randn(2, 3, 3, requires_grad=True)
    p, q = GibbsMatching(X), GibbsMatching(Y)

    def site(d):
        def run():
            with pyro.plate("two", 2):
                pyro.sample("P", d)

        return run

    with pyro.validation_enabled(False):
        loss = TraceMeanField_ELBO().differentiable_loss(site(q), site(p))
    expected = 2 * kl_divergence(p, q)
    assert loss.item() == pytest.approx(expected.item(), abs=EXACT)
    for x in (X, Y):
        mine, other = (
            torch.autograd.grad(f, x, retain_graph=True)[0] for f in (loss, expected)
        )
        assert torch.allclose(mine, other, rtol=0, atol=EXACT)
