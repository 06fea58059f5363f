# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""InformedSwaps under Pyro's MCMC: marginals by enumeration, and what it refuses."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.mcmc import HMC
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.ops.stats import effective_sample_size
from pyro.ops.streaming import CountMeanStats, StatsOfDict
from torch import Tensor

from pyro_permutations import (
    GibbsMatching,
    GumbelSinkhorn,
    InformedSwaps,
    UniformPermutation,
    mixing,
    to_indices,
    to_matrix,
)

SIGMAS = 4.5  # standard errors that a random test allows
Model = Callable[[], Any]


def run(
    model: Model, samples: int = 1500, chains: int = 2, **options: Any
) -> dict[str, Tensor]:
    """Samples of every latent site, (chains, samples, ...)."""
    initial = options.pop("initial_params", None)
    found = []
    for _ in range(chains):
        mcmc = MCMC(
            InformedSwaps(model, **options),
            samples,
            warmup_steps=100,
            initial_params=initial,
            disable_progbar=True,
        )
        mcmc.run()
        found.append(mcmc.get_samples())
    return {name: torch.stack([x[name] for x in found]) for name in found[0]}


def check_marginals(samples: Tensor, exact: Tensor) -> None:
    """Frequencies against probabilities, by the effective size of each row."""
    size = mixing(samples).effective_size[..., None]
    assert (size[~size.isnan()] > 100).all(), "too few to tell anything"
    # Rows that never changed: what has not been seen in all samples.
    size = size.nan_to_num(samples.shape[0] * samples.shape[1])
    # Bernstein's inequality, which covers rare entries as well.
    bound = SIGMAS * (exact * (1 - exact) / size).sqrt() + SIGMAS**2 / (3 * size)
    assert ((samples.mean((0, 1)) - exact).abs() <= bound).all()


def permutations(n: int) -> Tensor:
    return to_matrix(torch.tensor(list(itertools.permutations(range(n)))))


def by_enumeration(values: Tensor, log_joint: Tensor) -> Tensor:
    return (log_joint.softmax(0)[:, None, None] * values).sum(0)


def gaussian(n: int = 4, sigma: float = 0.8) -> tuple[Model, Tensor]:
    y = torch.randn(n, 2)
    x = y[torch.randperm(n)] + sigma * torch.randn(n, 2)

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(n))
        with pyro.plate("points", n):
            pyro.sample("x", dist.Normal(P @ y, sigma).to_event(1), obs=x)

    values = permutations(n)
    log_joint = dist.Normal(values @ y, sigma).log_prob(x).sum((-1, -2))
    return model, by_enumeration(values, log_joint)


# Marginals


@pytest.mark.parametrize("replicas", [1, 3])
def test_gaussian_matching(replicas: int) -> None:
    model, exact = gaussian()
    check_marginals(run(model, replicas=replicas)["P"], exact)


def test_two_modes_need_more_than_one_temperature() -> None:
    place = torch.tensor([0.0, 1.0, 3.0, 4.0])
    D = (place[:, None] - place).abs()

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(4))
        pyro.sample("D", dist.Normal(P @ D @ P.mT, 0.4).to_event(2), obs=D)

    values = permutations(4)
    log_joint = dist.Normal(values @ D @ values.mT, 0.4).log_prob(D).sum((-1, -2))
    exact = by_enumeration(values, log_joint)
    assert exact[0, 0] == pytest.approx(0.5, abs=0.01)  # as it is, or mirrored
    alone = run(model, samples=500, replicas=1)["P"].mean(1)
    assert (alone[:, 0, 0] - 0.5).abs().min() > 0.4  # stays where it starts
    check_marginals(run(model, samples=2000)["P"], exact)


CASES: dict[str, Callable[[], GibbsMatching]] = {
    "scale 2": lambda: GibbsMatching(2 * torch.randn(5, 5)),
    "ring": lambda: GibbsMatching(
        torch.randn(5, 5),
        mask=torch.eye(5).bool() | torch.eye(5).bool().roll(1, 1),
    ),
    "injection": lambda: GibbsMatching(torch.randn(2, 4)),
    "partial": lambda: GibbsMatching(torch.randn(3, 2), unmatched=(0.2, -0.3)),
}


