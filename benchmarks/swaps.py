# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""InformedSwaps beside enumeration, and beside swaps that are drawn uniformly.

    pip install -e .
    python benchmarks/swaps.py --quick    # three minutes
    python benchmarks/swaps.py            # two hours on one core

1. Marginals of problems with known truth: four chains, pooled, with the default
   replicas, against all n! permutations. The error is the mean over rows of half the
   sum of absolute differences (total variation). A line MISSES if its mean over seeds
   exceeds .02, or its worst .04. The two-mode problem is shown once more with a single
   replica, which stays in the mode where it starts.

2. Effective samples per second in a matching of two sets of 20 points in the plane: y
   from N(0, I), x_i = y_perm(i) + N(0, .25^2 I). The uniform chain draws two rows and
   accepts their swap on the same Pyro model, whose density it evaluates without a
   gradient. Both start at the nearest matching and run for the same time. The line
   MISSES if the informed swaps have less than five times as many, by the median over
   the rows that change.

The exit status is the number of lines that miss.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_permutations import (
    GibbsMatching,
    InformedSwaps,
    UniformPermutation,
    matching,
    mixing,
    to_indices,
    to_matrix,
)

MEAN, WORST = 0.02, 0.04  # of the error of the marginals
FASTER = 5.0  # times as many effective samples per second
CHAINS = 4
MISSED: list[str] = []


class Problem(NamedTuple):
    """A model of one n x n permutation P, and log p(P, data) up to a constant."""

    n: int
    model: Callable[[], Any]
    log_joint: Callable[[Tensor], Tensor]  # (k, n, n) -> (k,)


# %% Problems
def gaussian(n: int, sigma: float) -> Problem:
    """Which point of y does each point of x come from?"""
    y = torch.randn(n, 2)
    x = y[torch.randperm(n)] + sigma * torch.randn(n, 2)

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(n))
        with pyro.plate("points", n):
            pyro.sample("x", dist.Normal(P @ y, sigma).to_event(1), obs=x)

    def log_joint(P: Tensor) -> Tensor:
        return dist.Normal(P @ y, sigma).log_prob(x).sum((-1, -2))

    return Problem(n, model, log_joint)


def two_modes() -> Problem:
    """Places on a line from noisy distances: as likely as their mirror image."""
    place = torch.tensor([0.0, 1.0, 3.0, 4.0])
    distance = (place[:, None] - place).abs()
    perm = torch.randperm(4)
    seen = distance[perm][:, perm] + 0.3 * torch.randn(4, 4)

    def likelihood(P: Tensor) -> dist.Distribution:
        return dist.Normal(P @ distance @ P.mT, 0.3).to_event(2)

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(4))
        pyro.sample("seen", likelihood(P), obs=seen)

    return Problem(4, model, lambda P: likelihood(P).log_prob(seen))


def mallows(n: int = 5, rankers: int = 8, theta: float = 0.3) -> Problem:
    """The consensus of several rankings, by Spearman's footrule."""
    ranks = torch.stack([torch.randperm(n) for _ in range(rankers)])
    cost = (
        (ranks[:, :, None] - torch.arange(n)).abs().sum(0).to(torch.get_default_dtype())
    )

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(n))
        pyro.factor("rankings", -theta * (P * cost).sum())

    return Problem(n, model, lambda P: -theta * (P * cost).sum((-1, -2)))


def gibbs(n: int, scale: float) -> Problem:
    """A Gibbs law with random scores."""
    X = scale * torch.randn(n, n)

    def model() -> None:
        pyro.sample("P", GibbsMatching(X))

    return Problem(n, model, lambda P: (P * X).sum((-1, -2)))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "two modes, n = 4": two_modes,
    "Mallows, n = 5": mallows,
}
for sigma in (0.1, 0.25, 0.5, 0.75):
    PROBLEMS[f"Gaussian, n = 6, sigma {sigma}"] = partial(gaussian, 6, sigma)
for n, scale in itertools.product((6, 8), (1, 2, 4)):
    PROBLEMS[f"Gibbs, n = {n}, scale {scale}"] = partial(gibbs, n, scale)


