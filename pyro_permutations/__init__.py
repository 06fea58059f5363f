# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions over permutations and matchings for Pyro."""

from pyro_permutations import metrics
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
    noise_kl,
)
from pyro_permutations.link_count import link_count_prior
from pyro_permutations.matching import matching, to_indices, to_matrix
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.nn import SinkhornNetwork
from pyro_permutations.restore import restore
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
    "SinkhornNetwork",
    "SinkhornTransform",
    "contrasts",
    "doubly_stochastic",
    "link_count_prior",
    "log_of",
    "log_sinkhorn",
    "matching",
    "matching_graph",
    "metrics",
    "noise_kl",
    "permutation_matrix",
    "restore",
    "sinkhorn",
    "slack_of",
    "to_indices",
    "to_matrix",
]
