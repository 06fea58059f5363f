# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Inverses, log-determinants, shapes, caches and registrations; the log of a value."""

from __future__ import annotations

import math
import pickle
import warnings

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.transforms import ComposeTransform
from torch.func import jacrev, vmap

from pyro_permutations.carried_log import carry_log, log_of
from pyro_permutations.constraints import (
    contrasts,
    doubly_stochastic,
    straight_through,
)
from pyro_permutations.matching import matching
from pyro_permutations.matching_graph import matching_graph
from pyro_permutations.sinkhorn import log_sinkhorn
from pyro_permutations.transforms import (
    BirkhoffTransform,
    ContrastsTransform,
    SinkhornTransform,
)
from pyro_permutations.warnings import LostLogWarning

ROUND_TRIP = 1e-8  # of an inverse, in units of the score scale
CELLS = 1e-5  # cells of two matrices that both have their sums within 1e-6
JACOBIAN = 1e-8  # against a determinant of the Jacobian by autograd, in nats
PRECISE = 1e-6  # against high precision, in nats


def masks() -> dict[str, Tensor]:
    cells = torch.ones(4, 4, dtype=torch.bool)
    cells[0, 1] = cells[2, 3] = False
    cycle = torch.eye(4).bool() | torch.eye(4).roll(1, 0).bool()
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool()
    return {
        "two cells missing": cells,
        "a cycle": cycle,
        "two blocks": blocks,
        "a known pair": torch.block_diag(torch.ones(1, 1), torch.ones(3, 3)).bool(),
        "lower triangle": torch.ones(4, 4).tril().bool(),
    }


def graph_of(mask: Tensor | None, n: int):
    return matching_graph(mask, (n, n), torch.device("cpu"))


def draw(mask: Tensor | None, n: int, *lead: int) -> Tensor:
    """Contrasts of Gaussian scores."""
    return graph_of(mask, n).contrasts(torch.randn(*lead, n, n))


def log_det(J: Tensor) -> float:
    """log |det J| by numpy: an empty matrix has determinant one."""
    sign, value = np.linalg.slogdet(J.detach().numpy())
    assert sign != 0
    return float(value)


def jacobian(mask: Tensor | None, n: int, temperature: float, Z: Tensor) -> Tensor:
    """d (free cells of P) / d (free cells of Z) by autograd."""
    free = graph_of(mask, n).free.reshape(-1).nonzero()[:, 0]
    transform = BirkhoffTransform(temperature, mask)

    def of_free(x: Tensor) -> Tensor:
        filled = Z.flatten().index_copy(0, free, x)
        return transform(filled.reshape(n, n)).flatten()[free]

    return jacrev(of_free)(Z.flatten()[free])


# Birkhoff transform


@pytest.mark.parametrize("temperature", [2.0, 0.5, 0.1])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_birkhoff_inverts(n: int, temperature: float) -> None:
    transform = BirkhoffTransform(temperature)
    Z = draw(None, n, 3, 2)
    P = transform(Z)
    assert P.shape == Z.shape
    assert doubly_stochastic.check(P).all()
    assert transform.domain.check(Z).all()
    assert transform.codomain.check(P).all()
    assert (transform.inv(P) - Z).abs().max() < ROUND_TRIP
    # Without the log that P carries, as long as nothing underflows.
    mild = temperature if temperature > 0.1 else 1.0
    bare = BirkhoffTransform(mild)(Z).clone()
    assert (BirkhoffTransform(mild).inv(bare) - Z).abs().max() < 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_birkhoff_determinant_is_that_of_autograd(n: int, temperature: float) -> None:
    transform = BirkhoffTransform(temperature)
    Z = draw(None, n)
    value = transform.log_abs_det_jacobian(Z, transform(Z))
    assert value.shape == ()
    assert abs(value - log_det(jacobian(None, n, temperature, Z))) < JACOBIAN
    inverse = transform.inv.log_abs_det_jacobian(transform(Z), Z)
    assert abs(inverse + value) < JACOBIAN


