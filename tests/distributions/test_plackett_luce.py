# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Plackett-Luce rankings, as matrices and as indices, against enumeration."""

from __future__ import annotations

import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from distributions.contract import SIGMAS, DistributionContract
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import pyro_permutations as pp
from pyro_permutations import PlackettLuce, PlackettLuceIndices, UniformPermutation
from pyro_permutations.ranking_probability import rank_marginals

EXACT = 1e-12  # sums of positive terms by two routes
RARE = 1e-3  # a chi-square test with a fixed seed fails below this
SCALES = [0.0, 1.0, 5.0, 30.0]  # of logits; at the last most probabilities underflow


class Rankings(DistributionContract):
    """The contract for a vector of logits, which has no masks."""

    def params(self, batch, dtype):
        return {"logits": super().params(batch, dtype)["logits"][..., 0]}

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_bad_logits_are_named(self, bad: float) -> None:
        logits = self.params((2,), torch.float64)["logits"].clone()
        logits[1, 0] = bad
        with pytest.raises(ValueError, match="logits"):
            self.make((2,), logits=logits)

    def test_logits_of_a_wrong_shape_are_named(self) -> None:
        for shape in [(), (0,), (2, 0)]:
            with pytest.raises(ValueError, match=r"logits.*\(\*batch, n\)"):
                self.make(logits=torch.zeros(shape))
        with pytest.raises(ValueError, match="logits"):
            self.make(logits=torch.zeros(3, dtype=torch.long))

    @pytest.mark.parametrize("bad", [0, 4, 2.0, "all"])
    def test_bad_top_is_named(self, bad) -> None:
        with pytest.raises(ValueError, match=r"top must be an integer from 1 to 3"):
            self.make(top=bad)

    def test_bad_density_samples_are_named(self) -> None:
        """There are none here: densities are exact."""
        with pytest.raises(TypeError):
            self.make(density_samples=1)

    def test_bad_masks_are_named(self) -> None:
        with pytest.raises(TypeError):
            self.make(mask=torch.ones(3, 3, dtype=torch.bool))

    def test_infeasible_logits_are_named(self) -> None:
        logits = torch.full((2, 3), -torch.inf)
        logits[0] = 0.0
        with pytest.raises(ValueError, match=r"logits.*-inf"):
            self.make(logits=logits)

    def test_score_is_deterministic(self) -> None:
        d = self.make((2,))
        value, state = d.sample(), torch.get_rng_state()
        assert torch.equal(d.log_prob(value), d.log_prob(value))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("name", ["cdf", "icdf"])
    def test_other_methods_are_unknown_rather_than_wrong(self, name) -> None:
        d = self.make()
        with pytest.raises(NotImplementedError):
            getattr(d, name)(d.sample())

    def test_pickle(self) -> None:
        for changes in ({}, {"top": 2}):
            d = self.make((2,), **changes)
            value = d.rsample()
            copy = pickle.loads(pickle.dumps(d))
            assert torch.allclose(copy.log_prob(value), d.log_prob(value))
            pyro.set_rng_seed(3)
            expected = d.sample()
            pyro.set_rng_seed(3)
            assert torch.equal(copy.sample(), expected)


class Drawn(PlackettLuce):
    """With the name that the contract draws by."""

    def rsample(self, sample_shape=()):
        return self.sample(sample_shape)


class TestPlackettLuce(Rankings):
    cls = Drawn
    is_discrete = True

    def outside(self, inside):
        return (inside + 1) / 4

    def test_every_slice_has_its_own_noise(self) -> None:
        value = self.make((2,)).expand((3, 2)).sample((40,))
        perm = pp.to_indices(value).reshape(40, -1)
        assert len(torch.unique(perm, dim=1).mT) > 1
        assert len(torch.unique(perm[:, :3], dim=0)) > 3

    def test_gradients_reach_every_parameter(self) -> None:
        x = self.params((2,), torch.float64)["logits"].requires_grad_()
        value = self.make((2,)).sample((3,))
        for check in (gradcheck, gradgradcheck):
            assert check(lambda x: PlackettLuce(x).log_prob(value), (x,))
            assert check(lambda x: PlackettLuce(x).entropy(), (x,))
            assert check(lambda x: PlackettLuce(x, 2).mean, (x,))
        assert not PlackettLuce(x).sample().requires_grad
        assert not PlackettLuce(x).marginals()[0].requires_grad

    def test_score_parts(self) -> None:
        """A score function, as there is no path derivative."""
        d = self.make()
        assert not PlackettLuce.has_rsample
        parts = d.score_parts(d.sample())
        assert torch.equal(parts.score_function, parts.log_prob)
        assert parts.entropy_term == 0

    def test_vmap(self) -> None:
        logits = self.params((5,), torch.float64)["logits"]
        same = logits[:1].expand(5, -1)
        draw = torch.func.vmap(
            lambda x: PlackettLuce(x).sample((8,)), randomness="different"
        )
        assert len(torch.unique(pp.to_indices(draw(same)), dim=0)) == 5
        value = PlackettLuce(logits).sample()
        score = torch.func.vmap(lambda x, v: PlackettLuce(x).log_prob(v))
        assert torch.allclose(
            score(logits, value), PlackettLuce(logits).log_prob(value)
        )


