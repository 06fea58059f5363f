# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Which neuron is which? Naming the neurons of several worms from their activity.

Every *C. elegans* has the same neurons, with names and a known wiring. A recording of
the whole brain shows the activity of neurons whose names are mostly unknown. Where a
neuron sits leaves some candidates for its name; its activity has to decide. This is
the experiment of Mena et al. (2017, 2018): the wiring and the positions are real, the
activity is simulated.

Model. The activity y of the named neurons follows linear dynamics whose weights are
shared by all worms and non-zero only where the connectome has a synapse or a gap
junction; worm m is recorded in an unknown order, the matrix P_m:

    y_t = W y_{t-1} + e_t,   e_t ~ N(0, I),   W_jk ~ N(0, s^2) if j and k are connected
    Y_t = P_m y_t,           P_m[i, j] = 1: recorded neuron i is named neuron j

P_m is uniform over the permutations that the mask allows: a candidate has a similar
position, and the few neurons that are known in worm m have no other candidate.

With --unobserved 0.5 the recording of each worm lacks a random half of its neurons, as
every real one lacks some, and nobody knows which. P_m then has fewer rows than columns:
an injection, every recorded neuron gets a name and a name is used at most once. A worm
says nothing about the rows of W whose neurons it lacks, and the activity of hidden
neighbours counts as extra noise. That is an approximation: this noise is taken to be
white and independent of what is recorded, with a variance that follows from s and the
number of neighbours; in truth it is neither.

Inference. W integrates out exactly: for given names, a row of it is a Bayesian linear
regression, whose evidence depends on the activity only through its second moments. A
step therefore costs the same for a short and for a long recording. For the P_m there
is SVI with a Gumbel-Sinkhorn guide over the relaxed, doubly stochastic P_m.

    pip install -e ".[tutorials]" && python tutorials/worm.py

Expected, in 2 minutes on one quiet core: 96% of all neurons (the known ones counted, as
in the paper) named correctly with 4 worms and 10 candidates, 92% with --worms 1 (means
of seeds 0 to 2). The paper has 94% and 79%; its positions make a harder mask, where
chance is 33% and not 43% as here (see data/README.md); --candidates 20 is as hard: 92%
and 83%. The draws hardly vary at the end, and names that are still wrong look as
certain as the others: SVI finds a good assignment, not all there is to doubt.

With --unobserved 0.5 the same worms are named twice, recorded whole and by half, in 3
minutes. Of the recorded neurons that are not known 96% and 91% get the right name; a
random feasible injection gives 38% (4 worms, 10 candidates; means of seeds 0 to 2).

References:
    Mena, Linderman, Belanger, Snoek, Cunningham and Paninski, "Toward Bayesian
    permutation inference for identifying neurons in C. elegans" (2017). Mena, Belanger,
    Linderman and Snoek, "Learning latent permutations with Gumbel-Sinkhorn networks"
    (2018), https://arxiv.org/abs/1802.08665. For the data see data/README.md.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor
from tqdm import trange

from pyro_permutations import GumbelSinkhorn, matching, to_indices

DATA = Path(__file__).parent / "data"
WEIGHT_SCALE = 0.075  # standard deviation of a weight; about that of the simulated ones
# (worms, candidates): fraction named correctly in the 2017 paper with 25 known neurons,
# and by a random feasible assignment with the paper's positions.
PAPER = {(1, 10): (0.79, 0.33), (1, 30): (0.40, 0.18), (1, 60): (0.21, 0.12)}
PAPER |= {(4, 10): (0.94, 0.33), (4, 30): (0.69, 0.18), (4, 60): (0.44, 0.12)}


# %% Data: a real connectome, simulated activity
class Connectome(NamedTuple):
    """The named neurons, from head to tail."""

    names: list[str]
    position: Tensor  # (n,), 0 to 1
    connected: Tensor  # (n, n) bool, in any direction, by any kind of synapse


