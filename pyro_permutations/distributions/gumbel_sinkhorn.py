# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Gumbel-Sinkhorn distribution, and its child with hard samples."""

from __future__ import annotations

__all__ = ["GumbelSinkhorn", "GumbelSinkhornStraightThrough"]

from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor
from torch.distributions.constraints import (
    Constraint,
    dependent_property,
    independent,
    positive,
    real,
)
from torch.distributions.transforms import Transform

from pyro_permutations.distributions.gumbel_contrasts import (
    GumbelContrasts,
    scores_on_graph,
)
from pyro_permutations.harden_transform import HardenTransform
from pyro_permutations.matching import matching
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.ranking_transform import is_ranking_sample
from pyro_permutations.transforms import (
    BirkhoffTransform,
    as_temperature,
    log_cells,
)
from pyro_permutations.unmatched_scores import Unmatched

_NO_MOMENTS = "the {} has no closed form. Estimate it from k samples: {}."


class GumbelSinkhorn(TransformedDistribution):
    r"""A relaxed distribution over permutations: Sinkhorn of scores with Gumbel noise.

    .. math:: P = S\big((X + \epsilon) / \tau\big), \qquad
        \epsilon_{ij} \sim \text{Gumbel}(0, 1)

    P is doubly stochastic, and nearly a permutation matrix at low temperature; ``P[i,
    j]`` near one says that row item i is matched to column item j. As :math:`\tau \to
    0` it tends to the best matching of the noisy scores, M(X + noise).

    With fewer rows than columns every row is matched, and columns may stay over: they
    sum to less than one. With ``unmatched`` rows and columns may stay unmatched, for a
    score of their own; it counts like the scores of pairs, but has no noise. What a row
    or column lacks to one is the probability that it is unmatched:
    :func:`~pyro_permutations.slack_of` reads it off a sample. A batch of problems of
    different sizes is padded: rows and columns of which no pair is allowed are left
    out, exactly.

    The density is with respect to Lebesgue measure on the free cells: for a full matrix
    the upper left (n - 1) x (n - 1) block, with a mask the allowed cells off a spanning
    forest; any choice of free cells gives the same density. With E the allowed cells
    and :math:`M = X - \tau \log P`, it is

    .. math:: \log p(P) = \dim \log \tau - \sum_E \log P + \log T(P) + \log I(M)

    with T the weighted number of spanning forests (exact, by the matrix-tree theorem)
    and I the integral of the noise density over row and column shifts, see
    :class:`GumbelContrasts`. Only I is approximate: :meth:`log_prob_error`. Where
    something may stay unmatched, the slack says what the shifts are, I is a product of
    Gamma integrals, and the density is exact. With :math:`r_i` and :math:`s_j` the
    slack of rows and columns it is then, if all may stay unmatched, of all n m cells

    .. math:: \log p(P) = n m \log \tau - \sum_{ij} \log P_{ij} - \sum_i \log r_i
        - \sum_j \log s_j + \log \det (I - P P^\top)
        + \sum_{ij} \log g \big(\tau \log \tfrac{P_{ij}}{r_i s_j} - X_{ij}\big)

    with g the Gumbel density and X less the scores of being unmatched.

    A sample carries its log, so ``log_prob`` of the distribution's own samples, and of
    a guide's sample in a model, is right where entries have underflowed. Copies of a
    sample lose it: see :func:`~pyro_permutations.transforms.log_of`.

    Args:
        logits: Scores X of shape ``(*batch, n, m)``: log weights, before the division
            by the temperature. Entries of ``-inf`` forbid pairs. With ``unmatched`` the
            attribute ``logits`` has them less the scores of being unmatched.
        temperature: Positive; a scalar, or of a shape that broadcasts with the batch:
            one of shape ``(3, 3)`` with a single 3 x 3 matrix is nine matchings.
        mask: Allowed pairs, bool, of shape ``(*batch, n, m)``, or a
            :class:`~pyro_permutations.matching_graph.MatchingGraph`. Forbidden pairs
            are exactly zero in every sample, and so is their gradient. A known pair is
            one that is alone in its row and column (and both have to be matched).
        unmatched: Scores of unmatched rows and of unmatched columns, numbers or tensors
            of shape ``(*batch, n)`` and ``(*batch, m)``; ``-inf`` for what has to be
            matched. None: all that can be is matched.
        density_samples: Importance samples in place of the series, at least 2048,
            drawn once from a generator of their own. They help far out in the tails;
            near draws of the distribution itself it takes ten thousand to do as well.

    Raises:
        TypeError: If logits are not a tensor.
        ValueError: If logits are NaN or ``+inf``, or have more rows than columns and
            nothing is said of unmatched ones; if the temperature is not positive and
            finite, or does not broadcast; if the mask has another shape or type, or if
            it has no matching; if ``density_samples`` is not an integer of at least
            zero. By ``log_prob``, if row or column sums of the value are not one, or
            with slack at most one, within 1e-5 (half 1e-3, bfloat16 8e-3), or an entry
            is negative, or not zero where it is forbidden.
        NotImplementedError: By ``log_prob``, if a row and a column that both have to be
            matched are a pair of a component in which others may stay unmatched.

    References:
        Mena, Belanger, Linderman and Snoek, "Learning latent permutations with
        Gumbel-Sinkhorn networks" (2018), https://arxiv.org/abs/1802.08665.

    Example:
        >>> d = GumbelSinkhorn(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), 0.1)
        >>> P = d.rsample()
        >>> P.sum(-1), P.sum(-2)
        (tensor([1., 1.]), tensor([1., 1.]))
        >>> d.mode
        tensor([[1., 0.],
                [0., 1.]])
        >>> x = torch.tensor([[0.7, 0.3], [0.3, 0.7]])
        >>> GumbelSinkhorn(torch.tensor([[0.3, -0.5], [0.2, 0.9]]), 1.0).log_prob(x)
        tensor(0.4583)
        >>> partial = GumbelSinkhorn(x[:, :1], 0.1, unmatched=(0.0, 0.0))
        >>> partial.rsample().shape, partial.support.check(torch.zeros(2, 1))
        (torch.Size([2, 1]), tensor(True))
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {
        "logits": independent(real, 2),
        "temperature": positive,
    }
    has_rsample = True
    _validate_args: bool

    def __init__(
        self,
        logits: Tensor,  # (*batch, n, m)
        temperature: Tensor | float,  # () or (*batch)
        *,
        mask: Tensor | MatchingGraph | None = None,  # (*batch, n, m) bool
        unmatched: Unmatched | None = None,  # (*batch, n), (*batch, m)
        density_samples: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        validate = self._validate_args if validate_args is None else validate_args
        scores, self.graph = scores_on_graph(logits, mask, unmatched, validate)
        self.temperature = as_temperature(temperature, logits.dtype, logits.device)
        batch_shape = torch.broadcast_shapes(scores.shape[:-2], self.graph.batch_shape)
        try:
            batch_shape = torch.broadcast_shapes(batch_shape, self.temperature.shape)
        except RuntimeError:
            raise ValueError(
                f"temperature has shape {tuple(self.temperature.shape)}, which does "
                f"not broadcast with the batch shape {tuple(batch_shape)} of logits "
                "and mask. Pass a scalar or one temperature per batch element."
            ) from None
        self.logits = scores.expand(batch_shape + scores.shape[-2:])
        self.density_samples = density_samples
        base = GumbelContrasts(
            self.logits,
            mask=self.graph,
            density_samples=density_samples,
            validate_args=validate_args,
        )
        # Checked above, in one pass, and for empty batches too.
        super().__init__(base, self._make_transforms(), validate_args=False)
        self._validate_args = validate

    def _make_transforms(self) -> list[Transform]:
        mask = None if self.graph.is_full else self.graph
        return [BirkhoffTransform(self.temperature, mask)]

    @dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> Constraint:
        """Doubly stochastic matrices on the cells that the mask leaves."""
        codomain: Constraint = self.transforms[-1].codomain
        return codomain

    @property
    def mode(self) -> Tensor:  # (*batch, n, m)
        """The best matching of the logits, a permutation matrix or a partial one.

        It is the most likely hard matching of the noise-free scores, not the maximum
        of the density, which has none inside the polytope.
        """
        return matching(self.logits, mask=self.graph)

    def marginals(
        self, num_samples: int = 1000
    ) -> tuple[Tensor, Tensor]:  # (*batch, n, m + 1), (*batch, n, m + 1)
        """How often each pair is matched in hard draws, and the standard errors.

        The last column is how often a row is unmatched, so that rows sum to one. Hard
        draws are the best matchings of noisy scores, the limit of low temperature; they
        are not draws of the probabilities exp<X, P>.
        """
        base: GumbelContrasts = self.base_dist
        return base.hard_frequencies(num_samples)

    @property
    def mean(self) -> Tensor:
        """Not known in closed form."""
        raise NotImplementedError(_NO_MOMENTS.format("mean", "d.rsample((k,)).mean(0)"))

    @property
    def variance(self) -> Tensor:
        """Not known in closed form."""
        raise NotImplementedError(
            _NO_MOMENTS.format("variance", "d.rsample((k,)).var(0)")
        )

    def entropy(self) -> Tensor:
        """Not known in closed form."""
        raise NotImplementedError(
            _NO_MOMENTS.format("entropy", "-d.log_prob(d.rsample((k,))).mean(0)")
            + " For a bound on a divergence, see noise_kl(q, p)."
        )

    def expand(
        self, batch_shape: Sequence[int], _instance: GumbelSinkhorn | None = None
    ) -> GumbelSinkhorn:
        """Return the distribution with a larger batch, on the same mask."""
        new: GumbelSinkhorn = self._get_checked_instance(GumbelSinkhorn, _instance)
        batch_shape = torch.Size(batch_shape)
        new.graph, new.density_samples = self.graph, self.density_samples
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        new.temperature = self.temperature
        if self.temperature.dim():
            new.temperature = self.temperature.expand(batch_shape)
        super().expand(batch_shape, _instance=new)
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw with a gradient to the logits, shape ``(*sample, *batch, n, m)``."""
        # The noisy scores have the same image as their contrasts, and lie nearer to it:
        # taking shifts out along the paths of a sparse mask lets them pile up.
        noisy = self.base_dist._noisy_scores(torch.Size(sample_shape))
        value: Tensor = noisy.to(self.logits.dtype)
        for transform in self.transforms:
            value = transform(value)
        return value

    def log_prob(
        self,
        value: Tensor,  # (*sample, *batch, n, m)
    ) -> Tensor:  # (*sample, *batch)
        """Log density with respect to Lebesgue measure on the free cells."""
        if is_ranking_sample(value):
            raise ValueError(
                "value is a soft ranking of RelaxedPlackettLuce, whose density has "
                "n - 1 dimensions. Use RelaxedPlackettLuce in the model as in the "
                "guide, RelaxedPlackettLuce(torch.zeros(n), temperature) for a flat "
                "prior."
            )
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
        # As the base and the transforms do it, but in float64 from end to end: two
        # terms that nearly cancel can be in the tens of thousands.
        birkhoff = self.transforms[0]
        log_P = log_cells(value, self.graph)
        scores = birkhoff.scores(log_P, self.graph)
        log_integral, error = self.base_dist._log_density(scores)
        return log_integral - birkhoff.log_volume(log_P, self.graph), error

    @classmethod
    def infer_shapes(
        cls,
        logits: Sequence[int],
        temperature: Sequence[int] = (),
        mask: Sequence[int] | None = None,
        unmatched: Sequence[Sequence[int]] | None = None,
    ) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape for given shapes of the arguments."""
        batch_shape, event_shape = GumbelContrasts.infer_shapes(logits, mask, unmatched)
        return torch.broadcast_shapes(batch_shape, tuple(temperature)), event_shape


class GumbelSinkhornStraightThrough(GumbelSinkhorn):
    """:class:`GumbelSinkhorn` with hard samples and the gradient of the relaxed ones.

    A value is exactly a permutation matrix, or a partial one where items may stay
    unmatched: the best matching of the noisy scores; its
    gradient is that of the relaxed matrix that it was made from, whose log it carries.
    ``log_prob`` is the relaxed density at that matrix, so it can stand in a guide and
    a model as :class:`GumbelSinkhorn` can; it is not a probability of the permutation.
    An autoguide needs ``TransformReparam`` on the site: there is no bijection from
    unconstrained space to hard values.
    Arguments are those of :class:`GumbelSinkhorn`.

    References:
        Bengio, Léonard and Courville, "Estimating or propagating gradients through
        stochastic neurons" (2013), https://arxiv.org/abs/1308.3432.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]], requires_grad=True)
        >>> P = GumbelSinkhornStraightThrough(logits, 1.0).rsample()
        >>> P.detach()
        tensor([[1., 0.],
                [0., 1.]])
        >>> torch.autograd.grad(P[0, 0], logits)[0].abs().max() > 0
        tensor(True)
    """

    def _make_transforms(self) -> list[Transform]:
        mask = None if self.graph.is_full else self.graph
        return [*super()._make_transforms(), HardenTransform(mask)]
