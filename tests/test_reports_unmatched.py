# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Faults met elsewhere where items stay unmatched, each kind as a test.

Masked subsets and padding are in test_slack.py.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import slack_oracles as oracles
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from pyro_permutations import (
    GumbelSinkhorn,
    link_count_prior,
    matching,
    matching_graph,
    sinkhorn,
    slack_of,
    to_indices,
)

BOTH = (0.0, 0.0)


def test_an_item_without_a_partner_can_be_represented() -> None:
    """Dummy rows whose meaning is not clear: the unmatched mass is what sums lack."""
    X = torch.randn(3, 5)
    X[2] = -8.0
    d = GumbelSinkhorn(X, 0.1, unmatched=BOTH)
    P = d.rsample((500,))
    rows, columns = slack_of(P)
    assert rows[:, 2].mean() > 0.95
    assert (d.marginals(500)[0][2, -1]) > 0.95
    assert (P.sum(-1) <= 1 + 1e-6).all()
    assert (P.sum(-2) <= 1 + 1e-6).all()
    assert torch.allclose(P.sum(-1) + rows, torch.ones(500, 3), atol=1e-6)
    assert torch.allclose(P.sum(-2) + columns, torch.ones(500, 5), atol=1e-6)


def test_sides_of_different_length() -> None:
    """Rectangular input that is normalised in a way nobody asked for."""
    P = sinkhorn(torch.randn(3, 5), 0.5)
    assert torch.allclose(P.sum(-1), torch.ones(3), atol=1e-6)
    assert (P.sum(-2) < 1).all()
    with pytest.raises(ValueError, match=r"no more rows than columns.*unmatched"):
        sinkhorn(torch.randn(5, 3), 0.5)
    P = sinkhorn(torch.randn(5, 3), 0.5, unmatched=BOTH)
    assert (P.sum(-1) < 1).all()


def fit(score: Tensor, steps: int = 500) -> GumbelSinkhorn:
    """A relaxed guide for a partial matching of given log likelihood ratios."""
    n, m = score.shape

    def model() -> None:
        P = pyro.sample("P", GumbelSinkhorn(torch.zeros(n, m), 0.3, unmatched=BOTH))
        pyro.factor("links", (P * score).sum())

    def guide() -> None:
        logits = pyro.param("logits", lambda: torch.zeros(n, m))
        pyro.sample("P", GumbelSinkhorn(logits, 0.3, unmatched=BOTH))

    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=2))
    for _ in range(steps):
        loss = svi.step()
        assert math.isfinite(loss)
    return GumbelSinkhorn(pyro.param("logits").detach(), 0.3, unmatched=BOTH)


def test_outliers_stay_unmatched() -> None:
    """Slack that nothing rewards: unmatched points have a density of their own."""
    x = torch.tensor([[0.0, 0.0], [2.0, 1.0], [4.0, 4.0]])
    y = torch.tensor([[2.05, 0.9], [0.5, 3.5], [-0.1, 0.05]])  # to 1, to none, to 0
    sigma, background = 0.1, -math.log(25.0)  # uniform on a square of side 5
    noise = dist.Normal(0.0, sigma).log_prob(x[:, None] - y).sum(-1)
    score = noise - background
    exact = oracles.gibbs_marginals(score.numpy(), np.zeros(3), np.zeros(3))
    assert min(exact[2, 3], exact[3, 1]) > 0.5
    assert min(exact[0, 2], exact[1, 0]) > 0.9
    d = fit(score)
    found, error = d.marginals(2000)
    print(f"relaxed SVI {found.tolist()}, exact {exact[:3].tolist()}")
    assert to_indices(d.mode).tolist() == [2, 0, -1]
    assert found[2, 3] - 4 * error[2, 3] > 0.5
    # Relaxed SVI is too cautious: the right pairs come out ahead, capped below .9.
    assert min(found[0, 2] - 4 * error[0, 2], found[1, 0] - 4 * error[1, 0]) > 0.5


