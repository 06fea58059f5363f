# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Inference for models with permutations."""

from pyro_permutations.infer.discrete_kl import DiscreteKL_ELBO

__all__ = ["DiscreteKL_ELBO"]
