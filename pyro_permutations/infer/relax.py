# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A discrete model as a relaxed one: its permutation priors become Gumbel-Sinkhorn."""

from __future__ import annotations

__all__ = ["relax"]

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_permutations.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_permutations.infer.permutation_sites import permutation_prior, with_prior
from pyro_permutations.outside import holds


def relax(
    model: Callable[..., Any],
    temperature: Tensor | float,  # () or the batch shape of the sites
) -> Callable[..., Any]:
    r"""Return the model with a relaxed prior in place of each discrete permutation.

    .. math:: P \sim \text{GibbsMatching}(X) \quad \text{becomes} \quad
        P \sim \text{GumbelSinkhorn}(X, \tau)

    with the same scores, mask, and rule of what may stay unmatched. This covers
    :class:`~pyro_permutations.GibbsMatching` and its child ``UniformPermutation``, in
    plates, and under ``to_event``, ``mask`` and ``expand``. All else is left as it is,
    and so are permutations that are observed.

    Write the discrete model once. Fit its relaxed form by SVI, with a
    :class:`~pyro_permutations.GumbelSinkhorn` guide; run ``InformedSwaps`` and
    ``Predictive`` on the model itself. The relaxed prior is another model: the best
    match comes out right, but probabilities come out too cautious however low the
    temperature (with two items an exact .982 becomes .845).

    Args:
        model: A Pyro model, a callable.
        temperature: Positive; of the prior of every such site. To anneal it, relax
            anew: ``lambda x, tau: relax(model, tau)(x)`` is a model that takes it as
            an argument.

    Raises:
        ValueError: If the temperature is not positive. When the model runs, if a site
            that was relaxed is observed as a permutation after that: condition first,
            ``relax(condition(model, data), temperature)``.

    Example:
        >>> import pyro
        >>> from pyro_permutations import UniformPermutation
        >>> def model():
        ...     return pyro.sample("P", UniformPermutation(3))
        >>> relax(model, 0.5)().sum(-1)
        tensor([1., 1., 1.])
    """
    if not holds(torch.as_tensor(temperature) > 0):
        raise ValueError(f"temperature must be positive, got {temperature}.")
    relaxed: Callable[..., Any] = _Relax(temperature)(model)
    return relaxed


class _Relax(Messenger):
    def __init__(self, temperature: Tensor | float) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        # Later than this hook is too late: the value is drawn from the distribution
        # that stands here when the handlers have seen the site.
        prior = permutation_prior(msg["fn"])
        if prior is None or msg["is_observed"]:
            return
        relaxed = GumbelSinkhorn(prior.logits, self.temperature, mask=prior.graph)
        msg["fn"] = with_prior(msg["fn"], relaxed)
        msg["infer"] = {**msg["infer"], "_relaxed_from": prior}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        prior = msg["infer"].get("_relaxed_from")
        if prior is None or not msg["is_observed"]:
            return
        if holds(prior.support.check(msg["value"])):
            raise ValueError(
                f"site {msg['name']!r} was relaxed before it was observed as a "
                "permutation. Condition first, relax(condition(model, data), "
                "temperature): then it stays discrete."
            )
