# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Rankings against enumeration, and soft rankings against quadrature and autograd."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from scipy.stats import chisquare
from torch import Tensor
from torch.distributions import biject_to
from torch.func import vmap

from pyro_permutations import (
    PlackettLuce,
    PlackettLuceIndices,
    RankingTransform,
    RelaxedPlackettLuce,
    UniformPermutation,
    soft_ranking,
    to_indices,
    to_matrix,
)

SAME = 1e-10  # the same sum in another order, in float64
SIGMAS = 4  # standard errors that count as chance
RARE = 6e-5  # the probability of four standard errors, for a chi-square test


def by_hand(logits: Tensor, perm: tuple[int, ...]) -> float:
    """The definition: each rank is drawn from the items that are left."""
    weight = logits.double().exp().tolist()
    left, total = set(range(len(weight))), 0.0
    for item in perm:
        total += math.log(weight[item]) - math.log(sum(weight[j] for j in left))
        left.remove(item)
    return total


def rankings(n: int, k: int | None = None) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(n), k or n))


def random_logits(*shape: int) -> Tensor:
    return 1.5 * torch.randn(*shape)


# %% Probabilities
def test_all_24_probabilities_are_right_and_sum_to_one() -> None:
    # Report 55.
    d = PlackettLuceIndices(torch.tensor([2.0, 1.0, 0.0, -1.0]))
    assert abs(float(d.log_prob(torch.arange(4))) + 1.161057) < 1e-6
    perm = torch.tensor(rankings(4))
    log_p = d.log_prob(perm)
    assert abs(float(log_p.exp().sum()) - 1) < 1e-6
    expected = torch.tensor([by_hand(d.logits, p) for p in rankings(4)])
    torch.testing.assert_close(log_p, expected, atol=SAME, rtol=0)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 1), (4, 2), (5, 3), (5, 5)])
def test_matrices_and_indices_are_one_law(n: int, k: int) -> None:
    logits = random_logits(n)
    matrices, indices = PlackettLuce(logits, k), PlackettLuceIndices(logits, k)
    perm = torch.tensor(rankings(n, k))
    P = to_matrix(perm, columns=n)
    expected = torch.tensor([by_hand(logits, p) for p in rankings(n, k)])
    torch.testing.assert_close(matrices.log_prob(P), expected, atol=SAME, rtol=0)
    torch.testing.assert_close(indices.log_prob(perm), expected, atol=SAME, rtol=0)
    assert torch.equal(matrices.enumerate_support(), P)
    assert torch.equal(indices.enumerate_support(), perm)
    entropy = -(expected * expected.exp()).sum()
    torch.testing.assert_close(matrices.entropy(), entropy, atol=SAME, rtol=0)
    assert torch.equal(to_indices(matrices.mode), indices.mode)
    assert abs(float(indices.log_prob(indices.mode) - expected.max())) < SAME


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_partial_ranking_sums_its_completions(k: int) -> None:
    logits = random_logits(5)
    whole, part = PlackettLuceIndices(logits), PlackettLuceIndices(logits, k)
    every = torch.tensor(rankings(5))
    p = whole.log_prob(every).exp()
    for first in rankings(5, k):
        wanted = torch.tensor(first)
        some = (every[:, :k] == wanted).all(-1)
        torch.testing.assert_close(
            part.log_prob(wanted).exp(), p[some].sum(), atol=SAME, rtol=0
        )


@pytest.mark.parametrize(("n", "k"), [(2, 2), (4, 4), (5, 2)])
def test_marginals_are_those_of_enumeration(n: int, k: int) -> None:
    logits = random_logits(2, n).requires_grad_()
    d = PlackettLuce(logits, k)
    P = to_matrix(torch.tensor(rankings(n, k)), columns=n)
    p = d.log_prob(P[:, None]).exp()
    expected = torch.einsum("kb,kri->bri", p, P)
    torch.testing.assert_close(d.mean, expected, atol=SAME, rtol=0)
    probability, error = d.marginals()
    torch.testing.assert_close(probability[..., :-1], expected, atol=SAME, rtol=0)
    assert (error == 0).all()
    weight = torch.randn(2, k, n)
    found = torch.autograd.grad((d.mean * weight).sum(), logits, retain_graph=True)
    wanted = torch.autograd.grad((expected * weight).sum(), logits)
    torch.testing.assert_close(found, wanted, atol=SAME, rtol=0)


