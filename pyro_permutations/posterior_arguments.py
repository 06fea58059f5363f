# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What a posterior is made of, checked."""

from __future__ import annotations

__all__ = ["checked_chains", "checked_matchings", "checked_weights"]

import torch
from torch import Tensor


def checked_matchings(
    perm: Tensor,  # (draws, *batch, n) of integers
    columns: int | None,
) -> Tensor:  # (draws, *batch, n) long
    """The draws, or a ValueError if they are not matchings to these columns."""
    if perm.dim() < 2 or perm.numel() == 0:
        raise ValueError(
            "perm must have shape (draws, *batch, n) with at least a draw and an item, "
            f"got {tuple(perm.shape)}."
        )
    if perm.is_floating_point() or perm.is_complex() or perm.dtype == torch.bool:
        raise ValueError(
            f"perm must be integers, the indices of columns, got {perm.dtype}: "
            "to_indices(P) makes them of matrices."
        )
    m = perm.shape[-1] if columns is None else columns
    order = perm.sort(-1).values
    same = (order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)
    least, largest = int(order.amin()), int(order.amax())
    if bool(same.any()) or least < -1 or largest >= m:
        raise ValueError(
            f"each matching must have every column of 0..{m - 1} at most once, and -1 "
            "for no partner; got "
            + ("a column twice." if same.any() else f"{least} to {largest}.")
        )
    return perm.long()


def checked_weights(
    weights: Tensor | None,  # (draws,) or (draws, *batch)
    perm: Tensor,  # (draws, *batch, n)
) -> Tensor:  # (draws, *batch) float64
    """The weights, normalised, or equal ones; a ValueError if they are none."""
    shape, device = perm.shape[:-1], perm.device
    if weights is None:
        return torch.full(shape, 1 / len(perm), dtype=torch.float64, device=device)
    if weights.shape not in {shape, shape[:1]}:
        raise ValueError(
            f"weights must have shape {tuple(shape[:1])} or {tuple(shape)}, got "
            f"{tuple(weights.shape)}."
        )
    lead = (1,) * (len(shape) - weights.dim())
    double = weights.detach().double().reshape(weights.shape + lead)
    total = double.sum(0)
    if not ((double >= 0).all() and (total > 0).all() and total.isfinite().all()):
        raise ValueError(
            "weights must be finite and not negative, with a positive sum for each "
            "matching of the batch; log weights need a softmax over the draws."
        )
    return (double / total).expand(shape)


def checked_chains(
    chains: int | None, draws: int, weights: Tensor | None
) -> int | None:
    """The number of chains, or a ValueError if the draws are not theirs."""
    if chains is None:
        return None
    if chains < 1 or draws % chains or draws < 4 * chains or weights is not None:
        raise ValueError(
            "chains must be a number of chains with equally many draws, at least four, "
            f"and no weights; got {chains} chains of {draws} draws in all, "
            f"{'without' if weights is None else 'with'} weights."
        )
    return chains
