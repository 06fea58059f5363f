# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The warnings of this package, as classes, so that they can be filtered by name."""

from __future__ import annotations

__all__ = ["ConvergenceWarning", "LostLogWarning"]


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it reached its tolerance.

    Args:
        residual: The largest error that is left in a row or column sum.
        iterations: The number of steps that were taken.
        tolerance: The error that was asked for.
        solver: The name of what stopped, as the message begins.
        remedy: What to do about it, as the message ends.
    """

    def __init__(
        self,
        residual: float,
        iterations: int,
        tolerance: float,
        *,
        solver: str = "Sinkhorn",
        remedy: str = "The hard matching can be right all the same. Raise the "
        "temperature, or pass a larger tol.",
    ) -> None:
        """Build the message from the numbers and keep them as attributes."""
        super().__init__(
            f"{solver} stopped after {iterations} steps with a row or column sum off "
            f"by {residual:.3g} (tolerance {tolerance:.3g}). {remedy}"
        )
        self.residual = residual
        self.iterations = iterations
        self.tolerance = tolerance


class LostLogWarning(UserWarning):
    """A doubly stochastic value lost its logarithm and has entries of exactly zero."""