def test_marginals_of_many_items_are_frequencies_within_their_errors() -> None:
    pyro.set_rng_seed(0)
    logits = torch.zeros(70)
    logits[0] = 3.0
    probability, error = PlackettLuce(logits, 2).marginals(4000)
    first = math.exp(3) / (math.exp(3) + 69)
    assert abs(float(probability[0, 0]) - first) < SIGMAS * float(error[0, 0])
    assert abs(float(error[0, 0]) - math.sqrt(first * (1 - first) / 4000)) < 1e-3


@pytest.mark.parametrize(("n", "k"), [(3, 3), (4, 4), (5, 2)])
def test_samples_follow_the_law(n: int, k: int) -> None:
    pyro.set_rng_seed(n)
    logits = 0.7 * torch.randn(n)
    d = PlackettLuceIndices(logits, k)
    every = d.enumerate_support()
    draws = d.sample((20_000,))
    counts = (draws[:, None] == every).all(-1).sum(0)
    expected = 20_000 * d.log_prob(every).exp()
    assert expected.min() > 5  # for chi-square to be right
    assert chisquare(counts, expected * (20_000 / expected.sum())).pvalue > RARE


def test_extreme_logits_are_finite() -> None:
    logits = torch.tensor([800.0, -800.0, 0.0], requires_grad=True)
    d = PlackettLuceIndices(logits)
    log_p = d.log_prob(torch.tensor([1, 2, 0]))
    assert (
        abs(float(log_p.detach()) + 2400) < 1e-9
    )  # -1600 and -800 are lost to the first
    log_p.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert PlackettLuce(logits.detach()).mean.isfinite().all()


def test_a_missing_item_is_left_out() -> None:
    logits = torch.tensor([[0.3, -torch.inf, 1.0], [0.0, 0.5, 1.0]], requires_grad=True)
    d, short = PlackettLuceIndices(logits), PlackettLuceIndices(logits[0, [0, 2]])
    values = torch.tensor([[2, 0, -1], [1, 2, 0]])
    log_p = d.log_prob(values)
    expected = short.log_prob(torch.tensor([1, 0]))
    torch.testing.assert_close(log_p[0], expected, atol=SAME, rtol=0)
    (gradient,) = torch.autograd.grad(log_p.sum(), logits)
    assert gradient[0, 1] == 0
    assert gradient.isfinite().all()
    draws = d.sample((100,))
    assert (draws[:, 0, 2] == -1).all()
    assert (draws[:, 0, :2] != 1).all()
    P = PlackettLuce(logits)
    assert P.support.check(P.sample((10,))).all()
    with pytest.raises(NotImplementedError, match="different items"):
        d.enumerate_support()


# %% What a distribution has to do
@pytest.mark.parametrize("cls", [PlackettLuce, PlackettLuceIndices])
def test_shapes_expansion_and_plates(cls: type[PlackettLuce]) -> None:
    d = cls(random_logits(2, 4), 3)
    event = d.event_shape
    assert event == ((3, 4) if cls is PlackettLuce else (3,))
    assert d.support.event_dim == len(event)
    assert d.support.is_discrete
    assert cls.infer_shapes((2, 4), 3) == ((2,), event)
    value = d.sample((5,))
    assert value.shape == (5, 2, *event)
    assert d.log_prob(value).shape == (5, 2)
    large = d.expand((6, 2))
    assert type(large) is cls
    assert large.sample().shape == (6, 2, *event)
    assert d.to_event(1).log_prob(d.sample()).shape == ()
    assert d.mask(torch.tensor([True, False])).log_prob(d.sample())[1] == 0
    assert d.enumerate_support().shape == (24, 2, *event)
    assert d.enumerate_support(expand=False).shape == (24, 1, *event)
    assert cls(torch.zeros(0, 4)).sample().shape[0] == 0
    copy = pickle.loads(pickle.dumps(d))
    assert torch.equal(copy.log_prob(value), d.log_prob(value))
    assert not d.has_rsample
    with pyro.plate("outer", 6, dim=-2), pyro.plate("inner", 2, dim=-1):
        assert pyro.sample("P", cls(random_logits(4), 3)).shape == (6, 2, *event)