# The law


def enumerated(logits: Tensor) -> tuple[Tensor, Tensor]:
    """All rankings and their log probabilities, one by one from the definition."""
    perms = torch.tensor(list(itertools.permutations(range(len(logits)))))
    return perms, torch.stack([by_definition(logits, perm) for perm in perms])


def by_definition(logits: Tensor, perm: Tensor) -> Tensor:
    """The first item is drawn from all, the next from those that are left, ..."""
    left, total = list(range(len(logits))), torch.zeros(())
    for item in perm.tolist():
        total = total + logits[item] - logits[left].logsumexp(0)
        left.remove(item)
    return total


def test_report_55():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    d, e = PlackettLuce(logits), PlackettLuceIndices(logits)
    perm = torch.arange(4)
    assert abs(float(e.log_prob(perm)) + 1.161057) < 5e-7  # as it was reported
    assert d.log_prob(pp.to_matrix(perm)) == e.log_prob(perm)
    for law in (d, e):
        values = law.enumerate_support()
        assert len(values) == 24
        assert abs(float(law.log_prob(values).exp().sum()) - 1) < EXACT
    # Batched, and with lists of different lengths.
    short = torch.tensor([2.0, 1.0, 0.0, -torch.inf])
    both = PlackettLuceIndices(torch.stack([logits, short]))
    value = torch.tensor([[0, 1, 2, 3], [0, 1, 2, -1]])
    alone = PlackettLuceIndices(short[:3]).log_prob(perm[:3])
    expected = torch.stack([e.log_prob(perm), alone])
    assert torch.allclose(both.log_prob(value), expected)
    # A relaxed sample, with a gradient.
    logits.requires_grad_()
    P = pp.RelaxedPlackettLuce(logits, 0.5).rsample()
    (gradient,) = torch.autograd.grad((P @ torch.arange(4.0)).square().sum(), logits)
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("scale", SCALES)
def test_log_prob_is_that_of_the_definition(scale):
    logits = scale * torch.randn(5)
    perms, expected = enumerated(logits)
    d, e = PlackettLuce(logits), PlackettLuceIndices(logits)
    assert torch.allclose(e.log_prob(perms), expected, rtol=EXACT, atol=EXACT)
    assert torch.equal(d.log_prob(pp.to_matrix(perms)), e.log_prob(perms))
    assert abs(float(expected.exp().sum()) - 1) < EXACT
    # Shifts of the logits change nothing, and the best ranking is the mode.
    assert torch.allclose(PlackettLuceIndices(logits + 7).log_prob(perms), expected)
    assert e.log_prob(e.mode) == e.log_prob(perms).max()
    assert torch.equal(pp.to_indices(d.mode), e.mode)
    # Moments.
    P, weight = pp.to_matrix(perms), expected.exp()
    mean = (weight[:, None, None] * P).sum(0)
    assert (d.mean - mean).abs().max() < EXACT
    assert torch.allclose(d.variance, mean * (1 - mean), atol=EXACT)
    for law in (d, e):
        found, error = law.marginals()
        assert (found[:, :5] - mean).abs().max() < EXACT
        assert not found[:, 5].any()
        assert not error.any()
        entropy = -(weight * expected).sum()
        assert torch.allclose(law.entropy(), entropy, atol=EXACT)


