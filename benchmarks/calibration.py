# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Whether probabilities can be trusted: three inferences where the truth is known.

    pip install -e .
    python benchmarks/calibration.py --quick                     # three minutes
    python benchmarks/calibration.py                             # forty, on one core
    python benchmarks/calibration.py --problems points dag       # some of them

Posteriors over few items, each a batch of repetitions, beside the exact law of all n!
matchings:

    points   six points in the plane, from N(0, I), seen in another order with noise;
             the setting of Linderman et al. (2018), whose numbers, for centres that the
             paper does not state, are printed with it
    odds     two items, with given probabilities of the identity
    modes    four places on a line from noisy distances: as likely as their mirror image
    mallows  the consensus of ten rankings of five items, by Spearman's footrule
    dag      the order of five variables of a linear Gaussian network, each regressed on
             those before it with the weights integrated out
    gibbs    exp<X, P> with random scores X, six and eight items

and the columns

    MAP         the likeliest matching, for certain
    uniform     all matchings alike
    relaxed     SVI with a Gumbel-Sinkhorn prior and guide, hard draws of the guide
    discrete    SVI with DiscreteKL_ELBO and the same guide, hard draws of the guide
    swaps       InformedSwaps on the first repetitions, a fixed number of steps

Total variation is of the marginals, the mean over rows of half the sum of absolute
differences; the distance of laws is Bhattacharyya's, -log sum sqrt(p q) over all
matchings; coverage is the true probability of the sets of names that are claimed to
hold .9. All are means over repetitions, but for the largest error of any marginal.
Seconds are those of the processor for fitting or sampling, for a repetition. The
distance is too large, by about n! over eight times the number of draws, and so says
little of eight items. A problem MISSES if the discrete
column does not keep what is promised of it; the exit status is the number of those.

References:
    Linderman, Mena, Cooper, Paninski and Cunningham, "Reparameterizing the Birkhoff
    polytope for variational permutation inference", AISTATS 2018,
    https://arxiv.org/abs/1710.09508 (table 1).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from matching_problems import (
    Problem,
    all_permutations,
    bhattacharyya,
    fit_discrete_kl,
    fit_relaxed,
    gibbs_targets,
    law_of_draws,
    lexicographic_rank,
    noisy_points,
    total_variation,
    two_item_odds,
)
from pyro.infer import MCMC
from torch import Tensor

from pyro_permutations import (
    ConvergenceWarning,
    GumbelSinkhorn,
    InformedSwaps,
    LostLogWarning,
    MatchingPosterior,
    UniformPermutation,
    posterior_from_mcmc,
    to_indices,
)

DRAWS = 100_000  # hard draws of a guide
CHAINS = 2
ODDS = torch.tensor([0.6, 0.75, 0.9, 0.982, 0.9997])
CLOSE = 0.03  # of probabilities of two items
POINTS = {  # noise: bound on the distance, and stick-breaking and rounding in the paper
    0.1: (0.02, 0.09, 0.06),
    0.25: (0.10, 0.23, 0.21),
    0.5: (0.15, 0.41, 0.32),
    0.75: (0.15, 0.55, 0.38),
}
LINES = ("total variation", "largest error", "distance", "coverage", "seconds")
COLUMNS = ("MAP", "uniform", "relaxed", "discrete", "swaps")
MISSED: list[str] = []


