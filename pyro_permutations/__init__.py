# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions over permutations and matchings for Pyro."""

from pyro_permutations.carried_log import log_of, slack_of
from pyro_permutations.constraints import (
    contrasts,
    doubly_stochastic,
    permutation_matrix,
)
from pyro_permutations.distributions import (
    GumbelContrasts,
    GumbelSinkhorn,
    GumbelSinkhornStraightThrough,
    PlackettLuce,
    PlackettLuceIndices,
    RelaxedPlackettLuce,
    noise_kl,
)
from pyro_permutations.link_count import link_count_prior
from pyro_permutations.matching import matching, to_indices, to_matrix
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.ranking_transform import RankingTransform, soft_ranking
from pyro_permutations.sinkhorn import log_sinkhorn, sinkhorn
from pyro_permutations.transforms import (
    BirkhoffTransform,
    ContrastsTransform,
    SinkhornTransform,
)
from pyro_permutations.warnings import ConvergenceWarning, LostLogWarning

__version__ = "0.1.0"

__all__ = [
    "BirkhoffTransform",
    "ContrastsTransform",
    "ConvergenceWarning",
    "GumbelContrasts",
    "GumbelSinkhorn",
    "GumbelSinkhornStraightThrough",
    "LostLogWarning",
    "MatchingGraph",
    "PlackettLuce",
    "PlackettLuceIndices",
    "RankingTransform",
    "RelaxedPlackettLuce",
    "SinkhornTransform",
    "contrasts",
    "doubly_stochastic",
    "link_count_prior",
    "log_of",
    "log_sinkhorn",
    "matching",
    "matching_graph",
    "noise_kl",
    "permutation_matrix",
    "sinkhorn",
    "slack_of",
    "soft_ranking",
    "to_indices",
    "to_matrix",
]