class Recordings(NamedTuple):
    """What is known of the worms, each in its own order, and the truth."""

    past: Tensor  # (worms, r, r), sum over t of Y_{t-1} Y_{t-1}^T
    lagged: Tensor  # (worms, r, r), sum over t of Y_t Y_{t-1}^T
    power: Tensor  # (worms, r), sum over t of Y_t^2
    times: int  # number of t in these sums
    allowed: Tensor  # (worms, r, n) bool, [m, i, j]: recorded i may be named j
    known: Tensor  # (worms, r) bool, the name of recorded i is given
    truth: Tensor  # (worms, r), recorded i is named truth[m, i]; only to score with


def load_connectome(every: int = 1) -> Connectome:
    """Read the two tables; keep one neuron in ``every``."""
    with (DATA / "worm_neurons.csv").open() as file:
        neurons = list(csv.DictReader(file))[::every]
    index = {neuron["name"]: k for k, neuron in enumerate(neurons)}
    connected = torch.zeros(len(index), len(index), dtype=torch.bool)
    with (DATA / "worm_connections.csv").open() as file:
        for row in csv.DictReader(file):
            if row["sender"] in index and row["receiver"] in index:
                connected[index[row["sender"]], index[row["receiver"]]] = True
    position = torch.tensor([float(neuron["position"]) for neuron in neurons])
    return Connectome(list(index), position, connected | connected.T)


def simulate(
    worm: Connectome,
    worms: int,
    candidates: float,
    known: int,
    unobserved: float = 0.0,
    times: int = 1000,
) -> Recordings:
    """Draw weights, activity, and for each worm who is known and recorded, in order."""
    n = len(worm.names)
    recorded = round(n * (1 - unobserved))
    weights = torch.randn(n, n) * worm.connected
    weights = weights - weights.T  # oscillations, kept from growing by the next line
    weights = weights / (1.1 * torch.linalg.matrix_norm(weights, 2))
    activity = torch.randn(times, worms, n)
    activity[0] += 1
    for t in range(1, times):
        activity[t] += activity[t - 1] @ weights.T

    # Known neurons are candidates for nothing else, recorded or not. The half-width is
    # such that the others have so many candidates on average, the true name included.
    is_known = torch.rand(worms, n).argsort(-1) < known
    pair = ~is_known[:, :, None] & ~is_known[:, None, :]
    distance = (worm.position[:, None] - worm.position).abs().expand_as(pair)
    count = min(round(candidates * worms * (n - known)), int(pair.sum()))
    half_width = distance[pair].kthvalue(count).values
    allowed = (distance <= half_width) & pair | torch.eye(n, dtype=torch.bool)
    mean = (allowed & pair).sum() / (~is_known).sum()
    print(f"{worms} worms of {n} neurons, {known} known in each; the others have")
    print(f"{mean:.1f} candidates on average, within {half_width:.4f} of the length")
    if recorded < n:
        print(f"each recording has a random {recorded} of the neurons, known or not")

    truth = torch.rand(worms, n).argsort(-1)[:, :recorded]
    activity = activity.movedim(0, 1).gather(-1, truth[:, None].expand(-1, times, -1))
    return Recordings(
        past=activity[:, :-1].mT @ activity[:, :-1],
        lagged=activity[:, 1:].mT @ activity[:, :-1],
        power=activity[:, 1:].square().sum(1),
        times=times - 1,
        allowed=allowed.gather(1, truth[:, :, None].expand(-1, -1, n)),
        known=is_known.gather(1, truth),
        truth=truth,
    )


# %% Model and guide
def noise_variance(data: Recordings, connected: Tensor) -> Tensor:
    """Variance of e and of what hidden neurons add to each neuron, shape (n,).

    A neighbour is hidden with the same probability as any neuron, has a weight of
    variance s^2, and is as active as the recorded neurons are on average.
    """
    hidden = 1 - data.allowed.shape[-2] / data.allowed.shape[-1]
    activity = data.power.mean() / data.times
    return 1 + hidden * WEIGHT_SCALE**2 * activity * connected.sum(-1)


