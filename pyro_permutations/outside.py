# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Building what is remembered outside of the modes and traces of who asks first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["outside"]

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
