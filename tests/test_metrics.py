# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Metrics of permutations beside scipy's and beside plain loops."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kendalltau

from pyro_permutations import matching, metrics, restore, to_matrix

METRICS = [metrics.proportion_wrong, metrics.any_wrong, metrics.kendall_tau]


def permutations(*batch: int, n: int) -> torch.Tensor:
    return torch.rand(*batch, n).argsort(-1)


@pytest.mark.parametrize("n", [2, 3, 8, 50])
def test_kendall_tau_is_that_of_scipy(n: int) -> None:
    found, truth = permutations(4, 5, n=n), permutations(4, 5, n=n)
    tau = metrics.kendall_tau(found, truth)
    assert tau.shape == (4, 5)
    for i in range(4):
        for j in range(5):
            expected = kendalltau(found[i, j], truth[i, j]).statistic
            assert abs(tau[i, j] - expected) < 1e-12


def test_kendall_tau_at_its_ends() -> None:
    perm = permutations(n=7)
    assert metrics.kendall_tau(perm, perm) == 1
    assert metrics.kendall_tau(6 - perm, perm) == -1
    assert metrics.kendall_tau(torch.tensor([0]), torch.tensor([0])) == 1


def test_wrong_items_are_counted() -> None:
    truth = permutations(n=10)
    swapped = truth.clone()
    swapped[[2, 5]] = truth[[5, 2]]
    found = torch.stack([truth, swapped, truth.roll(1)])
    assert metrics.proportion_wrong(found, truth).tolist() == [0.0, 0.2, 1.0]
    assert metrics.any_wrong(found, truth).tolist() == [0.0, 1.0, 1.0]


def test_matrices_and_indices_say_the_same() -> None:
    found, truth = permutations(6, n=5), permutations(6, n=5)
    P, Q, x = to_matrix(found), to_matrix(truth), torch.randn(6, 5, 2)
    for metric in METRICS:
        expected = metric(found, truth)
        assert torch.equal(metric(P, Q), expected)
        assert torch.equal(metric(P, truth), expected)
        assert torch.equal(metric(found, Q), expected)
        assert torch.equal(metric(P.bool(), truth), expected)
    for metric in (metrics.l1, metrics.l2):
        assert torch.equal(metric(P, truth, x), metric(found, Q, x))


def test_differences_are_of_the_restored_items() -> None:
    found, truth = permutations(6, n=5), permutations(6, n=5)
    x = torch.randn(6, 5, 2, 3)
    for b in range(6):
        total, square = 0.0, 0.0
        for j in range(5):
            i, k = (found[b] == j).nonzero().item(), (truth[b] == j).nonzero().item()
            total += (x[b, i] - x[b, k]).abs().sum().item()
            square += (x[b, i] - x[b, k]).square().sum().item()
        assert abs(metrics.l1(found, truth, x)[b] - total / 30) < 1e-12
        assert abs(metrics.l2(found, truth, x)[b] - square / 30) < 1e-12
    numbers = x[..., 0, 0]
    assert metrics.l1(found, truth, numbers).shape == (6,)


def test_items_that_look_alike_may_be_exchanged() -> None:
    x = torch.tensor([1.0, 2.0, 2.0])
    found, truth = torch.tensor([0, 2, 1]), torch.tensor([0, 1, 2])
    assert metrics.any_wrong(found, truth) == 1
    assert metrics.l1(found, truth, x) == metrics.l2(found, truth, x) == 0


def test_soft_matrices_have_a_difference_with_a_gradient() -> None:
    P = torch.full((3, 3), 1 / 3, requires_grad=True)
    x, truth = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2, 0, 1])
    loss = metrics.l2(P, truth, x)
    expected = (restore(P.detach(), x) - x.sort().values).square().mean()
    torch.testing.assert_close(loss.detach(), expected)
    (g,) = torch.autograd.grad(loss, P)
    assert g.abs().max() > 0
    for metric in METRICS:
        with pytest.raises(ValueError, match="matching"):
            metric(P.detach(), truth)
        assert metric(matching(P), truth).isfinite()


def test_dtype_is_that_of_the_matrices() -> None:
    perm = permutations(n=4)
    for metric in METRICS:
        assert metric(perm, perm).dtype == torch.float64
        assert metric(to_matrix(perm, torch.float32), perm).dtype == torch.float32
    x = torch.randn(4, dtype=torch.float32)
    assert metrics.l1(perm, perm, x).dtype == torch.float32


def test_what_is_no_permutation_is_refused() -> None:
    truth = torch.arange(3)
    for bad in (
        torch.tensor([0, 0, 1]),
        torch.tensor([1, 2, 3]),
        torch.tensor([0, -1, 1]),
        torch.zeros(3, 3),
        to_matrix(torch.tensor([2, 0, 1]), columns=4),
        torch.tensor(1),
    ):
        for metric in METRICS:
            with pytest.raises(ValueError, match="permutation"):
                metric(bad, truth)
    with pytest.raises(ValueError, match="4 and of 3 items"):
        metrics.any_wrong(torch.arange(4), truth)
    with pytest.raises(ValueError, match="broadcast"):
        metrics.any_wrong(truth.expand(2, 3), truth.expand(4, 3))
    with pytest.raises(ValueError, match="shape"):
        metrics.l1(truth, truth, torch.randn(4))


def test_half_precision_and_whole_numbers() -> None:
    P = to_matrix(torch.randperm(300), torch.float16)
    assert metrics.kendall_tau(P, P) == 1
    pixels = torch.tensor([3, 5], dtype=torch.uint8)
    found = metrics.l1(torch.tensor([1, 0]), torch.tensor([0, 1]), pixels)
    assert found == 2