def test_vmap_of_noise_and_score() -> None:
    logits = random_logits(3, 4)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        d = PlackettLuceIndices(x)
        value = d.sample()
        return value, d.log_prob(value)

    value, log_p = vmap(run, randomness="different")(logits)
    expected = PlackettLuceIndices(logits).log_prob(value)
    torch.testing.assert_close(log_p, expected, atol=SAME, rtol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PlackettLuce([1.0, 2.0]), TypeError, "logits must be a tensor"),
        (
            lambda: PlackettLuce(torch.tensor([1.0, torch.nan])),
            ValueError,
            "not be NaN",
        ),
        (lambda: PlackettLuce(torch.zeros(3), 4), ValueError, "from 1 to 3 items"),
        (
            lambda: PlackettLuce(torch.full((2,), -torch.inf)),
            ValueError,
            "at least one",
        ),
        (lambda: PlackettLuce(torch.arange(3)), ValueError, "floating point"),
        (
            lambda: PlackettLuce(torch.zeros(3)).log_prob(torch.full((3, 3), 1 / 3)),
            ValueError,
            "A relaxed guide needs a relaxed prior",
        ),
        (
            lambda: PlackettLuceIndices(torch.zeros(3)).log_prob(
                torch.tensor([0, 0, 1])
            ),
            ValueError,
            "distinct items",
        ),
        (
            lambda: PlackettLuceIndices(torch.zeros(3)).log_prob(torch.tensor([0, 1])),
            ValueError,
            "expected a value of shape",
        ),
        (lambda: PlackettLuce(torch.zeros(9)).entropy(), NotImplementedError, "40320"),
        (
            lambda: RelaxedPlackettLuce(torch.zeros(3), 0.0),
            ValueError,
            "temperature",
        ),
        (
            lambda: RelaxedPlackettLuce(torch.tensor([0.0, -torch.inf]), 1.0),
            ValueError,
            "must be finite",
        ),
    ],
)
def test_what_is_wrong_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_values_are_checked_without_validation() -> None:
    d = PlackettLuce(torch.zeros(3), validate_args=False)
    with pytest.raises(ValueError, match="not in the support"):
        d.log_prob(torch.full((3, 3), 1 / 3))


# %% In Pyro
def footrule_model(seen: Tensor, prior: Callable[[], dist.Distribution]) -> None:
    """Items prefer places, in a likelihood that is linear in P."""
    P = pyro.sample("P", prior())
    pyro.factor("seen", (P * seen).sum((-2, -1)))


@pytest.mark.parametrize(
    "prior", [lambda: UniformPermutation(3), lambda: PlackettLuce(torch.zeros(3))]
)
def test_an_enumerated_guide_has_the_exact_bound(
    prior: Callable[[], dist.Distribution],
) -> None:
    seen, logits = random_logits(3, 3), random_logits(3)

    @config_enumerate
    def guide(seen: Tensor, prior: object) -> None:
        pyro.sample("P", PlackettLuce(logits))

    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(footrule_model, guide, seen, prior)
    P = to_matrix(torch.tensor(rankings(3)))
    log_q = PlackettLuce(logits).log_prob(P)
    log_p = (P * seen).sum((-2, -1)) - math.log(6)
    expected = -(log_q.exp() * (log_p - log_q)).sum()
    assert abs(loss - float(expected)) < SAME


def test_the_score_function_has_the_gradient_of_the_exact_bound() -> None:
    pyro.set_rng_seed(0)
    seen, particles, runs = random_logits(3, 3), 1000, 20
    logits = random_logits(3).requires_grad_()
    P = to_matrix(torch.tensor(rankings(3)))
    log_q = PlackettLuce(logits).log_prob(P)
    log_p = (P * seen).sum((-2, -1))
    (exact,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), logits)

    def guide(seen: Tensor, prior: object) -> None:
        pyro.sample("P", PlackettLuce(logits))

    elbo = Trace_ELBO(
        num_particles=particles, vectorize_particles=True, max_plate_nesting=0
    )
    gradients = []
    for _ in range(runs):
        loss = elbo.differentiable_loss(
            footrule_model, guide, seen, lambda: UniformPermutation(3)
        )
        gradients.append(torch.autograd.grad(loss, logits)[0])
    found = torch.stack(gradients)
    error = found.std(0) / runs**0.5
    # Five, as the standard error of 20 runs is itself uncertain by a sixth.
    assert ((found.mean(0) - exact).abs() < 5 * error).all()


