# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The discrete KL of SVI: bias and noise of its estimate, and what training makes.

    python benchmarks/discrete_kl.py --quick    # five minutes
    python benchmarks/discrete_kl.py            # a quarter of an hour

First the divergence log n! - H_g(B) of a guide with random scores to the uniform law,
estimated from K draws in several ways, beside that of a million hard draws (for two
items in closed form); slopes beside those from the score of the noise, which is free of
bias. Then the noise of the gradient at an optimum. Then fits of problems with a known
posterior, beside SVI with a relaxed prior; a line MISSES if it is not within its bound,
and the exit status is the number of such lines.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable

import pyro
import torch
from matching_problems import (
    Problem,
    bhattacharyya,
    fit_discrete_kl,
    fit_relaxed,
    gibbs_targets,
    hard_draws,
    law_of,
    noisy_points,
    one_doubtful_pair,
    total_variation,
    two_item_odds,
)
from torch import Tensor

from pyro_permutations import (
    DiscreteKL_ELBO,
    GumbelSinkhorn,
    UniformPermutation,
    calibrated_entropy,
    matching,
    sinkhorn,
)

ODDS = torch.tensor([0.6, 0.75, 0.9, 0.982], dtype=torch.float64)
ODDS_BOUND = 0.03
# Noise of the points, and the largest mean Bhattacharyya distance.
POINTS = {0.1: 0.02, 0.25: 0.10, 0.5: 0.15, 0.75: 0.15}

# From logits (n, n) that require a gradient and a number of draws to the divergence.
Estimator = Callable[[Tensor, int], Tensor]


# %% Estimates of the divergence
def gumbel(draws: int, logits: Tensor) -> Tensor:
    """Noise of shape (draws, n, n)."""
    return -torch.empty(draws, *logits.shape, dtype=logits.dtype).exponential_().log()


def divergence(B: Tensor) -> Tensor:
    """To the uniform law, from marginals."""
    return math.lgamma(B.shape[-1] + 1) - calibrated_entropy(B)


def package(temperature: float) -> Estimator:
    """What DiscreteKL_ELBO does: hard draws, with the slope of relaxed ones."""

    def estimate(logits: Tensor, draws: int) -> Tensor:
        elbo = DiscreteKL_ELBO(marginal_samples=draws)
        return elbo.differentiable_loss(
            lambda: pyro.sample("P", UniformPermutation(len(logits))),
            lambda: pyro.sample("P", GumbelSinkhorn(logits, temperature)),
        )

    return estimate


def relaxed(temperature: float) -> Estimator:
    """Marginals of relaxed draws as they are."""

    def estimate(logits: Tensor, draws: int) -> Tensor:
        return divergence(sinkhorn(logits + gumbel(draws, logits), temperature).mean(0))

    return estimate


def jackknife(temperature: float) -> Estimator:
    """The package's, less the bias that leaving out one draw at a time shows."""

    def estimate(logits: Tensor, draws: int) -> Tensor:
        scores = logits + gumbel(draws, logits)
        P = sinkhorn(scores, temperature)
        hard = matching(scores) + (P - P.detach())
        soft = P.mean(0) / (draws + 1)
        B = hard.mean(0) * draws / (draws + 1) + soft
        without = (hard.sum(0) - hard) / (draws - 1) * draws / (draws + 1) + soft
        return draws * divergence(B) - (draws - 1) * divergence(without).mean(0)

    return estimate


def noise_score(logits: Tensor, draws: int) -> Tensor:
    """Hard draws alone, with the slope E[<H', M> (1 - exp(-noise))]."""
    noise = gumbel(draws, logits)
    hard = matching(logits + noise)
    B = (hard.sum(0) + 1 / len(logits)) / (draws + 1)
    B = B.requires_grad_()
    value = divergence(B)
    (slope,) = torch.autograd.grad(value, B)
    worth = (slope * hard).sum((-2, -1), keepdim=True)
    score = ((worth - worth.mean()) * (1 - torch.exp(-noise))).mean(0).detach()
    return value.detach() + (score * (logits - logits.detach())).sum()


def without_shifts(x: Tensor) -> Tensor:
    """A slope, less what is the same for a row or a column."""
    return x - x.mean(-1, keepdim=True) - x.mean(-2, keepdim=True) + x.mean((-2, -1))


