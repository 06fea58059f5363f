# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The integral over shifts against grids, Gibbs sampling and brute-force sums."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from scipy.special import gammaln, logsumexp
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_permutations import shift_integral_cubature
from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.shift_integral import log_shift_integral
from pyro_permutations.shift_integral_cubature import column_coupling, raised_factor
from pyro_permutations.shift_integral_series import _tempered, second_order
from pyro_permutations.sinkhorn import log_scaling

CLOSED = 1e-12  # the closed form: rounding
QUADRATURE = 1e-3  # promised; 1e-5 is usual
SERIES = 0.01  # promised of the series and of the default sampling
SAMPLED = 0.02  # promised of a flat prior under mild guides, with 4096 samples
STATED = 0.003  # standard error that a reference may have
ERRORS = 4  # standard errors of a reference that count as chance
# Far from own draws the error estimate says what is known. It may ask for this much
# without samples and with 4096 of them, for a guide whose scores have this scale.
UNSURE = {(0, 5.0): 2.0, (0, 10.0): 10.0, (4096, 5.0): 0.04, (4096, 10.0): 0.06}
# However unsure a value is, it is not further off than this, in nats.
WORST = {5.0: 0.2, 10.0: 2.0}
SAME = 1e-9  # two routes to one number: rounding of sums of some hundred terms


# Masks and draws


def full(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool)


def cycle(n: int, width: int) -> Tensor:
    eye = torch.eye(n, dtype=torch.bool)
    return torch.stack([eye.roll(k, 1) for k in range(width)]).any(0)


def blocks(*sizes: int) -> Tensor:
    return torch.block_diag(*[full(size).double() for size in sizes]).bool()


