# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The best matching of scores with Gumbel noise: perturb-and-MAP draws."""

from __future__ import annotations

__all__ = ["GumbelMatching"]

from collections.abc import Sequence
from typing import ClassVar

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
from pyro_permutations.distributions.gumbel_contrasts import GumbelContrasts
from pyro_permutations.distributions.matching_values import possible_matchings
from pyro_permutations.matching import matching, to_matrix
from pyro_permutations.matching_blocks import Block, blocks, sum_blocks, take_block
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.matching_parts import flattened
from pyro_permutations.perturbed_matching import log_prob_best, log_prob_two_items
from pyro_permutations.unmatched_scores import Unmatched

_UNKNOWN = "the {} of perturb-and-MAP draws has no closed form. {}"


class GumbelMatching(TorchDistribution):
    r"""The best matching of noisy scores: hard draws at the limit of temperature zero.

    .. math:: P = M(X + \epsilon), \qquad \epsilon_{ij} \sim \text{Gumbel}(0, 1)

    This is what :class:`GumbelSinkhorn` tends to as its temperature falls, and what the
    hard matchings of its noisy scores are at any. It is not the Gibbs law exp<X, P>,
    :class:`GibbsMatching`: with one row they are the same (the Gumbel-max trick), with
    n = 2 the odds are those of a sum of two logistic variables.

    ``log_prob`` is exact for two items, in closed form, for a single row that has to be
    matched, and for masks that fall apart into such blocks. Otherwise it is a Monte
    Carlo estimate from a fixed generator, always the same for a value and
    differentiable; its standard error is :meth:`log_prob_error`. Each sample conditions
    the noise of the value's pairs on their being best, one by one, and counts how
    likely that was, so that no value is missed. At 2048 samples the error is about .1
    nats at n = 4, and it grows: for ten items and more it may be half a nat, and where
    it is the estimate tends to be low.

    Values are checked whatever ``validate_args`` says: a matrix that is no permutation
    matrix is an error, and one that uses a forbidden pair has log probability ``-inf``.

    Args:
        logits: Scores X of shape ``(*batch, n, m)``. Entries of ``-inf`` forbid pairs.
            With ``unmatched`` the attribute ``logits`` has them less those scores.
        mask: Allowed pairs, bool, of shape ``(*batch, n, m)``, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`.
        unmatched: Scores of unmatched rows and of unmatched columns, without noise.
        density_samples: Samples for ``log_prob``, at least two.

    Raises:
        TypeError: If logits are not a tensor.
        ValueError: As :class:`GibbsMatching`; if ``density_samples`` is not an integer
            of at least two.

    References:
        Papandreou and Yuille, "Perturb-and-MAP random fields" (2011). Mena, Belanger,
        Linderman and Snoek, "Learning latent permutations with Gumbel-Sinkhorn
        networks" (2018), https://arxiv.org/abs/1802.08665.

    Example:
        >>> d = GumbelMatching(torch.tensor([[0.1, 0.9], [0.9, 0.1]]).log())
        >>> swapped = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> d.log_prob(swapped).exp(), d.log_prob_error(swapped)
        (tensor(0.9569), tensor(0.))
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {"logits": independent(real, 2)}
    _validate_args: bool

    def __init__(
        self,
        logits: Tensor,  # (*batch, n, m)
        *,
        mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m) bool
        unmatched: Unmatched | None = None,  # (*batch, n), (*batch, m)
        density_samples: int = 2048,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(density_samples, int) or density_samples < 2:
            raise ValueError(
                "density_samples must be an integer of at least two, got "
                f"{density_samples!r}: a standard error takes two samples."
            )
        self.density_samples = density_samples
        self._noisy = GumbelContrasts(
            logits, mask=mask, unmatched=unmatched, validate_args=validate_args
        )
        self._copy_from_noisy()
        super().__init__(
            self._noisy.batch_shape, self._noisy.event_shape, validate_args=False
        )
        self._validate_args = self._noisy._validate_args

    def _copy_from_noisy(self) -> None:
        self.graph, self.logits = self._noisy.graph, self._noisy.logits

    @dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> Constraint:
        """Permutation matrices on the cells that the mask leaves."""
        full: Constraint = permutation_matrix
        return full if self.graph.is_full else permutation_matrix(self.graph)

    @property
    def mode(self) -> Tensor:
        """Not known: the best matching of the logits need not be the likeliest."""
        raise NotImplementedError(
            _UNKNOWN.format(
                "mode", "The best matching without noise is matching(d.logits)."
            )
        )

    @property
    def mean(self) -> Tensor:
        """Not known in closed form."""
        raise NotImplementedError(_UNKNOWN.format("mean", "Use d.marginals(k)."))

    @property
    def variance(self) -> Tensor:
        """Not known in closed form."""
        raise NotImplementedError(
            _UNKNOWN.format("variance", "Use d.marginals(k): p (1 - p) of each.")
        )

    def entropy(self) -> Tensor:
        """Not known in closed form."""
        raise NotImplementedError(
            _UNKNOWN.format(
                "entropy", "Estimate it: -d.log_prob(d.sample((k,))).mean(0)."
            )
        )

    def marginals(
        self, num_samples: int = 1000
    ) -> tuple[Tensor, Tensor]:  # (*batch, n, m + 1), (*batch, n, m + 1)
        """How often each pair is matched in draws, and the standard errors.

        The last column is how often a row is unmatched, so that rows sum to one.
        """
        return self._noisy.hard_frequencies(num_samples)

    def expand(
        self, batch_shape: Sequence[int], _instance: GumbelMatching | None = None
    ) -> GumbelMatching:
        """Return the distribution with a larger batch, on the same mask."""
        new: GumbelMatching = self._get_checked_instance(GumbelMatching, _instance)  # type: ignore[no-untyped-call]
        new._noisy = self._noisy.expand(batch_shape)
        new.density_samples = self.density_samples
        new._copy_from_noisy()
        super(GumbelMatching, new).__init__(
            new._noisy.batch_shape, self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw matchings, of shape ``(*sample, *batch, n, m)``."""
        scores = self._noisy._noisy_scores(torch.Size(sample_shape))
        return matching(scores, mask=self.graph).to(self.logits.dtype)

    def log_prob(
        self,
        value: Tensor,  # (*sample, *batch, n, m)
    ) -> Tensor:  # (*sample, *batch)
        """Log probability; an estimate unless blocks are small, see the class."""
        log_prob, _ = self._estimate(value)
        return log_prob.to(torch.promote_types(value.dtype, self.logits.dtype))

    def log_prob_error(
        self,
        value: Tensor,  # (*sample, *batch, n, m)
    ) -> Tensor:  # (*sample, *batch)
        """Standard error of :meth:`log_prob`, in nats; zero where it is exact."""
        _, error = self._estimate(value)
        return error.detach().to(torch.promote_types(value.dtype, self.logits.dtype))

    def _estimate(self, value: Tensor) -> tuple[Tensor, Tensor]:
        possible = possible_matchings(value, self.graph, self.batch_shape)
        lead = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        flat, graph = flattened(torch.Size(lead), self.graph)
        shape = (*flat, *self.event_shape)
        known = to_matrix(self.graph.matching, value.dtype, columns=self.event_shape[1])
        P = torch.where(possible[..., None, None], value, known)
        P = P.expand(*lead, *self.event_shape).reshape(shape)
        X = self.logits.double().expand(*lead, *self.event_shape).reshape(shape)
        values, errors = [], []
        for block in blocks(graph):
            log_prob, error = _score(
                take_block(X, block), take_block(P, block), block, self.density_samples
            )
            values.append((block, log_prob))
            errors.append((block, error**2))
        total = sum_blocks(values, X[..., 0, 0]).reshape(lead)
        error = sum_blocks(errors, X[..., 0, 0]).reshape(lead).sqrt()
        return (
            torch.where(possible, total, -torch.inf),
            torch.where(possible, error, 0.0),
        )

    @classmethod
    def infer_shapes(  # type: ignore[override]
        cls,
        logits: Sequence[int],
        mask: Sequence[int] | None = None,
        unmatched: Sequence[Sequence[int]] | None = None,
    ) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape for given shapes of the arguments."""
        return GumbelContrasts.infer_shapes(logits, mask, unmatched)


def _score(
    X: Tensor,  # (a, C, s, t)
    P: Tensor,  # (a, C, s, t)
    block: Block,
    samples: int,
) -> tuple[Tensor, Tensor]:  # (a, C), (a, C)
    """Log probability of a block's matching, and its standard error."""
    a, C, s, t = X.shape
    exact = X.new_zeros(a, C)
    bound = not bool(block.free_rows.any())
    if s == 1 and bound:  # the Gumbel-max trick
        log_p = torch.where(block.mask, X, -torch.inf).log_softmax(-1)
        return torch.where(P > 0, log_p, 0.0).sum((-2, -1)), exact
    if (s, t) == (2, 2) and not block.slack:
        gap = X[..., 0, 0] + X[..., 1, 1] - X[..., 0, 1] - X[..., 1, 0]
        return log_prob_two_items(torch.where(P[..., 0, 0] > 0, gap, -gap)), exact
    perm = torch.where((P > 0).any(-1), P.argmax(-1), -1)
    mask, *free = (
        x.expand(a, *x.shape).flatten(0, 1)
        for x in (block.mask, block.free_rows, block.free_columns)
    )
    log_p, error = log_prob_best(
        X.flatten(0, 1), mask, (free[0], free[1]), perm.flatten(0, 1), samples
    )
    return log_p.reshape(a, C), error.reshape(a, C)
