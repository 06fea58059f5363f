# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Priors on the number of links of a partial matching."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["link_count_prior"]


def link_count_prior(
    P: Tensor,  # (*batch, n, m)
    count: Distribution,
    *,
    items: tuple[Tensor, Tensor] | None = None,  # (*batch,), (*batch,)
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
        P: Matching of shape ``(*batch, n, m)``, hard or relaxed. No pair is forbidden,
            but for padding.
        count: A distribution of whole numbers, such as ``dist.Poisson``,
            ``dist.Binomial`` or ``dist.Categorical``, of batch shape ``()``.
        items: The numbers of rows and columns that are no padding, if there is some.

    Raises:
        ValueError: If no number of links that is possible has positive probability, or
            count is a batch.

    Example:
        >>> from torch.distributions import Poisson
        >>> P = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> link_count_prior(P, Poisson(1.0)).exp()  # 2 / 5, over 6 ways to link a pair
        tensor(0.0667)
    """
    if count.batch_shape:
        raise ValueError(
            "count must be one distribution, but has batch shape "
            f"{tuple(count.batch_shape)}."
        )
    most = min(P.shape[-2:])
    if items is None:
        sizes = [P.new_tensor(size, dtype=torch.float64) for size in P.shape[-2:]]
    else:
        sizes = [x.to(P.device, torch.float64) for x in items]
    n, m = (size[..., None] for size in sizes)
    k = torch.arange(most + 1, device=P.device)
    log_q = torch.full((most + 1,), -torch.inf, dtype=torch.float64, device=P.device)
    support = count.support
    inside = k >= 0 if support is None else support.check(k.to(P.dtype))
    log_q[inside] = count.log_prob(k[inside].to(P.dtype)).double()
    # What is not possible is left out of the total; so are the ways there.
    log_q = log_q.masked_fill(k > torch.minimum(n, m), -torch.inf)
    total = torch.logsumexp(log_q, -1, keepdim=True)
    if not bool(torch.isfinite(total).all()):
        raise ValueError(
            "count must give a positive probability to some number of links that is "
            f"possible, 0 to {most}, but gives none."
        )
    ways = torch.lgamma(n + 1) + torch.lgamma(m + 1) - torch.lgamma(k + 1.0)
    for size in (n, m):
        ways = ways - torch.lgamma((size - k).clamp_min(0) + 1)
    table = (log_q - total - ways).expand(*P.shape[:-2], most + 1)
    links = P.double().sum((-2, -1)).clamp(0, most)
    below = links.detach().floor().long()
    above = (below + 1).clamp_max(most)
    low = table.gather(-1, below[..., None])[..., 0]
    slope = table.gather(-1, above[..., None])[..., 0] - low
    # Between a number of links that is possible and one that is not nothing is.
    known = torch.isfinite(slope)
    weight = links - below
    value = low + weight * torch.where(known, slope, 0.0)
    return torch.where(known | (weight == 0), value, -torch.inf).to(P.dtype)
