# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions over permutations and matchings for Pyro."""

from pyro_permutations import metrics
from pyro_permutations.birkhoff import birkhoff_decomposition
from pyro_permutations.carried_log import log_of, slack_of
from pyro_permutations.constraints import (
    contrasts,
    doubly_stochastic,
    permutation_matrix,
)
from pyro_permutations.contrasts_transform import ContrastsTransform
from pyro_permutations.distributions import (
    GibbsMatching,
    GumbelContrasts,
    GumbelMatching,
    GumbelSinkhorn,
    GumbelSinkhornStraightThrough,
    PlackettLuce,
    PlackettLuceIndices,
    RelaxedPlackettLuce,
    UniformPermutation,
    noise_kl,
)
from pyro_permutations.infer import (
    DiscreteKL_ELBO,
    InformedSwaps,
    MatchingDraws,
    mixing,
    posterior_by_enumeration,
    posterior_from_guide,
    posterior_from_mcmc,
    posterior_of,
    relax,
)
from pyro_permutations.link_count import link_count_prior
from pyro_permutations.matching import matching, to_indices, to_matrix
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.nn import SinkhornNetwork
from pyro_permutations.permanents import (
    bethe_log_permanent,
    calibrated_entropy,
    calibrated_log_permanent,
    log_permanent,
    sinkhorn_log_permanent,
)
from pyro_permutations.plot import plot_marginals
from pyro_permutations.posterior import MatchingPosterior
from pyro_permutations.ranking_transform import RankingTransform, soft_ranking
from pyro_permutations.restore import restore
from pyro_permutations.sinkhorn import log_sinkhorn, sinkhorn
from pyro_permutations.transforms import BirkhoffTransform, SinkhornTransform
from pyro_permutations.warnings import ConvergenceWarning, LostLogWarning

__version__ = "0.1.0"

__all__ = [
    "BirkhoffTransform",
    "ContrastsTransform",
    "ConvergenceWarning",
    "DiscreteKL_ELBO",
    "GibbsMatching",
    "GumbelContrasts",
    "GumbelMatching",
    "GumbelSinkhorn",
    "GumbelSinkhornStraightThrough",
    "InformedSwaps",
    "LostLogWarning",
    "MatchingDraws",
    "MatchingGraph",
    "MatchingPosterior",
    "PlackettLuce",
    "PlackettLuceIndices",
    "RankingTransform",
    "RelaxedPlackettLuce",
    "SinkhornNetwork",
    "SinkhornTransform",
    "UniformPermutation",
    "bethe_log_permanent",
    "birkhoff_decomposition",
    "calibrated_entropy",
    "calibrated_log_permanent",
    "contrasts",
    "doubly_stochastic",
    "link_count_prior",
    "log_of",
    "log_permanent",
    "log_sinkhorn",
    "matching",
    "matching_graph",
    "metrics",
    "mixing",
    "noise_kl",
    "permutation_matrix",
    "plot_marginals",
    "posterior_by_enumeration",
    "posterior_from_guide",
    "posterior_from_mcmc",
    "posterior_of",
    "relax",
    "restore",
    "sinkhorn",
    "sinkhorn_log_permanent",
    "slack_of",
    "soft_ranking",
    "to_indices",
    "to_matrix",
]
