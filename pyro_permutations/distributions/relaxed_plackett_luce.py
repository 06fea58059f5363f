# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The relaxed Plackett-Luce distribution: soft rankings with a density."""

from __future__ import annotations

__all__ = ["RelaxedPlackettLuce"]

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

from pyro_permutations.contrasts_transform import ContrastsTransform
from pyro_permutations.distributions.gumbel_contrasts import GumbelContrasts
from pyro_permutations.distributions.plackett_luce import (
    PlackettLuce,
    check_ranking_arguments,
)
from pyro_permutations.matching_graph import matching_graph
from pyro_permutations.outside import holds
from pyro_permutations.ranking_transform import RankingTransform
from pyro_permutations.transforms import as_temperature

_EULER = 0.5772156649015329
_NO_MOMENTS = "the {} has no closed form. Estimate it from k samples: {}."


class RelaxedPlackettLuce(TransformedDistribution):
    r"""Soft rankings: the entropic sort of logits with Gumbel noise.

    .. math:: P = S\big(c \, (x + \epsilon)^\top / \tau\big), \qquad
        \epsilon_i \sim \text{Gumbel}(0, 1), \qquad c = (k, \dots, 1)

    with S the Sinkhorn operator: P is doubly stochastic, and ``P[r, i]`` near one says
    that rank r is held by item i. The best ranking of the noisy logits, the limit
    :math:`\tau \to 0`, is exactly a draw of :class:`PlackettLuce`.

    P has n - 1 coordinates, the differences y of the scores of which it is the soft
    ranking (see :class:`~pyro_permutations.ranking_transform.RankingTransform`). The
    density is with respect to Lebesgue measure on those, and exact. With
    :math:`m = x - \tau y` (:math:`y_n = 0`) it is

    .. math:: \log p(P) = (n - 1) \log \tau + \log \Gamma(n) + \sum_i m_i
        - n \log \sum_i e^{m_i}

    as the integral of the noise density over the shift is a Gamma integral; the same
    numbers y have this density in the Concrete distribution.

    For a guide of this class the model's prior has to be of it too, with as many items
    and ranks, at any temperature: ``RelaxedPlackettLuce(torch.zeros(n), temperature)``
    relaxes the uniform one. Then every ELBO is right that takes densities
    (``Trace_ELBO``, ``TraceMeanField_ELBO``, ``RenyiELBO``), and is that of the relaxed
    model. A matrix of :class:`GumbelSinkhorn` has more dimensions, and its density is
    with respect to another measure: ratios of the two mean nothing. ``log_prob``
    refuses values that are no soft ranking.

    Args:
        logits: Log weights x of shape ``(*batch, n)``, finite.
        temperature: Positive; a scalar, or of a shape that broadcasts with the batch.
        top: How many ranks a value has, 1 to n; all n if not given. With fewer, columns
            sum to less than one.

    Raises:
        TypeError: If logits are not a tensor.
        ValueError: If logits are not finite, if the temperature is not positive and
            finite or does not broadcast, or if ``top`` is not an integer of 1 to n. By
            ``log_prob``, if the value is not a soft ranking.

    References:
        Maddison, Mnih and Teh, "The Concrete distribution" (2017),
        https://arxiv.org/abs/1611.00712. Cuturi, Teboul and Vert, "Differentiable ranks
        and sorting using optimal transport" (2019), https://arxiv.org/abs/1905.11885.

    Example:
        >>> logits = torch.tensor([0.0, 9.0, -9.0], requires_grad=True)
        >>> P = RelaxedPlackettLuce(logits, 0.1).rsample()
        >>> P.detach().round()
        tensor([[0., 1., 0.],
                [1., 0., 0.],
                [0., 0., 1.]])
        >>> RelaxedPlackettLuce(logits, 0.1).log_prob(P).isfinite()
        tensor(True)
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {
        "logits": independent(real, 1),
        "temperature": positive,
    }
    has_rsample = True
    _validate_args: bool

    def __init__(
        self,
        logits: Tensor,  # (*batch, n)
        temperature: Tensor | float,  # () or (*batch)
        top: int | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        validate = self._validate_args if validate_args is None else validate_args
        self.top = check_ranking_arguments(logits, top, validate)
        if validate and not holds(logits > -torch.inf):
            raise ValueError(
                "logits must be finite, got -inf: a relaxed ranking is of all items. "
                "Leave out those that are not there."
            )
        self.temperature = as_temperature(temperature, logits.dtype, logits.device)
        try:
            batch_shape = torch.broadcast_shapes(
                logits.shape[:-1], self.temperature.shape
            )
        except RuntimeError:
            raise ValueError(
                f"temperature has shape {tuple(self.temperature.shape)}, which does "
                f"not broadcast with the batch shape {tuple(logits.shape[:-1])} of "
                "logits. Pass a scalar or one temperature per batch element."
            ) from None
        n = logits.shape[-1]
        self.logits = logits.expand((*batch_shape, n))
        # The scores are one row of contrasts: each less that of the last item.
        base = GumbelContrasts(self.logits[..., None, :], validate_args=validate_args)
        one_row = ContrastsTransform(matching_graph(None, (1, n), logits.device))
        ranks = None if self.top == n else self.top
        transforms = [one_row.inv, RankingTransform(self.temperature, ranks)]
        super().__init__(base, transforms, validate_args=False)
        self._validate_args = validate

    @dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> Constraint:
        """Doubly stochastic matrices that are soft rankings."""
        codomain: Constraint = self.transforms[-1].codomain
        return codomain

    @property
    def mode(self) -> Tensor:  # (*batch, k, n)
        """The ranking by falling logit, a hard one; not the maximum of the density."""
        return self._hard.mode

    def marginals(
        self, num_samples: int = 1000
    ) -> tuple[Tensor, Tensor]:  # (*batch, k, n + 1), (*batch, k, n + 1)
        """Those of the hard rankings: see :meth:`PlackettLuce.marginals`."""
        return self._hard.marginals(num_samples)

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

    def entropy(self) -> Tensor:  # (*batch,)
        r"""The differential entropy in the coordinates, exact and free of the logits.

        .. math:: n (\psi(n) + \gamma) - \log \Gamma(n) - (n - 1) \log \tau

        since in a draw :math:`e^{m_i}` are exponential variables, and their sum is a
        Gamma variable.
        """
        n = torch.tensor(self.logits.shape[-1], dtype=torch.float64)
        entropy = n * (torch.digamma(n) + _EULER) - torch.lgamma(n)
        scale = (n - 1) * self.temperature.double().log()
        return (entropy - scale).to(self.logits.dtype).expand(self.batch_shape)

    def expand(
        self, batch_shape: Sequence[int], _instance: RelaxedPlackettLuce | None = None
    ) -> RelaxedPlackettLuce:
        """Return the distribution with a larger batch."""
        new: RelaxedPlackettLuce = self._get_checked_instance(
            RelaxedPlackettLuce, _instance
        )
        batch_shape = torch.Size(batch_shape)
        new.top = self.top
        new.logits = self.logits.expand(batch_shape + self.logits.shape[-1:])
        new.temperature = self.temperature
        if self.temperature.dim():
            new.temperature = self.temperature.expand(batch_shape)
        super().expand(batch_shape, _instance=new)
        return new

    @classmethod
    def infer_shapes(
        cls,
        logits: Sequence[int],
        temperature: Sequence[int] = (),
        top: int | None = None,
    ) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape for given shapes of the arguments."""
        batch_shape, event_shape = PlackettLuce.infer_shapes(logits, top)
        return torch.broadcast_shapes(batch_shape, tuple(temperature)), event_shape

    @property
    def _hard(self) -> PlackettLuce:
        return PlackettLuce(self.logits, self.top, validate_args=False)
