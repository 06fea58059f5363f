# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What a Sinkhorn operator costs: ours beside others', on the same scores in one run.

The others repeat row and column normalisations and leave it to the user to say how
often. So each runs for the customary 20 iterations, wherever they end, and for as many
as a residual of 1e-6 takes: that number is searched for and convergence checks are off,
so that nobody pays for more.

    pip install -e ".[benchmarks]"
    python benchmarks/sinkhorn.py --quick           # three minutes
    python benchmarks/sinkhorn.py                   # an hour or more
    python benchmarks/sinkhorn.py --cells "5 x 278.*float32" --methods "loop|ott"

Scores are N(0, 1) + Gumbel noise; the loss is (P * C).sum() with C from N(0, 1).

    residual    largest error of a row or column sum, added up in float64
    forward     ms without recording a graph;  + backward: ms of both together
    peak        MB at the peak of forward + backward, scores and gradient counted: the
                events of torch's CPU allocator in a profile (what NumPy, SciPy or MKL
                take is not seen), for jax XLA's own analysis of its buffers. Beyond 20
                iterations not measured again: the same, or in proportion if unrolled
    gradient    largest error, relative to the largest entry. The reference is that of
                log_sinkhorn in float64, converged to rounding (its own error is 0 by
                definition; the tests hold it against finite differences)
    x ours      cost in terms of ours, forward and forward + backward

A time is the minimum of several runs after a first one (which has to do if it takes ten
seconds); the methods take turns, so that what else the machine does hits all alike.
Compiling is not counted. All run on ``--threads`` processors (1). More than 10 000
iterations, or ``--cap`` seconds of them, are not run: such a row shows how far that
came, and a lower bound.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from sinkhorn_methods import (
    CUSTOMARY,
    LOOP,
    OTHERS,
    OURS,
    Method,
    Problem,
    Run,
    log_loop,
)
from torch import Tensor

from pyro_permutations import GumbelSinkhorn, matching

SIZES = [(64, 10), (16, 100), (5, 278), (1, 1000)]  # batch x n
TEMPERATURES = [1.0, 0.1, 0.01]
DTYPES = [torch.float32, torch.float64]
MOST = 10_000  # iterations
TOLERANCE = 1e-6
MOST_BYTES = 4e9  # of a graph that is unrolled
RIGHT = 0.01  # what is further off is another gradient


# %% Measuring
@dataclass(eq=False)
class Row:
    """A line of the table: where a method ends, and what that costs."""

    name: str
    iterations: int
    run: Run
    converge: bool = False  # to the tolerance, rather than the customary iterations
    both: float = math.nan  # ms
    peak: float = math.nan  # bytes
    error: float = math.nan  # of the gradient
    note: str = ""

    def __post_init__(self) -> None:
        """Run it once."""
        p, self.forward = timed(self.run.forward)
        sums = torch.stack([p.double().sum(dim) for dim in (-1, -2)])
        self.residual = float((sums - 1).abs().max())
        self.reached = self.residual <= TOLERANCE


def converged(row: Row, bind: Callable[[int], Run], cap: float) -> Row:
    """As few iterations as reach the tolerance, or as many as there may be."""
    below = row
    while not row.reached:
        below = row
        most = min(MOST, 1e3 * cap * row.iterations / row.forward)
        k = int(min(2 * row.iterations, most))
        if k < 1.1 * row.iterations or math.isnan(row.residual):
            return row if row.converge else Row(row.name, k, row.run, True)
        row = Row(row.name, k, bind(k), True)
    # The log of the residual is nearly linear in their number, and convex: the chord
    # tells a number that is just large enough. Its upper end may be at rounding.
    for _ in range(3):
        logs = [math.log(x / TOLERANCE + 1e-9) for x in (below.residual, row.residual)]
        share = (logs[0] + 0.05) / (logs[0] - logs[1] + 0.05)
        k = below.iterations + math.ceil(share * (row.iterations - below.iterations))
        closer = Row(row.name, k, bind(k), True)
        below, row = (below, closer) if closer.reached else (closer, row)
    return row