def log_evidence(
    past: Tensor, lagged: Tensor, weight: Tensor, connected: Tensor
) -> Tensor:
    """Log evidence of the activity with the weights integrated out, plus a constant.

    With weights s z, z ~ N(0, I), the row of neuron j adds b^T G^-1 b / 2 - log|G| / 2,
    where G = I + s^2 past[A, A] and b = s lagged[j, A] for its neighbours A. Here past
    is a sum over the worms m, times weight[m, j], and lagged[j] has been summed so.
    """
    evidence = past.new_zeros(())
    # Neurons of similar degree in one batch; absent neighbours become zeros.
    for rows in connected.sum(-1).argsort().split(40):
        width = int(connected[rows].sum(-1).max())
        present, neighbours = connected[rows].to(past.dtype).topk(width)
        scale = WEIGHT_SCALE * present
        gram = past[:, neighbours[:, :, None], neighbours[:, None, :]]
        gram = (gram * weight[:, rows, None, None]).sum(0)
        gram = gram * scale[:, :, None] * scale[:, None, :] + torch.eye(width)
        b = lagged[rows[:, None], neighbours] * scale
        factor = torch.linalg.cholesky(gram)
        white = torch.linalg.solve_triangular(factor, b[..., None], upper=False)
        half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum()
        evidence = evidence + white.square().sum() / 2 - half_log_det
    return evidence


def activity_evidence(data: Recordings, connected: Tensor, P: Tensor) -> Tensor:
    """Log evidence of the recordings for given names, plus a constant."""
    # Y = P y, so P^T (...) P puts the moments into the order of the names, with zeros
    # for the neurons that a worm's recording lacks: it says nothing about their rows.
    variance = noise_variance(data, connected)
    partial = P.shape[-2] < P.shape[-1]  # otherwise exactly one, not only nearly
    recorded = P.sum(-2) if partial else torch.ones(P.shape[:-1])
    past = P.mT @ data.past @ P
    lagged = (P.mT @ data.lagged @ P).sum(0) / variance[:, None]
    # The noise under each name, compared with noise of variance one; none hidden: 0.
    shrunk = data.power[:, :, None] * (1 - 1 / variance) - data.times * variance.log()
    noise = (P * shrunk).sum() / 2
    return noise + log_evidence(past, lagged, recorded / variance, connected)


def model(data: Recordings, connected: Tensor, temperature: float) -> None:
    """Matchings, uniform where allowed but relaxed; weights integrated out."""
    zeros = torch.zeros(data.allowed.shape)
    with pyro.plate("worms", len(zeros)):
        P = pyro.sample("P", GumbelSinkhorn(zeros, temperature, mask=data.allowed))
    pyro.factor("activity", activity_evidence(data, connected, P))


def guide(data: Recordings, connected: Tensor, temperature: float) -> None:
    """Gumbel-Sinkhorn with a score for each candidate of each neuron."""
    logits = pyro.param("logits", lambda: torch.zeros(data.allowed.shape))
    with pyro.plate("worms", len(logits)):
        pyro.sample("P", GumbelSinkhorn(logits, temperature, mask=data.allowed))


# %% Fit and report
def fit(
    data: Recordings, connected: Tensor, steps: int, temperature: tuple[float, float]
) -> Tensor:
    """Return the fitted logits, (worms, r, n); the temperature falls geometrically."""
    svi = SVI(model, guide, Adam({"lr": 0.07}), Trace_ELBO())
    start, end = temperature
    for step in (progress := trange(steps)):
        tau = start * (end / start) ** (step / max(steps - 1, 1))
        loss = svi.step(data, connected, tau)
        progress.set_postfix(loss=f"{loss:.0f}", temperature=f"{tau:.2f}")
    return pyro.param("logits").detach()


def hard_draw(logits: Tensor, allowed: Tensor) -> Tensor:
    """One permutation matrix for each worm: the best matching of noisy scores."""
    noise = dist.Gumbel(0.0, 1.0).sample(logits.shape)
    return matching(logits + noise, mask=allowed)