@pytest.mark.parametrize("case", CASES)
def test_gibbs_laws(case: str) -> None:
    """Without a likelihood: the prior itself, with masks and unmatched items."""
    d = CASES[case]()
    n, m = d.event_shape
    values = []
    for columns in itertools.product(range(m + 1), repeat=n):
        P = torch.zeros(n, m + 1)
        P[torch.arange(n), torch.tensor(columns)] = 1
        if (P[:, :m].sum(0) <= 1).all() and d.support.check(P[:, :m]):
            values.append(P[:, :m])
    listed = torch.stack(values)
    exact = by_enumeration(listed, (listed * d.logits).sum((-1, -2)))
    samples = run(lambda: pyro.sample("P", d))["P"]
    check_marginals(samples, exact)
    assert d.support.check(samples).all()


def test_plates_and_two_sites_of_which_one_depends_on_the_other() -> None:
    """The permanent of the second prior changes with the first permutation."""
    X = 0.5 * torch.randn(3, 3)

    def model() -> None:
        with pyro.plate("pair", 2):
            P = pyro.sample("P", GibbsMatching(X))
        Q = pyro.sample("Q", GibbsMatching(P[0] @ X))
        x = (P.sum(-3) @ Q).diagonal(dim1=-2, dim2=-1).sum(-1)
        pyro.sample("x", dist.Normal(x, 2.0), obs=torch.tensor(2.0))

    S = permutations(3)
    first, second, third = (
        x.flatten() for x in torch.meshgrid(*[torch.arange(6)] * 3, indexing="ij")
    )
    P = torch.stack([S[first], S[second]], 1)
    Q = GibbsMatching(P[:, 0] @ X)
    x = (P.sum(1) @ S[third]).diagonal(dim1=-2, dim2=-1).sum(-1)
    weight = (P * X).sum((-1, -2, -3)) + Q.log_prob(S[third])
    weight = (weight + dist.Normal(x, 2.0).log_prob(torch.tensor(2.0))).softmax(0)
    samples = run(model, samples=1200, replicas=1)
    for name, values in (("P", P), ("Q", S[third])):
        shape = (-1, *[1] * (values.dim() - 1))
        check_marginals(samples[name], (weight.view(shape) * values).sum(0))


def test_rank_aggregation_with_an_unknown_spread() -> None:
    """Report 48: Mallows with the footrule, 10 rankers, 5 items, centre and spread."""
    n, S = 5, permutations(5)
    place = torch.arange(n).double()
    centre = torch.tensor([2.0, 0.0, 1.0, 4.0, 3.0])
    distance = (S @ place - place).abs().sum(-1)  # from the identity to each of all

    def log_normalizer(theta: Tensor) -> Tensor:
        return (-theta[..., None] * distance).logsumexp(-1)

    weight = (-0.35 * (S @ place - centre).abs().sum(-1)).softmax(0)
    ranks = (S @ place)[torch.multinomial(weight, 10, replacement=True)]
    cost = (ranks[:, :, None] - place).abs().sum(0)  # of item i at place j

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(n))
        theta = pyro.sample("theta", dist.Gamma(2.0, 4.0))
        loss = (P * cost).sum((-1, -2))
        pyro.factor("ranks", -theta * loss - 10 * log_normalizer(theta))

    grid = torch.linspace(1e-3, 3.0, 3000)
    loss = (S * cost).sum((-1, -2))
    joint = -grid[:, None] * loss - 10 * log_normalizer(grid)[:, None]
    joint = joint + dist.Gamma(2.0, 4.0).log_prob(grid)[:, None]
    exact = by_enumeration(S, joint.logsumexp(0))
    weight = joint.logsumexp(1).softmax(0)
    mean = (weight * grid).sum()
    spread = (weight * (grid - mean).square()).sum().sqrt()
    kernel = partial(HMC, step_size=0.5, num_steps=3)
    samples = run(model, samples=500, replicas=1, continuous=kernel)
    check_marginals(samples["P"], exact)
    assert (samples["theta"] > 0).all()  # in the space of the model
    size = effective_sample_size(samples["theta"])
    assert size > 100
    assert (samples["theta"].mean() - mean).abs() < SIGMAS * spread / size**0.5