def sparse(n: int, cells: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    mask = cycle(n, 2).numpy()
    while mask.sum() < cells:
        mask[rng.integers(n), rng.integers(n)] = True
    return torch.from_numpy(mask)


def graph_of(mask: Tensor) -> MatchingGraph:
    return matching_graph(mask, (mask.shape[-2], mask.shape[-1]))


def draws(n: int, count: int, scale: float = 0.0, seed: int = 0) -> Tensor:
    """M for own draws (scale 0), or for a flat prior at draws of a guide."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, n, n)
    noise = torch.empty(shape).exponential_(generator=generator).log()
    return noise - scale * torch.randn(shape, generator=generator)


# A reference for points where the integrand is far from a Gaussian


def gibbs_reference(
    M: np.ndarray, mask: np.ndarray, samples: int = 200_000
) -> tuple[float, float]:
    """Importance sampling with the moments that Gibbs sampling finds; standard error.

    Given v, exp(-u_i) is Gamma(r_i) over sum_j exp(M_ij - v_j), and the other way
    round, so that Gibbs sampling is a Sinkhorn iteration with random Gamma marginals.
    """
    rng = np.random.default_rng(0)
    r, c = mask.sum(1), mask.sum(0)
    scores = np.where(mask, M, -np.inf)
    for _ in range(400):  # a good centre; the integral does not depend on shifts
        scores = scores - logsumexp(scores, axis=1, keepdims=True)
        scores = scores - logsumexp(scores, axis=0, keepdims=True)
    kernel = np.exp(scores)
    chains, steps, kept = 64, 1000, []
    b = np.ones((chains, len(M)))
    for step in range(steps):
        a = rng.standard_gamma(r, (chains, len(M))) / (b @ kernel.T)
        b = rng.standard_gamma(c, (chains, len(M))) / (a @ kernel)
        b /= b[:, -1:]
        if step > steps // 4 and step % 3 == 0:
            kept.append(-np.log(b[:, :-1]))
    v = np.concatenate(kept)
    size, freedom = v.shape[1], 9
    root = np.linalg.cholesky(1.1 * np.atleast_2d(np.cov(v.T)))
    root *= math.sqrt((freedom - 2) / freedom)
    z = rng.standard_normal((samples, size))
    z /= np.sqrt(rng.chisquare(freedom, (samples, 1)) / freedom)
    density = (
        gammaln((freedom + size) / 2)
        - gammaln(freedom / 2)
        - size / 2 * math.log(freedom * math.pi)
        - np.log(np.diag(root)).sum()
        - (freedom + size) / 2 * np.log1p((z**2).sum(1) / freedom)
    )
    shifts = np.hstack([v.mean(0) + z @ root.T, np.zeros((samples, 1))])
    top = -shifts.min(1, keepdims=True)
    log_sums = np.log(np.exp(-shifts - top) @ kernel.T) + top
    exponent = scores[mask].sum() + gammaln(r).sum() - shifts @ c - log_sums @ r
    log_weights = exponent - density
    peak = log_weights.max()
    weights = np.exp(log_weights - peak)
    error = weights.std() / weights.mean() / math.sqrt(samples)
    return float(peak + np.log(weights.mean())), float(error)


def assert_close_to_gibbs(
    M: Tensor, mask: Tensor, value: Tensor, tolerance: Tensor | float
) -> None:
    tolerances = torch.as_tensor(tolerance).expand(len(M))
    for k in range(len(M)):
        expected, error = gibbs_reference(M[k].numpy(), mask.numpy())
        assert error < STATED
        assert abs(float(value[k]) - expected) < float(tolerances[k]) + ERRORS * error


# Values at own draws


@pytest.mark.parametrize("z", [0.0, 1e-5, 0.03, 0.4999, 0.5, 0.5001, 3.0, 40.0])
def test_two_by_two_is_the_density_of_two_logistics(z: float) -> None:
    M = torch.tensor([[z / 2, 0.3], [-0.2, z / 2 + 0.1]])
    value, error = log_shift_integral(M, graph_of(full(2)))
    expected = float(oracles.logistic_sum_density(z))
    assert float(value) == pytest.approx(expected, rel=CLOSED)
    assert float(error) == 0


def test_two_by_two_far_out() -> None:
    # log f(s) tends to log(s - 2) - s, and its slope to 1 / (s - 2) - 1.
    s = torch.tensor([400.0, 4e4], requires_grad=True)
    M = torch.zeros(2, 2, 2) + torch.diag_embed(torch.stack([s, 0 * s], -1))
    value, _ = log_shift_integral(M, graph_of(full(2)))
    assert torch.allclose(value, (s - 2).log() - s, rtol=CLOSED)
    (slope,) = torch.autograd.grad(value.sum(), s)
    assert torch.allclose(slope, 1 / (s - 2) - 1, rtol=CLOSED)


@pytest.mark.parametrize(("n", "nodes"), [(3, 401), (4, 61)])
def test_three_and_four_rows_against_a_grid(n: int, nodes: int) -> None:
    M = draws(n, 8)
    value, error = log_shift_integral(M, graph_of(full(n)))
    expected = torch.tensor([oracles.shift_integral_grid(m, nodes=nodes) for m in M])
    assert (value - expected).abs().max() < QUADRATURE
    assert error.max() < QUADRATURE


@pytest.mark.parametrize(("n", "count"), [(5, 6), (10, 4), (20, 3), (50, 1)])
def test_own_draws(n: int, count: int) -> None:
    M = draws(n, count)
    value, error = log_shift_integral(M, graph_of(full(n)))
    for k in range(count):
        expected, chance = oracles.shift_integral(M[k], samples=25_000)
        assert chance < STATED
        assert abs(float(value[k]) - expected) < SERIES
    assert error.max() < SERIES


@pytest.mark.parametrize(
    "mask",
    [
        blocks(2, 2, 2),
        blocks(3, 3, 2, 1),
        cycle(5, 2),
        cycle(8, 2),
        cycle(5, 3),
        cycle(8, 3),
        sparse(15, 84),
        cycle(4, 3),
    ],
    ids=["2+2+2", "3+3+2+1", "w2n5", "w2n8", "w3n5", "w3n8", "sparse15", "w3n4"],
)
def test_own_draws_under_masks(mask: Tensor) -> None:
    M = draws(len(mask), 2)
    value, error = log_shift_integral(M, graph_of(mask))
    assert error.max() < 0.1
    labels, columns = oracles.components(mask)
    for k in range(len(M)):
        expected = 0.0
        variance = 0.0
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            part = np.ix_(rows, np.flatnonzero(columns == label))
            if len(rows) == 2:
                m = M[k].numpy()[part]
                z = float(m[0, 0] - m[0, 1] - m[1, 0] + m[1, 1])
                expected += float(oracles.logistic_sum_density(z))
            elif len(rows) > 2:
                log, chance = gibbs_reference(
                    M[k].numpy()[part], mask.numpy()[part], samples=80_000
                )
                assert chance < STATED
                expected += log
                variance += chance**2
        assert math.sqrt(variance) < STATED
        assert abs(float(value[k]) - expected) < SERIES


def test_sparse_component_of_many_rows() -> None:
    # A large sparse component has a correction of its own size, about .5 here, which
    # must not be taken for a failure of the expansion.
    mask = sparse(40, 300) | cycle(40, 4)
    M = draws(40, 1)
    value, error = log_shift_integral(M, graph_of(mask))
    expected, chance = gibbs_reference(M[0].numpy(), mask.numpy(), samples=300_000)
    assert chance < STATED
    assert abs(float(value) - expected) < SERIES
    assert error.max() < 0.1


def test_decided_cells_contribute_nothing() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    M = (1e3 * draws(4, 2)).requires_grad_()
    value, error = log_shift_integral(M, graph_of(mask))
    assert torch.equal(value, torch.zeros(2))
    assert torch.equal(error, torch.zeros(2))
    assert torch.equal(torch.autograd.grad(value.sum(), M)[0], torch.zeros_like(M))
    # A cell that no perfect matching uses (row 0, column 3) is as good as forbidden.
    mask = blocks(2, 1, 1)
    mask[0, 3] = True
    M = draws(4, 2)
    value, _ = log_shift_integral(M, graph_of(mask))
    alone, _ = log_shift_integral(M[:, :2, :2], graph_of(full(2)))
    assert torch.allclose(value, alone, atol=SAME)
    assert float(log_shift_integral(M[0, :1, :1], graph_of(full(1)))[0]) == 0


# Values away from own draws


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("n", "count"), [(3, 2), (5, 2), (10, 2), (20, 1)])
def test_flat_prior_with_samples(n: int, count: int, scale: float) -> None:
    M = draws(n, count, scale)
    value, error = log_shift_integral(M, graph_of(full(n)), samples=4096)
    assert_close_to_gibbs(M, full(n), value, SAMPLED)
    assert error.max() < 0.1


@pytest.mark.parametrize("samples", [0, 4096])
@pytest.mark.parametrize("scale", [5.0, 10.0])
@pytest.mark.parametrize(("n", "count"), [(3, 2), (5, 4), (12, 2), (20, 1)])
def test_error_estimate_covers(n: int, count: int, scale: float, samples: int) -> None:
    M = draws(n, count, scale, seed=1)
    value, error = log_shift_integral(M, graph_of(full(n)), samples=samples)
    assert error.max() < UNSURE[samples, scale]
    assert_close_to_gibbs(M, full(n), value, error.clamp(max=WORST[scale]))
    assert not error.requires_grad


def test_samples_improve_on_the_series() -> None:
    M = draws(5, 3, 7.0, seed=2)
    graph = graph_of(full(5))
    assert_close_to_gibbs(
        M, full(5), log_shift_integral(M, graph, samples=8192)[0], SAMPLED
    )
    _, series = log_shift_integral(M, graph)
    _, sampled = log_shift_integral(M, graph, samples=8192)
    assert (sampled < series).all()


@pytest.mark.parametrize("samples", [0, 256])
@pytest.mark.parametrize("scale", [30.0, 1e4])
@pytest.mark.parametrize(
    "mask",
    [full(2), full(3), full(4), full(5), full(12), cycle(6, 2), cycle(34, 2)],
    ids=["2", "3", "4", "5", "12", "w2n6", "w2n34"],
)
def test_finite_at_any_scale(mask: Tensor, scale: float, samples: int) -> None:
    n = len(mask)
    noise = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0))
    M = (scale * noise).requires_grad_()
    value, error = log_shift_integral(M, graph_of(mask), samples=samples)
    (gradient,) = torch.autograd.grad(value.sum(), M)
    assert value.isfinite().all()
    assert error.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[:, ~mask] == 0).all()


# Derivatives

EACH_METHOD = pytest.mark.parametrize(
    ("mask", "samples", "scale"),
    [
        (full(2), 0, 0.0),
        (full(3), 0, 0.0),
        (full(3), 0, 6.0),
        (full(5), 0, 0.0),
        (full(5), 0, 6.0),
        (full(5), 256, 0.0),
        (cycle(5, 2), 0, 0.0),
        (cycle(6, 4), 0, 0.0),
        (blocks(2, 3, 1), 0, 0.0),
    ],
    ids=[
        "closed",
        "quadrature",
        "sampled where quadrature fails",
        "series",
        "tempered series",
        "samples",
        "thin",
        "masked series",
        "blocks",
    ],
)


@EACH_METHOD
def test_gradients(mask: Tensor, samples: int, scale: float) -> None:
    graph = graph_of(mask)
    M = draws(len(mask), 1, scale, seed=3)[0].requires_grad_()

    def value(M: Tensor) -> Tensor:
        return log_shift_integral(M, graph, samples=samples)[0]

    assert gradcheck(value, M, atol=1e-5, rtol=1e-4)
    assert gradgradcheck(value, M, atol=1e-4, rtol=1e-3)


@EACH_METHOD
def test_torch_func(mask: Tensor, samples: int, scale: float) -> None:
    graph = graph_of(mask)
    M = draws(len(mask), 2, scale)

    def value(M: Tensor) -> Tensor:
        return log_shift_integral(M, graph, samples=samples)[0]

    mapped = torch.vmap(torch.func.grad(value))(M)
    M.requires_grad_()
    (expected,) = torch.autograd.grad(value(M).sum(), M)
    assert torch.allclose(mapped, expected, atol=1e-8)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@EACH_METHOD
def test_jit_trace(mask: Tensor, samples: int, scale: float) -> None:
    graph = graph_of(mask)

    def value(M: Tensor) -> Tensor:
        return log_shift_integral(M, graph, samples=samples)[0]

    traced = torch.jit.trace(value, (draws(len(mask), 2, scale),))
    M = draws(len(mask), 2, scale, seed=1)
    assert torch.allclose(traced(M), value(M), atol=SAME)


@EACH_METHOD
def test_shifts_change_nothing(mask: Tensor, samples: int, scale: float) -> None:
    n, graph = len(mask), graph_of(mask)
    M = draws(n, 2, scale)
    shifted = M + 9 * torch.randn(2, n, 1) + 9 * torch.randn(2, 1, n)
    value, error = log_shift_integral(M, graph, samples=samples)
    again, error_again = log_shift_integral(shifted, graph, samples=samples)
    assert torch.allclose(value, again, atol=1e-8)
    assert torch.allclose(error, error_again, atol=1e-6)
    M.requires_grad_()
    gradient = torch.autograd.grad(
        log_shift_integral(M, graph, samples=samples)[0].sum(), M
    )[0]
    assert gradient.sum(-1).abs().max() < 1e-8
    assert gradient.sum(-2).abs().max() < 1e-8


def test_gradient_is_that_of_the_integral() -> None:
    # Sampling and quadrature differentiate to the same thing at an ordinary point.
    M = draws(3, 4).requires_grad_()
    graph = graph_of(full(3))
    (exact,) = torch.autograd.grad(log_shift_integral(M, graph)[0].sum(), M)
    counts = graph.row_counts.double(), graph.column_counts.double()
    log_q = log_scaling(M, graph, counts)
    start = log_q.sum((-2, -1))  # plus a constant
    rows = torch.full((4, 3), 3.0)
    sampled, _ = shift_integral_cubature.importance(
        log_q.exp() / 3, rows, rows, points=4096
    )
    (other,) = torch.autograd.grad((start + sampled).sum(), M)
    assert (exact - other).abs().max() < 0.01


# Batches


def test_batch_is_a_loop_of_singles() -> None:
    for n, samples in [(2, 0), (3, 0), (4, 0), (6, 0), (6, 128)]:
        M = draws(n, 6).reshape(2, 3, n, n)
        graph = graph_of(full(n))
        value, error = log_shift_integral(M, graph, samples=samples)
        assert value.shape == error.shape == (2, 3)
        for k in np.ndindex(2, 3):
            v, e = log_shift_integral(M[k], graph, samples=samples)
            assert v.shape == ()
            assert torch.allclose(v, value[k], atol=SAME)
            assert torch.allclose(e, error[k], atol=SAME)


def test_different_masks_in_one_batch() -> None:
    masks = [full(6), blocks(2, 4), cycle(6, 2), blocks(3, 2, 1), blocks(5, 1)]
    masks += [torch.eye(6, dtype=torch.bool), cycle(6, 4)]
    graph = graph_of(torch.stack(masks))
    for lead in [(7,), (3, 7), (1,), ()]:
        M = torch.randn(*lead, 6, 6).requires_grad_()
        value, error = log_shift_integral(M, graph)
        assert value.shape == torch.broadcast_shapes(lead, (7,))
        (gradient,) = torch.autograd.grad(value.sum(), M)
        total = torch.zeros_like(gradient)
        wide = M.expand(*value.shape, 6, 6)
        for k, mask in enumerate(masks):
            v, e = log_shift_integral(wide[..., k, :, :], graph_of(mask))
            assert torch.allclose(v, value[..., k], atol=SAME)
            assert torch.allclose(e, error[..., k], atol=SAME)
            total = total + torch.autograd.grad(v.sum(), M)[0]
        assert torch.allclose(gradient, total, atol=SAME)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_empty_batch_and_other_dtypes(n: int) -> None:
    for mask in (full(n), torch.eye(n, dtype=torch.bool)):
        value, error = log_shift_integral(torch.zeros(0, 3, n, n), graph_of(mask))
        assert value.shape == error.shape == (0, 3)
    single = torch.zeros(n, n, dtype=torch.float32)
    value, _ = log_shift_integral(single, graph_of(full(n)))
    assert value.dtype == torch.float64


def test_forbidden_entries_are_ignored() -> None:
    mask = blocks(3, 5)
    M = draws(8, 2)
    value, _ = log_shift_integral(M, graph_of(mask))
    junk = torch.where(mask, M, -torch.inf).requires_grad_()
    again, _ = log_shift_integral(junk, graph_of(mask))
    assert torch.equal(value, again)
    gradient = torch.autograd.grad(again.sum(), junk)[0]
    assert gradient.isfinite().all()


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    M = draws(4, 7)
    whole = log_shift_integral(M, graph_of(full(4)))
    monkeypatch.setattr(shift_integral_cubature, "_CHUNK", 20_000)
    parts = log_shift_integral(M, graph_of(full(4)))
    for x, y in zip(whole, parts, strict=True):
        assert torch.allclose(x, y, atol=SAME)


def test_leaves_the_random_state_alone() -> None:
    shift_integral_cubature._student.cache_clear()
    before = torch.random.get_rng_state()
    M = torch.zeros(5, 5)
    first = log_shift_integral(M, graph_of(full(5)), samples=100)
    assert torch.equal(before, torch.random.get_rng_state())
    shift_integral_cubature._student.cache_clear()
    assert first == log_shift_integral(M, graph_of(full(5)), samples=100)


# The series, term by term


@pytest.mark.parametrize("mask", [full(3), full(5), cycle(6, 4), sparse(7, 30)])
def test_second_order_against_the_sums_over_cells(mask: Tensor) -> None:
    graph = graph_of(mask)
    assert graph.support.equal(mask)
    rows, columns = graph.row_counts.double(), graph.column_counts.double()
    M = draws(len(mask), 1)[0]
    log_q = log_scaling(M, graph, (rows, columns))
    q = log_q.exp() / rows[:, None]
    coupling = column_coupling(q, rows)
    covariance = torch.cholesky_inverse(raised_factor(coupling, columns))
    skew, rest = second_order(q, rows, columns, coupling, covariance)

    # K_ijkl = (e_j - q_i)' S (e_l - q_k), all n^4 of them.
    n = len(mask)
    S = torch.nn.functional.pad(covariance, (0, 1, 0, 1))
    x = torch.eye(n) - q[:, None, :]
    K = torch.einsum("ija,ab,klb->ijkl", x, S, x)
    own = torch.einsum("ijij->ij", K)
    g = torch.einsum("i,ij,ij,ija->a", rows, q, own, x)
    cubes = torch.einsum("i,k,ij,kl,ijkl->", rows, rows, q, q, K**3)
    variance = (q * own**2).sum(-1) - (q * own).sum(-1) ** 2
    within = torch.einsum("ij,il,ijil->i", q, q, K**2)
    assert float(skew) == pytest.approx(float(g @ S @ g) / 8, rel=1e-9)
    expected = cubes / 12 - (rows * (variance - 2 * within)).sum() / 8
    assert float(rest) == pytest.approx(float(expected), rel=1e-9)


def test_tempered_is_smooth_and_monotone() -> None:
    d = torch.tensor([0.0, 1e-9, -1e-9], requires_grad=True)
    (first,) = torch.autograd.grad(_tempered(d).sum(), d, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), d)
    assert torch.allclose(first, torch.ones(3), atol=1e-7)
    assert torch.allclose(second, torch.full((3,), 2.0), atol=1e-6)
    line = _tempered(torch.linspace(-50, 50, 2001))
    assert (line.diff() > 0).all()
    assert line.abs().max() < 5
