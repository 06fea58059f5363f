# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The best matching against all permutations, and the two forms of a permutation."""

from __future__ import annotations

import itertools
import sys

import oracles
import pyro.distributions as dist
import pytest
import torch
from torch.func import grad, vmap

from pyro_permutations.matching import matching, to_indices, to_matrix
from pyro_permutations.matching_graph import matching_graph

ROUNDING = 1e-12  # float64 totals of at most six scores of order one


def all_perms(n: int) -> torch.Tensor:
    """All permutations as indices, (n!, n)."""
    return torch.tensor(list(itertools.permutations(range(n))))


def totals(logits: torch.Tensor) -> torch.Tensor:
    """Total score of every permutation, (*batch, n!)."""
    n = logits.shape[-1]
    return logits[..., torch.arange(n), all_perms(n)].sum(-1)


def feasible_masks(n: int, count: int, density: float) -> torch.Tensor:
    masks = torch.rand(count, n, n) < density
    return masks | torch.eye(n, dtype=torch.bool)[torch.rand(count, n).argsort(-1)]


@pytest.mark.parametrize("n", range(1, 7))
def test_agrees_with_enumeration(n):
    logits = torch.randn(2, 10, n, n, dtype=torch.float64)
    best = totals(logits).argmax(-1)
    P = matching(logits)
    assert P.dtype == logits.dtype
    assert torch.equal(P, to_matrix(all_perms(n)[best], logits.dtype))


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30, 1e307])
@pytest.mark.parametrize("form", ["mask", "graph", "logits", "both"])
def test_masks_are_kept_however_large_the_scores(form, scale):
    n = 5
    masks = feasible_masks(n, 40, 0.3)
    logits = scale * torch.rand(40, n, n, dtype=torch.float64)
    # Forbidden pairs are the best ones, allowed pairs are bad.
    logits = torch.where(masks, logits - scale, logits + scale)
    other = feasible_masks(n, 1, 0.7)[0]
    if form == "mask":
        P = matching(logits, mask=masks)
    elif form == "graph":
        P = matching(logits, mask=matching_graph(masks, (n, n)))
    elif form == "logits":
        P = matching(logits.masked_fill(~masks, -torch.inf))
    else:
        masks = masks | torch.eye(n, dtype=torch.bool)
        other = other | torch.eye(n, dtype=torch.bool)
        P = matching(logits.masked_fill(~masks, -torch.inf), mask=other)
        masks = masks & other
    expected = totals((logits / scale).masked_fill(~masks, -torch.inf)).max(-1).values
    assert not P[~masks].any()
    total = (P * (logits / scale)).sum((-2, -1))
    assert torch.allclose(total, expected, rtol=0, atol=ROUNDING)


