# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of matchings that are a given matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_permutations import (
    GumbelSinkhorn,
    MatchingPosterior,
    birkhoff_decomposition,
    sinkhorn,
    to_matrix,
)


def mixture(perm: Tensor, weights: Tensor, columns: int) -> Tensor:
    P = to_matrix(perm, weights.dtype, columns=columns)
    return (weights[:, None, None] * P).sum(0)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("n", [1, 2, 6, 12])
def test_float32_samples_are_decomposed(n: int, temperature: float) -> None:
    """Report 41: no index error, weights of sum one, reconstruction within 1e-5."""
    logits = 2 * torch.randn(20, n, n, dtype=torch.float32)
    for P in GumbelSinkhorn(logits, temperature).sample():
        perm, weights = birkhoff_decomposition(P)
        assert weights.dtype == torch.float32
        assert (weights > 0).all()
        assert abs(float(weights.sum()) - 1) < 1e-6
        assert len(perm) <= (n - 1) ** 2 + 1 + n  # rounding may cost a few more
        assert float((mixture(perm, weights, n) - P).abs().max()) < 1e-5


def test_permutations_and_exact_mixtures_are_found() -> None:
    P = torch.eye(5)[torch.randperm(5)]
    perm, weights = birkhoff_decomposition(P)
    assert weights.tolist() == [1.0]
    assert torch.equal(to_matrix(perm[0]), P)
    uniform = torch.full((4, 4), 0.25)
    perm, weights = birkhoff_decomposition(uniform)
    assert len(perm) == 4
    torch.testing.assert_close(mixture(perm, weights, 4), uniform)


def test_tiny_entries_that_complete_no_matching_are_harmless() -> None:
    P = torch.eye(4, dtype=torch.float32)
    P[0, 1], P[2, 3], P[3, 0] = 1e-7, 3e-8, 1e-30
    perm, weights = birkhoff_decomposition(P)
    assert float((mixture(perm, weights, 4) - P).abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (5, 2)])
def test_what_sums_lack_is_unmatched(shape: tuple[int, int]) -> None:
    n, m = shape
    logits = torch.randn(n, m)
    P = GumbelSinkhorn(logits, 0.5, unmatched=(0.0, 0.0)).sample()
    perm, weights = birkhoff_decomposition(P)
    assert (perm < 0).any()
    torch.testing.assert_close(mixture(perm, weights, m), P, atol=1e-8, rtol=0)
    law = MatchingPosterior(perm, m, weights=weights, exact=True)
    torch.testing.assert_close(
        law.marginals()[0][:, -1], 1 - P.sum(-1), atol=1e-8, rtol=0
    )
    if n < m:
        every = sinkhorn(torch.randn(n, n), 1.0) @ torch.eye(n, m)
        assert (birkhoff_decomposition(every)[0] >= 0).all()


def test_low_precision_and_injections_leave_nobody_unmatched() -> None:
    """What float32 or half rounds off a sum of one is not a matching of its own."""
    for _ in range(5):
        P = GumbelSinkhorn(torch.randn(3, 5, dtype=torch.float32), 0.5).sample()
        perm, weights = birkhoff_decomposition(P)
        assert (perm >= 0).all()
        assert len(perm) <= (3 + 5 - 1) ** 2 + 1
        assert float((mixture(perm, weights, 5) - P).abs().max()) < 1e-5
    half = torch.tensor([[0.7, 0.3], [0.3, 0.7]], dtype=torch.float16)
    assert birkhoff_decomposition(half)[0].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("P", "message"),
    [
        (torch.ones(2, 2), "its largest sum 2"),
        (torch.tensor([[1.0, -0.5], [0.0, 1.0]]), "least entry is -0.5"),
        (torch.full((2, 2), torch.nan), "least entry is nan"),
        (torch.eye(2).expand(3, 2, 2), "one by one"),
    ],
)
def test_other_matrices_are_refused(P: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        birkhoff_decomposition(P)
