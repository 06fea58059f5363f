# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Which cell is which, and how sure can one be? One model, three inferences.

A microscope has recorded seven cells. An atlas says where each named cell tends to be,
and how brightly it stains; every recorded cell is one of the seven names. The best
matching is easy to get. The question here is what the probabilities are worth: whoever
reads "this is cell C with probability .6" wants to be right in six of ten such cases.

Model. y_i = (x, y, brightness) of recorded cell i, a_j of name j in the atlas, both in
units in which deviations of cells from the atlas are about one:

    P ~ uniform over the 7! = 5040 permutations,    y_i ~ N((P a)_i, scale^2)

The model is written once, with its discrete prior, and inferred in three ways:

    relaxed SVI      the prior replaced by a relaxed one, relax(model, temperature)
    discrete-KL SVI  the discrete prior, a relaxed guide, and the divergence between
                     laws of permutations: DiscreteKL_ELBO
    informed swaps   MCMC over the permutations themselves: InformedSwaps

and, because there are only 5040, by enumeration: the truth that they are judged by.

    python tutorials/trust.py

Expected, in half a minute: relaxed SVI spreads the probabilities of doubtful cells
over too many names, by about .2 in total variation of their marginals; discrete-KL SVI
is off by .05 (.04 to .08 with other seeds and --smoke), informed swaps by their Monte
Carlo error, .004.

How to choose. Relaxed SVI for a good assignment of hundreds of items, or a start for
the others. Discrete-KL SVI for probabilities inside of a larger model that is trained
by gradients; it takes many particles, and it is too sure where all cells but a few are
certain. Informed swaps to check the others, and wherever they are fast enough; look at
R-hat and the effective sample sizes before believing them.

References:
    Mena, Belanger, Linderman and Snoek, "Learning latent permutations with
    Gumbel-Sinkhorn networks" (2018), https://arxiv.org/abs/1802.08665.
    Zanella, "Informed proposals for local MCMC in discrete spaces" (2020),
    https://arxiv.org/abs/1711.07424.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, SVI, Trace_ELBO
from torch import Tensor

from pyro_permutations import (
    DiscreteKL_ELBO,
    GumbelSinkhorn,
    InformedSwaps,
    MatchingPosterior,
    UniformPermutation,
    mixing,
    plot_marginals,
    posterior_by_enumeration,
    posterior_from_guide,
    relax,
    to_indices,
)

NAMES = "ABCDEFG"
SCALE = 0.6
COLD = 0.05  # the last temperature of the discrete KL: hard draws, nearly


# %% Data
class Cells(NamedTuple):
    """Recorded cells, the atlas, and which name each cell has in truth."""

    recorded: Tensor  # (n, 3)
    atlas: Tensor  # (n, 3)
    truth: Tensor  # (n,)


def simulate(seed: int) -> Cells:
    """Draw an atlas, and cells that deviate from it, in another order."""
    pyro.set_rng_seed(seed)
    n = len(NAMES)
    atlas = torch.randn(n, 3)
    truth = torch.randperm(n)
    return Cells(atlas[truth] + SCALE * torch.randn(n, 3), atlas, truth)


# %% Model and guide
def model(cells: Cells, temperature: float | None = None) -> None:
    """Permuted atlas and noise; the temperature is the guide's alone."""
    P = pyro.sample("P", UniformPermutation(len(NAMES)))
    pyro.sample(
        "y", dist.Normal(P @ cells.atlas, SCALE).to_event(2), obs=cells.recorded
    )


def guide(cells: Cells, temperature: float) -> None:
    """Relaxed matchings about learned scores."""
    n = len(NAMES)
    logits = pyro.param("logits", torch.zeros(n, n))
    pyro.sample("P", GumbelSinkhorn(logits, temperature))


# %% Three inferences
def fit(
    cells: Cells,
    discrete: Callable[..., None],
    elbo: Trace_ELBO,
    temperatures: tuple[float, float],
    steps: int,
) -> MatchingPosterior:
    """SVI; the temperature falls over the first half, the rate over the second."""
    pyro.clear_param_store()
    optimizer = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.2},
            "lr_lambda": lambda step: min(1.0, 2 * (1 - step / steps)),
        }
    )
    svi = SVI(discrete, guide, optimizer, elbo)
    first, last = temperatures
    for step in range(steps):
        svi.step(cells, first * (last / first) ** min(1.0, 2 * step / steps))
        optimizer.step()
    return posterior_from_guide(guide, "P", cells, last, num_samples=20_000)


def relaxed_svi(cells: Cells, steps: int) -> MatchingPosterior:
    """The same temperature in model and guide."""
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    return fit(cells, relax(model, 0.2), elbo, (0.2, 0.2), steps)


