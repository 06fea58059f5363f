# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Parallel tempering: replicas at several temperatures exchange their states."""

from __future__ import annotations

__all__ = ["TemperatureLadder"]

import math

import numpy as np
import torch
from torch import Tensor


class TemperatureLadder:
    r"""Inverse temperatures of R replicas, from one down to zero.

    Replica r has the density :math:`\pi_r \propto \exp(F + \beta_r T)`. Neighbours
    exchange states x, y with probability

    .. math:: \min\{1, \exp((\beta_r - \beta_{r+1}) (T(y) - T(x)))\}

    in turns, first the pairs (0, 1), (2, 3), ..., then (1, 2), (3, 4), ..., which moves
    states along the ladder faster than random pairs (Okabe et al. 2001). The rate of
    rejection between neighbours adds up to a barrier that hardly depends on where the
    rungs are, so :meth:`adapt` places them at equal parts of it (Syed et al. 2022).
    One replica alone has :math:`\beta = 1`.
    """

    def __init__(self, replicas: int) -> None:
        # Geometric at first: a sharp density flattens only at small beta.
        beta = [4.0**-r for r in range(replicas)]
        self.beta = [*beta[:-1], 0.0] if replicas > 1 else beta
        self._turn = 0
        self.reset()

    def reset(self) -> None:
        """Forget the rates of rejection."""
        self._rejected = [0.0] * (len(self.beta) - 1)
        self._tried = [0] * (len(self.beta) - 1)

    @property
    def rejection(self) -> list[float]:
        """Mean rate of rejection between neighbours since the last reset."""
        pairs = zip(self._rejected, self._tried, strict=True)
        return [rejected / tried if tried else 1.0 for rejected, tried in pairs]

    def exchange(
        self,
        tempered: Tensor,  # (R,), T of the states
    ) -> list[int] | None:
        """Which state each replica has after the exchange; None if all keep theirs."""
        T, uniform = tempered.tolist(), torch.rand(len(self.beta)).tolist()
        order = list(range(len(T)))
        for r in range(self._turn, len(T) - 1, 2):
            log_ratio = (self.beta[r] - self.beta[r + 1]) * (T[r + 1] - T[r])
            accept = math.exp(min(0.0, log_ratio)) if log_ratio == log_ratio else 0.0
            self._rejected[r] += 1 - accept
            self._tried[r] += 1
            if uniform[r] < accept:
                order[r], order[r + 1] = r + 1, r
        self._turn = 1 - self._turn
        return None if order == list(range(len(T))) else order

    def adapt(self) -> None:
        """Place the rungs at equal parts of the barrier, and reset the rates."""
        if len(self.beta) > 2:
            steps = np.maximum(self.rejection, 1e-3)
            barrier = np.concatenate([[0.0], np.cumsum(steps)])
            even = np.linspace(0.0, barrier[-1], len(barrier))
            self.beta = np.interp(even, barrier, self.beta).tolist()
        self.reset()
