# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors from distributions, guides, MCMC and enumeration, beside the exact law."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import permutations
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.ops.streaming import CountStats, StatsOfDict
from torch import Tensor

from pyro_permutations import (
    GibbsMatching,
    GumbelMatching,
    GumbelSinkhorn,
    GumbelSinkhornStraightThrough,
    InformedSwaps,
    MatchingDraws,
    UniformPermutation,
    posterior_by_enumeration,
    posterior_from_guide,
    posterior_from_mcmc,
    posterior_of,
    to_indices,
    to_matrix,
)

SIGMAS = 4  # standard errors that count as chance
ROUNDING = 1e-12  # of sums of some hundred float64 terms


def pairs(posterior) -> Tensor:
    return posterior.marginals()[0][..., :-1]


# Distributions


@pytest.mark.parametrize("make", [GumbelSinkhorn, GumbelSinkhornStraightThrough])
def test_hard_draws_of_the_closed_form_for_two_items(make: Callable) -> None:
    """Report 54: the probability of the anti-diagonal, of 1e5 draws.

    s = X_12 + X_21 - X_11 - X_22 and the noise is a sum of two logistic variables,
    whose distribution function is 1 / (1 - e^-s) - s e^-s / (1 - e^-s)^2.
    """
    logits = torch.tensor([[0.1, 0.9], [0.9, 0.1]]).log()
    s = 2 * math.log(9)
    z = math.exp(-s)
    expected = 1 / (1 - z) - s * z / (1 - z) ** 2
    posterior = posterior_of(make(logits, 0.5), 100_000)
    probability, error = posterior.marginals()
    assert abs(float(probability[0, 1]) - expected) < SIGMAS * float(error[0, 1])
    assert float(error[0, 1]) < 1e-3
    assert posterior.mode.tolist() == [1, 0]


def test_hard_draws_count_as_the_marginals_of_the_distribution() -> None:
    d = GumbelSinkhorn(2 * torch.randn(2, 3, 5), 0.5, unmatched=(0.5, 0.0))
    posterior = posterior_of(d, 4000)
    probability, error = posterior.marginals()
    other, its_error = d.marginals(4000)
    assert posterior.batch_shape == (2,)
    assert ((probability - other).abs() <= SIGMAS * (error + its_error)).all()


def test_small_gibbs_laws_are_exact_and_large_ones_drawn() -> None:
    """Report 69: the whole matrix, with errors."""
    d = GibbsMatching(2 * torch.randn(3, 6, 6))
    posterior = posterior_of(d)
    assert posterior.exact
    torch.testing.assert_close(pairs(posterior), d.mean)
    torch.testing.assert_close(posterior.entropy()[0], d.entropy())
    torch.testing.assert_close(to_matrix(posterior.mode), d.mode)
    large = GibbsMatching(torch.randn(10, 10))
    drawn = posterior_of(large.expand([2]).to_event(1).mask(True), 500)
    assert (drawn.exact, drawn.batch_shape) == (False, (2,))
    probability, error = drawn.marginals()
    assert ((probability[..., :-1] - large.mean).abs() <= 5 * error[..., :-1]).all()
    torch.testing.assert_close(probability.sum(-1), torch.ones(2, 10))


def test_perturb_and_map_is_drawn_and_not_enumerated() -> None:
    X = torch.randn(3, 3)
    posterior = posterior_of(GumbelMatching(X), 2000)
    assert not posterior.exact
    probability, error = posterior.marginals()
    other, its_error = GumbelSinkhorn(X, 1.0).marginals(2000)
    assert ((probability - other).abs() <= SIGMAS * (error + its_error)).all()


def test_other_distributions_are_refused() -> None:
    for d in (dist.Normal(torch.zeros(3, 3), 1.0).to_event(2), dist.Bernoulli(0.5)):
        with pytest.raises(ValueError, match=r"expected GumbelSinkhorn or .* got"):
            posterior_of(d)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        posterior_of(GumbelSinkhorn(torch.zeros(2, 2), 1.0), 0)


# Guides


def test_a_guide_is_read_at_its_parameters() -> None:
    X = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])

    def guide(temperature: float) -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("worms", 2):
            pyro.sample("P", GumbelSinkhorn(pyro.param("X", X), temperature))

    posterior = posterior_from_guide(guide, "P", 0.1, num_samples=3000)
    probability, error = posterior.marginals()
    expected, its_error = GumbelSinkhorn(X, 0.1).marginals(3000)
    assert posterior.batch_shape == (2,)
    assert ((probability - expected).abs() <= SIGMAS * (error + its_error)).all()
    with pytest.raises(ValueError, match=r"no site 'Q', but \['x', 'worms', 'P'\]"):
        posterior_from_guide(guide, "Q", 0.1)


