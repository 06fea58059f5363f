# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""How well chains over matchings have mixed, item by item."""

from __future__ import annotations

__all__ = ["Mixing", "mixing"]

from typing import NamedTuple

import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from pyro_permutations.effective_draws import effective_draws
from pyro_permutations.matching import to_indices
from pyro_permutations.posterior import MatchingPosterior


class Mixing(NamedTuple):
    """The worst entry of each row, over the entries that change at all."""

    r_hat: Tensor  # (*batch, n), NaN for rows that never change
    effective_size: Tensor  # (*batch, n), NaN likewise
    constant: Tensor  # (*batch, n) long, entries of the row that never change


def mixing(
    samples: Tensor | MatchingPosterior,  # (chains, samples, *batch, n, m)
) -> Mixing:
    r"""R-hat and effective sample size of each item that is matched.

    Both are computed for each entry of P, as a chain of zeros and ones, and for being
    unmatched where that happens. The R-hat of a row is its largest, the effective size
    its smallest. Entries that are the same in every sample of every chain have neither:
    they are left out, and counted. An entry that is constant in each chain, but not
    the same in all, has :math:`\hat R = \infty` and an effective size of zero.

    Args:
        samples: Of ``mcmc.get_samples(group_by_chain=True)``, at least four for each
            chain, from two chains or more if R-hat is to see chains that are stuck. Or
            the posterior of :func:`~pyro_permutations.posterior_from_mcmc`, which has
            indices where matrices do not fit into memory.

    Raises:
        ValueError: If there are fewer than four samples, or no chain dimension, or the
            samples are not matchings.

    References:
        Gelman et al., "Bayesian data analysis" (2013), section 11.4. R-hat is that of
        ``pyro.ops.stats``, entry by entry. Effective sizes are of chains split in half,
        as R-hat is; in ``MCMC.diagnostics()`` they are NaN as soon as one entry is
        constant, and take memory quadratic in the number of samples.

    Example:
        >>> samples = torch.eye(3)[torch.rand(2, 100, 3).argsort(-1)]
        >>> samples[..., :2, 2], samples[..., 2, :] = 0.0, torch.tensor([0.0, 0.0, 1.0])
        >>> samples[..., :2, :2] = torch.eye(2)[torch.rand(2, 100, 2).argsort(-1)]
        >>> found = mixing(samples)
        >>> found.r_hat.isnan(), found.constant
        (tensor([False, False,  True]), tensor([1, 1, 3]))
    """
    if isinstance(samples, Tensor):
        if samples.dim() < 4 or samples.shape[1] < 4:
            raise ValueError(
                "samples must have shape (chains, samples, *batch, n, m) with at least "
                f"4 samples, got {tuple(samples.shape)}. Use "
                "get_samples(group_by_chain=True)."
            )
        perm, columns = to_indices(samples), samples.shape[-1]
    elif samples.chains is None:
        raise ValueError("the posterior must be of Markov chains, got other draws.")
    else:
        perm = samples.perm.unflatten(0, (samples.chains, -1))
        columns = samples.columns
    entries = columns + int((perm < 0).any())
    rows = [_of_row(x, entries) for x in perm.flatten(2).unbind(-1)]
    r_hat, size, constant = zip(*rows, strict=True)
    shape, kind = perm.shape[2:], torch.get_default_dtype()
    return Mixing(
        torch.tensor(r_hat, dtype=kind).reshape(shape),
        torch.tensor(size, dtype=kind).reshape(shape),
        torch.tensor(constant).reshape(shape),
    )


def _of_row(
    columns: Tensor,  # (chains, samples) long
    entries: int,
) -> tuple[float, float, int]:
    """R-hat, effective size, and how many entries never change, of one row."""
    found = columns.unique()
    if len(found) == 1:
        return torch.nan, torch.nan, entries
    hits = (columns[..., None] == found).double()
    r_hat = split_gelman_rubin(hits)
    stuck = ~r_hat.isfinite()
    size = torch.where(stuck, 0.0, effective_draws(hits))
    r_hat = torch.where(stuck, torch.inf, r_hat)
    return float(r_hat.max()), float(size.min()), entries - len(found)