@pytest.mark.parametrize("replicas", [1, 4])
def test_two_equally_likely_items_beside_a_continuous_site(replicas: int) -> None:
    # Every swap is accepted, and an even number of them goes nowhere.
    def model() -> None:
        P = pyro.sample("P", UniformPermutation(2))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("flat", 0.0 * P[..., 0, 0] * z)

    pyro.set_rng_seed(0)
    hmc = partial(HMC, step_size=0.5, num_steps=2)
    samples = run(model, 400, replicas=replicas, continuous=hmc)["P"]
    check_marginals(samples, torch.full((2, 2), 0.5))
    moved = (samples[:, 1:, 0, 0] != samples[:, :-1, 0, 0]).double().mean(-1)
    assert (moved > 0.2).all()


def test_diagnostics_of_a_finished_run_with_continuous_sites() -> None:
    def model() -> None:
        P = pyro.sample("P", UniformPermutation(3))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("tie", P[..., 0, 0] * z)

    hmc = partial(HMC, step_size=0.5, num_steps=2)
    kernel = InformedSwaps(model, continuous=hmc, replicas=1)
    mcmc = MCMC(kernel, 20, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    assert 0 <= kernel.diagnostics()["continuous"]["acceptance rate"] <= 1


def test_continuous_sites_held_fixed() -> None:
    y, x = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([2.2, 0.8, 3.6])

    def model() -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        P = pyro.sample("P", UniformPermutation(3))
        pyro.sample("x", dist.Normal(P @ y + shift, 0.7).to_event(1), obs=x)

    S = permutations(3)
    exact = by_enumeration(S, dist.Normal(S @ y + 0.5, 0.7).log_prob(x).sum(-1))
    start = {"shift": torch.tensor(0.5), "P": torch.eye(3)}
    samples = run(model, 800, continuous=None, replicas=2, initial_params=start)
    assert (samples["shift"] == 0.5).all()
    check_marginals(samples["P"], exact)


# How a model is evaluated


def branching(P: Tensor) -> Tensor:
    """Python looks at a value: neither recorded nor under vmap."""
    total = (P * torch.arange(9.0).reshape(3, 3)).sum()
    return total.sin() if P[0, 0] > 0.5 else -total.cos()


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("likelihood", "way"),
    [
        (lambda P: (P[..., 0, :] @ torch.arange(3.0)).sin(), "recorded"),
        (branching, "one by one"),
    ],
)
def test_all_ways_to_evaluate_agree(
    likelihood: Callable[[Tensor], Tensor], way: str, validate: bool
) -> None:
    def model() -> None:
        pyro.factor("f", likelihood(pyro.sample("P", UniformPermutation(3))))

    S = permutations(3)
    log_joint = torch.stack([likelihood(P) for P in S])
    kernel = InformedSwaps(model, replicas=2)
    mcmc = MCMC(kernel, 1000, 50, disable_progbar=True, disable_validation=not validate)
    mcmc.run()
    assert mcmc.diagnostics()["evaluation"] == {"chain 0": way}
    samples = mcmc.get_samples(group_by_chain=True)["P"]
    check_marginals(samples, by_enumeration(S, log_joint))


def test_scores_are_exact_for_a_quadratic_likelihood() -> None:
    """So that far swaps of points are not mistaken for good ones."""
    model, _ = gaussian(5, 0.1)
    kernel = InformedSwaps(model, replicas=1)
    kernel.setup(0)
    chain = kernel._chain
    log_q = chain.log_swaps("P", uniform=False)
    for move in range(log_q.shape[-1]):
        proposal = chain.swap("P", False, log_q, torch.tensor([move]))
        exact = proposal.terms.tempered - chain.terms.tempered
        score = chain._scored["P"].tempered[0, 0, move]
        assert torch.allclose(score, exact, rtol=1e-9, atol=1e-9)


