# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""What a mask allows, against enumeration."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import sys

import oracles
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from pyro_permutations.matching_graph import MatchingGraph, matching_graph

ROUNDING = 1e-12  # float64, scores of order one, paths of a few edges
LARGE_ROUNDING = 1e-9  # the same with scores of order 1e3


def feasible_masks(n: int, count: int, density: float, seed: int = 0) -> torch.Tensor:
    """Random masks, each with the cells of one random permutation added."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, n, n, generator=generator) < density
    perms = torch.rand(count, n, generator=generator).argsort(-1)
    return masks.scatter(-1, perms.unsqueeze(-1), True)


def path_mask(n: int) -> torch.Tensor:
    """A cycle through all rows and columns: every tree is a path, the deepest case."""
    return torch.eye(n, dtype=torch.bool) | torch.eye(n, dtype=torch.bool).roll(1, -1)


def assert_spanning_forest(forest, support):
    """By union-find: no cycle, and it joins all that the support joins."""
    n, m = forest.shape
    parent = list(range(n + m))

    def find(node):
        while parent[node] != node:
            node = parent[node]
        return node

    assert not (forest & ~support).any()
    for i, j in forest.nonzero().tolist():
        a, b = find(i), find(n + j)
        assert a != b
        parent[a] = b
    for i, j in support.nonzero().tolist():
        assert find(i) == find(n + j)


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("n", range(1, 6))
def test_analysis_agrees_with_enumeration(n, density):
    masks = feasible_masks(n, 30, density, seed=n)
    graph = matching_graph(masks, (n, n))
    assert graph.batch_shape == (30,)
    assert graph.shape == (n, n)
    assert torch.equal(graph.allowed, masks)
    for k, mask in enumerate(masks):
        support = oracles.total_support(mask)
        rows, columns = oracles.components(support)
        k_components = len(set(rows.tolist()))
        assert torch.equal(graph.support[k], support)
        # The same partition, under any names.
        same = torch.tensor(rows[:, None] == columns)
        labels = graph.row_component[k][:, None] == graph.column_component[k]
        assert torch.equal(labels, same)
        assert set(graph.row_component[k].tolist()) == set(range(k_components))
        # One root column in each component.
        assert sorted(graph.column_component[k][graph.root[k]].tolist()) == list(
            range(k_components)
        )
        assert_spanning_forest(graph.forest[k], support)
        assert graph.forest[k].sum() == 2 * n - k_components
        assert torch.equal(graph.free[k], support & ~graph.forest[k])
        assert graph.dim[k] == support.sum() - (2 * n - k_components)
        assert torch.equal(graph.row_counts[k], support.sum(-1))
        assert torch.equal(graph.column_counts[k], support.sum(-2))
        assert mask[torch.arange(n), graph.matching[k]].all()
        assert sorted(graph.matching[k].tolist()) == list(range(n))


def test_all_masks_of_three_rows():
    for cells in itertools.product([False, True], repeat=9):
        mask = torch.tensor(cells).reshape(3, 3)
        rows, columns = mask.any(-1), mask.any(-2)
        padded = rows.sum() == columns.sum() > 0  # the rest is a problem of its own
        inner = mask[rows][:, columns] if padded else mask
        if len(oracles.perfect_matchings(inner)) == 0:
            with pytest.raises(ValueError, match="matching"):
                matching_graph(mask, (3, 3))
        else:
            graph = matching_graph(mask, (3, 3))
            support = torch.zeros_like(mask)
            support[rows[:, None] & columns] = oracles.total_support(inner).flatten()
            assert torch.equal(graph.support, support)
            assert_spanning_forest(graph.forest, graph.cells)


def test_triangular_mask_leaves_the_identity():
    graph = matching_graph(torch.ones(6, 6, dtype=torch.bool).tril(), (6, 6))
    assert torch.equal(graph.support, torch.eye(6, dtype=torch.bool))
    assert graph.dim == 0
    assert graph.components() == []
    assert not graph.contrasts(torch.randn(6, 6)).any()


def test_full_graph():
    graph = matching_graph(None, (4, 4))
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[:3, :3] = True
    assert graph.is_full
    assert torch.equal(graph.free, corner)
    assert torch.equal(graph.forest, ~corner)
    assert graph.root.tolist() == [False, False, False, True]
    assert graph.dim == 9
    # A full element among others has the same gauge.
    masks = torch.stack([torch.ones(4, 4, dtype=torch.bool), path_mask(4)])
    both = matching_graph(masks, (4, 4))
    assert not both.is_full
    assert torch.equal(both.forest[0], graph.forest)
    assert torch.equal(both.root[0], graph.root)


# Infeasible masks


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            [[0, 1, 0], [0, 1, 0], [1, 1, 1]],
            r"rows \{0, 1\} can only use columns \{1\}\. Allow more pairs",
        ),
        ([[1, 1], [0, 0]], r"rows \{1\} can only use columns \{\}"),
        ([[1, 0], [1, 0]], r"rows \{0, 1\} can only use columns \{0\}"),
    ],
)
def test_hall_set_is_named(mask, message):
    mask = torch.tensor(mask, dtype=torch.bool)
    n = len(mask)
    with pytest.raises(ValueError, match="mask has no perfect matching: " + message):
        matching_graph(mask, (n, n))


def test_hall_set_names_the_batch_element():
    masks = torch.ones(5, 3, 3, dtype=torch.bool)
    masks[3] = torch.tensor([[0, 1, 0], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    pairs = r"rows \{0, 1\} can only use columns \{1\} "
    with pytest.raises(ValueError, match=pairs + r"\(batch element 3\)"):
        matching_graph(masks, (3, 3))
    masks = torch.stack([torch.ones_like(masks), masks])
    with pytest.raises(ValueError, match=pairs + r"\(batch element 1, 3\)"):
        matching_graph(masks, (3, 3))


def test_long_hall_sets_are_shortened():
    mask = torch.ones(30, 30, dtype=torch.bool)
    mask[:, 3] = False  # rows would be all thirty: the column is named instead
    with pytest.raises(ValueError, match=r"columns \{3\} can only use rows \{\}"):
        matching_graph(mask, (30, 30))
    mask = torch.ones(30, 30, dtype=torch.bool)
    mask[:15, 14:] = False
    with pytest.raises(
        ValueError, match=r"rows \{0, 1, .*, \.\.\. \(15 in all\)\} .* \(14 in all\)\}"
    ):
        matching_graph(mask, (30, 30))


def test_hall_set_is_violated():
    masks = torch.rand(40, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.2
    masks = [mask for mask in masks if len(oracles.perfect_matchings(mask)) == 0]
    masks = [mask for mask in masks if mask.any(-1).sum() != mask.any(-2).sum()]
    assert len(masks) > 20
    for mask in masks:
        with pytest.raises(ValueError, match="no perfect matching") as caught:
            matching_graph(mask, (6, 6))
        found = re.findall(r"\{(.*?)\}", str(caught.value))
        few, other = ([int(x) for x in one.split(", ") if x] for one in found)
        assert len(few) > len(other)
        assert mask[few].any(0).nonzero().flatten().tolist() == other


# Contrasts


def test_contrasts_of_full_scores():
    L = torch.randn(7, 5, 5, dtype=torch.float64)
    Z = matching_graph(None, (5, 5)).contrasts(L)
    expected = L - L[:, :, -1:] - L[:, -1:, :] + L[:, -1:, -1:]
    assert torch.allclose(Z, expected, rtol=0, atol=ROUNDING)
    assert not Z[:, -1].any()
    assert not Z[:, :, -1].any()


@pytest.mark.parametrize("density", [0.1, 0.4, 0.8])
def test_contrasts_do_not_see_shifts(density):
    masks = feasible_masks(6, 8, density)
    graph = matching_graph(masks, (6, 6))
    L = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    Z = graph.contrasts(L)
    shifted = L + 1e3 * torch.randn(3, 8, 6, 1) + 1e3 * torch.randn(3, 8, 1, 6)
    assert torch.allclose(graph.contrasts(shifted), Z, rtol=0, atol=LARGE_ROUNDING)
    assert not Z[:, ~graph.free].any()  # exactly zero on forest and forbidden cells
    # What was taken out is a sum of row and column shifts: on the support the
    # difference has no contrasts left.
    left = graph.contrasts(torch.where(graph.support, L - Z, 0))
    assert torch.allclose(left, torch.zeros_like(left), atol=ROUNDING)
    # A projection, onto as many numbers as are free.
    assert torch.equal(graph.contrasts(Z), Z)
    for k in range(8):
        one = matching_graph(masks[k], (6, 6))
        J = jacrev(one.contrasts)(L[0, k]).reshape(36, 36)
        assert torch.linalg.matrix_rank(J) == one.dim


def test_contrasts_along_a_long_path():
    n = 40
    mask = path_mask(n)
    mask[0, 1] = False  # of the cycle remains a path, and all of it is decided
    assert matching_graph(mask, (n, n)).dim == 0
    graph = matching_graph(path_mask(n), (n, n))
    assert graph.dim == 1
    L = torch.randn(n, n, dtype=torch.float64)
    Z = graph.contrasts(L)
    (i, j) = graph.free.nonzero()[0].tolist()
    # The one contrast of a cycle: the alternating sum of its scores.
    on, off = L.diagonal().sum(), L[graph.support].sum() - L.diagonal().sum()
    cycle = on - off if i == j else off - on
    assert torch.allclose(Z[i, j], cycle, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("garbage", [-torch.inf, torch.inf, torch.nan, 1e30])
def test_forbidden_scores_do_not_leak(garbage):
    mask = feasible_masks(5, 1, 0.4)[0]
    graph = matching_graph(mask, (5, 5))
    L = torch.randn(5, 5, dtype=torch.float64)
    dirty = L.masked_fill(~graph.support, garbage).requires_grad_()
    Z = graph.contrasts(dirty)
    assert torch.equal(Z, graph.contrasts(L))
    (gradient,) = torch.autograd.grad(Z.square().sum(), dirty)
    assert gradient.isfinite().all()
    assert not gradient[~graph.support].any()


@pytest.mark.parametrize("masked", [False, True])
def test_contrasts_are_differentiable_and_map(masked):
    masks = feasible_masks(4, 3, 0.6)
    graph = matching_graph(masks if masked else None, (4, 4)).expand((3,))
    L = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(graph.contrasts, L)
    assert gradgradcheck(graph.contrasts, L)
    many = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    expected = graph.contrasts(many)
    assert torch.equal(vmap(graph.contrasts)(many), expected)
    moved = vmap(graph.contrasts, in_dims=-1, out_dims=-1)(many.movedim(0, -1))
    assert torch.equal(moved, expected.movedim(0, -1))
    gradient = vmap(grad(lambda x: graph.contrasts(x).square().sum()))(many)
    many.requires_grad_()
    (plain,) = torch.autograd.grad(graph.contrasts(many).square().sum(), many)
    assert torch.allclose(gradient, plain, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_contrasts_keep_the_type(dtype):
    masks = feasible_masks(4, 3, 0.6)
    for mask in (masks, None):
        assert (
            matching_graph(mask, (4, 4)).contrasts(torch.zeros(4, 4, dtype=dtype)).dtype
            == dtype
        )


@pytest.mark.parametrize("masked", [False, True])
def test_contrasts_broadcast(masked):
    masks = feasible_masks(4, 3, 0.6) if masked else torch.ones(3, 4, 4).bool()
    graph = matching_graph(masks, (4, 4))
    L = torch.randn(4, 4)
    assert graph.contrasts(L).shape == (3, 4, 4)
    assert graph.contrasts(L.expand(2, 1, 4, 4)).shape == (2, 3, 4, 4)
    each = [matching_graph(mask, (4, 4)).contrasts(L) for mask in masks]
    assert torch.equal(graph.contrasts(L), torch.stack(each))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_contrasts_are_traced():
    """Graphs that are first asked for in a trace leave no operations in it."""
    module = sys.modules["pyro_permutations.matching_graph"]
    module._full.cache_clear()
    module._from_bits.cache_clear()
    masks = feasible_masks(4, 3, 0.6)

    def contrasts(x):
        part = matching_graph(masks, x.shape[-2:]).expand(x.shape[:-2]).contrasts(x)
        return part + matching_graph(None, x.shape[-2:]).contrasts(x)

    trace = torch.jit.trace(contrasts, torch.randn(2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(trace(x), contrasts(x))


# Components


def check_components(graph):
    """Every component of two or more rows is listed once, with its support."""
    n, m = graph.shape
    flat = graph.support.reshape(-1, n, m)
    found = torch.zeros_like(flat)
    sizes = [group.rows.shape[-1] for group in graph.components()]
    assert sizes == sorted(set(sizes))
    assert all(size >= 2 for size in sizes)
    for group in graph.components():
        C, s = group.rows.shape
        assert group.element.shape == (C,)
        assert group.columns.shape == (C, s)
        assert group.mask.shape == (C, s, s)
        for e, i, j, inside in zip(*group[:4], strict=True):
            assert torch.equal(flat[e][i][:, j], inside)
            assert not found[e][i][:, j].any()
            assert torch.equal(i.sort().values, i)
            assert torch.equal(j.sort().values, j)
            found[e] |= (torch.zeros(n, m).index_fill(0, i, 1) > 0) & (
                torch.zeros(n, m).index_fill(1, j, 1) > 0
            )
    # What is not listed is decided: alone in its row and its column.
    alone = (graph.row_counts == 1).reshape(-1, n, 1)
    alone = alone & (graph.column_counts == 1).reshape(-1, 1, m)
    assert torch.equal(flat & ~found, flat & alone)


def test_components_are_listed_by_size():
    blocks = [torch.ones(s, s, dtype=torch.bool) for s in (2, 3, 2, 1)]
    mask = torch.block_diag(*blocks)[:, torch.randperm(8)]
    graph = matching_graph(mask, (8, 8))
    assert [tuple(group.rows.shape) for group in graph.components()] == [(2, 2), (1, 3)]
    check_components(graph)
    check_components(matching_graph(feasible_masks(7, 12, 0.1), (7, 7)))
    check_components(matching_graph(feasible_masks(4, 6, 0.4).view(2, 3, 4, 4), (4, 4)))
    check_components(matching_graph(None, (3, 3)))


def test_components_of_expanded_graphs():
    graph = matching_graph(feasible_masks(5, 3, 0.2), (5, 5))
    check_components(graph.expand((2, 3)))
    check_components(matching_graph(None, (3, 3)).expand((4,)))
    elements = torch.cat([g.element for g in graph.expand((2, 3)).components()])
    base = torch.cat([g.element for g in graph.components()])
    assert elements.sort().values.tolist() == sorted(
        base.tolist() + (base + 3).tolist()
    )
    assert graph.components() is graph.components()
    assert graph.expand((2, 3)).components() is graph.expand((2, 3)).components()


# One object for one mask


def test_graphs_are_remembered():
    masks = feasible_masks(4, 3, 0.6)
    graph = matching_graph(masks, (4, 4))
    assert matching_graph(masks.clone(), (4, 4), "cpu") is graph
    assert matching_graph(graph, (4, 4)) is graph
    assert matching_graph(None, (4, 4)) is matching_graph(None, (4, 4))
    assert matching_graph(torch.ones(4, 4).bool(), (4, 4)) is matching_graph(
        None, (4, 4)
    )
    masks[0] = True  # changing the mask afterwards changes nothing that is remembered
    assert not torch.equal(graph.allowed, masks)
    assert matching_graph(masks, (4, 4)) is not graph


def test_equality_and_pickling():
    masks = feasible_masks(4, 3, 0.6)
    graph = matching_graph(masks, (4, 4))
    for other in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph)):
        assert isinstance(other, MatchingGraph)
        assert other is not graph
        assert other == graph
        assert hash(other) == hash(graph)
        L = torch.randn(3, 4, 4)
        assert torch.equal(other.contrasts(L), graph.contrasts(L))
    stacked = matching_graph(torch.stack([masks, masks]), (4, 4))
    assert graph.expand((2, 3)) == stacked
    assert hash(graph.expand((2, 3))) == hash(stacked)
    assert graph != stacked
    assert graph != matching_graph(masks[0], (4, 4))
    assert graph != matching_graph(masks.mT, (4, 4))
    assert graph != masks
    full = matching_graph(None, (4, 4))
    assert matching_graph(torch.ones(2, 4, 4).bool(), (4, 4)) == full.expand((2,))


def test_expand_copies_nothing():
    graph = matching_graph(feasible_masks(4, 3, 0.6), (4, 4))
    wide = graph.expand((5, 3))
    assert wide.batch_shape == (5, 3)
    assert wide.support.data_ptr() == graph.support.data_ptr()
    assert wide.dim.shape == (5, 3)
    assert wide.matching.shape == wide.row_component.shape == (5, 3, 4)
    assert graph.expand((3,)) is graph
    L = torch.randn(5, 3, 4, 4)
    assert torch.equal(wide.contrasts(L), graph.contrasts(L))


def test_repr():
    blocks = [torch.ones(2, 2), torch.ones(1, 1)]
    masks = torch.stack([torch.block_diag(*blocks), torch.ones(3, 3)]).bool()
    assert repr(matching_graph(masks, (3, 3))) == (
        "MatchingGraph(shape=(3, 3), batch_shape=(2,), components=1..2, free=1..4)"
    )


def test_small_and_empty():
    for mask in (None, torch.ones(1, 1).bool()):
        graph = matching_graph(mask, (1, 1))
        assert graph.dim == 0
        assert graph.forest.all()
        assert not graph.contrasts(torch.randn(3, 1, 1)).any()
    empty = matching_graph(torch.ones(0, 3, 3).bool(), (3, 3))
    assert empty.batch_shape == (0,)
    assert empty.contrasts(torch.randn(0, 3, 3)).shape == (0, 3, 3)
    assert empty.components() == []
    assert "batch_shape=(0,)" in repr(empty)
    graph = matching_graph(feasible_masks(3, 1, 0.5), (3, 3)).expand((0, 1))
    assert graph.contrasts(torch.randn(0, 1, 3, 3)).shape == (0, 1, 3, 3)
    assert graph.components() == []


def test_graphs_outlive_the_mode_they_were_made_in():
    mask, other = feasible_masks(5, 2, 0.6, seed=1)
    L = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def loss(x):
        graph = matching_graph(mask, (5, 5)).expand((2,))
        graph.components()
        return graph.contrasts(x).square().sum()

    first = vmap(grad(loss))(L.detach().expand(2, 5, 5))
    with torch.inference_mode():
        matching_graph(other, (5, 5)).expand((2,)).components()
    for one in (mask, other):
        graph = matching_graph(one, (5, 5)).expand((2,))
        (gradient,) = torch.autograd.grad(graph.contrasts(L).square().sum(), L)
        check_components(graph)
        assert pickle.loads(pickle.dumps(graph)) == graph
        if one is mask:
            assert torch.allclose(first[1], gradient, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("mask", "shape", "message"),
    [
        (torch.ones(3, 3), (3, 3), r"mask must be a bool tensor.*float32.*mask\.bool"),
        ([[True]], (1, 1), "mask must be a bool tensor.*list"),
        (torch.ones(3).bool(), (3, 3), r"mask must have shape \(\*batch, 3, 3\)"),
        (torch.ones(2, 2).bool(), (3, 3), r"mask must have shape .*got \(2, 2\)"),
        (torch.ones(3, 2).bool(), (3, 2), "no more rows than columns.*Transpose"),
        (None, (3, 2), "no more rows than columns.*unmatched"),
        (None, (0, 0), "at least one"),
        (matching_graph(None, (2, 2)), (3, 3), "mask must have shape"),
    ],
)
def test_bad_masks(mask, shape, message):
    with pytest.raises(ValueError, match=message):
        matching_graph(mask, shape)


def test_many_items():
    masks = feasible_masks(279, 5, 0.02)
    graph = matching_graph(masks, (279, 279))
    L = torch.randn(5, 279, 279, dtype=torch.float64)
    shifted = L + torch.randn(5, 279, 1) + torch.randn(5, 1, 279)
    Z = graph.contrasts(L)
    assert torch.allclose(graph.contrasts(shifted), Z, rtol=0, atol=ROUNDING)
    assert torch.equal(
        graph.dim, graph.support.sum((-2, -1)) - 558 + graph.root.sum(-1)
    )
    long = matching_graph(path_mask(279), (279, 279))
    assert long.dim == 1
