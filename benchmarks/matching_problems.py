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
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, SVI, Trace_ELBO
from torch import Tensor

from pyro_permutations import (
    DiscreteKL_ELBO,
    GumbelSinkhorn,
    InformedSwaps,
    UniformPermutation,
    matching,
    to_indices,
)

LISTED = 6  # items


@dataclass
class Problem:
    """A batch of R problems of n items: data, and how likely they make a matching."""

    data: tuple[Tensor, ...]  # (R, *shape) each
    items: int
    likelihood: Callable[..., Tensor]  # P (*lead, R, n, n), *data -> (*lead, R)

    def __getitem__(self, r: int) -> Problem:
        """A batch of one of them."""
        return replace(self, data=tuple(x[r : r + 1] for x in self.data))

    @property
    def repetitions(self) -> int:
        """The number R."""
        return len(self.data[0])

    def log_likelihood(self, P: Tensor) -> Tensor:  # (*lead, R, n, n) -> (*lead, R)
        """The log likelihood of matchings, differentiable in them."""
        return self.likelihood(P, *self.data)

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

    def likelihood(P: Tensor, points: Tensor, seen: Tensor) -> Tensor:
        return dist.Normal(P @ points, sigma).log_prob(seen).sum((-2, -1))

    return Problem((points, seen), 6, likelihood)


def two_item_odds(probabilities: Tensor) -> Problem:
    """Two items, with given probabilities of the identity."""
    odds = torch.logit(probabilities.double())
    return Problem((odds,), 2, lambda P, odds: P[..., 0, 0] * odds)


def mirror_images(repetitions: int, seed: int) -> Problem:
    """Four places on a line from their noisy distances: two modes, equally likely."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64)
    distance = (place[:, None] - place).abs()
    order = torch.rand(repetitions, 4, generator=generator).argsort(-1)
    noise = torch.randn(repetitions, 4, 4, generator=generator, dtype=torch.float64)
    seen = distance[order[:, :, None], order[:, None]] + 0.3 * noise

    def likelihood(P: Tensor, seen: Tensor) -> Tensor:
        return dist.Normal(P @ distance @ P.mT, 0.3).log_prob(seen).sum((-2, -1))

    return Problem((seen,), 4, likelihood)


def mallows(repetitions: int, seed: int) -> Problem:
    """The order that ten rankings of five items scatter about, by the footrule."""
    theta, rankers, n = 0.3, 10, 5
    generator = torch.Generator().manual_seed(seed)
    perm = torch.tensor(list(itertools.permutations(range(n))))
    weight = (-theta * (perm - torch.arange(n)).abs().sum(-1).double()).exp()
    drawn = torch.multinomial(
        weight, repetitions * rankers, replacement=True, generator=generator
    )
    ranks = perm[drawn].reshape(repetitions, rankers, n)  # about the identity
    # Of putting item i in place j, the distance to all rankings.
    cost = (ranks[..., None] - torch.arange(n)).abs().sum(1).double()

    def likelihood(P: Tensor, cost: Tensor) -> Tensor:
        return -theta * (P * cost).sum((-2, -1))

    return Problem((cost,), n, likelihood)


def causal_orders(repetitions: int, seed: int) -> Problem:
    r"""The order of five variables, each a sum of those before it and noise.

    Every one depends on all before it, weights and noise are N(0, 1), and the weights
    are integrated out. With S the products of the variables in order, summed over ten
    observations, and L the Cholesky factor of S + I, the evidence of variable k given
    those before it is that of a Bayesian regression,

    .. math:: -\tfrac12 (L_{kk}^2 - 1) - \sum_{l < k} \log L_{ll},

    since L_kk^2 is a Schur complement, and the L_ll^2 are a determinant.
    """
    generator = torch.Generator().manual_seed(seed)
    n, observations = 5, 10
    weights = torch.randn(repetitions, n, n, generator=generator, dtype=torch.float64)
    noise = torch.randn(
        repetitions, observations, n, generator=generator, dtype=torch.float64
    )
    mixing = torch.eye(n, dtype=torch.float64) - weights.tril(-1)
    x = torch.linalg.solve_triangular(mixing, noise.mT, upper=False).mT
    order = torch.rand(repetitions, 1, n, generator=generator).argsort(-1)
    x = x.gather(-1, order.expand(x.shape))
    products = x.mT @ x

    def likelihood(P: Tensor, products: Tensor) -> Tensor:
        S = P @ products @ P.mT
        pivot = torch.linalg.cholesky(S + torch.eye(n, dtype=S.dtype))
        pivot = pivot.diagonal(dim1=-2, dim2=-1)
        later = torch.arange(n - 1, -1, -1, dtype=S.dtype)  # variables after each
        return -0.5 * pivot.square().sum(-1) - (later * pivot.log()).sum(-1)

    return Problem((products,), n, likelihood)


def gibbs_targets(repetitions: int, items: int, scale: float, seed: int) -> Problem:
    """Posteriors exp<X, P> with random scores X."""
    generator = torch.Generator().manual_seed(seed)
    shape = (repetitions, items, items)
    X = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Problem((X,), items, lambda P, X: (P * X).sum((-2, -1)))


def one_doubtful_pair(items: int, probability: float) -> Problem:
    """All items are certain but two, which keep their places with this probability."""
    X = 12 * torch.eye(items, dtype=torch.float64)
    swap = (math.log(1 / probability - 1) + 24) / 2  # twice this is lost and gained
    X[0, 1] = X[1, 0] = swap
    return Problem((X[None],), items, lambda P, X: (P * X).sum((-2, -1)))


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


def sample_swaps(problem: Problem, *, chains: int = 4, steps: int = 2000) -> Tensor:
    """Draws of informed swaps as indices, (chains * steps, n), of a batch of one."""

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(problem.items))
        pyro.factor("likelihood", problem.log_likelihood(P[None])[0])

    draws = []
    for _ in range(chains):
        mcmc = MCMC(
            InformedSwaps(model), steps, warmup_steps=steps // 10, disable_progbar=True
        )
        mcmc.run()
        draws.append(to_indices(mcmc.get_samples()["P"]))
    return torch.cat(draws)


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


def hard_draws(guide: GumbelSinkhorn, draws: int) -> Tensor:  # (draws, R, n)
    """Best matchings of noisy scores, as indices."""
    n = guide.logits.shape[-1]
    found = []
    for start in range(0, draws, 100):
        size = min(100, draws - start)
        noise = torch.empty(size, *guide.logits.shape, dtype=torch.float64)
        scores = guide.logits - noise.exponential_().log()
        if n <= LISTED:  # the product with all matrices is faster than solving
            every = all_permutations(n)
            totals = scores.flatten(-2).float() @ every.flatten(1).mT.float()
            found.append(to_indices(every)[totals.argmax(-1)])
        else:
            found.append(to_indices(matching(scores)))
    return torch.cat(found)


def law_of(perm: Tensor) -> Tensor:  # (draws, R, n) -> (R, n!)
    """Frequencies of permutations, in order, among draws."""
    rank = lexicographic_rank(perm).mT
    counts = torch.zeros(len(rank), math.factorial(perm.shape[-1]), dtype=torch.float64)
    counts.scatter_add_(1, rank, torch.ones_like(rank, dtype=counts.dtype))
    return counts / len(perm)


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
