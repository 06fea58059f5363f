# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Markov chain over matchings: propose by gradient, accept by density, exchange."""

from __future__ import annotations

__all__ = ["SwapChain"]

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_permutations.infer.cycle_moves import (
    Cycle,
    apply_cycle,
    draw_cycle,
    log_cycle_proposal,
    reverse_cycle,
    row_logits,
)
from pyro_permutations.infer.matching_space import MatchingSpace
from pyro_permutations.infer.swap_moves import (
    Moves,
    apply_move,
    draw,
    log_proposal,
    moves_from,
    reverse_of,
    score,
)
from pyro_permutations.infer.temperature_ladder import TemperatureLadder
from pyro_permutations.infer.tempered_density import TemperedDensity, Terms, Values

# Of all steps so many try a cycle in place of a swap, and so many a uniform swap, which
# gets a chain out where the gradient misleads it.
CYCLES, UNIFORM = 0.1, 0.1


class Scored(NamedTuple):
    """The moves from R states, and how they change the two parts of the density."""

    moves: Moves
    tempered: Tensor  # (R, B, M)
    fixed: Tensor | None  # (R, B, M); None: not at all


class Proposal(NamedTuple):
    """New states of one site, for each of R replicas."""

    name: str
    column: Tensor  # (R, B, n)
    P: Tensor  # (R, *batch, n, m)
    terms: Terms
    log_ratio: Tensor  # (R,) log of what the acceptance compares with one
    scored: Scored | None


