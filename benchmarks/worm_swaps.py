# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""InformedSwaps on the worm: does sampling improve the estimate of SVI?

    pip install -e ".[tutorials]"
    python benchmarks/worm_swaps.py                # two minutes of SVI, ten of swaps
    python benchmarks/worm_swaps.py --anneal 1     # at the temperature of the model

The problem is that of tutorials/worm.py, 4 worms of 279 neurons and 30 candidates for
each that is not known, with the weights integrated out; the prior is the discrete one.
The chain starts at the noise-free matching of the SVI estimate. With --anneal B it runs
in stages on the model to the power of beta (``poutine.scale``), from beta = B to 1;
each stage starts where the last one ended. A state is 2.5 MB, so samples are not kept:
``StreamingMCMC`` with running means.

The exit status is 1 if the log joint is not raised, or if fewer neurons are named right
than at the start.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc.api import StreamingMCMC
from pyro.ops.streaming import CountMeanStats, StatsOfDict
from torch import Tensor

from pyro_permutations import GibbsMatching, InformedSwaps, matching, to_indices

WORM = runpy.run_path(str(Path(__file__).parent.parent / "tutorials" / "worm.py"))
STAGES = 20


def model(data: Any, connected: Tensor) -> None:
    """The model of the tutorial with its discrete prior."""
    zeros = torch.zeros(data.allowed.shape)
    with pyro.plate("worms", len(zeros)):
        P = pyro.sample("P", GibbsMatching(zeros, mask=data.allowed))
    pyro.factor("activity", WORM["activity_evidence"](data, connected, P))


def stage(
    data: Any, connected: Tensor, P: Tensor, beta: float, steps: int
) -> tuple[Tensor, Tensor, float]:
    """Last state, mean of the states, and rate of acceptance."""
    last = P

    def keep(kernel: Any, params: dict[str, Tensor], name: str, i: int) -> None:
        nonlocal last
        last = params["P"]

    scaled = model if beta == 1 else poutine.scale(model, scale=beta)
    mcmc = StreamingMCMC(
        InformedSwaps(scaled, replicas=1),
        steps,
        warmup_steps=0,
        initial_params={"P": P},
        statistics=StatsOfDict(default=CountMeanStats),
        hook_fn=keep,
        disable_progbar=True,
    )
    mcmc.run(data, connected)
    mean = mcmc.get_statistics(group_by_chain=False)["P"]["mean"]
    return last, mean, mcmc.diagnostics()["acceptance rate"]["chain 0"]


def main() -> None:
    """Fit by SVI, go on by swaps, print a line for each stage."""
    parser = argparse.ArgumentParser(description="InformedSwaps on the worm.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--anneal", type=float, default=0.1, help="first beta; 1: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a quarter of the neurons")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(args.seed)
    worm = WORM["load_connectome"](every=4 if args.smoke else 1)
    size = (2, 5, 10) if args.smoke else (4, 30, 25)
    data = WORM["simulate"](worm, *size)
    logits = WORM["fit"](data, worm.connected, 100 if args.smoke else 200, (2.0, 0.5))
    torch.set_default_dtype(torch.float64)  # the log joint is ten thousands of nats
    data = data._replace(
        past=data.past.double(), lagged=data.lagged.double(), power=data.power.double()
    )
    P = matching(logits.double(), mask=data.allowed)

    def show(
        title: str, P: Tensor, acceptance: float | None = None
    ) -> tuple[float, ...]:
        joint = float(WORM["activity_evidence"](data, worm.connected, P))
        right = (to_indices(P) == data.truth).double()
        values = joint, float(right.mean()), float(right[~data.known].mean())
        text = f"{title:<24}{joint:>10.0f}{values[1]:>8.4f}{values[2]:>12.4f}"
        print(text + ("" if acceptance is None else f"{acceptance:>12.3f}"), flush=True)
        return values

    print(f"{'':<24}{'log joint':>10}{'right':>8}{'of unknown':>12}{'acceptance':>12}")
    truth = torch.nn.functional.one_hot(data.truth, data.allowed.shape[-1]).double()
    show("the truth", truth)
    before = show("SVI", P)
    stages = 4 if args.smoke else STAGES
    betas = [args.anneal ** (1 - s / (stages - 1)) for s in range(stages)]
    begin, steps, done = time.perf_counter(), 20, 0
    for s, beta in enumerate(betas):
        P, mean, acceptance = stage(data, worm.connected, P, beta, steps)
        spent, done = time.perf_counter() - begin, done + steps
        show(f"{spent / 60:5.1f} min, beta {beta:.3f}", P, acceptance)
        left = (60 * args.minutes - spent) / max(stages - 1 - s, 1)
        steps = max(int(left * done / spent), 10)
    after = show(f"{done} steps", P)
    best = matching(mean, mask=data.allowed)
    show("matching of the means", best)
    raised, kept = after[0] > before[0], after[1] >= before[1]
    print(f"log joint raised: {raised}; accuracy kept: {kept}")
    sys.exit(0 if raised and kept else 1)


if __name__ == "__main__":
    main()
