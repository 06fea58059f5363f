# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""log T against enumeration and high precision, and its gradient against both."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from pyro_permutations.matching_graph import matching_graph
from pyro_permutations.sinkhorn import log_sinkhorn
from pyro_permutations.spanning_trees import log_spanning_trees

RELATIVE = 1e-10  # of T, that is, absolute of log T ...
ROUNDING = 1e-15  # ... plus the spacing of double numbers at the size of log T
PROBABILITY = 1e-9  # of an edge, absolute

TRACING = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning"
)


def close(actual: Tensor, expected: float) -> bool:
    return abs(float(actual) - expected) <= RELATIVE + ROUNDING * abs(expected)


def near_permutation(n: int, depth: float, seed: int = 0) -> Tensor:
    """Log weights 0 on a permutation and down to -depth off it."""
    generator = torch.Generator().manual_seed(seed)
    weights = -depth * torch.rand(n, n, generator=generator, dtype=torch.float64)
    match = torch.randperm(n, generator=generator)
    weights[torch.arange(n), match] = 0.0
    return weights


def graph(mask: Tensor):
    return matching_graph(mask, tuple(mask.shape[-2:]), mask.device)


# Values


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_equals_enumeration(n: int, scale: float) -> None:
    for seed in range(4):
        K = scale * torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
        assert close(log_spanning_trees(K), oracles.spanning_trees(K))


@pytest.mark.parametrize("depth", [3.0, 10.0, 20.0, 40.0, 80.0, 200.0, 1000.0])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_enumeration_for_many_draws(depth: float, masked: bool) -> None:
    """Every range of weights, also those where a Cholesky factor is just possible."""
    mask = masks()[1] if masked else masks()[0]
    K = torch.randn(200, 4, 4) - depth * torch.rand(200, 4, 4)
    actual = log_spanning_trees(K, graph(mask))
    expected = torch.tensor([oracles.spanning_trees(k, mask) for k in K])
    assert (actual - expected).abs().max() < RELATIVE


@pytest.mark.parametrize("depth", [1.0, 30.0, 300.0, 1000.0, 5000.0])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_near_permutations_equal_high_precision(n: int, depth: float) -> None:
    """Where the determinant of a difference is rounding error and nothing else."""
    for seed in range(3 if depth < 5000 else 1):
        K = near_permutation(n, depth, seed)
        expected = oracles.precise_log_trees(K)
        assert abs(expected - oracles.spanning_trees(K)) < 1e-9
        assert close(log_spanning_trees(K), expected)


def test_larger_near_permutation_equals_high_precision() -> None:
    K = near_permutation(9, 400.0)
    assert close(log_spanning_trees(K), oracles.precise_log_trees(K))


def test_bottleneck_edge_far_below_the_smallest_double() -> None:
    """The best tree needs one edge of weight e^-3000 between two strong blocks."""
    K = torch.full((4, 4), -4000.0)
    K[:2, :2] = K[2:, 2:] = torch.tensor([[0.0, -1.0], [-2.0, 0.5]])
    K[1, 2] = -3000.0
    assert close(log_spanning_trees(K), oracles.spanning_trees(K))
    g = grad(log_spanning_trees)(K)
    assert abs(g[1, 2] - 1) < PROBABILITY


def test_clusters_at_several_levels() -> None:
    """Blocks of blocks, each level joined by edges far weaker than the last."""
    K = torch.full((8, 8), -900.0) - torch.rand(8, 8)
    for a in (0, 4):
        K[a : a + 4, a : a + 4] = -350.0 - torch.rand(4, 4)
        for b in (a, a + 2):
            K[b : b + 2, b : b + 2] = -torch.rand(2, 2)
    assert close(log_spanning_trees(K), oracles.precise_log_trees(K))


@pytest.mark.parametrize("n", [1, 2, 5, 50, 300])
def test_uniform_weights_have_cayleys_count(n: int) -> None:
    """n^(n-1) n^(n-1) trees of 2n - 1 edges each."""
    for value in (0.0, -3.0, -700.0):
        expected = (2 * n - 2) * math.log(n) + (2 * n - 1) * value
        assert close(log_spanning_trees(torch.full((n, n), value)), expected)