def test_indices_are_those_of_the_caller() -> None:
    """Padded indices: none is beyond the true size, unmatched is -1."""
    X = torch.randn(20, 3, 5)
    for unmatched in (None, BOTH):
        perm = to_indices(GumbelSinkhorn(X, 0.5, unmatched=unmatched).mode)
        assert perm.shape == (20, 3)
        assert ((perm >= -1) & (perm < 5)).all()
        assert (perm == -1).any() == (unmatched is not None)


def test_jointly_best_links_are_not_the_greedy_ones() -> None:
    """Greedy takes .95 and is left with .01; jointly .94 and .93 are better."""
    p = torch.tensor([[0.95, 0.94], [0.93, 0.01]])
    X = torch.logit(p)
    assert to_indices(matching(X)).tolist() == [1, 0]
    assert to_indices(GumbelSinkhorn(X, 0.5).mode).tolist() == [1, 0]
    must = np.full(2, -np.inf)
    exact = oracles.gibbs_marginals(X.numpy(), must, must)
    assert math.isclose(exact[0, 1], 0.9991, abs_tol=5e-5)
    partial = oracles.gibbs_marginals(X.numpy(), np.zeros(2), np.zeros(2))
    assert to_indices(matching(X, unmatched=BOTH)).tolist() == [1, 0]
    found, error = GumbelSinkhorn(X, 0.5, unmatched=BOTH).marginals(4000)
    # Perturbed scores are not the Gibbs law, but rank the links in the same order.
    assert torch.allclose(found.sum(-1), torch.ones(2))
    assert found[0].argmax() == partial[0].argmax() == 1
    assert found[1].argmax() == partial[1].argmax() == 0
    assert (error < 0.01).all()


def test_no_match_at_all() -> None:
    """A rate of matches that goes to zero, then NaN, where there is none."""
    X = torch.full((5, 4), -20.0)
    rows, columns = slack_of(GumbelSinkhorn(X, 0.5, unmatched=BOTH).rsample((100,)))
    assert rows.min() > 0.999
    assert columns.min() > 0.999
    d = fit(X, steps=200)
    assert (to_indices(d.mode) == -1).all()
    assert torch.isfinite(pyro.param("logits")).all()
    logits = X.clone().requires_grad_()
    q = GumbelSinkhorn(logits, 0.5, unmatched=BOTH)
    P = q.rsample((20,))
    p = GumbelSinkhorn(torch.zeros(5, 4), 0.5, unmatched=BOTH)
    elbo = (p.log_prob(P) - q.log_prob(P) + (P * X).sum((-2, -1))).mean()
    (gradient,) = torch.autograd.grad(elbo, logits)
    assert torch.isfinite(elbo)
    assert torch.isfinite(gradient).all()


def test_every_pair_has_a_probability() -> None:
    """Only pairs above a threshold: the whole matrix, unmatched too, with errors."""
    d = GumbelSinkhorn(torch.randn(6, 6), 0.5, unmatched=BOTH)
    frequency, error = d.marginals(1000)
    assert frequency.shape == error.shape == (6, 7)
    assert torch.allclose(frequency.sum(-1), torch.ones(6))
    assert (error <= 0.5 / 1000**0.5).all()