@pytest.mark.parametrize("name", list(masks()))
def test_birkhoff_with_a_mask(name: str) -> None:
    mask = masks()[name]
    Z = draw(mask, 4)
    transform = BirkhoffTransform(0.7, mask)
    P = transform(Z)
    assert not P[~oracles.total_support(mask)].any()
    assert doubly_stochastic(mask).check(P)
    assert contrasts(mask).check(Z)
    assert (transform.inv(P) - Z).abs().max() < ROUND_TRIP
    value = transform.log_abs_det_jacobian(Z, P)
    assert abs(value - log_det(jacobian(mask, 4, 0.7, Z))) < JACOBIAN


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_birkhoff_determinant_at_near_permutations(n: int, temperature: float) -> None:
    """Where log T(P) is rounding error unless log P is balanced to the last flow."""
    Z = graph_of(None, n).contrasts(3 * torch.randn(n, n))
    transform = BirkhoffTransform(temperature)
    log_P = oracles.precise_sinkhorn(Z, temperature)
    trees = oracles.precise_log_trees(log_P)
    expected = -((n - 1) ** 2) * math.log(temperature) + float(log_P.sum()) - trees
    P = transform(Z)
    assert abs(transform.log_abs_det_jacobian(Z, P) - expected) < PRECISE
    assert (transform.inv(P) - Z).abs().max() < PRECISE


def test_birkhoff_with_masks_and_temperatures_that_differ() -> None:
    mask = torch.stack(list(masks().values()))
    tau = torch.linspace(0.3, 2.0, 5)
    Z = draw(mask, 4, 3, 5)
    transform = BirkhoffTransform(tau, mask)
    P = transform(Z)
    value = transform.log_abs_det_jacobian(Z, P)
    assert value.shape == (3, 5)
    assert (transform.inv(P) - Z).abs().max() < ROUND_TRIP
    for k in range(5):
        single = BirkhoffTransform(tau[k], mask[k])
        assert (single(Z[1, k]) - P[1, k]).abs().max() < ROUND_TRIP
        one = single.log_abs_det_jacobian(Z[1, k], single(Z[1, k]))
        assert abs(one - value[1, k]) < JACOBIAN


def test_birkhoff_gradients() -> None:
    """Value, inverse and determinant differentiate, in the temperature as well."""

    def everything(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        transform = BirkhoffTransform(t)
        Z = torch.nn.functional.pad(x, (0, 1, 0, 1))
        P = transform(Z)
        return P, transform.inv(P), transform.log_abs_det_jacobian(Z, P)

    inputs = (
        torch.randn(2, 2, requires_grad=True),
        torch.tensor(0.7, requires_grad=True),
    )
    assert torch.autograd.gradcheck(everything, inputs, eps=1e-4, atol=1e-4)
    assert torch.autograd.gradgradcheck(everything, inputs, eps=1e-4, atol=1e-3)


def test_birkhoff_in_float32_keeps_the_log_in_float64() -> None:
    Z = draw(None, 6).float()
    P = BirkhoffTransform(0.01)(Z)
    assert P.dtype == torch.float32
    assert log_of(P).dtype == torch.float64
    assert (BirkhoffTransform(0.01).inv(P) - Z).abs().max() < 1e-5
    value = BirkhoffTransform(0.01).log_abs_det_jacobian(Z, P)
    double = BirkhoffTransform(0.01).log_abs_det_jacobian(
        Z.double(), BirkhoffTransform(0.01)(Z.double())
    )
    assert abs(value - double) < 1e-3 * abs(double)


# Contrasts transform


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_contrasts_transform_without_a_mask(n: int) -> None:
    transform = ContrastsTransform()
    x = torch.randn(3, (n - 1) ** 2)
    Z = transform(x)
    assert Z.shape == (3, n, n)
    assert contrasts().check(Z).all()
    assert torch.equal(Z[:, :-1, :-1].flatten(-2), x)
    assert torch.equal(transform.inv(Z), x)
    assert torch.equal(transform.log_abs_det_jacobian(x, Z), torch.zeros(3))
    assert transform.forward_shape(x.shape) == Z.shape
    assert transform.inverse_shape(Z.shape) == x.shape


def test_contrasts_transform_refuses_a_length_that_is_no_square() -> None:
    with pytest.raises(ValueError, match=r"5|square"):
        ContrastsTransform()(torch.zeros(5))


@pytest.mark.parametrize("name", list(masks()))
def test_contrasts_transform_with_a_mask(name: str) -> None:
    mask = masks()[name]
    dim = int(graph_of(mask, 4).dim)
    transform = ContrastsTransform(mask)
    x = torch.randn(2, dim)
    Z = transform(x)
    assert contrasts(mask).check(Z).all()
    assert torch.equal(transform.inv(Z), x)
    assert torch.equal(transform.log_abs_det_jacobian(x, Z), torch.zeros(2))
    assert transform.forward_shape(x.shape) == (2, 4, 4)
    assert transform.inverse_shape(Z.shape) == x.shape


def test_contrasts_transform_with_equal_numbers_of_free_cells() -> None:
    """Masks may differ across the batch if a shared vector can hold either."""
    cells = ~torch.eye(4, dtype=torch.bool)
    mask = torch.stack([cells, cells.roll(1, 0)])
    transform = ContrastsTransform(mask)
    x = torch.randn(3, 2, int(graph_of(cells, 4).dim))
    Z = transform(x)
    assert contrasts(mask).check(Z).all()
    assert torch.equal(transform.inv(Z), x)
    for k in range(2):
        assert torch.equal(Z[:, k], ContrastsTransform(mask[k])(x[:, k]))


def test_different_numbers_of_free_cells_share_no_vector() -> None:
    mask = torch.stack([masks()["a cycle"], masks()["two cells missing"]])
    for constraint in (doubly_stochastic(mask), contrasts(mask)):
        with pytest.raises(NotImplementedError, match=r"(?s)GumbelSinkhorn.*mask"):
            biject_to(constraint)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, "cold", None])
