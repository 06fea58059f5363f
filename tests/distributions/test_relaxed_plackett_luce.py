# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Soft rankings: their density, their limit, and inference with them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from distributions.contract import SIGMAS
from distributions.test_plackett_luce import Rankings
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import TransformReparam
from torch.autograd import gradcheck

import pyro_permutations as pp
from pyro_permutations import (
    GumbelSinkhorn,
    PlackettLuce,
    RelaxedPlackettLuce,
    soft_ranking,
)

SAME = 1e-9  # one number by two routes through a converged Sinkhorn, relative


class TestRelaxedPlackettLuce(Rankings):
    cls = RelaxedPlackettLuce

    def params(self, batch, dtype):
        generator = torch.Generator().manual_seed(2)
        temperature = 0.3 + torch.rand(batch, generator=generator).to(dtype)
        return {**super().params(batch, dtype), "temperature": temperature}

    def test_infeasible_logits_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"logits must be finite.*Leave out"):
            self.make(logits=torch.tensor([0.0, -torch.inf, 0.0]))

    @pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf, "hot"])
    def test_bad_temperatures_are_named(self, bad) -> None:
        with pytest.raises(ValueError, match="temperature"):
            self.make(temperature=bad)
        with pytest.raises(ValueError, match="temperature has shape"):
            self.make((2,), temperature=torch.ones(3))

    @pytest.mark.parametrize("name", ["cdf", "icdf"])
    def test_other_methods_are_unknown_rather_than_wrong(self, name) -> None:
        d = self.make()
        with pytest.raises(NotImplementedError):
            getattr(d, name)(d.sample())


# The density


def coordinates(d: RelaxedPlackettLuce, P: torch.Tensor) -> torch.Tensor:
    """The differences y, from a soft ranking, by hand: two ranks of log P."""
    log_P = pp.log_of(P)
    if d.top == d.logits.shape[-1]:
        y = log_P[..., 0, :] - log_P[..., 1, :]
    else:
        y = log_P[..., 0, :] - pp.slack_of(P)[1].log()
        y = y / d.top
    return y - y[..., -1:]


