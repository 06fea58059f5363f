# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""MatchingPosterior against laws that are known by enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracles import permutations
from torch import Tensor

from pyro_permutations import MatchingPosterior, to_indices, to_matrix
from pyro_permutations.effective_draws import effective_counts, effective_draws

SIGMAS = 4  # standard errors that count as chance
ROUNDING = 1e-12  # of sums of some hundred float64 terms
HELD = 1e-9  # what a set that holds a mass may lack of it, for the rounding of sums


def gibbs(X: Tensor) -> tuple[Tensor, Tensor]:
    """All permutations, as indices, and their probabilities under exp<X, P>."""
    P = permutations(len(X))
    return to_indices(P), (P * X).sum((-1, -2)).softmax(0)


def exact(n: int = 6, scale: float = 2.0, seed: int = 0) -> MatchingPosterior:
    torch.manual_seed(seed)
    perm, weights = gibbs(scale * torch.randn(n, n))
    return MatchingPosterior(perm, weights=weights, exact=True)


def draws_of(law: MatchingPosterior, count: int) -> Tensor:
    return law.perm[torch.multinomial(law.weights, count, replacement=True)]


def partial_matchings(n: int, m: int) -> Tensor:
    """All partial matchings of n rows and m columns, as indices."""
    return torch.tensor(
        [
            p
            for p in itertools.product(range(-1, m), repeat=n)
            if len({j for j in p if j >= 0}) == sum(j >= 0 for j in p)
        ]
    )


def test_an_exact_law_has_its_own_marginals_and_no_errors() -> None:
    law = exact(5)
    probability, error = law.marginals()
    P = to_matrix(law.perm)
    expected = (law.weights[:, None, None] * P).sum(0)
    torch.testing.assert_close(probability[:, :-1], expected, atol=ROUNDING, rtol=0)
    assert (probability[:, -1] == 0).all()
    assert (error == 0).all()
    value, bias = law.entropy()
    torch.testing.assert_close(value, torch.special.entr(law.weights).sum())
    assert bias == 0
    values, biases = law.item_entropies()
    torch.testing.assert_close(values, torch.special.entr(expected).sum(-1))
    assert (biases == 0).all()
    top = law.top_matchings(120)
    torch.testing.assert_close(top.probability, law.weights.sort(descending=True)[0])
    assert (top.error == 0).all()
    assert torch.equal(law.mode, law.perm[law.weights.argmax()])


@pytest.mark.parametrize("seed", range(5))
def test_marginals_of_draws_are_within_their_errors(seed: int) -> None:
    law = exact(seed=seed)
    drawn = MatchingPosterior(draws_of(law, 2000))
    probability, error = drawn.marginals()
    assert ((probability - law.marginals()[0]).abs() <= SIGMAS * error)[:, :-1].all()
    torch.testing.assert_close(probability.sum(-1), torch.ones(6))
    # What was never drawn is not known to be impossible.
    assert (error > 0.7 / 2001).all()


def test_errors_are_those_of_a_frequency() -> None:
    perm = torch.tensor([[0, 1]] * 30 + [[1, 0]] * 70)
    _, error = MatchingPosterior(perm).marginals()
    expected = (0.3 * 0.7 / 100) ** 0.5
    assert abs(float(error[0, 0]) - expected) < 0.01 * expected  # half a draw each way
    weights = torch.rand(100)
    weighted = MatchingPosterior(perm, weights=7 * weights)
    p, error = weighted.marginals()
    assert abs(float(p[0, 0]) - float(weights[:30].sum() / weights.sum())) < ROUNDING
    size = weights.sum() ** 2 / weights.square().sum()
    expected = float(p[0, 0] * p[0, 1] / size) ** 0.5
    assert abs(float(error[0, 0]) - expected) < 0.01 * expected


def test_mass_of_the_ten_best_is_that_of_enumeration() -> None:
    """Report 77: n = 6, scale 2, k = 10, within .05."""
    for seed in range(5):
        law = exact(seed=seed)
        top = MatchingPosterior(draws_of(law, 2000)).top_matchings(10)
        covered = float(law.top_matchings(10).probability.sum())
        assert abs(float(top.probability.sum()) - covered) < 0.05
        for perm, p, error in zip(*top, strict=True):
            truth = float(law.weights[(law.perm == perm).all(-1)])
            # The likeliest of 720 are chosen: five errors, not four.
            assert abs(float(p) - truth) < 5 * float(error)
        assert float(top.error.max()) < 0.05