def test_samples_keep_the_dtype_of_the_model() -> None:
    torch.set_default_dtype(torch.float32)
    model, _ = gaussian(4, 0.8)
    assert run(model, 20, 1)["P"].dtype == torch.float32


def test_a_seed_gives_the_same_samples() -> None:
    model, _ = gaussian()
    found = []
    for _ in range(2):
        pyro.set_rng_seed(7)
        found.append(run(model, 30, 1)["P"])
    assert torch.equal(*found)


def test_parameters_and_observed_permutations_are_left_alone() -> None:
    scores = torch.randn(3, 3)

    def model() -> None:
        X = pyro.param("scores", scores)
        pyro.sample("seen", GibbsMatching(X), obs=torch.eye(3))
        pyro.sample("P", GibbsMatching(X))

    S = permutations(3)
    samples = run(model, 800)
    assert set(samples) == {"P"}
    check_marginals(samples["P"], by_enumeration(S, (S * scores).sum((-1, -2))))
    assert torch.equal(pyro.param("scores").detach(), scores)


# Under Pyro's MCMC


def test_streaming_statistics_and_hooks() -> None:
    model, exact = gaussian()
    seen = []

    def hook(kernel: Any, params: Any, stage: str, i: int) -> None:
        seen.append((stage, i, params["P"].shape))

    statistics = StatsOfDict(default=CountMeanStats)
    mcmc = StreamingMCMC(
        InformedSwaps(model),
        1500,
        warmup_steps=50,
        statistics=statistics,
        hook_fn=hook,
        disable_progbar=True,
    )
    mcmc.run()
    found = mcmc.get_statistics(group_by_chain=False)["P"]
    assert found["count"] == 1500
    # No samples are kept to tell the effective size; 200 is less than it is.
    assert (found["mean"] - exact).abs().max() < SIGMAS * (0.25 / 200) ** 0.5
    assert seen[0] == ("Warmup", 0, (4, 4))
    assert len(seen) == 1550


def test_several_chains_and_diagnostics() -> None:
    model, exact = gaussian()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro warns where there are few processors
        mcmc = MCMC(InformedSwaps(model), 400, 50, num_chains=2, disable_progbar=True)
        mcmc.run()
    samples = mcmc.get_samples(group_by_chain=True)["P"]
    assert samples.shape == (2, 400, 4, 4)
    check_marginals(samples, exact)
    rates = mcmc.diagnostics()
    for chain in ("chain 0", "chain 1"):
        assert 0 < rates["acceptance rate"][chain] < 1
        assert len(rates["exchange rates"][chain]) == 3
        assert rates["inverse temperatures"][chain][0] == 1.0


def test_what_the_progress_bar_shows() -> None:
    def model() -> None:
        pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("P", UniformPermutation(3))

    kernel = InformedSwaps(model, replicas=1)
    kernel.setup(10)
    kernel.sample({})
    assert list(json.loads(json.dumps(kernel.logging()))) == [
        "acc. rate",
        "continuous step size",
        "continuous acc. prob",
    ]


# Where chains start


def test_starts_at_the_guide() -> None:
    model, _ = gaussian(6, 0.5)
    best = torch.randperm(6)
    guide_calls = []

    def guide() -> None:
        guide_calls.append(1)
        pyro.sample("P", GumbelSinkhorn(200 * to_matrix(best), 0.1))

    kernel = InformedSwaps(model, guide=guide, replicas=2)
    kernel.setup(0)
    for P in kernel._chain.matrices()["P"]:
        assert torch.equal(to_indices(P), best)
    assert guide_calls


def test_arguments_reach_model_and_guide() -> None:
    def model(x: Tensor, sigma: float) -> None:
        P = pyro.sample("P", UniformPermutation(3))
        pyro.sample("x", dist.Normal(P @ torch.arange(3.0), sigma).to_event(1), obs=x)

    def guide(x: Tensor, sigma: float) -> None:
        pyro.sample("P", GumbelSinkhorn(torch.zeros(3, 3), sigma))

    mcmc = MCMC(InformedSwaps(model, guide=guide), 50, 10, disable_progbar=True)
    mcmc.run(torch.tensor([2.0, 0.0, 1.0]), sigma=0.1)
    assert (to_indices(mcmc.get_samples()["P"]) == torch.tensor([2, 0, 1])).all()


