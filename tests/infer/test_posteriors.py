# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors from guides, MCMC and enumeration, against laws listed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import permutations
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.ops.streaming import StatsOfDict
from torch import Tensor

from pyro_permutations import (
    GibbsMatching,
    GumbelSinkhorn,
    InformedSwaps,
    MatchingDraws,
    MatchingPosterior,
    UniformPermutation,
    posterior_by_enumeration,
    posterior_from_guide,
    posterior_from_mcmc,
    posterior_of,
    to_indices,
)

SIGMAS = 4  # standard errors that count as chance
ROUNDING = 1e-10  # of log joint densities of up to a few hundred nats in float64


def noisy_points(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(n, 2)
    return x, x[torch.randperm(n)] + 0.5 * torch.randn(n, 2)


def matching_model(x: Tensor, y: Tensor) -> None:
    P = pyro.sample("P", UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P @ x, 0.5).to_event(2), obs=y)


def law(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All matchings, and their posterior probabilities, without Pyro."""
    P = permutations(len(x))
    score = -(y - P @ x).square().sum((-2, -1)) / (2 * 0.5**2)
    return P, score.softmax(0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_enumeration_is_bayes_rule(n: int) -> None:
    x, y = noisy_points(n)
    P, weights = law(x, y)
    posterior = posterior_by_enumeration(matching_model, "P", x, y)
    probability, error = posterior.marginals()
    expected = (weights[:, None, None] * P).sum(0)
    torch.testing.assert_close(probability[:, :-1], expected, atol=ROUNDING, rtol=0)
    assert (error == 0).all()
    torch.testing.assert_close(posterior.mode, to_indices(P[weights.argmax()]))


def test_a_model_for_one_matching_at_a_time_is_enumerated_too() -> None:
    x, y = noisy_points(4)

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(4))
        assert P.shape == (4, 4)
        pyro.sample("y", dist.Normal(P @ x, 0.5).to_event(2), obs=y)

    expected = posterior_by_enumeration(matching_model, "P", x, y).marginals()[0]
    probability = posterior_by_enumeration(model, "P").marginals()[0]
    torch.testing.assert_close(probability, expected, atol=ROUNDING, rtol=0)


def test_a_model_that_mixes_up_the_matchings_is_run_one_by_one() -> None:
    # Its density sums over whatever is to the left: right for one matching alone.
    scores = torch.randn(3, 3)

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(3))
        pyro.factor("score", (P * scores).sum())

    P = permutations(3)
    expected = ((P * scores).sum((-2, -1)).softmax(0)[:, None, None] * P).sum(0)
    probability = posterior_by_enumeration(model, "P").marginals()[0][:, :-1]
    torch.testing.assert_close(probability, expected, atol=ROUNDING, rtol=0)


def test_a_plate_has_a_posterior_for_each_element_and_its_mask() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[1, 0, 1:] = mask[1, 1:, 0] = False  # a known pair

    def model() -> None:
        with pyro.plate("problems", 3):
            P = pyro.sample("P", UniformPermutation(4, mask=mask))
            pyro.sample("y", dist.Normal(P @ x, 0.5).to_event(2), obs=y)

    posterior = posterior_by_enumeration(model, "P")
    assert posterior.batch_shape == (3,)
    for k in range(3):
        P, weights = law(x[k], y[k])
        weights = weights * (P * ~mask[k]).sum((-2, -1)).eq(0)
        weights = weights / weights.sum()
        expected = (weights[:, None, None] * P).sum(0)
        probability = posterior[k].marginals()[0][:, :-1]
        torch.testing.assert_close(probability, expected, atol=ROUNDING, rtol=0)
    assert posterior[1].marginals()[0][0, 0] == 1


def test_what_cannot_be_enumerated_says_why() -> None:
    x, y = noisy_points(3)

    def latent() -> None:
        pyro.sample("scale", dist.Exponential(1.0))
        matching_model(x, y)

    def relaxed() -> None:
        pyro.sample("P", GumbelSinkhorn(torch.zeros(3, 3), 0.5))

    def tied() -> None:
        with pyro.plate("two", 2):
            P = pyro.sample("P", UniformPermutation(3))
        pyro.factor("tie", (P[0] * P[1]).sum())

    def long() -> None:
        pyro.sample("P", UniformPermutation(9))

    with pytest.raises(ValueError, match=r"\['scale'\] are latent: pyro.condition"):
        posterior_by_enumeration(latent, "P")
    with pytest.raises(ValueError, match=r"discrete prior .* got GumbelSinkhorn"):
        posterior_by_enumeration(relaxed, "P")
    with pytest.raises(ValueError, match="outside of"):
        posterior_by_enumeration(tied, "P")
    with pytest.raises(ValueError, match="at most 8 items"):
        posterior_by_enumeration(long, "P")
    with pytest.raises(ValueError, match="no site 'Q'"):
        posterior_by_enumeration(latent, "Q")


def test_a_gibbs_law_of_few_items_is_exact() -> None:
    scores = torch.randn(4, 4)
    d = GibbsMatching(scores)
    posterior = posterior_of(d)
    assert posterior.exact
    torch.testing.assert_close(posterior.marginals()[0], d.marginals()[0])
    value, _ = posterior.entropy()
    torch.testing.assert_close(value, d.entropy())


def test_draws_of_a_relaxed_law_are_its_hard_draws() -> None:
    # Of two items the hard draw is the identity with the probability that a difference
    # of sums of two Gumbels, a logistic plus a logistic, exceeds minus the contrast;
    # the temperature has no say. At 0 that is a half, and here .8185 by quadrature.
    odds = 3.0
    t = torch.linspace(-60, 60, 2_000_001)
    density = torch.exp(-torch.nn.functional.softplus(t) * 2 + t)  # logistic
    expected = torch.trapezoid(density * torch.sigmoid(odds - t), t)
    logits = torch.tensor([[odds, 0.0], [0.0, 0.0]])
    draws = 20_000
    for temperature in (0.1, 2.0):
        posterior = posterior_of(GumbelSinkhorn(logits, temperature), draws)
        probability, error = posterior.marginals()
        assert (probability[0, 0] - expected).abs() < SIGMAS * error[0, 0]
        plain = (expected * (1 - expected) / draws).sqrt()
        torch.testing.assert_close(error[0, 0], plain, rtol=0.05, atol=0)


def test_a_guide_is_read_as_its_distribution() -> None:
    logits = torch.randn(5, 5)

    def guide(shift: float) -> None:
        parameter = pyro.param("logits", logits)
        pyro.sample("P", GumbelSinkhorn(parameter + shift, 0.5))

    torch.manual_seed(0)
    expected = posterior_of(GumbelSinkhorn(logits, 0.5), 4000).marginals()
    found = posterior_from_guide(guide, "P", 0.0, num_samples=4000).marginals()
    spread = (expected[1] ** 2 + found[1] ** 2).sqrt()
    assert ((expected[0] - found[0]).abs() < SIGMAS * spread + 1e-12).all()
    with pytest.raises(ValueError, match="the guide has no site 'Q'"):
        posterior_from_guide(guide, "Q", 0.0)


def test_a_guide_whose_logits_are_random_is_run_for_every_draw() -> None:
    def guide() -> None:
        sign = pyro.sample("sign", dist.Bernoulli(0.5)) * 2 - 1
        pyro.sample("P", GumbelSinkhorn(20 * sign * torch.eye(2), 0.5))

    posterior = posterior_from_guide(guide, "P", num_samples=400)
    probability, error = posterior.marginals()
    assert (probability[0, 0] - 0.5).abs() < SIGMAS * error[0, 0]


def read(guide: Callable[[], Any], draws: int) -> tuple[MatchingPosterior, int]:
    """The posterior of P, and how often the guide was run for it."""
    runs = []

    def counted() -> None:
        runs.append(1)
        guide()

    return posterior_from_guide(counted, "P", num_samples=draws), len(runs)


def test_a_guide_with_other_sites_is_run_for_all_draws_at_once() -> None:
    # Hard draws of two items given the contrast, by quadrature, in the mean over it.
    def guide() -> None:
        low = pyro.sample("low", dist.Bernoulli(0.3))
        shift = pyro.sample("shift", dist.Normal(2 - 5 * low, 0.1))
        logits = shift[..., None, None] * torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        pyro.sample("P", GumbelSinkhorn(logits, 0.5))

    t, shifts = torch.linspace(-60, 60, 200_001), torch.tensor([2.0, -3.0])
    noise = torch.linspace(-0.6, 0.6, 41)[:, None]
    weight = dist.Normal(0.0, 0.1).log_prob(noise).softmax(0)
    logistic = torch.exp(-torch.nn.functional.softplus(t) * 2 + t)
    contrast = (shifts + noise)[..., None]
    hit = torch.trapezoid(logistic * torch.sigmoid(contrast - t), t)
    expected = ((weight * hit).sum(0) * torch.tensor([0.7, 0.3])).sum()
    posterior, runs = read(guide, 20_000)
    assert runs < 20  # one to look, and five each for few draws and for all
    probability, error = posterior.marginals()
    assert (probability[0, 0] - expected).abs() < SIGMAS * error[0, 0]
    assert error[0, 0] < 0.005


def test_draws_at_once_are_those_of_plates_masks_and_autoguides() -> None:
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[0, 0, 1:] = mask[0, 1:, 0] = False
    rest = AutoNormal(lambda: pyro.sample("rest", dist.LogNormal(0.0, 1.0)))

    def guide() -> None:
        rest()
        sign = pyro.sample("sign", dist.Bernoulli(0.5)) * 2 - 1
        with pyro.plate("worms", 3):
            turn = pyro.sample("turn", dist.Categorical(torch.tensor([0.25, 0.75])))
            sure = torch.stack([torch.eye(4), torch.eye(4)[[0, 2, 3, 1]]])[turn]
            logits = 60 * (1 + 0.1 * sign)[..., None, None] * sure
            pyro.sample("P", GumbelSinkhorn(logits, 0.5, mask=mask))

    posterior, runs = read(guide, 4000)
    assert runs < 20  # one to look, and five each for few draws and for all
    assert posterior.perm.shape == (4000, 3, 4)
    probability, error = posterior.marginals()
    assert probability[0, 0, 0] == 1
    for row, column, expected in ((1, 1, 0.25), (1, 2, 0.75), (2, 3, 0.75)):
        off = (probability[:, row, column] - expected).abs()
        assert (off < SIGMAS * error[:, row, column]).all()
    # Worms turn on their own.
    both = (posterior.perm[:, :2, 1] == 1).all(1).double().mean()
    assert (both - 1 / 16).abs() < SIGMAS * (15 / 256 / 4000) ** 0.5


def by_one_plain_sign() -> None:
    sign = pyro.sample("sign", dist.Bernoulli(0.5)) * 2 - 1
    pyro.sample("P", GumbelSinkhorn(40 * sign * torch.eye(2), 0.5))


def by_a_mean() -> None:
    sign = pyro.sample("sign", dist.Bernoulli(0.5)) * 2 - 1
    middle = pyro.sample("middle", dist.Normal(sign.mean(), 1e-3))
    pyro.sample("P", GumbelSinkhorn(40 * middle[..., None, None] * torch.eye(2), 0.5))


def by_its_own_noise() -> None:
    pyro.sample("other", dist.Normal(0.0, 1.0))
    sign = torch.rand(()).sub(0.5).sign()
    pyro.sample("P", GumbelSinkhorn(40 * sign * torch.eye(2), 0.5))


def by_a_choice() -> None:
    sign = 1.0 if pyro.sample("sign", dist.Bernoulli(0.5)) else -1.0
    pyro.sample("P", GumbelSinkhorn(40 * sign * torch.eye(2), 0.5))


def by_a_mean_mask() -> None:
    first = pyro.sample("sign", dist.Bernoulli(0.5)).mean() > 0.5
    mask = torch.stack([torch.ones(2, 2) - torch.eye(2), torch.eye(2)])[int(first)] > 0
    pyro.sample("P", GumbelSinkhorn(torch.zeros(2, 2), 0.5, mask=mask))


@pytest.mark.parametrize(
    "guide",
    [by_one_plain_sign, by_a_mean, by_its_own_noise, by_a_choice, by_a_mean_mask],
)
@pytest.mark.parametrize("draws", [2, 400])
def test_a_guide_that_is_another_one_at_once_is_run_for_every_draw(
    guide: Callable[[], None], draws: int
) -> None:
    posterior, runs = read(guide, draws)
    probability, error = posterior.marginals()
    assert (probability[0, 0] - 0.5).abs() < SIGMAS * error[0, 0]
    assert draws == 2 or runs > draws


def test_a_guide_that_broadcasts_is_found_out_by_few_draws() -> None:
    """Many draws of one site against many of another would take their square."""
    largest = 0

    def guide() -> None:
        nonlocal largest
        skill = pyro.sample("skill", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("worms", 2):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            logits = scale[..., None, None] * torch.eye(3) + skill[..., None, :, None]
            largest = max(largest, logits.numel())
            pyro.sample("P", GumbelSinkhorn(logits, 0.5))

    posterior = posterior_from_guide(guide, "P", num_samples=50)
    assert posterior.perm.shape == (50, 2, 3)
    assert largest <= 4 * 4 * 2 * 9


@pytest.mark.parametrize("streaming", [False, True])
def test_chains_are_within_their_errors_of_the_truth(streaming: bool) -> None:
    x, y = noisy_points(4, seed=3)
    pyro.set_rng_seed(0)
    kernel, chains, samples = InformedSwaps(matching_model), 2, 1000
    if streaming:
        statistics = StatsOfDict({(c, "P"): MatchingDraws for c in range(chains)})
        mcmc = StreamingMCMC(
            kernel,
            num_samples=samples,
            warmup_steps=100,
            num_chains=chains,
            statistics=statistics,
            disable_progbar=True,
        )
    else:
        mcmc = MCMC(
            kernel, samples, warmup_steps=100, num_chains=1, disable_progbar=True
        )
    mcmc.run(x, y)
    posterior = posterior_from_mcmc(mcmc, "P")
    assert posterior.perm.shape == ((chains if streaming else 1) * samples, 4)
    probability, error = posterior.marginals()
    expected = posterior_by_enumeration(matching_model, "P", x, y).marginals()[0]
    assert ((probability - expected).abs() < SIGMAS * error + 1e-12).all()
    with pytest.raises(ValueError, match="'Q'"):
        posterior_from_mcmc(mcmc, "Q")


def beside_a_shift() -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    P = pyro.sample("P", UniformPermutation(3))
    mean = P @ torch.arange(3.0) + shift[..., None]
    pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=torch.arange(3.0))


def streamed(statistics: StatsOfDict, chains: int = 2) -> StreamingMCMC:
    return StreamingMCMC(
        InformedSwaps(beside_a_shift, replicas=1),
        num_samples=4,
        warmup_steps=1,
        num_chains=chains,
        statistics=statistics,
        disable_progbar=True,
    )


def test_an_instance_is_a_statistic_as_well_as_the_class() -> None:
    # One for every key: draws of one chain are not those of another.
    instances = StatsOfDict({(c, "P"): MatchingDraws() for c in range(2)})
    mcmc = streamed(instances)
    mcmc.run()
    posterior = posterior_from_mcmc(mcmc, "P")
    assert (posterior.chains, len(posterior.perm)) == (2, 8)
    default = StatsOfDict(default=MatchingDraws())
    default.update({"P": torch.eye(3), "Q": torch.eye(3).flip(0)})
    default.update({"P": torch.eye(3)})
    kept = default.get()
    assert [kept[name]["perm"].shape for name in "PQ"] == [(1, 2, 3), (1, 1, 3)]


def test_statistics_that_are_not_of_the_site_say_what_is_needed() -> None:
    mcmc = streamed(StatsOfDict(default=MatchingDraws))
    with pytest.raises(ValueError, match=r"for a permutation site.* shape \(\)"):
        mcmc.run()
    for types in ({"P": MatchingDraws}, {(0, "P"): MatchingDraws}, {}):
        mcmc = streamed(StatsOfDict(types))
        for _ in range(2):  # before and after the run
            with pytest.raises(ValueError, match=r"needs MatchingDraws .* range\(2\)"):
                posterior_from_mcmc(mcmc, "P")
            mcmc.run()
    more = {(c, "P"): MatchingDraws for c in range(3)}  # than there are chains
    mcmc = streamed(StatsOfDict(more))
    mcmc.run()
    assert posterior_from_mcmc(mcmc, "P").chains == 2
    merged = mcmc.get_statistics(group_by_chain=False)["P"]
    assert merged["perm"].shape == (2, 4, 3)


def test_known_pairs_are_certain_in_every_draw() -> None:
    # Report 75: three of fifteen identities are given.
    mask = torch.ones(15, 15, dtype=torch.bool)
    for k in (2, 7, 11):
        mask[k], mask[:, k] = False, False
        mask[k, k] = True
    d = GumbelSinkhorn(torch.randn(15, 15), 0.5, mask=mask)
    probability, error = posterior_of(d, 300).marginals()
    assert all(probability[k, k] == 1 for k in (2, 7, 11))
    # Both of the mask, so without an error; what the draws alone say has one.
    assert ((error == 0) == (d.marginals(300)[1] == 0)).all()
    assert (error[[2, 7, 11]] == 0).all()
    assert (error[0, [0, 1]] > 0).all()


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_what_a_mask_decides_has_no_error_in_partial_matchings(
    batch: tuple[int, ...],
) -> None:
    # Row 0 has to be matched, and has one column; column 1 is alone with row 1.
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    unmatched = (torch.tensor([-torch.inf, 0.0, 0.0]), 0.0)
    logits = torch.zeros(*batch, 3, 3)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1, [1, 3]] = expected[2, [2, 3]] = True
    posterior = posterior_of(
        GumbelSinkhorn(logits, 0.5, mask=mask, unmatched=unmatched)
    )
    if batch:
        error = posterior.marginals()[1]
        assert torch.equal(error > 0, expected.expand(2, 3, 3, 4))
        posterior = posterior[0, 1]
    probability, error = posterior.marginals()
    assert torch.equal(error > 0, expected)
    assert (probability[0, 0], probability[1, 0]) == (1, 0)
    assert [c.error for c in posterior.candidates()[0]] == [0]


def test_each_item_has_a_ranked_list_of_names() -> None:
    # Report 74: the five best names with probabilities and errors, for n = 15.
    names = [f"AV{k}" for k in range(15)]
    posterior = posterior_of(GumbelSinkhorn(torch.randn(15, 15), 0.5), 2000)
    probability, error = posterior.marginals()
    lists = posterior.candidates(5, names)
    assert len(lists) == 15
    for row, entries in enumerate(lists):
        assert len(entries) == 5
        for entry in entries:
            assert names[entry.column] == entry.name
            assert entry.probability == probability[row, entry.column]
            assert entry.error == error[row, entry.column] > 0
        found = [entry.probability for entry in entries]
        assert found == sorted(found, reverse=True)
        assert found[0] == probability[row].max()


def test_all_pairs_have_a_probability() -> None:
    # Report 69: the whole matrix with being unmatched, rows sum to one, with errors.
    d = GumbelSinkhorn(torch.randn(6, 5), 0.5, unmatched=(0.0, 0.0))
    probability, error = posterior_of(d, 1000).marginals()
    assert probability.shape == error.shape == (6, 6)
    torch.testing.assert_close(probability.sum(-1), torch.ones(6))
    assert (error > 0).all()
