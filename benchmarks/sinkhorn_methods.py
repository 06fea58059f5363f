# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn operators, ours and others': each imports its library, or fails to.

What a method gives back makes a :class:`Run` of scores, weights of the loss, the
temperature and the number of iterations.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler talks on stderr

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pyro_permutations import log_sinkhorn, sinkhorn

CUSTOMARY = 20  # iterations
LOOP = "log-domain loop"


class Run(NamedTuple):
    """A method bound to scores, C, temperature and number of iterations."""

    forward: Callable[[], Tensor]  # P
    gradient: Callable[[], Tensor]
    peak: Callable[[], float]  # bytes


Method = Callable[[Tensor, Tensor, float, int], Run]
Problem = tuple[Tensor, Tensor, float]  # scores, C, temperature


def in_torch(plan: Callable[..., Tensor], unrolled: bool = False) -> Method:
    """A method from P as a function of scores, temperature, number of iterations.

    Unrolled means that autograd keeps every iteration.
    """

    def bind(scores: Tensor, c: Tensor, temperature: float, iterations: int) -> Run:
        def gradient() -> Tensor:
            leaf = scores.clone().requires_grad_()
            loss = (plan(leaf, temperature, iterations) * c).sum()
            return torch.autograd.grad(loss, leaf)[0]

        def peak() -> float:
            few = bind(scores, c, temperature, CUSTOMARY).gradient
            return peak_bytes(few) * (iterations / CUSTOMARY if unrolled else 1)

        forward = torch.no_grad()(lambda: plan(scores, temperature, iterations))
        return Run(forward, gradient, peak)

    return bind


def peak_bytes(function: Callable[[], Any]) -> float:
    """The most that a call holds of torch's memory at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events))


def log_loop() -> Method:
    """Rows, then columns, in logs: what Gumbel-Sinkhorn code usually does."""

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        log_p = scores / temperature
        for _ in range(iterations):
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)
            log_p = log_p - log_p.logsumexp(-2, keepdim=True)
        return log_p.exp()

    return in_torch(plan, unrolled=True)


def pot() -> Method:
    """POT in logs, one problem at a time, unrolled."""
    from ot.bregman import sinkhorn_log

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        one = scores.new_ones(scores.shape[-1])
        options = {"numItermax": iterations, "stopThr": 0.0, "warn": False}
        plans = [sinkhorn_log(one, one, -x, temperature, **options) for x in scores]
        return torch.stack(plans)

    return in_torch(plan, unrolled=True)


def pot_batch() -> Method:
    """POT in logs, batched, with the gradient of the last step that it offers."""
    from ot.batch import solve_batch

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        one = scores.new_ones(scores.shape[:-1])
        options = {"max_iter": iterations, "tol": 0.0, "grad": "last_step"}
        return solve_batch(-scores, temperature, one, one, **options).plan

    return in_torch(plan)


def pygmtools() -> Method:
    """The batched solver of pygmtools, which counts half iterations; unrolled."""
    from pygmtools import sinkhorn as solve

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        options = {"batched_operation": True, "backend": "pytorch"}
        return solve(scores, max_iter=2 * iterations, tau=temperature, **options)

    return in_torch(plan, unrolled=True)


def geomloss() -> Method:
    """The batched solver of geomloss: annealed, with the gradient of the last step."""
    from geomloss.ot import solve_batch

    warnings.filterwarnings("ignore", module="geomloss")  # its float(tensor)

    def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
        one = scores.new_ones(scores.shape[:-1])
        options = {"reg": temperature, "max_iter": iterations}
        return solve_batch(-scores, a=one, b=one, **options).plan

    return in_torch(plan)


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
        ends = {"min_iterations": iterations, "max_iterations": iterations}
        solver = Sinkhorn(**ends, **options)
        x, weights = jax.numpy.asarray(scores), jax.numpy.asarray(c)
        one = jax.numpy.ones(x.shape[-1], x.dtype)

        @jax.vmap
        def plan(x: Any) -> Any:
            geometry = Geometry(cost_matrix=-x, epsilon=temperature)
            return solver(LinearProblem(geometry, a=one, b=one)).matrix

        @functools.cache
        def compiled(function: Callable[[Any], Any]) -> Any:
            return jax.jit(function).lower(x).compile()

        def call(function: Callable[[Any], Any]) -> Tensor:
            return torch.from_dlpack(compiled(function)(x).block_until_ready())

        def peak() -> float:
            size = compiled(slope).memory_analysis()
            outside = size.argument_size_in_bytes + size.output_size_in_bytes
            return outside + size.temp_size_in_bytes

        slope = jax.grad(lambda x: (plan(x) * weights).sum())
        compiled(plan)
        return Run(lambda: call(plan), lambda: call(slope), peak)

    return bind


OURS = {
    "sinkhorn": in_torch(lambda x, t, _: sinkhorn(x, t)),
    "log_sinkhorn().exp()": in_torch(lambda x, t, _: log_sinkhorn(x, t).exp()),
}
OTHERS = {
    LOOP: log_loop,
    "POT ot.bregman": pot,
    "POT ot.batch": pot_batch,
    "pygmtools": pygmtools,
    "geomloss": geomloss,
    "ott-jax": ott,
}
