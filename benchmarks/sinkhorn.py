# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What a Sinkhorn operator costs: ours beside others', on the same scores in one run.

The others repeat row and column normalisations and leave it to the user to say how
often. So each is run for the customary 20 iterations, wherever they end, and for as
many as a residual of 1e-6 takes. That number is searched for and convergence checks are
off: nobody pays for iterations that are not needed.

    pip install -e ".[benchmarks]"
    python benchmarks/sinkhorn.py --quick             # two or three minutes
    python benchmarks/sinkhorn.py                     # an hour
    python benchmarks/sinkhorn.py --cells "5 x 278.*float32" --methods "loop|ott"

Scores are N(0, 1) + Gumbel noise; the loss is (P * C).sum() with C from N(0, 1).

    residual    largest error of a row or column sum, added up in float64
    forward     ms without recording a graph;  + backward: ms of both together
    peak        MB at the peak of forward + backward, scores and gradient counted: the
                events of torch's CPU allocator in a profile (what NumPy, SciPy or MKL
                take is not seen), for jax XLA's own analysis of its buffers
    gradient    largest error, relative to the largest entry. The reference is ours in
                float64, which the tests hold against finite differences
    x ours      cost in terms of ours, forward and forward + backward

A time is the minimum of several runs after a first one; the methods take turns, so that
what else the machine does hits all alike. Compiling is not counted. All run on
``--threads`` processors (1). More than 10 000 iterations, or ``--cap`` seconds of them,
are not run: such a row shows how far that came, and a lower bound.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler talks on stderr

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pyro_permutations import log_sinkhorn, sinkhorn

SIZES = [(64, 10), (16, 100), (5, 278), (1, 1000)]  # batch x n
TEMPERATURES = [1.0, 0.1, 0.01]
DTYPES = [torch.float32, torch.float64]
CUSTOMARY = 20  # iterations, in papers and in code
TOLERANCE = 1e-6
MOST_ITERATIONS = 10_000
MOST_BYTES = 4e9  # of a graph that is unrolled
RIGHT = 0.01  # a gradient whose error is larger is another gradient
LOOP = "log-domain loop"


@dataclass
class Run:
    """A method bound to scores, C, temperature and number of iterations."""

    forward: Callable[[], Tensor]  # P
    gradient: Callable[[], Tensor]
    peak: Callable[[], float]  # bytes
    unrolled: bool = True  # whether the graph grows with the iterations


# %% Methods: each function imports a library, or fails to, and gives back what binds it
Method = Callable[[Tensor, Tensor, float, int], Run]


def in_torch(plan: Callable[..., Tensor], unrolled: bool = True) -> Method:
    """A method from a function of scores, temperature and number of iterations."""

    def bind(scores: Tensor, c: Tensor, temperature: float, iterations: int) -> Run:
        def forward() -> Tensor:
            with torch.no_grad():
                return plan(scores, temperature, iterations)

        def gradient() -> Tensor:
            leaf = scores.clone().requires_grad_()
            loss = (plan(leaf, temperature, iterations) * c).sum()
            return torch.autograd.grad(loss, leaf)[0]

        return Run(forward, gradient, lambda: peak_bytes(gradient), unrolled)

    return bind


def log_loop() -> Method:
    """Rows, then columns, in logs: what Gumbel-Sinkhorn code usually does."""

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        log_p = scores / temperature
        for _ in range(iterations):
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)
            log_p = log_p - log_p.logsumexp(-2, keepdim=True)
        return log_p.exp()

    return in_torch(plan)


def pot() -> Method:
    """POT in logs, one problem at a time, unrolled."""
    from ot.bregman import sinkhorn_log

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        one = scores.new_ones(scores.shape[-1])
        options = {"numItermax": iterations, "stopThr": 0.0, "warn": False}
        plans = [sinkhorn_log(one, one, -x, temperature, **options) for x in scores]
        return torch.stack(plans)

    return in_torch(plan)


def pot_batch() -> Method:
    """POT in logs, batched, with the gradient of the last step that it offers."""
    from ot.batch import solve_batch

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        one = scores.new_ones(scores.shape[:-1])
        options = {"max_iter": iterations, "tol": 0.0, "grad": "last_step"}
        return solve_batch(-scores, temperature, one, one, **options).plan

    return in_torch(plan, unrolled=False)


