# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""An MCMC kernel for the discrete permutations of a model: swaps by its gradient."""

from __future__ import annotations

__all__ = ["InformedSwaps"]

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.infer.mcmc import NUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_permutations.carried_log import log_of
from pyro_permutations.distributions.gibbs_matching import GibbsMatching
from pyro_permutations.infer.matching_space import MatchingSpace
from pyro_permutations.infer.permutation_sites import permutation_prior
from pyro_permutations.infer.swap_chain import SwapChain
from pyro_permutations.infer.tempered_density import TemperedDensity, Values
from pyro_permutations.matching import matching

FIRST_RATES = 16  # steps before the rates of exchange say anything
STARTS = 100  # how many states are tried before none is said to be possible


class InformedSwaps(MCMCKernel):
    r"""Sample the discrete permutations of a model as it stands, for Pyro's ``MCMC``.

    One gradient of the log density :math:`f` with respect to P scores all swaps of two
    rows at once; a swap D is proposed with probability

    .. math:: q(P + D \mid P) \propto \exp(\delta / 2), \qquad
        \delta = \langle \nabla f(P), D \rangle + \tfrac12 \langle D, H D \rangle

    and accepted, with the gradient at the new state, on the exact density of the
    discrete model. So the chain has the posterior as its limit however rough
    :math:`\delta` is, and mixes well where it is good: with the second derivatives H,
    averaged over a few states of the warm-up, it is exact for likelihoods that are
    quadratic in P. H is left out for more than 1024 cells in all.

    Where rows or columns may stay unmatched, moves of one row to an unused column, or
    to none, are scored with the swaps. A tenth of the steps propose a cycle of any
    length, in which each row takes the column of the next, so that all matchings that
    a mask allows are reached; another tenth propose a swap at random.

    All sites that have a ``GibbsMatching`` or ``UniformPermutation`` and are not
    observed are sampled, with their plates. All other latent sites must be continuous,
    and take turns with them: a sample is then as many moves as there are rows, or one
    less, and one step of a kernel of Pyro's given the permutations. Without them it is
    one move, or one time in ten none.

    Several replicas of the chain run side by side at temperatures of their own, adapted
    in the warm-up, and exchange their states: this is what finds further modes. All
    are evaluated by one call where the model allows it (see ``evaluation`` in the
    diagnostics), so they cost little for small problems; where one evaluation takes
    long, as with hundreds of items, set ``replicas=1``.

    Samples are 0/1 matrices of the shapes of the model, exact in the limit. How far the
    run is from that, :func:`~pyro_permutations.mixing` tells from the samples of
    several chains. Use ``StreamingMCMC`` where they do not fit into memory. Densities
    are compared in the type of the model: use float64 where they are large, as float32
    loses changes below a ten-millionth of them.

    Args:
        model: The model, with a likelihood that is differentiable in P. It is not
            changed.
        guide: Start from draws of this guide, whose arguments are those of the model:
            a soft draw at the best matching of its log. Without it, start at random.
        continuous: Makes the kernel for the continuous sites from a ``potential_fn``:
            ``NUTS``, ``functools.partial(HMC, step_size=0.1, num_steps=5)``, or None
            to hold them fixed where they start.
        replicas: Number of temperatures; 1 is no tempering.

    Raises:
        ValueError: By ``setup``, when sampling starts: if the model has no latent
            permutation, or another discrete latent site; if its density changes with a
            permutation without having a gradient; or if no state of finite density is
            found.
        NotImplementedError: By ``setup``, if a plate is subsampled.

    References:
        Zanella, "Informed proposals for local MCMC in discrete spaces" (2020),
        https://arxiv.org/abs/1711.07424. Grathwohl, Swersky, Hashemi, Duvenaud and
        Maddison, "Oops I took a gradient: scalable sampling for discrete
        distributions" (2021), https://arxiv.org/abs/2102.04509. Syed, Bouchard-Côté,
        Deligiannidis and Doucet, "Non-reversible parallel tempering" (2022),
        https://arxiv.org/abs/1905.02939.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro.infer import MCMC
        >>> from pyro_permutations import UniformPermutation
        >>> y = torch.tensor([0.0, 1.0, 2.0])
        >>> def model(x):
        ...     P = pyro.sample("P", UniformPermutation(3))
        ...     pyro.sample("x", dist.Normal(P @ y, 0.5).to_event(1), obs=x)
        >>> kernel = InformedSwaps(model)
        >>> mcmc = MCMC(kernel, num_samples=500, warmup_steps=50, disable_progbar=True)
        >>> mcmc.run(torch.tensor([1.9, 0.1, 1.0]))
        >>> mcmc.get_samples()["P"].mean(0).argmax(-1)
        tensor([2, 0, 1])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        guide: Callable[..., Any] | None = None,
        continuous: Callable[..., MCMCKernel] | None = NUTS,
        replicas: int = 4,
    ) -> None:
        super().__init__()
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas}.")
        self.model, self.guide = model, guide
        self.continuous, self.replicas = continuous, replicas
        # Samples are in the space of the model, so MCMC has nothing to transform.
        self.transforms: dict[str, Any] = {}
        self._initial: Values = {}
        self._kernel: MCMCKernel | None = None
        self._last: dict[str, Any] = {}
        self._running = False

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Run the model to see its sites, and start R replicas."""
        model = partial(self.model, *args, **kwargs)
        guide = None if self.guide is None else partial(self.guide, *args, **kwargs)
        density = TemperedDensity(model, self._start(model, guide))
        spaces = {
            name: MatchingSpace.of(prior.graph, prior.batch_shape)
            for name, prior in density.priors.items()
        }
        for _ in range(STARTS):
            P, free = self._states(density, model, guide)
            self._take_given(density, P, free)
            terms = density(P, free)
            if (terms.fixed + terms.tempered).isfinite().all():
                break
        else:
            raise ValueError(
                f"the model's density is not finite at any of {STARTS} starting states."
                " Give a guide or initial_params where it is."
            )
        density.prepare(P, free, self._states(density, model, None)[0])
        self._chain = SwapChain(density, spaces, P, free)
        rows = sum(x[0].numel() for x in self._chain.column.values())
        self._kernel, self._running = None, True
        if free and self.continuous is not None:
            self._kernel = self.continuous(potential_fn=self._potential)
            self._kernel.initial_params = free
            self._kernel.setup(warmup_steps)
        self._moves = 1 if self._kernel is None else rows
        self._warmup, self._time = warmup_steps, 0

    @property
    def initial_params(self) -> Values:
        """The present state, in the space of the model; set it to start elsewhere.

        Continuous sites are set by their unconstrained values, as for Pyro's kernels.
        """
        chain = self._chain
        values = {name: P[0] for name, P in chain.matrices().items()}
        for name, free in chain.free.items():
            values[name] = chain.density.transforms[name](free[0])
        return values

    @initial_params.setter
    def initial_params(self, params: Values) -> None:
        self._initial = dict(params)

    def sample(self, params: Values) -> Values:
        """Advance the chain, from its own state, and return the coldest replica."""
        del params
        chain = self._chain
        # Now and then one less: after an even number of swaps, all accepted, two items
        # would always be back where they were.
        less = torch.rand(()).item() < (0.1 if self._moves == 1 else 0.5)
        for _ in range(self._moves - less):
            chain.step()
        if self._kernel is not None:
            clear = getattr(self._kernel, "clear_cache", None)
            if clear is not None:  # the permutations have changed
                clear()
            chain.refresh(self._kernel.sample(chain.free))
        self._time += 1
        if self._time <= self._warmup and self._time & (self._time - 1) == 0:
            # At 1, 2, 4, ... steps: each time from as many as all before.
            chain.measure_curvature()
            if self._time >= FIRST_RATES:
                chain.adapt_ladder()
        if self._time == self._warmup:
            chain.reset_counts()
        return self.initial_params

    def logging(self) -> OrderedDict[str, str]:
        """What the progress bar shows."""
        shown = OrderedDict([("acc. rate", f"{self._chain.acceptance:.3f}")])
        if self._kernel is not None:
            for name, text in (self._kernel.logging() or {}).items():
                shown[f"continuous {name}"] = text
        return shown

    def diagnostics(self) -> dict[str, Any]:
        """Rates since the warm-up; ``MCMC.diagnostics()`` has them for every chain."""
        chain = self._chain
        found: dict[str, Any] = {
            "acceptance rate": chain.acceptance,
            "exchange rates": [1 - rate for rate in chain.ladder.rejection],
            "inverse temperatures": list(chain.ladder.beta),
            "evaluation": chain.density.evaluation,
            "second order": sorted(chain.curvature),
        }
        if self._kernel is not None:
            if self._running:  # after its cleanup Pyro's kernel has none
                self._last = self._kernel.diagnostics()
            found["continuous"] = self._last
        return found

    def cleanup(self) -> None:
        """Forget the given start."""
        self._initial, self._running = {}, False
        if self._kernel is not None:
            self._kernel.cleanup()

    # Where chains start

    def _start(
        self, model: Callable[[], Any], guide: Callable[[], Any] | None
    ) -> poutine.Trace:
        """A trace of the model with a feasible value at every latent site."""
        guess: Values = {}
        if guide is not None:
            for name, node in poutine.trace(guide).get_trace().nodes.items():
                if node["type"] == "sample":
                    guess[name] = torch.as_tensor(node["value"])

        def strategy(site: dict[str, Any]) -> Tensor:
            name, prior = site["name"], permutation_prior(site["fn"])
            if prior is None:
                if site["fn"].support.is_discrete:
                    return site["fn"].sample()  # type: ignore[no-any-return]
                value: Tensor = guess[name] if name in guess else init_to_uniform(site)
                return value
            if name not in guess:
                noise = torch.empty_like(prior.logits).exponential_()
                return _nearest(prior, prior.logits - noise.log())
            hard = bool(prior.support.check(guess[name]).all())
            return guess[name] if hard else _nearest(prior, log_of(guess[name]))

        with torch.no_grad(), InitMessenger(strategy):
            return poutine.trace(model).get_trace()

    def _states(
        self,
        density: TemperedDensity,
        model: Callable[[], Any],
        guide: Callable[[], Any] | None,
    ) -> tuple[Values, Values]:
        """R starting states, from the guide or at random."""
        traces = [self._start(model, guide) for _ in range(self.replicas)]

        def stack(name: str) -> Tensor:
            values = [torch.as_tensor(trace.nodes[name]["value"]) for trace in traces]
            return torch.stack(values).detach()

        P = {name: stack(name) for name in density.priors}
        free = {name: t.inv(stack(name)) for name, t in density.transforms.items()}
        return P, free

    def _take_given(self, density: TemperedDensity, P: Values, free: Values) -> None:
        """Put the initial values that were given in place, for all replicas."""
        for name, value in self._initial.items():
            if name in P:
                self._check(density.priors[name], name, value)
                P[name] = value.expand_as(P[name]).to(P[name])
            elif name in free:
                free[name] = value.expand_as(free[name]).to(free[name])
            else:
                raise ValueError(
                    f"initial_params has {name!r}, which is not a latent site of the "
                    f"model: it has {sorted([*P, *free])}."
                )

    @staticmethod
    def _check(prior: GibbsMatching, name: str, value: Tensor) -> None:
        if not prior.support.check(value).all():
            raise ValueError(
                f"initial_params[{name!r}] must be a permutation matrix that the mask "
                "allows, got another value. Pass a soft one through matching(...)."
            )

    def _potential(self, free: Values) -> Tensor:
        # One kernel for the product of the replicas, each at its own temperature.
        chain = self._chain
        density = chain.density.log_density(chain.matrices(), free, chain.beta)
        return -density.sum()


def _nearest(prior: GibbsMatching, scores: Tensor) -> Tensor:
    """The best matching of scores, of those that the prior allows."""
    return matching(scores, mask=prior.graph).to(prior.logits.dtype)
