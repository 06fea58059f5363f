# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Modes, traces and transforms of torch: what may be looked at, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

__all__ = ["holds", "outside"]

P = ParamSpec("P")
T = TypeVar("T")


def outside(build: Callable[P, T]) -> Callable[P, T]:
    """Call a function in a thread of its own.

    Inference mode, ``torch.func`` transforms and ``torch.jit`` traces are matters of
    one thread. Tensors that are kept for later are made where there is none of them:
    they belong to no transform, and are constants of a trace.
    """

    @wraps(build)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(build, *args, **kwargs).result()

    return call


def holds(condition: Tensor) -> bool:
    """Whether a condition holds everywhere; True where no value may be looked at."""
    try:
        return bool(condition.all())
    except RuntimeError:  # under torch.func.vmap
        return True