@pytest.mark.parametrize("top", [1, 2, 4, 5])
def test_partial_rankings_sum_over_their_completions(top):
    logits = 2 * torch.randn(5)
    perms, log_p = enumerated(logits)
    d, e = PlackettLuce(logits, top), PlackettLuceIndices(logits, top)
    values = e.enumerate_support()
    begins = (perms[:, None, :top] == values).all(-1).double()
    expected = (log_p.exp()[:, None] * begins).sum(0)
    assert len(values) == math.perm(5, top)
    assert torch.allclose(e.log_prob(values).exp(), expected, rtol=EXACT)
    P = d.enumerate_support()
    assert torch.equal(P, pp.to_matrix(values, columns=5))
    assert torch.equal(d.log_prob(P), e.log_prob(values))
    assert (d.mean - (expected[:, None, None] * P).sum(0)).abs().max() < EXACT
    assert torch.allclose(d.mean, PlackettLuce(logits).mean[:top])
    assert torch.equal(e.mode, values[expected.argmax()])
    entropy = -(expected * expected.log()).sum()
    assert torch.allclose(d.entropy(), entropy, rtol=EXACT)
    assert torch.allclose(e.entropy(), entropy, rtol=EXACT)


def test_lists_of_different_lengths():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.1], [0.3, -torch.inf, 2.0, -torch.inf]])
    long, short = PlackettLuceIndices(logits[0], 3), PlackettLuceIndices(logits[1], 3)
    both, matrices = PlackettLuceIndices(logits, 3), PlackettLuce(logits, 3)
    assert both.mode.tolist() == [[2, 0, 3], [2, 0, -1]]
    draws = both.sample((200,))
    assert (draws[:, 1, 2] == -1).all()
    assert set(draws[:, 1, :2].flatten().tolist()) == {0, 2}
    assert both.support.check(draws).all()
    each = torch.stack([long.log_prob(draws[:, 0]), short.log_prob(draws[:, 1])], -1)
    assert torch.equal(both.log_prob(draws), each)
    P = pp.to_matrix(draws, columns=4)
    assert matrices.support.check(P).all()
    assert torch.equal(matrices.log_prob(P), each)
    # The short list is that of its two items.
    assert torch.equal(
        short.enumerate_support(), torch.tensor([[0, 2, -1], [2, 0, -1]])
    )
    p = torch.tensor([0.3, 2.0]).softmax(0)
    assert torch.allclose(short.log_prob(short.enumerate_support()).exp(), p)
    found, error = matrices.marginals()
    assert torch.allclose(found.sum(-1), torch.ones(2, 3))
    assert torch.allclose(found[1, 0, :4], torch.tensor([p[0], 0.0, p[1], 0.0]))
    assert torch.equal(found[..., 4], torch.tensor([[0.0, 0, 0], [0, 0, 1]]))
    assert not error.any()
    with pytest.raises(NotImplementedError, match="different items"):
        both.enumerate_support()
    # An absent item, a gap, and an empty rank that is not: no rankings of these.
    for bad in ([0, 1, -1], [0, -1, 2], [2, -1, -1], [0, 2, 0]):
        with pytest.raises(ValueError, match="PlackettLuceIndices"):
            short.log_prob(torch.tensor(bad))
        wrong = (torch.tensor(bad)[:, None] == torch.arange(4)).double()
        with pytest.raises(ValueError, match="PlackettLuce"):
            PlackettLuce(logits[1], 3).log_prob(wrong)
    # No NaN where nobody is left.
    logits.requires_grad_()
    score = PlackettLuceIndices(logits, 3).log_prob(draws).sum()
    (gradient,) = torch.autograd.grad(score, logits)
    assert gradient.isfinite().all()
    assert not gradient[1, [1, 3]].any()


