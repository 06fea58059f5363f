# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A thousand random problems, each checked by what only the right answer satisfies.

At low temperatures no plain iteration converges, so nothing is at hand to compare with.
But log P is the Sinkhorn limit exactly if it differs from the scores by row and column
shifts (its contrasts say so) and has unit sums; and where sums say nothing, since all
but a matching is below rounding, the flows off that matching balance. Problems are made
from a size and a number, so that each can be made again by itself.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor

from pyro_permutations.matching_graph import matching_graph
from pyro_permutations.sinkhorn import log_sinkhorn, sinkhorn

SUMS = 1e-6  # the documented default tolerance on every row and column sum
CELLS = 2e-6  # cells of two matrices of such sums: errors add up along chains of ties
CONTRASTS = 1e-9  # of the largest contrast: what rounding of large potentials leaves
ROUNDING = 1e-14  # of the largest score, where contrasts cancel to nothing
BALANCE = 1e-6  # log of flow in over flow out; the solver's own aim is about 1e-9
PLAIN = 1e-7  # a plain loop stops when it moves by 1e-12, at rates of up to 1 - 1e-3
SOLVES = 1e-6  # of all that flows: sums of a gradient that are zero for exact solves

MILD = 10.0  # scale over temperature up to which plain iteration is worth a try


# Problems

Generator = np.random.Generator
Array = np.ndarray


def normal(rng: Generator, n: int) -> Array:
    return rng.standard_normal((n, n))


def ties(rng: Generator, n: int) -> Array:
    return rng.integers(3, size=(n, n)).astype(float)


def tiers(rng: Generator, n: int) -> Array:
    """Ties that are broken by ties thirty times smaller, and those again."""
    return sum(30.0**-k * rng.integers(3, size=(n, n)) for k in range(3))


def duplicates(rng: Generator, n: int) -> Array:
    x = rng.standard_normal((n, n))
    return x[rng.integers(n, size=n)][:, rng.integers(n, size=n)]


def rank_one(rng: Generator, n: int) -> Array:
    return np.outer(rng.standard_normal(n), rng.standard_normal(n))


def heavy(rng: Generator, n: int) -> Array:
    """Cauchy draws without their outermost percent."""
    return np.tan(math.pi * (rng.uniform(0.005, 0.995, (n, n)) - 0.5))


def hub(rng: Generator, n: int) -> Array:
    x = rng.standard_normal((n, n))
    x[:, rng.integers(n)] += 30.0
    return x


