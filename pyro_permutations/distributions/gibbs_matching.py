# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Gibbs law of matchings."""

from __future__ import annotations

__all__ = ["GibbsMatching"]

from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import register_kl
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
from pyro_permutations.distributions.matching_values import possible_matchings
from pyro_permutations.effective_draws import frequency_error
from pyro_permutations.matching import matching, to_matrix
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.matching_list import can_be_listed, list_matchings
from pyro_permutations.matching_parts import undecided
from pyro_permutations.matching_sampler import sample_gibbs
from pyro_permutations.permanents import (
    is_exact,
    log_partition,
    marginals,
)
from pyro_permutations.unmatched_scores import Unmatched


class GibbsMatching(TorchDistribution):
    r"""The Gibbs law of matchings: weights are the exponential of the score.

    .. math:: p(P) = \exp \Big( \sum_{ij} P_{ij} X_{ij} \Big) \Big/
        \sum_{P'} \exp \Big( \sum_{ij} P'_{ij} X_{ij} \Big)

    over permutation matrices P; with fewer rows than columns over matrices that match
    every row to a column of its own; with ``unmatched`` over partial matchings, which
    count the scores of what is unmatched, too. It is the posterior of a matching with a
    flat prior whose pairs have log likelihood X. (The best matching of noisy scores,
    :class:`GumbelMatching`, has another law.)

    A mask falls apart into blocks, sets of items that share no pair. Blocks of at most
    12 items on the smaller side are exact: the log of the denominator by recursion over
    subsets, and samples by drawing backwards through its tables. For larger ones

    * ``log_prob`` and ``entropy`` have the calibrated log permanent for it, exact for
      equal scores and low by some tenths of a nat for others, see
      :func:`~pyro_permutations.calibrated_log_permanent`. The error is the same for
      all values.
    * samples are states of Markov chains, one for each sample, after 100 rounds. A
      chain starts at the best matching of noisy scores; in each round the rows are put
      into groups of eight at random, and each group is drawn anew, exactly, from its
      law given the rest. The law is kept by that; what is approximate is the start.
      Where a row or column has less than four pairs the samples are exact for up to 20
      items (16, if some may stay unmatched). For more, under a mask that leaves two
      matchings apart by no less than a ring of nine rows, the chain does not go from
      one to the other: their odds are those of the start, and wrong.

    ``torch.distributions.kl_divergence`` of two such laws is exact where both are, and
    not implemented elsewhere.

    No memory is of the order of n!. Values are checked whatever ``validate_args`` says:
    a matrix that is no permutation matrix is an error, and one that uses a forbidden
    pair has log probability ``-inf``.

    Args:
        logits: Scores X of shape ``(*batch, n, m)``. Entries of ``-inf`` forbid pairs.
            With ``unmatched`` the attribute ``logits`` has them less those scores.
        mask: Allowed pairs, bool, of shape ``(*batch, n, m)``, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`. Masks may differ
            across the batch.
        unmatched: Scores of unmatched rows and of unmatched columns, numbers or tensors
            of shape ``(*batch, n)`` and ``(*batch, m)``; ``-inf`` for what has to be
            matched. None: all that can be is matched.

    Raises:
        TypeError: If logits are not a tensor.
        ValueError: If logits are NaN or ``+inf``, or have more rows than columns and
            nothing is said of unmatched ones; if the mask has another shape or type, or
            no matching. By ``log_prob``, if the value is not a permutation matrix.

    Example:
        >>> odds = torch.tensor([[0.95, 0.94], [0.93, 0.01]]).logit()
        >>> d = GibbsMatching(odds)
        >>> d.mode
        tensor([[0., 1.],
                [1., 0.]])
        >>> d.log_prob(d.mode).exp()
        tensor(0.9991)
        >>> probability, error = d.marginals()
        >>> probability  # the last column is that of being unmatched
        tensor([[0.0009, 0.9991, 0.0000],
                [0.9991, 0.0009, 0.0000]])
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {"logits": independent(real, 2)}
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
        # Expanded copies are computed once: these are the scores before they are.
        self._scores, self.graph = scores_on_graph(logits, mask, unmatched, validate)
        self.has_enumerate_support = can_be_listed(self.graph)
        event_shape = self._scores.shape[-2:]
        batch_shape = torch.broadcast_shapes(
            self._scores.shape[:-2], self.graph.batch_shape
        )
        self.logits = self._scores.expand(batch_shape + event_shape)
        # Checked above, in one pass, and for empty batches too.
        super().__init__(batch_shape, event_shape, validate_args=False)
        self._validate_args = validate

    @dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> Constraint:
        """Permutation matrices on the cells that the mask leaves."""
        full: Constraint = permutation_matrix
        return full if self.graph.is_full else permutation_matrix(self.graph)

    @property
    def mode(self) -> Tensor:  # (*batch, n, m)
        """The most likely matching, exactly."""
        return matching(self.logits, mask=self.graph)

    @property
    def log_partition(self) -> Tensor:  # (*batch,) float64
        """Log of the sum of the weights of all matchings: the log permanent of exp(X).

        Exact for up to 12 items, and calibrated for more.
        """
        total = log_partition(self._scores.double(), self.graph)
        return total.expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:  # (*batch, n, m)
        """How likely each pair is, where that is exact."""
        if not bool(self._is_exact().all()):
            raise NotImplementedError(
                "the mean of a matching of more than 12 items is not known exactly. "
                "Estimate it from draws: d.marginals(num_samples)."
            )
        exact = marginals(self._scores.double(), self.graph)
        return exact.expand(self.logits.shape).to(self.logits.dtype)

    @property
    def variance(self) -> Tensor:  # (*batch, n, m)
        """That of each entry, where the mean is known."""
        mean = self.mean
        return mean * (1 - mean)

    def marginals(
        self, num_samples: int = 1000
    ) -> tuple[Tensor, Tensor]:  # (*batch, n, m + 1), (*batch, n, m + 1)
        """How likely each pair is, and the standard errors.

        The last column is how likely a row is to be unmatched, so that rows sum to one.
        Exact, with errors of zero, for blocks of up to 12 items; others are frequencies
        in samples. No gradient flows into them.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        scores, exact = self._scores.detach().double(), self._is_exact()
        if bool(exact.all()):
            pairs = marginals(scores, self.graph)
            error = torch.zeros_like(pairs)
        else:
            lead = torch.broadcast_shapes(scores.shape[:-2], self.graph.batch_shape)
            pairs = scores.new_zeros(*lead, *self.event_shape)
            for start in range(0, num_samples, 64):  # to keep the memory small
                size = min(64, num_samples - start)
                pairs += self._draw(lead, size).double().sum(0)
            pairs /= num_samples
            error = frequency_error(pairs, num_samples)
            error = torch.where(undecided(self.graph)[..., :-1], error, 0.0)
            if bool(exact.any()):
                small = self.graph.support & exact
                known = marginals(torch.where(small, scores, 0.0), self.graph)
                pairs = torch.where(exact, known, pairs)
                error = error.masked_fill(exact, 0.0)
        loose = self.graph.slack_cells()[0][..., None]
        alone = torch.where(loose, 1 - pairs.sum(-1, keepdim=True), 0.0).clamp(0, 1)
        unsure = (error > 0).any(-1, keepdim=True)
        unsure = unsure & loose
        doubt = torch.where(unsure, frequency_error(alone, num_samples), 0.0)
        shape = self.batch_shape + self.event_shape[:1] + (self.event_shape[1] + 1,)
        probability, error = (
            torch.cat(x, -1).expand(shape).to(self.logits.dtype)
            for x in ((pairs, alone), (error, doubt))
        )
        return probability, error

    def _is_exact(self) -> Tensor:  # (*batch, n, m) bool
        """The pairs whose probabilities are known."""
        return is_exact(self.graph)

    def entropy(self) -> Tensor:  # (*batch,)
        """In nats; exact for up to 12 items, beyond calibrated, with one derivative."""
        scores = self._scores.double()
        score = (scores * marginals(scores, self.graph)).sum((-2, -1))
        entropy = log_partition(scores, self.graph) - score
        return entropy.expand(self.batch_shape).to(self.logits.dtype)

    def expand(
        self, batch_shape: Sequence[int], _instance: GibbsMatching | None = None
    ) -> GibbsMatching:
        """Return the distribution with a larger batch, on the same mask."""
        new: GibbsMatching = self._get_checked_instance(GibbsMatching, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new.graph, new._scores = self.graph, self._scores
        new.has_enumerate_support = self.has_enumerate_support
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        super(GibbsMatching, new).__init__(
            batch_shape, self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw matchings, of shape ``(*sample, *batch, n, m)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        own = torch.broadcast_shapes(self._scores.shape[:-2], self.graph.batch_shape)
        if shape[len(shape) - 2 - len(own) : -2] != own:  # a size of one was expanded
            own = self.batch_shape
        count = shape[: len(shape) - 2 - len(own)].numel()
        return self._draw(own, count).reshape(shape)

    def _draw(self, batch: Sequence[int], count: int) -> Tensor:
        """Matchings for the scores, expanded to a batch: ``(count, *batch, n, m)``."""
        scores = self._scores.detach().double()
        scores = scores.expand(*batch, *self.event_shape)
        perm = sample_gibbs(
            scores.reshape(-1, *self.event_shape), self.graph.expand(batch), count
        )
        perm = perm.reshape(count, *batch, self.event_shape[0])
        return to_matrix(perm, self.logits.dtype, columns=self.event_shape[1])

    def log_prob(
        self,
        value: Tensor,  # (*sample, *batch, n, m)
    ) -> Tensor:  # (*sample, *batch)
        """Log probability; ``-inf`` where a forbidden pair is used."""
        possible = possible_matchings(value, self.graph, self.batch_shape)
        score = (self.logits.double() * value.double()).sum((-2, -1))
        log_prob = torch.where(possible, score - self.log_partition, -torch.inf)
        return log_prob.to(torch.promote_types(value.dtype, self.logits.dtype))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All matchings, ``(k, *batch, n, m)``, of up to eight rows.

        Where masks differ across the batch they are those of any of them, and some have
        log probability ``-inf`` in others.
        """
        if not self.has_enumerate_support:
            raise NotImplementedError(
                f"there are too many matchings of {self.event_shape[0]} rows and "
                f"{self.event_shape[1]} columns to list: at most 8 rows, and at most "
                "8! = 40320 matchings if no pair is forbidden. Draw samples instead."
            )
        perm = list_matchings(self.graph)
        values = to_matrix(perm, self.logits.dtype, columns=self.event_shape[1])
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


def _kl_divergence(p: GibbsMatching, q: GibbsMatching) -> Tensor:  # (*batch,)
    """KL(p || q) = <X - Y, B> - log Z(X) + log Z(Y), B the marginals of p.

    Infinite where q forbids what p allows.
    """
    if p.event_shape != q.event_shape:
        raise ValueError(
            "p and q must have matrices of one size, got "
            f"{tuple(p.event_shape)} and {tuple(q.event_shape)}."
        )
    if not all(bool(d._is_exact().all()) for d in (p, q)):
        raise NotImplementedError(
            "the divergence of laws of more than 12 items is not known exactly. "
            "Estimate it from draws: (p.log_prob(P) - q.log_prob(P)).mean(0)."
        )
    X, Y = p._scores.double(), q._scores.double()
    score = ((X - Y) * marginals(X, p.graph)).sum((-2, -1))
    kl = score - p.log_partition + q.log_partition
    # The cells of each are just those that some matching uses.
    possible = (~p.graph.support | q.graph.support).all(-1).all(-1)
    slack = zip(p.graph.slack_cells(), q.graph.slack_cells(), strict=True)
    for mine, other in slack:
        possible = possible & (~mine | other).all(-1)
    return torch.where(possible, kl, torch.inf).to(p.logits.dtype)


register_kl(GibbsMatching, GibbsMatching)(_kl_divergence)