def test_svi_finds_a_posterior_in_the_family() -> None:
    # Evidence that is itself Plackett-Luce: log p(first) = logit of the first item.
    pyro.set_rng_seed(0)
    target = torch.tensor([1.0, 0.0, -1.0])

    def model() -> None:
        P = pyro.sample("P", UniformPermutation(3))
        pyro.factor("seen", PlackettLuce(target).log_prob(P))

    @config_enumerate
    def guide() -> None:
        logits = pyro.param("logits", torch.zeros(3))
        pyro.sample("P", PlackettLuce(logits))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO())
    for _ in range(200):
        svi.step()
    found = pyro.param("logits").detach()
    torch.testing.assert_close(
        found - found.mean(), target, atol=1e-3, rtol=0
    )  # 200 steps


# %% Soft rankings
@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 3), (4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_soft_rankings_are_a_bijection(n: int, k: int, temperature: float) -> None:
    transform = RankingTransform(temperature, None if k == n else k)
    x = torch.randn(5, n - 1)
    P = transform(x)
    assert transform.codomain.check(P).all()
    torch.testing.assert_close(P.sum(-1), torch.ones(5, k), atol=1e-6, rtol=0)
    torch.testing.assert_close(transform.inv(P), x, atol=1e-7, rtol=1e-7)
    assert transform.forward_shape((5, n - 1)) == P.shape
    assert transform.inverse_shape(P.shape) == x.shape
    # The coordinates are x / tau, so the volume change is that of a scale.
    expected = torch.full((5,), -(n - 1) * math.log(temperature))
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, P), expected)


def test_a_soft_ranking_sorts_as_it_cools() -> None:
    x = torch.tensor([0.3, 2.0, -1.0])
    P = RankingTransform(0.01)(x)  # and zero, the last item: 2, .3, 0, -1
    expected = to_matrix(torch.tensor([1, 0, 3, 2]))
    torch.testing.assert_close(P, expected, atol=1e-6, rtol=0)
    first = RankingTransform(0.01, 2)(x)
    torch.testing.assert_close(first, expected[:2], atol=1e-6, rtol=0)


def test_the_density_of_two_items_integrates_to_one() -> None:
    # In the coordinate y = x / tau; for two items it is a logistic density.
    for temperature in (1.0, 0.3):
        d = RelaxedPlackettLuce(torch.tensor([0.7, -0.2]), temperature)
        y = torch.linspace(-60, 60, 40_001)[:, None]
        P = RankingTransform(1.0)(y)
        p = d.log_prob(P).exp()
        assert abs(float(torch.trapezoid(p, y[:, 0])) - 1) < 1e-6
        z = temperature * y[:, 0] - 0.9
        logistic = temperature * torch.sigmoid(z) * torch.sigmoid(-z)
        torch.testing.assert_close(p, logistic, atol=1e-8, rtol=1e-6)


def test_the_density_of_three_items_integrates_over_the_shift() -> None:
    # The density of Gumbel noise, integrated over the shift numerically.
    logits, tau = torch.tensor([0.7, -0.2, 0.4]), 0.5
    d = RelaxedPlackettLuce(logits, tau)
    P = d.rsample((4,))
    y = RankingTransform(1.0).inv(P)
    scores = tau * torch.nn.functional.pad(y, (0, 1))
    shift = torch.linspace(-30, 30, 20_001)
    noise = scores[:, None] + shift[:, None] - logits  # (4, shifts, 3)
    integral = torch.trapezoid((-noise - (-noise).exp()).sum(-1).exp(), shift, dim=-1)
    expected = integral.log() + 2 * math.log(tau)
    torch.testing.assert_close(d.log_prob(P), expected, atol=1e-6, rtol=0)