def measure(rows: list[Row], reference: Tensor, budget: float) -> None:
    """Memory and gradients once each, then all times, the rows by turns."""
    thunks: dict[tuple[Row, str], Callable[[], Any]] = {}
    for row in rows:
        if row.converge and not row.reached:
            row.note = "not reached"
            continue
        thunks[row, "forward"] = row.run.forward
        try:
            row.peak = row.run.peak()
            if row.peak > MOST_BYTES:
                row.note = "too large to differentiate here"
                continue
            gradient, row.both = timed(row.run.gradient)
        except Exception as reason:  # that of others is a result
            if row.name in OURS:
                raise
            row.note = f"gradient raises {type(reason).__name__}"
            continue
        wrong = (gradient.double() - reference).abs().max()
        row.error = float(wrong / reference.abs().max())
        if row.both < 1e4 * budget:
            thunks[row, "both"] = row.run.gradient
    best, spent = dict.fromkeys(thunks, math.inf), dict.fromkeys(thunks, 0.0)
    for _ in range(50):
        for key, thunk in thunks.items():
            if spent[key] < 1e3 * budget:
                _, ms = timed(thunk)
                spent[key] += ms
                best[key] = min(best[key], ms)
    for (row, what), ms in best.items():
        setattr(row, what, ms)


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a call gives back, and how many milliseconds it took."""
    begin = time.perf_counter()
    value = function()
    return value, 1e3 * (time.perf_counter() - begin)


def problem(batch: int, n: int, temperature: float, dtype: torch.dtype) -> Problem:
    """Both dtypes get the same numbers, those of float32."""
    generator = torch.Generator().manual_seed(0)
    noise = -torch.empty(batch, n, n).exponential_(generator=generator).log()
    scores = torch.randn(batch, n, n, generator=generator) + noise
    c = torch.randn(batch, n, n, generator=generator)
    return scores.to(dtype), c.to(dtype), temperature


def compare(
    methods: dict[str, Method], given: Problem, cap: float, budget: float
) -> list[Row]:
    """All rows for one problem; with a cap of 0 seconds the customary ones only."""
    rows = []
    for name, method in methods.items():
        bind = functools.partial(method, *given)
        rows.append(Row(name, CUSTOMARY, bind(CUSTOMARY)))
        if name not in OURS and not rows[-1].reached and cap:
            rows.append(converged(rows[-1], bind, cap))
    scores, c, temperature = given
    exact = OURS["log_sinkhorn().exp()"](scores.double(), c.double(), temperature, 0)
    measure(rows, exact.gradient(), budget)
    return rows


# %% Tables
def show(value: float, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    text = f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}"
    return "-" if math.isnan(value) else text


def print_rows(title: str, rows: list[Row]) -> None:
    """One cell of the first table."""
    head = ["iterations", "residual", "forward", "+backward", "peak", "gradient"]
    print(f"\n{title:22}" + "".join(f"{x:>11}" for x in head) + f"{'x ours':>16}")
    for row in rows:
        ratios = row.forward / rows[0].forward, row.both / rows[0].both
        bound = ">" if row.note == "not reached" else ""
        texts = [
            "" if row.name in OURS else str(row.iterations),
            f"{row.residual:.1e}",
            *(show(x) for x in (row.forward, row.both, row.peak / 1e6)),
            f"{row.error:.0e}".replace("nan", "-"),
            bound + show(ratios[0], 2),
        ]
        line = "".join(f"{x:>11}" for x in texts) + f"{show(ratios[1], 2):>8}"
        print(f"  {row.name:20}{line}  {row.note}".rstrip(), flush=True)


def verdict(title: str, ours: Row, rows: list[Row]) -> str:
    """One line: the others' cost in terms of one of ours, and its memory."""
    others = [row for row in rows if row.name not in OURS]
    forward = {row: row.forward / ours.forward for row in others}
    both = {row: row.both / ours.both for row in others}
    line = f"{title:24}{ours.name:20}"
    for cost, worst in ((forward, math.inf), (both, RIGHT)):
        among = [x for x in others if x.reached and not x.error > worst]
        among = [x for x in among if not math.isnan(cost[x])]
        best = min(among, key=lambda row: cost[row], default=None)
        text = f"{show(cost[best], 2)} {best.name}" if best else "none reaches it"
        line += f"{text:>22}"
    for row in others:
        if row.name == LOOP and not row.converge:
            line += f"{show(forward[row], 2):>12}{show(both[row], 2):>12}"
    return line + f"{ours.peak / (4 * ours.run.forward().numel()):>8.0f}"


def print_growth(step: int, budget: float) -> None:
    """The second table: ours and the loop's 20 iterations, float32."""
    methods = {"sinkhorn": OURS["sinkhorn"], LOOP: log_loop()}
    columns = f"{'residual':>12}{'forward':>10}{'+backward':>11}"
    print(f"\nGrowth, float32{'ours':>16}{LOOP + ', 20 iterations':>46}")
    print(f"{'batch x n':>10}{'temperature':>13}{columns}{columns}")
    cases = [(1, n, 0.1) for n in (10, 30, 100, 300, 1000, 2000)][::step]
    cases += [(5, 278, 1 / x) for x in (1, 3, 10, 30, 100, 300, 1000)][::step]
    for batch, n, temperature in cases:
        given = problem(batch, n, temperature, torch.float32)
        text = f"{f'{batch} x {n}':>10}{temperature:>13.3g}"
        for row in compare(methods, given, 0, budget):
            text += f"{row.residual:>12.1e}{show(row.forward):>10}{show(row.both):>11}"
        print(text, flush=True)


