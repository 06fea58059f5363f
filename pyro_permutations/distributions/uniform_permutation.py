# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The uniform distribution over permutations, or over those that a mask allows."""

from __future__ import annotations

__all__ = ["UniformPermutation"]

from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor

from pyro_permutations.distributions.gibbs_matching import GibbsMatching
from pyro_permutations.fractional_entropy import COUNTED
from pyro_permutations.matching import to_matrix
from pyro_permutations.matching_blocks import blocks
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.outside import outside
from pyro_permutations.permanents import LARGEST_EXACT, log_partition, log_permanent

# Masks of so many large blocks have their matchings counted exactly.
_FEW_BLOCKS = 8


class UniformPermutation(GibbsMatching):
    """Every permutation, or every one that a mask allows, is equally likely.

    The prior to use where nothing is known: :class:`GibbsMatching` with scores of zero.
    With no mask everything is exact for any n. With one, the number of its permutations
    is exact to 1e-8 if no more than 20 items hang together, and beyond that
    approximate, by the entropy for a full matrix of as many items. Of another type or
    device it is ``GibbsMatching(x.new_zeros(n, n))``.

    Args:
        n: Number of items.
        mask: Allowed pairs, bool, of shape ``(*batch, n, n)``, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`. The distribution
            lives where the mask does.

    Raises:
        ValueError: If n is not a positive integer; if the mask has another shape or
            type, or no permutation.

    Example:
        >>> d = UniformPermutation(3)
        >>> d.log_prob(d.sample()).exp()  # 1 / 3!
        tensor(0.1667)
        >>> mask = ~torch.eye(4, dtype=torch.bool)  # nobody stays where they are
        >>> len(UniformPermutation(4, mask=mask).enumerate_support())
        9
    """

    def __init__(
        self,
        n: int,
        *,
        mask: Tensor | MatchingGraph | None = None,  # (*batch, n, n) bool
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(n, bool) or not isinstance(n, SupportsIndex) or index(n) < 1:
            raise ValueError(
                f"n must be a positive integer, the number of items, got {n!r}. For "
                "scores of pairs use GibbsMatching(logits)."
            )
        device = None if mask is None else mask.device
        zeros = torch.zeros(index(n), index(n), device=device)
        super().__init__(zeros, mask=mask, validate_args=validate_args)

    @property
    def log_partition(self) -> Tensor:  # (*batch,) float64
        """Log of the number of permutations."""
        return _log_count(self.graph).expand(self.batch_shape)

    def entropy(self) -> Tensor:  # (*batch,)
        """Log of the number of permutations, in nats."""
        return self.log_partition.to(self.logits.dtype)

    def expand(
        self, batch_shape: Sequence[int], _instance: GibbsMatching | None = None
    ) -> GibbsMatching:
        """Return the distribution with a larger batch, on the same mask."""
        new = self._get_checked_instance(UniformPermutation, _instance)  # type: ignore[no-untyped-call]
        return super().expand(batch_shape, _instance=new)

    def _is_exact(self) -> Tensor:
        # By symmetry, if no pair is forbidden.
        return super()._is_exact() | self.graph.is_full

    def _draw(self, batch: Sequence[int], count: int) -> Tensor:
        if not self.graph.is_full:
            return super()._draw(batch, count)
        keys = torch.rand(count, *batch, self.event_shape[0], device=self.logits.device)
        return to_matrix(keys.argsort(-1), self.logits.dtype)

    @classmethod
    def infer_shapes(  # type: ignore[override]
        cls, n: Sequence[int] = (), mask: Sequence[int] | None = None
    ) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape for a given shape of the mask; n is a number."""
        if mask is None:
            raise NotImplementedError(
                "the event shape of UniformPermutation is its number of items, not a "
                "shape. Pass the shape of a mask."
            )
        return torch.Size(mask[:-2]), torch.Size(mask[-2:])


@lru_cache(maxsize=64)
@outside
def _log_count(graph: MatchingGraph) -> Tensor:
    with torch.no_grad():
        zeros = torch.zeros(graph.shape, dtype=torch.float64, device=graph.device)
        sizes = [len(block.mask) for block in blocks(graph) if block.size > COUNTED]
        largest = max((block.size for block in blocks(graph)), default=0)
        # A block of 20 takes a second or two, once.
        if not graph.is_full and sum(sizes) <= _FEW_BLOCKS and largest <= LARGEST_EXACT:
            return log_permanent(zeros, mask=graph)
        return log_partition(zeros, graph)
