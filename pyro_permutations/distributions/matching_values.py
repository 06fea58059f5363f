# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The check of a value that has to be a permutation matrix."""

from __future__ import annotations

__all__ = ["possible_matchings"]

import torch
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.outside import holds

_NO_PERMUTATION = (
    "the value is not a permutation matrix (entries 0 and 1, a single 1 in every row "
    "and column that has to be matched), so it has no probability. If it is a relaxed "
    "one, from a GumbelSinkhorn guide, there are two ways: relax the model, "
    "relax(model, temperature), or keep it and train with DiscreteKL_ELBO. A "
    "straight-through guide is not a third: its log_prob is that of relaxed values."
)


def possible_matchings(
    value: Tensor,  # (*sample, *batch, n, m)
    graph: MatchingGraph,
    batch_shape: torch.Size,
) -> Tensor:  # (*sample, *batch) bool
    """Which values are matchings that the mask of their batch element allows.

    Raises:
        ValueError: If a value has another shape, or is no permutation matrix, or a
            partial one where that can be. Relaxed values have no probability, and
            scoring them here would give a meaningless loss without any sign of it.
    """
    n, m = graph.shape
    if not isinstance(value, Tensor) or value.shape[-2:] != (n, m):
        shape = tuple(getattr(value, "shape", ()))
        raise ValueError(
            f"the value must be a tensor of shape (*sample, *batch, {n}, {m}), got "
            f"{type(value).__name__} of shape {shape}."
        )
    try:
        torch.broadcast_shapes(value.shape[:-2], batch_shape)
    except RuntimeError:
        raise ValueError(
            f"the value has shape {tuple(value.shape)}, which does not broadcast with "
            f"batch shape {tuple(batch_shape)}."
        ) from None
    known = holds((value == 0) | (value == 1))
    possible = (graph.allowed | (value == 0)).all(-1).all(-1)
    for dim, free in ((-1, graph.free_rows), (-2, graph.free_columns)):
        count = value.sum(dim, dtype=torch.float64)
        possible = possible & ((count == 1) | free).all(-1)
        # In a batch of masks: what may be unmatched in one of them is no error.
        anywhere = free.reshape(-1, free.shape[-1]).any(0)
        known = known and holds((count == 1) | anywhere & (count == 0))
    if not known:
        raise ValueError(_NO_PERMUTATION)
    return possible
