# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Detailed balance of the swap chain, by its exact transition matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from pyro_permutations import GibbsMatching
from pyro_permutations.infer.cycle_moves import Cycle, log_cycle_proposal
from pyro_permutations.infer.matching_space import MatchingSpace
from pyro_permutations.infer.swap_chain import SwapChain
from pyro_permutations.infer.temperature_ladder import TemperatureLadder
from pyro_permutations.infer.tempered_density import TemperedDensity

EXACT = 1e-12  # of probabilities that are computed twice, in float64


def all_matchings(d: GibbsMatching) -> Tensor:
    """Every matrix of zeros and ones that the support has, by trying all columns."""
    n, m = d.event_shape
    found = []
    for columns in itertools.product(range(m + 1), repeat=n):
        P = torch.zeros(n, m + 1)
        P[torch.arange(n), torch.tensor(columns)] = 1
        if (P[:, :m].sum(0) <= 1).all() and d.support.check(P[:, :m]):
            found.append(P[:, :m])
    return torch.stack(found)


def ring(n: int) -> Tensor:
    """Each row has its own column and the next: two perfect matchings."""
    return torch.eye(n, dtype=torch.bool) | torch.eye(n, dtype=torch.bool).roll(1, 1)


def block(n: int) -> Tensor:
    """A problem of n items among four: the last rows and columns are padding."""
    return (torch.arange(4) < n) & (torch.arange(4)[:, None] < n)


LOGITS = torch.tensor(
    [
        [1.0, -0.5, 0.2, 0.7],
        [0.3, 0.8, -1.0, 0.1],
        [-0.2, 0.4, 0.9, -0.6],
        [0.5, -0.3, 0.6, 0.0],
    ]
).double()
BAND = ~(torch.eye(4, dtype=torch.bool).flip(0))
INF = torch.inf
CASES = {
    "full 3": lambda: GibbsMatching(LOGITS[:3, :3]),
    "full 4": lambda: GibbsMatching(LOGITS),
    "mask 4": lambda: GibbsMatching(LOGITS, mask=BAND),
    "ring 3": lambda: GibbsMatching(LOGITS[:3, :3], mask=ring(3)),
    "ring 4": lambda: GibbsMatching(LOGITS, mask=ring(4)),
    "padded to 4": lambda: GibbsMatching(LOGITS, mask=block(3)),
    "injection 2x3": lambda: GibbsMatching(LOGITS[:2, :3]),
    "injection 3x4": lambda: GibbsMatching(LOGITS[:3], mask=BAND[:3]),
    "partial 2x2": lambda: GibbsMatching(LOGITS[:2, :2], unmatched=(0.1, -0.2)),
    "partial 3x3": lambda: GibbsMatching(
        LOGITS[:3, :3], mask=BAND[1:, 1:], unmatched=(0.0, 0.3)
    ),
    "partial 3x2": lambda: GibbsMatching(LOGITS[:3, :2], unmatched=(0.0, 0.3)),
    "a row that has to be matched": lambda: GibbsMatching(
        LOGITS[:3, :3], unmatched=(torch.tensor([-INF, 0.0, 0.0]).double(), 0.0)
    ),
    "a column that has to be matched": lambda: GibbsMatching(
        LOGITS[:3, :3], unmatched=(0.0, torch.tensor([0.0, -INF, 0.0]).double())
    ),
}


def chain_of(
    d: GibbsMatching, likelihood: Callable[[Tensor], Tensor]
) -> tuple[SwapChain, Tensor]:
    """A chain with one replica in every state, all at one temperature."""

    def model() -> None:
        P = pyro.sample("P", d)
        pyro.factor("likelihood", likelihood(P))

    states = all_matchings(d)
    return chain_at(model, d, states), states


def chain_at(model: Callable[[], Any], d: GibbsMatching, states: Tensor) -> SwapChain:
    trace = pyro.poutine.trace(model).get_trace()
    density = TemperedDensity(model, trace)
    density.prepare({"P": states}, {}, {"P": states.flip(0)})
    spaces = {"P": MatchingSpace.of(d.graph, d.batch_shape)}
    chain = SwapChain(density, spaces, {"P": states}, {})
    chain.beta = torch.full_like(chain.beta, 0.8)
    return chain


def rough(P: Tensor) -> Tensor:
    """Nonlinear, so that first and second order are both wrong."""
    x = torch.linspace(0.3, 1.9, P.shape[-1]).double()
    y = P @ x
    return (3 * y.sin() * torch.arange(1.0, 1 + P.shape[-2]).double()).sum() + (
        y[0] * y[-1] ** 2 - (P[0] * P[-1].roll(1)).sum()
    )


def row_of(states: Tensor) -> dict[tuple[int, ...], int]:
    return {tuple(P.flatten().int().tolist()): s for s, P in enumerate(states)}


def swap_matrix(chain: SwapChain, states: Tensor, uniform: bool) -> Tensor:
    """K[x, y], from what the chain proposes and how it accepts."""
    index = row_of(states)
    log_q = chain.log_swaps("P", uniform)
    assert (
        torch.allclose(log_q.exp().sum(-1), torch.ones(len(states)), atol=EXACT)
        or (log_q == -INF).all(-1).any()
    )
    K = torch.zeros(len(states), len(states))
    for move in range(log_q.shape[-1]):
        chosen = torch.full((len(states),), move)
        proposal = chain.swap("P", uniform, log_q, chosen)
        flow = log_q[:, move].exp() * proposal.log_ratio.clamp(max=0).exp()
        for x, P in enumerate(proposal.P):
            if log_q[x, move] > -INF:
                K[x, index[tuple(P.flatten().int().tolist())]] += flow[x]
    return K + torch.diag(1 - K.sum(-1))