@pytest.mark.parametrize("n", [5, 20, 80])
def test_mild_weights_equal_a_determinant(n: int) -> None:
    K = np.random.default_rng(0).uniform(0.5, 2.0, (n, n))
    laplacian = np.diag(np.concatenate([K.sum(1), K.sum(0)]))
    laplacian[:n, n:], laplacian[n:, :n] = -K, -K.T
    _, expected = np.linalg.slogdet(laplacian[:-1, :-1])
    assert close(log_spanning_trees(torch.tensor(K).log()), expected)


def test_scaling_transposing_and_relabelling() -> None:
    K = near_permutation(7, 200.0)
    expected = float(log_spanning_trees(K))
    rows, columns = torch.randperm(7), torch.randperm(7)
    assert close(log_spanning_trees(K + 2.5), expected + 13 * 2.5)
    assert close(log_spanning_trees(K.mT), expected)
    assert close(log_spanning_trees(K[rows][:, columns]), expected)


def test_batches() -> None:
    K = torch.stack([near_permutation(4, d) for d in (1.0, 50.0, 800.0, 3000.0)])
    batch = log_spanning_trees(K.reshape(2, 2, 4, 4))
    assert batch.shape == (2, 2)
    for k in range(4):
        assert close(batch.reshape(-1)[k], oracles.spanning_trees(K[k]))
    assert log_spanning_trees(torch.zeros(0, 3, 3)).shape == (0,)


# Gradient


