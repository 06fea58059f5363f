# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Priors on the number of links of a partial matching."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["link_count_prior"]


class _Count(Protocol):
    def log_prob(self, value: Tensor) -> Tensor: ...


def link_count_prior(
    P: Tensor,  # (*batch, n, m)
    count: _Count,
) -> Tensor:  # (*batch,)
    r"""Log prior of a partial matching whose number of links has a given distribution.

    .. math:: \log q(k) - \log \frac{n! \, m!}{(n - k)! \, (m - k)! \, k!}, \qquad
        k = \textstyle\sum_{ij} P_{ij}

    All matchings with k links, of which there are as many as the second term says, are
    equally likely; q is normalised over what is possible, 0 to min(n, m). Exact for
    hard matchings, and linear between whole numbers for relaxed ones. In a model:
    ``pyro.factor("links", link_count_prior(P, dist.Poisson(12.0)))``. A relaxed prior
    of P has a say, too: with scores of zero the noise alone links nearly everything,
    so give it scores that are about right, such as -4 for one link in fifty pairs.

    Args:
        P: Matching of shape ``(*batch, n, m)``, hard or relaxed.
        count: Anything with a ``log_prob`` of whole numbers, such as
            ``dist.Poisson``, ``dist.Binomial`` or ``dist.Categorical``; of batch
            shape ``()``.

    Raises:
        ValueError: If no number of links that is possible has positive probability.

    Example:
        >>> from torch.distributions import Poisson
        >>> P = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> link_count_prior(P, Poisson(1.0)).exp()  # 2 / 5, over 6 ways to link a pair
        tensor(0.0667)
    """
    n, m = P.shape[-2:]
    k = torch.arange(min(n, m) + 1, dtype=torch.float64, device=P.device)
    log_q = count.log_prob(k.to(P.dtype)).double()
    total = torch.logsumexp(log_q, -1)
    if not bool(torch.isfinite(total)):
        raise ValueError(
            f"count must give a positive probability to some number of links from 0 "
            f"to {min(n, m)}, but the log of their total is {float(total)}."
        )
    ways = sum(torch.lgamma(torch.tensor(x + 1.0).double()) for x in (n, m))
    ways = (
        ways - torch.lgamma(n - k + 1) - torch.lgamma(m - k + 1) - torch.lgamma(k + 1)
    )
    table = log_q - total - ways
    links = P.double().sum((-2, -1)).clamp(0, min(n, m))
    below = links.detach().floor().long()
    above = (below + 1).clamp_max(min(n, m))
    weight = links - below
    # Zero times -inf is no term.
    low = torch.where(weight < 1, (1 - weight) * table[below], 0.0)
    high = torch.where(weight > 0, weight * table[above], 0.0)
    return (low + high).to(P.dtype)