def walks(chain: SwapChain) -> list[tuple[int, list[int], list[int]]]:
    """Every start and sequence of distinct columns, from every state."""
    found = []
    columns = chain.column["P"][:, 0].tolist()
    m = chain.spaces["P"].shape[2]
    for s, column in enumerate(columns):
        owner = {c: i for i, c in enumerate(column) if c < m}
        for first in range(len(column)):
            stack = [([first], [])]
            while stack:
                rows, taken = stack.pop()
                for c in set(range(m + 1)) - set(taken):
                    after = owner.get(c)
                    if after is None or after == first:
                        found.append((s, rows, [*taken, c]))
                    elif after not in rows:
                        stack.append(([*rows, after], [*taken, c]))
    return found


def cycle_matrix(model: Any, d: GibbsMatching, states: Tensor) -> Tensor:
    index = row_of(states)
    n = d.event_shape[0]
    all_walks = walks(chain_at(model, d, states))
    start = torch.tensor([s for s, _, _ in all_walks])
    chain = chain_at(model, d, states[start])
    pads = [[*x, *[0] * (n - len(x))] for _, x, _ in all_walks]
    takes = [[*x, *[0] * (n - len(x))] for _, _, x in all_walks]
    length = torch.tensor([len(x) for _, x, _ in all_walks])
    walk = Cycle(torch.tensor(pads), torch.tensor(takes), length)
    element = torch.zeros(len(start), dtype=torch.long)
    one, x, logits = chain._of("P", chain.column["P"], element, chain.terms)
    log_q = log_cycle_proposal(one, x, logits, walk) - torch.tensor(n).log()
    possible = log_q > -INF
    proposal = chain.cycle("P", element, walk)
    flow = log_q.exp() * proposal.log_ratio.clamp(max=0).exp()
    K = torch.zeros(len(states), len(states))
    for w in possible.nonzero()[:, 0].tolist():
        K[start[w], index[tuple(proposal.P[w].flatten().int().tolist())]] += flow[w]
    # What a walk may do sums to one but for dead ends.
    total = torch.zeros(len(states)).scatter_add(0, start, log_q.exp())
    assert (total < 1 + EXACT).all()
    if d.graph.is_full:
        assert torch.allclose(total, torch.ones(len(states)), atol=EXACT)
    return K + torch.diag(1 - K.sum(-1))


def target(chain: SwapChain) -> Tensor:
    log_density = chain.terms.fixed + chain.beta * chain.terms.tempered
    return log_density.softmax(0)


def check_balance(K: Tensor, pi: Tensor) -> None:
    flow = pi[:, None] * K
    assert (K > -EXACT).all()
    assert torch.allclose(flow, flow.mT, rtol=0, atol=EXACT)
    assert torch.allclose(pi @ K, pi, rtol=0, atol=EXACT)


@pytest.mark.parametrize("uniform", [False, True], ids=["informed", "uniform"])
@pytest.mark.parametrize("case", CASES)
def test_swaps_are_in_detailed_balance(case: str, uniform: bool) -> None:
    chain, states = chain_of(CASES[case](), rough)
    K = swap_matrix(chain, states, uniform)
    check_balance(K, target(chain))


@pytest.mark.parametrize("case", [name for name in CASES if "2x" not in name])
def test_cycles_are_in_detailed_balance(case: str) -> None:
    d = CASES[case]()

    def model() -> None:
        pyro.factor("likelihood", rough(pyro.sample("P", d)))

    states = all_matchings(d)
    K = cycle_matrix(model, d, states)
    chain = chain_at(model, d, states)
    check_balance(K, target(chain))
    # Both kinds together reach every state from every other.
    both = K + swap_matrix(chain, states, uniform=True)
    assert (torch.linalg.matrix_power(both, len(states)) > 0).all()


def test_swaps_alone_cannot_turn_a_ring() -> None:
    chain, states = chain_of(CASES["ring 4"](), rough)
    assert len(states) == 2
    assert torch.equal(swap_matrix(chain, states, uniform=True), torch.eye(2))


def test_exchanges_are_in_detailed_balance() -> None:
    """The rates of exchange of two replicas, from many calls, against the formula."""
    ladder = TemperatureLadder(2)
    ladder.beta = [1.0, 0.4]
    T = torch.tensor([0.7, -0.9])
    calls = 40_000
    swapped = sum(ladder.exchange(T) is not None for _ in range(calls))
    # Every other turn has no pair; an exchange gains (1 - .4) (-.9 - .7) = -.96 nats.
    rate = torch.tensor(-0.96).exp() / 2
    error = (rate * (1 - rate) / calls) ** 0.5
    assert abs(swapped / calls - rate) < 4.5 * error
    assert ladder.rejection[0] == pytest.approx(1 - 2 * float(rate), abs=1e-6)
    assert ladder.exchange(T.flip(0)) in (None, [1, 0])


def test_the_ladder_moves_to_equal_rates() -> None:
    ladder = TemperatureLadder(4)
    assert ladder.beta[0] == 1.0
    assert ladder.beta[-1] == 0.0
    ladder._rejected, ladder._tried = [30.0, 10.0, 20.0], [100, 100, 100]
    ladder.beta = [1.0, 0.6, 0.3, 0.0]
    ladder.adapt()
    # A barrier of .3, .1 and .2 in parts of .2: two thirds down the first step, ...
    expected = [1.0, 1 - 0.4 * 2 / 3, 0.3, 0.0]
    assert ladder.beta == pytest.approx(expected)
    assert ladder.rejection == [1.0, 1.0, 1.0]  # none tried since
    assert TemperatureLadder(1).exchange(torch.zeros(1)) is None