@pytest.mark.parametrize(("n", "top"), [(2, 2), (4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_density_is_that_of_the_concrete_distribution(n, top, temperature):
    """In the coordinates y, torch's density of the log of a Concrete variable."""
    logits = torch.randn(n)
    d = RelaxedPlackettLuce(logits, temperature, top)
    P = d.rsample((50,))
    y = coordinates(d, P)
    concrete = dist.RelaxedOneHotCategorical(torch.tensor(temperature), logits=logits)
    on_logs = concrete.base_dist  # with respect to the first n - 1 log ratios
    expected = on_logs.log_prob(y - y.logsumexp(-1, keepdim=True))
    # torch's is on log probabilities, of the same volume up to the last of them.
    assert torch.allclose(d.log_prob(P), expected, rtol=1e-6, atol=1e-6)


def test_density_integrates_to_one_and_fits_the_draws():
    """Two items: quadrature; more: E_a[p_b / p_a] = 1."""
    d = RelaxedPlackettLuce(torch.tensor([0.4, -0.3]), 0.5)
    y = torch.linspace(-60, 60, 20_001)[:, None]
    P = pp.RankingTransform(1.0)(y)
    density = d.log_prob(P).exp()
    step = 120 / 20_000
    assert abs(float(density.sum()) * step - 1) < 1e-6
    mean = float((density * P[:, 0, 0]).sum()) * step
    draws = d.sample((20_000,))[:, 0, 0]
    assert abs(float(draws.mean()) - mean) < SIGMAS * float(draws.std()) / 20_000**0.5
    a = RelaxedPlackettLuce(torch.tensor([0.2, 0.0, -0.4, 0.1]), 0.5, 3)
    b = RelaxedPlackettLuce(torch.tensor([0.0, 0.3, 0.0, -0.2]), 0.6, 3)
    P = a.sample((5000,))
    ratio = (b.log_prob(P) - a.log_prob(P)).exp()
    assert abs(float(ratio.mean()) - 1) < SIGMAS * float(ratio.std()) / 5000**0.5


def test_entropy_is_exact():
    logits = torch.randn(3, 5)
    d = RelaxedPlackettLuce(logits, torch.tensor([1.0, 0.5, 0.1]))
    sample = -d.log_prob(d.sample((4000,)))
    error = sample.std(0) / 4000**0.5
    assert ((sample.mean(0) - d.entropy()).abs() < SIGMAS * error).all()
    assert RelaxedPlackettLuce(torch.zeros(1), 0.1).entropy().abs() < SAME
    # Two items: the entropy of a logistic variable over the temperature is 2 - log tau.
    two = RelaxedPlackettLuce(torch.randn(2), 0.3).entropy()
    assert abs(float(two) - (2 - math.log(0.3))) < SAME


def test_divergence_does_not_depend_on_one_temperature():
    logits, other = torch.randn(2, 5)
    gaps = []
    for temperature in (1.0, 0.1, 0.01):
        pyro.set_rng_seed(3)
        q = RelaxedPlackettLuce(logits, temperature)
        p = RelaxedPlackettLuce(other, temperature)
        P = q.sample((20,))
        gaps.append(q.log_prob(P) - p.log_prob(P))
    assert torch.allclose(gaps[0], gaps[1], rtol=1e-6, atol=1e-6)
    assert torch.allclose(gaps[0], gaps[2], rtol=1e-6, atol=1e-6)


# Values


@pytest.mark.parametrize("top", [2, 4])
def test_limit_is_plackett_luce(top):
    """The same noise, the same ranking; and at low temperature P is it."""
    logits = torch.randn(4)
    d = RelaxedPlackettLuce(logits, 0.001, top)
    P = d.sample((500,))
    hard = pp.matching(P)
    assert ((P - hard).abs() < 0.01).double().mean() > 0.99  # all but near ties
    exact = PlackettLuce(logits, top).mean
    error = (exact * (1 - exact) / 500).sqrt()
    assert ((hard.mean(0) - exact).abs() <= SIGMAS * error).all()
    assert torch.equal(d.mode, PlackettLuce(logits, top).mode)
    assert torch.allclose(d.marginals()[0][:, :4], exact)


@pytest.mark.parametrize("top", [None, 2, 1])
def test_gradients_of_samples(top):
    logits = torch.randn(4, requires_grad=True)

    def draw(logits):
        pyro.set_rng_seed(5)
        return RelaxedPlackettLuce(logits, 0.7, top).rsample((2,))

    def score(logits):
        d = RelaxedPlackettLuce(logits, 0.7, top)
        return d.log_prob(draw(logits))

    assert gradcheck(draw, (logits,))
    assert gradcheck(score, (logits,), atol=1e-6)


def test_one_item():
    d = RelaxedPlackettLuce(torch.zeros(2, 1), 0.5)
    assert torch.equal(d.rsample((3,)), torch.ones(3, 2, 1, 1))
    assert not d.log_prob(d.rsample()).any()


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_off_the_surface_are_refused(dtype, temperature):
    """Doubly stochastic is not enough: the density would be of something else."""
    zeros = torch.zeros(5, 5, dtype=dtype)
    for top in (5, 3):
        d = RelaxedPlackettLuce(zeros[0], temperature, top)
        own = d.sample((100,))
        assert d.support.check(own).all()
        assert d.support.check(own.clone()).all()  # whose log is lost
        other = GumbelSinkhorn(zeros[:top], temperature).sample((100,))
        assert not d.support.check(other).any()
        with pytest.raises(ValueError, match="value"):
            d.log_prob(other)
    assert not soft_ranking.check(torch.ones(5)).any()
    assert not soft_ranking(3).check(torch.ones(5, 5)).any()


# In Pyro


TAU = 0.5  # of the model; the guide has another
Y = torch.tensor([2.0, 0.0, 1.0, 3.0], dtype=torch.float64)


def likelihood(P):
    mean = P @ torch.arange(4.0)
    return dist.Normal(mean, 0.5).to_event(1)


def model():
    P = pyro.sample("P", RelaxedPlackettLuce(torch.zeros(4), TAU))
    pyro.sample("y", likelihood(P), obs=Y)


def guide():
    logits = pyro.param("logits", torch.zeros(4))
    pyro.sample("P", RelaxedPlackettLuce(logits, 0.4))


def test_elbos_agree_and_bound_the_evidence():
    """One evidence from draws of the prior and of the guide: their densities agree."""
    losses = []
    for elbo in (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO):
        pyro.set_rng_seed(1)
        losses.append(elbo(num_particles=5).loss(model, guide))
    assert max(losses) - min(losses) < SAME
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(300):
        svi.step()
    p = RelaxedPlackettLuce(torch.zeros(4), TAU)
    q = RelaxedPlackettLuce(pyro.param("logits").detach(), 0.4)
    assert pp.to_indices(q.mode).tolist() == [2, 0, 1, 3]
    P = p.sample((20_000,))
    evidence = likelihood(P).log_prob(Y).exp()
    P = q.sample((5000,))
    log_weight = p.log_prob(P) + likelihood(P).log_prob(Y) - q.log_prob(P)
    weight = log_weight.exp()
    error = (evidence.var() / 20_000 + weight.var() / 5000).sqrt()
    assert (evidence.mean() - weight.mean()).abs() < SIGMAS * error
    assert error < 0.06 * evidence.mean()  # or the line above says nothing
    assert log_weight.mean() < evidence.mean().log()


def test_autoguide_nuts_and_reparam():
    for run in (model, pyro.poutine.reparam(model, {"P": TransformReparam()})):
        pyro.clear_param_store()
        auto = AutoNormal(run)
        elbo = Trace_ELBO(num_particles=20)
        before = elbo.loss(run, auto)
        svi = SVI(run, auto, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(100):
            svi.step()
        assert elbo.loss(run, auto) < before
        assert soft_ranking.check(auto()["P"] if "P" in auto() else run_of(run, auto))
    mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    P = mcmc.get_samples()["P"]
    assert pp.doubly_stochastic.check(P).all()


def run_of(run, auto):
    """P, where the guide has its base."""
    trace = pyro.poutine.trace(auto).get_trace()
    return (
        pyro.poutine.trace(pyro.poutine.replay(run, trace))
        .get_trace()
        .nodes["P"]["value"]
    )


def test_a_prior_that_is_alone_has_no_loss():
    """KL(q, q) is zero draw by draw, in plates of different temperatures."""
    temperature = torch.tensor([1.0, 0.2])

    def prior():
        with pyro.plate("judges", 2):
            pyro.sample("P", RelaxedPlackettLuce(torch.zeros(4), temperature, 2))

    assert abs(Trace_ELBO().loss(prior, prior)) < SAME


def test_a_gumbel_sinkhorn_prior_refuses_soft_rankings():
    """Their densities have n - 1 and (n - 1)^2 dimensions: a ratio means nothing."""

    def model():
        pyro.sample("P", GumbelSinkhorn(torch.zeros(4, 4), 0.5))

    def guide():
        pyro.sample("P", RelaxedPlackettLuce(torch.zeros(4), 0.5))

    for particles in (1, 3):
        elbo = Trace_ELBO(
            num_particles=particles, vectorize_particles=True, max_plate_nesting=0
        )
        with pytest.raises(ValueError, match="soft ranking of RelaxedPlackettLuce"):
            elbo.loss(model, guide)
