# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""One discrete model, relaxed: which sites change, and that inference runs on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    HMC,
    MCMC,
    NUTS,
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoNormal, AutoNormalMessenger
from pyro.optim import Adam
from torch import Tensor

from pyro_permutations import (
    GibbsMatching,
    GumbelSinkhorn,
    UniformPermutation,
    matching,
    relax,
    to_indices,
)

SAME = 1e-9  # the same number by two routes


def fn_of(model: Any, name: str = "P") -> Any:
    return poutine.trace(model).get_trace().nodes[name]["fn"]


def test_scores_mask_and_temperature_are_kept() -> None:
    X = torch.randn(2, 3, 3)
    mask = ~torch.eye(3, dtype=torch.bool)
    fn = fn_of(relax(lambda: pyro.sample("P", GibbsMatching(X, mask=mask)), 0.3))
    assert type(fn) is GumbelSinkhorn
    assert torch.equal(fn.logits, X)
    assert torch.equal(fn.graph.allowed.expand(2, 3, 3), mask.expand(2, 3, 3))
    assert fn.temperature == 0.3
    P = fn.sample()
    assert (P[..., ~mask] == 0).all()


def test_what_may_stay_unmatched_is_kept() -> None:
    X, alone = torch.randn(2, 3), (torch.tensor([0.5, -torch.inf]), 0.25)
    fn = fn_of(relax(lambda: pyro.sample("P", GibbsMatching(X, unmatched=alone)), 0.5))
    direct = GumbelSinkhorn(X, 0.5, unmatched=alone)
    assert torch.equal(fn.graph.free_rows, direct.graph.free_rows)
    P = direct.sample()
    assert torch.allclose(fn.log_prob(P), direct.log_prob(P), rtol=SAME)


def test_uniform_permutations_and_shapes() -> None:
    def model() -> None:
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2, dim=-1):
            pyro.sample("plain", UniformPermutation(4))
            pyro.sample(
                "masked", UniformPermutation(4).mask(torch.tensor([True, False]))
            )
        pyro.sample("events", UniformPermutation(4).expand([5]).to_event(1))
        both = UniformPermutation(4).expand([5]).mask(torch.ones(5).bool()).to_event(1)
        pyro.sample("both", both)
        pyro.sample("other", dist.Normal(0.0, 1.0))

    hard = poutine.trace(model).get_trace()
    soft = poutine.trace(relax(model, 0.5)).get_trace()
    hard.compute_log_prob()
    soft.compute_log_prob()
    for name in ("plain", "masked", "events", "both"):
        before, after = hard.nodes[name], soft.nodes[name]
        assert after["value"].shape == before["value"].shape
        assert after["log_prob"].shape == before["log_prob"].shape
        assert after["fn"].event_dim == before["fn"].event_dim
        assert not after["fn"].support.is_discrete
        assert set(before["value"].unique().tolist()) == {0.0, 1.0}
        assert ((after["value"] > 0) & (after["value"] < 1)).all()
    assert (soft.nodes["masked"]["log_prob"][:, 1] == 0).all()
    assert isinstance(soft.nodes["other"]["fn"], dist.Normal)


def test_observed_permutations_stay_discrete() -> None:
    def model() -> None:
        pyro.sample("seen", UniformPermutation(3), obs=torch.eye(3))
        pyro.sample("P", UniformPermutation(3))

    relaxed = relax(model, 0.5)
    assert isinstance(fn_of(relaxed, "seen"), UniformPermutation)
    assert isinstance(fn_of(relaxed), GumbelSinkhorn)
    conditioned = relax(poutine.condition(model, {"P": torch.eye(3)}), 0.5)
    assert isinstance(fn_of(conditioned), UniformPermutation)


def test_a_site_that_is_observed_after_it_was_relaxed_is_an_error() -> None:
    def model() -> None:
        pyro.sample("P", UniformPermutation(3))

    late = pyro.condition(relax(model, 0.5), data={"P": torch.eye(3)})
    with pytest.raises(ValueError, match="Condition first"):
        late()
    soft = pyro.condition(relax(model, 0.5), data={"P": torch.full((3, 3), 1 / 3)})
    soft()  # a relaxed value of a relaxed site


def test_the_model_itself_is_not_changed() -> None:
    def model() -> Tensor:
        return pyro.sample("P", UniformPermutation(3))

    relax(model, 0.5)()
    assert set(model().unique().tolist()) == {0.0, 1.0}