def test_small_differences_of_large_scores():
    # 1e4 + 1e-6 needs more digits than float32 has.
    logits = 1e4 + 1e-6 * torch.randn(20, 5, 5, dtype=torch.float64)
    best = all_perms(5)[totals(logits - 1e4).argmax(-1)]
    assert torch.equal(to_indices(matching(logits)), best)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_agrees_with_pyro(n):
    logits = torch.randn(n, n)
    mode = dist.OneOneMatching(logits).mode()
    assert torch.equal(to_indices(matching(logits)), mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(dtype):
    logits = torch.randn(7, 5, 5).to(dtype)
    P = matching(logits)
    assert P.dtype == dtype
    assert torch.equal(P.double(), matching(logits.double()))
    half = logits.masked_fill(~feasible_masks(5, 7, 0.5), -torch.inf)
    assert not matching(half)[half == -torch.inf].any()


def test_ties_give_a_permutation():
    P = matching(torch.zeros(3, 4, 4))
    assert torch.equal(P.sum(-1), torch.ones(3, 4))
    assert torch.equal(P.sum(-2), torch.ones(3, 4))


def test_small_and_empty():
    assert torch.equal(matching(torch.tensor([[-3.0]])), torch.ones(1, 1))
    assert matching(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    mask = torch.ones(2, 1, 3, 3).bool()
    assert matching(torch.zeros(0, 3, 3), mask=mask).shape == (2, 0, 3, 3)


def test_masks_broadcast():
    masks = feasible_masks(4, 3, 0.3)
    logits = torch.randn(4, 4)
    each = [matching(logits, mask=mask) for mask in masks]
    assert torch.equal(matching(logits, mask=masks), torch.stack(each))
    assert matching(logits.expand(5, 1, 4, 4), mask=masks).shape == (5, 3, 4, 4)


def test_no_gradient():
    logits = torch.randn(3, 4, 4, requires_grad=True)
    assert not matching(logits).requires_grad
    P = matching(logits, mask=torch.ones(4, 4).bool())
    assert not P.requires_grad
    (gradient,) = torch.autograd.grad((P * logits).sum(), logits)
    assert torch.equal(gradient, P)


def test_vmap():
    logits = torch.randn(6, 2, 4, 4)
    mask = feasible_masks(4, 2, 0.5)
    expected = matching(logits, mask=mask)
    assert torch.equal(vmap(lambda x: matching(x, mask=mask))(logits), expected)
    moved = vmap(lambda x: matching(x, mask=mask), in_dims=2)(logits.movedim(0, 2))
    assert torch.equal(moved, expected)
    twice = vmap(vmap(matching))(logits)
    assert torch.equal(twice, matching(logits))
    hard = vmap(grad(lambda x: (matching(x, mask=mask) * x).sum()))(logits)
    assert torch.equal(hard, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_follows_its_input():
    mask = feasible_masks(4, 2, 0.7)

    def both(x):
        return matching(x), matching(x, mask=mask)

    first = torch.randn(2, 4, 4, requires_grad=True)
    matching_graph(mask, (4, 4))  # the trace is checked against a second run
    trace = torch.jit.trace(both, first)
    for _ in range(5):
        x = torch.randn(2, 4, 4)
        for traced, plain in zip(trace(x), both(x), strict=True):
            assert torch.equal(traced, plain)


def test_operator_is_registered_as_torch_expects():
    rows, columns = torch.ones(2, 3).bool(), torch.ones(2, 3).bool()
    for free in ((None, None), (rows, columns)):
        torch.library.opcheck(
            torch.ops.pyro_permutations.matching.default, (torch.randn(2, 3, 3), *free)
        )


# Errors


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_must_be_numbers(bad):
    logits = torch.zeros(2, 3, 3)
    logits[1, 0, 2] = bad
    with pytest.raises(ValueError, match="logits must be numbers or -inf"):
        matching(logits)
    mask = torch.ones(3, 3).bool()
    mask[0, 2] = False
    assert matching(logits, mask=mask).sum() == 6  # a forbidden pair is not looked at


def test_infeasible_pairs_are_named():
    allowed = torch.ones(2, 3, 3).bool()
    allowed[1, :2] = torch.tensor([False, True, False])
    pairs = r"rows \{0, 1\} can only use columns \{1\} \(batch element 1\)"
    with pytest.raises(ValueError, match="mask has no perfect matching: " + pairs):
        matching(torch.zeros(3, 3), mask=allowed)
    logits = torch.zeros(2, 3, 3).masked_fill(~allowed, -torch.inf)
    with pytest.raises(ValueError, match="logits are -inf for forbidden.*" + pairs):
        matching(logits)
    # Each feasible, but not both together.
    logits = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    with pytest.raises(ValueError, match="logits are -inf for forbidden"):
        matching(logits, mask=torch.tensor([[False, True], [True, False]]))


@pytest.mark.parametrize("shape", [(3,), (0, 0), (2, 0, 0), (2, 0, 3)])
def test_logits_must_be_matrices(shape):
    with pytest.raises(ValueError, match=r"logits must have shape \(\*batch, n, m\)"):
        matching(torch.zeros(shape))


def test_more_rows_than_columns_need_a_score():
    with pytest.raises(ValueError, match=r"no more rows than columns.*unmatched"):
        matching(torch.zeros(3, 2))
    assert matching(torch.ones(3, 2), unmatched=(0.0, 0.0)).sum() == 2


def test_mask_must_fit():
    with pytest.raises(ValueError, match=r"mask must have shape \(\*batch, 3, 3\)"):
        matching(torch.zeros(3, 3), mask=torch.ones(2, 2).bool())
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        matching(torch.zeros(3, 3), mask=torch.ones(3, 3))


# The two forms


def test_orientation():
    perm = torch.tensor([2, 0, 1])
    P = to_matrix(perm)
    assert P.nonzero().tolist() == [[0, 2], [1, 0], [2, 1]]
    x = torch.randn(3)
    assert torch.equal(P @ x, x[perm])
    x = torch.tensor([3.0, 1.0, 2.0])
    assert x.argsort().tolist() == [1, 2, 0]
    assert (to_matrix(torch.tensor([1, 2, 0])) @ x).tolist() == [1, 2, 3]


@pytest.mark.parametrize("n", range(1, 5))
def test_round_trips(n):
    perms = all_perms(n)
    P = oracles.permutations(n)
    assert torch.equal(to_matrix(perms), P)
    assert torch.equal(to_indices(P), perms)
    batched = perms.expand(2, 3, *perms.shape)
    for dtype in (torch.float16, torch.float64, torch.long, torch.uint8, torch.bool):
        P = to_matrix(batched.to(torch.int32), dtype)
        assert P.dtype == dtype
        assert P.shape == (2, 3, len(perms), n, n)
        assert torch.equal(to_indices(P), batched)
    assert to_indices(torch.zeros(0, n, n)).shape == (0, n)
    assert to_matrix(torch.zeros(0, n, dtype=torch.long)).shape == (0, n, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_values_count_as_permutations(dtype):
    soft = torch.randn(50, 6, 6, dtype=dtype).softmax(-1)
    hard = matching(soft)
    value = hard + soft - soft.detach()
    assert torch.equal(to_indices(value), to_indices(hard))
    eps = torch.finfo(dtype).eps
    assert torch.equal(to_indices(hard * (1 + 4 * eps)), to_indices(hard))
    with pytest.raises(ValueError, match="expected permutation matrices"):
        to_indices(hard * (1 + 100 * eps))


@pytest.mark.parametrize(
    "P",
    [
        torch.full((2, 2), 0.5),
        torch.tensor([[0.9, 0.1], [0.1, 0.9]]),
        torch.ones(2, 2),
        torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        torch.tensor([[1.0, 1.0], [0.0, 0.0]]),
        torch.tensor([[2.0, -1.0], [-1.0, 2.0]]),
        torch.tensor([[1.0, torch.nan], [0.0, 1.0]]),
        torch.stack([torch.eye(2), torch.ones(2, 2)]),
        torch.tensor([[2, 0], [0, 1]]),
        torch.tensor([[True, False], [True, False]]),
    ],
)
def test_other_matrices_are_refused(P):
    with pytest.raises(ValueError, match=r"expected permutation .*matching\(\.\.\.\)"):
        to_indices(P)


@pytest.mark.parametrize("shape", [(3,), (0, 0)])
def test_values_must_be_matrices(shape):
    with pytest.raises(ValueError, match=r"shape \(\*batch, n, m\)"):
        to_indices(torch.zeros(shape))


@pytest.mark.parametrize(
    "perm",
    [
        torch.tensor([0, 0, 1]),
        torch.tensor([1, 2, 3]),
        torch.tensor([-2, 0, 1]),
        torch.tensor([[0, 1], [1, 1]]),
    ],
)
def test_other_indices_are_refused(perm):
    with pytest.raises(
        ValueError, match=r"perm must hold each of 0\.\.\d at most once"
    ):
        to_matrix(perm)


@pytest.mark.parametrize(
    "perm", [torch.tensor([0.0, 1.0]), torch.tensor([False, True]), torch.tensor(0)]
)
def test_indices_must_be_integers(perm):
    with pytest.raises(ValueError, match=r"perm must be integers of shape \(\*batch"):
        to_matrix(perm)


def test_batch_solver_agrees_with_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lapx is installed it finds matchings of the same total."""
    pytest.importorskip("lap")
    X = torch.cat([torch.randn(20, 30, 30), torch.randint(3, (20, 30, 30)).double()])
    ours = matching(X)
    module = sys.modules[matching.__module__]  # the package's name is the function's
    monkeypatch.setattr(module, "lapjvr_batch", None)
    theirs = matching(X)
    totals = ((ours - theirs) * X).sum((-2, -1))
    assert totals.abs().max() < 1e-10  # rounding of sums of 30 scores