# %% Problems that are not in matching_problems
def two_modes(repetitions: int, sigma: float, seed: int) -> Problem:
    """Noisy distances of four places on a line, which their mirror image has, too."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64)
    distance = (place[:, None] - place).abs()
    noise = torch.randn(repetitions, 4, 4, generator=generator, dtype=torch.float64)
    order = torch.rand(repetitions, 4, generator=generator).argsort(-1)
    seen = distance[order[:, :, None], order[:, None, :]] + sigma * noise

    def log_likelihood(P: Tensor) -> Tensor:
        expected = P @ distance @ P.mT
        return dist.Normal(expected, sigma).log_prob(seen).sum((-2, -1))

    return Problem(repetitions, 4, log_likelihood)


def mallows(repetitions: int, theta: float, seed: int, rankers: int = 10) -> Problem:
    """Rankings of five items around a consensus: probability exp(-theta footrule)."""
    generator = torch.Generator().manual_seed(seed)
    ranks = to_indices(all_permutations(5))
    footrule = (ranks - torch.arange(5)).abs().sum(-1)
    law = (-theta * footrule.double()).softmax(0)
    drawn = torch.multinomial(
        law, repetitions * rankers, replacement=True, generator=generator
    )
    consensus = torch.rand(repetitions, 1, 5, generator=generator).argsort(-1)
    seen = ranks[drawn].reshape(repetitions, rankers, 5)
    seen = seen.gather(-1, consensus.expand_as(seen))  # of item i: its rank for each
    cost = (seen[..., None] - torch.arange(5)).abs().sum(1)  # (repetitions, item, rank)
    return Problem(repetitions, 5, lambda P: -theta * (P * cost).sum((-2, -1)))


def dag_orders(repetitions: int, samples: int, seed: int) -> Problem:
    """Orders of five variables, P[i, k] = 1 if variable i is at place k.

    Given the order, x_j = sum_i w_ij x_i + N(0, 1) over the i before j, w ~ N(0, 1).
    Without the weights x_j has covariance I + X A X', A = diag(a_j) with ones for those
    before j, and its density takes no more than G = X'X: by the lemmas of Sylvester and
    Woodbury log det(I + A G), and G_jj - g_j' (I + A G)^-1 A g_j for the square.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (repetitions, 5, 5)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64).triu(1)
    edges = torch.rand(shape, generator=generator) < 0.5
    size = (repetitions, samples, 5)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)
    X = noise @ torch.linalg.inv(eye - weights * edges)
    order = torch.rand(repetitions, 1, 5, generator=generator).argsort(-1)
    X = X.gather(-1, order.expand(size))
    G = X.mT @ X
    later = torch.ones(5, 5, dtype=torch.float64).triu(1)

    def log_likelihood(P: Tensor) -> Tensor:
        before = (P @ later @ P.mT) * (1 - eye)  # [i, j]: is i before j?
        a = before.mT[..., None]  # (..., j, i, 1)
        system = eye + a * G[:, None]
        columns = G.mT[..., None]  # (repetitions, j, i, 1)
        solved = torch.linalg.solve(system, a * columns)
        fitted = (columns * solved).sum((-2, -1))
        rest = G.diagonal(dim1=-2, dim2=-1) - fitted
        return -0.5 * (torch.linalg.slogdet(system)[1] + rest).sum(-1)

    return Problem(repetitions, 5, log_likelihood)


def precedence(law: Tensor) -> Tensor:  # (R, 120) -> (R, 5, 5)
    """How likely variable i is before variable j."""
    place = to_indices(all_permutations(5))
    before = (place[:, :, None] < place[:, None, :]).double()
    return torch.einsum("rk,kij->rij", law, before)


# %% The columns
Lines = dict[str, dict[str, float]]  # of each column


@dataclass
class Found:
    """The law of a column for its repetitions, and what it took."""

    law: Tensor  # (R, n!)
    seconds: float = 0.0


def timed(fit: Callable[[], GumbelSinkhorn], draws: int) -> Found:
    """Fit a guide and draw from it."""
    begin = time.process_time()
    guide = fit()
    seconds = time.process_time() - begin
    return Found(law_of_draws(guide, draws), seconds / guide.logits.shape[0])


def by_swaps(problem: Problem, repetitions: int, steps: int) -> Found:
    """Chains of InformedSwaps for each of the first repetitions."""
    laws = []
    begin = time.process_time()
    for k in range(repetitions):
        mcmc = MCMC(
            InformedSwaps(partial(single_model, problem, k)),
            num_samples=steps,
            warmup_steps=steps // 10,
            num_chains=1,
            disable_progbar=True,
        )
        perm = []
        for _ in range(CHAINS):
            mcmc.run()
            perm.append(posterior_from_mcmc(mcmc, "P").perm)
        rank = lexicographic_rank(torch.cat(perm))
        factorial = len(all_permutations(problem.items))
        laws.append(torch.bincount(rank, minlength=factorial) / len(rank))
    seconds = (time.process_time() - begin) / repetitions
    return Found(torch.stack(laws).double(), seconds)


def single_model(problem: Problem, k: int) -> None:
    """The model of one repetition."""
    P = pyro.sample("P", UniformPermutation(problem.items))
    batch = P[..., None, :, :].expand(*P.shape[:-2], problem.repetitions, *P.shape[-2:])
    pyro.factor("likelihood", problem.log_likelihood(batch)[..., k])


def posterior(law: Tensor, n: int) -> MatchingPosterior:
    """A law of all permutations, in order, for each repetition."""
    perm = to_indices(all_permutations(n))[:, None].expand(-1, len(law), -1)
    return MatchingPosterior(perm, weights=law.mT, exact=True)


# %% The table
@dataclass
class Case:
    """A problem, how the discrete column is fitted, and what is asked of it."""

    title: str
    problem: Problem
    check: Callable[[Case, Lines], bool]
    note: str = ""
    settings: dict[str, float] = field(default_factory=dict)


def scores(found: Found, truth: Tensor, n: int) -> dict[str, float]:
    """The lines of a column, for as many repetitions as it has."""
    law, truth = found.law, truth[: len(found.law)]
    ours, exact = posterior(law, n), posterior(truth, n)
    p, q = exact.marginals()[0], ours.marginals()[0]
    covered = torch.where(ours.credible_names(0.9), p, 0.0).sum(-1)
    return {
        "total variation": total_variation(p, q).mean().item(),
        "largest error": (p - q).abs().max().item(),
        "distance": bhattacharyya(law, truth).mean().item(),
        "coverage": covered.mean().item(),
        "seconds": found.seconds,
        "order": (precedence(law) - precedence(truth)).abs().max().item()
        if n == 5
        else 0.0,
    }