def test_birkhoff_refuses_a_bad_temperature(bad) -> None:
    with pytest.raises(ValueError, match="temperature"):
        BirkhoffTransform(bad)


def test_birkhoff_shows_its_temperature() -> None:
    assert "0.25" in repr(BirkhoffTransform(0.25))


# Sinkhorn transform


@pytest.mark.parametrize("mask", [None, masks()["a cycle"]])
def test_sinkhorn_inverse_of_hard_values_does_not_warn(mask: Tensor | None) -> None:
    """Pyro's initialisation asks for it and throws it away."""
    P = matching(torch.randn(2, 4, 4), mask=mask)
    transform = SinkhornTransform(mask)
    assert (transform(transform.inv(P)) - P).abs().max() < CELLS


def test_sinkhorn_transform_is_over_complete() -> None:
    transform = SinkhornTransform()
    X = torch.randn(3, 4, 4)
    P = transform(X)
    assert (P - log_sinkhorn(X).exp()).abs().max() < CELLS
    assert (transform(X + 5 * torch.randn(4, 1)) - P).abs().max() < CELLS
    assert (transform(transform.inv(P)) - P).abs().max() < CELLS
    assert not transform.bijective
    with pytest.raises(NotImplementedError):
        transform.log_abs_det_jacobian(X, P)
    mask = masks()["two cells missing"]
    masked = SinkhornTransform(mask)
    P = masked(X)
    assert not P[:, ~mask].any()
    assert masked.inv(P).isfinite().all()
    assert (masked(masked.inv(P)) - P).abs().max() < CELLS


# What every transform has