def test_densities_of_two_laws_are_consistent() -> None:
    # E_a[p_b / p_a] = 1 over draws of a, at another temperature too.
    pyro.set_rng_seed(0)
    a = RelaxedPlackettLuce(torch.tensor([0.3, 0.0, -0.3]), 0.5)
    b = RelaxedPlackettLuce(torch.tensor([0.0, 0.2, 0.1]), 0.6)
    P = a.rsample((20_000,))
    ratio = (b.log_prob(P) - a.log_prob(P)).exp()
    assert abs(float(ratio.mean()) - 1) < SIGMAS * float(ratio.std()) / 20_000**0.5
    entropy = -a.log_prob(P)
    error = float(entropy.std()) / 20_000**0.5
    assert abs(float(entropy.mean() - a.entropy())) < SIGMAS * error


def test_hard_limit_of_relaxed_draws_is_plackett_luce() -> None:
    pyro.set_rng_seed(1)
    logits, draws = torch.tensor([0.8, 0.0, -0.5]), 5000
    P = RelaxedPlackettLuce(logits, 0.5).rsample((draws,))
    # The soft ranking orders items by the scores that it was made from.
    y = torch.nn.functional.pad(RankingTransform(1.0).inv(P), (0, 1))
    perm = y.argsort(-1, descending=True)
    every = torch.tensor(rankings(3))
    counts = (perm[:, None] == every).all(-1).sum(0)
    expected = draws * PlackettLuceIndices(logits).log_prob(every).exp()
    assert chisquare(counts, expected * (draws / expected.sum())).pvalue > RARE


@pytest.mark.parametrize("top", [None, 2])
def test_gradients_of_relaxed_draws(top: int | None) -> None:
    # With the noise held fixed, against finite differences.
    def draw(logits: Tensor, temperature: Tensor) -> Tensor:
        torch.manual_seed(3)
        return RelaxedPlackettLuce(logits, temperature, top).rsample((2,))

    logits = random_logits(4).requires_grad_()
    temperature = torch.tensor(0.7, requires_grad=True)
    torch.autograd.gradcheck(draw, (logits, temperature))

    def score(logits: Tensor) -> Tensor:
        d = RelaxedPlackettLuce(logits, 0.7, top)
        return d.log_prob(RelaxedPlackettLuce(torch.zeros(4), 0.7, top).rsample())

    torch.autograd.gradcheck(lambda x: (torch.manual_seed(4), score(x))[1], (logits,))


def test_relaxed_shapes_pickle_and_constraint() -> None:
    d = RelaxedPlackettLuce(random_logits(2, 4), 0.5)
    assert d.event_shape == (4, 4)
    P = d.rsample((3,))
    assert P.shape == (3, 2, 4, 4)
    assert d.support.check(P).all()
    assert not d.support.check(torch.eye(4) * 0.9 + 0.025)
    large = d.expand((5, 2))
    assert large.log_prob(large.rsample()).shape == (5, 2)
    copy = pickle.loads(pickle.dumps(d))
    torch.testing.assert_close(copy.log_prob(P), d.log_prob(P))
    assert RelaxedPlackettLuce.infer_shapes((2, 4), (), 3) == ((2,), (3, 4))
    x = torch.randn(3)
    torch.testing.assert_close(
        biject_to(soft_ranking).inv(biject_to(soft_ranking)(x)), x
    )
    assert RelaxedPlackettLuce(random_logits(3).float(), 0.5).rsample().dtype == (
        torch.float32
    )


def test_relaxed_svi_with_a_relaxed_prior_finds_the_order() -> None:
    pyro.set_rng_seed(0)
    # Each item was ranked near its place: scores fall with the distance from it.
    order = torch.tensor([2, 0, 3, 1])
    distance = (torch.arange(4)[:, None] - order.argsort()).abs()

    def model() -> None:
        P = pyro.sample("P", RelaxedPlackettLuce(torch.zeros(4), 0.3))
        pyro.factor("seen", -3 * (P * distance).sum((-2, -1)))

    def guide() -> None:
        logits = pyro.param("logits", torch.zeros(4))
        pyro.sample("P", RelaxedPlackettLuce(logits, 0.3))

    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    losses = [svi.step() for _ in range(200)]
    assert all(map(math.isfinite, losses))
    found = RelaxedPlackettLuce(pyro.param("logits").detach(), 0.3).mode
    assert torch.equal(to_indices(found), order)