@pytest.mark.parametrize("make", [GibbsMatching, lambda X: GumbelSinkhorn(X, 0.1)])
def test_a_guide_whose_logits_are_random_is_run_for_every_draw(make: Callable) -> None:
    def guide() -> None:
        x = pyro.sample("x", dist.Bernoulli(0.3))
        pyro.sample("P", make(20 * (2 * x - 1) * torch.eye(2)))

    posterior = posterior_from_guide(guide, "P", num_samples=500)
    probability, error = posterior.marginals()
    assert abs(float(probability[0, 0]) - 0.3) < SIGMAS * float(error[0, 0])


def test_a_subsampled_guide_is_refused() -> None:
    def guide() -> None:
        with pyro.plate("worms", 5, subsample_size=2) as chosen:
            pyro.sample("P", GumbelSinkhorn(torch.zeros(5, 3, 3)[chosen], 0.5))

    with pytest.raises(ValueError, match="'P' is in a plate that is subsampled"):
        posterior_from_guide(guide, "P")


def test_an_autoguide_is_refused() -> None:
    def model() -> None:
        pyro.sample("P", GumbelSinkhorn(torch.zeros(3, 3), 0.5))

    for make in (AutoNormal, AutoDelta):
        with pytest.raises(ValueError, match=r"expected Gumbel.* got Delta"):
            posterior_from_guide(make(model), "P")


# MCMC


def gibbs_model(X: Tensor) -> None:
    with pyro.plate("worms", X.shape[0]):
        P = pyro.sample("P", UniformPermutation(X.shape[-1]))
        pyro.factor("scores", (P * X).sum((-1, -2)))


def test_chains_agree_with_enumeration_within_their_errors() -> None:
    X = torch.randn(1, 4, 4)
    truth = pairs(posterior_by_enumeration(gibbs_model, "P", X))
    torch.testing.assert_close(truth, GibbsMatching(X).mean)
    kernel = InformedSwaps(gibbs_model, replicas=1)
    mcmc = MCMC(kernel, 4000, 200, disable_progbar=True)
    mcmc.run(X)
    posterior = posterior_from_mcmc(mcmc, "P")
    assert (posterior.chains, posterior.batch_shape) == (1, (1,))
    probability, error = (x[..., :-1] for x in posterior.marginals())
    assert ((probability - truth).abs() <= SIGMAS * error).all()
    assert float(error.max()) < 0.05
    with pytest.raises(ValueError, match=r"has sites \['P'\], and not 'Q'"):
        posterior_from_mcmc(mcmc, "Q")


class Given(MCMCKernel):
    """Returns listed values, so that what is made of them can be compared."""

    transforms: dict = {}  # noqa: RUF012

    def __init__(self, P: Tensor) -> None:
        self.P = P

    def setup(self, warmup_steps: int) -> None:
        self.time = 0
        self._initial = {"P": self.P[0]}

    @property
    def initial_params(self) -> dict:
        return {"P": self.P[0]}

    def sample(self, params: dict) -> dict:
        self.time += 1
        return {"P": self.P[self.time - 1]}


def test_streaming_keeps_the_same_draws() -> None:
    perm = torch.rand(20, 2, 5).argsort(-1)[..., :3]
    P = to_matrix(perm, columns=5)
    kept = StatsOfDict({(0, "P"): MatchingDraws})
    streaming = StreamingMCMC(Given(P), 20, 0, statistics=kept, disable_progbar=True)
    streaming.run()
    mcmc = MCMC(Given(P), 20, 0, disable_progbar=True)
    mcmc.run()
    for run in (streaming, mcmc):
        posterior = posterior_from_mcmc(run, "P")
        assert torch.equal(posterior.perm, perm)
        assert (posterior.columns, posterior.chains) == (5, 1)
    count = StreamingMCMC(
        Given(P),
        20,
        0,
        statistics=StatsOfDict(default=CountStats),
        disable_progbar=True,
    )
    count.run()
    with pytest.raises(ValueError, match=r"needs MatchingDraws .* but has \['count'\]"):
        posterior_from_mcmc(count, "P")
    with pytest.raises(ValueError, match="but has none"):
        posterior_from_mcmc(streaming, "Q")


