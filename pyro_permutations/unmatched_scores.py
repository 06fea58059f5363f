# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Scores for staying unmatched, as a shift of the scores of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_permutations.matching_graph import Free

__all__ = ["Unmatched", "relative_scores"]

# Scores of rows, () or (*batch, n), and of columns, () or (*batch, m).
Unmatched = tuple[Tensor | float, Tensor | float]


def relative_scores(
    logits: Tensor,  # (*batch, n, m)
    unmatched: Unmatched | None,
) -> tuple[Tensor, Free | None]:  # (*batch, n, m)
    r"""What a pair is worth more than its two items are unmatched, and which may be.

    .. math:: X_{ij} - a_i - b_j

    With a partial matching goes the sum of the scores of its pairs, of the unmatched
    rows, a, and of the unmatched columns, b: up to a constant, the sum of these
    differences over the pairs. A score of ``-inf`` says that a row or column has to be
    matched. None is for scores where all that can be is matched.
    """
    if unmatched is None:
        return logits, None
    if not isinstance(unmatched, tuple | list) or len(unmatched) != 2:
        raise ValueError(
            "unmatched must be a pair of scores, (rows, columns), each a number or a "
            f"tensor, got {_kind(unmatched)}."
        )
    n, m = logits.shape[-2:]
    rows = _vector(unmatched[0], n, logits, "rows")
    columns = _vector(unmatched[1], m, logits, "columns")
    free = _finite(rows), _finite(columns)
    rows, columns = (
        torch.where(known, score, 0)
        for known, score in zip(free, (rows, columns), strict=True)
    )
    return logits - rows[..., :, None] - columns[..., None, :], free


def _kind(given: object) -> str:
    sizes = f" of {len(given)}" if isinstance(given, tuple | list) else ""
    return type(given).__name__ + sizes


def _finite(vector: Tensor) -> Tensor:
    """Which scores are not -inf; all, where no value may be looked at."""
    finite = vector > -torch.inf
    try:
        finite.tolist()
    except RuntimeError:  # under torch.func.vmap
        return torch.ones(vector.shape[-1:], dtype=torch.bool, device=vector.device)
    return finite


def _vector(score: Tensor | float, size: int, logits: Tensor, name: str) -> Tensor:
    try:
        vector = torch.as_tensor(score, dtype=logits.dtype, device=logits.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"unmatched {name} must be a number or a tensor, got "
            f"{type(score).__name__}."
        ) from None
    if vector.dim() == 0:
        vector = vector.expand(size)
    if vector.shape[-1] != size:
        raise ValueError(
            f"unmatched {name} must have shape () or (*batch, {size}), got "
            f"{tuple(vector.shape)}."
        )
    try:
        torch.broadcast_shapes(vector.shape[:-1], logits.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"unmatched {name} of shape {tuple(vector.shape)} do not broadcast with "
            f"logits of shape {tuple(logits.shape)}."
        ) from None
    bad = vector.isnan() | (vector == torch.inf)
    try:
        wrong = bool(bad.any())
    except RuntimeError:  # under torch.func.vmap no value may be looked at
        wrong = False
    if wrong:
        raise ValueError(
            f"unmatched {name} must not be NaN or +inf. -inf says that it has to be "
            "matched."
        )
    return vector
