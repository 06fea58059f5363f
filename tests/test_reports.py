# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Faults that people who do this job have met elsewhere, each kind as a test.

Faults of the operators alone are in the files of the operators: sums after a fixed
number of iterations, overflow, underflow to the uniform matrix, masks that creep,
gradients of masked cells, batches that share a matrix, options without effect.
"""

from __future__ import annotations

import inspect
import math
import re
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

import pyro_permutations.distributions as ours
from pyro_permutations.carried_log import log_of
from pyro_permutations.constraints import doubly_stochastic
from pyro_permutations.distributions import (
    GumbelSinkhorn,
    GumbelSinkhornStraightThrough,
)
from pyro_permutations.matching import matching, to_indices, to_matrix
from pyro_permutations.sinkhorn import log_sinkhorn, sinkhorn

SIGMAS = 4.5  # standard errors that a random test allows
SECONDS = 1.0  # bad input is refused at once


def find_order(seed: int) -> bool:
    """Learn which of five noisy points is which; True if every pair is right."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    perm, x = torch.randperm(5), torch.arange(5.0)
    y = x[perm] + 0.1 * torch.randn(5)

    def model() -> None:
        P = pyro.sample("P", GumbelSinkhorn(torch.zeros(5, 5), 0.5))
        pyro.sample("y", dist.Normal(P @ x, 0.1).to_event(1), obs=y)

    def guide() -> None:
        logits = pyro.param("logits", lambda: torch.zeros(5, 5))
        pyro.sample("P", GumbelSinkhorn(logits, 0.5))

    svi = SVI(model, guide, Adam({"lr": 0.3}), Trace_ELBO())
    for _ in range(60):
        svi.step()
    return torch.equal(to_indices(matching(pyro.param("logits").detach())), perm)


def test_results_do_not_depend_on_a_lucky_seed() -> None:
    """Instability over seeds: the same job succeeds for each of them."""
    assert all(find_order(seed) for seed in range(4))


def test_options_change_something() -> None:
    """Silently ignored options: every keyword of the constructors has an effect."""
    X = torch.randn(5, 5)
    q = GumbelSinkhorn(4 * torch.randn(5, 5), 0.5)
    P = q.sample((4,))
    plain = GumbelSinkhorn(X, 0.5)
    assert not torch.equal(
        plain.log_prob(P), GumbelSinkhorn(X, 0.5, density_samples=64).log_prob(P)
    )
    assert not torch.equal(plain.log_prob(P), GumbelSinkhorn(X, 0.6).log_prob(P))
    mask = ~torch.eye(5, dtype=torch.bool)
    assert not GumbelSinkhorn(X, 0.5, mask=mask).sample().diagonal().any()
    assert plain.sample().diagonal().all()
    # The fixture turns validation on, so that True alone would say nothing.
    bad = X * torch.nan
    with pytest.raises(ValueError, match="logits"):
        GumbelSinkhorn(bad, 0.5)
    GumbelSinkhorn(bad, 0.5, validate_args=False)
    with pyro.validation_enabled(False):
        GumbelSinkhorn(bad, 0.5)
        with pytest.raises(ValueError, match="logits"):
            GumbelSinkhorn(bad, 0.5, validate_args=True)


def test_documented_defaults_are_the_defaults() -> None:
    """Documents that disagree with the code: numbers named beside "default"."""
    for function in (log_sinkhorn, sinkhorn):
        defaults = inspect.signature(function).parameters
        assert defaults["temperature"].default == 1.0
        assert defaults["tol"].default is None
    # The second takes its arguments from the first, and says so.
    assert re.search(r"tol:[^:]*\b1e-6 by default", inspect.getdoc(log_sinkhorn) or "")
    assert "`log_sinkhorn`, whose arguments it has" in (inspect.getdoc(sinkhorn) or "")
    P = sinkhorn(torch.randn(20, 20), 0.1)
    for dim in (-1, -2):
        assert (P.sum(dim) - 1).abs().max() <= 1e-6
    for name in ("GumbelSinkhorn", "GumbelContrasts"):
        parameters = inspect.signature(getattr(ours, name)).parameters
        assert parameters["density_samples"].default == 0
        assert parameters["mask"].default is None