def print_distribution(budget: float) -> None:
    """What inference pays for: a density should cost less than five samples."""
    scores, _, _ = problem(5, 278, 1.0, torch.float32)
    print(
        f"\nGumbelSinkhorn, 5 x 278, float32{'rsample':>12}{'log_prob':>10}{'ratio':>8}"
    )
    for temperature in TEMPERATURES:
        d = GumbelSinkhorn(scores, temperature)
        value = d.rsample()
        times = fastest([d.rsample, functools.partial(d.log_prob, value)], budget)
        texts = "".join(f"{show(x):>10}" for x in (*times, times[1] / times[0]))
        print(f"{temperature:>32g}  {texts}", flush=True)


def print_matching(budget: float) -> None:
    """Hard matchings beside a bare loop over SciPy's solver."""
    print(f"\nmatching, float32{'ours':>16}{'SciPy loop':>12}{'ratio':>8}")
    for batch, n in SIZES:
        scores, _, _ = problem(batch, n, 1.0, torch.float32)
        costs = scores.double().numpy()

        def loop(costs: Any = costs) -> list[Any]:
            return [linear_sum_assignment(x, maximize=True) for x in costs]

        times = fastest([functools.partial(matching, scores), loop], budget)
        texts = f"{show(times[0]):>10}{show(times[1]):>12}"
        print(
            f"{f'{batch} x {n}':>23}{texts}{show(times[0] / times[1]):>8}", flush=True
        )


def fastest(functions: list[Callable[[], Any]], budget: float) -> list[float]:
    """Milliseconds of each, the minimum of several runs by turns."""
    best = [timed(function)[1] for function in functions]
    begin = time.perf_counter()
    while time.perf_counter() - begin < budget * len(functions):
        best = [min(x, timed(f)[1]) for x, f in zip(best, functions, strict=True)]
    return best


def main() -> None:
    """Read the command line, print the tables."""
    parser = argparse.ArgumentParser(description="Ours and others, side by side.")
    parser.add_argument("--quick", action="store_true", help="a few cells, briefly")
    parser.add_argument("--cells", default="", help="regular expression for titles")
    parser.add_argument("--methods", default="", help="regular expression for others")
    parser.add_argument("--cap", type=float, default=10.0, help="seconds of iterations")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    cap, budget = (min(args.cap, 1.0), 0.3) if args.quick else (args.cap, 1.0)
    step = 2 if args.quick else 1
    if hasattr(os, "sched_setaffinity"):  # before jax counts them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    methods = dict(OURS)
    for name, method in OTHERS.items():
        try:
            if re.search(args.methods, name):
                methods[name] = method()
        except ImportError as reason:
            print(f"{name} is absent: {reason}")
    print(f"torch {torch.__version__}, {args.threads} thread(s); ms and MB")
    verdicts = []
    cells = itertools.product(SIZES[::step], TEMPERATURES[: 4 - step], DTYPES[::step])
    for (batch, n), temperature, dtype in cells:
        title = f"{batch} x {n}, {temperature:g}, {str(dtype)[6:]}"
        if re.search(args.cells, title):
            given = problem(batch, n, temperature, dtype)
            rows = compare(methods, given, cap, budget)
            print_rows(title, rows)
            verdicts += [verdict(title, row, rows) for row in rows if row.name in OURS]
    if verdicts:
        print(
            "\nCost in terms of ours: the fastest that reaches the tolerance (forward +"
        )
        print(
            "backward: with the right gradient); the loop's 20 iterations. Our peak in"
        )
        print("terms of the scores in float32.")
        print("The distributions use log_sinkhorn, whose small entries are right too.")
        print(f"{'fastest: forward':>66}{'+backward':>22}", end="")
        print(f"{'20: forward':>12}{'+backward':>12}{'peak':>8}")
        print("\n".join(verdicts))
    if re.search(args.cells, "growth"):
        print_growth(step, budget)
    if re.search(args.cells, "distribution"):
        print_distribution(budget)
    if re.search(args.cells, "matching"):
        print_matching(budget)


if __name__ == "__main__":
    main()
