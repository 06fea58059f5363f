# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The same clean state before every test and every doctest."""

from __future__ import annotations

import pyro
import pytest


@pytest.fixture(autouse=True)
def _clean_state():
    """No parameters, one seed, validation on, whatever the test before has done."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)