def test_soft_results_are_hardened_by_a_public_call() -> None:
    """A soft matrix taken for a permutation: the argmax of rows is not one."""
    X = torch.tensor([[3.0, 2.9, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    P = sinkhorn(X, 1.0)
    hard = matching(X)
    assert doubly_stochastic.check(hard)
    assert to_indices(hard).unique().numel() == 3
    with pytest.raises(ValueError, match="permutation"):
        to_indices(P)
    draws = GumbelSinkhorn(X, 1.0).sample((50,))
    assert (matching(draws).sum(-2) == 1).all()
    d = GumbelSinkhorn(X, 1.0)
    assert torch.equal(d.mode, hard)


def test_orientation_is_documented_and_round_trips() -> None:
    """Along which axis a permutation acts: P @ x sorts, perm[i] = j, P[i, j] = 1."""
    x = torch.tensor([3.0, 1.0, 2.0])
    P = matching(torch.outer(torch.arange(3.0), x))  # large row to large number
    assert (P @ x).tolist() == [1.0, 2.0, 3.0]
    perm = to_indices(P)
    assert torch.equal(P @ x, x[perm])
    assert torch.equal(to_matrix(perm), P)
    assert torch.equal(to_indices(to_matrix(perm)), perm)
    shown = to_matrix(torch.tensor([2, 0, 1]))
    assert shown[0, 2] == shown[1, 0] == shown[2, 1] == 1


def test_gradient_is_not_lost_behind_a_hard_value() -> None:
    """Indexing with integers cuts the graph; a straight-through product does not."""
    X = torch.randn(5, 5, requires_grad=True)
    x = torch.randn(5)
    P = GumbelSinkhornStraightThrough(X, 1.0).rsample()
    assert torch.equal((P @ x).detach(), x[to_indices(P.detach())])
    (g,) = torch.autograd.grad((P @ x) @ torch.randn(5), X)
    assert g.abs().max() > 1e-6


def test_gradients_are_right_all_the_way_through_a_model() -> None:
    """Doubts about the backward rule: the gradient of a loss against differences."""
    cost = torch.randn(4, 4)
    X, tau = torch.randn(4, 4), 0.4

    def loss(x: Tensor) -> Tensor:
        pyro.set_rng_seed(11)
        q = GumbelSinkhorn(x, tau)
        P = q.rsample()
        p = GumbelSinkhorn(torch.zeros(4, 4), tau)
        return (P * cost).sum() + q.log_prob(P) - p.log_prob(P)

    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(x), x)
    for i, j in ((0, 0), (1, 3), (3, 2)):
        change = torch.zeros(4, 4)
        change[i, j] = 1e-5
        expected = (loss(X + change) - loss(X - change)) / 2e-5
        assert abs(g[i, j] - expected) < 1e-5 * (1 + abs(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_over_the_useful_range_of_temperatures(
    dtype: torch.dtype,
) -> None:
    """A temperature that has to be tuned by hand because gradients blow up."""
    C = torch.randn(8, 8, dtype=dtype)
    for tau in (1.0, 0.3, 0.1, 0.05, 0.01):
        X = C.roll(1, 0).clone().requires_grad_()
        P = GumbelSinkhorn(X, tau).rsample((3,))
        (g,) = torch.autograd.grad((P * C).sum(), X)
        assert g.isfinite().all()


def test_scorer_learns_behind_the_layer() -> None:
    """Training that stalls behind the matching layer but not without it."""
    features, weights = torch.randn(8, 8, 3), torch.randn(3)
    target = matching(features @ weights)
    norms = {}
    for name, layer in (("matching", log_sinkhorn), ("softmax", None)):
        w = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=0.2)
        for step in range(150):
            scores = features @ w
            log_P = layer(scores) if layer else scores.log_softmax(-1)
            loss = -(target * log_P).sum()
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                norms[name] = float(w.grad.norm())
            optimizer.step()
        if layer:
            assert torch.equal(matching(features @ w.detach()), target)
    assert norms["softmax"] / 100 < norms["matching"] < norms["softmax"] * 100


def test_no_nan_from_the_log_of_an_exponential() -> None:
    """A loss on log P where half of P has underflowed."""
    d = GumbelSinkhorn(torch.randn(30, 30).requires_grad_(), 0.01)
    P = d.rsample((20,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = d.log_prob(P).sum() + 1e-3 * log_of(P).sum()
    assert value.isfinite()
    (g,) = torch.autograd.grad(value, d.logits)
    assert g.isfinite().all()


def test_draw_frequencies_are_the_stated_ones() -> None:
    """Probabilities passed where their logs were expected: two items, many draws."""
    weights = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    P = GumbelSinkhorn(weights.log(), 0.3).sample((20000,))
    s = -4 * math.log(9.0) / 2 * 1.0  # minus the contrast of the log weights
    share = (math.exp(2 * s) - math.exp(s) * (1 + s)) / (math.exp(s) - 1) ** 2
    found = float((P[:, 0, 1] > 0.5).double().mean())
    assert abs(found - share) < SIGMAS * (share * (1 - share) / 20000) ** 0.5


@pytest.mark.parametrize("n", [2, 5])
def test_samples_on_the_boundary_have_finite_scores(n: int) -> None:
    """Low temperature samples are 0 and 1 to the last bit."""
    pyro.set_rng_seed(2)
    for dtype in (torch.float32, torch.float64):
        d = GumbelSinkhorn((5 * torch.eye(n) - 5).to(dtype), 0.05)
        assert d.log_prob(d.sample((200,))).isfinite().all()


@pytest.mark.slow
def test_rare_noise_is_finite() -> None:
    """One infinite Gumbel draw in millions ends a long run."""
    for dtype in (torch.float32, torch.float64):
        d = GumbelSinkhorn(torch.zeros(10, 10, dtype=dtype), 1.0)
        Z = d.base_dist.rsample((50_000,))
        assert Z.isfinite().all()


def test_straight_through_trains_in_a_guide() -> None:
    """A distribution that nobody had run inside an objective: known scores are
    recovered, up to shifts, from hard draws."""
    X = torch.tensor([[1.5, 0.0], [-0.5, 0.5]])

    def model() -> None:
        pyro.sample("P", GumbelSinkhornStraightThrough(X, 0.7))

    def guide() -> None:
        logits = pyro.param("logits", lambda: torch.zeros(2, 2))
        pyro.sample("P", GumbelSinkhornStraightThrough(logits, 0.7))

    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, Adam({"lr": 0.05}), elbo)
    contrast = []
    for step in range(300):
        assert math.isfinite(svi.step())
        if step >= 150:  # the mean of the iterates: a single one still jumps about
            x = pyro.param("logits").detach()
            contrast.append(x[0, 0] + x[1, 1] - x[0, 1] - x[1, 0])
    expected = X[0, 0] + X[1, 1] - X[0, 1] - X[1, 0]
    assert abs(torch.stack(contrast).mean() - expected) < 0.3


def test_forbidden_pairs_never_appear() -> None:
    """Large numbers that stand for "never" are used in the end; a mask is not."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = False
    X = torch.randn(4, 4)
    X[0, 0] = 1e4  # the best pair of all, if it were allowed
    soft = GumbelSinkhorn(X, 0.5, mask=mask).sample((2000,))
    assert not soft[:, ~mask].any()
    hard = GumbelSinkhornStraightThrough(X, 0.5, mask=mask).sample((10_000,))
    assert not hard[:, ~mask].any()
    assert not matching(X, mask=mask)[~mask].any()


def test_invalid_input_is_named_at_once() -> None:
    """Opaque errors, or loops for ever, from NaN, infinities and wrong shapes."""
    nan = torch.zeros(4, 4)
    nan[1] = torch.nan
    infinite = torch.zeros(4, 4)
    infinite[0, 0] = torch.inf
    start = time.perf_counter()
    for bad in (nan, infinite, torch.zeros(5, 3)):
        for call in (
            log_sinkhorn,
            matching,
            lambda x: GumbelSinkhorn(x, 0.5),
        ):
            with pytest.raises(ValueError, match="logits"):
                call(bad)
    for tau in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            GumbelSinkhorn(torch.zeros(4, 4), tau)
    with pytest.raises(ValueError, match=r"matching|mode"):
        GumbelSinkhorn(torch.zeros(4, 4), 0.0)
    assert time.perf_counter() - start < 2 * SECONDS


def test_hard_draws_of_any_batch_size() -> None:
    """A batch larger than some constant, of one, or empty."""
    for batch in (0, 1, 64):
        d = GumbelSinkhornStraightThrough(torch.zeros(batch, 5, 5), 0.5)
        P = d.sample()
        assert P.shape == (batch, 5, 5)
        assert (P.sum(-1) == 1).all()
        assert (P.sum(-2) == 1).all()
