# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Inference for models with permutations."""

from pyro_permutations.infer.informed_swaps import InformedSwaps
from pyro_permutations.infer.mixing import Mixing, mixing
from pyro_permutations.infer.relax import relax

__all__ = ["InformedSwaps", "Mixing", "mixing", "relax"]
