# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Sinkhorn operator: sums, logs, gradients, transformations, masks, errors."""

from __future__ import annotations

import math
import sys
import time
import warnings
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from benchmarks.sinkhorn_methods import peak_bytes
from pyro_permutations import sinkhorn_solvers
from pyro_permutations.kernel_scaling import _scale_by_products, scale_kernel
from pyro_permutations.kernel_squaring import scale_by_squaring
from pyro_permutations.matching import matching
from pyro_permutations.matching_graph import WIRE, matching_graph
from pyro_permutations.sinkhorn import log_scaling, log_sinkhorn, sinkhorn
from pyro_permutations.spanning_trees import log_spanning_trees
from pyro_permutations.warnings import ConvergenceWarning

SUMS = 1e-6  # the documented default tolerance on every row and column sum
FLOAT32_SUMS = 1e-5  # the same after each of up to 300 cells is rounded to 6e-8
LOG_VALUES = 1e-6  # log P and log T against high precision, absolute, in nats
UNROLLED = 1e-8  # the unrolled loop is run until it stands still in double precision
GRADIENTS = 1e-6  # relative to the largest entry of the gradient, at temperature .1 too
CELLS = 1e-5  # cells of two matrices that both have their sums within 1e-6
EXACT = 1e-12  # identities that hold up to the rounding of double precision
SECONDS = 1.0  # structure and bad input are dealt with at once

TRACING = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning"
)
ANOMALY = pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")


