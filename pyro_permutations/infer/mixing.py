# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""How well chains over matchings have mixed, item by item."""

from __future__ import annotations

__all__ = ["Mixing", "mixing"]

from typing import NamedTuple

import torch
from pyro.ops.stats import autocovariance, split_gelman_rubin
from torch import Tensor


class Mixing(NamedTuple):
    """The worst entry of each row, over the entries that change at all."""

    r_hat: Tensor  # (*batch, n), NaN for rows that never change
    effective_size: Tensor  # (*batch, n), NaN likewise
    constant: Tensor  # (*batch, n) long, entries of the row that never change


def mixing(
    samples: Tensor,  # (chains, samples, *batch, n, m)
) -> Mixing:
    r"""R-hat and effective sample size of each item that is matched.

    Both are computed for each entry of P, as a chain of zeros and ones, and for being
    unmatched where that happens. The R-hat of a row is its largest, the effective size
    its smallest. Entries that are the same in every sample of every chain have neither:
    they are left out, and counted. An entry that is constant in each chain, but not
    the same in all, has :math:`\hat R = \infty` and an effective size of zero.

    Args:
        samples: Of ``mcmc.get_samples(group_by_chain=True)``, at least four for each
            chain, from two chains or more if R-hat is to see chains that are stuck.

    Raises:
        ValueError: If there are fewer than four samples, or no chain dimension.

    References:
        Gelman et al., "Bayesian data analysis" (2013), section 11.4. The numbers are
        those of ``pyro.ops.stats``, entry by entry: for all entries at once, as in
        ``MCMC.diagnostics()``, its effective sample size is NaN as soon as one of them
        is constant, and takes memory quadratic in the number of samples.

    Example:
        >>> samples = torch.eye(3)[torch.rand(2, 100, 3).argsort(-1)]
        >>> samples[..., 2, :] = torch.tensor([0.0, 0.0, 1.0])
        >>> found = mixing(samples)
        >>> found.r_hat.isnan(), found.constant
        (tensor([False, False,  True]), tensor([0, 0, 3]))
    """
    if samples.dim() < 4 or samples.shape[1] < 4:
        raise ValueError(
            "samples must have shape (chains, samples, *batch, n, m) with at least 4 "
            f"samples, got {tuple(samples.shape)}. Use "
            "get_samples(group_by_chain=True)."
        )
    samples = samples.double()
    alone = 1 - samples.sum(-1, keepdim=True)
    entries = torch.cat([samples, alone], -1) if alone.any() else samples
    first = entries[:1, :1]
    changes = (entries != first).any(0).any(0)
    chosen = entries[:, :, changes]
    r_hat = torch.full_like(first[0, 0], -torch.inf)
    size = torch.full_like(r_hat, torch.inf)
    if changes.any():
        r_hat[changes] = split_gelman_rubin(chosen)
        parts = map(_effective_size, chosen.split(16, -1))
        size[changes] = torch.cat(list(parts), -1)
        stuck = changes & ~r_hat.isfinite()
        r_hat[stuck], size[stuck] = torch.inf, 0.0
    moves = changes.any(-1)
    return Mixing(
        torch.where(moves, r_hat.amax(-1), torch.nan),
        torch.where(moves, size.amin(-1), torch.nan),
        (~changes).sum(-1),
    )


def _effective_size(
    x: Tensor,  # (chains, samples, k)
) -> Tensor:  # (k,)
    """Geyer's initial monotone sequence, as in ``pyro.ops.stats``."""
    chains, count = x.shape[:2]
    within = x.var(1).mean(0)
    total = within * (count - 1) / count
    if chains > 1:
        total = total + x.mean(1).var(0)
    else:  # so that these are the autocorrelations of the one chain
        within = total
    correlation = (total - within + autocovariance(x, dim=1).mean(0)) / total
    correlation[0] = 1.0
    pairs = correlation[: count // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    monotone = pairs[1:].clamp_min(0).cummin(0).values.sum(0)
    size: Tensor = chains * count / (-1 + 2 * pairs[0] + 2 * monotone)
    return size