@pytest.mark.parametrize("depth", [1.0, 30.0, 1000.0, 5000.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_gradient_is_the_probability_of_each_edge(n: int, depth: float) -> None:
    """d log T / d log K_ij is how often cell ij is in a random weighted tree."""
    for seed in range(3):
        K = near_permutation(n, depth, seed)
        g = grad(log_spanning_trees)(K)
        expected = oracles.log_edge_probabilities(K).exp()
        assert (g - expected).abs().max() < PROBABILITY
        assert abs(g.sum() - (2 * n - 1)) < PROBABILITY


@pytest.mark.parametrize("depth", [20.0, 60.0, 120.0, 400.0])
def test_gradient_for_many_draws(depth: float) -> None:
    K = torch.randn(100, 4, 4) - depth * torch.rand(100, 4, 4)
    g = grad(lambda k: log_spanning_trees(k).sum())(K)
    expected = torch.stack([oracles.log_edge_probabilities(k).exp() for k in K])
    assert (g - expected).abs().max() < PROBABILITY


@pytest.mark.parametrize("n", [20, 100])
def test_gradient_adds_up_to_the_number_of_edges(n: int) -> None:
    for K in (torch.randn(n, n), near_permutation(n, 2000.0)):
        g = grad(log_spanning_trees)(K)
        assert (g >= -PROBABILITY).all()
        assert (g <= 1 + PROBABILITY).all()
        assert abs(g.sum() - (2 * n - 1)) < n * PROBABILITY


def test_gradcheck_first_and_second_order() -> None:
    K = torch.randn(2, 4, 4, requires_grad=True)
    assert torch.autograd.gradcheck(log_spanning_trees, (K,))
    assert torch.autograd.gradgradcheck(log_spanning_trees, (K,))


def test_second_derivative_is_the_covariance_of_edges() -> None:
    """Also at a near permutation: the probabilities differentiated once more."""
    for K in (torch.randn(3, 3), near_permutation(3, 12.0)):
        H = jacrev(jacrev(log_spanning_trees))(K).reshape(9, 9)
        step = 1e-5
        for e in range(9):
            change = torch.zeros(9)
            change[e] = step
            change = change.reshape(3, 3)
            up = oracles.log_edge_probabilities(K + change).exp()
            down = oracles.log_edge_probabilities(K - change).exp()
            expected = ((up - down) / (2 * step)).reshape(9)
            assert (H[e] - expected).abs().max() < 1e-8
        assert torch.allclose(H, H.mT)


def test_second_derivative_where_weights_are_fifty_apart() -> None:
    """The documented range, against differences of the gradient."""
    K, direction = log_sinkhorn(2 * torch.randn(10, 10), 0.2), torch.randn(10, 10)
    assert 40 < float(K.max() - K.min()) < 60
    x = K.clone().requires_grad_()
    (first,) = torch.autograd.grad(log_spanning_trees(x), x, create_graph=True)
    (found,) = torch.autograd.grad((first * direction).sum(), x)

    def gradient(K: Tensor) -> Tensor:
        x = K.clone().requires_grad_()
        return torch.autograd.grad(log_spanning_trees(x), x)[0]

    step = 1e-4
    up, down = (gradient(K + sign * step * direction) for sign in (1, -1))
    expected = (up - down) / (2 * step)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_second_derivative_is_finite_at_extremes() -> None:
    for depth in (300.0, 5000.0):
        H = jacrev(jacrev(log_spanning_trees))(near_permutation(4, depth))
        assert H.isfinite().all()


def test_vmap_and_vmap_of_grad() -> None:
    K = torch.stack([near_permutation(4, d) for d in (1.0, 50.0, 800.0)])
    assert torch.allclose(vmap(log_spanning_trees)(K), log_spanning_trees(K))
    each = torch.stack([grad(log_spanning_trees)(k) for k in K])
    assert torch.allclose(vmap(grad(log_spanning_trees))(K), each, atol=PROBABILITY)
    nested = vmap(vmap(log_spanning_trees))(K.expand(2, 3, 4, 4))
    assert torch.allclose(nested[0], log_spanning_trees(K))


@TRACING
def test_traced_function_follows_its_input() -> None:
    traced = torch.jit.trace(log_spanning_trees, (torch.zeros(4, 4),))
    for depth in (1.0, 3000.0):
        K = near_permutation(4, depth)
        assert close(traced(K), oracles.spanning_trees(K))


# Masks


def masks() -> list[Tensor]:
    """Full, a cell missing, a cycle, two blocks, blocks of sizes 1 and 3, identity."""
    full = torch.ones(4, 4, dtype=torch.bool)
    missing = full.clone()
    missing[0, 1] = False
    eye = torch.eye(4, dtype=torch.bool)
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool()
    uneven = torch.block_diag(torch.ones(1, 1), torch.ones(3, 3)).bool()
    return [full, missing, eye | eye.roll(1, 0), blocks, uneven[[1, 0, 2, 3]], eye]


@pytest.mark.parametrize("depth", [1.0, 40.0, 2000.0])
def test_masks_count_forests(depth: float) -> None:
    """One tree for each component, and nothing from forbidden cells."""
    for k, mask in enumerate(masks()):
        K = torch.randn(4, 4) - depth * torch.rand(4, 4)
        expected = oracles.spanning_trees(K, mask)
        for outside in (-math.inf, 0.0, 50.0):
            filled = K.masked_fill(~mask, outside)
            assert close(log_spanning_trees(filled, graph(mask)), expected), k
        g = grad(lambda x, m=mask: log_spanning_trees(x, graph(m)))(K)
        probability = oracles.log_edge_probabilities(K, mask).exp()
        assert (g - probability).abs().max() < PROBABILITY
        assert not g[~mask].any()


def test_masks_that_differ_across_the_batch() -> None:
    mask = torch.stack(masks())
    K = torch.randn(6, 4, 4)
    actual = log_spanning_trees(K, graph(mask))
    for k in range(6):
        assert close(actual[k], oracles.spanning_trees(K[k], mask[k]))
    leading = log_spanning_trees(K.expand(3, 6, 4, 4), graph(mask))
    assert torch.allclose(leading[2], actual)
    mapped = vmap(lambda x: log_spanning_trees(x, graph(mask)))(K.expand(3, 6, 4, 4))
    assert torch.allclose(mapped[2], actual)


def test_gradcheck_with_masks() -> None:
    mask = torch.stack(masks())
    K = torch.randn(6, 4, 4, requires_grad=True)

    def value(x: Tensor) -> Tensor:
        return log_spanning_trees(x, graph(mask))

    assert torch.autograd.gradcheck(value, (K,))
    assert torch.autograd.gradgradcheck(value, (K,))


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_infinite_weights_outside_give_zero_gradient() -> None:
    """No NaN from 0 times infinity, first or second order."""
    mask = masks()[1]
    K = torch.randn(4, 4).masked_fill(~mask, -math.inf).requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        value = log_spanning_trees(K, graph(mask))
        (g,) = torch.autograd.grad(value, K, create_graph=True)
        (h,) = torch.autograd.grad((g[mask] ** 2).sum(), K)
    assert g.isfinite().all()
    assert g[0, 1] == 0
    assert h.isfinite().all()
    assert h[0, 1] == 0


def test_cells_outside_the_total_support_do_not_count() -> None:
    """Of a lower triangle only the diagonal is left: T is its product."""
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    K = torch.randn(4, 4)
    expected = oracles.spanning_trees(K, torch.eye(4, dtype=torch.bool))
    assert close(log_spanning_trees(K, graph(lower)), expected)
