# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What the sets accept and reject, batch-wise, with and without a mask."""

from __future__ import annotations

import math
import pickle

import oracles
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints
from torch.func import vmap

from pyro_permutations.constraints import (
    SUM_TOLERANCE,
    contrasts,
    doubly_stochastic,
    permutation_matrix,
    straight_through,
)
from pyro_permutations.matching_graph import matching_graph
from pyro_permutations.sinkhorn import sinkhorn

ALL = [doubly_stochastic, contrasts(), permutation_matrix, straight_through]


def mask() -> Tensor:
    """Five rows of three to five cells, of which one cell lies outside the support."""
    cells = torch.ones(5, 5, dtype=torch.bool)
    cells[0, 1:] = False  # row 0 can only take column 0, so nobody else can
    cells[2, 3] = cells[4, 1] = False
    return cells


# All of them


@pytest.mark.parametrize("constraint", ALL)
def test_attributes_are_those_that_pyro_reads(constraint) -> None:
    assert constraint.event_dim == 2
    assert constraint.is_discrete == (constraint is permutation_matrix)
    assert isinstance(constraint, torch_constraints.Constraint)
    assert isinstance(repr(constraint), str)
    assert "object at" not in repr(constraint)


@pytest.mark.parametrize("constraint", ALL)
def test_answer_has_the_batch_shape_and_no_python_branches(constraint) -> None:
    for shape in [(), (3,), (2, 3), (0,)]:
        for value in (torch.eye(4), torch.zeros(4, 4)):
            answer = constraint.check(value.expand(*shape, 4, 4))
            assert answer.dtype == torch.bool
            assert answer.shape == shape
    batch = torch.stack([torch.eye(4), torch.zeros(4, 4), torch.ones(4, 4)])
    assert torch.equal(vmap(constraint.check)(batch), constraint.check(batch))


@pytest.mark.parametrize("constraint", ALL)
def test_nan_and_infinity_are_rejected(constraint) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        value = (
            torch.zeros(2, 3, 3)
            if constraint is ALL[1]
            else torch.eye(3).repeat(2, 1, 1)
        )
        value[1, 0, 0] = bad
        assert constraint.check(value).tolist() == [True, False]


@pytest.mark.parametrize("constraint", ALL)
def test_wrong_shapes_are_rejected(constraint) -> None:
    """More rows than columns, or columns with more than one: never True."""
    for value in (torch.full((5, 3), 0.2), torch.eye(3)[:, :2], torch.ones(2, 3) / 1.5):
        assert not constraint.check(value).any()