def test_mode_is_the_heaviest_and_not_the_most_frequent() -> None:
    perm = torch.tensor([[0, 1, 2], [1, 0, 2], [1, 0, 2]])
    assert MatchingPosterior(perm).mode.tolist() == [1, 0, 2]
    heavy = MatchingPosterior(perm, weights=torch.tensor([0.6, 0.2, 0.2]))
    assert heavy.mode.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (3, 3, "partial"), (4, 2)])
def test_best_maximises_the_items_that_are_right(
    shape: tuple[int, ...], seed: int
) -> None:
    n, m = shape[:2]
    perm = partial_matchings(n, m)
    if len(shape) == 2:
        most = (perm >= 0).sum(-1) == min(n, m)
        perm = perm[most]
    torch.manual_seed(seed)
    law = MatchingPosterior(
        perm, m, weights=(2 * torch.randn(len(perm))).softmax(0), exact=True
    )
    probability = law.marginals()[0]
    right = probability[torch.arange(n), torch.where(perm < 0, m, perm)].sum(-1)
    found = law.best
    place = (perm == found).all(-1)
    assert place.any(), "it is one of the matchings"
    torch.testing.assert_close(right[place][0], right.max())


def test_best_uses_only_pairs_that_were_drawn() -> None:
    # With all pairs, 0-1, 1-0 and 2-2 would have 1.2 items right; nobody drew 2-2.
    perm = torch.tensor([[1, 2, 0], [2, 0, 1]])
    best = MatchingPosterior(perm, weights=torch.tensor([0.6, 0.4])).best
    assert best.tolist() == [1, 2, 0]


@pytest.mark.parametrize("mass", [0.5, 0.9, 1.0])
def test_credible_sets_hold_their_mass_and_are_the_smallest(mass: float) -> None:
    for scale in (0.3, 2.0, 6.0):
        law = exact(4, scale)
        probability = law.marginals()[0]
        inside = law.credible_names(mass)
        held = torch.where(inside, probability, 0.0).sum(-1)
        assert (held >= mass - HELD).all()
        # One fewer does not hold it, whichever they are.
        size = inside.sum(-1)
        top = probability.sort(-1, descending=True).values.cumsum(-1)
        before = torch.where(
            size > 1, top.gather(-1, (size - 2).clamp_min(0)[:, None])[:, 0], 0.0
        )
        assert (before < mass).all()
        chosen = law.credible_matchings(mass)
        total = float(chosen.probability.sum())
        assert total >= mass - HELD
        assert total - float(chosen.probability[-1]) < mass


def test_coverage_of_credible_sets_is_exact() -> None:
    """How often a draw of the law is in the set is what the set says it holds."""
    law = exact(4, 1.0)
    inside = law.credible_names(0.9)
    hit = inside[torch.arange(4), law.perm]  # (24, 4), of each matching
    coverage = (law.weights[:, None] * hit).sum(0)
    held = torch.where(inside, law.marginals()[0], 0.0).sum(-1)
    torch.testing.assert_close(coverage, held, atol=ROUNDING, rtol=0)
    assert (coverage >= 0.9 - ROUNDING).all()


def test_a_law_of_exactly_the_mass_is_in_its_set() -> None:
    perm = torch.tensor([[0, 1], [1, 0]])
    law = MatchingPosterior(perm, weights=torch.tensor([0.9, 0.1]), exact=True)
    assert law.credible_names(0.9).sum(-1).tolist() == [1, 1]
    assert law.credible_names(0.91).sum(-1).tolist() == [2, 2]
    assert len(law.credible_matchings(0.9).perm) == 1


def test_entropy_is_too_low_by_at_least_its_bias() -> None:
    law = exact(4, 0.3)
    truth, count = float(law.entropy()[0]), 200
    found = [MatchingPosterior(draws_of(law, count)).entropy() for _ in range(1000)]
    values = torch.tensor([float(value) for value, _ in found])
    biases = torch.tensor([float(bias) for _, bias in found])
    chance = SIGMAS * float(values.std()) / 1000**0.5
    assert abs(float(biases.mean())) > 5 * chance, "there is something to see"
    assert truth - float(values.mean()) > float(biases.mean()) - chance
    # With hardly any matching left undrawn the two agree.
    assert truth - float(values.mean()) < 1.5 * float(biases.mean()) + chance