def test_births_and_deaths_of_tracks() -> None:
    """Frames of 3, then 4, then 3 objects: who is new, who is gone, who is who."""
    frames = [
        torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]),
        torch.tensor([[3.1, 0.1], [0.1, 0.0], [6.0, 6.0], [0.0, 3.2]]),
        torch.tensor([[0.2, 0.1], [6.1, 5.9], [0.1, 3.3]]),
    ]
    names = torch.tensor([0, 1, 2])
    truth = [[1, 0, 3, 2], [0, 3, 2]]  # 3 is born in the second frame, 1 is gone
    for before, after, expected in zip(frames, frames[1:], truth, strict=False):
        score = 6.0 - (before[:, None] - after).square().sum(-1) / (2 * 0.2**2)
        d = GumbelSinkhorn(score, 0.2, unmatched=BOTH)
        frequency, _ = d.marginals(500)
        forward = to_indices(d.mode)
        backward = to_indices(d.mode.mT)
        assert (frequency.max(-1).values > 0.9).all()
        assert (forward == -1).sum() == (1 if len(before) == 4 else 0)  # deaths
        assert (backward == -1).sum() == (1 if len(after) == 4 else 0)  # births
        named = torch.full((len(after),), 3)  # who is new gets the next name
        matched = backward >= 0
        named[matched] = names[backward[matched]]
        assert named.tolist() == expected
        names = named


