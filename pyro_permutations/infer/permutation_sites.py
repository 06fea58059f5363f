# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Which sample sites are discrete permutations, and their prior replaced in place."""

from __future__ import annotations

__all__ = ["innermost", "permutation_prior", "with_prior"]

from typing import Any

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)

from pyro_permutations.distributions.gibbs_matching import GibbsMatching

_WRAPPERS = (dist.Independent, MaskedDistribution, ExpandedDistribution)


def innermost(fn: Any) -> Any:
    """The distribution inside ``to_event``, ``mask`` and ``expand``."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def permutation_prior(fn: Any) -> GibbsMatching | None:
    """The discrete prior inside of those; None if it is another distribution."""
    fn = innermost(fn)
    return fn if isinstance(fn, GibbsMatching) else None


def with_prior(fn: Any, prior: TorchDistribution) -> TorchDistribution:
    """The same ``to_event``, ``mask`` and ``expand`` around another prior."""
    if not isinstance(fn, _WRAPPERS):
        return prior
    inner: Any = with_prior(fn.base_dist, prior)
    if isinstance(fn, dist.Independent):
        inner = inner.to_event(fn.reinterpreted_batch_ndims)
    elif isinstance(fn, MaskedDistribution):
        inner = inner.mask(fn._mask)
    else:
        inner = inner.expand(fn.batch_shape)
    return inner  # type: ignore[no-any-return]
