# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Enumeration of models: plates, scales and masks, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import permutations
from torch import Tensor

from pyro_permutations import (
    GibbsMatching,
    GumbelSinkhorn,
    MatchingPosterior,
    UniformPermutation,
    posterior_by_enumeration,
    posterior_from_guide,
    to_indices,
)

ROUNDING = 1e-12  # of sums of some hundred float64 terms


def pairs(posterior: MatchingPosterior) -> Tensor:
    return posterior.marginals()[0][..., :-1]


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


def observed() -> None:
    P = pyro.sample("P", UniformPermutation(3), obs=torch.eye(3))
    pyro.factor("score", P[..., 0, 1])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (latent, r"\['scale'\] are latent"),
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
        (observed, "'P' is observed"),
    ],
)
def test_what_cannot_be_enumerated_is_said(model: Callable, message: str) -> None:
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        posterior_by_enumeration(model, "P")


def in_plate_beside_a_scale(later: bool) -> None:
    """Two worms, an unknown noise scale for both, ahead of P or after it."""
    x, y = torch.arange(3.0), torch.tensor([[0.2, 1.0, 2.2], [1.9, 0.9, 0.1]])

    def scale() -> Tensor:
        with pyro.plate("weights", 4):
            pyro.sample("w", dist.Normal(0.0, 1.0), obs=torch.arange(4.0))
        return pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    if not later:
        sigma = scale()
    worms = pyro.plate("worms", 2)
    with worms:
        P = pyro.sample("P", UniformPermutation(3))
    if later:
        sigma = scale()
    with worms:
        pyro.sample("y", dist.Normal(P @ x, sigma).to_event(1), obs=y)


def test_a_site_outside_of_the_plate_is_a_constant_ahead_of_it() -> None:
    given = {"scale": torch.tensor(0.7)}
    model = pyro.condition(in_plate_beside_a_scale, data=given)
    posterior = posterior_by_enumeration(model, "P", False)
    x, y = torch.arange(3.0), torch.tensor([[0.2, 1.0, 2.2], [1.9, 0.9, 0.1]])
    P = permutations(3)
    score = dist.Normal(P @ x, 0.7).log_prob(y[:, None]).sum(-1)  # (2, 6)
    expected = torch.einsum("bk,kij->bij", score.softmax(-1), P)
    torch.testing.assert_close(pairs(posterior), expected, atol=ROUNDING, rtol=0)
    # After P it might depend on all: the error names two ways, and both do it.
    with pytest.raises(ValueError, match=r"(?s)'w' is outside.*ahead of 'P'.*block"):
        posterior_by_enumeration(model, "P", True)
    hidden = pyro.poutine.block(model, hide=["w", "scale"])
    torch.testing.assert_close(
        pairs(posterior_by_enumeration(hidden, "P", True)), pairs(posterior)
    )
    impossible = pyro.condition(
        in_plate_beside_a_scale, data={"scale": -torch.ones(())}
    )
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="got NaN"):
        posterior_by_enumeration(impossible, "P", False)


def test_a_plate_of_one_ties_nothing() -> None:
    x, y = torch.arange(3.0), torch.tensor([1.9, 0.9, 0.1])

    def model(plated: bool) -> None:
        if plated:
            with pyro.plate("worms", 1):
                P = pyro.sample("P", UniformPermutation(3))[..., 0, :, :]
        else:
            P = pyro.sample("P", UniformPermutation(3))
        pyro.sample("y", dist.Normal(P @ x, 0.5).to_event(1), obs=y)

    alone = pairs(posterior_by_enumeration(model, "P", False))
    assert alone[0, 2] > 0.5
    found = pairs(posterior_by_enumeration(model, "P", True))
    torch.testing.assert_close(found, alone[None])


def test_conditioning_makes_a_site_the_only_one() -> None:
    model = pyro.condition(latent, data={"scale": torch.tensor(1.0)})
    posterior = posterior_by_enumeration(model, "P")
    torch.testing.assert_close(pairs(posterior), torch.full((3, 3), 1 / 3))
    with pytest.raises(ValueError, match="model has no site 'Q'"):
        posterior_by_enumeration(latent, "Q")


def test_a_subsampled_guide_is_refused() -> None:
    def guide() -> None:
        with pyro.plate("worms", 5, subsample_size=2) as chosen:
            pyro.sample("P", GumbelSinkhorn(torch.zeros(5, 3, 3)[chosen], 0.5))

    with pytest.raises(ValueError, match="'P' is in a plate that is subsampled"):
        posterior_from_guide(guide, "P")