def report(
    data: Recordings, logits: Tensor, paper: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Print the fraction of recorded neurons that are named correctly.

    Return that of the unknown ones among them, noise-free and by chance.
    """

    def line(title: str, *estimates: Tensor) -> float:
        right = torch.stack([to_indices(P) == data.truth for P in estimates]).double()
        of_unknown = right[:, ~data.known].mean()
        print(f"{title:<42}{right.mean():>8.3f}{of_unknown:>15.3f}")
        return float(of_unknown)

    print(f"{'named correctly':<42}{'of all':>8}{'of the unknown':>15}")
    best = matching(logits, mask=data.allowed)
    correct = line("noise-free: best matching of the logits", best)
    line("one noisy draw", hard_draw(logits, data.allowed))
    anything = [hard_draw(torch.zeros_like(logits), data.allowed) for _ in range(20)]
    chance = line("random feasible assignment", *anything)
    if paper is not None:
        print(f"{'the paper, one noisy draw':<42}{paper[0]:>8.2f}")
        print(f"{'the paper, random feasible assignment':<42}{paper[1]:>8.2f}")
    return correct, chance


def draw_picture(
    path: Path, worm: Connectome, data: Recordings, logits: Tensor, draws: int = 100
) -> None:
    """Save how often each name is drawn for each neuron of the first worm."""
    first, allowed = logits[:1], data.allowed[:1]
    often = sum(hard_draw(first, allowed)[0] for _ in range(draws)) / draws
    truth, order = data.truth[0].sort()
    often = often[order]  # rows by their true names, head to tail
    size = min(40, len(often))
    wrong = 1 - often.gather(1, truth[:, None])[:, 0]
    begin = int(wrong.unfold(0, size, 1).sum(-1).argmax())
    rows = slice(begin, begin + size)
    columns = slice(int(truth[rows][0]), int(truth[rows][-1]) + 1)
    row_names = [worm.names[name] for name in truth[rows].tolist()]
    column_names = worm.names[columns]
    figure = Figure(figsize=(15, 7), layout="constrained")
    whole, part = figure.subplots(1, 2)
    whole.set(title="first worm, from head to tail")
    whole.imshow(often.numpy(), cmap="Blues", vmin=0, vmax=1)
    part.set(title=f"the {size} neighbours with most errors or doubt")
    image = part.imshow(often[rows, columns].numpy(), cmap="Blues", vmin=0, vmax=1)
    part.set_xticks(range(len(column_names)), column_names, rotation=90, fontsize=7)
    part.set_yticks(range(size), row_names, fontsize=7)
    figure.supxlabel("name given to the recorded neuron")
    figure.supylabel("its true name")
    figure.colorbar(image, label=f"frequency in {draws} draws")
    figure.savefig(path, dpi=110)
    print(f"picture of the matching posterior: {path}")


def main(args: argparse.Namespace) -> None:
    """Simulate, fit and report; what is recorded in part is recorded whole as well."""
    torch.set_num_threads(1)  # matrices of 279 rows: more threads wait for each other
    worm = load_connectome(every=4 if args.smoke else 1)
    if args.smoke:
        args.worms, args.candidates, args.known, args.steps = 2, 5, 10, 100
    as_in_paper = args.known == 25 and not args.smoke
    paper = PAPER.get((args.worms, args.candidates)) if as_in_paper else None
    results = {}
    for unobserved in sorted({0.0, args.unobserved}):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)  # so these are the same worms
        data = simulate(worm, args.worms, args.candidates, args.known, unobserved)
        logits = fit(data, worm.connected, args.steps, args.temperature)
        results[unobserved] = report(data, logits, None if unobserved else paper)
    if args.unobserved:
        print(f"{'of the recorded, unknown neurons':<42}{'correct':>8}{'chance':>15}")
        for unobserved, (correct, chance) in results.items():
            title = f"{unobserved:.0%} of the neurons unobserved"
            print(f"{title:<42}{correct:>8.3f}{chance:>15.3f}")
    draw_picture(args.picture, worm, data, logits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    option = parser.add_argument
    option("--worms", type=int, default=4)
    option("--candidates", type=float, default=10, help="on average, if not known")
    option("--known", type=int, default=25, help="neurons known in each worm")
    option("--unobserved", type=float, default=0.0, metavar="FRACTION", help="below 1")
    option("--steps", type=int, default=200)
    option("--temperature", type=float, nargs=2, default=(2.0, 0.5), help="from, to")
    option("--seed", type=int, default=0)
    option("--picture", type=Path, default=Path("worm.png"))
    option("--smoke", action="store_true", help="a quarter of the neurons")
    main(parser.parse_args())
