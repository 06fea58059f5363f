# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions over permutations and their relaxations."""

from pyro_permutations.distributions.gibbs_matching import GibbsMatching
from pyro_permutations.distributions.gumbel_contrasts import GumbelContrasts
from pyro_permutations.distributions.gumbel_matching import GumbelMatching
from pyro_permutations.distributions.gumbel_sinkhorn import (
    GumbelSinkhorn,
    GumbelSinkhornStraightThrough,
)
from pyro_permutations.distributions.noise_kl import noise_kl
from pyro_permutations.distributions.plackett_luce import PlackettLuce
from pyro_permutations.distributions.plackett_luce_indices import PlackettLuceIndices
from pyro_permutations.distributions.relaxed_plackett_luce import RelaxedPlackettLuce
from pyro_permutations.distributions.uniform_permutation import UniformPermutation

__all__ = [
    "GibbsMatching",
    "GumbelContrasts",
    "GumbelMatching",
    "GumbelSinkhorn",
    "GumbelSinkhornStraightThrough",
    "PlackettLuce",
    "PlackettLuceIndices",
    "RelaxedPlackettLuce",
    "UniformPermutation",
    "noise_kl",
]