def distance_below(
    bound: float, case: Case, found: dict[str, dict[str, float]]
) -> bool:
    """The distance of laws is below a bound, and below those of the baselines."""
    distance = {name: lines["distance"] for name, lines in found.items()}
    best = min(bound, distance["MAP"], distance["uniform"])
    return distance["discrete"] < best


def probability_close(case: Case, found: Lines) -> bool:
    """All probabilities are right."""
    return found["discrete"]["largest error"] < CLOSE


def half_of_relaxed(case: Case, found: Lines) -> bool:
    """The marginals are at most half as wrong as those of the relaxed column."""
    error = {name: lines["total variation"] for name, lines in found.items()}
    return error["discrete"] <= error["relaxed"] / 2


def nothing_promised(case: Case, found: Lines) -> bool:
    """No bound."""
    return True


def cases(names: list[str], quick: bool, seed: int) -> Iterator[Case]:
    """The problems that are asked for."""
    many, few = (5, 2) if quick else (200, 10)
    if "points" in names:
        for sigma, (bound, sticks, rounding) in POINTS.items():
            if quick and sigma in (0.1, 0.5):
                continue
            yield Case(
                f"points, n = 6, sigma {sigma}",
                noisy_points(many, sigma, seed),
                partial(distance_below, bound),
                note=f"the paper's distances, other centres: stick-breaking {sticks}, "
                f"rounding {rounding}; bound here {bound}",
            )
    if "odds" in names:
        settings = {"particles": 512, "rate": 0.1}
        title = f"odds, n = 2, {', '.join(f'{p:g}' for p in ODDS.tolist())}"
        yield Case(title, two_item_odds(ODDS), probability_close, settings=settings)
    if "modes" in names:
        yield Case("modes, n = 4", two_modes(few, 1.0, seed), nothing_promised)
    if "mallows" in names:
        yield Case("mallows, n = 5", mallows(few, 0.2, seed), nothing_promised)
    if "dag" in names:
        yield Case("dag, n = 5", dag_orders(few, 20, seed), nothing_promised)
    if "gibbs" in names:
        for n in (6, 8):
            for scale in (2.0,) if quick else (1.0, 2.0, 4.0):
                title = f"gibbs, n = {n}, scale {scale:g}"
                problem = gibbs_targets(min(4, few) if n == 8 else few, n, scale, seed)
                yield Case(title, problem, half_of_relaxed)


def report(case: Case, steps: int, chosen: int, draws: int) -> None:
    """Fit the columns and print the lines."""
    problem = case.problem
    truth, _ = problem.exact()
    point = torch.zeros_like(truth).scatter(-1, truth.argmax(-1, keepdim=True), 1.0)
    columns = {
        "MAP": Found(point),
        "uniform": Found(torch.full_like(truth, 1 / truth.shape[-1])),
        # Its distances are far above the bias of a fifth of the draws.
        "relaxed": timed(partial(fit_relaxed, problem), draws // 5),
        "discrete": timed(partial(fit_discrete_kl, problem, **case.settings), draws),
        "swaps": by_swaps(problem, min(chosen, problem.repetitions), steps),
    }
    found = {
        name: scores(column, truth, problem.items) for name, column in columns.items()
    }
    missed = not case.check(case, found)
    used = len(columns["swaps"].law)
    print(f"{case.title}; {problem.repetitions} repetitions, swaps: the first {used}")
    for name in (*LINES, *(["order"] if case.title.startswith("dag") else [])):
        label = "error of i before j" if name == "order" else name
        values = "".join(f"{found[column][name]:>10.4f}" for column in COLUMNS)
        print(f"    {label:<22}{values}")
    if case.note:
        print(f"    {case.note}")
    if missed:
        print("    MISSES")
        MISSED.append(case.title)
    sys.stdout.flush()


def main() -> None:
    """Read the command line, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    option = parser.add_argument
    every = ["points", "odds", "modes", "mallows", "dag", "gibbs"]
    option("--quick", action="store_true", help="less of everything")
    option("--problems", nargs="+", choices=every, default=every)
    option("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for kind in (ConvergenceWarning, LostLogWarning):
        warnings.simplefilter("error", kind)
    steps, chosen, draws = (500, 1, 10_000) if args.quick else (2000, 4, DRAWS)
    begin = time.perf_counter()
    print(f"swaps: {CHAINS} chains of {steps} steps, 4 replicas; {draws} hard draws")
    print(" " * 26 + "".join(f"{name:>10}" for name in COLUMNS))
    for case in cases(args.problems, args.quick, args.seed):
        pyro.set_rng_seed(args.seed)
        report(case, steps, chosen, draws)
    print(f"{len(MISSED)} problems miss, {time.perf_counter() - begin:.0f} s")
    sys.exit(len(MISSED))


if __name__ == "__main__":
    main()