def test_chains_are_kept_apart() -> None:
    draws = [MatchingDraws() for _ in range(3)]
    perm = torch.rand(3, 6, 4).argsort(-1)
    for chain, each in zip(draws, perm, strict=True):
        for one in each:
            chain.update(to_matrix(one))
    merged = draws[0].merge(draws[1]).merge(draws[2])
    assert torch.equal(merged.get()["perm"], perm)
    assert merged.chains[0][0].dtype == torch.int16
    assert len(draws[0].chains) == 1, "merging leaves the parts alone"


def test_relaxed_samples_are_refused() -> None:
    soft = GumbelSinkhorn(torch.zeros(3, 3), 1.0).sample((8,))
    mcmc = MCMC(Given(soft), 8, 0, disable_progbar=True)
    mcmc.run()
    with pytest.raises(ValueError, match=r"pass it through matching"):
        posterior_from_mcmc(mcmc, "P")


# Enumeration


def gaussian_model(y: Tensor, x: Tensor) -> None:
    P = pyro.sample("P", UniformPermutation(len(x)))
    with pyro.plate("points", len(x)):
        pyro.sample("y", dist.Normal(P @ x, 0.7).to_event(1), obs=y)


def gaussian_law(y: Tensor, x: Tensor) -> Tensor:
    P = permutations(len(x))
    score = dist.Normal(P @ x, 0.7).log_prob(y).sum((-1, -2))
    return (score.softmax(0)[:, None, None] * P).sum(0)


def test_enumeration_is_bayes_rule() -> None:
    x, y = torch.randn(2, 5, 2)
    posterior = posterior_by_enumeration(gaussian_model, "P", y, x)
    assert posterior.exact
    assert len(posterior.perm) == 120
    torch.testing.assert_close(
        pairs(posterior), gaussian_law(y, x), atol=ROUNDING, rtol=0
    )


def test_a_model_for_one_matching_is_run_for_each() -> None:
    """Loops over items take one, and a sum over everything would be wrong."""
    x, y = torch.randn(2, 4, 2)
    runs = []

    def by_index() -> None:
        P = pyro.sample("P", UniformPermutation(4))
        runs.append(P.shape)
        moved = torch.stack([x[int(j)] for j in to_indices(P)])
        pyro.sample("y", dist.Normal(moved, 0.7).to_event(2), obs=y)

    def by_sum() -> None:
        P = pyro.sample("P", UniformPermutation(4))
        runs.append(P.shape)
        pyro.factor("y", dist.Normal(P @ x, 0.7).log_prob(y).sum())

    def at_once() -> None:
        P = pyro.sample("P", UniformPermutation(4))
        runs.append(P.shape)
        pyro.sample("y", dist.Normal(P @ x, 0.7).to_event(2), obs=y)

    for model, few in ((by_index, False), (by_sum, False), (at_once, True)):
        runs.clear()
        posterior = posterior_by_enumeration(model, "P")
        torch.testing.assert_close(
            pairs(posterior), gaussian_law(y, x), atol=ROUNDING, rtol=0
        )
        assert (len(runs) < 10) == few


def test_plates_have_a_posterior_for_each_element() -> None:
    X = torch.randn(3, 2, 4, 4)

    def model() -> None:
        with pyro.plate("b", 3, dim=-3), pyro.plate("a", 2, dim=-1):
            P = pyro.sample("P", UniformPermutation(4).expand([3, 1, 2]))
            pyro.factor("half", 0.5 * (P * X[:, None]).sum((-1, -2)))
            with pyro.plate("fields", 5, dim=-2):
                score = 0.1 * (P * X[:, None]).sum((-1, -2))
                pyro.factor("rest", score.expand(*score.shape[:-2], 5, 2))

    posterior = posterior_by_enumeration(model, "P")
    assert posterior.batch_shape == (3, 1, 2)
    expected = GibbsMatching(X).mean  # .5 + 5 x .1
    torch.testing.assert_close(pairs(posterior)[:, 0], expected)


def test_scales_masks_and_priors_count() -> None:
    X, prior = torch.randn(2, 4, 4)
    allowed = torch.ones(4, 4, dtype=torch.bool)
    allowed[0, 0] = allowed[1, 2] = False

    def model() -> None:
        P = pyro.sample("P", GibbsMatching(prior, mask=allowed))
        with pyro.poutine.scale(scale=2.0):
            pyro.factor("scores", (P * X).sum((-1, -2)))
        with pyro.poutine.mask(mask=False):
            pyro.factor("unseen", 100 * P[..., 0, 1])

    posterior = posterior_by_enumeration(model, "P")
    expected = GibbsMatching(prior + 2 * X, mask=allowed).mean
    torch.testing.assert_close(pairs(posterior), expected)
    assert (pairs(posterior)[~allowed] == 0).all()


