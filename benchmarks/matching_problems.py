# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Matching problems whose posterior is known, batches of them, and how they are fitted.

A problem is a log likelihood of permutation matrices, differentiable in them, for a
batch of repetitions side by side, with a uniform prior; its exact law is listed. The
scripts beside this one import it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_permutations import (
    DiscreteKL_ELBO,
    GumbelSinkhorn,
    UniformPermutation,
    matching,
    to_indices,
)


@dataclass
class Problem:
    """A batch of R problems of n items."""

    repetitions: int
    items: int
    log_likelihood: Callable[[Tensor], Tensor]  # (*lead, R, n, n) -> (*lead, R)

    def exact(self) -> tuple[Tensor, Tensor]:  # (R, n!), (R, n, n)
        """The posterior of all permutations, in order, and its marginals."""
        every = all_permutations(self.items)
        score = torch.cat([self.log_likelihood(P[:, None]) for P in every.split(5000)])
        law = score.softmax(0).mT
        return law, torch.einsum("rk,kij->rij", law, every)


# %% Problems
def noisy_points(repetitions: int, sigma: float, seed: int) -> Problem:
    """Six points in the plane, from N(0, I), seen in another order with noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (repetitions, 6, 2)
    points = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    order = torch.rand(repetitions, 6, generator=generator).argsort(-1)
    seen = points.gather(1, order[..., None].expand(shape)) + sigma * noise

    def log_likelihood(P: Tensor) -> Tensor:
        return dist.Normal(P @ points, sigma).log_prob(seen).sum((-2, -1))

    return Problem(repetitions, 6, log_likelihood)


def two_item_odds(probabilities: Tensor) -> Problem:
    """Two items, with given probabilities of the identity."""
    odds = torch.logit(probabilities.double())
    return Problem(len(odds), 2, lambda P: P[..., 0, 0] * odds)


def gibbs_targets(repetitions: int, items: int, scale: float, seed: int) -> Problem:
    """Posteriors exp<X, P> with random scores X."""
    generator = torch.Generator().manual_seed(seed)
    shape = (repetitions, items, items)
    X = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Problem(repetitions, items, lambda P: (P * X).sum((-2, -1)))


def one_doubtful_pair(items: int, probability: float) -> Problem:
    """All items are certain but two, which keep their places with this probability."""
    X = 12 * torch.eye(items, dtype=torch.float64)
    swap = (math.log(1 / probability - 1) + 24) / 2  # twice this is lost and gained
    X[0, 1] = X[1, 0] = swap
    return Problem(1, items, lambda P: (P * X).sum((-2, -1)))


# %% Fits
def fit_discrete_kl(
    problem: Problem, *, particles: int = 64, steps: int = 200, rate: float = 0.2
) -> GumbelSinkhorn:
    """Discrete-KL SVI: the particles are the draws of the guide's marginals, too.

    The temperature falls from .5 to .05 over the first half of the steps, so that the
    better one of two distant matchings is found; the step length falls in the second.
    What is left of the noise of a probability goes with the square root of the rate
    over the number of particles.
    """

    def model(temperature: float) -> None:
        with pyro.plate("problems", problem.repetitions):
            P = pyro.sample("P", UniformPermutation(problem.items))
            pyro.factor("likelihood", problem.log_likelihood(P))

    elbo = DiscreteKL_ELBO(
        num_particles=particles,
        vectorize_particles=True,
        max_plate_nesting=1,
        marginal_samples=particles,
    )
    return _trained(problem, model, elbo, (0.5, 0.05), steps, rate)


def fit_relaxed(
    problem: Problem, *, particles: int = 16, steps: int = 200, temperature: float = 0.2
) -> GumbelSinkhorn:
    """SVI with a Gumbel-Sinkhorn prior and guide at one temperature."""

    def model(temperature: float) -> None:
        zero = torch.zeros(problem.items, problem.items, dtype=torch.float64)
        with pyro.plate("problems", problem.repetitions):
            P = pyro.sample("P", GumbelSinkhorn(zero, temperature))
            pyro.factor("likelihood", problem.log_likelihood(P))

    elbo = Trace_ELBO(
        num_particles=particles, vectorize_particles=True, max_plate_nesting=1
    )
    return _trained(problem, model, elbo, (temperature, temperature), steps, 0.2)


def _trained(
    problem: Problem,
    model: Callable[[float], None],
    elbo: Trace_ELBO,
    temperatures: tuple[float, float],
    steps: int,
    rate: float,
) -> GumbelSinkhorn:
    shape = (problem.repetitions, problem.items, problem.items)

    def guide(temperature: float) -> None:
        logits = pyro.param("logits", torch.zeros(shape, dtype=torch.float64))
        with pyro.plate("problems", problem.repetitions):
            pyro.sample("P", GumbelSinkhorn(logits, temperature))

    pyro.clear_param_store()
    optimiser = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": rate},
            "lr_lambda": lambda step: min(1.0, 2 * (1 - step / steps)),
        }
    )
    svi = SVI(model, guide, optimiser, elbo)
    first, last = temperatures
    for step in range(steps):
        svi.step(first * (last / first) ** min(1.0, 2 * step / steps))
        optimiser.step()
    return GumbelSinkhorn(pyro.param("logits").detach(), last)


# %% What came out
def all_permutations(n: int) -> Tensor:  # (n!, n, n)
    """Permutation matrices in lexicographic order."""
    perm = torch.tensor(list(itertools.permutations(range(n))))
    return torch.eye(n, dtype=torch.float64)[perm]


def law_of_draws(guide: GumbelSinkhorn, draws: int) -> Tensor:  # (R, n!)
    """Frequencies of permutations, in order, among hard draws."""
    repetitions, n, _ = guide.logits.shape
    counts = torch.zeros(repetitions, math.factorial(n), dtype=torch.float64)
    for start in range(0, draws, 1000):
        size = min(1000, draws - start)
        noise = torch.empty(size, *guide.logits.shape, dtype=torch.float64)
        scores = guide.logits - noise.exponential_().log()
        rank = lexicographic_rank(to_indices(matching(scores)))  # (size, R)
        counts.scatter_add_(1, rank.mT, torch.ones_like(rank.mT, dtype=counts.dtype))
    return counts / draws


def lexicographic_rank(perm: Tensor) -> Tensor:  # (*lead, n) -> (*lead,)
    """The place of a permutation among all."""
    n = perm.shape[-1]
    smaller = perm[..., None, :] < perm[..., :, None]  # of those that come later
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    weight = torch.tensor([math.factorial(n - 1 - i) for i in range(n)])
    return ((smaller & later).sum(-1) * weight).sum(-1)


def bhattacharyya(p: Tensor, q: Tensor) -> Tensor:  # (*batch, k) -> (*batch,)
    """Minus the log of the sum of sqrt(p q)."""
    return -(p * q).sqrt().sum(-1).log()


def total_variation(a: Tensor, b: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch,)
    """Of marginals, row by row, and the mean over rows."""
    return 0.5 * (a - b).abs().sum(-1).mean(-1)
