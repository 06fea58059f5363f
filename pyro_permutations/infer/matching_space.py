# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The matchings that a graph allows, as a state space: column indices and cells."""

from __future__ import annotations

__all__ = ["MatchingSpace"]

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_permutations.matching_graph import MatchingGraph


class MatchingSpace(NamedTuple):
    """The matchings of B graphs with n rows and m columns each.

    A state is ``column``, of shape ``(*lead, B, n)``: the column of each row, or m for
    a row that is unmatched. So there are m + 1 cells in a row, the last for being
    unmatched, and cell ``(i, c)`` has the flat index ``i (m + 1) + c``.
    """

    allowed: Tensor  # (B, n, m + 1) bool; the last column: the row may be unmatched
    free_columns: Tensor  # (B, m + 1) bool, may be unmatched; the last is True
    has_slack: bool

    @classmethod
    def of(cls, graph: MatchingGraph, batch_shape: torch.Size) -> MatchingSpace:
        """The space of a graph, of a batch laid out flat."""
        n, m = graph.shape
        graph = graph.expand(batch_shape)
        free_rows, free_columns = graph.slack_cells()
        allowed = torch.cat([graph.support, free_rows[..., None]], -1)
        return cls(
            allowed=allowed.reshape(-1, n, m + 1),
            free_columns=pad(free_columns.reshape(-1, m), (0, 1), value=True),
            has_slack=graph.has_slack,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, n and m."""
        batch, n, cells = self.allowed.shape
        return batch, n, cells - 1

    def matrices(
        self,
        column: Tensor,  # (*lead, B, n) long
        dtype: torch.dtype,
    ) -> Tensor:  # (*lead, B, n, m)
        """The permutation matrices, or partial ones, of states."""
        names = torch.arange(self.shape[2], device=column.device)
        return (column[..., None] == names).to(dtype)

    def columns(
        self,
        P: Tensor,  # (*lead, B, n, m), zeros and ones
    ) -> Tensor:  # (*lead, B, n) long
        """The inverse of :meth:`matrices`."""
        return torch.where(P.sum(-1) > 0, P.argmax(-1), P.shape[-1])

    def owners(
        self,
        column: Tensor,  # (*lead, B, n)
    ) -> Tensor:  # (*lead, B, m + 1) long
        """The row that has each column, n for none; the last column has none."""
        n, m = self.shape[1:]
        rows = torch.arange(n, device=column.device).expand_as(column)
        owner = rows.new_full((*column.shape[:-1], m + 1), n).scatter(-1, column, rows)
        owner[..., m] = n
        return owner
