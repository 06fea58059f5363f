# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A model's log density at given permutations, with its gradient, for many at once."""

from __future__ import annotations

__all__ = ["TemperedDensity", "Terms", "Values", "state_of"]

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform
from torch.func import jacrev, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_permutations.infer.given_values import GivenValues
from pyro_permutations.infer.permutation_sites import permutation_prior

Values = dict[str, Tensor]
# The largest problem whose second derivatives are kept: so many cells in all.
CELLS_WITH_CURVATURE = 1024
# torch.func.vmap makes every operation about three times as slow as autograd alone.
WORTH_VMAP = 3


class Terms(NamedTuple):
    """Log density of R states: ``fixed + beta * tempered``, and the gradients of both.

    ``fixed`` are the priors of continuous sites, which stay proper when the rest is
    tempered; the rest is ``tempered``, up to a constant.
    """

    fixed: Tensor  # (R,)
    tempered: Tensor  # (R,)
    fixed_gradient: Values  # of shape (R, *batch, n, m); {} if it is zero
    tempered_gradient: Values


class TemperedDensity:
    """The log density of a model as a function of its latent values.

    The model runs once to see its sites, and a few times more to find the cheapest way
    to evaluate several states: recorded once as plain tensor operations; or run anew,
    but for all of them at once, under :func:`torch.func.vmap`; or one after the other.
    A way is taken only if it gives the numbers of the last one at states that it was
    not recorded at; a model with control flow that depends on its values does not
    record.

    Args:
        model: The model, with its arguments bound.
        trace: A trace of it with all sites.

    Raises:
        NotImplementedError: If the model subsamples a plate.
        ValueError: If it has no latent permutation, or another discrete latent site,
            or observes a permutation that is none.
    """

    def __init__(self, model: Callable[[], Any], trace: Any) -> None:
        self.model = model
        self.priors: dict[str, Any] = {}
        self.transforms: dict[str, Transform] = {}
        for name, site in trace.iter_stochastic_nodes():
            fn = site["fn"]
            if isinstance(fn, _Subsample):
                if fn.subsample_size is not None and fn.subsample_size < fn.size:
                    raise NotImplementedError(
                        f"plate {name!r} is subsampled: MCMC needs the density of the "
                        "whole data. Drop subsample_size."
                    )
            elif (prior := permutation_prior(fn)) is not None:
                self.priors[name] = prior
            elif fn.support.is_discrete:
                raise ValueError(
                    f"site {name!r} is discrete, and no UniformPermutation or "
                    "GibbsMatching: sum it out in the model, or condition on it."
                )
            else:
                self.transforms[name] = biject_to(fn.support)
        for name in trace.observation_nodes:
            fn, value = trace.nodes[name]["fn"], trace.nodes[name]["value"]
            prior = permutation_prior(fn)
            if prior is not None and not prior.support.check(value).all():
                raise ValueError(
                    f"site {name!r} is observed as what is no permutation matrix that "
                    "its prior allows."
                )
        if not self.priors:
            raise ValueError(
                "the model has no latent permutation: no sample site has a "
                "GibbsMatching or UniformPermutation that is not observed."
            )
        self.evaluation = "one by one"
        self._both = False  # do fixed terms depend on P?
        self._normalized: set[str] = set()  # sites whose permanent changes
        self._evaluate: Callable[[Values, Values], Any] = self._one_by_one

    def prepare(
        self,
        P: Values,  # R states, by site
        free: Values,  # unconstrained values of the continuous sites, R each
        other: Values,  # R more states
    ) -> None:
        """Check that the density is differentiable in P, and choose how to evaluate."""
        self._look_at_gradients(P, free)
        right = [self._one_by_one(P, free), self._one_by_one(other, free)]
        ways = {"recorded": self._recorded(P, free), "vmap": self._vectorized}
        few = len(right[0][0]) < WORTH_VMAP
        for name, way in ways.items():
            if way is None or (name == "vmap" and few):
                continue
            try:
                found = [way(P, free), way(other, free)]
            except Exception:  # whatever a model does that vmap does not know
                continue
            if all(map(_agree, found, right)):
                self._evaluate, self.evaluation = way, name
                return

    def __call__(self, P: Values, free: Values) -> Terms:
        """Log densities and gradients of R states."""
        with torch.no_grad():
            return Terms(*self._evaluate(P, free))

    def log_density(self, P: Values, free: Values, beta: Tensor) -> Tensor:
        """Tempered log density of R states, (R,), with autograd to ``free``."""
        if self.evaluation != "one by one" and len(beta) >= WORTH_VMAP:
            with pyro.validation_enabled(False):
                fixed, tempered = vmap(self._terms)(P, free)
        else:
            parts = [
                {name: x[r] for name, x in values.items()}
                for r in range(len(beta))
                for values in (P, free)
            ]
            each = map(self._terms, parts[::2], parts[1::2])
            fixed, tempered = (torch.stack(x) for x in zip(*each, strict=True))
        return fixed + beta * tempered

    def curvature(self, P: Values, free: Values) -> dict[str, Tensor | None]:
        """Second derivatives of the tempered part at one state, by site.

        Those of the cells of one matrix of a batch with each other, of shape
        ``(B, n m, n m)``; None where they are zero, too many, or do not exist.
        """
        found: dict[str, Tensor | None] = {}
        for name, value in P.items():
            found[name] = None
            n, m = value.shape[-2:]
            if value.numel() > CELLS_WITH_CURVATURE:
                continue

            def tempered(x: Tensor, name: str = name) -> Tensor:
                return self._terms({**P, name: x.view(P[name].shape)}, free)[1]

            gradient = jacrev(tempered)
            try:
                with pyro.validation_enabled(False):  # checks look at values
                    full = jacrev(gradient, chunk_size=64)(value.reshape(-1))
            except Exception:  # an operation without a second derivative
                continue
            full = full.detach().unflatten(-1, (-1, n * m)).unflatten(0, (-1, n * m))
            block = full.diagonal(dim1=0, dim2=2).movedim(-1, 0)
            if block.isfinite().all() and block.any():
                found[name] = block
        return found

    def _terms(
        self, P: Values, free: Values, given: GivenValues | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fixed and tempered part at one state."""
        given = given or GivenValues(self._normalized)
        given.values = dict(P)
        fixed: Any = 0.0
        for name, x in free.items():
            given.values[name] = self.transforms[name](x)
            jacobian = self.transforms[name].log_abs_det_jacobian(x, given.values[name])
            fixed = fixed + jacobian.sum()
        with given:
            trace = poutine.trace(self.model).get_trace()
        trace.compute_log_prob(_counts)
        tempered: Any = 0.0
        for name, site in trace.nodes.items():
            if name in free:
                fixed = fixed + site["log_prob_sum"]
            elif "log_prob_sum" in site:
                tempered = tempered + site["log_prob_sum"]
        zero = next(iter(P.values())).new_zeros(())
        return zero + fixed, zero + tempered

    def _single(self, P: Values, free: Values) -> tuple[Any, ...]:
        (fixed, tempered), pull = vjp(  # type: ignore[misc]
            lambda x: self._terms(x, free), P
        )
        one, zero = torch.ones_like(tempered), torch.zeros_like(tempered)
        first = pull((one, zero))[0] if self._both else {}
        return fixed, tempered, first, pull((zero, one))[0]

    def _by_autograd(self, P: Values, free: Values) -> tuple[Any, ...]:
        """The same with nothing but autograd, for models that torch.func refuses."""
        inputs = [x.requires_grad_() for x in P.values()]
        with torch.enable_grad():
            fixed, tempered = self._terms(P, free)

        def gradient(part: Tensor) -> Values:
            if not part.requires_grad:
                return {name: torch.zeros_like(x) for name, x in P.items()}
            found = torch.autograd.grad(
                part, inputs, retain_graph=True, materialize_grads=True
            )
            return dict(zip(P, found, strict=True))

        first = gradient(fixed) if self._both else {}
        return fixed.detach(), tempered.detach(), first, gradient(tempered)

    def _one_by_one(self, P: Values, free: Values) -> tuple[Any, ...]:
        count = len(next(iter(P.values())))
        each = [self._by_autograd(*state_of(P, free, r)) for r in range(count)]
        fixed, tempered, *gradients = zip(*each, strict=True)
        stacked = (
            {name: torch.stack([x[name] for x in part]) for name in part[0]}
            for part in gradients
        )
        return torch.stack(fixed), torch.stack(tempered), *stacked

    def _recorded(self, P: Values, free: Values) -> Callable[..., Any] | None:
        """The evaluation of all states as a graph of tensor operations."""
        names, others = list(P), list(free)

        def flat(*values: Tensor) -> list[Tensor]:
            states = dict(zip([*names, *others], values, strict=True))
            P, free = ({k: states[k] for k in keys} for keys in (names, others))
            fixed, tempered, *gradients = vmap(self._single)(P, free)
            found = [g[name] for g in gradients for name in names if g]
            return [fixed, tempered, *found]

        try:
            with pyro.validation_enabled(False):  # checks look at values
                graph = make_fx(flat)(*P.values(), *free.values())
        except Exception:  # control flow on values, NumPy, ...
            return None
        graph.graph.eliminate_dead_code()
        graph.recompile()

        def evaluate(P: Values, free: Values) -> tuple[Any, ...]:
            values = [P[name] for name in names] + [free[name] for name in others]
            fixed, tempered, *found = graph(*values)
            first = dict(zip(names, found, strict=False)) if self._both else {}
            second = dict(zip(names, found[-len(names) :], strict=True))
            return fixed, tempered, first, second

        return evaluate

    def _vectorized(self, P: Values, free: Values) -> tuple[Any, ...]:
        with pyro.validation_enabled(False):
            return tuple(vmap(self._single)(P, free))

    def _look_at_gradients(self, P: Values, free: Values) -> None:
        """See what depends on what; raise if the density hides how it depends on P."""
        one, rest = state_of(P, free, 0)
        for value in (*one.values(), *rest.values()):
            value.requires_grad_()
        given = GivenValues(self._normalized, hide=True)
        with torch.enable_grad():
            parts = self._terms(one, rest, given)
        self._normalized = given.dependent
        known = set()
        for part, title in zip(parts, ("fixed", "tempered"), strict=True):
            if part.requires_grad:
                inputs = list(one.values())
                found = torch.autograd.grad(
                    part, inputs, retain_graph=True, allow_unused=True
                )
                names = {k for k, g in zip(one, found, strict=True) if g is not None}
                known |= names
                self._both |= title == "fixed" and bool(names)
        for name in set(P) - known:
            with torch.no_grad():
                values = [
                    torch.stack(self._terms({**one, name: x}, rest, given))
                    for x in P[name]
                ]
            change = (torch.stack(values) - values[0]).abs().max()
            if change > 1e-6 * (1 + values[0].abs().max()):
                raise ValueError(
                    f"the log density changes with {name!r} but has no gradient with "
                    f"respect to it: the model must use {name} in differentiable "
                    "operations, such as P @ x in place of x[to_indices(P)]."
                )


def state_of(P: Values, free: Values, r: int) -> tuple[Values, Values]:
    """One of R states."""
    return {k: x[r].clone() for k, x in P.items()}, {
        k: x[r].clone() for k, x in free.items()
    }


def _counts(_: str, site: Any) -> bool:
    return not (
        isinstance(site["fn"], _Subsample) or site["infer"].get("_deterministic")
    )


def _agree(found: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Whether two ways give the same terms, up to rounding."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(y, dict):
            return all(same(x[name], y[name]) for name in y)
        bound = torch.finfo(y.dtype).eps ** 0.5
        return bool(torch.allclose(x, y, rtol=bound, atol=bound, equal_nan=True))

    return all(map(same, found, right))
