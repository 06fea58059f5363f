# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The Markov chain over matchings: propose by gradient, accept by density, exchange."""

from __future__ import annotations

__all__ = ["SwapChain"]

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_permutations.infer.cycle_moves import (
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
# The moves from the current states, and the changes of both parts of the density.
Scored = tuple[Moves, Tensor, Tensor | None]


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
        one = {name: x[0] for name, x in self.matrices().items()}
        found = self.density.curvature(
            one, {name: x[0] for name, x in self.free.items()}
        )
        self._curvatures += 1
        for name, block in found.items():
            old = self.curvature.get(name)
            if block is None:
                if old is not None:
                    self.curvature[name] = old * (1 - 1 / self._curvatures)
                continue
            n, m = self.shape[name][-2:]
            size = block.shape[0], n, m, n, m
            block = pad(block.reshape(size), (0, 1, 0, 0, 0, 1))
            block = block.reshape(len(block), n * (m + 1), n * (m + 1))
            old = torch.zeros_like(block) if old is None else old
            self.curvature[name] = old + (block - old) / self._curvatures
        self._scored = {}

    def step(self) -> None:
        """One proposal in each replica, and one turn of exchanges."""
        site, kind = torch.rand(2).tolist()
        name = self.names[int(site * len(self.names))]
        if kind < CYCLES and self.spaces[name].shape[1] > 2:
            self._try_cycle(name)
        else:
            self._try_swap(name, uniform=kind > 1 - UNIFORM)
        self._steps += 1
        if self.replicas > 1:
            order = self.ladder.exchange(self.terms.tempered)
            if order is not None:
                self._reorder(order)

    def adapt_ladder(self) -> None:
        """Move the temperatures, from the rates of exchange since the last time."""
        self.ladder.adapt()
        self.beta = self.beta.new_tensor(self.ladder.beta)

    # A swap, and a cycle

    def _try_swap(self, name: str, uniform: bool) -> None:
        space, x = self.spaces[name], self.column[name]
        if name not in self._scored:
            self._scored[name] = self._score(name, x, self.terms)
        moves, *changes = self._scored[name]
        log_q = log_proposal(self._weight(changes, uniform), moves.feasible)
        noise = torch.empty_like(log_q).exponential_().log()
        chosen = (log_q - noise).argmax(-1)
        y = apply_move(space, x, moves, chosen)
        P = self._matrix(name, y)
        terms = self._evaluate({**self._P, name: P})
        scored = self._score(name, y, terms)
        log_r = log_proposal(self._weight(scored[1:], uniform), scored[0].feasible)
        back = reverse_of(space, x, chosen)
        forward = log_q.gather(-1, chosen[:, None])[:, 0]
        backward = log_r.gather(-1, back[:, None])[:, 0]
        # Where no move is feasible the state stays, whatever was chosen.
        ratio = torch.where(forward > -torch.inf, backward - forward, -torch.inf)
        self._accept(name, (y, P), terms, ratio, scored)

    def _try_cycle(self, name: str) -> None:
        space, x = self.spaces[name], self.column[name]
        state = torch.arange(self.replicas, device=x.device)
        element = torch.randint(len(space.allowed), (self.replicas,), device=x.device)
        one = MatchingSpace(
            space.allowed[element], space.free_columns[element], space.has_slack
        )
        column = x[state, element]
        logits = self._row_logits(name, one, column, element, self.terms)
        cycle = draw_cycle(one, column, logits)
        new = apply_cycle(column, cycle)
        y = x.clone()
        y[state, element] = new
        P = self._matrix(name, y)
        terms = self._evaluate({**self._P, name: P})
        back = reverse_cycle(one, column, cycle)
        there = self._row_logits(name, one, new, element, terms)
        ratio = log_cycle_proposal(one, new, there, back)
        ratio = ratio - log_cycle_proposal(one, column, logits, cycle)
        self._accept(name, (y, P), terms, ratio, None)

    def _accept(
        self,
        name: str,
        new: tuple[Tensor, Tensor],  # columns and matrices
        terms: Terms,
        log_ratio: Tensor,  # (R,) log q(x | y) - log q(y | x)
        scored: Scored | None,
    ) -> None:
        old = self.terms
        change = terms.fixed - old.fixed + self.beta * (terms.tempered - old.tempered)
        limit = -torch.empty_like(change).exponential_()
        accept = change + log_ratio > limit  # not if NaN
        answers = accept.tolist()
        if not any(answers):
            return
        self._accepted += accept
        if all(answers):
            (self.column[name], P), self.terms = new, terms
            self._P = {**self._P, name: P}
            self._scored = {} if scored is None else {name: scored}
            return

        def pick(after: Tensor, before: Tensor) -> Tensor:
            which = accept.view(-1, *[1] * (after.dim() - 1))
            return torch.where(which, after, before)

        self.column[name] = pick(new[0], self.column[name])
        self._P = {**self._P, name: pick(new[1], self._P[name])}
        self.terms = _join_terms(pick, terms, old)
        known = self._scored.get(name)
        self._scored = {}
        if scored is not None and known is not None:
            self._scored[name] = _join_scored(pick, scored, known)

    # What a step needs

    def _score(self, name: str, column: Tensor, terms: Terms) -> Scored:
        moves = moves_from(self.spaces[name], column)
        change = score(moves, terms.tempered_gradient[name], self.curvature.get(name))
        fixed = None
        if terms.fixed_gradient:
            fixed = score(moves, terms.fixed_gradient[name], None)
        return moves, change, fixed

    def _weight(
        self, changes: list[Tensor | None] | tuple[Tensor | None, ...], uniform: bool
    ) -> Tensor:
        change, fixed = changes
        assert change is not None
        if uniform:
            return torch.zeros_like(change)
        change = self.beta[:, None, None] * change
        return change if fixed is None else change + fixed

    def _row_logits(
        self,
        name: str,
        one: MatchingSpace,
        column: Tensor,
        element: Tensor,
        terms: Terms,
    ) -> Tensor:
        state = torch.arange(self.replicas, device=column.device)
        gradient = terms.tempered_gradient[name][state, element]
        curvature = self.curvature.get(name)
        logits = row_logits(one, column, gradient, curvature, element)
        logits = self.beta[:, None, None] * logits
        if terms.fixed_gradient:
            gradient = terms.fixed_gradient[name][state, element]
            logits = logits + row_logits(one, column, gradient, None, element)
        return logits

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
    moves = Moves(*(join(a, b) for a, b in zip(x[0], y[0], strict=True)))
    fixed = None if x[2] is None or y[2] is None else join(x[2], y[2])
    return moves, join(x[1], y[1]), fixed