def dynamics(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activity of 12 of 20 neurons, known weights, the truth and the candidates."""
    rng = torch.Generator().manual_seed(seed)
    W = torch.randn(20, 20, generator=rng)
    W = W * (torch.rand(20, 20, generator=rng) < 0.2) + 0.6 * torch.eye(20)
    W = 0.9 * W / torch.linalg.eigvals(W).abs().max()
    y = torch.zeros(400, 20)
    for t in range(1, 400):
        y[t] = W @ y[t - 1] + torch.randn(20, generator=rng)
    perm = torch.randperm(20, generator=rng)[:12]
    allowed = torch.rand(12, 20, generator=rng) < 4 / 19
    allowed[torch.arange(12), perm] = True
    return W, y[:, perm], perm, allowed


def test_partly_observed_neurons_are_found_better_than_by_swaps() -> None:
    """Who is who, where 8 of 20 are not recorded; at as many evaluations as swaps."""
    found, swapped = 0, 0
    for seed in range(3):
        W, Y, perm, allowed = dynamics(seed)
        graph = matching_graph(allowed, (12, 20))
        past, now = Y[:-1].mT @ Y[:-1], Y[1:].mT @ Y[:-1]

        # What neurons that are not recorded do counts as more noise: variance 2.
        def log_likelihood(P: Tensor, W=W, past=past, now=now) -> Tensor:
            A = P @ W @ P.mT
            return ((A * now).sum((-2, -1)) - 0.5 * ((A @ past) * A).sum((-2, -1))) / 2

        def model(graph=graph, log_likelihood=log_likelihood) -> None:
            P = pyro.sample("P", GumbelSinkhorn(torch.zeros(12, 20), 0.5, mask=graph))
            pyro.factor("y", log_likelihood(P))

        def guide(graph=graph) -> None:
            logits = pyro.param("logits", lambda: torch.zeros(12, 20))
            pyro.sample("P", GumbelSinkhorn(logits, 0.5, mask=graph))

        pyro.clear_param_store()
        svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(300):
            svi.step()
        d = GumbelSinkhorn(pyro.param("logits").detach(), 0.5, mask=graph)
        found += int((to_indices(d.mode) == perm).sum())
        assert (slack_of(d.rsample())[1] > 0.5).sum() in range(6, 11)  # not recorded

        # Moves to a free candidate or swaps; a step of SVI is worth ten of these.
        P = matching(torch.rand(12, 20), mask=graph)
        value = log_likelihood(P)
        for _ in range(3000):
            i, j = int(torch.randint(12, ())), int(torch.randint(20, ()))
            other = P.clone()
            owner = P[:, j].argmax() if P[:, j].any() else None
            if owner is not None:
                other[owner] = P[i]
            other[i] = 0.0
            other[i, j] = 1.0
            proposed = log_likelihood(other)
            legal = not (other.bool() & ~allowed).any()
            if legal and torch.rand(()).log() < proposed - value:
                P, value = other, proposed
        swapped += int((to_indices(P) == perm).sum())
    print(f"of 36: {found} by the guide, {swapped} by swaps")
    assert found > swapped
    assert found > 24


def test_known_identities_stay_known_and_help() -> None:
    """Some labels are given: they hold in every draw, the rest does not get worse."""
    right = torch.zeros(2)
    for seed in range(3):
        torch.manual_seed(seed)
        x, perm = torch.randn(15, 2), torch.randperm(15)
        y = x[perm] + 0.3 * torch.randn(15, 2)
        mask = torch.ones(15, 15).bool()
        known, rest = torch.arange(3), torch.arange(3, 15)
        mask[known], mask[:, perm[known]] = False, False
        mask[known, perm[known]] = True
        for k, allowed in enumerate((None, mask)):

            def model(x=x, y=y, allowed=allowed) -> None:
                prior = GumbelSinkhorn(torch.zeros(15, 15), 0.5, mask=allowed)
                P = pyro.sample("P", prior)
                pyro.sample("y", dist.Normal(P @ x, 0.3).to_event(2), obs=y)

            def guide(allowed=allowed) -> None:
                logits = pyro.param("logits", lambda: torch.zeros(15, 15))
                pyro.sample("P", GumbelSinkhorn(logits, 0.5, mask=allowed))

            pyro.clear_param_store()
            svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
            for _ in range(150):
                svi.step()
            d = GumbelSinkhorn(pyro.param("logits").detach(), 0.5, mask=allowed)
            right[k] += (to_indices(d.mode) == perm)[rest].sum()
            if allowed is not None:
                assert (d.rsample((50,))[:, known, perm[known]] == 1).all()
    assert right[1] >= right[0] > 18  # of 36


# In Pyro


def partial_model(score: Tensor) -> None:
    n, m = score.shape[-2:]
    P = pyro.sample("P", GumbelSinkhorn(torch.zeros(n, m), 1.0, unmatched=BOTH))
    pyro.factor("links", (P * score).sum((-2, -1)))
    pyro.factor("count", link_count_prior(P, dist.Poisson(2.0)))


def test_autoguide_nuts_and_predictive() -> None:
    score = torch.randn(2, 3)
    guide = AutoNormal(partial_model)
    svi = SVI(partial_model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    assert all(math.isfinite(svi.step(score)) for _ in range(20))
    kernel = NUTS(partial_model, jit_compile=False)
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(score)
    P = mcmc.get_samples()["P"]
    assert P.shape == (20, 2, 3)
    assert (P.sum(-1) < 1).all()
    drawn = Predictive(partial_model, {"P": P})(score)
    assert drawn["links"].shape[0] == 20


def test_plates_of_problems_of_different_sizes() -> None:
    mask = torch.ones(3, 4, 5).bool()
    mask[0, 2:] = mask[0, :, 3:] = mask[1, :, 4] = False
    score = torch.randn(3, 4, 5)

    def model() -> None:
        with pyro.plate("problems", 3):
            d = GumbelSinkhorn(torch.zeros(4, 5), 0.5, mask=mask)
            P = pyro.sample("P", d)
            pyro.factor("y", (P * score).sum((-2, -1)))

    def guide() -> None:
        logits = pyro.param("logits", lambda: torch.zeros(3, 4, 5))
        with pyro.plate("problems", 3):
            pyro.sample("P", GumbelSinkhorn(logits, 0.5, mask=mask))

    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO(num_particles=2))
    losses = [svi.step() for _ in range(50)]
    assert np.isfinite(losses).all()
    assert not pyro.param("logits")[~mask].any()


def test_only_the_prior_has_no_evidence_to_gain() -> None:
    """The ELBO of a model without data is at most zero: nothing flat is left over."""

    def model() -> None:
        pyro.sample("P", GumbelSinkhorn(torch.zeros(2, 3), 0.7))

    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO(num_particles=4))
    losses = torch.tensor([svi.step() for _ in range(300)])[-100:]
    assert losses.mean() > -4 * losses.std() / 10
