# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Inference for models with permutations, and what it found."""

from pyro_permutations.infer.discrete_kl import DiscreteKL_ELBO
from pyro_permutations.infer.enumeration import posterior_by_enumeration
from pyro_permutations.infer.informed_swaps import InformedSwaps
from pyro_permutations.infer.matching_draws import MatchingDraws
from pyro_permutations.infer.mixing import mixing
from pyro_permutations.infer.posteriors import (
    posterior_from_guide,
    posterior_from_mcmc,
    posterior_of,
)
from pyro_permutations.infer.relax import relax

__all__ = [
    "DiscreteKL_ELBO",
    "InformedSwaps",
    "MatchingDraws",
    "mixing",
    "posterior_by_enumeration",
    "posterior_from_guide",
    "posterior_from_mcmc",
    "posterior_of",
    "relax",
]