TRANSFORMS = {
    "birkhoff": (lambda: BirkhoffTransform(0.5), lambda: draw(None, 4, 2)),
    "birkhoff, mask": (
        lambda: BirkhoffTransform(0.5, masks()["a cycle"]),
        lambda: draw(masks()["a cycle"], 4, 2),
    ),
    "contrasts": (lambda: ContrastsTransform(), lambda: torch.randn(2, 9)),
    "contrasts, mask": (
        lambda: ContrastsTransform(masks()["a cycle"]),
        lambda: torch.randn(2, 1),
    ),
    "sinkhorn": (lambda: SinkhornTransform(), lambda: torch.randn(2, 4, 4)),
    "sinkhorn, mask": (
        lambda: SinkhornTransform(masks()["a cycle"]),
        lambda: torch.randn(2, 4, 4),
    ),
    "straight-through, mask": (
        lambda: transform_to(straight_through(masks()["a cycle"])),
        lambda: torch.randn(2, 4, 4),
    ),
    "biject_to": (
        lambda: biject_to(doubly_stochastic),
        lambda: torch.randn(2, 9),
    ),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_shapes_are_known_without_a_call(name: str) -> None:
    make, value = TRANSFORMS[name]
    x = value()
    y = make()(x)
    assert make().forward_shape(x.shape) == y.shape
    assert make().inverse_shape(y.shape) == x.shape
    assert make().domain.check(x).all()
    assert make().codomain.check(y).all()
    assert make().domain.event_dim == x.dim() - 1
    assert make().codomain.event_dim == 2
    with pytest.raises(ValueError, match=r"shape|square|matri|dim"):
        make().forward_shape(torch.Size(()))


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_cache_gives_back_the_same_object(name: str) -> None:
    make, value = TRANSFORMS[name]
    x = value()
    cached = make().with_cache(1)
    y = cached(x)
    assert cached(x) is y
    assert cached.inv(y) is x
    if not isinstance(cached, ComposeTransform):
        assert make().with_cache(0) == make()
    assert (make().with_cache(1)(x) - y).abs().max() < CELLS


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_equality_and_pickling(name: str) -> None:
    make, value = TRANSFORMS[name]
    assert make() == make()
    if not isinstance(make(), ComposeTransform):
        assert hash(make()) == hash(make())
    others = [m() for key, (m, _) in TRANSFORMS.items() if key != name]
    assert all(make() != other for other in others)
    copy = pickle.loads(pickle.dumps(make()))
    assert copy == make()
    x = value()
    assert torch.equal(copy(x), make()(x))


def test_equality_depends_on_the_temperature() -> None:
    assert BirkhoffTransform(0.5) != BirkhoffTransform(0.6)
    assert BirkhoffTransform(torch.tensor(0.5)) == BirkhoffTransform(torch.tensor(0.5))
    many = torch.tensor([0.5, 0.6])
    assert BirkhoffTransform(many) == BirkhoffTransform(many.clone())
    assert BirkhoffTransform(many) != BirkhoffTransform(torch.tensor(0.5))


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms_vmap(name: str) -> None:
    make, value = TRANSFORMS[name]
    x = value()
    assert (vmap(make())(x) - make()(x)).abs().max() < CELLS


# Registrations


def test_registered_transforms() -> None:
    assert isinstance(transform_to(doubly_stochastic), SinkhornTransform)
    assert isinstance(biject_to(contrasts()), ContrastsTransform)
    assert isinstance(transform_to(contrasts()), ContrastsTransform)
    with pytest.raises(NotImplementedError, match=r"guide.*TransformReparam"):
        biject_to(straight_through)
    mask = masks()["two cells missing"]
    for constraint in (doubly_stochastic(mask), contrasts(mask)):
        for registry in (biject_to, transform_to):
            transform = registry(constraint)
            assert transform.codomain == constraint
            x = torch.randn(transform.inverse_shape(torch.Size((4, 4))))
            assert constraint.check(transform(x))


@pytest.mark.parametrize("mask", [None, masks()["two cells missing"]])
def test_straight_through_values_are_hard_with_the_relaxed_gradient(mask) -> None:
    transform = transform_to(
        straight_through if mask is None else straight_through(mask)
    )
    X = torch.randn(3, 4, 4, requires_grad=True)
    P = transform(X)
    assert torch.equal(P, matching(X, mask=mask))
    weight = torch.randn(4, 4)
    relaxed = SinkhornTransform(mask)(X)
    (expected,) = torch.autograd.grad((relaxed * weight).sum(), X)
    (gradient,) = torch.autograd.grad((P * weight).sum(), X)
    assert (gradient - expected).abs().max() < CELLS
    # A start at hard values is not stuck there: its relaxation is well inside.
    start = transform.inv(P.detach()).requires_grad_()
    again = transform(start)
    assert torch.equal(again, P)
    (gradient,) = torch.autograd.grad((again * weight).sum(), start)
    assert gradient.abs().amax((1, 2)).min() > 0.01


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_bijection_to_the_polytope(n: int) -> None:
    """Free numbers to the polytope, inside it, invertible, with the right volume."""
    transform = biject_to(doubly_stochastic)
    x = torch.randn((n - 1) ** 2)
    P = transform(x)
    assert P.shape == (n, n)
    assert doubly_stochastic.check(P)
    assert (transform.inv(P) - x).abs().max() < ROUND_TRIP
    J = jacrev(lambda v: transform(v)[:-1, :-1].flatten())(x)
    value = transform.log_abs_det_jacobian(x, P)
    assert abs(value - log_det(J)) < JACOBIAN


def test_bijection_takes_batches() -> None:
    transform = biject_to(doubly_stochastic)
    x = torch.randn(2, 3, 9)
    P = transform(x)
    assert P.shape == (2, 3, 4, 4)
    assert transform.log_abs_det_jacobian(x, P).shape == (2, 3)


def test_flat_density_has_the_uniform_mean() -> None:
    """Importance sampling of the uniform law on the 2 x 2 and 3 x 3 polytopes."""
    transform = biject_to(doubly_stochastic)
    for n in (2, 3):
        # Tails as heavy as those of the volume, so that the weights are bounded.
        proposal = torch.distributions.Laplace(0.0, 2.0)
        x = proposal.sample((20000, (n - 1) ** 2))
        P = transform(x)
        log_w = transform.log_abs_det_jacobian(x, P) - proposal.log_prob(x).sum(-1)
        w = (log_w - log_w.max()).exp()
        # The volumes on free cells: an interval, and the 3 x 3 polytope's 1/8.
        volume = log_w.logsumexp(0).exp() / len(w)
        error = w.std() / w.mean() / math.sqrt(len(w))
        assert abs(volume / {2: 1.0, 3: 1 / 8}[n] - 1) < 4 * error
        mean = (w[:, None, None] * P).sum(0) / w.sum()
        spread = ((w / w.sum()) ** 2).sum().sqrt()
        assert (mean - 1 / n).abs().max() < 4 * spread * P.std()


# The log that a value carries


def test_log_of_reads_what_is_carried() -> None:
    Z = draw(None, 5, 3)
    P = BirkhoffTransform(0.001)(Z)
    expected = log_sinkhorn(Z, 0.001)
    assert (P == 0).any()
    assert torch.equal(log_of(P), expected)


def test_log_of_goes_through_views() -> None:
    P = BirkhoffTransform(0.01)(draw(None, 5, 3))
    log_P = log_of(P)
    assert torch.equal(log_of(P[1]), log_P[1])
    assert torch.equal(log_of(P[1:, None]), log_P[1:, None])
    assert torch.equal(log_of(P.expand(2, 3, 5, 5)), log_P.expand(2, 3, 5, 5))
    assert torch.equal(log_of(P.mT), log_P.mT)
    assert torch.equal(log_of(P.reshape(3, 1, 5, 5)), log_P.reshape(3, 1, 5, 5))
    assert torch.equal(log_of(P.expand(2, 3, 5, 5)[1, 2]), log_P[2])
    rows = P.permute(1, 0, 2)
    assert torch.equal(log_of(rows), log_P.permute(1, 0, 2))


def test_log_of_follows_a_sample_that_is_not_contiguous() -> None:
    Z = draw(None, 5, 3).permute(0, 2, 1)
    P = BirkhoffTransform(0.01)(Z)
    assert torch.equal(log_of(P[1]), log_of(P)[1])
    by_hand = carry_log(P.mT.clone(), log_of(P).mT.contiguous())  # other strides
    assert torch.equal(log_of(by_hand[2]), log_of(P)[2].mT)


def test_log_of_passes_gradients() -> None:
    Z = draw(None, 4).requires_grad_()
    P = BirkhoffTransform(0.01)(Z)
    weight = torch.randn(4, 4)
    (g,) = torch.autograd.grad((log_of(P) * weight).sum(), Z)
    z = Z.detach().requires_grad_()
    (expected,) = torch.autograd.grad((log_sinkhorn(z, 0.01) * weight).sum(), z)
    assert (g - expected).abs().max() < 1e-6 * (1 + expected.abs().max())


def test_log_is_ignored_after_a_change_in_place() -> None:
    P = BirkhoffTransform(1.0)(draw(None, 3))
    P.copy_(torch.full((3, 3), 1 / 3))
    assert torch.allclose(log_of(P), torch.full((3, 3), -math.log(3)))
    Q = BirkhoffTransform(1.0)(draw(None, 3, 2))
    view = Q[0]
    view.fill_(1 / 3)
    assert torch.allclose(log_of(Q)[0], torch.full((3, 3), -math.log(3)))


def test_log_is_ignored_on_a_leaf_that_requires_grad() -> None:
    """A parameter moves without its log, and its gradient has to flow through it."""
    P = BirkhoffTransform(1.0)(draw(None, 3)).detach().requires_grad_()
    (g,) = torch.autograd.grad(log_of(P).sum(), P)
    assert torch.allclose(g, 1 / P)
    carried = BirkhoffTransform(1.0)(draw(None, 3)).requires_grad_()
    (g,) = torch.autograd.grad(log_of(carried).sum(), carried)
    assert torch.allclose(g, 1 / carried)


def test_log_survives_pickling() -> None:
    P = BirkhoffTransform(0.01)(draw(None, 5))
    copy = pickle.loads(pickle.dumps(P))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(log_of(copy), log_of(P))


def test_lost_log_is_exact_where_nothing_underflows() -> None:
    P = BirkhoffTransform(0.5)(draw(None, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (log_of(P.clone()) - log_of(P)).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lost_log_is_finite_and_says_so(dtype: torch.dtype) -> None:
    """Zeros count as the smallest positive number of the type; the warning names ways
    to keep the log."""
    P = BirkhoffTransform(0.001)(draw(None, 5).to(dtype))
    assert (P == 0).any()
    with pytest.warns(LostLogWarning) as caught:
        log_P = log_of(P.clone())
    assert len(caught) == 1
    assert log_P.isfinite().all()
    assert log_P.min() >= math.log(torch.finfo(dtype).smallest_normal) - 40
    text = str(caught[0].message)
    assert "clone" in text or "carry_log" in text


def test_forbidden_zeros_are_not_a_loss() -> None:
    mask = masks()["two cells missing"]
    P = BirkhoffTransform(1.0, mask)(draw(mask, 4)).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_P = log_of(P, graph_of(mask, 4))
    assert torch.equal(log_P.isneginf(), ~mask)
