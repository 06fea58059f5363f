# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Marginals of a guide's hard draws, with the gradient of its relaxed ones."""

from __future__ import annotations

__all__ = ["distinct", "guide_marginals", "repeated"]

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_permutations.carried_log import log_of
from pyro_permutations.distributions.gumbel_contrasts import GumbelContrasts
from pyro_permutations.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_permutations.harden_transform import HardenTransform
from pyro_permutations.matching import matching
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.sinkhorn import sinkhorn


def guide_marginals(
    guide: GumbelSinkhorn,
    value: Tensor,  # (*batch, n, m), drawn from the guide
    samples: int,
) -> Tensor:  # (*batch, n, m) float64, with sizes of one where the guide is expanded
    r"""How often pairs are matched in hard draws, as if these had the relaxed gradient.

    .. math:: B = \frac{1}{K + 1} \Big(\sum_{k=1}^K M_k + \bar P\Big), \qquad
        dB = d \bar P

    with :math:`M_k` the best matching of what the relaxed draw :math:`P_k` comes from,
    and :math:`\bar P` the mean of those. The value is one draw for each element of a
    batch that has the same parameters; the rest of K = ``samples`` is drawn here.

    Relaxed draws would make the law look less certain than it is. With this gradient
    the optimum is right at any temperature if the log likelihood is linear in P, with
    slopes Y: its gradient is <Y, dP>, that of the entropy <H'(B), dP>, and they balance
    at H'(B) = -Y, up to shifts. The mean of relaxed draws, which counts as one draw
    more, says how unlikely a pair is that was never drawn: without it the slope of the
    entropy there would be infinite, and from fewer draws it would be far too noisy.
    """
    batch = guide.batch_shape
    dims = repeated(
        guide.graph, guide.logits[..., 0, 0], guide.temperature.expand(batch)
    )
    hard: Tensor = HardenTransform(guide.graph)(value).double()
    soft = log_of(value).exp()
    count = torch.Size(batch[d] for d in dims).numel()
    if dims:
        inner = [d - 2 for d in dims]
        hard, soft = hard.sum(inner, keepdim=True), soft.sum(inner, keepdim=True)
    if samples > count:
        more = _drawn(guide, dims, samples - count)
        hard, soft, count = hard + more[0], soft + more[1], samples
    return (hard + soft / count) / (count + 1)


def _drawn(
    guide: GumbelSinkhorn, dims: Sequence[int], samples: int
) -> tuple[Tensor, Tensor]:
    """Sums of hard draws, with the gradient of relaxed ones, and of these."""
    logits = distinct(guide.logits, [d - 2 for d in dims])
    temperature = guide.temperature
    if temperature.dim():
        temperature = distinct(temperature, dims)
    base = GumbelContrasts(logits, mask=guide.graph, validate_args=False)
    scores = base._noisy_scores(torch.Size((samples,)))
    soft = sinkhorn(scores, temperature, mask=guide.graph).double()
    hard = matching(scores, mask=guide.graph).double()
    return (hard + (soft - soft.detach())).sum(0), soft.sum(0)


def repeated(graph: MatchingGraph, *parameters: Tensor) -> list[int]:
    """Dimensions of a batch, from the right, along which there is one law only.

    Those are the dimensions along which parameters of that batch shape were expanded,
    and that the masks do not have.
    """
    first, masks = parameters[0], graph.batch_shape
    return [
        d
        for d in range(-first.dim(), 0)
        if first.shape[d] > 1
        and all(x.stride(d) == 0 for x in parameters)
        and (len(masks) < -d or masks[d] == 1)
    ]


def distinct(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The first of what is repeated along some dimensions, which become of size one."""
    for d in dims:
        x = x.narrow(d, 0, 1)
    return x
