# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""One state for every test: empty parameter store, seed 0, validation on, float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_permutations as pp

pytest.register_assert_rewrite("distributions.contract", "oracles")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Clear what Pyro keeps between runs, and put the default dtype back after."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace: dict[str, Any]) -> None:
    """Names that an example may use without an import."""
    doctest_namespace.update(torch=torch, pyro=pyro, dist=dist, pp=pp)
