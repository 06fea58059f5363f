# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Masks that fall apart: solving their components gives what solving the whole does."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pyro_permutations import matching_parts
from pyro_permutations.matching_graph import matching_graph
from pyro_permutations.matching_parts import falls_apart, parts, put, take
from pyro_permutations.sinkhorn import log_scaling, log_sinkhorn, sinkhorn
from pyro_permutations.spanning_trees import log_spanning_trees

# Both ways converge to rounding; sums of some hundred terms.
SAME = 1e-9


def two_masks() -> Tensor:
    """Blocks of different sizes in a shuffled order, some pairs known, n = 40."""
    masks = torch.zeros(2, 40, 40, dtype=torch.bool)
    for mask, sizes in zip(masks, ([18, 12, 7, 2, 1], [15, 15, 5, 4, 1]), strict=True):
        start = 0
        for size in sizes:
            mask[start : start + size, start : start + size] = True
            start += size
        mask.copy_(mask[torch.randperm(40)][:, torch.randperm(40)])
    return masks


@pytest.fixture(autouse=True)
def calls_are_free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that small problems are taken apart, too."""
    monkeypatch.setattr(matching_parts, "_CALL", 0.0)
    matching_parts._pays.cache_clear()
    yield
    matching_parts._pays.cache_clear()


def whole(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Never take apart."""
    for name in names:
        module = sys.modules[f"pyro_permutations.{name}"]
        monkeypatch.setattr(module, "falls_apart", lambda _: False)


def test_take_and_put_are_inverse() -> None:
    graph = matching_graph(two_masks(), (40, 40))
    x = torch.randn(3, 2, 40, 40)
    pieces = take(x, graph)
    assert sum(p.shape[1] for p in pieces) == 8  # components of two rows and more
    for part, piece in zip(parts(graph), pieces, strict=True):
        k, i, j = part.element[0], part.rows[0, 1], part.columns[0, 0]
        assert torch.equal(piece[:, 0, 1, 0], x[:, k, i, j])
    back = put(torch.zeros_like(x), pieces, graph)
    single = graph.support & (graph.row_counts == 1)[..., None]
    assert torch.equal(back, torch.where(graph.support & ~single, x, 0.0))


@pytest.mark.parametrize("function", [sinkhorn, log_sinkhorn])
@pytest.mark.parametrize("counted", [False, True])
def test_same_matrix_and_gradient(function, counted, monkeypatch) -> None:
    graph = matching_graph(two_masks(), (40, 40))
    assert falls_apart(graph)
    X = (3 * torch.randn(3, 2, 40, 40)).requires_grad_()
    weight = torch.randn(40, 40)
    sums = (graph.row_counts.double(), graph.column_counts.double())

    def run() -> tuple[Tensor, Tensor]:
        if counted:
            P = log_scaling(2 * X, graph, sums)
        else:
            P = function(X, 0.5, mask=graph, tol=1e-12)
        loss = (torch.where(graph.support, P, 0.0) * weight).sum()
        return P, torch.autograd.grad(loss, X)[0]

    P, gradient = run()
    whole(monkeypatch, "sinkhorn")
    expected, expected_gradient = run()
    assert torch.equal(P.isneginf(), expected.isneginf())
    assert torch.allclose(P, expected, atol=SAME, rtol=SAME)
    assert torch.allclose(gradient, expected_gradient, atol=SAME, rtol=SAME)


def test_same_spanning_forests(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = matching_graph(two_masks(), (40, 40))
    K = torch.randn(3, 2, 40, 40).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        log_trees = log_spanning_trees(K, graph)
        return log_trees, torch.autograd.grad(log_trees.sum(), K)[0]

    log_trees, gradient = run()
    whole(monkeypatch, "spanning_trees")
    expected, expected_gradient = run()
    assert torch.allclose(log_trees, expected, atol=SAME)
    assert torch.allclose(gradient, expected_gradient, atol=SAME)


def test_a_shared_mask_and_one_that_is_decided() -> None:
    """A mask without a batch; and one whose components are single pairs."""
    mask = two_masks()[0]
    X = torch.randn(5, 40, 40)
    P = sinkhorn(X, mask=mask)
    assert torch.allclose(P[3], sinkhorn(X[3], mask=mask), atol=1e-5)  # tolerance
    diagonal = torch.eye(40, dtype=torch.bool)
    assert torch.equal(sinkhorn(X, mask=diagonal), diagonal.double().expand(5, 40, 40))
    assert (log_spanning_trees(X, matching_graph(diagonal, (40, 40)))).allclose(
        X.diagonal(dim1=-2, dim2=-1).sum(-1)
    )