def two_items(logits: Tensor) -> Tensor:
    """The divergence of two items: a sum of two logistic variables exceeds the gap."""
    gap = logits[0, 0] + logits[1, 1] - logits[0, 1] - logits[1, 0]
    e = torch.exp(-gap)
    p = (1 - e - gap * e) / (1 - e) ** 2
    return math.log(2) + p * p.log() + (1 - p) * torch.log1p(-p)


def truth(logits: Tensor, draws: int) -> tuple[float, Tensor]:
    """The divergence and its slope; the slope's chance is shown by the table."""
    if len(logits) == 2:
        value = two_items(logits)
        return value.item(), torch.autograd.grad(value, logits)[0]
    slopes, values = [], []
    for _ in range(10):
        value = noise_score(logits, draws // 10)
        values.append(value.item())
        slopes.append(torch.autograd.grad(value, logits)[0])
    return sum(values) / 10, without_shifts(torch.stack(slopes).mean(0))


def estimates(quick: bool) -> None:
    """Print bias and noise of each estimate."""
    runs, million = (40, 200_000) if quick else (200, 1_000_000)
    rows: list[tuple[str, Estimator, int]] = [
        ("hard, tau .1 (the package)", package(0.1), 64),
        ("hard, tau .1 (the package)", package(0.1), 256),
        ("hard, tau .1 (the package)", package(0.1), 1024),
        ("hard, tau .05 (the package)", package(0.05), 256),
        ("hard, tau 1 (the package)", package(1.0), 256),
        ("hard, jackknife, tau .1", jackknife(0.1), 256),
        ("relaxed, tau .1", relaxed(0.1), 256),
        ("relaxed, tau 1", relaxed(1.0), 256),
        ("score of the noise", noise_score, 256),
        ("score of the noise", noise_score, 2048),
    ]
    print("Divergence and slope; slopes in parts of the length of the true one")
    print(
        f"{'n':>2} {'estimate':28} {'K':>5} {'KL':>6} {'bias':>7} {'sd':>6} "
        f"{'slope bias':>10} {'chance':>6} {'sd':>6} {'ms':>6}"
    )
    for n in (2, 3, 6):
        torch.manual_seed(n)
        logits = (2 * torch.randn(n, n, dtype=torch.float64)).requires_grad_()
        value, slope = truth(logits, million)
        length = slope.norm()
        for name, estimate, draws in rows:
            found, slopes = [], []
            began = time.perf_counter()
            for _ in range(runs):
                kl = estimate(logits, draws)
                found.append(kl.item())
                slopes.append(without_shifts(torch.autograd.grad(kl, logits)[0]))
            took = (time.perf_counter() - began) / runs * 1000
            values, stack = torch.tensor(found), torch.stack(slopes)
            spread = stack.std(0).norm() / length
            off = (stack.mean(0) - slope).norm() / length
            print(
                f"{n:2d} {name:28} {draws:5d} {value:6.3f} "
                f"{values.mean() - value:7.3f} {values.std():6.3f} {off:10.3f} "
                f"{spread / math.sqrt(runs):6.3f} {spread:6.3f} {took:6.1f}",
                flush=True,
            )


# %% Noise at an optimum
def gradient_noise(quick: bool) -> None:
    """Print the noise of the gradient at an optimum, by where the draws come from."""
    runs, draws = (20, 64) if quick else (100, 64)
    problem = gibbs_targets(1, 6, 2.0, seed=0)
    pyro.set_rng_seed(0)
    logits = fit_discrete_kl(problem, particles=256).logits.requires_grad_()

    def score(P: Tensor) -> Tensor:
        return problem.log_likelihood(P)

    def model() -> None:
        with pyro.plate("problems", 1):
            P = pyro.sample("P", UniformPermutation(6))
            pyro.factor("likelihood", score(P))

    def guide() -> None:
        with pyro.plate("problems", 1):
            pyro.sample("P", GumbelSinkhorn(logits, 0.1))

    def own() -> Tensor:
        kl = package(0.1)(logits[0], draws)
        return kl - score(GumbelSinkhorn(logits, 0.1).rsample((draws,))).mean()

    elbo = DiscreteKL_ELBO(
        num_particles=draws,
        vectorize_particles=True,
        max_plate_nesting=1,
        marginal_samples=draws,
    )

    def shared() -> Tensor:
        return elbo.differentiable_loss(model, guide)

    print(f"\nLength of the gradient's noise at an optimum, {draws} draws a step")
    for name, loss in (
        ("the same draws for likelihood and divergence", shared),
        ("draws of its own for each", own),
    ):
        found = [torch.autograd.grad(loss(), logits)[0] for _ in range(runs)]
        print(f"  {name:45} {torch.stack(found).std(0).norm():6.3f}", flush=True)


# %% Answers
def verdict(good: bool) -> str:
    """An empty string, or the word that is counted."""
    return "" if good else "MISSES"


def answers(quick: bool) -> int:
    """Print what fits say of known posteriors; the number of misses."""
    misses = 0
    repetitions, draws = (20, 20_000) if quick else (200, 100_000)

    def fitted(
        fit: Callable[..., GumbelSinkhorn], problem: Problem, **options: float
    ) -> tuple[GumbelSinkhorn, float]:
        pyro.set_rng_seed(0)
        began = time.perf_counter()
        guide = fit(problem, **options)
        return guide, (time.perf_counter() - began) / problem.repetitions

    problem = two_item_odds(ODDS)
    print("\nTwo items: probability of the identity, exact, discrete KL, relaxed prior")
    guide, _ = fitted(fit_discrete_kl, problem, particles=512, rate=0.1)
    found = guide.marginals(draws)[0][:, 0, 0]
    guide, _ = fitted(fit_relaxed, problem)
    others = guide.marginals(draws)[0][:, 0, 0]
    for exact, own, other in zip(ODDS, found, others, strict=True):
        word = verdict(bool((own - exact).abs() < ODDS_BOUND))
        misses += bool(word)
        print(f"  {exact:.3f} {own:.3f} {other:.3f} {word}")

    print("\nTwo items in doubt, exact .75, among n of which the rest is certain")
    for n in (2, 3, 6, 8):
        problem = one_doubtful_pair(n, 0.75)
        guide, _ = fitted(fit_discrete_kl, problem, particles=512, rate=0.1)
        probability = guide.marginals(draws)[0][0, 0, 0]
        law = problem.exact()[1][0, 0, 0]
        print(f"  n {n}: exact {law:.3f}, discrete KL {probability:.3f}", flush=True)

    print(f"\nSix noisy points, {repetitions} repetitions: mean Bhattacharyya distance")
    print("  sigma  discrete KL   +-    largest   MAP point  uniform  seconds each")
    for sigma, bound in POINTS.items():
        problem = noisy_points(repetitions, sigma, seed=0)
        law, _ = problem.exact()
        guide, seconds = fitted(fit_discrete_kl, problem)
        own = bhattacharyya(law, law_of(hard_draws(guide, draws)))
        point = -0.5 * law.amax(-1).log()
        flat = bhattacharyya(law, torch.full_like(law, 1 / law.shape[-1]))
        limit = min(bound, point.mean().item(), flat.mean().item())
        word = verdict(own.mean().item() < limit)
        misses += bool(word)
        print(
            f"  {sigma:5.2f} {own.mean():9.4f} {own.std() / repetitions**0.5:9.4f} "
            f"{own.max():9.4f} {point.mean():10.4f} {flat.mean():8.4f} "
            f"{seconds:10.2f} {word}",
            flush=True,
        )

    repetitions = 5 if quick else 10
    print(
        f"\nGibbs targets, {repetitions} repetitions: total variation of the marginals"
    )
    print("   n  scale  discrete KL  largest  relaxed prior  seconds each")
    for n in (6, 8):
        for scale in (1.0, 2.0, 4.0):
            problem = gibbs_targets(repetitions, n, scale, seed=0)
            _, exact = problem.exact()
            guide, seconds = fitted(fit_discrete_kl, problem)
            own = total_variation(guide.marginals(draws)[0][..., :-1], exact)
            guide, _ = fitted(fit_relaxed, problem)
            other = total_variation(guide.marginals(draws)[0][..., :-1], exact)
            word = verdict(bool(own.mean() <= other.mean() / 2))
            misses += bool(word)
            print(
                f"  {n:2d} {scale:6.0f} {own.mean():12.3f} {own.max():8.3f} "
                f"{other.mean():14.3f} {seconds:13.2f} {word}",
                flush=True,
            )
    return misses


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; the number of misses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    quick = parser.parse_args(arguments).quick
    torch.manual_seed(0)
    estimates(quick)
    gradient_noise(quick)
    misses = answers(quick)
    print(f"\n{misses} MISSES")
    return misses


if __name__ == "__main__":
    sys.exit(main())
