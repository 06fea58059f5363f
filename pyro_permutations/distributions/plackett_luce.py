# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Plackett-Luce distribution over rankings, as matrices."""

from __future__ import annotations

__all__ = ["PlackettLuce", "check_ranking_arguments"]

from collections.abc import Sequence
from itertools import permutations
from math import perm as number_of_rankings
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
from torch.nn.functional import pad

from pyro_permutations.constraints import permutation_matrix
from pyro_permutations.effective_draws import frequency_error
from pyro_permutations.matching_graph import matching_graph
from pyro_permutations.outside import holds
from pyro_permutations.ranking_probability import (
    rank_marginals,
    ranking_log_probability,
)

_MOST_RANKINGS = 40320  # of 8 items; what enumerate_support and entropy go through
_MOST_ITEMS = 64  # up to here marginals are integrated: a second or two for each law
_TOO_MANY = (
    "the {} is computed for at most {}. Beyond, use samples: d.sample((k,)), and "
    "d.marginals(k) for how likely each item is at each rank."
)


class PlackettLuce(TorchDistribution):
    r"""A ranking in which each rank is held by an item drawn from those that are left.

    .. math:: p(P) = \prod_{r=1}^{k} \frac{e^{x_{i_r}}}{e^{x_{i_r}} + \dots +
        e^{x_{i_n}}}, \qquad P_{r, i_r} = 1

    with logits x. ``P[r, i] = 1`` says that rank r is held by item i, the first rank by
    the item that is drawn first: ``(P @ x)[r]`` is the logit of the item at rank r, and
    ``to_indices(P)`` lists the items in order. It is the order in which items arrive
    whose times are exponential with rates :math:`e^x`, and that of logits with Gumbel
    noise, descending, which is how it is sampled. Adding a constant to the logits
    changes nothing; equal ones are the uniform distribution over rankings.

    With ``top`` a value is a partial ranking, the first k ranks of n items, of shape
    ``(k, n)``: its probability is the sum of those of its completions. An item with a
    logit of ``-inf`` is not there, so that lists of different lengths can share a
    batch: it has no rank, and the last ranks are left empty, rows of zeros.

    ``log_prob`` is exact. There is no ``rsample``: a gradient goes through ``log_prob``
    (the score function), or through :class:`RelaxedPlackettLuce`. In a guide it goes
    with a discrete prior in the model, ``UniformPermutation(n)``, ``GibbsMatching`` or
    one of this class, and either ``Trace_ELBO``, whose score-function gradients are
    unbiased and noisy (use hundreds of vectorized particles), or, for up to 8 items,
    ``TraceEnum_ELBO``, which sums over all rankings if the site in the guide has
    ``infer={"enumerate": "parallel"}``. A likelihood need not be differentiable in P.

    Args:
        logits: Log weights x of shape ``(*batch, n)``.
        top: How many ranks a value has, 1 to n; all n if not given.

    Raises:
        TypeError: If logits are not a tensor.
        ValueError: If logits are NaN or ``+inf``, all of an element are ``-inf``, or
            ``top`` is not an integer of 1 to n. By ``log_prob``, if a value is not a
            ranking; it checks also where validation is switched off, because a relaxed
            value would get a number without a meaning.

    References:
        Luce, "Individual choice behavior" (1959). Plackett, "The analysis of
        permutations", Applied Statistics 24 (1975). Yellott, "The relationship between
        Luce's choice axiom, Thurstone's theory of comparative judgment, and the double
        exponential distribution", Journal of Mathematical Psychology 15 (1977).

    Example:
        >>> d = PlackettLuce(torch.tensor([2.0, 1.0, 0.0, -1.0]))
        >>> d.log_prob(torch.eye(4))
        tensor(-1.1611)
        >>> d.enumerate_support().shape
        torch.Size([24, 4, 4])
        >>> d.mean[0]  # how likely each item is first
        tensor([0.6439, 0.2369, 0.0871, 0.0321])
        >>> first_two = PlackettLuce(torch.tensor([2.0, 1.0, 0.0, -1.0]), top=2)
        >>> first_two.mode
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.]])
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {"logits": independent(real, 1)}
    _validate_args: bool

    def __init__(
        self,
        logits: Tensor,  # (*batch, n)
        top: int | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        validate = self._validate_args if validate_args is None else validate_args
        self.top = check_ranking_arguments(logits, top, validate)
        self.logits = logits
        rankings = number_of_rankings(logits.shape[-1], self.top)
        self.has_enumerate_support = rankings <= _MOST_RANKINGS
        event_shape = self._event_shape_of(self.top, logits.shape[-1])
        # Checked above, in one pass, and for empty batches too.
        super().__init__(logits.shape[:-1], event_shape, validate_args=False)
        self._validate_args = validate

    @dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> Constraint:
        """Matrices with a single one in each row, and at most a one in each column."""
        if holds(self._there):
            return permutation_matrix
        ranks = torch.arange(self.top, device=self.logits.device)
        filled = ranks < self._lengths[..., None]
        mask = filled[..., None] & self._there[..., None, :]
        return permutation_matrix(matching_graph(mask, (self.top, self._n)))

    @property
    def mode(self) -> Tensor:  # the shape of a value
        """The items by falling logit: the most likely ranking, and partial ranking."""
        return self._value(self._ranked(self.logits.detach()))

    @property
    def mean(self) -> Tensor:  # (*batch, k, n)
        """How likely each item is at each rank, exactly; differentiable."""
        if self._n > _MOST_ITEMS:
            raise NotImplementedError(_TOO_MANY.format("mean", f"{_MOST_ITEMS} items"))
        return rank_marginals(self.logits, self.top).to(self.logits.dtype)

    @property
    def variance(self) -> Tensor:  # (*batch, k, n)
        """That of each entry, which is zero or one."""
        return self.mean * (1 - self.mean)

    def marginals(
        self, num_samples: int = 1000
    ) -> tuple[Tensor, Tensor]:  # (*batch, k, n + 1), (*batch, k, n + 1)
        """How likely each item is at each rank, and the standard errors.

        The last column is how likely a rank is empty, which only those of a short list
        are. Exact up to 64 items, with errors of zero, in a second or two for each
        element of the batch if it has so many; frequencies in samples beyond.
        No gradient flows into them.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        exact = self._n <= _MOST_ITEMS
        if exact:
            found = rank_marginals(self.logits.detach(), self.top)
            found = found.to(self.logits.dtype)
        else:
            total: Tensor | float = 0.0
            for start in range(0, num_samples, 64):  # to keep the memory small
                perm = self._draw(torch.Size((min(64, num_samples - start),)))
                total = total + _one_hot(perm, self._n, torch.float64).sum(0)
            found = torch.as_tensor(total / num_samples).to(self.logits.dtype)
        ranks = torch.arange(self.top, device=found.device)
        empty = (ranks >= self._lengths[..., None])[..., None]  # that is certain
        found = torch.cat([found, empty.to(found.dtype)], -1)
        error = frequency_error(found, torch.inf if exact else num_samples)
        certain = empty.expand(found.shape).clone()
        certain[..., -1] = True
        return found, error.masked_fill(certain, 0.0)

    def entropy(self) -> Tensor:  # (*batch,)
        """Exact, where :meth:`enumerate_support` is possible."""
        perm = self._all_rankings("entropy")
        lead = (1,) * len(self.batch_shape)
        log_p = ranking_log_probability(
            self.logits, perm.reshape(len(perm), *lead, self.top)
        )
        log_p = log_p.clamp_min(-1000)  # of no weight, and finite
        return -(log_p * log_p.exp()).sum(0).to(self.logits.dtype)

    def expand(
        self, batch_shape: Sequence[int], _instance: PlackettLuce | None = None
    ) -> PlackettLuce:
        """Return the distribution with a larger batch."""
        new: PlackettLuce = self._get_checked_instance(PlackettLuce, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new.top, new.has_enumerate_support = self.top, self.has_enumerate_support
        new.logits = self.logits.expand(batch_shape + self.logits.shape[-1:])
        super(PlackettLuce, new).__init__(
            batch_shape, self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw rankings, of shape ``(*sample, *batch, k, n)``."""
        return self._value(self._draw(torch.Size(sample_shape)))

    def log_prob(
        self,
        value: Tensor,  # (*sample, *batch, k, n)
    ) -> Tensor:  # (*sample, *batch)
        """Log probability, exact; the gradient is that with respect to the logits."""
        shape, event = tuple(value.shape), tuple(self.event_shape)
        if shape[-len(event) :] != event:
            raise ValueError(f"expected a value of shape (..., {event}), got {shape}.")
        try:
            torch.broadcast_shapes(shape[: -len(event)], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"a value of shape {shape} does not broadcast with a distribution of "
                f"batch shape {tuple(self.batch_shape)} and event shape {event}."
            ) from None
        if not holds(self.support.check(value)):
            raise ValueError(
                f"value is not in the support of {type(self).__name__}: expected "
                f"{self._expected}. A relaxed guide needs a relaxed prior: "
                "RelaxedPlackettLuce in the guide and in the model. DiscreteKL_ELBO "
                "takes UniformPermutation or GibbsMatching as the prior."
            )
        log_p = ranking_log_probability(self.logits, self._indices(value))
        return log_p.to(self.logits.dtype)

    def enumerate_support(
        self, expand: bool = True
    ) -> Tensor:  # (rankings, *batch, k, n)
        """All rankings, if there are at most 40320 (those of 8 items).

        Raises:
            NotImplementedError: If there are more, or if batch elements have different
                items.
        """
        values = self._value(self._all_rankings("support"))
        lead = (1,) * len(self.batch_shape)
        values = values.reshape(len(values), *lead, *self.event_shape)
        lead = self.batch_shape if expand else lead
        return values.expand(-1, *lead, *self.event_shape)

    @classmethod
    def infer_shapes(  # type: ignore[override]
        cls, logits: Sequence[int], top: int | None = None
    ) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape for a shape of the logits."""
        top = logits[-1] if top is None else top
        return torch.Size(logits[:-1]), cls._event_shape_of(top, logits[-1])

    # What tells matrices from indices

    _expected = "a single 1 in each row, at most one in each column, and 0 elsewhere"

    @staticmethod
    def _event_shape_of(top: int, n: int) -> torch.Size:
        return torch.Size((top, n))

    def _value(self, perm: Tensor) -> Tensor:
        return _one_hot(perm, self._n, self.logits.dtype)

    def _indices(self, value: Tensor) -> Tensor:
        return torch.where((value == 1).any(-1), (value == 1).long().argmax(-1), -1)

    # Rankings as indices, -1 for an empty rank

    @property
    def _n(self) -> int:
        return int(self.logits.shape[-1])

    @property
    def _there(self) -> Tensor:  # (*batch, n) bool
        return self.logits > -torch.inf

    @property
    def _lengths(self) -> Tensor:  # (*batch,) long
        return self._there.sum(-1)

    def _draw(self, sample_shape: torch.Size) -> Tensor:  # (*sample, *batch, k)
        shape = sample_shape + self.logits.shape
        logits = self.logits.detach().expand(shape)
        # Half precision has too few numbers for noise, and rare draws are exactly zero.
        wide = torch.promote_types(logits.dtype, torch.float32)
        kind = torch.finfo(wide)
        noise = torch.empty_like(logits, dtype=wide).exponential_()
        return self._ranked(logits - noise.clamp(kind.tiny, kind.max).log())

    def _ranked(self, scores: Tensor) -> Tensor:
        perm = scores.argsort(dim=-1, descending=True, stable=True)[..., : self.top]
        return torch.where(scores.gather(-1, perm) > -torch.inf, perm, -1)

    def _all_rankings(self, what: str) -> Tensor:  # (rankings, k)
        there = self._there.reshape(-1, self._n)
        if not holds(there == there[:1]):
            raise NotImplementedError(
                "the elements of this batch have different items, and with that "
                "different rankings. Take them one by one."
            )
        items = there[0].nonzero() if len(there) else torch.arange(self._n)
        items = items.flatten().to(self.logits.device)
        ranks = min(self.top, len(items))
        if not self.has_enumerate_support:
            raise NotImplementedError(
                _TOO_MANY.format(what, f"{_MOST_RANKINGS} rankings")
            )
        perm = torch.tensor(list(permutations(items.tolist(), ranks)))
        return pad(perm.to(items.device), (0, self.top - ranks), value=-1)


def check_ranking_arguments(logits: Tensor, top: int | None, validate: bool) -> int:
    """Check them, and return how many ranks a value has."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"logits must be a tensor, got {type(logits).__name__}: pass a tensor, "
            "torch.as_tensor(logits)."
        )
    if not logits.is_floating_point() or logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            "logits must be floating point, of shape (*batch, n) with n >= 1, got "
            f"{logits.dtype} and {tuple(logits.shape)}."
        )
    n = logits.shape[-1]
    if top is not None and (not isinstance(top, int) or not 1 <= top <= n):
        raise ValueError(f"top must be an integer from 1 to {n} items, got {top!r}.")
    if validate and not holds(logits < torch.inf):  # also false for NaN
        raise ValueError(
            "logits must not be NaN or +inf. -inf means that an item is not there."
        )
    if validate and not holds((logits > -torch.inf).any(-1)):
        raise ValueError(
            "logits are -inf for all items of a batch element: at least one has to be "
            "there."
        )
    return n if top is None else top


def _one_hot(perm: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Matrices of rankings; rows of zeros for -1."""
    return (perm[..., None] == torch.arange(n, device=perm.device)).to(dtype)