def pygmtools() -> Method:
    """The batched solver of pygmtools, which counts half iterations; unrolled."""
    from pygmtools import sinkhorn as solve

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        options = {"batched_operation": True, "backend": "pytorch"}
        return solve(scores, max_iter=2 * iterations, tau=temperature, **options)

    return in_torch(plan)


def geomloss() -> Method:
    """The batched solver of geomloss: annealed, with the gradient of the last step."""
    from geomloss.ot import solve_batch

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        one = scores.new_ones(scores.shape[:-1])
        options = {"reg": temperature, "max_iter": iterations}
        return solve_batch(-scores, a=one, b=one, **options).plan

    return in_torch(plan, unrolled=False)


def ott() -> Method:
    """ott-jax, jitted: 20 iterations unrolled, more of them implicit (its default)."""
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    jax.config.update("jax_enable_x64", True)
    logging.getLogger("jax").setLevel(logging.CRITICAL)  # tracebacks of its solver

    def bind(scores: Tensor, c: Tensor, temperature: float, iterations: int) -> Run:
        options: dict[str, Any] = {"inner_iterations": iterations}
        if iterations <= CUSTOMARY:
            options = {"inner_iterations": 10, "implicit_diff": None}
        solver = Sinkhorn(
            min_iterations=iterations, max_iterations=iterations, **options
        )
        x, weights = jax.numpy.asarray(scores), jax.numpy.asarray(c)
        one = jax.numpy.ones(x.shape[-1], x.dtype)

        def plan(x: Any) -> Any:
            geometry = Geometry(cost_matrix=-x, epsilon=temperature)
            return solver(LinearProblem(geometry, a=one, b=one)).matrix

        forward = jax.jit(jax.vmap(plan)).lower(x).compile()
        loss = jax.grad(lambda x: (jax.vmap(plan)(x) * weights).sum())
        backward: list[Any] = []  # compiled by the first to ask

        def gradient() -> Tensor:
            backward or backward.append(jax.jit(loss).lower(x).compile())
            return torch.from_dlpack(backward[0](x).block_until_ready())

        def peak() -> float:
            gradient()
            size = backward[0].memory_analysis()
            outside = size.argument_size_in_bytes + size.output_size_in_bytes
            return outside + size.temp_size_in_bytes

        return Run(
            lambda: torch.from_dlpack(forward(x).block_until_ready()),
            gradient,
            peak,
            unrolled=False,
        )

    return bind


OURS = {
    "sinkhorn": in_torch(lambda x, t, _: sinkhorn(x, t), False),
    "log_sinkhorn().exp()": in_torch(lambda x, t, _: log_sinkhorn(x, t).exp(), False),
}
OTHERS = {
    LOOP: log_loop,
    "POT ot.bregman": pot,
    "POT ot.batch": pot_batch,
    "pygmtools": pygmtools,
    "geomloss": geomloss,
    "ott-jax": ott,
}


# %% Measuring
@dataclass
class Row:
    """A line of the table: where a method ends, and what that costs."""

    name: str
    iterations: int | None  # None: it decides for itself
    run: Run
    converge: bool = False  # to the tolerance, rather than the customary iterations
    residual: float = field(init=False)
    forward: float = field(init=False)  # ms
    both: float = math.nan
    peak: float = math.nan
    error: float = math.nan  # of the gradient
    note: str = ""

    def __post_init__(self) -> None:
        begin = time.perf_counter()
        p = self.run.forward()
        self.forward = 1e3 * (time.perf_counter() - begin)
        sums = [p.double().sum(dim) for dim in (-1, -2)]
        self.residual = max(float((x - 1).abs().max()) for x in sums)


