# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The warnings of this package, as classes, so that they can be filtered by name."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["ConvergenceWarning", "LostLogWarning", "warn"]


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it reached its tolerance.

    Args:
        residual: How far off it is.
        iterations: The number of steps that were taken.
        tolerance: The error that was asked for.
        solver: The name of what stopped, as the message begins.
        what: What is off, a row or column sum if nothing else is said.
        remedy: What to do about it, as the message ends.
    """

    def __init__(
        self,
        residual: float,
        iterations: int,
        tolerance: float,
        *,
        solver: str = "Sinkhorn",
        what: str = "a row or column sum",
        remedy: str = "The hard matching can be right all the same. Raise the "
        "temperature, or pass a larger tol.",
    ) -> None:
        """Build the message from the numbers and keep them as attributes."""
        super().__init__(
            f"{solver} stopped after {iterations} steps with {what} off by "
            f"{residual:.3g} (tolerance {tolerance:.3g}). {remedy}"
        )
        self.residual = residual
        self.iterations = iterations
        self.tolerance = tolerance


class LostLogWarning(UserWarning):
    """A doubly stochastic value lost its logarithm and has entries of exactly zero."""


def warn(warning: Warning | str) -> None:
    """Warn, as from the line that called this package, if by way of Pyro or torch."""
    level, frame = 1, sys._getframe()
    ours = "pyro_permutations", "pyro", "torch"
    while frame.f_back and _package(frame) in ours:
        level, frame = level + 1, frame.f_back
    warnings.warn(warning, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).split(".")[0]  # exec gives no name
