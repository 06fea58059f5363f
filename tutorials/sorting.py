# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Can a network learn to sort numbers, and numbers larger than any it has seen?

It is trained on pairs of a list from U(0, 1) and the same list sorted, and tested on
lists from seven ranges, up to U(1000, 1001). Sorting is the simplest permutation to be
learned end to end: no label says where a number goes, only what the result looks like.

Model. A per-item network f gives each number x_i scores f(x_i) for all n positions.

    X_ij = f(x_i)_j,    P = S(X / tau),    loss = mean_j (x_(j) - (P^T x)_j)^2

with S the Sinkhorn operator, converged, and x_(j) the j-th smallest number. For the
test P is the best matching of X, a permutation: P_ij = 1 says that x_i goes to position
j, so that P^T x is the list in order. There are three networks:

    line          f(x) = a x + b: a slope for every position. Whatever the range is,
                  P^T x is sorted if and only if the slopes increase, up to rounding:
                  sum_j a_j y_j is largest when y is in the order of a (the
                  rearrangement inequality), and b adds the same to every order. The
                  order of the slopes is all that has to be learned.
    perceptron    1 -> 32 -> n with ReLU, the network of the paper. It may sort by
                  curves that cross outside the range of the training.
    standardised  the same, on (x - mean) / std of the list: it cannot tell the ranges
                  apart, but its curves have to be in order to the last gap.

Training. Adam, batches of 10 new lists in each of 500 steps, a learning rate that falls
in a line from 0.1 to 0 (for perceptrons 1000 steps, from 0.03), a temperature that
falls geometrically from 0.1 to 0.001. There is no noise: the best matching of
noise-free scores is what is tested, and noise would have to be outgrown by the slopes.
Sinkhorn runs until row and column sums are right to 1e-6. A fixed number of iterations
does not reach that at low temperature, and a high temperature does not tell neighbours
apart, whose slopes differ least where n is large. All is in float64: in float32 numbers
from U(1000, 1001) are multiples of 6e-5, with ties.

    python tutorials/sorting.py            # n = 10, five seeds
    python tutorials/sorting.py --n 120 --seeds 1
    python tutorials/sorting.py --network perceptron

Expected for the first, in about 20 seconds: no list with an error, on any range, for
any of the seeds. benchmarks/sorting.py prints the table for all sizes and networks.

References:
    Mena, Belanger, Linderman and Snoek, "Learning latent permutations with
    Gumbel-Sinkhorn networks" (2018), https://arxiv.org/abs/1802.08665. The row "paper"
    is their table as recalled, not checked against it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_permutations import SinkhornNetwork, metrics, restore

