# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""How far the probabilities of each inference are from the truth, in one table.

    pip install -e .
    python benchmarks/calibration.py --quick    # a few repetitions
    python benchmarks/calibration.py            # 200 of the noisy points

The problems have few items, so that the truth is a list of all permutations: noisy
points in the plane at four noise levels, two items with given odds, two modes that are
mirror images, a consensus of rankings, the causal order of five variables, and random
Gibbs laws. Each has a uniform prior and is given to relaxed SVI (a Gumbel-Sinkhorn
prior at temperature .2), to discrete-KL SVI, and to informed swaps: four chains of 2000
steps each, on the first few repetitions, as they are done one by one. A line has

    TV       total variation of the marginals: half the sum of absolute differences,
             mean over rows and repetitions
    worst    largest error of one probability, over all
    BD       Bhattacharyya distance -log sum sqrt(p q) of the laws of whole
             permutations, mean over repetitions; q is the law of the draws
    in 90%   what the smallest sets of partners that hold 90% by the inference hold in
             truth, mean over items: .9 or more is right, the more above the larger sets
             than needed; and the mean size of such a set beside that by the truth
    seconds  for one repetition; SVI does all of them at once

and MISSES marks BD above its bound, or above that of a point mass at the best match or
of the uniform law (noisy points); a probability off by more than .03 (odds); a TV of
discrete-KL SVI that is more than half of relaxed SVI's (Gibbs laws); and a TV of the
swaps above .04, on any problem.
The exit status is the number of misses.

What is published for six points (Linderman et al., 2018) is of other centres than
N(0, I), and printed beside.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from matching_problems import (
    Problem,
    bhattacharyya,
    causal_orders,
    fit_discrete_kl,
    fit_relaxed,
    gibbs_targets,
    hard_draws,
    law_of,
    mallows,
    mirror_images,
    noisy_points,
    sample_swaps,
    total_variation,
    two_item_odds,
)
from torch import Tensor

from pyro_permutations import MatchingPosterior

POINTS = {0.1: 0.02, 0.25: 0.1, 0.5: 0.15, 0.75: 0.15}  # bounds of BD by noise
PUBLISHED = {  # of other centres: by rounding, by stick-breaking
    0.1: (0.06, 0.09),
    0.25: (0.21, 0.23),
    0.5: (0.32, 0.41),
    0.75: (0.38, 0.55),
}
ODDS = torch.tensor([0.6, 0.75, 0.9, 0.982, 0.9997], dtype=torch.float64)
SWAPS_TV = 0.04  # of 8000 draws; the largest that --quick prints is .024
MARGINALS = 20_000  # draws; the law of whole permutations is of all of them
ODDS_ERROR = 0.03  # of a probability
SVI = {"relaxed SVI": fit_relaxed, "discrete-KL SVI": fit_discrete_kl}
TWO_ITEMS = {  # fits of two items, whose noise is not averaged over many entries
    "relaxed SVI": lambda problem: fit_relaxed(problem, particles=64),
    "discrete-KL SVI": lambda problem: fit_discrete_kl(
        problem, particles=512, rate=0.1
    ),
}


class Line(NamedTuple):
    """What one inference makes of one problem."""

    tv: float
    worst: float
    bd: float
    coverage: float
    size: float
    seconds: float


def compare(
    law: Tensor,  # (R, n!)
    marginals: Tensor,  # (R, n, n)
    perm: Tensor,  # (draws, R, n)
    seconds: float,
) -> Line:
    """Draws against the truth."""
    posterior = MatchingPosterior(perm[:MARGINALS])
    found = posterior.marginals()[0][..., :-1].double()
    chosen = posterior.credible_names(0.9)[..., :-1]
    return Line(
        tv=total_variation(found, marginals).mean().item(),
        worst=(found - marginals).abs().max().item(),
        bd=bhattacharyya(law, law_of(perm)).mean().item(),
        coverage=(chosen * marginals).sum(-1).mean().item(),
        size=chosen.double().sum(-1).mean().item(),
        seconds=seconds,
    )


def show(name: str, line: Line, note: str = "") -> None:
    """Print one line of the table."""
    print(
        f"  {name:16}{line.tv:8.3f}{line.worst:8.3f}{line.bd:9.4f}"
        f"{line.coverage:8.3f}{line.size:7.2f}{line.seconds:9.2f}  {note}",
        flush=True,
    )