def test_it_is_the_model_with_the_prior_written_by_hand() -> None:
    x = torch.randn(4)

    def with_prior(prior: Any) -> Any:
        def model() -> None:
            P = pyro.sample("P", prior)
            pyro.sample("x", dist.Normal(P @ torch.arange(4.0), 0.5).to_event(1), obs=x)

        return model

    def guide() -> None:
        pyro.sample("P", GumbelSinkhorn(torch.zeros(4, 4), 0.7))

    losses = []
    for model in (
        relax(with_prior(UniformPermutation(4)), 0.5),
        with_prior(GumbelSinkhorn(torch.zeros(4, 4), 0.5)),
    ):
        pyro.set_rng_seed(3)
        losses.append(Trace_ELBO(num_particles=3).loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=SAME)


def test_svi_on_the_relaxed_site_and_predictive_on_the_model() -> None:
    """Report 46: keep the model discrete, fit its relaxed form."""
    y = torch.tensor([0.0, 1.0, 2.5, 4.0])
    truth = torch.tensor([2, 0, 3, 1])

    def model(x: Tensor, tau: float = 0.5) -> None:
        P = pyro.sample("P", UniformPermutation(4))
        pyro.sample("x", dist.Normal(P @ y, 0.3).to_event(1), obs=x)

    def guide(x: Tensor, tau: float = 0.5) -> None:
        logits = pyro.param("logits", torch.zeros(4, 4))
        pyro.sample("P", GumbelSinkhorn(logits, tau))

    def relaxed(x: Tensor, tau: float) -> None:
        relax(model, tau)(x)

    x = y[truth] + 0.05
    svi = SVI(relaxed, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for step in range(150):
        svi.step(x, 1.0 * 0.3 ** (step / 150))
    assert torch.equal(to_indices(matching(pyro.param("logits"))), truth)
    # Prior draws of the model are integer matchings, those of the relaxed model soft.
    for parallel in (False, True):
        draws = Predictive(model, num_samples=7, parallel=parallel)(x)["P"]
        assert (
            to_indices(draws).reshape(-1, 4).sort(-1).values == torch.arange(4)
        ).all()
        soft = Predictive(relax(model, 0.5), num_samples=7, parallel=parallel)(x)["P"]
        assert soft.shape == draws.shape
        assert ((soft > 0) & (soft < 1)).any()


@pytest.mark.parametrize("vectorize", [False, True])
def test_plates_and_vectorized_particles(vectorize: bool) -> None:
    def model() -> None:
        with pyro.plate("worms", 3):
            P = pyro.sample("P", UniformPermutation(3))
            x = P @ torch.arange(3.0)
            pyro.sample("x", dist.Normal(x, 0.5).to_event(1), obs=torch.ones(3, 3))

    def guide() -> None:
        with pyro.plate("worms", 3):
            pyro.sample("P", GumbelSinkhorn(torch.zeros(3, 3, 3), 0.5))

    elbo = Trace_ELBO(
        num_particles=5, vectorize_particles=vectorize, max_plate_nesting=1
    )
    loss = elbo.differentiable_loss(relax(model, 0.5), guide)
    assert torch.as_tensor(loss).isfinite()


def beside_a_scale(n: int) -> Callable[[], None]:
    """Numbers in another order, with noise of an unknown scale."""

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        P = pyro.sample("P", UniformPermutation(n))
        mean, x = P @ torch.arange(float(n)), torch.arange(float(n)) + 0.3
        scale = torch.as_tensor(scale)[..., None]
        pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("kind", [AutoNormal, AutoDelta, AutoNormalMessenger])
def test_an_autoguide_of_the_discrete_model_names_relax(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)discrete.*relax\(model, temperature\)"):
        SVI(beside_a_scale(3), kind(beside_a_scale(3)), Adam({}), Trace_ELBO()).step()


@pytest.mark.parametrize("kind", [HMC, NUTS])
def test_a_gradient_kernel_on_many_items_names_what_runs(kind: Any) -> None:
    mcmc = MCMC(kind(beside_a_scale(9)), 1, 1, disable_progbar=True)
    with pytest.raises(ValueError, match=r"relax.*InformedSwaps\(model\)"):
        mcmc.run()


def test_an_autoguide_of_the_rest_of_few_items_does_what_the_error_says() -> None:
    model = beside_a_scale(3)
    guide = AutoNormal(poutine.block(model, hide=["P"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    svi = SVI(config_enumerate(model), guide, Adam({"lr": 0.05}), elbo)
    losses = [svi.step() for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_relaxed_guide_for_the_discrete_model_names_relax() -> None:
    """Report 57: the support mismatch is an error, and the fix is named."""

    def model() -> None:
        pyro.sample("P", UniformPermutation(3))

    def guide() -> None:
        pyro.sample("P", GumbelSinkhorn(torch.zeros(3, 3), 0.5))

    with pytest.raises(ValueError, match="relax"):
        Trace_ELBO().loss(model, guide)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="relax"):
        Trace_ELBO().loss(model, guide)