def scores(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Gaussian scores of the given scale plus Gumbel noise, as a sampler meets them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return scale * normal - (-uniform.log()).log()


def residual(P: Tensor) -> float:
    """The largest error of a row or column sum, accumulated in float64."""
    P = P.detach().double()
    return float(torch.maximum((P.sum(-1) - 1).abs(), (P.sum(-2) - 1).abs()).max())


# Sums


@pytest.mark.parametrize("tau", [10.0, 1.0, 0.1, 0.01])
@pytest.mark.parametrize("n", [1, 2, 10, 100, 300])
def test_sums_are_one_at_every_size_scale_and_temperature(n: int, tau: float) -> None:
    """A fixed iteration budget is never what limits the sums."""
    X = torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None, None] * torch.randn(4, n, n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        P = sinkhorn(X, tau)
        # The log has to be right where P is zero, which costs seconds at n = 300.
        some = [0, 1, 2, 3] if n < 300 else [3] if tau == 0.01 else [0]
        log_P = log_sinkhorn(X[some], tau)
    assert P.dtype == log_P.dtype == X.dtype
    assert log_P.isfinite().all()
    assert (log_P <= SUMS).all()
    assert residual(P) <= SUMS
    assert residual(log_P.exp()) <= SUMS


@pytest.mark.parametrize("tau", [0.3, 0.1, 0.05])
def test_sums_are_one_in_float32(tau: float) -> None:
    """Noisy 10 x 10 scores, of which 20 sweeps would leave sums wrong by .1 to 1."""
    P = sinkhorn(scores(50, 10, 10).float(), tau)
    assert P.dtype == torch.float32
    assert residual(P) <= FLOAT32_SUMS


def test_sums_are_those_of_a_permutation_not_of_a_joint_table() -> None:
    P = sinkhorn(scores(10, 10))
    assert torch.allclose(P.sum(-1), torch.ones(10), atol=SUMS)
    assert torch.allclose(P.sum(-2), torch.ones(10), atol=SUMS)


def test_large_costs_keep_their_marginals() -> None:
    """Costs of scale 50, where exponentials of unscaled scores lose the marginals."""
    assert residual(sinkhorn(50 * torch.randn(16, 16))) <= SUMS


def test_result_is_a_probability_and_the_log_is_named_so() -> None:
    X = scores(5, 6, 6)
    P, log_P = sinkhorn(X, 0.1, tol=EXACT), log_sinkhorn(X, 0.1)
    assert P.min() >= 0
    assert P.max() <= 1 + SUMS
    assert log_P.max() <= SUMS
    assert torch.allclose(P, log_P.exp(), atol=EXACT)


def test_input_is_log_weights() -> None:
    """Logits are log weights divided by tau: weights and log weights are not mixed."""
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    ratio = (weights[0, 0] * weights[1, 1] / weights[0, 1] / weights[1, 0]).sqrt()
    expected = ratio / (1 + ratio)  # the limit of scaling the weights themselves
    assert torch.allclose(sinkhorn(weights.log())[0, 0], expected, atol=CELLS)
    assert not torch.allclose(sinkhorn(weights)[0, 0], expected, atol=0.1)
    squared = (weights**2).log()
    assert torch.allclose(sinkhorn(weights.log(), 0.5), sinkhorn(squared), atol=CELLS)


def test_tolerance_is_followed() -> None:
    """An option that changes nothing is a fault: a strict tolerance gives better sums,
    an impossible one says so."""
    X = scores(8, 30, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert residual(sinkhorn(X, 0.1, tol=0.1)) <= 0.1
        assert residual(sinkhorn(X, 0.1, tol=1e-12)) <= 1e-12
    with pytest.warns(ConvergenceWarning):
        sinkhorn(X, 0.1, tol=1e-18)


def test_convergence_warning_is_one_and_carries_the_numbers() -> None:
    X = scores(8, 50, 50).requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_P = log_sinkhorn(X, 0.02, tol=1e-18)
        log_P.exp()[..., 0].sum().backward()
    ours = [w.message for w in caught if isinstance(w.message, ConvergenceWarning)]
    assert len(ours) == 1  # not one for each batch element, and none from backward
    (warning,) = ours
    assert 0 < warning.residual <= SUMS
    assert warning.iterations >= 1
    text = str(warning)
    assert f"after {warning.iterations} steps" in text
    assert f"off by {warning.residual:.3g} (tolerance 1e-18)" in text
    assert text.endswith("Raise the temperature, or pass a larger tol.")


def test_warning_says_what_is_off_and_points_at_the_caller(monkeypatch) -> None:
    """The sums come right before the logs do, and no larger tol helps then."""
    monkeypatch.setattr(sinkhorn_solvers, "_MOST_STEPS", 3)
    for X in (scores(8, 50, 50), scores(8, 50, 50).requires_grad_()):
        with pytest.warns(ConvergenceWarning, match="log of a small entry off") as all_:
            log_P = log_sinkhorn(X, 0.02, tol=0.5)
        assert residual(log_P.detach().exp()) <= 0.5
        assert [w.filename for w in all_] == [__file__]
        assert "tol" not in str(all_[0].message).rsplit(").", 1)[1]
    nameless: dict[str, Any] = {}  # as torch.fx and exec leave it
    exec("def call(f, x): return f(x, 0.02)", nameless)
    with pytest.warns(ConvergenceWarning):
        nameless["call"](log_sinkhorn, X)


def test_no_warning_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_sinkhorn(scores(20, 20), 0.02, tol=1e-6)


# Values


def test_two_items_in_closed_form() -> None:
    X = scores(100, 2, 2, scale=3.0)
    for tau in (1.0, 0.1, 0.01):
        contrast = X[:, 0, 0] + X[:, 1, 1] - X[:, 0, 1] - X[:, 1, 0]
        z = contrast / (2 * tau)
        log_P = log_sinkhorn(X, tau)
        on, off = -torch.nn.functional.softplus(-z), -torch.nn.functional.softplus(z)
        expected = torch.stack([on, off, off, on], -1).reshape(100, 2, 2)
        assert (log_P - expected).abs().max() < LOG_VALUES


@pytest.mark.parametrize("tau", [3.0, 1.0, 0.5])
def test_equals_the_plain_loop_run_to_the_end(tau: float) -> None:
    X = scores(3, 6, 6)
    expected = oracles.plain_sinkhorn(X, tau, iterations=3000)
    assert (log_sinkhorn(X, tau) - expected).abs().max() < LOG_VALUES


def test_near_permutation_log_is_balanced() -> None:
    """Sums that are right to the last bit leave log P free by hundreds of nats."""
    log_P = log_sinkhorn(torch.tensor([[0.0, -1.0], [-3.0, 0.0]]), 0.01)
    expected = torch.tensor([[0.0, -200.0], [-200.0, 0.0]])
    assert (log_P - expected).abs().max() < LOG_VALUES


@pytest.mark.parametrize("scale", [0.0, 3.0, 10.0])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_logs_against_high_precision(n: int, tau: float, scale: float) -> None:
    """log P, its sum and log T(P), where double precision sums say nothing about it."""
    X = scale * torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    expected = oracles.precise_sinkhorn(X, tau)
    log_P = log_sinkhorn(X, tau)
    assert (log_P - expected).abs().max() < LOG_VALUES
    assert abs(log_P.sum() - expected.sum()) < LOG_VALUES
    trees = oracles.precise_log_trees(expected)
    assert abs(log_spanning_trees(log_P) - trees) < LOG_VALUES


@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_logs_against_high_precision_with_clusters(tau: float) -> None:
    """Pairs tied strongly to each other and only weakly to the rest."""
    near, far = torch.tensor([[0.0, -0.3], [-0.2, 0.0]]), torch.full((2, 2), -9.0)
    far_back = torch.tensor([[-12.0, -15.0], [-11.0, -14.0]])
    X = torch.cat([torch.cat([near, far], 1), torch.cat([far_back, near.mT], 1)], 0)
    expected = oracles.precise_sinkhorn(X, tau)
    assert (log_sinkhorn(X, tau) - expected).abs().max() < LOG_VALUES


def test_logs_against_high_precision_with_mask() -> None:
    X = 5 * torch.randn(4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 3] = mask[1, 0] = mask[2, 1] = False
    for tau in (1.0, 0.05):
        expected = oracles.precise_sinkhorn(X, tau, mask=mask)
        log_P = log_sinkhorn(X, tau, mask=mask)
        assert torch.equal(log_P.isneginf(), expected.isneginf())
        assert (log_P - expected)[mask].abs().max() < LOG_VALUES


def test_logs_against_high_precision_with_marginals() -> None:
    X = 4 * torch.randn(4, 4)
    marginals = torch.tensor([1.0, 2.0, 0.5, 3.5]), torch.tensor([2.0, 2.0, 2.5, 0.5])
    for tau in (1.0, 0.1):
        expected = oracles.precise_sinkhorn(X, tau, marginals)
        log_P = log_scaling(X / tau, matching_graph(None, (4, 4)), marginals)
        assert (log_P - expected).abs().max() < LOG_VALUES


def test_marginals_are_met() -> None:
    X = scores(3, 20, 20)
    rows = torch.rand(3, 20) + 0.5
    columns = torch.rand(3, 20) + 0.5
    columns = columns * (rows.sum(-1) / columns.sum(-1))[:, None]
    P = log_scaling(X / 0.2, matching_graph(None, (20, 20)), (rows, columns)).exp()
    assert (P.sum(-1) - rows).abs().max() < SUMS
    assert (P.sum(-2) - columns).abs().max() < SUMS


def test_marginals_equal_to_the_counts_of_a_mask() -> None:
    """The scaling that the density uses: the mean entry is one, not the mean sum."""
    mask = torch.rand(8, 8) < 0.7
    mask |= torch.eye(8, dtype=torch.bool)
    support = oracles.total_support(mask)
    counts = support.sum(-1).double(), support.sum(-2).double()
    Q = log_scaling(scores(8, 8), matching_graph(mask, (8, 8)), counts).exp()
    assert (Q.sum(-1) - counts[0]).abs().max() < 10 * SUMS
    assert (Q.sum(-2) - counts[1]).abs().max() < 10 * SUMS
    assert not Q[~support].any()


def test_equal_scores_give_the_uniform_matrix() -> None:
    for n in (1, 2, 7, 50):
        for value in (0.0, -800.0, 1e6):
            log_P = log_sinkhorn(torch.full((n, n), value), 0.01)
            assert torch.allclose(log_P, torch.full((n, n), -math.log(n)))


def test_ties_share_their_mass() -> None:
    """Two equal items: half and half, and the sums still one, at any temperature."""
    items = torch.tensor([1.0, 1.0, 2.0])
    X = torch.outer(items, torch.tensor([1.0, 2.0, 3.0]))
    P = sinkhorn(X, 0.01)
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert (P - expected).abs().max() < SUMS
    assert residual(P) <= SUMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_underflow_is_not_answered_by_the_uniform_matrix(dtype: torch.dtype) -> None:
    """Scores that all underflow after exponentiation still say which match is best."""
    for match in (torch.eye(4), torch.eye(4).roll(1, 0)):
        P = sinkhorn((-1e4 * (1 - match)).to(dtype), 1.0)
        assert (P - match).abs().max() < 1e-6


def test_tiny_temperature_gives_the_permutation_without_a_warning() -> None:
    match = torch.eye(12)[torch.randperm(12)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        P = sinkhorn((-800 * (1 - match)).float(), 0.01)
    assert (P - match).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_scores_do_not_overflow(dtype: torch.dtype) -> None:
    X = (300 * torch.randn(8, 8)).to(dtype).requires_grad_()
    log_P = log_sinkhorn(X, 0.05)
    assert log_P.isfinite().all()
    assert residual(log_P.exp()) <= FLOAT32_SUMS
    (log_P.exp() * torch.randn(8, 8, dtype=dtype)).sum().backward()
    assert X.grad is not None
    assert X.grad.isfinite().all()


@pytest.mark.parametrize("tau", [0.05, 0.01, 0.001])
def test_log_stays_finite_where_cells_underflow(tau: float) -> None:
    """log P comes from the log domain: nothing is exponentiated and logged again."""
    for X in (scores(20, 30, 30), torch.eye(5) * 5 - 5, torch.eye(2) * 5 - 5):
        log_P = log_sinkhorn(X, tau)
        assert log_P.isfinite().all()
        off = log_P.flatten(-2).amin(-1)
        assert (off < -2 / tau).all()


def test_float32_agrees_with_float64() -> None:
    X = scores(4, 50, 50).float()
    single, double = log_sinkhorn(X, 0.05), log_sinkhorn(X.double(), 0.05)
    assert single.dtype == torch.float32
    assert single.isfinite().all()
    assert (single - double).abs().max() < 1e-6 * double.abs().max()
    assert (single.exp() - double.exp()).abs().max() < FLOAT32_SUMS


# Invariances and batches


def test_row_and_column_shifts_change_nothing() -> None:
    X = scores(5, 5)
    shift = 100 * torch.randn(5, 1) + 100 * torch.randn(1, 5)
    for tau in (1.0, 0.05):
        assert (log_sinkhorn(X, tau) - log_sinkhorn(X + shift, tau)).abs().max() < 1e-7


def test_relabelling_rows_and_columns_relabels_the_result() -> None:
    X = scores(6, 6)
    rows, columns = torch.randperm(6), torch.randperm(6)
    for tau in (1.0, 0.05):
        expected = log_sinkhorn(X, tau)[rows][:, columns]
        assert (log_sinkhorn(X[rows][:, columns], tau) - expected).abs().max() < 1e-7
        assert (log_sinkhorn(X.mT, tau) - log_sinkhorn(X, tau).mT).abs().max() < 1e-7


def test_a_batch_is_a_loop_of_single_calls() -> None:
    """Every element is solved for itself, whatever its neighbours need."""
    scale = torch.tensor([0.0, 0.1, 1.0, 10.0, 100.0, 1000.0])[:, None, None]
    X = (scale * torch.randn(6, 4, 4)).requires_grad_()
    weight = torch.randn(6, 4, 4)
    batch = log_sinkhorn(X, 0.5)
    (gradient,) = torch.autograd.grad((batch.exp() * weight).sum(), X)
    for k in range(6):
        x = X[k].detach().requires_grad_()
        one = log_sinkhorn(x, 0.5)
        (g,) = torch.autograd.grad((one.exp() * weight[k]).sum(), x)
        assert (batch[k] - one).abs().max() < 1e-7
        assert (gradient[k] - g).abs().max() < 1e-7
    assert (gradient[:3].abs().amax((-1, -2)) > 1e-6).all()


def test_leading_dimensions_of_any_shape() -> None:
    X = scores(2, 3, 4, 5, 5)
    assert log_sinkhorn(X).shape == (2, 3, 4, 5, 5)
    assert torch.allclose(log_sinkhorn(X)[1, 2, 3], log_sinkhorn(X[1, 2, 3]))
    for shape in [(0, 3, 3), (2, 0, 3, 3), (1, 1, 1)]:
        assert log_sinkhorn(torch.zeros(shape)).shape == shape
    strided = scores(5, 5, 7).permute(2, 1, 0)
    assert torch.allclose(sinkhorn(strided), sinkhorn(strided.contiguous()), atol=CELLS)
    shared = scores(5, 5).expand(3, 5, 5)
    assert torch.allclose(sinkhorn(shared)[2], sinkhorn(shared[0].clone()), atol=CELLS)


def test_a_temperature_for_each_element() -> None:
    X = scores(3, 5, 5)
    tau = torch.tensor([2.0, 0.3, 0.05])
    batch = log_sinkhorn(X, tau)
    for k in range(3):
        assert (batch[k] - log_sinkhorn(X[k], tau[k])).abs().max() < 1e-7
    spread = log_sinkhorn(X[0], tau)  # one matrix at three temperatures
    assert spread.shape == (3, 5, 5)
    assert (spread[2] - log_sinkhorn(X[0], 0.05)).abs().max() < 1e-7
    assert log_sinkhorn(X[0].float(), torch.tensor(0.5)).dtype == torch.float32


# Gradients


@pytest.mark.parametrize("function", [sinkhorn, log_sinkhorn])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_gradient_equals_that_of_the_unrolled_loop(function, tau: float) -> None:
    X = scores(2, 5, 5).requires_grad_()
    t = torch.tensor(tau, requires_grad=True)
    weight = torch.randn(2, 5, 5)
    loop = oracles.plain_sinkhorn(X, t, iterations=2000)
    loop = loop.exp() if function is sinkhorn else loop
    expected = torch.autograd.grad((loop * weight).sum(), (X, t))
    actual = torch.autograd.grad((function(X, t) * weight).sum(), (X, t))
    for e, a in zip(expected, actual, strict=True):
        assert (e - a).abs().max() < 1e-6 * (1 + e.abs().max())


@pytest.mark.parametrize("function", [sinkhorn, log_sinkhorn])
def test_gradcheck(function) -> None:
    """First and second order in the scores and in the temperature, one and batched."""
    X = scores(2, 4, 4).requires_grad_()
    for t in (torch.tensor(0.5), torch.tensor([0.7, 1.3])):
        inputs = (X, t.requires_grad_())
        # The solve is to about 1e-9, which finite differences see divided by the step.
        assert torch.autograd.gradcheck(function, inputs, eps=1e-4, atol=1e-4)
    small = (X[0, :3, :3].detach().requires_grad_(), torch.tensor(0.8).requires_grad_())
    assert torch.autograd.gradgradcheck(function, small, eps=1e-4, atol=1e-3)


def test_gradcheck_with_mask_and_marginals() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 3] = mask[1, 0] = False
    counts = mask.sum(-1).double(), mask.sum(-2).double()
    X = scores(4, 4).requires_grad_()

    def scaled(x: Tensor, t: Tensor) -> Tensor:
        return log_scaling(x / t, matching_graph(mask, (4, 4)), counts)[mask]

    inputs = (X, torch.tensor(0.6, requires_grad=True))
    assert torch.autograd.gradcheck(scaled, inputs, eps=1e-4, atol=1e-4)
    assert torch.autograd.gradgradcheck(scaled, inputs, eps=1e-4, atol=1e-3)


def test_gradient_at_the_uniform_matrix() -> None:
    """dP/dX there is (I - J/n) x (I - J/n) / (n tau), with no regularisation left."""
    n, tau = 5, 0.5
    centre = torch.eye(n) - 1 / n
    expected = torch.einsum("ik,jl->ijkl", centre, centre) / (n * tau)
    X = torch.zeros(n, n)
    assert torch.allclose(jacrev(lambda x: sinkhorn(x, tau))(X), expected, atol=1e-9)
    actual = jacrev(lambda x: log_sinkhorn(x, tau))(X)
    assert torch.allclose(actual, n * expected, atol=1e-9)


@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_gradient_of_the_log_at_a_near_permutation(tau: float) -> None:
    """d log P12 / d X11 = - P11 / (2 tau) for two items: a ridge would double it."""
    X = torch.tensor([[0.0, -1.0], [-3.0, 0.0]])
    J = jacrev(lambda x: log_sinkhorn(x, tau))(X)
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    P = sinkhorn(X, tau)
    expected = sign[:, :, None, None] * sign * (1 - P)[:, :, None, None] / (2 * tau)
    assert (J - expected).abs().max() < 1e-6 / tau


@pytest.mark.parametrize("tau", [0.2, 0.05])
def test_gradient_of_the_log_against_high_precision(tau: float) -> None:
    """Central differences of the high-precision reference, at near permutations."""
    X = 2 * torch.randn(3, 3)
    X[0] *= 3
    J = jacrev(lambda x: log_sinkhorn(x, tau))(X)
    step = 1e-3 * tau  # truncation is (step / tau)^2, rounding 1e-12 / step
    for k, l in [(0, 0), (1, 2), (2, 1)]:
        change = torch.zeros(3, 3)
        change[k, l] = step
        up = oracles.precise_sinkhorn(X + change, tau)
        down = oracles.precise_sinkhorn(X - change, tau)
        expected = (up - down) / (2 * step)
        assert (J[:, :, k, l] - expected).abs().max() < 1e-4 / tau


@pytest.mark.parametrize("tau", [1.0, 0.3, 0.1, 0.05, 0.01, 1e-3])
def test_gradients_are_finite_at_every_temperature(tau: float) -> None:
    cost = torch.randn(8, 8)
    for X in (scores(4, 8, 8), 5 * torch.randn(4, 8, 8), 20 * torch.eye(8)):
        for function in (sinkhorn, log_sinkhorn):
            x = X.clone().requires_grad_()
            t = torch.tensor(tau, requires_grad=True)
            (function(x, t) * cost).sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all()
            assert t.grad is not None
            assert t.grad.isfinite()


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01])
def test_gradient_of_many_items(tau: float) -> None:
    """Finite, free of shifts, and the derivative along a direction is right."""
    X, direction, cost = (
        scores(100, 100),
        scores(100, 100, seed=1),
        torch.randn(100, 100),
    )
    x = X.clone().requires_grad_()
    ((sinkhorn(x, tau) * cost).sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    size = x.grad.abs().max()
    assert x.grad.sum(-1).abs().max() < 1e-4 * size
    assert x.grad.sum(-2).abs().max() < 1e-4 * size
    step = 1e-3 * tau
    up, down = (
        log_sinkhorn(X + sign * step * direction, tau).exp() for sign in (1, -1)
    )
    expected = ((up - down) * cost).sum() / (2 * step)
    # The solution that is differentiated has its sums within 1e-6.
    assert abs((x.grad * direction).sum() - expected) < 1e-3 * (1 + abs(expected))


@pytest.mark.parametrize("tau", [1.0, 0.3, 0.1])
def test_gradients_are_those_of_the_limit(tau: float) -> None:
    """Ten items. Sums within the tolerance are not enough at low temperatures, where
    gradients magnify their errors: many matrices, against the logarithm's gradient,
    and that against differences in high precision along a direction."""
    X, weight = scores(256, 10, 10).requires_grad_(), torch.randn(256, 10, 10)
    gradients = [
        torch.autograd.grad((f(X, tau) * weight).sum(), X)[0]
        for f in (sinkhorn, lambda *x: log_sinkhorn(*x).exp())
    ]
    error = (gradients[0] - gradients[1]).abs().amax((-2, -1))
    assert (error / gradients[1].abs().amax((-2, -1))).max() < GRADIENTS
    step = 1e-4 * tau * torch.randn(10, 10).sign()  # truncation is its square
    x, weight = X[0].detach(), weight[0]
    up, down = (oracles.precise_sinkhorn(x + h, tau) for h in (step, -step))
    for function in (sinkhorn, lambda *x: log_sinkhorn(*x).exp(), log_sinkhorn):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad((function(x, tau) * weight).sum(), x)
        change = up - down if function is log_sinkhorn else up.exp() - down.exp()
        expected = (change * weight).sum() / 2
        size = g.abs().max() * step.abs().max()
        assert abs((g * step).sum() - expected) < GRADIENTS * size


def test_gradient_at_tiny_temperature_of_nearly_tied_scores() -> None:
    values = torch.tensor([0.1, 0.3, 0.5, 0.03, 0.2, 0.15, 0.65, 0.7, 0.9])
    X = torch.outer(values, torch.arange(1.0, 10.0)).requires_grad_()
    P = sinkhorn(X, 1e-4)
    assert residual(P) <= SUMS
    (P @ torch.arange(9.0)).dot(torch.randn(9)).backward()
    assert X.grad is not None
    assert X.grad.isfinite().all()


def test_gradient_does_not_vanish_through_the_operator() -> None:
    """The scorer behind the layer learns about as fast as behind a softmax."""
    X = torch.randn(8, 8).requires_grad_()
    cost = torch.randn(8, 8)
    norms = [
        torch.autograd.grad((f(X) * cost).sum(), X)[0].norm()
        for f in (sinkhorn, lambda x: x.softmax(-1))
    ]
    assert norms[1] / 100 < norms[0] < norms[1] * 100


def test_gradient_is_free_of_shifts() -> None:
    X = scores(6, 6).requires_grad_()
    (sinkhorn(X, 0.3) * torch.randn(6, 6)).sum().backward()
    assert X.grad is not None
    assert X.grad.sum(-1).abs().max() < 1e-8
    assert X.grad.sum(-2).abs().max() < 1e-8


def test_memory_does_not_grow_with_the_iterations() -> None:
    """What is kept for the backward pass is the same for easy and hard scores."""

    def kept(tau: float) -> int:
        sizes: list[int] = []

        def pack(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        X = scores(20, 20).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            log_sinkhorn(X, tau)
        return sum(sizes)

    easy, hard = kept(10.0), kept(0.01)
    assert easy == hard
    assert easy <= 10 * 20 * 20  # a handful of matrices


@pytest.mark.parametrize(("batch", "n"), [(16, 100), (2, 278)])
def test_memory_is_that_of_a_few_matrices(batch: int, n: int) -> None:
    """At most 16 times the scores in float32, at the peak of forward and backward."""
    X, weight = scores(batch, n, n), torch.randn(batch, n, n)

    def gradient() -> Tensor:
        leaf = X.clone().requires_grad_()
        return torch.autograd.grad((sinkhorn(leaf, 0.01) * weight).sum(), leaf)[0]

    assert peak_bytes(gradient) < 16 * 4 * X.numel()


@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize(("batch", "n"), [(16, 100), (8, 150)])
def test_memory_where_elements_differ(batch: int, n: int, forbidden: bool) -> None:
    """Some temperatures are low, so that parts of the batch are copied and go on."""
    X = scores(batch, n, n)
    if forbidden:
        X[:, 0, 1::2] = -torch.inf
    weight = scores(batch, n, n, seed=1)
    tau = torch.logspace(0, -2, batch)

    def gradient() -> Tensor:
        leaf = X.clone().requires_grad_()
        return torch.autograd.grad((sinkhorn(leaf, tau) * weight).sum(), leaf)[0]

    gradient()
    assert peak_bytes(gradient) < 16 * 4 * X.numel()


# Speed: what is counted here does not depend on the machine


SMALL, MEDIUM, LARGE = (64, 10), (16, 100), (2, 278)


@pytest.mark.parametrize(
    ("size", "tau", "most"),
    [
        # A step or two more than they take.
        *((SMALL, tau, most) for tau, most in ((1.0, 8), (0.1, 10), (0.01, 13))),
        *((MEDIUM, tau, most) for tau, most in ((1.0, 11), (0.1, 22), (0.01, 32))),
        *((LARGE, tau, most) for tau, most in ((1.0, 10), (0.1, 21), (0.01, 31))),
    ],
)
def test_few_steps_and_no_fallback(
    size: tuple[int, int], tau: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve(*_: object, **__: object) -> None:
        raise AssertionError("the fast solver was not enough")

    module = sys.modules["pyro_permutations.sinkhorn"]
    assert module.solve is sinkhorn_solvers.solve
    monkeypatch.setattr(module, "solve", solve)
    batch, n = size
    X, one = scores(batch, n, n), torch.ones(batch, 1, n)
    assert residual(sinkhorn(X, tau)) <= SUMS
    scaling = scale_kernel(X / tau, one, one, SUMS, slack=False, masked=False)
    assert scaling.iterations <= most


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("kind", ["full", "masked", "slack", "sums"])
def test_squaring_equals_products(kind: str, tau: float) -> None:
    """Small kernels have an algorithm of their own: it finds what the other does."""
    n, slack = 12, kind == "slack"
    X = scores(6, n, n) / tau
    rows, columns = torch.ones(6, 1, n), torch.ones(6, 1, n)
    if kind == "sums":
        rows, columns = 1 + torch.arange(2.0).repeat(n // 2), torch.full((n,), 1.5)
        rows, columns = rows.expand(6, 1, n), columns.expand(6, 1, n)
    if kind == "masked":
        forbidden = (torch.arange(n)[:, None] + torch.arange(n)) % 4 == 1
        X[3:] = torch.where(forbidden, -torch.inf, X[3:])
    if slack:
        X[:, -1, -1] = WIRE
    case = {"tol": 1e-10, "slack": slack, "masked": kind == "masked"}
    squared, _ = scale_by_squaring(X, rows, columns, **case)
    products, _ = _scale_by_products(X, rows, columns, **case)
    assert max(float(squared[2].max()), float(products[2].max())) <= 1e-10
    assert (squared[0] - products[0])[..., :-1, :-1].abs().max() < 1e-8
    if kind == "masked":
        assert (squared[0][3:][forbidden.expand(3, n, n)] == 0).all()


def test_sums_that_are_right_at_every_temperature() -> None:
    """Nothing to balance, but the temperature has to fall all the same."""
    x = torch.tensor([[0.0, -50.0], [-50.0, 0.0]])
    p = sinkhorn(torch.stack([x, x / 10]))[:, 0, 1]
    expected = torch.sigmoid(torch.tensor([-50.0, -5.0]))
    assert torch.allclose(p, expected, rtol=EXACT, atol=0)


def test_hopeless_element_spoils_no_other() -> None:
    """One that Newton gives up at a high temperature: the others are solved, too."""
    mask = torch.ones(20, 20, dtype=torch.bool).tril(1)
    hard = torch.where(mask, scores(20, 20, scale=2e4), -torch.inf)
    X = torch.stack([hard, scores(20, 20), scores(20, 20, seed=1)])
    p = sinkhorn(X)
    assert residual(p) <= SUMS
    assert (p[1:] - sinkhorn(X[1:])).abs().max() < CELLS


def test_quick_elements_do_not_wait_for_slow_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Matrix entries that products with vectors read: little more than separately."""
    module = sys.modules["pyro_permutations.kernel_newton"]
    times, read = module.times, [0]

    def counted(x: Tensor, matrix: Tensor) -> Tensor:
        read[0] += matrix.numel()
        return times(x, matrix)

    def entries(X: Tensor, tau: Tensor | float) -> int:
        read[0] = 0
        sinkhorn(X, tau)
        return read[0]

    monkeypatch.setattr(module, "times", counted)
    X = scores(16, 100, 100)
    tau = torch.ones(16)
    tau[3] = 0.01
    apart = entries(X[tau == 1], 1.0) + entries(X[3], 0.01)
    assert entries(X, tau) < 1.3 * apart


@pytest.mark.parametrize(("batch", "n"), [(64, 10), (16, 100)])
def test_elements_whose_log_is_done_do_not_wait_either(
    batch: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that are factorized: little more than those of the elements apart."""
    module = sys.modules["pyro_permutations.resistor_network"]
    factor, made = module.Network.cholesky, [0]

    def counted(self, *tolerance):
        made[0] += len(self.p)
        return factor(self, *tolerance)

    def factors(X: Tensor, tau: Tensor | float) -> int:
        made[0] = 0
        log_sinkhorn(X, tau)
        return made[0]

    monkeypatch.setattr(module.Network, "cholesky", counted)
    X, tau = scores(batch, n, n), torch.ones(batch)
    tau[3] = 0.01
    apart = factors(X[tau == 1], 1.0) + factors(X[3], 0.01)
    assert factors(X, tau) < 1.8 * apart  # a colder start costs each a step


@pytest.mark.parametrize("hard", [1, 3])
def test_what_newton_gives_up_is_given_up_alone(
    hard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a high temperature, by scores on a band that are large: others go on."""
    module = sys.modules["pyro_permutations.kernel_scaling"]
    products, sizes = module._scale_by_products, []

    def counted(scores: Tensor, *arguments: Tensor, **options: object):
        sizes.append(len(scores))
        return products(scores, *arguments, **options)

    monkeypatch.setattr(module, "_scale_by_products", counted)
    n = 38
    band = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 1
    X = scores(6, n, n)
    X[:hard] *= 1e6
    P = sinkhorn(X, mask=band)
    assert residual(P) <= SUMS
    assert sum(sizes) <= hard
    assert sizes


def test_no_denormal_number_slows_the_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["pyro_permutations.kernel_squaring"]
    factor, least = module._factor, [1.0]

    def seen(p: Tensor, sums: Tensor) -> Tensor:
        least[0] = min(
            least[0], float((p.mT @ p)[:, 0, 0].amin()), float(p.amin()) ** 2
        )
        return factor(p, sums)

    monkeypatch.setattr(module, "_factor", seen)
    assert residual(sinkhorn(scores(64, 10, 10), 0.001)) <= SUMS
    assert 1e-300 < least[0] < 1e-150


@pytest.mark.parametrize("kind", ["deep", "hopeless"])
def test_small_elements_do_not_wait_for_hard_ones(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices that are factorized: little more than those of the elements apart."""
    module = sys.modules["pyro_permutations.kernel_squaring"]
    factor, made = module._factor, [0]

    def counted(p: Tensor, sums: Tensor) -> Tensor:
        made[0] += len(p)
        return factor(p, sums)

    def factors(X: Tensor) -> int:
        made[0] = 0
        p = sinkhorn(X)
        assert residual(p) <= SUMS
        return made[0]

    monkeypatch.setattr(module, "_factor", counted)
    X = scores(400, 10, 10)
    X[7] = 1e3 * X[7] if kind == "deep" else torch.ones(10, 10).tril() * 2e4
    apart = sum(factors(x) for x in X.split(8))
    assert factors(X) < 1.3 * apart
    assert (sinkhorn(X)[7] - sinkhorn(X[7])).abs().max() < CELLS


# Program transformations


@pytest.mark.parametrize("function", [sinkhorn, log_sinkhorn])
@pytest.mark.parametrize("n", [5, 60])  # factorized, and by conjugate gradients
def test_many_gradients_at_once(n: int, function) -> None:
    """What ``jacobian(vectorize=True)`` asks for, too."""
    X = scores(2, n, n).requires_grad_()
    P = function(X, 0.3)
    G = scores(3, 2, n, n, seed=1)
    (found,) = torch.autograd.grad(P, X, G, is_grads_batched=True, retain_graph=True)
    for g, one in zip(G, found, strict=True):
        (expected,) = torch.autograd.grad(P, X, g, retain_graph=True)
        assert (one - expected).abs().max() < GRADIENTS * expected.abs().max()


def test_vmap_over_the_sums() -> None:
    X = scores(4, 4)
    rows = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, 1.5, 1.2, 0.8]])
    graph = matching_graph(None, shape=(4, 4))

    def scaled(r: Tensor) -> Tensor:
        return log_scaling(X, graph, (r, torch.ones(4)))

    expected = torch.stack([scaled(r) for r in rows])
    assert (vmap(scaled)(rows) - expected).abs().max() < EXACT


def test_vmap_over_scores_and_temperature() -> None:
    X, tau = scores(3, 4, 4), torch.tensor([1.0, 0.3, 0.1])
    for function in (partial(sinkhorn, tol=EXACT), log_sinkhorn):
        expected = torch.stack([function(x, t) for x, t in zip(X, tau, strict=True)])
        assert (vmap(function)(X, tau) - expected).abs().max() < 1e-7
        shared = vmap(function, in_dims=(0, None))(X, tau[1])
        assert (shared - function(X, tau[1])).abs().max() < 1e-7
        spread = vmap(function, in_dims=(None, 0))(X[0], tau)
        assert (spread - function(X[0], tau)).abs().max() < 1e-7
        moved = vmap(function, in_dims=(-1, None))(X.permute(1, 2, 0), 0.5)
        assert (moved - function(X, 0.5)).abs().max() < 1e-7
    nested = vmap(vmap(lambda x: sinkhorn(x, 0.5)))(X.expand(2, 3, 4, 4))
    assert (nested[1] - sinkhorn(X, 0.5)).abs().max() < CELLS


def test_vmap_over_a_batch_with_temperatures() -> None:
    X, tau = scores(5, 3, 4, 4), torch.tensor([1.0, 0.3, 0.1])
    expected = log_sinkhorn(X, tau)
    assert (vmap(log_sinkhorn, (0, None))(X, tau) - expected).abs().max() < 1e-7
    each = tau * torch.rand(5, 1).add(1)
    expected = torch.stack([log_sinkhorn(x, t) for x, t in zip(X, each, strict=True)])
    assert (vmap(log_sinkhorn)(X, each) - expected).abs().max() < 1e-7


def test_vmap_with_mask() -> None:
    X = scores(5, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 1] = False
    mapped = vmap(lambda x: sinkhorn(x, 0.5, mask=mask))(X)
    assert (mapped - sinkhorn(X, 0.5, mask=mask)).abs().max() < CELLS


def test_vmap_of_grad() -> None:
    weight = torch.randn(4, 4)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return (log_sinkhorn(x, t) * weight).sum()

    X, tau = scores(3, 4, 4), torch.tensor([1.0, 0.5, 0.2])
    gx, gt = vmap(grad(loss, argnums=(0, 1)))(X, tau)
    for k in range(3):
        x, t = X[k].clone().requires_grad_(), tau[k].clone().requires_grad_()
        ex, et = torch.autograd.grad(loss(x, t), (x, t))
        assert (gx[k] - ex).abs().max() < 1e-6
        assert (gt[k] - et).abs() < 1e-5


def test_second_derivatives_equal_those_of_the_unrolled_loop() -> None:
    weight = torch.randn(3, 3)
    X = scores(3, 3)

    def ours(x: Tensor) -> Tensor:
        return (sinkhorn(x, 0.7) * weight).sum()

    def loop(x: Tensor) -> Tensor:
        return (oracles.plain_sinkhorn(x, 0.7, 500).exp() * weight).sum()

    expected = torch.autograd.functional.hessian(loop, X)
    assert (jacrev(jacrev(ours))(X) - expected).abs().max() < 1e-6
    batch = vmap(jacrev(jacrev(ours)))(torch.stack([X, X.mT]))
    assert (batch[0] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("tau", [0.5, 0.1, 0.05, 0.01])
def test_second_derivatives_of_the_log_at_low_temperature(tau: float) -> None:
    """They vanish there: what rounding leaves in a cluster is not to be divided by the
    tie to the next. In closed form log P = -softplus(-+z), z half the contrast."""
    X = torch.tensor([[0.0, -1.0], [-3.0, 0.0]])
    weight = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    H = torch.autograd.functional.hessian(
        lambda x: (log_sinkhorn(x, tau) * weight).sum(), X
    )
    z = torch.tensor(4.0 / (2 * tau))
    bend = torch.sigmoid(z) * torch.sigmoid(-z) / (2 * tau) ** 2
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    expected = -weight.sum() * bend * sign[:, :, None, None] * sign
    # In units of the temperature, where the solves are right to 1e-9 of their source.
    assert (H - expected).abs().max() < 1e-8 / tau**2
    for n in (3, 10):
        x, g = scores(n, n, seed=9), scores(n, n, seed=1)
        H = torch.autograd.functional.hessian(
            lambda x, g=g: (log_sinkhorn(x, tau) * g).sum(), x
        )
        H = H.reshape(n * n, n * n)
        assert (H - H.mT).abs().max() < 1e-8 / tau**2


def test_forward_mode_is_refused() -> None:
    """Refused with an error, never answered with zeros."""
    X = scores(3, 3)
    with pytest.raises((NotImplementedError, RuntimeError)):
        jvp(lambda x: sinkhorn(x, 0.7), (X,), (torch.ones(3, 3),))
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        sinkhorn(forward_ad.make_dual(X, torch.ones(3, 3)), 0.7)
    with pytest.raises((NotImplementedError, RuntimeError)):
        hessian(lambda x: sinkhorn(x, 0.7).square().sum())(X)


@TRACING
def test_traced_function_follows_its_input() -> None:
    """The number of iterations is not frozen at that of the example.

    Nor does the trace see the graph of a size that is met for the first time.
    """
    sys.modules["pyro_permutations.matching_graph"]._full.cache_clear()
    easy, hard = 0.01 * torch.randn(2, 8, 8), scores(2, 8, 8, scale=30.0)
    for function in (sinkhorn, log_sinkhorn):
        traced = torch.jit.trace(function, (easy, torch.tensor(1.0)))
        actual = traced(hard, torch.tensor(0.05))
        assert (actual - function(hard, 0.05)).abs().max() < 1e-7
        x = hard.clone().requires_grad_()
        y = hard.clone().requires_grad_()
        weight = torch.randn(2, 8, 8)
        (traced(x, torch.tensor(0.5)) * weight).sum().backward()
        (function(y, 0.5) * weight).sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert (x.grad - y.grad).abs().max() < 1e-7


# Masks


def test_masked_equals_the_submatrix() -> None:
    """Four valid rows of six: the padding is solved away and gets no gradient."""
    X = scores(6, 6).requires_grad_()
    mask = torch.eye(6, dtype=torch.bool)
    mask[:4, :4] = True
    weight = torch.randn(6, 6)
    for tau in (1.0, 0.05):
        P = sinkhorn(X, tau, mask=mask)
        assert (P[:4, :4] - sinkhorn(X[:4, :4], tau)).abs().max() < CELLS
        assert torch.equal(P[4:, 4:], torch.eye(2))
        (g,) = torch.autograd.grad((P * weight).sum(), X)
        assert not g[4:].any()
        assert not g[:, 4:].any()
        assert g[:4, :4].any()


@ANOMALY
def test_forbidden_cells_are_exactly_zero_with_exactly_zero_gradient() -> None:
    X = scores(3, 4, 4).requires_grad_()
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 2] = mask[3, 0] = False
    with torch.autograd.detect_anomaly(check_nan=True):
        log_P = log_sinkhorn(X, 0.5, mask=mask)
        assert log_P[:, ~mask].isneginf().all()
        (g,) = torch.autograd.grad((log_P[:, mask] * torch.randn(13)).sum(), X)
    assert not g[:, ~mask].any()
    assert g[:, mask].isfinite().all()
    assert g[:, mask].any()
    P = sinkhorn(X, 0.5, mask=mask)
    assert not P[:, ~mask].any()
    (g,) = torch.autograd.grad((P * torch.randn(4, 4)).sum(), X)
    assert not g[:, ~mask].any()
    assert g.isfinite().all()


@ANOMALY
def test_minus_infinity_is_a_forbidden_cell() -> None:
    """The same as a mask, and no NaN in any gradient, the temperature's included."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 2] = mask[3, 0] = False
    X = scores(4, 4)
    inf = X.masked_fill(~mask, -math.inf)
    weight = torch.randn(4, 4)
    gradients = []
    with torch.autograd.detect_anomaly(check_nan=True):
        for x, m in ((X, mask), (inf, None), (inf, mask)):
            x = x.clone().requires_grad_()
            t = torch.tensor(0.5, requires_grad=True)
            P = sinkhorn(x, t, mask=m)
            assert not P[~mask].any()
            gradients.append(torch.autograd.grad((P * weight).sum(), (x, t)))
    for g, gt in gradients:
        assert (g - gradients[0][0]).abs().max() < EXACT
        assert (gt - gradients[0][1]).abs() < EXACT
        assert not g[~mask].any()


def test_cells_outside_the_total_support_are_dropped_at_once() -> None:
    """A lower triangle has one perfect matching, which a plain loop only creeps to."""
    for n in (2, 4, 60):
        X = scores(n, n).requires_grad_()
        lower = torch.ones(n, n, dtype=torch.bool).tril()
        for x, mask in ((X, lower), (X.masked_fill(~lower, -math.inf), None)):
            start = time.perf_counter()
            P = sinkhorn(x, 1.0, mask=mask)
            assert time.perf_counter() - start < SECONDS
            assert torch.equal(P, torch.eye(n))
            (g,) = torch.autograd.grad((P * torch.randn(n, n)).sum(), X)
            assert not g.any()


def test_a_mask_for_each_element_and_a_graph_as_a_mask() -> None:
    X = scores(3, 5, 5)
    mask = torch.rand(3, 5, 5) < 0.6
    mask |= torch.eye(5, dtype=torch.bool)
    batch = log_sinkhorn(X, 0.3, mask=mask)
    for k in range(3):
        one = log_sinkhorn(X[k], 0.3, mask=mask[k])
        assert torch.equal(one.isneginf(), ~oracles.total_support(mask[k]))
        assert torch.allclose(batch[k].exp(), one.exp(), atol=1e-7)
    graph = matching_graph(mask, (5, 5), X.device)
    assert torch.equal(log_sinkhorn(X, 0.3, mask=graph), batch)
    shared = log_sinkhorn(X, 0.3, mask=mask[0])
    assert torch.allclose(
        shared[2].exp(), sinkhorn(X[2], 0.3, mask=mask[0]), atol=CELLS
    )


def test_full_mask_is_no_mask() -> None:
    X = scores(5, 5)
    full = torch.ones(5, 5, dtype=torch.bool)
    assert (log_sinkhorn(X, 0.2, mask=full) - log_sinkhorn(X, 0.2)).abs().max() < 1e-7


# Bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_named(bad: float) -> None:
    """A whole row of NaN, one cell, one batch element: one clear error for each."""
    X = scores(3, 4, 4)
    X[1, 2] = bad
    single = scores(4, 4)
    single[0, 0] = bad
    for x in (X, single):
        for function in (sinkhorn, log_sinkhorn):
            with pytest.raises(ValueError, match="logits"):
                function(x)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature_is_named(bad: float) -> None:
    for tau in (bad, torch.tensor(bad), torch.tensor([1.0, bad])):
        with pytest.raises(ValueError, match="temperature"):
            log_sinkhorn(scores(2, 3, 3), tau)


def test_zero_temperature_points_to_the_hard_operator() -> None:
    with pytest.raises(ValueError, match="matching"):
        sinkhorn(scores(3, 3), 0.0)


def test_bad_shapes_are_named() -> None:
    for shape in [(3,), ()]:
        with pytest.raises(ValueError, match="logits"):
            sinkhorn(torch.zeros(shape))
    with pytest.raises(ValueError, match="temperature"):
        sinkhorn(torch.zeros(3, 4, 4), torch.ones(2))
    with pytest.raises(ValueError, match="mask"):
        sinkhorn(torch.zeros(4, 4), mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask"):
        sinkhorn(torch.zeros(3, 4, 4), mask=torch.ones(2, 4, 4, dtype=torch.bool))


def test_bad_mask_dtype_is_named() -> None:
    for dtype in (torch.float64, torch.long):
        with pytest.raises(ValueError, match=r"mask.*bool"):
            sinkhorn(torch.zeros(3, 3), mask=torch.ones(3, 3, dtype=dtype))


def test_infeasible_mask_names_the_rows() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:2] = torch.tensor([False, True, False, False])  # rows 0 and 1 need column 1
    for kwargs in ({"mask": mask}, {}):
        X = torch.zeros(4, 4)
        X = X if kwargs else X.masked_fill(~mask, -math.inf)
        start = time.perf_counter()
        with pytest.raises(ValueError, match=r"rows.*0, 1.*column.*1"):
            sinkhorn(X, **kwargs)
        assert time.perf_counter() - start < SECONDS


@pytest.mark.parametrize("function", [sinkhorn, log_sinkhorn])
def test_integer_scores_are_refused(function) -> None:
    """A result in the type of the scores would be rounded to zeros and ones."""
    with pytest.raises(ValueError, match="logits must be a floating point"):
        function(torch.tensor([[0, 3], [1, 0]]))


@pytest.mark.parametrize("scale", [1e6, 1e30, 1e299])
def test_huge_scores_give_the_matching(scale: float) -> None:
    X = scale * torch.randn(5, 5)
    assert torch.equal(sinkhorn(X).round(), matching(X))
    assert torch.equal(log_sinkhorn(X).exp().round(), matching(X))


def test_scores_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="logits must be finite"):
        sinkhorn(torch.tensor([[1e300, 0.0], [0.0, 1.0]]), 1e-5)


def test_bad_temperatures_are_refused_under_vmap() -> None:
    X = scores(3, 3)
    for bad in (-1.0, 0.0):
        with pytest.raises(ValueError, match="temperature"):
            vmap(lambda t: sinkhorn(X, t))(torch.tensor([1.0, bad]))


@pytest.mark.parametrize(("n", "seed"), [(50, 0), (50, 7), (50, 8), (100, 0)])
@pytest.mark.parametrize("tail", ["cauchy", "lognormal"])
def test_logs_of_heavy_tailed_scores_converge(tail, n, seed):
    """Warnings are errors here: a start that is too cold did not get anywhere."""
    torch.manual_seed(seed)
    X = torch.randn(1, n, n, dtype=torch.float64)
    if tail == "cauchy":
        X = X / torch.randn(1, n, n, dtype=torch.float64)
    else:
        X = (2 * X).exp() * 100
    log_P = log_sinkhorn(X)
    for dim in (-1, -2):
        assert log_P.logsumexp(dim).abs().max() < 1e-6


def test_heavy_tails_take_no_more_than_a_few_times_the_steps() -> None:
    """A start that is in reach of Newton whatever the tails: 20 and 75 steps."""
    X = scores(2, 100, 100, scale=10.0)
    generator = torch.Generator().manual_seed(1)
    tails = X / torch.randn(2, 100, 100, generator=generator, dtype=torch.float64)
    one, root = (
        torch.ones(2, 1, 100),
        torch.eye(1, 100, dtype=torch.bool).expand(2, 100),
    )
    for x, most in ((X, 30), (tails, 120)):
        solution = sinkhorn_solvers.solve(
            x, one, one, root, SUMS, slack=False, masked=False
        )
        assert solution.residual <= SUMS
        assert solution.left == 0
        assert solution.iterations <= most
