# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Log permanents: exact, calibrated, Bethe's and Sinkhorn's, four different numbers."""

from __future__ import annotations

__all__ = ["calibrated_entropy", "log_permanent"]

import torch
from torch import Tensor

from pyro_permutations.fractional_entropy import calibrated_entropy
from pyro_permutations.matching_blocks import Block, blocks, sum_blocks, take_block
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.matching_parts import flattened
from pyro_permutations.sinkhorn_arguments import checked
from pyro_permutations.subset_recursion import log_sum
from pyro_permutations.unmatched_scores import Unmatched

# The smaller side of a block may have this many items in an exact sum: 2^20 subsets.
LARGEST_EXACT = 20


def log_permanent(
    logits: Tensor,  # (*batch, n, m)
    *,
    mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m)
    unmatched: Unmatched | None = None,  # (*batch, n), (*batch, m)
) -> Tensor:  # (*batch,)
    r"""Log of the sum over all matchings of the exponential of their score, exactly.

    .. math:: \log \text{per}(e^X) = \log \sum_P \exp \sum_{ij} P_{ij} X_{ij}
    """
    scores, graph, shift = _problem(logits, mask, unmatched)
    for block in blocks(graph):
        if block.size > LARGEST_EXACT:
            raise ValueError(
                f"log_permanent is exact and takes up to {LARGEST_EXACT} items on the "
                f"smaller side, but a block of the mask has {block.size}. Use "
                "calibrated_log_permanent(...)."
            )
    return (_by_block(_exact, scores, graph) + shift).to(logits.dtype)


def _exact(scores: Tensor, block: Block) -> Tensor:  # (a, C, s, t) -> (a, C)
    lead, shape = scores.shape[:2], scores.shape[2:]
    mask, *free = (
        x.expand(lead[0], *x.shape).flatten(0, 1)
        for x in (block.mask, block.free_rows, block.free_columns)
    )
    return log_sum(scores.reshape(-1, *shape), mask, (free[0], free[1])).reshape(lead)


def _by_block(solver, scores, graph):  # type: ignore
    lead = torch.broadcast_shapes(scores.shape[:-2], graph.batch_shape)
    flat, graph = flattened(torch.Size(lead), graph)
    x = scores.expand(*lead, *graph.shape).reshape(*flat, *graph.shape)
    values = [(block, solver(take_block(x, block), block)) for block in blocks(graph)]
    return sum_blocks(values, x[..., 0, 0]).reshape(lead)


def _problem(logits, mask, unmatched):  # type: ignore
    scores, graph, _ = checked(logits, 1.0, mask, unmatched, None)
    n, m = graph.shape
    shift = scores.new_zeros(())
    if unmatched is not None:
        shift = _alone(unmatched, (n, m), scores)
    return scores[..., :n, :m], graph, shift


def _alone(unmatched, shape, like):  # type: ignore
    total = like.new_zeros(())
    for score, size in zip(unmatched, shape, strict=True):
        x = torch.as_tensor(score, dtype=like.dtype, device=like.device)
        x = torch.where(x > -torch.inf, x, 0.0)
        total = total + (x * size if x.dim() == 0 else x.sum(-1))
    return total
