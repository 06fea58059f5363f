# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Which sample sites are discrete permutations, and their prior replaced in place."""

from __future__ import annotations

__all__ = ["permutation_prior", "with_prior"]

from typing import Any

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)

from pyro_permutations.distributions.gibbs_matching import GibbsMatching

_WRAPPERS = (dist.Independent, MaskedDistribution, ExpandedDistribution)


def permutation_prior(fn: Any) -> GibbsMatching | None:
    """The discrete prior inside ``to_event``, ``mask`` and ``expand``; None if none."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn if isinstance(fn, GibbsMatching) else None


def with_prior(fn: Any, prior: TorchDistribution) -> TorchDistribution:
    """The same ``to_event``, ``mask`` and ``expand`` around another prior."""
    if isinstance(fn, dist.Independent):
        return with_prior(fn.base_dist, prior).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return with_prior(fn.base_dist, prior).mask(fn._mask)
    if isinstance(fn, ExpandedDistribution):
        return with_prior(fn.base_dist, prior).expand(fn.batch_shape)
    return prior