def peak_bytes(function: Callable[[], Any]) -> float:
    """The most that a call holds of torch's memory at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def converged(start: Row, bind: Callable[[int], Run], first: int, cap: float) -> Row:
    """The fewest iterations, to some 5%, that reach the tolerance; or the last tried.

    The log of the residual is nearly linear in the number of iterations, and flattens:
    extrapolate while it is too large (threefold at most), interpolate once it is not.
    """
    before, below, above, k = start, start, None, first
    while True:
        row = Row(start.name, k, bind(k), True)
        if not math.isfinite(row.residual):
            return row
        if row.residual <= TOLERANCE:
            above = row
        else:
            before, below = below, row
        left, right = (below, above) if above else (before, below)
        gain = math.log(left.residual / max(right.residual, 1e-16))
        rate = max(gain / (right.iterations - left.iterations), 1e-9)
        missing = math.log(below.residual / TOLERANCE) + 0.1
        k = below.iterations + math.ceil(missing / rate)
        if above:
            k = max(k, below.iterations + (above.iterations - below.iterations) // 10)
            if k > 0.95 * above.iterations:
                return above
        else:
            most = min(MOST_ITERATIONS, 1e3 * cap * below.iterations / below.forward)
            if below.iterations > 0.9 * most:
                return below
            k = int(min(max(k, 1.1 * below.iterations), 3 * below.iterations, most))


def measure(rows: list[Row], reference: Tensor, budget: float) -> None:
    """Memory and gradients once each, then all times, the rows by turns."""
    thunks: dict[tuple[int, str], Callable[[], Any]] = {}
    customary = {row.name: row for row in rows if not row.converge}
    for i, row in enumerate(rows):
        if row.converge and not row.residual <= TOLERANCE:
            row.note = f"{TOLERANCE:.0e} not reached"
            continue
        thunks[i, "forward"] = row.run.forward
        growth = row.iterations / CUSTOMARY if row.converge and row.run.unrolled else 0
        need = growth * customary[row.name].peak
        if need > MOST_BYTES:
            row.note = f"backward needs {need / 1e9:.0f} GB"
            continue
        try:
            row.peak = row.run.peak()
            wrong = (row.run.gradient().double() - reference).abs().max()
            row.error = float(wrong / reference.abs().max())
            thunks[i, "both"] = row.run.gradient
        except Exception as reason:  # what others raise is a result
            row.note = f"gradient raises {type(reason).__name__}"
    best, spent = dict.fromkeys(thunks, math.inf), dict.fromkeys(thunks, 0.0)
    for _ in range(50):
        for key, thunk in thunks.items():
            if spent[key] < budget:
                begin = time.perf_counter()
                thunk()
                seconds = time.perf_counter() - begin
                spent[key] += seconds
                best[key] = min(best[key], 1e3 * seconds)
    for (i, name), ms in best.items():
        setattr(rows[i], name, ms)


Problem = tuple[Tensor, Tensor, float]  # scores, C, temperature


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
    """All rows for one problem, ours first; with a cap of 0 only 20 iterations."""
    rows, first = [], 3 * CUSTOMARY
    for name, method in methods.items():

        def bind(k: int, method: Method = method) -> Run:
            return method(*given, k)

        row = Row(name, None if name in OURS else CUSTOMARY, bind(CUSTOMARY))
        rows.append(row)
        if name not in OURS and row.residual > TOLERANCE and cap:
            rows.append(converged(row, bind, first, cap))
            if rows[-1].residual <= TOLERANCE:
                first = rows[-1].iterations  # mostly right for the next one, too
    scores, c, temperature = given
    exact = OURS["sinkhorn"](scores.double(), c.double(), temperature, 0)
    measure(rows, exact.gradient(), budget)
    return rows


# %% Tables
def show(value: float, pattern: str = "{:.3g}", bound: bool = False) -> str:
    """A number, or a dash where there is none."""
    text = f"{value:.0f}" if value >= 100 else pattern.format(value)
    return "-" if math.isnan(value) else ">" * bound + text


def print_rows(title: str, rows: list[Row]) -> None:
    """One cell of the first table."""
    head = ("iterations", "residual", "forward", "+ backward", "peak", "gradient")
    print(f"\n{title:24}" + "".join(f"{x:>11}" for x in head) + f"{'x ours':>18}")
    ours = rows[0]
    for row in rows:
        missed = row.converge and not row.residual <= TOLERANCE
        texts = [
            "" if row.iterations is None else str(row.iterations),
            f"{row.residual:.0e}",
            show(row.forward),
            show(row.both),
            show(row.peak / 1e6),
            show(row.error, "{:.0e}"),
            show(row.forward / ours.forward, "{:.1f}", missed),
        ]
        ratio = show(row.both / ours.both, "{:.1f}")
        line = "".join(f"{x:>11}" for x in texts)
        print(f"  {row.name:22}{line}{ratio:>7}  {row.note}".rstrip())


def verdict(title: str, rows: list[Row]) -> str:
    """One line: ours against the fastest at equal residual, and against the loop."""
    ours, *others = [row for row in rows if row.name != list(OURS)[1]]
    reached = [row for row in others if row.residual <= TOLERANCE]
    right = [row for row in reached if row.error <= RIGHT]
    tried = [row for row in others if row.converge]
    parts = []
    for what, among in (("forward", reached), ("both", right)):
        cost = getattr(ours, what)
        if among:
            best = min(among, key=lambda row: getattr(row, what))
            parts.append(f"{getattr(best, what) / cost:.1f} ({best.name})")
        else:
            least = min((row.forward for row in tried), default=math.nan)
            parts.append(f"none (>{least / cost:.0f})")
    loop = next((row for row in others if row.name == LOOP), None)
    scores = 4e-6 * ours.run.forward().numel()
    parts += [
        f"{loop.forward / ours.forward:.1f}" if loop else "-",
        f"{loop.both / ours.both:.1f}" if loop else "-",
        f"{1e-6 * ours.peak / scores:.0f}",
    ]
    return (
        f"{title:24}"
        + "".join(f"{x:>23}" for x in parts[:2])
        + "".join(f"{x:>11}" for x in parts[2:])
    )


def print_growth(sizes: list[int], inverses: list[int], budget: float) -> None:
    """The second table: ours and the loop's 20 iterations, float32."""
    methods = {"sinkhorn": OURS["sinkhorn"], LOOP: log_loop()}
    columns = "residual   forward  + backward".rjust(36)
    print(f"\nGrowth, float32{'ours':>20}{LOOP + ', 20 iterations':>41}")
    print(f"{'batch x n':>12}{'temperature':>13}{columns}{columns}")
    cases = [(1, n, 0.1) for n in sizes] + [(5, 278, 1 / x) for x in inverses]
    for batch, n, temperature in cases:
        given = problem(batch, n, temperature, torch.float32)
        text = f"{f'{batch} x {n}':>12}{temperature:>13.3g}"
        for row in compare(methods, given, 0, budget):
            text += f"{row.residual:>14.0e}{show(row.forward):>10}{show(row.both):>12}"
        print(text, flush=True)


