# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Plackett-Luce distribution over rankings, as lists of items in order."""

from __future__ import annotations

__all__ = ["PlackettLuceIndices"]

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint, dependent_property

from pyro_permutations.distributions.plackett_luce import PlackettLuce


class PlackettLuceIndices(PlackettLuce):
    """:class:`PlackettLuce` with values in index form, the items in order.

    A value is of shape ``(*batch, k)`` with ``value[r]`` the item at rank r, the first
    of them the first to be drawn, and -1 for an empty rank; it is to
    :class:`PlackettLuce` what ``Categorical`` is to ``OneHotCategorical``. It is the
    form for observed rankings; a latent one in a likelihood is mostly a matrix.
    Arguments are those of :class:`PlackettLuce`.

    Example:
        >>> d = PlackettLuceIndices(torch.tensor([2.0, 1.0, 0.0, -1.0]))
        >>> d.log_prob(torch.tensor([0, 1, 2, 3]))
        tensor(-1.1611)
        >>> d.mode
        tensor([0, 1, 2, 3])
    """

    @dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Constraint:
        """Distinct items that are there, and -1 for empty ranks at the end."""
        return _Rankings(self._there, self.top)

    @property
    def mean(self) -> Tensor:
        """There is none: items are names. See :meth:`marginals`."""
        raise NotImplementedError("items are names, without a mean: see d.marginals().")

    _expected = (
        "distinct items, 0 to n - 1, and -1 only for ranks that have to be empty"
    )

    @staticmethod
    def _event_shape_of(top: int, n: int) -> torch.Size:
        return torch.Size((top,))

    def _value(self, perm: Tensor) -> Tensor:
        return perm

    def _indices(self, value: Tensor) -> Tensor:
        return value.long()


class _Rankings(Constraint):
    """Items in order, none of them twice, and -1 where none is left."""

    is_discrete = True
    event_dim = 1

    def __init__(self, there: Tensor, top: int) -> None:
        self.there, self.top = there, top  # (*batch, n) bool
        super().__init__()

    def check(
        self,
        value: Tensor,  # (*lead, k)
    ) -> Tensor:  # (*lead,) bool
        """Whether each vector is a ranking."""
        n = self.there.shape[-1]
        shape = torch.broadcast_shapes(value.shape[:-1], self.there.shape[:-1])
        perm = value.expand(*shape, value.shape[-1])
        item = perm.clamp(0, n - 1).long()
        there = self.there.expand(*shape, n)
        filled = torch.arange(self.top, device=perm.device) < there.sum(
            -1, keepdim=True
        )
        right = torch.where(filled, (perm == item) & there.gather(-1, item), perm == -1)
        # Empty ranks get numbers of their own, so that they do not count as the same.
        number = torch.arange(n, n + self.top, device=perm.device)
        ordered = torch.where(filled, item, number).sort(-1).values
        distinct = ordered[..., 1:] > ordered[..., :-1]
        return right.all(-1) & distinct.all(-1)
