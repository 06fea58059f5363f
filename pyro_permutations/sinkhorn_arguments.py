# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What the Sinkhorn operator is given, checked before anything is computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.unmatched_scores import Unmatched, relative_scores

__all__ = ["LARGEST", "NOT_FINITE", "checked"]

# A row or column sum may be off by this much unless the caller says otherwise.
_TOLERANCE = 1e-6
# Sums and differences of scores up to here do not overflow.
LARGEST = 1e300
NOT_FINITE = (
    "logits must be finite or -inf (a forbidden pair), but some are NaN or +inf, or "
    f"exceed {LARGEST:.0e} when divided by the temperature. (Under torch.func.vmap "
    "forbid pairs by a mask, not by -inf, and see that the temperature is positive.)"
)


def checked(
    logits: Tensor,
    temperature: Tensor | float,
    mask: Tensor | MatchingGraph | None,
    unmatched: Unmatched | None,
    tol: float | None,
) -> tuple[Tensor, MatchingGraph, float]:
    """Scores over the temperature in float64 with slack, and what else solvers take."""
    if (
        not isinstance(logits, Tensor)
        or logits.dim() < 2
        or not logits.is_floating_point()
    ):
        raise ValueError(
            "logits must be a floating point tensor of shape (*batch, n, m), not "
            f"{getattr(logits, 'dtype', type(logits).__name__)} of shape "
            f"{tuple(getattr(logits, 'shape', ()))}."
        )
    shape = (logits.shape[-2], logits.shape[-1])
    scores, free = relative_scores(logits.double(), unmatched)
    if not _is_finite(scores.detach().sum()):
        forbidden = logits == -torch.inf
        given = torch.ones(shape, dtype=torch.bool, device=logits.device)
        if isinstance(mask, MatchingGraph) and unmatched is None:
            given = mask.allowed
            free = (mask.free_rows, mask.free_columns) if mask.has_slack else free
        elif mask is not None:
            given = matching_graph(mask, shape, logits.device, unmatched=free).allowed
        mask = given & ~forbidden
        scores = torch.where(forbidden, 0.0, scores)
        if _any(~torch.isfinite(scores)):
            raise ValueError(NOT_FINITE)
    graph = matching_graph(mask, shape, logits.device, unmatched=free)
    scores = scores / _checked_temperature(temperature, scores)
    _common(scores.shape[:-2], graph.batch_shape, "mask")
    tol = _TOLERANCE if tol is None else tol
    if not tol > 0:
        raise ValueError(f"tol must be positive, but is {tol}.")
    return graph.with_slack(scores, 0.0), graph, tol


def _common(batch: torch.Size, other: torch.Size, name: str) -> torch.Size:
    try:
        return torch.Size(torch.broadcast_shapes(batch, other)) if other else batch
    except RuntimeError:
        raise ValueError(
            f"{name} of batch shape {tuple(other)} does not broadcast with logits of "
            f"batch shape {tuple(batch)}."
        ) from None


def _is_finite(total: Tensor) -> bool:
    """Whether a number is; True where it cannot be looked at."""
    try:
        return math.isfinite(total)
    except RuntimeError:  # under torch.func.vmap
        return True


def _any(condition: Tensor) -> bool:
    """Whether any entry holds; False for tensors whose values cannot be looked at."""
    try:
        return bool(condition.any())
    except RuntimeError:  # under torch.func.vmap
        return False


def _checked_temperature(temperature: Tensor | float, scores: Tensor) -> Tensor | float:
    """What scores are divided by."""
    if isinstance(temperature, Tensor):
        tau = temperature.to(scores.device, torch.float64)
        positive = (tau > 0) & (tau < torch.inf)
        valid = not _any(~positive)
        # Where no value may be looked at here, under vmap, the solver finds the NaN.
        tau = torch.where(positive, tau, torch.nan)
        _common(scores.shape[:-2], tau.shape, "temperature")
        divisor: Tensor | float = tau[..., None, None]
    else:
        divisor = float(temperature)
        valid = 0 < divisor < torch.inf
    if not valid:
        raise ValueError(
            f"temperature must be positive and finite, but is {temperature}. For the "
            "limit of zero use matching(logits)."
        )
    return divisor