def test_given_starts_are_checked() -> None:
    mask = ~torch.eye(3, dtype=torch.bool).flip(0)

    def model() -> None:
        pyro.sample("P", GibbsMatching(torch.zeros(3, 3), mask=mask))

    for value in (torch.eye(3).flip(0), torch.full((3, 3), 1 / 3)):
        with pytest.raises(ValueError, match=r"matching\(\.\.\.\)"):
            run(model, initial_params={"P": value})
    with pytest.raises(ValueError, match="'Q', which is not a latent site"):
        run(model, initial_params={"Q": torch.eye(3)})


# What it refuses


def test_a_likelihood_without_a_gradient() -> None:
    y = torch.tensor([0.0, 1.0, 2.0])

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(3))
        x = y[to_indices(P)]
        pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="differentiable"):
        run(model)


def test_models_it_cannot_sample() -> None:
    def nothing() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))

    def discrete() -> None:
        pyro.sample("P", UniformPermutation(3))
        pyro.sample("k", dist.Bernoulli(0.5))

    def subsampled() -> None:
        pyro.sample("P", UniformPermutation(3))
        with pyro.plate("data", 10, subsample_size=5):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(5))

    def impossible() -> None:
        P = pyro.sample("P", UniformPermutation(3))
        pyro.factor("never", P.sum() - torch.inf)

    def wrong() -> None:
        pyro.sample("P", UniformPermutation(3))
        pyro.sample("seen", UniformPermutation(3), obs=torch.ones(3, 3))

    with pytest.raises(ValueError, match="no latent permutation"):
        run(nothing)
    with pytest.raises(ValueError, match="'k' is discrete"):
        run(discrete)
    with pytest.raises(NotImplementedError, match="subsampled"):
        run(subsampled)
    with pytest.raises(ValueError, match="not finite"):
        run(impossible)
    with pytest.raises(ValueError, match="'seen' is observed"):
        run(wrong)
    with pytest.raises(ValueError, match="replicas"):
        InformedSwaps(nothing, replicas=0)


def test_conditioning_removes_a_site() -> None:
    model, _ = gaussian()
    with pytest.raises(ValueError, match="no latent permutation"):
        run(poutine.condition(model, {"P": torch.eye(4)}))


def test_a_model_that_leaves_torch_is_not_recorded() -> None:
    """What NumPy does to one state must not become a constant of all."""

    def likelihood(P: Tensor) -> Tensor:
        corner = torch.from_numpy(P.detach().numpy()[0] * 1.0)[0]
        return (P[1] * torch.arange(3.0)).sum() + 2 * corner

    def model() -> None:
        pyro.factor("f", likelihood(pyro.sample("P", UniformPermutation(3))))

    S = permutations(3)
    exact = by_enumeration(S, torch.stack([likelihood(P) for P in S]))
    check_marginals(run(model, 1000, replicas=1)["P"], exact)


def test_a_batch_of_different_masks() -> None:
    some = ~torch.eye(3).bool().roll(1, 1)
    small = torch.tensor([[True, True, False], [True, True, False], [False] * 3])
    mask = torch.stack([some, torch.ones(3, 3).bool(), small])
    X = torch.randn(3, 3, 3)

    def model() -> None:
        with pyro.plate("problems", 3):
            pyro.sample("P", GibbsMatching(X, mask=mask))

    exact = []
    for scores, allowed in zip(X, mask, strict=True):
        size = int(allowed.any(-1).sum())  # the last is padded
        S = torch.nn.functional.pad(permutations(size), (0, 3 - size, 0, 3 - size))
        S = S[(allowed | (S == 0)).all(-1).all(-1)]
        exact.append(by_enumeration(S, (S * scores).sum((-1, -2))))
    # The first has three matchings, a ring, that only rare cycles connect.
    check_marginals(run(model, 4000, replicas=1)["P"], torch.stack(exact))
