# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Score matrices with Gumbel noise, without their row and column shifts."""

from __future__ import annotations

__all__ = ["GumbelContrasts"]

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

from pyro_permutations.constraints import contrasts
from pyro_permutations.effective_draws import frequency_error
from pyro_permutations.matching import matching
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.matching_parts import undecided
from pyro_permutations.outside import holds
from pyro_permutations.shift_integral import log_shift_integral
from pyro_permutations.unmatched_scores import Unmatched, relative_scores


class GumbelContrasts(TorchDistribution):
    r"""The contrasts of noisy scores, the base of :class:`GumbelSinkhorn`.

    .. math:: Z = \text{contrasts}(X + \epsilon), \qquad
        \epsilon_{ij} \sim \text{Gumbel}(0, 1)

    Z is what is left of the noisy scores when a constant per row and per column is
    taken out: for a full n x n matrix :math:`Z_{ij} = L_{ij} - L_{in} - L_{nj} +
    L_{nn}`, which is zero in the last row and column. It does not depend on a
    temperature. Inference on Z in place of the doubly stochastic matrix (Pyro's
    ``TransformReparam``) is well scaled at any temperature.

    The density, with respect to Lebesgue measure on the free cells, is the integral of
    the noise density over the shifts. Row shifts integrate out exactly; column shifts
    by a method that is chosen per connected component of the mask: see
    :func:`~pyro_permutations.shift_integral.log_shift_integral`, and
    :meth:`log_prob_error` for how exact it is.

    Args:
        logits: Scores X of shape ``(*batch, n, m)``. Entries of ``-inf`` forbid pairs.
        mask: Allowed pairs, bool, of shape ``(*batch, n, m)``, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`. Its batch
            broadcasts with that of the logits.
        unmatched: Scores of unmatched rows and columns. What may stay unmatched has no
            shift: Z is then the noisy score of a pair less those of its two items.
        density_samples: Importance samples in place of the series, at least 2048,
            drawn once from a generator of their own. They help far out in the tails;
            near draws of the distribution itself it takes ten thousand to do as well.

    Raises:
        TypeError: If logits are not a tensor.
        ValueError: If logits are NaN or ``+inf``, or have more rows than columns and
            nothing is said of unmatched ones; if the mask has another shape or type,
            or if it has no matching; if ``density_samples`` is not an integer of at
            least zero.

    Example:
        >>> d = GumbelContrasts(torch.zeros(3, 3))
        >>> Z = d.rsample()
        >>> Z.shape, Z[-1]
        (torch.Size([3, 3]), tensor([0., 0., 0.]))
        >>> d.log_prob(Z).shape
        torch.Size([])
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {"logits": independent(real, 2)}
    has_rsample = True
    _validate_args: bool

    def __init__(
        self,
        logits: Tensor,  # (*batch, n, m)
        *,
        mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m) bool
        unmatched: Unmatched | None = None,  # (*batch, n), (*batch, m)
        density_samples: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        validate = self._validate_args if validate_args is None else validate_args
        logits, self.graph = scores_on_graph(logits, mask, unmatched, validate)
        event_shape = logits.shape[-2:]
        batch_shape = torch.broadcast_shapes(logits.shape[:-2], self.graph.batch_shape)
        self.logits = logits.expand(batch_shape + event_shape)
        if not isinstance(density_samples, int) or density_samples < 0:
            raise ValueError(
                "density_samples must be an integer of at least zero, got "
                f"{density_samples!r}. Pass 0 for the density without sampling."
            )
        self.density_samples = density_samples
        # Checked above, in one pass, and for empty batches too.
        super().__init__(batch_shape, event_shape, validate_args=False)
        self._validate_args = validate

    @dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> contrasts:
        """Zero on the spanning forest of the mask, and on forbidden cells."""
        return contrasts(None if self.graph.is_full else self.graph)

    def expand(
        self, batch_shape: Sequence[int], _instance: GumbelContrasts | None = None
    ) -> GumbelContrasts:
        """Return the distribution with a larger batch, on the same mask."""
        new: GumbelContrasts = self._get_checked_instance(GumbelContrasts, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new.graph, new.density_samples = self.graph, self.density_samples
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        super(GumbelContrasts, new).__init__(
            batch_shape, self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw with a gradient to the logits, shape ``(*sample, *batch, n, m)``."""
        scores = self._noisy_scores(torch.Size(sample_shape))
        return self.graph.contrasts(scores).to(self.logits.dtype)

    def _noisy_scores(self, sample_shape: torch.Size) -> Tensor:
        logits = self.logits.expand(self._extended_shape(sample_shape))
        # Half precision has too few numbers for noise, and rare draws are exactly zero.
        wide = torch.promote_types(logits.dtype, torch.float32)
        kind = torch.finfo(wide)
        noise = torch.empty_like(logits, dtype=wide).exponential_()
        return logits - noise.clamp(kind.tiny, kind.max).log()

    def log_prob(
        self,
        value: Tensor,  # (*sample, *batch, n, m)
    ) -> Tensor:  # (*sample, *batch)
        """Log density with respect to Lebesgue measure on the free cells."""
        if self._validate_args:
            self._validate_sample(value)
        log_density, _ = self._log_density(value)
        return log_density.to(torch.promote_types(value.dtype, self.logits.dtype))

    def log_prob_error(
        self,
        value: Tensor,  # (*sample, *batch, n, m)
    ) -> Tensor:  # (*sample, *batch)
        """Estimate the absolute error of :meth:`log_prob`, in nats.

        It is about .01 at draws of the distribution itself, and can be several nats far
        out in its tails: there, ask for ``density_samples``.
        """
        _, error = self._log_density(value)
        return error.to(torch.promote_types(value.dtype, self.logits.dtype))

    def _log_density(self, value: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits.double() - value.double()
        return log_shift_integral(scores, self.graph, samples=self.density_samples)

    def hard_frequencies(
        self, num_samples: int
    ) -> tuple[Tensor, Tensor]:  # (*batch, n, m + 1), (*batch, n, m + 1)
        """How often the best matching of noisy scores has each pair; standard errors.

        The last column is how often a row is unmatched.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        total: Tensor | float = 0.0
        for start in range(0, num_samples, 64):  # to keep the memory small
            size = torch.Size((min(64, num_samples - start),))
            scores = self._noisy_scores(size).detach()
            total = total + matching(scores, mask=self.graph).sum(0)
        pairs = torch.as_tensor(total / num_samples).to(self.logits.dtype)
        alone = (1 - pairs.sum(-1, keepdim=True)).clamp_min(0)
        frequency = torch.cat([pairs, alone], -1)
        error = frequency_error(frequency, num_samples)
        return frequency, torch.where(undecided(self.graph), error, 0.0)

    @classmethod
    def infer_shapes(  # type: ignore[override]
        cls,
        logits: Sequence[int],
        mask: Sequence[int] | None = None,
        unmatched: Sequence[Sequence[int]] | None = None,
    ) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape for given shapes of the arguments."""
        mask = logits if mask is None else mask
        scores = [tuple(shape[:-1]) for shape in unmatched or ()]
        batch_shape = torch.broadcast_shapes(
            tuple(logits[:-2]), tuple(mask[:-2]), *scores
        )
        return batch_shape, torch.Size(logits[-2:])


def scores_on_graph(
    logits: Tensor,  # (*batch, n, m)
    mask: Tensor | MatchingGraph | None,  # (*batch, n, m) bool
    unmatched: Unmatched | None,  # (*batch, n), (*batch, m)
    validate: bool,
) -> tuple[Tensor, MatchingGraph]:
    """Check logits, count them from being unmatched, and move -inf to the mask."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"logits must be a tensor, got {type(logits).__name__}: pass a tensor, "
            "torch.as_tensor(logits)."
        )
    if logits.dim() < 2 or not logits.is_floating_point():
        raise ValueError(
            "logits must be floating point, of shape (*batch, n, m), got "
            f"{logits.dtype} and {tuple(logits.shape)}."
        )
    shape = (logits.shape[-2], logits.shape[-1])
    scores, free = relative_scores(logits, unmatched)
    graph = matching_graph(mask, shape, logits.device, unmatched=free)
    try:
        torch.broadcast_shapes(scores.shape[:-2], graph.batch_shape)
    except RuntimeError:
        raise ValueError(
            f"mask has batch shape {tuple(graph.batch_shape)}, which does not "
            f"broadcast with that of logits, {tuple(logits.shape[:-2])}. Pass one mask "
            "for the whole batch or one per batch element."
        ) from None
    if holds(torch.isfinite(scores)):
        return scores, graph
    if validate and not holds(scores < torch.inf):
        raise ValueError(
            "logits must not be NaN or +inf. -inf forbids a pair; for a pair that is "
            "certain, pass a mask that allows no other in its row and column."
        )
    forbidden = scores == -torch.inf
    if isinstance(mask, MatchingGraph) and mask.has_slack:
        free = mask.free_rows, mask.free_columns
    allowed = graph.allowed & ~forbidden
    try:
        graph = matching_graph(allowed, shape, logits.device, unmatched=free)
    except ValueError as error:
        raise ValueError(
            f"logits are -inf for forbidden pairs, and this {error}"
        ) from None
    return torch.where(forbidden, 0, scores), graph
