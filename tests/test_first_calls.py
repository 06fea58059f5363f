# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What is kept between calls is right wherever it was first asked for.

Tables and lists that depend on the size or the mask alone are made once. If that is
under a transform of torch.func or in inference mode, they are to be of use outside of
it: each test begins without any, as a new process does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from pyro_permutations import (
    GibbsMatching,
    UniformPermutation,
    calibrated_entropy,
    log_permanent,
)
from pyro_permutations.distributions.uniform_permutation import _log_count
from pyro_permutations.fractional_entropy import _kept_fraction
from pyro_permutations.matching_blocks import _blocks
from pyro_permutations.subset_recursion import _kept_layer, _numbering

CACHES = (_kept_fraction, _blocks, _kept_layer, _numbering, _log_count)
OFF_DIAGONAL = ~torch.eye(5, dtype=torch.bool)
CASES = {
    "full": {},
    "masked": {"mask": OFF_DIAGONAL},
    "partial": {"unmatched": (0.0, 0.0)},
}


def inference(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(X: Tensor) -> Tensor:
        with torch.inference_mode():
            return f(X)

    return run


WAYS = {
    "grad": lambda f: grad(f),
    "vmap": lambda f: lambda X: vmap(f)(X[None]),
    "Hessian": lambda f: jacrev(grad(f)),
    "inference": inference,
}


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> None:
    for cache in CACHES:
        cache.cache_clear()


def of(name: str, X: Tensor) -> GibbsMatching:
    return GibbsMatching(X, validate_args=False, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_marginals_are_the_first_call(name: str) -> None:
    X = torch.randn(5, 5)
    first = of(name, X).marginals()[0]
    torch.testing.assert_close(of(name, X).marginals()[0], first)
    torch.testing.assert_close(
        grad(lambda x: of(name, x).log_partition)(X), first[:, :5]
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_transform_is_the_first_call(name: str, way: str) -> None:
    X, B = torch.randn(5, 5), torch.full((5, 5), 0.2)
    if name != "full":
        B = torch.where(OFF_DIAGONAL, 0.25, 0.0) * (1 if name == "masked" else 0.8)
    graph = of(name, X).graph

    def both(x: Tensor) -> Tensor:
        entropy = calibrated_entropy(B + 0 * x, mask=graph)
        return of(name, x).log_partition + entropy

    WAYS[way](both)(X)
    probability, _ = of(name, X).marginals()
    exact = of(name, X).entropy()
    law = of(name, X)
    P = law.enumerate_support()
    weights = law.log_prob(P).exp()
    torch.testing.assert_close((weights[:, None, None] * P).sum(0), probability[:, :5])
    torch.testing.assert_close(torch.special.entr(weights).sum(), exact)


@pytest.mark.parametrize("way", WAYS)
def test_counts_of_a_mask_are_those_outside(way: str) -> None:
    def count(X: Tensor) -> Tensor:
        d = UniformPermutation(5, mask=OFF_DIAGONAL, validate_args=False)
        return d.log_partition + 0 * X.sum()

    X = torch.zeros(5, 5)
    WAYS[way](count)(X)
    expected = torch.tensor(44.0).log()  # permutations of five that move all
    torch.testing.assert_close(count(X), expected)
    torch.testing.assert_close(log_permanent(X, mask=OFF_DIAGONAL), expected)
