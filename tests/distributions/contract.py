# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What every distribution has to do, as tests that each distribution's file inherits.

A subclass named ``Test...`` sets ``cls`` and, where the defaults do not fit, ``params``
and ``outside``; pytest collects the inherited tests with it.
"""

from __future__ import annotations

import pickle
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints as torch_constraints
from torch.func import vmap

SAME = 1e-6  # the same number by two routes, relative, where Sinkhorn is run twice
BATCHES = [(), (2,), (3, 2)]
SAMPLES = [(), (4,), (2, 3)]
SIGMAS = 4.5  # standard errors that a random test allows


class DistributionContract:
    """The contract; ``n`` items, batches of any shape."""

    cls: ClassVar[Any]
    n = 3
    is_discrete = False

    # Hooks

    def params(self, batch: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(*batch, self.n, self.n, generator=generator)
        return {"logits": logits.to(dtype)}

    def outside(self, inside: Tensor) -> Tensor:
        """A value of the right shape that is not in the support."""
        return inside + 0.1

    def make(
        self,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float64,
        **changes: Any,
    ) -> Any:
        return self.cls(**{**self.params(batch, dtype), **changes})

    # Shapes

    @pytest.mark.parametrize("sample", SAMPLES)
    @pytest.mark.parametrize("batch", BATCHES)
    def test_shapes(self, batch: tuple[int, ...], sample: tuple[int, ...]) -> None:
        d = self.make(batch)
        assert d.batch_shape == batch
        assert d.event_shape == (self.n, self.n)
        assert d.event_dim == 2
        value = d.rsample(sample)
        assert value.shape == sample + batch + (self.n, self.n)
        assert d.sample(sample).shape == value.shape
        assert d(sample).shape == value.shape
        assert d.shape(sample) == value.shape
        assert d.log_prob(value).shape == sample + batch
        assert d.log_prob(value).isfinite().all()

    def test_empty_batches_and_samples(self) -> None:
        d = self.make((0,))
        assert d.rsample((2,)).shape == (2, 0, self.n, self.n)
        assert d.log_prob(d.rsample()).shape == (0,)
        assert self.make().rsample((0,)).shape == (0, self.n, self.n)

    def test_values_and_parameters_broadcast(self) -> None:
        one, many = self.make(), self.make((2,))
        assert many.log_prob(one.rsample()).shape == (2,)
        assert one.log_prob(many.rsample((4,))).shape == (4, 2)
        value = many.rsample((4,))
        each = torch.stack([many.log_prob(v) for v in value])
        assert torch.allclose(many.log_prob(value), each, rtol=SAME, atol=SAME)

    def test_every_slice_has_its_own_noise(self) -> None:
        value = self.make((2,)).expand((3, 2)).rsample((4,)).reshape(24, -1)
        assert len(torch.unique(value[:, 0])) == 24

    def test_infer_shapes(self) -> None:
        shapes = {k: v.shape for k, v in self.params((3, 2), torch.float64).items()}
        batch, event = self.cls.infer_shapes(**shapes)
        assert batch == (3, 2)
        assert event == (self.n, self.n)

    # Expand and wrappers

    def test_expand(self) -> None:
        d = self.make((2,))
        for shape in [(2,), (3, 2), (4, 1, 2)]:
            e = d.expand(shape)
            assert type(e) is self.cls  # a wrapper would hide it from dispatch and repr
            assert e.batch_shape == shape
            assert e.event_shape == d.event_shape
            value = e.rsample((5,))
            assert value.shape == (5, *shape, self.n, self.n)
            assert torch.allclose(e.log_prob(value), d.log_prob(value), rtol=SAME)
            for name, parameter in self.params((2,), torch.float64).items():
                assert getattr(e, name).shape[: len(shape)] == shape
                assert torch.equal(getattr(e.expand(shape), name), getattr(e, name))
                assert torch.equal(
                    getattr(e, name), parameter.expand_as(getattr(e, name))
                )
        again = self.make().expand((2,)).expand((3, 2)).expand((3, 2))
        assert again.batch_shape == (3, 2)
        assert self.make().expand_by((3,)).batch_shape == (3,)
        assert d.expand_by((3,)).batch_shape == (3, 2)
        with pytest.raises((ValueError, RuntimeError)):
            d.expand((3,))

    def test_expand_keeps_validation(self) -> None:
        for flag in (True, False):
            e = self.make((2,), validate_args=flag).expand((3, 2))
            assert e._validate_args is flag

    def test_to_event(self) -> None:
        d = self.make((3, 2))
        e = d.to_event(1)
        value = e.rsample((4,))
        assert e.batch_shape == (3,)
        assert e.event_shape == (2, self.n, self.n)
        assert e.log_prob(value).shape == (4, 3)
        total = d.log_prob(value).sum(-1)
        assert torch.allclose(e.log_prob(value), total, rtol=SAME)
        assert d.to_event(2).log_prob(value).shape == (4,)

    def test_mask(self) -> None:
        d = self.make((2,))
        value = d.rsample()
        assert not d.mask(False).log_prob(value).any()
        assert torch.allclose(d.mask(True).log_prob(value), d.log_prob(value))
        keep = torch.tensor([True, False])
        masked = d.mask(keep).log_prob(value)
        assert masked[1] == 0
        assert torch.allclose(masked[0], d.log_prob(value)[0])

    def test_plate_expands_the_site(self) -> None:
        def model() -> Tensor:
            with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2, dim=-1):
                return pyro.sample("value", self.make())

        trace = poutine.trace(model).get_trace()
        trace.compute_log_prob()
        site = trace.nodes["value"]
        assert site["value"].shape == (3, 2, self.n, self.n)
        assert site["log_prob"].shape == (3, 2)
        assert type(site["fn"]) is self.cls

    # Support

    def test_support(self) -> None:
        d = self.make((2,))
        assert d.support.event_dim == 2
        assert d.support.is_discrete == self.is_discrete
        assert isinstance(d.support, torch_constraints.Constraint)
        value = d.rsample((4,))
        assert d.support.check(value).shape == (4, 2)
        assert d.support.check(value).all()
        assert d.expand((3, 2)).support.check(value[:1]).all()

    def test_values_outside_the_support_are_refused(self) -> None:
        d = self.make((2,))
        bad = self.outside(d.rsample())
        with pytest.raises(ValueError, match=r"value|support|sample"):
            d.log_prob(bad)
        nan = d.rsample().clone()
        nan[0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"value|support|sample"):
            d.log_prob(nan)

    def test_values_of_a_wrong_shape_are_refused(self) -> None:
        d = self.make((2,))
        for shape in [(2, self.n + 1, self.n + 1), (self.n,), (5, self.n, self.n)]:
            with pytest.raises(ValueError, match=r"shape|dim|broadcast|size"):
                d.log_prob(torch.zeros(shape))

    def test_validation_can_be_switched_off(self) -> None:
        d = self.make(validate_args=False)
        value = d.rsample()
        assert torch.allclose(d.log_prob(value), self.make().log_prob(value))

    # Parameters

    def test_parameters_are_declared(self) -> None:
        d = self.make((2,))
        assert set(d.arg_constraints) == set(self.params((), torch.float64))
        for name, constraint in d.arg_constraints.items():
            assert constraint.check(getattr(d, name)).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_bad_logits_are_named(self, bad: float) -> None:
        logits = self.params((2,), torch.float64)["logits"].clone()
        logits[1, 0, 1] = bad
        with pytest.raises(ValueError, match="logits"):
            self.make((2,), logits=logits)

    def test_logits_of_a_wrong_shape_are_named(self) -> None:
        for shape in [(5, 3), (3,)]:
            with pytest.raises(ValueError, match="logits"):
                self.make(logits=torch.zeros(shape))

    def test_logits_that_are_no_tensor_are_named(self) -> None:
        logits = self.params((), torch.float64)["logits"]
        for bad in (logits.tolist(), logits.numpy()):
            with pytest.raises(TypeError, match=r"logits.*pass a tensor"):
                self.make(logits=bad)

    @pytest.mark.parametrize("bad", [-1, 2.5, "many", None])
    def test_bad_density_samples_are_named(self, bad) -> None:
        with pytest.raises(ValueError, match="density_samples"):
            self.make(density_samples=bad)

    def test_infeasible_logits_are_named(self) -> None:
        """The pairs were forbidden by the logits: no mask was passed."""
        logits = self.params((), torch.float64)["logits"].clone()
        logits[:2] = -torch.inf
        logits[:2, 1] = 0.0
        with pytest.raises(ValueError, match=r"logits are -inf.*mask.*rows.*0, 1"):
            self.make(logits=logits)

    def test_bad_masks_are_named(self) -> None:
        n = self.n
        with pytest.raises(ValueError, match="mask"):
            self.make(mask=torch.ones(n + 1, n + 1, dtype=torch.bool))
        with pytest.raises(ValueError, match="mask"):
            self.make(mask=torch.ones(n, n))
        with pytest.raises(ValueError, match="mask"):
            self.make((2,), mask=torch.ones(5, n, n, dtype=torch.bool))
        infeasible = torch.ones(n, n, dtype=torch.bool)
        infeasible[:2] = False
        infeasible[:2, 1] = True
        with pytest.raises(ValueError, match=r"rows.*0, 1.*column.*1"):
            self.make(mask=infeasible)

    # Numbers

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_follows_the_logits(self, dtype: torch.dtype) -> None:
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            d = self.make((2,), dtype)
            value = d.rsample((3,))
            assert value.dtype == dtype
            assert d.log_prob(value).dtype == dtype
            assert d.expand((3, 2)).rsample().dtype == dtype

    def test_same_seed_same_sample(self) -> None:
        d = self.make((2,))
        first, second = [], []
        for store in (first, second):
            pyro.set_rng_seed(7)
            store.extend([d.rsample((3,)), d.sample()])
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert not torch.equal(d.sample(), d.sample())

    def test_score_is_deterministic(self) -> None:
        """Scoring draws no random number, and twice the same value scores the same."""
        d = self.make((2,), density_samples=16)
        value = d.rsample()
        state = torch.get_rng_state()
        assert torch.equal(d.log_prob(value), d.log_prob(value))
        assert torch.equal(torch.get_rng_state(), state)

    def test_gradients_reach_every_parameter(self) -> None:
        assert self.cls.has_rsample is True  # a class attribute, not a property
        parameters = self.params((2,), torch.float64)
        for p in parameters.values():
            p.requires_grad_()
        d = self.cls(**parameters)
        value = d.rsample()
        weight = torch.randn_like(value)
        for scalar in ((value * weight).sum(), d.log_prob(value).sum()):
            grads = torch.autograd.grad(
                scalar, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for g in grads:
                assert g is None or g.isfinite().all()
            assert grads[0] is not None
            assert grads[0].any()
        assert not d.sample().requires_grad

    def test_score_parts(self) -> None:
        d = self.make()
        value = d.rsample()
        parts = d.score_parts(value)
        assert torch.equal(parts.log_prob, d.log_prob(value))
        assert parts.score_function == 0
        assert torch.equal(parts.entropy_term, d.log_prob(value))
        plain = self.make().has_rsample_(False)
        assert plain.has_rsample is False
        assert torch.equal(plain.score_parts(value).score_function, d.log_prob(value))
        assert self.cls.has_rsample is True

    @pytest.mark.parametrize("name", ["mean", "variance", "mode", "stddev"])
    def test_moments_are_right_or_unknown(self, name: str) -> None:
        """Properties that raise NotImplementedError where there is no closed form."""
        d = self.make((2,))
        try:
            value = getattr(d, name)
        except NotImplementedError:
            return
        assert value.shape == (2, self.n, self.n)
        assert value.isfinite().all()
        if name == "mode":
            return
        draws = d.sample((4000,))
        if name == "mean":
            error = draws.std(0) / 4000**0.5
            assert ((draws.mean(0) - value).abs() <= SIGMAS * error + SAME).all()
        else:
            spread = draws.var(0) if name == "variance" else draws.std(0)
            assert torch.allclose(spread, value, rtol=0.25, atol=SAME)

    @pytest.mark.parametrize("name", ["entropy", "cdf", "icdf"])
    def test_other_methods_are_unknown_rather_than_wrong(self, name: str) -> None:
        d = self.make()
        arguments = () if name == "entropy" else (d.sample(),)
        with pytest.raises(NotImplementedError):
            getattr(d, name)(*arguments)

    def test_divergence_is_left_to_the_density(self) -> None:
        """The rule that torch has for transformed distributions is no KL of these."""
        d = self.make()
        for other in (d, self.make(), dist.Normal(0.0, 1.0).expand([3, 3])):
            with pytest.raises(NotImplementedError):
                torch.distributions.kl_divergence(d, other)

    # Python

    def test_repr_names_class_and_parameters(self) -> None:
        for d in (self.make(), self.make((2,)).expand((3, 2))):
            text = repr(d)
            assert self.cls.__name__ in text
            for name in self.params((), torch.float64):
                assert name in text

    def test_pickle(self) -> None:
        mask = torch.ones(self.n, self.n, dtype=torch.bool)
        mask[0, 1] = False
        for changes in ({}, {"mask": mask}):
            d = self.make((2,), **changes)
            value = d.rsample()
            copy = pickle.loads(pickle.dumps(d))
            assert torch.allclose(copy.log_prob(value), d.log_prob(value))
            pyro.set_rng_seed(3)
            expected = d.sample()
            pyro.set_rng_seed(3)
            assert torch.equal(copy.sample(), expected)

    def test_vmap(self) -> None:
        """Noise differs across the mapped axis; scores are those of a loop."""
        parameters = self.params((5,), torch.float64)
        names = list(parameters)

        def draw(*values: Tensor) -> Tensor:
            changes = dict(zip(names, values, strict=True))
            return self.cls(**changes, validate_args=False).rsample()

        def score(value: Tensor, *values: Tensor) -> Tensor:
            changes = dict(zip(names, values, strict=True))
            return self.cls(**changes, validate_args=False).log_prob(value)

        shared = {k: v[:1].expand_as(v) for k, v in parameters.items()}
        drawn = vmap(draw, randomness="different")(*shared.values())
        assert drawn.shape == (5, self.n, self.n)
        assert len(torch.unique(drawn[:, 0, 0])) == 5
        value = self.make((5,)).sample()
        mapped = vmap(score)(value, *parameters.values())
        expected = self.make((5,)).log_prob(value)
        assert torch.allclose(mapped, expected, rtol=SAME, atol=SAME)