# %% 1. Marginals
def run(kernel: MCMCKernel, steps: int, start: Tensor | None = None) -> Tensor:
    """Samples of one chain, after a tenth of them as warm-up."""
    initial = None if start is None else {"P": start}
    mcmc = MCMC(
        kernel, steps, max(steps // 10, 1), initial_params=initial, disable_progbar=True
    )
    mcmc.run()
    return mcmc.get_samples()["P"]


def error_of(problem: Problem, steps: int, replicas: int) -> float:
    """Total variation of the pooled marginals, mean over rows."""
    listed = torch.tensor(list(itertools.permutations(range(problem.n))))
    matrices = to_matrix(listed)
    weight = problem.log_joint(matrices).softmax(0)
    exact = (weight[:, None, None] * matrices).sum(0)
    chains = [
        run(InformedSwaps(problem.model, replicas=replicas), steps).mean(0)
        for _ in range(CHAINS)
    ]
    found = torch.stack(chains).mean(0)
    return float((found - exact).abs().sum(-1).mean() / 2)


def marginals(only: str, steps: int, seeds: int) -> None:
    """(1) Every problem against enumeration."""
    print(f"\n1. Total variation of the marginals, {CHAINS} chains of {steps} steps")
    print(f"{'problem':<30}{'mean':>8}{'worst':>8}{'us a step':>11}")
    for name, make in PROBLEMS.items():
        if only not in name:
            continue
        for replicas in (4, 1) if name.startswith("two modes") else (4,):
            errors, begin = [], time.perf_counter()
            for seed in range(seeds):
                pyro.set_rng_seed(seed)
                errors.append(error_of(make(), steps, replicas))
            cost = (time.perf_counter() - begin) / (1.1 * steps * CHAINS * seeds)
            mean, worst = sum(errors) / seeds, max(errors)
            missed = replicas > 1 and (mean > MEAN or worst > WORST)
            title = name if replicas > 1 else f"{name}, one replica"
            text = f"{title:<30}{mean:>8.4f}{worst:>8.4f}{1e6 * cost:>11.0f}"
            if missed:
                MISSED.append(name)
            print(text + ("  MISSES" if missed else ""), flush=True)


# %% 2. Effective samples per second
class UniformSwaps(MCMCKernel):
    """Metropolis: swap two rows at random, accept on the density of the model."""

    transforms: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: Callable[[], Any]) -> None:
        self.model = model

    def density(self, perm: Tensor) -> Tensor:
        """Log density of the model but for the prior, which is flat."""
        given = poutine.condition(self.model, {"P": to_matrix(perm)})
        trace = poutine.trace(given).get_trace()
        return trace.log_prob_sum(lambda name, site: name != "P")

    def setup(self, warmup_steps: int) -> None:
        """Evaluate the start."""
        self.current = self.density(self.perm)

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """The state."""
        return {"P": to_matrix(self.perm)}

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self.perm = to_indices(params["P"])

    @torch.no_grad()
    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One swap."""
        i, k = torch.randperm(len(self.perm))[:2]
        new = self.perm.clone()
        new[i], new[k] = self.perm[k], self.perm[i]
        density = self.density(new)
        if torch.rand(()).log() < density - self.current:
            self.perm, self.current = new, density
        return {"P": to_matrix(self.perm)}


def per_second(
    make: Callable[[], MCMCKernel], start: Tensor, seconds: float
) -> tuple[float, float, float]:
    """Effective samples per second, median and least over rows, and steps a second."""
    begin = time.perf_counter()
    run(make(), 300, start)
    rate = 330 / (time.perf_counter() - begin)
    steps = max(int(rate * seconds / 2), 200)
    begin = time.perf_counter()
    chains = torch.stack([run(make(), steps, start) for _ in range(2)])
    spent = time.perf_counter() - begin
    size = mixing(chains).effective_size
    size = size[~size.isnan()]
    return float(size.median()) / spent, float(size.min()) / spent, 2 * steps / spent


def efficiency(seconds: float, seeds: int, n: int = 20, sigma: float = 0.25) -> None:
    """(2) Informed against uniform swaps."""
    print(f"\n2. Effective samples per second, Gaussian, n = {n}, sigma {sigma},")
    print(f"median over rows (least), {seconds:.0f} s for each; means of {seeds} seeds")
    kinds: dict[str, Callable[..., MCMCKernel]] = {
        "uniform swaps": UniformSwaps,
        "informed, 1 replica": partial(InformedSwaps, replicas=1),
        "informed, 4 replicas": InformedSwaps,
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
    for seed in range(seeds):
        pyro.set_rng_seed(seed)
        y = torch.randn(n, 2)
        perm = torch.randperm(n)
        x = y[perm] + sigma * torch.randn(n, 2)

        def model(x: Tensor = x, y: Tensor = y) -> None:
            P = pyro.sample("P", UniformPermutation(n))
            with pyro.plate("points", n):
                pyro.sample("x", dist.Normal(P @ y, sigma).to_event(1), obs=x)

        start = matching(-torch.cdist(x, y).square())
        for name, make in kinds.items():
            kernel = partial(make, model)
            found[name].append(per_second(kernel, start, seconds))
    print(f"{'':<22}{'median':>9}{'least':>9}{'steps/s':>9}{'times uniform':>15}")
    base = 0.0
    for name, rows in found.items():
        median, least, rate = torch.tensor(rows).mean(0).tolist()
        base = base or median
        missed = name != "uniform swaps" and median < FASTER * base
        text = (
            f"{name:<22}{median:>9.1f}{least:>9.1f}{rate:>9.0f}{median / base:>15.1f}"
        )
        if missed:
            MISSED.append(name)
        print(text + ("  MISSES" if missed else ""), flush=True)


def main() -> None:
    """Read the command line, print the tables."""
    parser = argparse.ArgumentParser(description="InformedSwaps beside the truth.")
    parser.add_argument("--only", default="", help="problems whose name has this")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short chains, one seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    begin = time.perf_counter()
    if not args.only:
        efficiency(*((10.0, 1) if args.quick else (40.0, args.seeds)))
    marginals(args.only, *((2000, 1) if args.quick else (20_000, args.seeds)))
    print(f"\n{len(MISSED)} lines miss, {time.perf_counter() - begin:.0f} s")
    sys.exit(len(MISSED))


if __name__ == "__main__":
    main()
