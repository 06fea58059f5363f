# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What draws of a matching say: names with probabilities, and how sure these are."""

from __future__ import annotations

__all__ = ["Candidate", "MatchingPosterior", "Matchings"]

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_permutations.effective_draws import effective_counts, frequency_error
from pyro_permutations.matching import matching, to_indices
from pyro_permutations.posterior_arguments import (
    checked_chains,
    checked_matchings,
    checked_weights,
)

# What rounding may do to a sum of probabilities.
_ROUNDING = 1e-9


class Candidate(NamedTuple):
    """A possible partner of an item, how likely it is, and the standard error of that.

    The column is -1, and the name "unmatched", for having no partner.
    """

    name: str
    probability: float
    error: float
    column: int


class Matchings(NamedTuple):
    """Matchings, the likeliest first, their probabilities and standard errors."""

    perm: Tensor  # (k, n) long
    probability: Tensor  # (k,)
    error: Tensor  # (k,)


class MatchingPosterior:
    r"""A distribution over matchings, known by weighted draws.

    .. math:: \Pr(\pi) = \sum_s w_s [\pi = \pi_s]

    The draws are kept as indices, ``perm[s, i] = j`` where item i is matched to column
    j and -1 where it is unmatched, so a thousand draws of 279 neurons are 2 MB. They
    are draws of a sampler, all matchings there are with their exact probabilities, or
    states of Markov chains; :class:`~pyro_permutations.MatchingDraws` and the functions
    beside it make them from a guide, from MCMC and by enumeration.

    **What the standard errors say.** They are those of a frequency p among N draws,
    :math:`\sqrt{p (1 - p) / N}`. N is the number of draws, or with weights
    :math:`1 / \sum w_s^2`, or for chains the effective sample size of the entry; chains
    that disagree make it small. Half a draw is added on either side, so that what was
    never or always drawn has an error, too, about .7 / N; where no chain has ever
    changed an entry, N is the smallest of those that did change. What a mask decides
    has such an error, too, as draws do not know the mask; only where one distribution
    is read, :func:`posterior_of` and a guide without other sites, it is zero there. The
    errors are about the draws alone: a guide that is wrong is wrong with small errors.

    Args:
        perm: Matchings of shape ``(draws, *batch, n)``: columns, none of them twice in
            a row of ``perm``, and -1. :func:`~pyro_permutations.to_indices` makes them
            from matrices.
        columns: Their number m; n if not given.
        weights: Weights of the draws, not negative, of shape ``(draws,)`` or ``(draws,
            *batch)``; they are normalised. Equal ones if not given.
        chains: Number of Markov chains. The draws are those of the first chain, in
            order, then those of the second and so on. None: they are independent.
        exact: Whether these are all matchings and ``weights`` their probabilities, so
            that there are no errors.

    Raises:
        ValueError: If ``perm`` are not matchings, if the weights are negative, all
            zero, not finite or of another shape, or if the draws are not equally many
            (at least four) for each chain, or chains have weights.

    Example:
        >>> perm = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2]])
        >>> weights = torch.tensor([0.6, 0.3, 0.1])
        >>> posterior = MatchingPosterior(perm, weights=weights, exact=True)
        >>> posterior.mode
        tensor([0, 1, 2])
        >>> probability, error = posterior.marginals()
        >>> probability
        tensor([[0.9000, 0.1000, 0.0000, 0.0000],
                [0.1000, 0.6000, 0.3000, 0.0000],
                [0.0000, 0.3000, 0.7000, 0.0000]])
        >>> for name, p, error, column in posterior.candidates(2, "abc")[1]:
        ...     print(name, round(p, 2), error)
        b 0.6 0.0
        c 0.3 0.0
        >>> posterior.top_matchings(2).probability.sum()
        tensor(0.9000)
    """

    def __init__(
        self,
        perm: Tensor,  # (draws, *batch, n)
        columns: int | None = None,
        *,
        weights: Tensor | None = None,  # (draws,) or (draws, *batch)
        chains: int | None = None,
        exact: bool = False,
    ) -> None:
        self.perm = checked_matchings(perm, columns)
        self.columns = perm.shape[-1] if columns is None else columns
        self.weights = checked_weights(weights, self.perm)
        self.chains = checked_chains(chains, len(perm), weights)
        if exact and (weights is None or chains is not None):
            raise ValueError(
                "exact probabilities are the weights of all matchings; pass weights, "
                "and no chains."
            )
        self.exact = exact
        self._undecided: Tensor | None = None  # (*batch, n, m + 1), by a known mask
        self.dtype = torch.get_default_dtype() if weights is None else weights.dtype

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of matchings that have a distribution each."""
        return self.perm.shape[1:-1]

    def __getitem__(self, index: Any) -> MatchingPosterior:
        """Select of the batch, as of a tensor: ``posterior[0]`` is the first element's.

        Its elements may be of different sizes, padded; names are theirs alone.
        """
        if not self.batch_shape:
            raise IndexError("this posterior has no batch to select from.")
        elements = torch.arange(self.batch_shape.numel(), device=self.perm.device)
        chosen = elements.reshape(self.batch_shape)[index]
        # Not flattened: that would copy what is expanded.
        place = torch.unravel_index(chosen, self.batch_shape)
        each: Any = (slice(None), *place)
        new = object.__new__(MatchingPosterior)
        new.perm, new.weights = self.perm[each], self.weights[each]
        new.columns, new.dtype = self.columns, self.dtype
        new.chains, new.exact = self.chains, self.exact
        new._undecided = self._undecided
        if self._undecided is not None:
            new._undecided = self._undecided[place]
        return new

    def __iter__(self) -> Iterator[MatchingPosterior]:
        """Go over the first dimension of the batch."""
        return (self[k] for k in range(self.batch_shape[0] if self.batch_shape else 0))

    def __repr__(self) -> str:
        draws, n = self.perm.shape[0], self.perm.shape[-1]
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        kind = "exact, " if self.exact else ""
        if self.chains is not None:
            kind = f"{self.chains} chains, "
        return f"MatchingPosterior({kind}{draws} draws of {n} x {self.columns}{batch})"

    # %% Items

    def marginals(self) -> tuple[Tensor, Tensor]:  # (*batch, n, m + 1), same
        """How likely each pair is, and the standard errors.

        The last column is how likely a row is unmatched, so that rows sum to one.
        """
        probability = self._probability()
        error = frequency_error(probability, self._independent_draws(probability))
        if self._undecided is not None:
            error = torch.where(self._undecided, error, 0)
        return probability.to(self.dtype), error.to(self.dtype)

    @property
    def best(self) -> Tensor:  # (*batch, n) long
        r"""The matching with the most items right, in expectation.

        .. math:: \arg\max_\pi \sum_i \Pr(\text{item } i \text{ goes with } \pi(i))

        over the pairs that were ever drawn, and -1 for what was drawn without a
        partner. It is a matching, which the likeliest partners of the items need not
        be, and asks less of the draws than :attr:`mode`, which has to be drawn whole.
        """
        probability = self._probability()
        pairs, alone = probability[..., :-1], probability[..., -1]
        scores = torch.where(pairs > 0, pairs, -torch.inf)
        # A column counts nothing if it is without a partner, where that was drawn.
        free = torch.where(pairs.sum(-2) < 1 - _ROUNDING, 0.0, -torch.inf)
        unmatched = torch.where(alone > 0, alone, -torch.inf), free.double()
        return to_indices(matching(scores, unmatched=unmatched))

    def candidates(
        self, k: int = 5, names: Sequence[str] | None = None
    ) -> list[list[Candidate]]:  # n lists of up to k
        """The k likeliest partners of each item, with probabilities and errors.

        Partners that were never drawn are left out; to be unmatched counts as one.

        Args:
            k: How many, at most.
            names: A name for each column; their numbers if not given.

        Raises:
            ValueError: If there is a batch, or not a name for each column.
        """
        self._check_single("candidates")
        if names is not None and len(names) != self.columns:
            raise ValueError(
                f"names must have one for each of {self.columns} columns, got "
                f"{len(names)}."
            )
        words = [str(j) for j in range(self.columns)] if names is None else [*names]
        words.append("unmatched")
        probability, error = self.marginals()
        top = probability.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        probability, error = probability.gather(-1, top), error.gather(-1, top)
        lists = zip(top.tolist(), probability.tolist(), error.tolist(), strict=True)
        return [
            [
                Candidate(words[j], p, se, j if j < self.columns else -1)
                for j, p, se in zip(*item, strict=True)
                if p > 0
            ]
            for item in lists
        ]

    def credible_names(self, mass: float = 0.9) -> Tensor:  # (*batch, n, m + 1) bool
        """The fewest partners of each item that hold the mass together, to 1e-9.

        True for those; the last column is being unmatched. The set is of one item: that
        the sets of all items are right at once is less likely than the mass.
        """
        return _smallest_set(self._probability(), mass)

    def item_entropies(self) -> tuple[Tensor, Tensor]:  # (*batch, n), (*batch, n)
        """Entropy of each item's partner in nats, and by how much it is too low.

        See :meth:`entropy` for the second number.
        """
        probability = self._probability()
        others = (probability > 0).sum(-1) - 1
        value = torch.special.entr(probability).sum(-1)
        return value.to(self.dtype), (others * self._bias()[..., None]).to(self.dtype)

    # %% Matchings

    @property
    def mode(self) -> Tensor:  # (*batch, n) long
        """The matching that was drawn most often, or has the largest weight.

        Of many items hardly any two draws are the same, and it says little:
        :attr:`best` then says more.
        """
        if self.batch_shape:
            return torch.stack([one.mode for one in self])
        return self.top_matchings(1).perm[0]

    def top_matchings(self, k: int = 10) -> Matchings:
        """The k likeliest matchings; their probabilities sum to what they cover.

        Fewer if fewer were drawn. Those are chosen that happened to be drawn often: of
        independent draws or chains the sum is a little too high, by up to about the
        sum of the errors.

        Raises:
            ValueError: If there is a batch.
        """
        perm, probability, rank = self._distinct("top_matchings")
        perm, probability = perm[:k], probability[:k]
        size = 1 / self.weights.square().sum()
        if self.exact:
            size = torch.full_like(size, torch.inf)
        elif self.chains is not None:
            size = effective_counts(rank.reshape(self.chains, -1, 1), len(perm))[0]
        error = frequency_error(probability, size)
        return Matchings(perm, probability.to(self.dtype), error.to(self.dtype))

    def credible_matchings(self, mass: float = 0.9) -> Matchings:
        """The fewest matchings that hold the mass together.

        Of few draws it is a part of the set that holds the mass in truth: what was
        never drawn cannot be in it.

        Raises:
            ValueError: If there is a batch.
        """
        _, probability, _ = self._distinct("credible_matchings")
        return self.top_matchings(int(_smallest_set(probability, mass).sum()))

    def entropy(self) -> tuple[Tensor, Tensor]:  # (*batch,), (*batch,)
        r"""Entropy of the draws in nats, and by how much that is too low, at least.

        .. math:: - \sum_\pi \Pr(\pi) \log \Pr(\pi), \qquad \frac{K - 1}{2 N}

        with K the number of different matchings among N draws (Miller, 1955), of chains
        the effective number. The second is not added to the first, and is zero for
        exact probabilities. No entropy of N draws exceeds log N: unless K is far less
        than N, it says nothing.
        """
        if self.batch_shape:
            values, biases = zip(*(one.entropy() for one in self), strict=True)
            return torch.stack(values), torch.stack(biases)
        _, probability, _ = self._distinct("entropy")
        value = torch.special.entr(probability).sum()
        bias = (len(probability) - 1) * self._bias()
        return value.to(self.dtype), bias.to(self.dtype)

    # %% Inside, in float64

    def _check_single(self, method: str) -> None:
        if self.batch_shape:
            raise ValueError(
                f"{method} is of one matching, but this posterior has batch shape "
                f"{tuple(self.batch_shape)}: select one, as in posterior[0].{method}()."
            )

    def _cells(self) -> Tensor:  # (draws, *batch, n), m for -1
        return torch.where(self.perm < 0, self.columns, self.perm)

    def _probability(self) -> Tensor:  # (*batch, n, m + 1)
        index = self._cells().movedim(0, -1)  # (*batch, n, draws)
        weights = self.weights.movedim(0, -1).unsqueeze(-2).expand(index.shape)
        probability = weights.new_zeros(*index.shape[:-1], self.columns + 1)
        probability = probability.scatter_add_(-1, index, weights)
        # Rounding of many equal weights: what is alone is certain, exactly.
        found = probability > 0
        certain = found & (found.sum(-1, keepdim=True) == 1)
        return torch.where(certain, 1.0, probability).clamp(max=1)

    def _distinct(self, method: str) -> tuple[Tensor, Tensor, Tensor]:
        """Different matchings by falling probability, and the place of each draw."""
        self._check_single(method)
        perm, which = torch.unique(self.perm, dim=0, return_inverse=True)
        probability = self.weights.new_zeros(len(perm)).index_add_(
            0, which, self.weights
        )
        probability, order = probability.sort(descending=True, stable=True)
        some = probability > 0
        return perm[order][some], probability[some], order.argsort()[which]

    def _independent_draws(
        self,
        probability: Tensor,  # (*batch, n, m + 1)
    ) -> Tensor:  # of the same shape, or one that broadcasts
        """How many independent draws have frequencies as good as these."""
        if self.exact:
            return torch.full_like(probability, torch.inf)
        if self.chains is None:
            return 1 / self.weights.square().sum(0)[..., None, None]
        cells = self._cells().reshape(self.chains, -1, *self.perm.shape[1:])
        each = cells.flatten(2, -2).unbind(2) if self.batch_shape else [cells]
        places = self.columns + 1
        size = torch.stack([effective_counts(x, places) for x in each])
        return size.reshape(probability.shape)

    def _bias(self) -> Tensor:  # (*batch,)
        return 0.5 / self._independent_draws(self._probability()).amin((-2, -1))


def _smallest_set(probability: Tensor, mass: float) -> Tensor:  # (*batch, k) -> bool
    """True for the fewest entries of the last dimension that hold the mass."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}.")
    value, order = probability.sort(dim=-1, descending=True, stable=True)
    before = value.cumsum(-1) - value
    inside = (before < mass - _ROUNDING) & (value > 0)
    return torch.zeros_like(inside).scatter(-1, order, inside)