class SwapChain:
    r"""R replicas of all matchings of a model, each at its own temperature.

    A step proposes one move, from the gradient at the state, of one site of each
    replica; evaluates the density and its gradient at the new state; scores the move
    that leads back there; and accepts with probability

    .. math:: \min\Big\{1, \frac{\pi_r(y) \, q(x \mid y)}{\pi_r(x) \, q(y \mid x)}\Big\}

    so every replica leaves its density :math:`\pi_r` unchanged whatever the gradient
    is. Then neighbours may exchange their states.
    """

    def __init__(
        self,
        density: TemperedDensity,
        spaces: dict[str, MatchingSpace],
        P: Values,  # R states, by site
        free: Values,
    ) -> None:
        self.density, self.spaces, self.free = density, spaces, free
        self.names = list(spaces)
        self.shape = {name: value.shape for name, value in P.items()}
        like = P[self.names[0]]
        self.dtype, self.replicas = like.dtype, len(like)
        self.column = {
            name: space.columns(
                P[name].reshape(-1, *space.allowed.shape[:-1], P[name].shape[-1])
            )
            for name, space in spaces.items()
        }
        self._P = P
        self.ladder = TemperatureLadder(self.replicas)
        self.beta = like.new_tensor(self.ladder.beta)
        self.curvature: dict[str, Tensor | None] = {}
        self._curvatures = 0
        self.refresh(free)
        self.measure_curvature()
        self._accepted = torch.zeros(self.replicas, device=like.device)
        self.reset_counts()

    @property
    def acceptance(self) -> float:
        """Rate of accepted proposals at temperature one, since the last reset."""
        return float(self._accepted[0]) / max(self._steps, 1)

    def reset_counts(self) -> None:
        """Forget the rates."""
        self._accepted.zero_()
        self._steps = 0
        self.ladder.reset()

    def matrices(self) -> Values:
        """The matchings of all replicas, of the shapes of the model."""
        return self._P

    def refresh(self, free: Values) -> None:
        """Take new values of the continuous sites."""
        self.free = free
        self.terms = self._evaluate(self.matrices())
        self._scored: dict[str, Scored] = {}

    def measure_curvature(self) -> None:
        """Average the curvature over one state more."""
        one = {name: x[0] for name, x in self._P.items()}
        free = {name: x[0] for name, x in self.free.items()}
        self._curvatures += 1
        for name, block in self.density.curvature(one, free).items():
            old = self.curvature.get(name)
            if block is None and old is None:
                continue
            if block is not None:  # zero at the cells for being unmatched
                n, m = self.shape[name][-2:]
                block = pad(block.reshape(-1, n, m, n, m), (0, 1, 0, 0, 0, 1))
                block = block.reshape(len(block), n * (m + 1), n * (m + 1))
            old = torch.zeros_like(block) if old is None else old  # type: ignore[arg-type]
            block = torch.zeros_like(old) if block is None else block
            self.curvature[name] = old + (block - old) / self._curvatures
        self._scored = {}

    def step(self) -> None:
        """One proposal in each replica, and one turn of exchanges."""
        site, kind = torch.rand(2).tolist()
        name = self.names[int(site * len(self.names))]
        if kind < CYCLES and self.spaces[name].shape[1] > 2:
            self._accept(self.cycle(name, *self.draw_walk(name)))
        else:
            uniform = kind > 1 - UNIFORM
            log_q = self.log_swaps(name, uniform)
            self._accept(self.swap(name, uniform, log_q, draw(log_q)))
        self._steps += 1
        if self.replicas > 1:
            order = self.ladder.exchange(self.terms.tempered)
            if order is not None:
                self._reorder(order)

    def adapt_ladder(self) -> None:
        """Move the temperatures, from the rates of exchange since the last time."""
        self.ladder.adapt()
        self.beta = self.beta.new_tensor(self.ladder.beta)

    # Proposals: what may be drawn, and what is proposed when it has been

    def log_swaps(self, name: str, uniform: bool) -> Tensor:  # (R, B M)
        """Log probability of every move that may be proposed."""
        if name not in self._scored:
            self._scored[name] = self._score(name, self.column[name], self.terms)
        return self._log_proposal(self._scored[name], uniform)

    def swap(
        self,
        name: str,
        uniform: bool,
        log_q: Tensor,  # (R, B M)
        chosen: Tensor,  # (R,) long
    ) -> Proposal:
        """The state after one move, and how likely it is accepted."""
        space, x = self.spaces[name], self.column[name]
        y = apply_move(space, x, self._scored[name].moves, chosen)
        P, terms = self._at(name, y)
        scored = self._score(name, y, terms)
        log_r = self._log_proposal(scored, uniform)
        forward = log_q.gather(-1, chosen[:, None])[:, 0]
        back = log_r.gather(-1, reverse_of(space, x, chosen)[:, None])[:, 0]
        # Where no move is feasible the state stays, whatever was chosen.
        ratio = torch.where(forward > -torch.inf, back - forward, -torch.inf)
        return Proposal(name, y, P, terms, self._gain(terms) + ratio, scored)

    def draw_walk(self, name: str) -> tuple[Tensor, Cycle]:
        """A random matrix of each batch, and a walk over its rows."""
        B = len(self.spaces[name].allowed)
        element = torch.randint(B, (self.replicas,), device=self.beta.device)
        one, x, logits = self._of(name, self.column[name], element, self.terms)
        return element, draw_cycle(one, x, logits)

    def cycle(self, name: str, element: Tensor, walk: Cycle) -> Proposal:
        """The state after a walk, and how likely it is accepted."""
        one, x, logits = self._of(name, self.column[name], element, self.terms)
        state = torch.arange(self.replicas, device=element.device)
        y = self.column[name].clone()
        y[state, element] = apply_cycle(x, walk)
        P, terms = self._at(name, y)
        _, new, there = self._of(name, y, element, terms)
        ratio = log_cycle_proposal(one, new, there, reverse_cycle(one, x, walk))
        ratio = ratio - log_cycle_proposal(one, x, logits, walk)
        return Proposal(name, y, P, terms, self._gain(terms) + ratio, None)

    def _accept(self, proposal: Proposal) -> None:
        limit = -torch.empty_like(self.beta).exponential_()
        accept = proposal.log_ratio > limit  # not if NaN
        answers = accept.tolist()
        if not any(answers):
            return
        self._accepted += accept
        name = proposal.name
        known, self._scored = self._scored.get(name), {}

        def pick(new: Tensor, old: Tensor) -> Tensor:
            if all(answers):
                return new
            return torch.where(accept.view(-1, *[1] * (new.dim() - 1)), new, old)

        self.column[name] = pick(proposal.column, self.column[name])
        self._P = {**self._P, name: pick(proposal.P, self._P[name])}
        self.terms = _join_terms(pick, proposal.terms, self.terms)
        if proposal.scored is not None and known is not None:
            self._scored[name] = _join_scored(pick, proposal.scored, known)

    # What a step needs

    def _score(self, name: str, column: Tensor, terms: Terms) -> Scored:
        moves = moves_from(self.spaces[name], column)
        change = score(moves, terms.tempered_gradient[name], self.curvature.get(name))
        fixed = None
        if terms.fixed_gradient:
            fixed = score(moves, terms.fixed_gradient[name], None)
        return Scored(moves, change, fixed)

    def _log_proposal(self, scored: Scored, uniform: bool) -> Tensor:
        change = self.beta[:, None, None] * scored.tempered
        if scored.fixed is not None:
            change = change + scored.fixed
        if uniform:
            change = torch.zeros_like(change)
        return log_proposal(change, scored.moves.feasible)

    def _of(
        self, name: str, column: Tensor, element: Tensor, terms: Terms
    ) -> tuple[MatchingSpace, Tensor, Tensor]:
        """One matrix of each batch: its space, its state, and what walks go by."""
        space = self.spaces[name]
        one = MatchingSpace(
            space.allowed[element], space.free_columns[element], space.has_slack
        )
        state = torch.arange(self.replicas, device=element.device)
        x, curvature = column[state, element], self.curvature.get(name)
        gradient = terms.tempered_gradient[name][state, element]
        logits = row_logits(one, x, gradient, curvature, element)
        logits = self.beta[:, None, None] * logits
        if terms.fixed_gradient:
            gradient = terms.fixed_gradient[name][state, element]
            logits = logits + row_logits(one, x, gradient, None, element)
        return one, x, logits

    def _gain(self, terms: Terms) -> Tensor:
        """Log density after, less that before, of each replica at its temperature."""
        tempered = self.beta * (terms.tempered - self.terms.tempered)
        return terms.fixed - self.terms.fixed + tempered

    def _at(self, name: str, column: Tensor) -> tuple[Tensor, Terms]:
        P = self._matrix(name, column)
        return P, self._evaluate({**self._P, name: P})

    def _matrix(self, name: str, column: Tensor) -> Tensor:
        flat = self.spaces[name].matrices(column, self.dtype)
        return flat.reshape(self.shape[name])

    def _evaluate(self, P: Values) -> Terms:
        """Terms with gradients laid out flat, zero at the cells for being unmatched."""
        terms = self.density(P, self.free)

        def flat(gradients: Values) -> Values:
            return {
                name: pad(g, (0, 1)).reshape(*self.column[name].shape[:2], -1)
                for name, g in gradients.items()
            }

        gradients = flat(terms.fixed_gradient), flat(terms.tempered_gradient)
        return Terms(terms.fixed, terms.tempered, *gradients)

    def _reorder(self, order: list[int]) -> None:
        index = torch.tensor(order, device=self.beta.device)

        def take(x: Tensor, _: Tensor) -> Tensor:
            return x[index]

        self.column = {name: x[index] for name, x in self.column.items()}
        self._P = {name: x[index] for name, x in self._P.items()}
        self.free = {name: x[index] for name, x in self.free.items()}
        self.terms = _join_terms(take, self.terms, self.terms)
        self._scored = {k: _join_scored(take, x, x) for k, x in self._scored.items()}


Join = Callable[[Tensor, Tensor], Tensor]


def _join_terms(join: Join, x: Terms, y: Terms) -> Terms:
    def both(a: Values, b: Values) -> Values:
        return {name: join(a[name], b[name]) for name in a}

    return Terms(
        join(x.fixed, y.fixed),
        join(x.tempered, y.tempered),
        both(x.fixed_gradient, y.fixed_gradient),
        both(x.tempered_gradient, y.tempered_gradient),
    )


def _join_scored(join: Join, x: Scored, y: Scored) -> Scored:
    moves = Moves(*(join(a, b) for a, b in zip(x.moves, y.moves, strict=True)))
    fixed = None if x.fixed is None or y.fixed is None else join(x.fixed, y.fixed)
    return Scored(moves, join(x.tempered, y.tempered), fixed)