def test_candidates_have_names_probabilities_and_errors() -> None:
    """Report 74: the five likeliest names of each of 15 items."""
    torch.manual_seed(0)
    perm = torch.stack([torch.randperm(15) for _ in range(300)])
    perm[:, 0] = torch.where(torch.rand(300) < 0.3, -1, perm[:, 0])
    names = [f"AVA{j}" for j in range(15)]
    posterior = MatchingPosterior(perm)
    probability, error = posterior.marginals()
    found = posterior.candidates(5, names)
    assert [len(item) for item in found] == [5] * 15
    assert found[0][0].name == "unmatched"
    assert found[0][0].column == -1
    for i, item in enumerate(found):
        expected = probability[i].sort(descending=True).values[:5]
        assert [c.probability for c in item] == expected.tolist()
        for c in item:
            assert c.name == ("unmatched" if c.column < 0 else names[c.column])
            assert c.probability == float(probability[i, c.column])
            assert c.error == float(error[i, c.column])
    assert found[1][0].name != str(found[1][0].column)
    assert posterior.candidates(1)[1][0].name == str(found[1][0].column)
    with pytest.raises(ValueError, match="one for each of 15 columns, got 3"):
        posterior.candidates(5, ["a", "b", "c"])
    # What was never drawn is no candidate.
    assert len(MatchingPosterior(perm[:1]).candidates(5)[1]) == 1


def test_a_batch_is_its_elements() -> None:
    laws = [exact(4, 2.0, seed) for seed in range(6)]
    perm = laws[0].perm[:, None, None, :].expand(-1, 2, 3, -1)
    weights = torch.stack([law.weights for law in laws], -1).reshape(-1, 2, 3)
    batch = MatchingPosterior(perm, weights=weights, exact=True)
    assert batch.batch_shape == (2, 3)
    assert repr(batch) == (
        "MatchingPosterior(exact, 24 draws of 4 x 4, batch_shape=(2, 3))"
    )
    flat = [one for row in batch for one in row]
    for k, (law, one) in enumerate(zip(laws, flat, strict=True)):
        i, j = divmod(k, 3)
        assert one.batch_shape == batch[i, j].batch_shape == ()
        for method in ("marginals", "entropy", "item_entropies", "credible_names"):
            alone, element = getattr(law, method)(), getattr(batch, method)()
            if isinstance(alone, tuple):
                alone, element = alone[0], element[0]
            torch.testing.assert_close(element[i, j], alone)
        assert torch.equal(batch.mode[i, j], law.mode)
        assert torch.equal(batch.best[i, j], law.best)
    with pytest.raises(ValueError, match=r"batch shape \(2, 3\): select one"):
        batch.top_matchings()
    with pytest.raises(IndexError, match="no batch"):
        laws[0][0]
    drawn = MatchingPosterior(perm[:20].contiguous(), chains=2)
    for i, j in itertools.product(range(2), range(3)):
        one, other = drawn[i, j].marginals(), drawn.marginals()
        assert torch.equal(one[1], other[1][i, j])


def autoregressive(phi: float, chains: int, draws: int) -> Tensor:
    x = torch.randn(chains)
    values = []
    for _ in range(draws):
        x = phi * x + (1 - phi**2) ** 0.5 * torch.randn(chains)
        values.append(x)
    return torch.stack(values, 1)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_effective_draws_of_a_known_chain(phi: float) -> None:
    """N (1 - phi) / (1 + phi), within 15 %: 8 x 5000 draws, 5 % seed to seed."""
    found = float(effective_draws(autoregressive(phi, 8, 5000)))
    expected = 40_000 * (1 - phi) / (1 + phi)
    assert abs(found / expected - 1) < 0.15


def test_effective_draws_of_chains_that_disagree_or_stand_still() -> None:
    x = torch.randn(4, 1000)
    x[0] += 3.0
    assert effective_draws(x) < 20
    assert effective_draws(torch.zeros(4, 1000)) == 8
    stuck = torch.arange(4.0)[:, None].expand(4, 1000)
    assert effective_draws(stuck) < 10
    assert effective_draws(x.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="at least four draws"):
        effective_draws(torch.zeros(4, 3))


def test_effective_counts_are_those_of_the_indicators() -> None:
    values = torch.randint(0, 3, (2, 40, 5))
    values[..., 4] = 1
    found = effective_counts(values, 4)
    assert found.shape == (5, 4)
    for i, j in itertools.product(range(4), range(3)):
        one = effective_draws((values[..., i] == j).double())
        torch.testing.assert_close(found[i, j], one)
    least = found[:4, :3].min()
    assert (found[4] == least).all()
    assert (found[:, 3] == least).all()
    assert (effective_counts(torch.ones(2, 40, 3).long(), 2) == 4).all()


