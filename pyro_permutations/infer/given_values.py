# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A model run at given values, its permutations scored without their permanents."""

from __future__ import annotations

__all__ = ["GivenValues"]

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_permutations.distributions.gibbs_matching import GibbsMatching
from pyro_permutations.infer.permutation_sites import permutation_prior, with_prior


class GivenValues(Messenger):
    """Give latent sites their values, and permutations an unnormalized prior.

    The permanent of a prior is a constant of the chain unless its scores depend on
    other values; sites for which they do are ``normalized``. ``dependent`` collects
    them where the given values require grad. ``hide`` leaves the priors of latent
    permutations out, to see how the rest of the model depends on them.
    """

    def __init__(self, normalized: set[str], *, hide: bool = False) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.normalized, self.hide = normalized, hide
        self.dependent: set[str] = set()  # sites whose prior depends on other values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, latent = msg["name"], not msg["is_observed"]
        if latent and name in self.values:
            msg["value"], msg["done"] = self.values[name], True
        prior = permutation_prior(msg["fn"])
        if prior is not None:
            if prior.logits.requires_grad:
                self.dependent.add(name)
            score = _Score(prior, name in self.normalized, self.hide and latent)
            msg["fn"] = with_prior(msg["fn"], score)

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


class _Score(TorchDistribution):
    """The log probability of a matching up to a constant, differentiable in it."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, prior: GibbsMatching, normalized: bool, hide: bool) -> None:
        self.prior, self.normalized, self.hide = prior, normalized, hide
        super().__init__(prior.batch_shape, prior.event_shape, validate_args=False)

    def log_prob(
        self,
        value: Tensor,  # (*batch, n, m)
    ) -> Tensor:  # (*batch,)
        """<X, P>, less the log permanent where that depends on other values."""
        if self.hide:
            return value.new_zeros(value.shape[:-2])
        support = self.prior.graph.support
        score = (torch.where(support, self.prior.logits, 0) * value).sum((-2, -1))
        return score - self.prior.log_partition if self.normalized else score
