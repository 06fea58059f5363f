# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Matchings of a Markov chain, kept as indices while it runs."""

from __future__ import annotations

__all__ = ["MatchingDraws"]

import torch
from pyro.ops.streaming import StreamingStats
from torch import Tensor

from pyro_permutations.matching import to_indices


class MatchingDraws(StreamingStats):
    """The draws of a permutation site as indices, for ``pyro.infer.StreamingMCMC``.

    ``pyro.infer.MCMC`` keeps every matrix, 2.5 MB for four worms of 279 neurons; the
    indices are 2 kB. Statistics are per chain and site::

        StatsOfDict({(chain, "P"): MatchingDraws for chain in range(num_chains)})

    and ``default=CountMeanVarianceStats``, say, for the other sites. Like Pyro's they
    are made by calling the class; an instance, when called, makes a new one too.
    :func:`posterior_from_mcmc` takes the finished ``StreamingMCMC``. Samples are
    matrices of shape ``(*batch, n, m)``; a sample that is not a matching raises the
    ValueError of :func:`~pyro_permutations.to_indices`.

    Example:
        >>> draws = MatchingDraws()
        >>> for _ in range(4):
        ...     draws.update(torch.eye(3)[:2])
        >>> draws.merge(draws).get()["perm"].shape, draws.get()["columns"]
        (torch.Size([2, 4, 2]), 3)
    """

    def __init__(self) -> None:
        self.chains: list[list[Tensor]] = [[]]  # (*batch, n) each
        self.columns = 0
        super().__init__()

    def __call__(self) -> MatchingDraws:
        """Make a new one, without draws."""
        return MatchingDraws()

    def update(self, sample: Tensor) -> None:  # (*batch, n, m)
        """Keep a draw."""
        if sample.dim() < 2:
            raise ValueError(
                "MatchingDraws is for a permutation site, and got a sample of shape "
                f"{tuple(sample.shape)}. Where the model has other sites, too, name "
                'this one: StatsOfDict({(chain, "P"): MatchingDraws for chain in '
                "range(num_chains)}), and not as the default."
            )
        self.columns = sample.shape[-1]
        small = torch.int16 if self.columns < 2**15 else torch.int32
        self.chains[-1].append(to_indices(sample).to(small))

    def merge(self, other: MatchingDraws) -> MatchingDraws:
        """Put the chains of another one beside those of this one."""
        result = MatchingDraws()
        result.chains = [list(chain) for chain in (*self.chains, *other.chains)]
        result.columns = max(self.columns, other.columns)
        return result

    def get(self) -> dict[str, Tensor | int]:
        """Draws ``perm`` of shape ``(chains, draws, *batch, n)``, and ``columns``.

        Neither, if there are none yet.
        """
        drawn = [torch.stack(chain) for chain in self.chains if chain]
        if not drawn:
            return {}
        if len({len(chain) for chain in drawn}) > 1:
            raise ValueError(
                "the chains must have equally many draws, but have "
                f"{[len(chain) for chain in drawn]}."
            )
        perm = torch.stack(drawn)
        return {"perm": perm.long(), "columns": self.columns}