@pytest.mark.parametrize("constraint", ALL)
def test_the_value_may_have_any_dtype(constraint) -> None:
    value = torch.zeros(3, 3) if constraint is ALL[1] else torch.eye(3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert constraint.check(value.to(dtype))


@pytest.mark.parametrize("constraint", ALL)
def test_constraints_survive_pickling(constraint) -> None:
    assert pickle.loads(pickle.dumps(constraint)) == constraint


# Doubly stochastic


def test_vertices_and_interior_points_are_in_the_polytope() -> None:
    assert doubly_stochastic.check(oracles.permutations(4)).all()
    assert doubly_stochastic.check(torch.full((7, 7), 1 / 7))
    mixture = 0.3 * torch.eye(3) + 0.7 * torch.eye(3).roll(1, 0)
    assert doubly_stochastic.check(mixture)


def test_values_outside_the_polytope_are_rejected() -> None:
    negative = torch.full((3, 3), 1 / 3)
    negative[:2, :2] += torch.tensor([[-0.5, 0.5], [0.5, -0.5]])
    assert torch.allclose(negative.sum(-1), torch.ones(3))
    assert not doubly_stochastic.check(negative)
    assert not doubly_stochastic.check(torch.softmax(torch.randn(4, 4), -1))
    assert not doubly_stochastic.check(torch.softmax(torch.randn(4, 4), -2))
    assert not doubly_stochastic.check(torch.full((4, 4), 1 / 16))  # a joint table
    assert not doubly_stochastic.check(torch.zeros(4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("n", [1, 2, 20, 300])
def test_own_samples_are_inside_and_one_percent_off_is_not(
    n: int, tau: float, dtype: torch.dtype
) -> None:
    """A check stricter than the solver, or looser than any use, is a fault."""
    batch = 4 if n < 300 else 1
    X = torch.randn(batch, n, n) - torch.rand(batch, n, n).log().neg().log()
    P = sinkhorn(X.to(dtype), tau)
    assert doubly_stochastic.check(P).all()
    off = P.clone()
    off[:, 0] *= 1.01
    assert not doubly_stochastic.check(off).any()


def test_tolerance_is_one_named_number_for_each_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        tolerance = SUM_TOLERANCE[dtype]
        assert 1e-6 <= tolerance <= 1e-3
        for factor, inside in ((0.5, True), (2.0, False)):
            value = torch.eye(3, dtype=dtype)
            value[0, 0] += factor * tolerance
            assert bool(doubly_stochastic.check(value)) == inside


def test_masked_set_wants_exact_zeros_outside_the_support() -> None:
    cells = mask()
    support = oracles.total_support(cells)
    constraint = doubly_stochastic(cells)
    assert constraint.event_dim == 2
    P = sinkhorn(torch.randn(5, 5), mask=cells)
    assert constraint.check(P)
    assert not constraint.check(torch.full((5, 5), 0.2))
    for i, j in [(0, 1), (1, 0)]:  # forbidden; allowed, but in no perfect matching
        assert not support[i, j]
        small = P.clone()
        small[i, j] = 1e-3
        assert not constraint.check(small)
    found = oracles.perfect_matchings(cells)
    assert constraint.check(torch.eye(5)[found]).all()
    assert not constraint.check(torch.eye(5).roll(1, 0))


def test_masks_may_differ_across_the_batch() -> None:
    cells = torch.stack([mask(), torch.ones(5, 5, dtype=torch.bool)])
    constraint = doubly_stochastic(cells)
    uniform = torch.full((5, 5), 0.2)
    assert constraint.check(uniform.expand(2, 5, 5)).tolist() == [False, True]
    assert constraint.check(uniform.expand(3, 2, 5, 5)).shape == (3, 2)
    assert constraint.check(uniform).tolist() == [False, True]


def test_equal_means_the_same_set() -> None:
    cells = mask()
    graph = matching_graph(cells, (5, 5), cells.device)
    assert doubly_stochastic(cells) == doubly_stochastic(cells.clone())
    assert doubly_stochastic(cells) == doubly_stochastic(graph)
    assert hash(doubly_stochastic(cells)) == hash(doubly_stochastic(graph))
    assert doubly_stochastic(cells) != doubly_stochastic
    assert doubly_stochastic(cells) != doubly_stochastic(~torch.eye(5).bool())
    assert doubly_stochastic(cells) != contrasts(cells)
    assert contrasts(cells) == contrasts(graph)
    assert contrasts() == contrasts()
    assert contrasts() != contrasts(cells)
    assert doubly_stochastic != contrasts()
    assert straight_through(cells) == straight_through(graph)
    assert straight_through(cells) != doubly_stochastic(cells)


# Contrasts


def test_contrasts_are_zero_in_the_last_row_and_column() -> None:
    Z = torch.randn(6, 6)
    assert not contrasts().check(Z)
    Z[-1] = 0.0
    assert not contrasts().check(Z)
    Z[:, -1] = 0.0
    assert contrasts().check(Z)
    assert contrasts().check(1e6 * Z)


def test_contrasts_of_any_scores_are_contrasts() -> None:
    cells = mask()
    graph = matching_graph(cells, (5, 5), cells.device)
    Z = graph.contrasts(torch.randn(3, 5, 5))
    assert contrasts(graph).check(Z).all()
    assert not contrasts(graph).check(torch.randn(3, 5, 5)).any()
    shifted = Z + torch.randn(5, 1)
    assert not contrasts(graph).check(shifted).any()
    identity = torch.eye(5, dtype=torch.bool)
    assert contrasts(identity).check(torch.zeros(5, 5))
    assert not contrasts(identity).check(torch.eye(5))


# Permutation matrices


def test_permutations_and_only_they_are_permutations() -> None:
    assert permutation_matrix.check(oracles.permutations(4)).all()
    everything = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 9).reshape(-1, 3, 3)
    assert permutation_matrix.check(everything).sum() == 6
    assert not permutation_matrix.check(torch.full((2, 2), 0.5))
    assert not permutation_matrix.check(torch.eye(3) + 1e-3)
    assert not permutation_matrix.check(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]))
    swapped = torch.eye(3)[[0, 0, 1]]  # rows that pick the same column
    assert not permutation_matrix.check(swapped)
    assert not permutation_matrix.check(swapped.mT)