def discrete_kl_svi(cells: Cells, steps: int) -> MatchingPosterior:
    """Particles are the draws that the guide's marginals are estimated from."""
    elbo = DiscreteKL_ELBO(
        num_particles=128,
        vectorize_particles=True,
        max_plate_nesting=0,
        marginal_samples=128,
    )
    return fit(cells, model, elbo, (0.5, COLD), steps)


def informed_swaps(cells: Cells, draws: int, chains: int = 4) -> MatchingPosterior:
    """Chains one after the other, in this process, and whether they agree."""
    runs = []
    for _ in range(chains):
        mcmc = MCMC(
            InformedSwaps(model), draws, warmup_steps=draws // 10, disable_progbar=True
        )
        mcmc.run(cells)
        runs.append(mcmc.get_samples()["P"])
    found = mixing(torch.stack(runs))
    moving = ~found.r_hat.isnan()  # rows that change at all
    r_hat, size = found.r_hat[moving].max(), found.effective_size[moving].min()
    print(
        f"informed swaps: R-hat at most {r_hat:.3f}, at least {size:.0f} effective "
        f"samples of {chains * draws}"
    )
    return MatchingPosterior(to_indices(torch.cat(runs)), chains=chains)


# %% Report
def report(
    posteriors: dict[str, MatchingPosterior], seconds: dict[str, float], cells: Cells
) -> dict[str, float]:
    """Print the table, and the names of the most doubtful cell; total variations."""
    exact = posteriors["exact"]
    truth = exact.marginals()[0]
    likeliest = exact.mode
    variations = {}
    print(f"\n{'':17}{'total variation':>16}{'largest':>9}{'P(best)':>9}{'seconds':>9}")
    for name, posterior in posteriors.items():
        found = posterior.marginals()[0]
        variations[name] = float((found - truth).abs().sum(-1).mean() / 2)
        largest = float((found - truth).abs().max())
        best = float((posterior.weights[(posterior.perm == likeliest).all(-1)]).sum())
        print(
            f"{name:17}{variations[name]:16.3f}{largest:9.3f}{best:9.3f}"
            f"{seconds[name]:9.1f}"
        )
    doubtful = int(exact.item_entropies()[0].argmax())
    print(
        f"\nNames of recorded cell {doubtful}, in truth {NAMES[cells.truth[doubtful]]}"
    )
    for name, posterior in posteriors.items():
        entries = posterior.candidates(3, NAMES)[doubtful]
        text = [f"{c.name} {c.probability:.3f} +- {c.error:.3f}" for c in entries]
        print(f"  {name:17}" + ",  ".join(text))
    print("\nSizes of the sets that hold 90% of each cell's names")
    for name, posterior in posteriors.items():
        sizes = posterior.credible_names(0.9).sum(-1).tolist()
        print(f"  {name:17}" + " ".join(str(size) for size in sizes))
    return variations


def draw(posteriors: dict[str, MatchingPosterior], path: str) -> None:
    """Heat maps side by side, in the order of the exact posterior."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(posteriors), 3.4), layout="constrained")
    panels = figure.subplots(1, len(posteriors))
    for axes, (name, posterior) in zip(panels, posteriors.items(), strict=True):
        plot_marginals(
            posterior, axes, column_names=NAMES, like=posteriors["exact"]
        ).set(title=name)
    figure.supxlabel("name")
    figure.supylabel("recorded cell")
    figure.colorbar(panels[0].images[0], ax=panels, label="probability")
    figure.savefig(path, dpi=100)
    print(f"\npicture of the marginals: {path}")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Simulate, infer in each way and compare; total variations by name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a short run, as a test")
    parser.add_argument("--picture", default="trust.png", help="where to write it")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = simulate(args.seed)
    steps, draws = (100, 500) if args.smoke else (300, 5000)
    ways: dict[str, Callable[[], MatchingPosterior]] = {
        "exact": partial(posterior_by_enumeration, model, "P", cells),
        "relaxed SVI": partial(relaxed_svi, cells, steps),
        "discrete-KL SVI": partial(discrete_kl_svi, cells, steps),
        "informed swaps": partial(informed_swaps, cells, draws),
    }
    posteriors, seconds = {}, {}
    for name, way in ways.items():
        began = time.perf_counter()
        posteriors[name] = way()
        seconds[name] = time.perf_counter() - began
    right = int((posteriors["exact"].mode == cells.truth).sum())
    print(f"the exact best matching has {right} of {len(NAMES)} cells right")
    variations = report(posteriors, seconds, cells)
    draw(posteriors, args.picture)
    return variations


if __name__ == "__main__":
    main()
