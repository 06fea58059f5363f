# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What the Sinkhorn operator is given, checked before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph, matching_graph

__all__ = ["LARGEST", "NOT_FINITE", "checked"]

# A row or column sum may be off by this much unless the caller says otherwise.
_TOLERANCE = 1e-6
# Sums and differences of scores up to here do not overflow.
LARGEST = 1e300
NOT_FINITE = (
    "logits must be finite or -inf (a forbidden pair), but some are NaN or +inf, or "
    f"exceed {LARGEST:.0e} when divided by the temperature."
)


def checked(
    logits: Tensor,
    temperature: Tensor | float,
    mask: Tensor | MatchingGraph | None,
    marginals: tuple[Tensor, Tensor] | None,
    tol: float | None,
) -> tuple[Tensor, MatchingGraph, Tensor, Tensor, float]:
    """Scores over the temperature in float64, and what else the solvers take."""
    if (
        not isinstance(logits, Tensor)
        or logits.dim() < 2
        or not logits.is_floating_point()
    ):
        raise ValueError(
            "logits must be a floating point tensor of shape (*batch, n, n), not "
            f"{getattr(logits, 'dtype', type(logits).__name__)} of shape "
            f"{tuple(getattr(logits, 'shape', ()))}."
        )
    shape = (logits.shape[-2], logits.shape[-1])
    if shape[0] != shape[1]:
        raise ValueError(
            f"logits must be square, but have shape {tuple(logits.shape)}: every row "
            "is matched to one column and every column to one row."
        )
    scores = logits.double()
    if _any(~torch.isfinite(scores.detach().sum())):
        forbidden = logits == -torch.inf
        given = matching_graph(mask, shape, logits.device).allowed
        mask = given & ~forbidden
        scores = torch.where(forbidden, 0.0, scores)
        if _any(~torch.isfinite(scores)):
            raise ValueError(NOT_FINITE)
    graph = matching_graph(mask, shape, logits.device)
    scores = scores / _checked_temperature(temperature, scores)
    lead = _common(scores.shape[:-2], graph.batch_shape, "mask")
    rows = columns = torch.ones(shape[-1], dtype=torch.float64, device=graph.device)
    if marginals is not None:
        rows, columns = _checked_marginals(*marginals)
        if rows.shape[-1:] + columns.shape[-1:] != torch.Size(shape):
            raise ValueError(
                f"marginals must be {shape[0]} row sums and {shape[1]} column sums, "
                f"but have shapes {tuple(rows.shape)} and {tuple(columns.shape)}."
            )
        for sums in (rows, columns):
            lead = _common(lead, sums.shape[:-1], "marginals")
        if not graph.is_full:
            _check_components(graph, rows, columns)
    rows, columns = rows[..., :, None], columns[..., None, :]
    scores = scores.expand(*lead, *shape)
    tol = _TOLERANCE if tol is None else tol
    if not tol > 0:
        raise ValueError(f"tol must be positive, but is {tol}.")
    return scores, graph, rows, columns, tol


def _common(batch: torch.Size, other: torch.Size, name: str) -> torch.Size:
    try:
        return torch.Size(torch.broadcast_shapes(batch, other))
    except RuntimeError:
        raise ValueError(
            f"{name} of batch shape {tuple(other)} does not broadcast with logits of "
            f"batch shape {tuple(batch)}."
        ) from None


def _any(condition: Tensor) -> bool:
    """Whether any entry holds; False for tensors whose values cannot be looked at."""
    try:
        return bool(condition.any())
    except RuntimeError:  # under torch.func.vmap
        return False


def _checked_marginals(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = rows.detach().double(), columns.detach().double()
    totals = rows.sum(-1), columns.sum(-1)
    if _any(~((rows > 0).all(-1) & (columns > 0).all(-1))):
        raise ValueError("marginals must be positive row sums and column sums.")
    if _any((totals[0] - totals[1]).abs() > 1e-9 * totals[0]):
        raise ValueError(
            f"marginals must have equal totals, but the row sums add up to {totals[0]} "
            f"and the column sums to {totals[1]}."
        )
    return rows, columns


def _check_components(graph: MatchingGraph, rows: Tensor, columns: Tensor) -> None:
    """What has to hold within a component of the mask, since nothing crosses."""
    totals = [
        torch.zeros_like(sums.expand(component.shape)).scatter_add(
            -1, component, sums.expand(component.shape)
        )
        for sums, component in (
            (rows, graph.row_component),
            (columns, graph.column_component),
        )
    ]
    if _any((totals[0] - totals[1]).abs() > 1e-9 * totals[0].amax(-1, keepdim=True)):
        raise ValueError(
            "marginals are not possible with this mask: it falls apart into components "
            "in which the row sums and the column sums do not add up to the same."
        )


def _checked_temperature(temperature: Tensor | float, scores: Tensor) -> Tensor | float:
    """What scores are divided by."""
    if isinstance(temperature, Tensor):
        tau = temperature.to(scores.device, torch.float64)
        valid = not _any(~((tau > 0) & (tau < torch.inf)))
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