def blocks(rng: Generator, n: int) -> Array:
    """Groups of about four; half the time rows and columns are grouped differently."""
    rows = rng.permutation(np.arange(n) % max(1, n // 4))
    columns = rng.permutation(rows) if rng.random() < 0.5 else rows
    return rng.standard_normal((n, n)) - rng.uniform(1, 10) * (rows[:, None] != columns)


def line(rng: Generator, n: int) -> Array:
    """Distances on a line: many matchings are equally good."""
    return -np.abs(rng.random(n)[:, None] - rng.random(n))


def scattered(rng: Generator, n: int) -> Array:
    return rng.random((n, n)) < rng.uniform(0.05, 0.9)


def sparse(rng: Generator, n: int) -> Array:
    return rng.random((n, n)) < 1.5 / n


def boxes(rng: Generator, n: int) -> Array:
    """Blocks; below them there may be cells that no perfect matching can use."""
    label = np.arange(n) // rng.integers(1, n + 1)
    triangular = rng.random() < 0.3
    return label[:, None] >= label if triangular else label[:, None] == label


def cycle(rng: Generator, n: int) -> Array:
    return np.roll(np.eye(n, dtype=bool), 1, axis=1)


def band(rng: Generator, n: int) -> Array:
    i = np.arange(n)
    return np.abs(i[:, None] - i) <= rng.integers(1, 4)


def hessenberg(rng: Generator, n: int) -> Array:
    return np.tri(n, n, 1, dtype=bool)


def known(rng: Generator, n: int) -> Array:
    """Some pairs are known, the others free."""
    free = rng.random(n) < rng.uniform(0.1, 0.9)
    return free[:, None] & free


SCORES = (normal, ties, tiers, duplicates, rank_one, heavy, hub, blocks, line)
MASKS = (scattered, sparse, boxes, cycle, band, hessenberg, known)


class Problem(NamedTuple):
    """One call of the operator, with a name from which it can be made again."""

    name: str
    scores: Tensor  # (n, n)
    temperature: float
    mask: Tensor  # (n, n), True everywhere if there is none
    ratio: float  # scale over temperature


def problem(n: int, number: int) -> Problem:
    """Problem of a size and a number, with a mask if the number is odd."""
    rng = np.random.default_rng((n, number))
    family = SCORES[rng.integers(len(SCORES))]
    scale = 10 ** rng.uniform(-1, 3)
    temperature = 10 ** rng.uniform(math.log10(0.005), 1)
    scores = torch.from_numpy(scale * family(rng, n))
    name = f"problem({n}, {number}): {family.__name__}"
    mask = np.ones((n, n), dtype=bool)
    if number % 2:
        shape = MASKS[rng.integers(len(MASKS))]
        rows, columns = rng.permutation(n), rng.permutation(n)
        mask = (shape(rng, n) | np.eye(n, dtype=bool))[rows][:, columns]
        name += f", {shape.__name__}"
    name += f", scale {scale:.3g}, temperature {temperature:.3g}"
    ratio = scale / temperature
    return Problem(name, scores, temperature, torch.from_numpy(mask), ratio)


def batches(n: int) -> tuple[list[Problem], list[Problem]]:
    """The problems of one size, without and with a mask; 1000 for n from 1 to 60."""
    count = 40 if n <= 10 else 20 if n <= 30 else 8 if n <= 50 else 4
    some = [problem(n, number) for number in range(count)]
    return some[::2], some[1::2]


# Certificates


def imbalance(log_p: Array) -> float:
    """The largest log of flow in over flow out, over clusters at every threshold.

    With pi the best matching, row i hands P_ik to the row that has column pi^-1(k). At
    the solution every set of rows receives what it hands out. Those that count are the
    rows themselves and the clusters that hold together by flows above some threshold,
    in which what they exchange with others would be lost beside what is inside; they
    are what single linkage finds.
    """
    n = len(log_p)
    if n == 1 or np.isnan(log_p).any():
        return float(0 * log_p.sum())
    _, match = linear_sum_assignment(-log_p)
    flow = log_p[:, match]
    distance = -np.maximum(flow, flow.T)
    np.fill_diagonal(distance, 0.0)
    apart = np.isposinf(distance)
    distance[apart] = distance.max(where=~apart, initial=0.0) + 1.0
    member = list(np.eye(n, dtype=bool))
    for first, second in linkage(squareform(distance), "single")[:-1, :2].astype(int):
        member.append(member[first] | member[second])
    inside = np.array(member)
    leaves = inside[:, :, None] & ~inside[:, None, :]
    return float(np.abs(log_sum(flow, leaves) - log_sum(flow.T, leaves)).max())


def log_sum(log_p: Array, cells: Array) -> Array:  # (n, n), (k, n, n) -> (k,)
    """Log of the sum over some cells; -1e300, not -inf, where there are none."""
    chosen = np.where(cells, log_p, -np.inf)
    top = np.maximum(chosen.max((1, 2)), -1e300)
    total = np.exp(chosen - top[:, None, None]).sum((1, 2))
    return np.log(np.maximum(total, 1.0)) + top


def plain_loop(scores: Tensor, mask: Tensor, steps: int = 10_000) -> Tensor:
    """Columns and rows scaled in turn until they stand still, from mild scores."""
    log_p = torch.where(mask, scores, -torch.inf).log_softmax(-1)
    going = torch.arange(len(scores))
    kernel = log_p.exp()
    u = v = torch.ones(len(scores), 1, scores.shape[-1])
    for step in range(steps):
        before = v
        v = 1 / (u @ kernel)
        u = 1 / (v @ kernel.mT)
        if step % 10:
            continue
        done = ((v - before).abs() < 1e-13 * v).all(-1)[:, 0] | (step == steps - 10)
        if done.any():
            log_p[going[done]] += u[done].log().mT + v[done].log()
            going, kernel, u, v = going[~done], kernel[~done], u[~done], v[~done]
        if not len(going):
            break
    return log_p


def residual(p: Tensor) -> Tensor:  # (b, n, n) -> (b,)
    """The largest error of a row or column sum."""
    return torch.maximum((p.sum(-1) - 1).abs(), (p.sum(-2) - 1).abs()).amax(-1)


def largest(x: Tensor) -> Tensor:  # (b, n, n) -> (b,)
    return x.abs().amax((-2, -1))


class Ledger:
    """What went wrong: a line for each problem and each certificate that it lacks."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.lines: list[str] = []

    def check(self, what: str, error: Tensor, bound: Tensor | float) -> None:
        bound = torch.as_tensor(bound).expand(error.shape)
        for k in (~(error <= bound)).nonzero()[:, 0].tolist():
            value, limit = float(error[k]), float(bound[k])
            line = f"{self.problems[k].name}: {what} {value:.3g} > {limit:.3g}"
            self.lines.append(line)


def failures(problems: list[Problem]) -> list[str]:
    ledger = Ledger(problems)
    scores = torch.stack([p.scores for p in problems])
    temperature = torch.tensor([p.temperature for p in problems])
    mask = torch.stack([p.mask for p in problems])
    n = scores.shape[-1]
    graph = matching_graph(mask, (n, n))
    support, per_cell = graph.support, temperature[:, None, None]
    # A mask is given as such, or as scores of -inf for sizes that are even.
    masked = not mask.all()
    by_score = masked and n % 2 == 0
    X = torch.where(mask, scores, -torch.inf) if by_score else scores.clone()
    inputs = X.requires_grad_(), temperature.clone().requires_grad_()
    given = mask if masked and not by_score else None
    weight = torch.randn(X.shape, generator=torch.Generator().manual_seed(n))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_p = log_sinkhorn(*inputs, mask=given)
        p = sinkhorn(*inputs, mask=given)
        logs = (torch.where(support, log_p, 0.0) * weight).sum()
        log_gradients = torch.autograd.grad(logs, inputs)
        gradients = torch.autograd.grad((p * weight).sum(), inputs)
    log_p, p = log_p.detach(), p.detach()

    # Values.
    wrong = (log_p.isfinite() != support) | torch.where(support, ~(p >= 0), p != 0)
    ledger.check("cells that the mask has otherwise:", largest(wrong.double()), 0.0)
    ledger.check("sums of exp(log P) off by", residual(log_p.exp()), SUMS)
    ledger.check("sums of P off by", residual(p), SUMS)
    ledger.check("P and exp(log P) differ by", largest(p - log_p.exp()), CELLS)
    Z = graph.contrasts(scores)
    scaled = graph.contrasts(per_cell * torch.where(support, log_p, 0.0))
    bound = CONTRASTS * largest(Z) + ROUNDING * largest(scores)
    ledger.check("contrasts off by", largest(Z - scaled), bound)
    flows = torch.tensor([imbalance(l.numpy()) for l in log_p])
    ledger.check("log flow in and log flow out differ by", flows, BALANCE)

    # Gradients: of a flow g they are g less the current with the same sums (for P, g is
    # P times the weights), and no current is larger than all that flows.
    for what, (in_scores, in_temperature), flow in (
        ("log P", log_gradients, torch.where(support, weight, 0.0).abs()),
        ("P", gradients, (p * weight).abs()),
    ):
        total = flow.sum((-2, -1))
        gradient = per_cell * in_scores
        ledger.check(
            f"gradient of {what} in the temperature not finite:",
            1.0 - in_temperature.isfinite().double(),
            0.0,
        )
        ledger.check(
            f"gradient of {what} on cells without support:",
            largest(torch.where(support, 0.0, gradient)),
            0.0,
        )
        ledger.check(
            f"gradient of {what} exceeds all that flows:",
            largest(gradient),
            2 * total * (1 + SOLVES),
        )
        sums = torch.maximum(gradient.sum(-1).abs(), gradient.sum(-2).abs()).amax(-1)
        ledger.check(f"sums of the gradient of {what} not zero:", sums, SOLVES * total)

    # Plain iteration, where it gets there: it stands still elsewhere too, unbalanced.
    mild = torch.tensor([q.ratio <= MILD for q in problems])
    if mild.any():
        loop = plain_loop((scores / per_cell)[mild], mask[mild])
        there = torch.tensor([imbalance(l.numpy()) < PLAIN / n for l in loop])
        error = largest(torch.where(support[mild], loop - log_p[mild], 0.0))
        errors = torch.zeros(len(problems))
        errors[mild] = torch.where(there, error, 0.0)
        ledger.check("plain iteration differs by", errors, PLAIN)
    return ledger.lines


@pytest.mark.parametrize("n", range(1, 61))
def test_every_problem_carries_its_certificate(n: int) -> None:
    lines = [line for some in batches(n) for line in failures(some)]
    assert not lines, "\n".join(lines)


# Where a solver has failed: clusters that are tied by next to nothing, once it starts
# far from balance; and flows inside of clusters whose rounding hides those between.
HARD = {
    "two items": ([[13.0, -7.0], [-6.0, 26.0]], 1e-3),
    "ties of three": ([[1, 2, 2], [1, 0, 0], [2, 0, 0]], 1e-4),
    "ties of four": ([[0, 1, 2, 2], [1, 1, 1, 1], [1, 2, 0, 0], [2, 0, 0, 0]], 1e-4),
    "rank one": (
        [
            [2.00, -46.35, 9.65, -34.77, 7.40],
            [2.09, -48.50, 10.10, -36.38, 7.74],
            [-1.71, 39.65, -8.25, 29.74, -6.33],
            [3.33, -77.34, 16.10, -58.01, 12.34],
            [-6.45, 149.78, -31.18, 112.35, -23.90],
        ],
        1.0,
    ),
    "identity": (np.eye(49), 0.03),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_problem_carries_its_certificate(name: str) -> None:
    x, temperature = HARD[name]
    scores = torch.as_tensor(x, dtype=torch.float64)
    mask = torch.ones_like(scores, dtype=torch.bool)
    hard = Problem(name, scores, temperature, mask, math.inf)
    assert not failures([hard])


def test_there_are_a_thousand_problems() -> None:
    assert sum(len(some) for n in range(1, 61) for some in batches(n)) == 1000


def test_the_certificate_is_not_idle() -> None:
    """Sums that are right to the last bit, and flows that are wrong by 200 nats."""
    wrong = torch.tensor([[0.0, -100.0], [-300.0, 0.0]])
    assert residual(wrong.exp()[None]) <= SUMS
    assert imbalance(wrong.numpy()) == pytest.approx(200)
    right = torch.tensor([[0.0, -200.0], [-200.0, 0.0]])
    assert imbalance(right.numpy()) < BALANCE


def test_the_certificate_sees_clusters() -> None:
    """Two pairs, each balanced inside by flows of e^-2, and wrong by 20 between them.

    Rows tell no more than rounding then: all that they exchange is e^-2, to 1e-17.
    """
    log_p = torch.tensor(
        [
            [0.0, -2.0, -80.0, -80.0],
            [-2.0, 0.0, -80.0, -80.0],
            [-60.0, -60.0, 0.0, -2.0],
            [-60.0, -60.0, -2.0, 0.0],
        ]
    )
    assert imbalance(log_p.numpy()) == pytest.approx(20)
