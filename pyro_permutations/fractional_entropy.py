# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The entropy of a law over matchings from its marginals alone, calibrated."""

from __future__ import annotations

__all__ = ["calibrated_entropy", "entropy_terms", "fractions"]

import math
from functools import lru_cache

import torch
from torch import Tensor

from pyro_permutations.matching_blocks import Block, blocks, sum_blocks, take_block
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.matching_parts import flattened
from pyro_permutations.subset_recursion import log_sum

# With a mask the matchings of blocks of up to this many items are counted.
_COUNTED = 12


def calibrated_entropy(
    marginals: Tensor,  # (*batch, n, m)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
) -> Tensor:  # (*batch,)
    r"""Entropy of a law over matchings with given marginals, approximately.

    .. math:: H_g(B) = -\sum B \log B - g \sum (1 - B) \log (1 - B)
    """
    n, m = marginals.shape[-2:]
    graph = matching_graph(mask, (n, m), marginals.device)
    lead = torch.broadcast_shapes(marginals.shape[:-2], graph.batch_shape)
    flat, graph = flattened(torch.Size(lead), graph)
    B = marginals.double().expand(*lead, n, m).reshape(*flat, n, m)
    values = []
    for block, gamma in zip(blocks(graph), fractions(graph), strict=True):
        pairs, rest = entropy_terms(take_block(B, block), block)
        values.append((block, pairs - gamma * rest))
    return sum_blocks(values, B[..., 0, 0]).reshape(lead).to(marginals.dtype)


def entropy_terms(
    B: Tensor,  # (*lead, C, s, t)
    block: Block,
) -> tuple[Tensor, Tensor]:  # (*lead, C), (*lead, C)
    """Entropies of all marginals, and of what is left of pairs: -sum (1-B) log(1-B)."""
    pairs = _entropy(B).sum((-2, -1))
    if block.slack:
        for dim, free in ((-1, block.free_rows), (-2, block.free_columns)):
            pairs = pairs + torch.where(free, _entropy(1 - B.sum(dim)), 0.0).sum(-1)
    rest = torch.where(block.mask, _entropy(1 - B), 0.0)
    return pairs, rest.sum((-2, -1))


def _entropy(x: Tensor) -> Tensor:
    """Minus x log x; its slope at zero is large, but finite."""
    return -x * x.clamp_min(torch.finfo(x.dtype).tiny).log()


def fractions(graph: MatchingGraph) -> list[Tensor]:
    """The number -g for each of the graph's blocks, (C,) each, between 0 and 1."""
    return _fractions(graph, str(graph.device))


@lru_cache(maxsize=64)
def _fractions(graph: MatchingGraph, device: str) -> list[Tensor]:
    return [_fraction(block) for block in blocks(graph)]


def _fraction(block: Block) -> Tensor:  # (C,)
    log_count, uniform = _uniform(block)
    pairs, rest = entropy_terms(uniform, block)
    # With one matching all is decided, and any number will do.
    gamma = (pairs - log_count) / torch.where(rest > 0, rest, 1.0)
    return gamma.clamp(0.0, 1.0)


def _uniform(block: Block) -> tuple[Tensor, Tensor]:  # (C,), (C, s, t)
    """Log of the number of matchings, and the marginals of the uniform law."""
    C, s, t = block.mask.shape
    zeros = torch.zeros(block.mask.shape, dtype=torch.float64, device=block.mask.device)
    if block.size <= _COUNTED:
        with torch.inference_mode(False), torch.enable_grad():
            x = zeros.requires_grad_()
            log_count = log_sum(x, block.mask, (block.free_rows, block.free_columns))
            (uniform,) = torch.autograd.grad(log_count.sum(), x)
        return log_count.detach(), uniform
    n = max(s, t)
    log_count = zeros[:, 0, 0] + math.lgamma(n + 1)
    return log_count, zeros + 1 / n
