# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""How often learned sorting fails, for all sizes and ranges, over seeds.

    python benchmarks/sorting.py --quick    # fewer seeds, up to n = 15
    python benchmarks/sorting.py            # 3 minutes on one core

Networks and training are those of tutorials/sorting.py, at its default settings: a line
for every size, and the two perceptrons for n = 10 and 80. A line of the table MISSES if
more than one of 20 seeds has an error at n = 5, 10, 15, or if the worst seed has errors
in more than .05 of the lists of a range at n = 80, 100, 120; the exit status is the
number of such lines. Perceptrons are there to be compared with, and miss nothing.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from pathlib import Path

import torch

TUTORIAL = runpy.run_path(
    str(Path(__file__).parent.parent / "tutorials" / "sorting.py")
)
SMALL, LARGE = (5, 10, 15), (80, 100, 120)
SMALL_SHARE = 0.05  # of the seeds that may have an error: one of 20
LARGE_BOUND = 0.05  # of the lists with an error, on any range


def row(network: str, n: int, seeds: int, lists: int, judge: bool) -> bool:
    """Print a line of the table; return whether it misses what should hold."""
    begin = time.perf_counter()
    results = []
    for seed in range(seeds):
        model = TUTORIAL["fit"](network, n, seed)
        results.append(TUTORIAL["score"](model, n, lists, seed)["any wrong"])
    wrong = torch.stack(results)  # (seeds, ranges)
    failed = int((wrong > 0).any(-1).sum())
    missed = failed > SMALL_SHARE * seeds if n in SMALL else wrong.max() > LARGE_BOUND
    missed = judge and bool(missed)
    print(
        f"{network:<13}{n:>4}{seeds:>6}{failed:>7}"
        + "".join(f"{mean:>8.3f}/{top:<5.3f}" for mean, top in columns(wrong))
        + f"{(time.perf_counter() - begin) / seeds:>6.0f}"
        + ("  MISSES" if missed else ""),
        flush=True,
    )
    return missed


def columns(wrong: torch.Tensor) -> list[tuple[float, float]]:
    """Mean and worst over the seeds, for each range."""
    return list(zip(wrong.mean(0).tolist(), wrong.amax(0).tolist(), strict=True))


def main() -> None:
    """Read the command line, print the table."""
    parser = argparse.ArgumentParser(description="Errors of learned sorting.")
    option = parser.add_argument
    option("--quick", action="store_true", help="5 seeds, n up to 15, lines only")
    option("--seeds", type=int, nargs=2, default=(20, 3), help="small and large n")
    option("--lists", type=int, nargs=2, default=(1000, 200), help="of each range")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    print("Proportion of lists with any error: mean over seeds / worst seed")
    heads = [f"U({low}, {high})" for low, high in TUTORIAL["RANGES"]]
    print(f"{'network':<13}{'n':>4}{'seeds':>6}{'failed':>7}", end="")
    print("".join(f"{head:>14}" for head in heads) + f"{'s':>6}")
    missed = 0
    small, large = (5, args.seeds[1]) if args.quick else args.seeds
    for n in SMALL:
        missed += row("line", n, small, args.lists[0], judge=True)
    if not args.quick:
        for network in ("perceptron", "standardised"):
            row(network, 10, 5, args.lists[0], judge=False)
        for n in LARGE:
            missed += row("line", n, large, args.lists[1], judge=True)
        for network in ("perceptron", "standardised"):
            row(network, 80, 1, args.lists[1], judge=False)
    print("The paper's row of the same, as recalled and not checked:")
    for n, numbers in TUTORIAL["PAPER"].items():
        print(
            f"{'paper':<13}{n:>4}{'':>13}"
            + "".join(f"{x:>8.2f}{'':>6}" for x in numbers)
        )
    print(f"{missed} lines miss, {time.perf_counter() - begin:.0f} s")
    sys.exit(missed)


if __name__ == "__main__":
    main()
