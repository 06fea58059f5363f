# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Errors and times of approximate log permanents, and of samples of the Gibbs law.

Three tables. The first has, for 100 matrices of normal scores each, the error of the
calibrated log permanent and of Bethe's (mean, and the largest), in nats, and the mean
total variation of the rows of their marginals. The second has the calibrated error of
two undecided items among n of which the others are certain, worth log 2 by themselves.
The third has the seconds that one matrix takes: exact, calibrated, one sample and one
mode.

    python benchmarks/permanents.py         about two minutes
    python benchmarks/permanents.py --smoke
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_permutations import (
    GibbsMatching,
    bethe_log_permanent,
    calibrated_log_permanent,
    log_permanent,
)


def marginals(log_sum: Callable[[Tensor], Tensor], X: Tensor) -> tuple[Tensor, Tensor]:
    """A log permanent and its gradient."""
    X = X.clone().requires_grad_()
    value = log_sum(X)
    (B,) = torch.autograd.grad(value.sum(), X)
    return value.detach(), B


def errors(n: int, scale: float, matrices: int) -> str:
    """A row of the first table."""
    X = scale * torch.randn(matrices, n, n, dtype=torch.float64)
    exact, pairs = marginals(log_permanent, X)
    cells = [f"{n:3d} {scale:6.1f}"]
    for approximate in (calibrated_log_permanent, bethe_log_permanent):
        value, B = marginals(approximate, X)
        error, distance = value - exact, (B - pairs).abs().sum(-1).mean() / 2
        worst = error[error.abs().argmax()]
        cells.append(f"{error.mean():8.3f} {worst:8.3f} {distance:7.3f}")
    return "   ".join(cells)


def undecided_pair(n: int) -> str:
    """A row of the second table."""
    X = 20 * torch.eye(n, dtype=torch.float64)
    X[:2, :2] = 20.0
    return f"{n:3d} {calibrated_log_permanent(X) - log_permanent(X):8.3f}"


def seconds(work: Callable[[], object]) -> str:
    """How long something takes, once."""
    start = time.perf_counter()
    work()
    return f"{time.perf_counter() - start:9.3f}"


def times(n: int) -> str:
    """A row of the second table."""
    X = 2 * torch.randn(n, n, dtype=torch.float64)
    d = GibbsMatching(X)
    exact = seconds(lambda: log_permanent(X)) if n <= 20 else " " * 8 + "-"
    return f"{n:3d} " + " ".join(
        [
            exact,
            seconds(lambda: calibrated_log_permanent(X)),
            seconds(d.sample),
            seconds(lambda: d.mode),
        ]
    )


def main(args: argparse.Namespace) -> None:
    """Print the tables."""
    torch.manual_seed(args.seed)
    sizes = (2, 3) if args.smoke else (2, 3, 5, 7, 10, 12)
    print("             calibrated                   Bethe")
    print("  n  scale       mean    worst      TV       mean    worst      TV")
    for n in sizes:
        for scale in (1.0, 2.0, 4.0):
            print(errors(n, scale, 5 if args.smoke else 100), flush=True)
    print("\n  n   undecided pair")
    for n in sizes:
        print(undecided_pair(n), flush=True)
    print("\n  n     exact  calibr.    sample      mode   (seconds)")
    for n in (5,) if args.smoke else (5, 12, 16, 20, 50, 200):
        times(n)  # what is kept between calls
        print(times(n), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few small matrices")
    main(parser.parse_args())
