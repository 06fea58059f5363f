# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Gumbel-Sinkhorn paper's bound on the KL divergence, in the space of the noise."""

from __future__ import annotations

__all__ = ["noise_kl"]

import torch
from torch import Tensor

from pyro_permutations.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_permutations.sinkhorn import log_scaling

_EULER = 0.5772156649015329


def noise_kl(
    q: GumbelSinkhorn,
    p: GumbelSinkhorn,
    *,
    up_to_shifts: bool = True,
) -> Tensor:  # (*batch,)
    r"""Bound KL(q || p) by the divergence between the noisy scores of both.

    The scores divided by the temperature are Gumbel variables for each allowed pair;
    with :math:`r = \tau_p / \tau_q` and :math:`D = r X_q - X_p` their divergence is

    .. math:: \sum_{ij} \log(\tau_q / \tau_p) + \gamma (r - 1) - 1 + D_{ij}
        + \Gamma(1 + r) \, e^{-D_{ij}},

    exactly. It is an upper bound on the divergence between the laws of P (data
    processing), hence a valid but looser ELBO, and a poor one: it charges for the row
    and column shifts of the scores, which P does not see. ``up_to_shifts`` takes the
    least bound over them (over those of rows, where something may stay unmatched;
    what may has none). Nothing in Pyro calls this; ``log_prob`` is the better way.

    Args:
        q: The guide's distribution.
        p: The model's distribution, with the same mask.
        up_to_shifts: Whether to minimise over row and column shifts of the logits;
            the paper does not.

    Raises:
        ValueError: If the shapes do not broadcast, or if the masks differ: then the
            divergence is infinite or undefined.

    References:
        Mena, Belanger, Linderman and Snoek, "Learning latent permutations with
        Gumbel-Sinkhorn networks" (2018), https://arxiv.org/abs/1802.08665.

    Example:
        >>> p = GumbelSinkhorn(torch.zeros(3, 3), 1.0)
        >>> q = GumbelSinkhorn(torch.tensor([[2.0], [0.0], [0.0]]).expand(3, 3), 1.0)
        >>> noise_kl(q, p)  # the same law of P
        tensor(0.)
        >>> noise_kl(q, p, up_to_shifts=False)
        tensor(3.4060)
    """
    try:
        torch.broadcast_shapes(q.batch_shape, p.batch_shape)
        compatible = q.event_shape == p.event_shape
    except RuntimeError:
        compatible = False
    if not compatible:
        raise ValueError(
            "q and p must have matrices of one size and batch shapes that broadcast, "
            f"got q of shape {tuple(q.shape())} and p of shape {tuple(p.shape())}."
        )
    pairs = zip(
        (q.graph.support, *q.graph.slack_cells()),
        (p.graph.support, *p.graph.slack_cells()),
        strict=True,
    )
    if any(bool((mine != other).any()) for mine, other in pairs):
        raise ValueError(
            "q and p must have the same mask, and the same items that may stay "
            "unmatched: where q allows what p forbids the divergence is infinite."
        )
    graph = q.graph
    tau_q, tau_p = q.temperature.double(), p.temperature.double()
    ratio = tau_p / tau_q
    D = ratio[..., None, None] * q.logits.double() - p.logits.double()
    D = torch.where(graph.support, D, 0)
    constant = -ratio.log() + _EULER * (ratio - 1) - 1
    log_gamma = torch.lgamma(1 + ratio)
    if up_to_shifts and graph.has_slack:
        # What may stay unmatched has no shift, and of other rows it is in closed form.
        number = graph.row_counts.double()[..., None]
        masked = torch.where(graph.support, -D, -torch.inf)
        masked = torch.where(number > 0, masked, 0.0)
        shift = number.clamp_min(1).log() - torch.logsumexp(masked, -1, keepdim=True)
        own = torch.where(
            graph.slack_cells()[0][..., None], log_gamma[..., None, None], shift
        )
        log_W = own - D
        cells = log_gamma[..., None, None] - log_W + log_W.exp()
    elif up_to_shifts:
        # Shifts s, t of D: at the minimum of sum(D + s + t + Gamma e^-(D + s + t)) the
        # matrix W = Gamma e^-(D + s + t) sums to the number of cells in each row and
        # column, so it is the scaling of e^-D to the counts.
        counts = graph.row_counts.double(), graph.column_counts.double()
        log_W = log_scaling(-D, graph, counts)
        log_W = torch.where(graph.support, log_W, 0)
        cells = log_gamma[..., None, None] - log_W + log_W.exp()
    else:
        cells = D + (log_gamma[..., None, None] - D).exp()
    bound = (constant[..., None, None] + cells) * graph.support
    return bound.sum((-2, -1)).to(q.logits.dtype)