@pytest.mark.parametrize("top", [2, 4])
def test_samples_follow_the_law(top):
    """Also of expanded batches: a chi-square test in each element."""
    logits = torch.tensor([[0.5, -0.5, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    e = PlackettLuceIndices(logits, top).expand((2, 2))
    values = e.enumerate_support(expand=False)[:, 0, 0]
    draws = e.sample((5000,))
    observed = (draws[None] == values[:, None, None, None]).all(-1).sum(1)
    expected = 5000 * e.log_prob(values[:, None, None]).exp()
    for k, j in itertools.product(range(2), range(2)):
        cells = observed[:, k, j].numpy(), expected[:, k, j].numpy()
        assert scipy.stats.chisquare(*cells).pvalue > RARE


def test_marginals_of_many_items():
    """By quadrature up to 64: against itself with a finer step, and the sums."""
    for scale in SCALES:
        logits = scale * torch.randn(64)
        found = rank_marginals(logits, 64)
        assert (found.sum(-1) - 1).abs().max() < EXACT
        assert (found.sum(-2) - 1).abs().max() < EXACT
    first = logits.softmax(0)
    assert (found[0] - first).abs().max() < EXACT
    equal = rank_marginals(torch.zeros(3, 40), 5)
    assert (equal - 1 / 40).abs().max() < EXACT
    # Frequencies beyond, with errors that cover what they miss.
    logits = torch.randn(65)
    found, error = PlackettLuce(logits, 3).marginals(2000)
    exact = rank_marginals(logits, 3)
    assert ((found[:, :65] - exact).abs() <= SIGMAS * error[:, :65] + 1e-3).all()
    with pytest.raises(NotImplementedError, match=r"64 items.*d\.marginals"):
        _ = PlackettLuce(logits).mean


def test_marginals_under_a_finer_step(monkeypatch):
    logits = 3 * torch.randn(24)
    found = rank_marginals(logits, 24)
    monkeypatch.setattr("pyro_permutations.ranking_probability._STEP", 1 / 32)
    assert (found - rank_marginals(logits, 24)).abs().max() < EXACT


def test_too_many_rankings_are_refused():
    for cls in (PlackettLuce, PlackettLuceIndices):
        assert cls(torch.zeros(8)).has_enumerate_support
        d = cls(torch.zeros(9))
        assert not d.has_enumerate_support
        for method in (d.enumerate_support, d.entropy):
            with pytest.raises(NotImplementedError, match="40320 rankings"):
                method()
        assert cls(torch.zeros(100), 2).enumerate_support().shape[0] == 9900
    with pytest.raises(NotImplementedError, match="marginals"):
        _ = PlackettLuceIndices(torch.zeros(3)).mean


def test_thousands_of_items_as_indices():
    """No table of items by ranks: it would have a hundred million entries here."""
    logits = torch.randn(10_000, requires_grad=True)
    d = PlackettLuceIndices(logits)
    value = d.sample()
    score = d.log_prob(value)
    (gradient,) = torch.autograd.grad(score, logits)
    ranked = logits.detach()[value]
    left = ranked.flip(0).logcumsumexp(0).flip(0)
    assert torch.allclose(score, (ranked - left).sum(), rtol=EXACT)
    # Each logit counts once, less the chances that it had.
    chance = torch.zeros(10_000)
    chance[value] = (ranked + (-left).logcumsumexp(0)).exp()
    assert torch.allclose(gradient, 1 - chance, rtol=1e-8, atol=1e-8)


def test_values_that_are_no_rankings_are_refused_always():
    relaxed = pp.GumbelSinkhorn(torch.zeros(3, 3), 0.1).sample()
    for flag in (True, False):
        d = PlackettLuce(torch.zeros(3), validate_args=flag)
        for bad in (relaxed, torch.ones(3, 3) / 3, torch.zeros(3, 3)):
            with pytest.raises(ValueError, match="RelaxedPlackettLuce in the guide"):
                d.log_prob(bad)
        e = PlackettLuceIndices(torch.zeros(3), validate_args=flag)
        for bad in ([0, 0, 1], [0, 1, 3], [0, 1, -1], [-1, 0, 1], [0.0, 1.0, 1.5]):
            with pytest.raises(ValueError, match="distinct items"):
                e.log_prob(torch.tensor(bad))
        assert e.log_prob(torch.tensor([0.0, 2.0, 1.0])) == -math.log(6)
        for shape in [(2,), (4,), ()]:
            with pytest.raises(ValueError, match="shape"):
                e.log_prob(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_low_precision(dtype):
    """Scores are computed in float64 and rounded once."""
    logits = torch.randn(6).to(dtype)
    e = PlackettLuceIndices(logits)
    value = e.sample((100,))
    exact = PlackettLuceIndices(logits.double()).log_prob(value)
    assert e.log_prob(value).dtype == dtype
    assert torch.equal(e.log_prob(value), exact.to(dtype))
    assert PlackettLuce(logits).sample().dtype == dtype


@pytest.mark.parametrize("spread", [1e3, 1e30, 1e300])
def test_no_nan_for_finite_logits(spread):
    logits = torch.tensor([spread, 0.0, -spread], requires_grad=True)
    e = PlackettLuceIndices(logits)
    score = e.log_prob(e.enumerate_support())
    assert score[0] == 0
    assert score.isfinite().all()
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    assert gradient.isfinite().all()
    assert (PlackettLuce(logits.detach()).mean - torch.eye(3)).abs().max() < EXACT
    assert e.entropy() == 0


# Index form


def test_indices_in_shapes_of_all_kinds():
    logits = torch.randn(3, 2, 4)
    d, e = PlackettLuce(logits, 2), PlackettLuceIndices(logits, 2)
    assert (d.event_shape, e.event_shape) == ((2, 4), (2,))
    assert e.infer_shapes((3, 2, 4), 2) == (e.batch_shape, e.event_shape)
    assert e.infer_shapes((4,)) == ((), (4,))
    assert (e.support.event_dim, e.support.is_discrete) == (1, True)
    for expanded in (e.expand((5, 3, 2)), e.expand_by((5,))):
        assert type(expanded) is PlackettLuceIndices
        value = expanded.sample((7,))
        assert value.shape == (7, 5, 3, 2, 2)
        assert expanded.log_prob(value).shape == (7, 5, 3, 2)
        P = pp.to_matrix(value, columns=4)
        assert torch.equal(d.expand((5, 3, 2)).log_prob(P), expanded.log_prob(value))
    total = e.to_event(1).log_prob(value)
    assert torch.allclose(total, e.log_prob(value).sum(-1))
    assert not e.mask(False).log_prob(value).any()
    assert e.expand((3, 2)).sample().dtype == torch.long
    copy = pickle.loads(pickle.dumps(e))
    assert torch.equal(copy.log_prob(value), e.log_prob(value))
    assert e.enumerate_support(expand=False).shape == (12, 1, 1, 2)
    assert e.enumerate_support().shape == (12, 3, 2, 2)
    assert d.enumerate_support().shape == (12, 3, 2, 2, 4)
    assert PlackettLuce(torch.zeros(0, 3)).enumerate_support().shape == (6, 0, 3, 3)


# In Pyro


def noisy_order(P: Tensor) -> Tensor:
    """A log likelihood of rankings that is not linear in P."""
    return -(P @ torch.arange(3.0) - torch.tensor([1.0, 2.0, 0.3])).abs().sum(-1)


def evidence(prior) -> tuple[Tensor, Tensor]:
    values = PlackettLuce(torch.zeros(3)).enumerate_support()
    joint = prior.log_prob(values) + noisy_order(values)
    return joint.logsumexp(0), joint.softmax(0)


@pytest.mark.parametrize("uniform", [True, False])
def test_elbos_and_their_gradients_against_enumeration(uniform):
    """Score-function and enumerated ELBO, value and gradient, of one guide."""
    known = PlackettLuce(torch.tensor([1.0, 0.0, 0.5]))
    prior = UniformPermutation(3) if uniform else known

    def model():
        P = pyro.sample("P", prior)
        pyro.factor("data", noisy_order(P))

    def guide(infer=None):
        logits = pyro.param("logits", torch.tensor([0.5, 0.0, -0.5]))
        pyro.sample("P", PlackettLuce(logits), infer=infer)

    def enumerated_guide():
        guide({"enumerate": "parallel"})

    logits = torch.tensor([0.5, 0.0, -0.5], requires_grad=True)
    q = PlackettLuce(logits)
    values = q.enumerate_support()
    log_q = q.log_prob(values)
    log_p = prior.log_prob(values) + noisy_order(values)
    loss = (log_q.exp() * (log_q - log_p)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)

    found = TraceEnum_ELBO(max_plate_nesting=0).loss_and_grads(model, enumerated_guide)
    assert abs(found - loss) < EXACT
    parameter = pyro.param("logits")
    assert torch.allclose(parameter.grad, gradient, rtol=1e-9)

    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True)
    losses, gradients = [], []
    for _ in range(40):
        parameter.grad = None
        losses.append(torch.tensor(elbo.loss_and_grads(model, guide)))
        gradients.append(parameter.grad)
    for draws, exact in ((losses, loss), (gradients, gradient)):
        draws = torch.stack(draws)
        error = draws.std(0) / 40**0.5
        assert ((draws.mean(0) - exact).abs() <= SIGMAS * error).all()


def test_svi_finds_the_best_plackett_luce():
    """Down to the least loss that an optimiser finds on the enumerated one."""
    prior = PlackettLuce(torch.zeros(3))

    def model():
        P = pyro.sample("P", prior)
        pyro.factor("data", noisy_order(P))

    def guide():
        logits = pyro.param("logits", torch.zeros(3))
        pyro.sample("P", PlackettLuce(logits))

    log_evidence, posterior = evidence(prior)
    values = prior.enumerate_support()

    def gap(logits: Tensor) -> Tensor:
        log_q = PlackettLuce(logits).log_prob(values)
        return (log_q.exp() * (log_q - posterior.log())).sum()

    best = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([best], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = gap(best)
        loss.backward()
        return loss

    optimizer.step(closure)
    elbo = Trace_ELBO(num_particles=300, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(200):
        svi.step()
    found = pyro.param("logits").detach()
    # .002 nats is the jitter of Adam at this rate; the start is off by half a nat.
    assert gap(torch.zeros(3)) - gap(best) > 0.3
    assert 0 <= gap(found) - gap(best) + EXACT < 0.02
    assert log_evidence - gap(found) <= log_evidence


def test_rankings_are_data_in_a_plate():
    """The worth of items from observed partial rankings, by maximum likelihood."""
    truth = torch.tensor([1.5, 0.5, 0.0, -2.0])
    data = PlackettLuceIndices(truth, 2).sample((2000,))

    def model(data=None):
        logits = pyro.param("worth", torch.zeros(4))
        with pyro.plate("voters", 2000):
            return pyro.sample("top two", PlackettLuceIndices(logits, 2), obs=data)

    svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(200):
        svi.step(data)
    worth = pyro.param("worth").detach()
    logits = worth.clone().requires_grad_()
    score = PlackettLuceIndices(logits, 2).log_prob(data)
    information = torch.autograd.functional.hessian(
        lambda x: -PlackettLuceIndices(x, 2).log_prob(data).sum(), worth
    )
    (slope,) = torch.autograd.grad(score.sum(), logits)
    assert slope.abs().max() < 1  # converged: standard errors are about .05
    spread = torch.linalg.pinv(information, hermitian=True).diagonal().sqrt()
    off = (worth - worth.mean()) - (truth - truth.mean())
    assert (off.abs() <= SIGMAS * spread).all()
    draws = Predictive(model, num_samples=3)()["top two"]
    assert draws.shape == (3, 2000, 2)


def test_plates_and_enumeration_of_a_model_site():
    """A latent ranking in a plate, summed out exactly."""
    logits = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.3, -0.5]])

    def model():
        with pyro.plate("judges", 2):
            P = pyro.sample("P", PlackettLuce(logits), infer={"enumerate": "parallel"})
            pyro.factor("data", noisy_order(P))

    expected = sum(evidence(PlackettLuce(x))[0] for x in logits)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    assert abs(loss + expected) < EXACT


def test_autoguides_say_that_it_is_discrete():
    def model():
        pyro.sample("P", PlackettLuce(torch.zeros(3)))

    with pytest.raises(ValueError, match="permutation matrices are discrete"):
        AutoNormal(model)()


def test_as_a_posterior():
    """It is read like the other distributions over permutations."""
    d = PlackettLuce(torch.tensor([1.0, 0.0, -1.0]))
    found, error = pp.posterior_of(d).marginals()
    assert torch.allclose(found[:, :3], d.mean)
    assert not error.any()

    def model():
        P = pyro.sample("P", d)
        pyro.sample(
            "y", dist.Normal(P @ torch.arange(3.0), 1.0).to_event(1), obs=torch.ones(3)
        )

    posterior = pp.posterior_by_enumeration(model, "P")
    values = d.enumerate_support()
    likelihood = dist.Normal(values @ torch.arange(3.0), 1.0).to_event(1)
    weight = (d.log_prob(values) + likelihood.log_prob(torch.ones(3))).softmax(0)
    expected = (weight[:, None, None] * values).sum(0)
    assert torch.allclose(posterior.marginals()[0][:, :3], expected)