RANGES = [(0, 1), (0, 10), (0, 1000), (1, 2), (10, 11), (100, 101), (1000, 1001)]
# Proportion of lists with any error, by range, for n numbers. Recalled, not checked.
PAPER = {
    5: [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    10: [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    15: [0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.07],
    80: [0.0, 0.0, 0.01, 0.01, 0.08, 0.02, 1.0],
    100: [0.0, 0.02, 0.02, 0.04, 0.08, 0.99, 1.0],
    120: [0.01, 0.03, 0.04, 0.08, 0.6, 1.0, 1.0],
}
# First learning rate, and number of steps.
TRAINING = {
    "line": (0.1, 500),
    "perceptron": (0.03, 1000),
    "standardised": (0.03, 1000),
}
BATCH = 10
METRICS = {
    "any wrong": metrics.any_wrong,
    "wrong": metrics.proportion_wrong,
    "tau": metrics.kendall_tau,
}


# %% Data: lists of numbers, and torch's own sort as the truth
def draw(lists: int, n: int, low: float, high: float) -> Tensor:  # (lists, n, 1)
    """Numbers from U(low, high), as items with one entry."""
    return low + (high - low) * torch.rand(lists, n, 1, dtype=torch.float64)


def positions(x: Tensor) -> Tensor:  # (lists, n, 1) -> (lists, n)
    """Where torch.sort puts every number of a list."""
    return x.squeeze(-1).argsort(-1).argsort(-1)


# %% Model
class Standardise(nn.Module):
    """Lists less their mean, over their standard deviation; then the network."""

    def __init__(self, network: SinkhornNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:  # (*batch, n, 1) -> (*batch, n, n)
        """Permuting a list changes neither of the two: it is equivariant still."""
        spread = x.std(-2, keepdim=True, correction=0)
        tiny = torch.finfo(x.dtype).tiny  # of equal numbers, or a single one
        return self.network((x - x.mean(-2, keepdim=True)) / spread.clamp_min(tiny))


def make(network: str, n: int) -> tuple[nn.Module, SinkhornNetwork]:
    """The model from lists to P, and the part that has the temperature."""
    f: nn.Module = nn.Linear(1, n)
    if network != "line":
        f = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, n))
    net = SinkhornNetwork(f).double()
    return (Standardise(net) if network == "standardised" else net), net


# %% Fit
def fit(
    network: str,
    n: int,
    seed: int,
    steps: int | None = None,
    temperature: tuple[float, float] = (0.1, 0.001),
) -> nn.Module:
    """Learn from lists of n numbers from U(0, 1) and the same lists sorted."""
    torch.manual_seed(seed)
    model, net = make(network, n)
    rate, default = TRAINING[network]
    steps = default if steps is None else steps
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    start, end = temperature
    for step in range(steps):
        net.temperature = start * (end / start) ** (step / steps)
        x = draw(BATCH, n, 0, 1)
        # P^T x and not x[perm], which would have no gradient to the network.
        loss = (restore(model(x), x) - x.sort(-2).values).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# %% Report
def score(
    model: nn.Module, n: int, lists: int, seed: int
) -> dict[str, Tensor]:  # of one entry for each range
    """The metrics on lists from every range, none of them seen in training."""
    torch.manual_seed(10_000 + seed)
    found: dict[str, list[Tensor]] = {name: [] for name in (*METRICS, "l1", "l2")}
    for low, high in RANGES:
        x = draw(lists, n, low, high)
        P, truth = model(x), positions(x)
        for name, metric in METRICS.items():
            found[name].append(metric(P, truth).mean())
        for name, metric in (("l1", metrics.l1), ("l2", metrics.l2)):
            found[name].append(metric(P, truth, x).mean())
    return {name: torch.stack(values) for name, values in found.items()}


def sweep(
    network: str, n: int, seeds: Sequence[int], steps: int | None, lists: int
) -> dict[str, Tensor]:  # each (seeds, ranges)
    """Fit with every seed and score."""
    results = []
    for seed in seeds:
        begin = time.perf_counter()
        model = fit(network, n, seed, steps)
        results.append(score(model, n, lists, seed))
        bad = int((results[-1]["any wrong"] > 0).sum())
        seconds = time.perf_counter() - begin
        print(
            f"seed {seed}: {bad} of 7 ranges with an error, {seconds:.0f} s", flush=True
        )
    return {name: torch.stack([r[name] for r in results]) for name in results[0]}


def report(network: str, n: int, results: dict[str, Tensor], lists: int) -> None:
    """Print the spread over the seeds for each range, beside the paper's numbers."""
    seeds = len(results["l1"])
    print(f"\nn = {n}, {network}; {seeds} seeds, {lists} lists of each range\n")
    print(f"{'':<14}{'proportion of lists with any error':>41}{'means':>24}")
    heads = ("paper", "mean", "best", "worst", "seeds at 0")
    print(f"{'tested on':<14}" + "".join(f"{head:>7}" for head in heads[:-1]), end="")
    print(f"{heads[-1]:>13}{'wrong':>8}{'tau':>8}{'l1':>8}{'l2':>9}")
    for k, (low, high) in enumerate(RANGES):
        wrong = results["any wrong"][:, k]
        zero = f"{int((wrong == 0).sum())} of {seeds}"
        paper = f"{PAPER[n][k]:.2f}" if n in PAPER else "-"
        means = [float(results[name][:, k].mean()) for name in ("wrong", "tau")]
        means += [float(results[name][:, k].mean()) for name in ("l1", "l2")]
        print(
            f"U({low}, {high})".ljust(14)
            + f"{paper:>7}{wrong.mean():>7.3f}{wrong.min():>7.3f}{wrong.max():>7.3f}"
            f"{zero:>13}{means[0]:>7.3f}{means[1]:>8.3f}"
            f"{means[2]:>8.2g}{means[3]:>9.2g}"
        )
    clean = int((results["any wrong"] == 0).all(-1).sum())
    print(f"\nseeds without an error on any range: {clean} of {seeds}")
    print("paper: the published table as recalled. The truth is torch.sort.\n")


def main(argv: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Fit with several seeds, report, and return what is reported."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    option = parser.add_argument
    option("--n", type=int, default=10, help="numbers in a list")
    option("--network", choices=list(TRAINING), default="line")
    option("--steps", type=int, help="of training; 500, for perceptrons 1000")
    option("--lists", type=int, default=1000, help="lists of each range to test on")
    option("--seeds", type=int, default=5, help="how many, from the first on")
    option("--seed", type=int, default=0, help="the first")
    option("--smoke", action="store_true", help="two seeds, n = 5")
    args = parser.parse_args(argv)
    if args.smoke:
        args.n, args.seeds, args.lists = 5, 2, 200
    torch.set_num_threads(1)  # the matrices are small
    seeds = range(args.seed, args.seed + args.seeds)
    results = sweep(args.network, args.n, seeds, args.steps, args.lists)
    report(args.network, args.n, results, args.lists)
    return results


if __name__ == "__main__":
    main()
