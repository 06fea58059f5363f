# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Gibbs law of matchings, and its flat case, the uniform permutation."""

from __future__ import annotations

__all__ = ["GibbsMatching", "UniformPermutation"]

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.constraints import (
    Constraint,
    dependent_property,
    independent,
    real,
)

from pyro_permutations.constraints import permutation_matrix
from pyro_permutations.distributions.gumbel_contrasts import (
    GumbelContrasts,
    scores_on_graph,
)
from pyro_permutations.matching import matching, to_matrix
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.matching_parts import flattened
from pyro_permutations.matching_sampler import EXACT, sample_gibbs
from pyro_permutations.permanents import log_partition
from pyro_permutations.unmatched_scores import Unmatched

# Values are listed where there are at most as many as permutations of eight.
_LISTED = 8


class GibbsMatching(TorchDistribution):
    r"""The Gibbs law of matchings: likelier by the exponential of their score.

    .. math:: p(P) = \exp \Big(\sum_{ij} P_{ij} X_{ij}\Big) \Big/ \text{per}(e^X)
    """

    arg_constraints = {"logits": independent(real, 2)}  # noqa: RUF012
    _validate_args: bool

    def __init__(
        self,
        logits: Tensor,  # (*batch, n, m)
        *,
        mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m) bool
        unmatched: Unmatched | None = None,  # (*batch, n), (*batch, m)
        validate_args: bool | None = None,
    ) -> None:
        validate = self._validate_args if validate_args is None else validate_args
        scores, self.graph = scores_on_graph(logits, mask, unmatched, validate)
        event_shape = scores.shape[-2:]
        batch_shape = torch.broadcast_shapes(scores.shape[:-2], self.graph.batch_shape)
        self._scores = scores
        self.logits = scores.expand(batch_shape + event_shape)
        self.has_enumerate_support = _few(self.graph)
        # Checked above, in one pass, and for empty batches too.
        super().__init__(batch_shape, event_shape, validate_args=False)
        self._validate_args = validate

    @dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> Constraint:
        """Permutation matrices on the cells that the mask leaves."""
        return (
            permutation_matrix if self.graph.is_full else permutation_matrix(self.graph)
        )

    @property
    def mode(self) -> Tensor:  # (*batch, n, m)
        """The most likely matching, exactly."""
        return matching(self.logits, mask=self.graph)

    @property
    def log_partition(self) -> Tensor:  # (*batch,)
        """Log of the sum of the weights of all matchings."""
        return log_partition(self._scores.double(), self.graph).expand(self.batch_shape)

    def expand(
        self, batch_shape: Sequence[int], _instance: GibbsMatching | None = None
    ) -> GibbsMatching:
        """Return the distribution with a larger batch, on the same mask."""
        new = self._get_checked_instance(type(self), _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new.graph, new._scores = self.graph, self._scores
        new.has_enumerate_support = self.has_enumerate_support
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        super(GibbsMatching, new).__init__(
            batch_shape, self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw matchings, of shape ``(*sample, *batch, n, m)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        own = torch.broadcast_shapes(self._scores.shape[:-2], self.graph.batch_shape)
        count = shape[: len(shape) - 2 - len(own)].numel()
        if shape[:-2][len(shape) - 2 - len(own) :] != own:  # a size of one was expanded
            own, count = self.batch_shape, torch.Size(sample_shape).numel()
        scores = self._scores.double().expand(*own, *self.event_shape)
        scores = scores.reshape(-1, *self.event_shape)
        graph = self.graph.expand(own)
        perm = sample_gibbs(scores, graph, count)
        return to_matrix(
            perm.reshape(shape[:-1]), self.logits.dtype, columns=self.event_shape[-1]
        )

    def log_prob(
        self,
        value: Tensor,  # (*sample, *batch, n, m)
    ) -> Tensor:  # (*sample, *batch)
        """Log probability of matchings."""
        self._check_value(value)
        score = (self.logits.double() * value.double()).sum((-2, -1))
        possible = (self.graph.allowed | (value == 0)).all(-1).all(-1)
        log_prob = torch.where(possible, score - self.log_partition, -torch.inf)
        return log_prob.to(torch.promote_types(value.dtype, self.logits.dtype))

    def _check_value(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or value.shape[-2:] != self.event_shape:
            raise ValueError(
                f"the value must have shape (*sample, *batch, {self.event_shape[0]}, "
                f"{self.event_shape[1]}), got {tuple(getattr(value, 'shape', ()))}."
            )
        torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        binary = ((value == 0) | (value == 1)).all()
        rows, columns = value.sum(-1), value.sum(-2)
        free_rows, free_columns = self.graph.free_rows, self.graph.free_columns
        whole = (rows == 1) | free_rows & (rows == 0)
        wide = (columns == 1) | free_columns & (columns == 0)
        if not (binary and whole.all() and wide.all()):
            raise ValueError(
                "the value is not a permutation matrix (zeros and ones, with one 1 in "
                "every row and column that has to be matched), so it has no "
                "probability here. To infer a permutation by relaxed matrices, relax "
                "the model, relax(model, temperature), or keep it and train with "
                "DiscreteKL_ELBO."
            )

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All matchings, ``(k, *batch, n, m)``."""
        if not self.has_enumerate_support:
            raise NotImplementedError(
                f"matchings of {self.event_shape} are too many to list."
            )
        perm = _listed(self.graph.allowed.reshape(-1, *self.event_shape).any(0))
        values = to_matrix(perm, self.logits.dtype, columns=self.event_shape[-1])
        lead = self.batch_shape if expand else (1,) * len(self.batch_shape)
        values = values.reshape(-1, *(1,) * len(lead), *self.event_shape)
        return values.expand(-1, *lead, -1, -1)

    @classmethod
    def infer_shapes(  # type: ignore[override]
        cls,
        logits: Sequence[int],
        mask: Sequence[int] | None = None,
        unmatched: Sequence[Sequence[int]] | None = None,
    ) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape for given shapes of the arguments."""
        return GumbelContrasts.infer_shapes(logits, mask, unmatched)


class UniformPermutation(GibbsMatching):
    """Every permutation, or every one that a mask allows, with the same probability."""

    def __init__(
        self,
        n: int,
        *,
        mask: Tensor | MatchingGraph | None = None,  # (*batch, n, n) bool
        validate_args: bool | None = None,
    ) -> None:
        device = None if mask is None else mask.device
        super().__init__(
            torch.zeros(n, n, device=device), mask=mask, validate_args=validate_args
        )


def _few(graph: MatchingGraph) -> bool:
    n, m = graph.shape
    return n == m and n <= _LISTED and not graph.has_slack


def _listed(allowed: Tensor) -> Tensor:  # (n, m) -> (k, n)
    """All matchings, row by row."""
    n, m = allowed.shape
    found = torch.zeros(1, 0, dtype=torch.long, device=allowed.device)
    for i in range(n):
        column = torch.arange(m, device=allowed.device)
        fresh = allowed[i] & (found[:, :, None] != column).all(1)
        one, j = fresh.nonzero(as_tuple=True)
        found = torch.cat([found[one], j[:, None]], -1)
    return found