def test_partial_matchings_are_enumerated_with_the_unmatched() -> None:
    X = torch.randn(3, 3)

    def model() -> None:
        P = pyro.sample("P", GibbsMatching(torch.zeros(3, 3), unmatched=(0.0, 0.0)))
        pyro.factor("scores", (P * X).sum((-1, -2)))

    posterior = posterior_by_enumeration(model, "P")
    assert len(posterior.perm) == 34
    expected, _ = GibbsMatching(X, unmatched=(0.0, 0.0)).marginals()
    torch.testing.assert_close(posterior.marginals()[0], expected)


def test_known_pairs_are_certain() -> None:
    """Report 75: a known pair has probability 1, and the rest does not suffer."""
    x, y = torch.randn(2, 5, 2)
    known = torch.ones(5, 5, dtype=torch.bool)
    known[2], known[:, 4] = False, False
    known[2, 4] = True

    def model(mask: Tensor | None) -> None:
        P = pyro.sample("P", UniformPermutation(5, mask=mask))
        pyro.sample("y", dist.Normal(P @ x, 0.7).to_event(2), obs=y)

    free, fixed = (posterior_by_enumeration(model, "P", m) for m in (None, known))
    assert fixed.marginals()[0][2, 4] == 1
    given = (free.perm[:, 2] == 4).double() * free.weights  # Bayes' rule
    P = to_matrix(free.perm)
    expected = (given[:, None, None] * P).sum(0) / given.sum()
    torch.testing.assert_close(pairs(fixed), expected)
    relaxed = posterior_of(GumbelSinkhorn(torch.zeros(5, 5), 0.1, mask=known), 200)
    assert relaxed.marginals()[0][2, 4] == 1
    assert (relaxed.perm[:, 2] == 4).all()


def latent() -> None:
    pyro.sample("P", UniformPermutation(3))
    pyro.sample("scale", dist.Normal(0.0, 1.0))


def relaxed() -> None:
    pyro.sample("P", GumbelSinkhorn(torch.zeros(3, 3), 1.0))


def large() -> None:
    pyro.sample("P", UniformPermutation(9))


def undeclared() -> None:
    pyro.sample("P", UniformPermutation(3).expand([2]))


def one_event() -> None:
    pyro.sample("P", UniformPermutation(3).expand([2]).to_event(1))


def tied() -> None:
    with pyro.plate("worms", 2):
        P = pyro.sample("P", UniformPermutation(3))
    pyro.factor("tie", (P[..., 0, :, :] * P[..., 1, :, :]).sum((-1, -2)))


def summed() -> None:
    with pyro.plate("worms", 2):
        P = pyro.sample("P", UniformPermutation(3))
        pyro.factor("score", P[..., 0, 0].sum())


def noisy() -> None:
    P = pyro.sample("P", UniformPermutation(3))
    pyro.factor("score", P[..., 0, 0] * torch.randn(()))


def subsampled() -> None:
    P = pyro.sample("P", UniformPermutation(3))
    with pyro.plate("fields", 4, subsample_size=2):
        pyro.factor("score", P[..., 0, :1].expand(*P.shape[:-2], 2))


def undefined() -> None:
    P = pyro.sample("P", UniformPermutation(3))
    pyro.factor("score", P[..., 0, 0] * torch.nan)


def impossible() -> None:
    P = pyro.sample("P", UniformPermutation(3))
    pyro.factor("score", torch.where(P[..., 0, 0] >= 0, -torch.inf, 0.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (latent, r"latent are \['P', 'scale'\]"),
        (relaxed, "discrete prior .* got GumbelSinkhorn"),
        (large, r"at most 8 items, .* got UniformPermutation .* \(9, 9\)"),
        (undeclared, "dimension -1 is no plate"),
        (one_event, r"over one matching .* \(2, 3, 3\)"),
        (tied, r"'tie' is outside of \['worms'\]"),
        (summed, "changes with the matchings of others"),
        (noisy, "or from run to run"),
        (subsampled, "'score' is in a plate that is subsampled"),
        (undefined, "got NaN"),
        (impossible, "or only -inf"),
    ],
)
def test_what_cannot_be_enumerated_is_said(model: Callable, message: str) -> None:
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        posterior_by_enumeration(model, "P")


def test_conditioning_makes_a_site_the_only_one() -> None:
    model = pyro.condition(latent, data={"scale": torch.tensor(1.0)})
    posterior = posterior_by_enumeration(model, "P")
    torch.testing.assert_close(pairs(posterior), torch.full((3, 3), 1 / 3))
    with pytest.raises(ValueError, match="the model has no site 'Q'"):
        posterior_by_enumeration(latent, "Q")