def swap_chains(X: Tensor, chains: int, draws: int) -> Tensor:
    """Metropolis with swaps of two random rows."""
    perm = torch.stack([torch.randperm(len(X)) for _ in range(chains)])
    each, rows = torch.arange(chains), torch.arange(len(X))
    kept = []
    for _ in range(draws):
        i, j = torch.randint(len(X), (2, chains))
        other = perm.clone()
        other[each, i], other[each, j] = perm[each, j], perm[each, i]
        gain = X[rows, other].sum(-1) - X[rows, perm].sum(-1)
        perm = torch.where((torch.rand(chains).log() < gain)[:, None], other, perm)
        kept.append(perm)
    return torch.stack(kept, 1)


def test_errors_of_chains_are_the_spread_of_repetitions() -> None:
    torch.manual_seed(3)
    X = torch.randn(4, 4)
    perm, weights = gibbs(X)
    truth = MatchingPosterior(perm, weights=weights, exact=True).marginals()[0][:, :-1]
    chains = swap_chains(X, 4 * 50, 2000).reshape(50, 4, 2000, 4)
    scores, errors, naive = [], [], []
    for each in chains:
        posterior = MatchingPosterior(each.reshape(-1, 4), chains=4)
        probability, error = (x[:, :-1] for x in posterior.marginals())
        scores.append((probability - truth) / error)
        errors.append(error)
        independent = MatchingPosterior(each.reshape(-1, 4))
        naive.append(independent.marginals()[1][:, :-1])
    spread = torch.stack(scores).square().mean().sqrt()
    # 50 repetitions of 16 entries, 9 of them free: a standard error below .05.
    assert 0.8 < float(spread) < 1.2
    ratio = torch.stack(errors) / torch.stack(naive)
    assert float(ratio.mean()) > 2, "independent draws would have far smaller errors"
    top = posterior.top_matchings(5)
    assert (top.error > 2 * (top.probability / 8000).sqrt()).all()


def test_chains_in_two_modes_say_that_they_know_little() -> None:
    perm = torch.tensor([[0, 1], [1, 0]])[:, None].expand(2, 1000, 2).reshape(-1, 2)
    _, error = MatchingPosterior(perm, chains=2).marginals()
    assert (error[:, :-1] > 0.2).all()
    assert (MatchingPosterior(perm).marginals()[1] < 0.02).all()


def test_types_follow_the_weights() -> None:
    perm, weights = gibbs(torch.randn(3, 3))
    law = MatchingPosterior(perm.int(), weights=weights.float(), exact=True)
    assert law.perm.dtype == torch.long
    assert all(x.dtype == torch.float32 for x in law.marginals())
    assert law.top_matchings().probability.dtype == torch.float32
    assert law.entropy()[0].dtype == torch.float32
    assert MatchingPosterior(perm).marginals()[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perm": torch.zeros(0, 3).long()}, "at least a draw"),
        ({"perm": torch.arange(3)}, r"shape \(draws, \*batch, n\)"),
        ({"perm": torch.tensor([[0, 0]])}, "at most once, .* got a column twice"),
        ({"perm": torch.tensor([[0, -2]])}, "got -2 to 0"),
        ({"perm": torch.tensor([[0, 3]])}, "got 0 to 3"),
        ({"perm": torch.eye(3)}, "must be integers"),
        ({"perm": torch.tensor([[0, 1]] * 6), "chains": 4}, "equally many"),
        ({"perm": torch.tensor([[0, 1]] * 6), "chains": 2}, "at least four"),
        ({"perm": torch.tensor([[0, 1]]), "exact": True}, "pass weights"),
        (
            {"perm": torch.tensor([[0, 1]]), "weights": torch.ones(2)},
            r"weights must have shape \(1,\)",
        ),
        (
            {"perm": torch.tensor([[0, 1]]), "weights": -torch.ones(1)},
            "softmax over the draws",
        ),
        (
            {"perm": torch.tensor([[0, 1]]), "weights": torch.tensor([torch.nan])},
            "softmax over the draws",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatchingPosterior(**arguments)
    law = exact(3)
    with pytest.raises(ValueError, match=r"mass must be in \(0, 1\], got 90"):
        law.credible_names(90)


@pytest.mark.parametrize(
    "index", [0, (1, 2), (..., 0), (slice(None), [0, 2]), ([1, 0],), (None, 1)]
)
def test_a_selection_is_one_of_the_batch_whatever_the_index(index: Any) -> None:
    perm = torch.rand(10, 2, 3, 4).argsort(-1)
    one = MatchingPosterior(perm)[index]
    numbers = torch.arange(6).reshape(2, 3)[index]
    expected = perm.reshape(10, 6, 4)[:, numbers]
    assert torch.equal(one.perm, expected)
    assert one.batch_shape == numbers.shape
    assert torch.allclose(one.marginals()[0].sum(-1), torch.ones(()))