def table(
    title: str,
    problem: Problem,
    draws: int,
    singles: int,
    misses: Callable[[dict[str, Line], Tensor], bool] = lambda lines, law: False,
    fits: dict[str, Callable[[Problem], object]] = SVI,
) -> int:
    """All inferences on a problem; one if it misses."""
    law, marginals = problem.exact()
    size, repetitions = _sizes(marginals).mean().item(), problem.repetitions
    print(f"{title}, {repetitions} repetitions; sets of 90% have {size:.2f} items")
    lines: dict[str, Line] = {}
    for name, fit in fits.items():
        pyro.set_rng_seed(0)
        began = time.perf_counter()
        guide = fit(problem)
        seconds = (time.perf_counter() - began) / problem.repetitions
        lines[name] = compare(law, marginals, hard_draws(guide, draws), seconds)
    missed = misses(lines, law)
    for name, line in lines.items():
        show(name, line, "MISSES" if missed and name == "discrete-KL SVI" else "")
    singles = min(singles, problem.repetitions)
    pyro.set_rng_seed(0)
    began = time.perf_counter()
    chains = [sample_swaps(problem[r]) for r in range(singles)]
    seconds = (time.perf_counter() - began) / singles
    perm = torch.stack(chains, 1)
    line = compare(law[:singles], marginals[:singles], perm, seconds)
    far = line.tv > SWAPS_TV
    note = f"the first {singles}" + (", MISSES" if far else "")
    show("informed swaps", line, note)
    return int(missed) + int(far)


def _sizes(marginals: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n)
    """How many partners hold 90%."""
    value = marginals.sort(-1, descending=True).values
    return (value.cumsum(-1) - value < 0.9 - 1e-9).double().sum(-1)


# %% What misses
def far_from_points(noise: float) -> Callable[[dict[str, Line], Tensor], bool]:
    """Whether BD exceeds the bound, or that of the two trivial laws."""

    def misses(lines: dict[str, Line], law: Tensor) -> bool:
        point = (-0.5 * law.amax(-1).log()).mean().item()
        flat = bhattacharyya(law, torch.full_like(law, 1 / law.shape[-1])).mean().item()
        rounding, breaking = PUBLISHED[noise]
        print(
            f"  (BD of a point mass at the best match {point:.3f}, uniform {flat:.3f},"
        )
        print(
            f"   of other centres published {rounding}, by stick-breaking {breaking})"
        )
        return lines["discrete-KL SVI"].bd >= min(POINTS[noise], point, flat)

    return misses


def far_from_odds(lines: dict[str, Line], law: Tensor) -> bool:
    """Whether a probability is off."""
    return lines["discrete-KL SVI"].worst > ODDS_ERROR


def not_half(lines: dict[str, Line], law: Tensor) -> bool:
    """Whether the discrete KL gains less than a factor of two."""
    return lines["discrete-KL SVI"].tv > lines["relaxed SVI"].tv / 2


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the number of misses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--only", default="", help="problems whose title has this")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    many, some, draws = (10, 3, 20_000) if args.quick else (200, 20, 100_000)
    singles = 2 if args.quick else 5
    print(f"  {'':16}{'TV':>8}{'worst':>8}{'BD':>9}{'in 90%':>8}{'size':>7}{'s':>9}")
    misses = 0

    def run(title: str, make: Callable[[], Problem], *rest: object) -> None:
        nonlocal misses
        if args.only in title:
            misses += table(title, make(), draws, singles, *rest)

    for sigma in POINTS:
        run(
            f"six points, noise {sigma}",
            lambda sigma=sigma: noisy_points(many, sigma, seed=0),
            far_from_points(sigma),
        )
    run(
        "two items, probabilities .6, .75, .9, .982, .9997",
        lambda: two_item_odds(ODDS),
        far_from_odds,
        TWO_ITEMS,
    )
    run("four places, two modes", lambda: mirror_images(some, seed=0))
    run("five items ranked by ten", lambda: mallows(some, seed=0))
    run("order of five variables", lambda: causal_orders(some, seed=0))
    for n in (6, 8):
        for scale in (1.0, 2.0, 4.0):
            run(
                f"Gibbs law, n = {n}, scale {scale:.0f}",
                lambda n=n, scale=scale: gibbs_targets(some, n, scale, seed=0),
                not_half,
            )
    print(f"{misses} MISSES")
    return misses


if __name__ == "__main__":
    sys.exit(main())