def main() -> None:
    """Read the command line, print the tables."""
    parser = argparse.ArgumentParser(description="Ours and others, side by side.")
    parser.add_argument("--quick", action="store_true", help="a few cells, briefly")
    parser.add_argument("--cells", default="", help="regular expression for titles")
    parser.add_argument("--methods", default="", help="regular expression for others")
    parser.add_argument("--cap", type=float, default=10.0, help="seconds of iterations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-growth", action="store_true", help="only the first table")
    args = parser.parse_args()
    cap, budget = (min(args.cap, 1.0), 0.1) if args.quick else (args.cap, 1.0)
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
    print(f"torch {torch.__version__}, {args.threads} thread(s); ms, MB")
    verdicts = []
    for batch, n in SIZES[::2] if args.quick else SIZES:
        for temperature in TEMPERATURES[:2] if args.quick else TEMPERATURES:
            for dtype in [torch.float32] if args.quick else DTYPES:
                title = f"{batch} x {n}, {temperature:g}, {str(dtype)[6:]}"
                if re.search(args.cells, title):
                    given = problem(batch, n, temperature, dtype)
                    rows = compare(methods, given, cap, budget)
                    print_rows(title, rows)
                    verdicts.append(verdict(title, rows))
    print("\nOthers' cost in terms of ours: the fastest of those that reach the")
    print("tolerance (for + backward: with the right gradient), the loop's 20")
    print("iterations; and our peak in terms of the scores in float32.")
    head = f"{'':24}{'forward':>23}{'+ backward':>23}"
    print(f"{head}{'20: fwd':>11}{'+ bwd':>11}{'peak':>11}")
    print("\n".join(verdicts))
    if not args.no_growth:
        sizes, inverses = [10, 30, 100, 300, 1000, 2000], [1, 3, 10, 30, 100, 300, 1000]
        quick = slice(None, None, 2 if args.quick else 1)
        print_growth(sizes[quick], inverses[quick], budget)


if __name__ == "__main__":
    main()
