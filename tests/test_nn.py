# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A network of any module: equivariance, soft and hard values, gradients, noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pyro_permutations import (
    GumbelSinkhorn,
    SinkhornNetwork,
    matching,
    restore,
    sinkhorn,
    to_indices,
    to_matrix,
)

SIGMAS = 4.5  # standard errors that a random test allows
ROUNDING = 1e-12  # of sums of some tens of terms
SUMS = 1e-6  # the tolerance of the solver, for a row or column sum
SOLVED = 2e-6  # two solutions of one problem from another order of its rows


def perceptron(n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, n))


def convolutions(n: int) -> nn.Module:
    """Of pictures with one channel, 6 x 6."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, n)
    )


MODULES = {"perceptron": (perceptron, (2,)), "convolutions": (convolutions, (1, 6, 6))}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_shapes_and_sums(name: str, batch: tuple[int, ...]) -> None:
    make, shape = MODULES[name]
    net = SinkhornNetwork(make(5), 0.5, item_dim=len(shape))
    x = torch.randn(*batch, 5, *shape)
    soft = net(x)
    assert soft.shape == (*batch, 5, 5)
    assert soft.requires_grad
    for dim in (-1, -2):
        assert ((soft.sum(dim) - 1).abs() <= SUMS).all()
    hard = net.eval()(x)
    assert not hard.requires_grad
    assert to_indices(hard).shape == (*batch, 5)
    assert torch.equal(hard, matching(net.scores(x)))


@pytest.mark.parametrize("name", MODULES)
def test_permuted_items_have_permuted_scores_exactly(name: str) -> None:
    """In whole numbers, so that sums have no rounding that depends on the place."""
    make, shape = MODULES[name]
    net = SinkhornNetwork(make(6), 30.0, item_dim=len(shape))
    for p in net.parameters():
        p.data = torch.randint(-3, 4, p.shape).to(p.dtype)
    x = torch.randint(-4, 5, (4, 6, *shape)).double()
    perm = torch.randperm(6)
    scores = net.scores(x)
    assert scores.std() > 1
    assert torch.equal(net.scores(x[:, perm]), scores[:, perm])
    # The solver sums in another order, so that P agrees to its tolerance only.
    torch.testing.assert_close(net(x[:, perm]), net(x)[:, perm], rtol=0, atol=SOLVED)


@pytest.mark.parametrize("name", MODULES)
def test_restored_order_does_not_depend_on_the_given_one(name: str) -> None:
    make, shape = MODULES[name]
    net = SinkhornNetwork(make(6), item_dim=len(shape)).eval()
    x, perm = torch.randn(4, 6, *shape), torch.randperm(6)
    torch.testing.assert_close(
        net.scores(x[:, perm]), net.scores(x)[:, perm], rtol=0, atol=ROUNDING
    )
    assert torch.equal(net(x[:, perm]), net(x)[:, perm])
    assert torch.equal(restore(net(x[:, perm]), x[:, perm]), restore(net(x), x))


def test_elements_of_a_batch_are_networks_of_their_own() -> None:
    net = SinkhornNetwork(perceptron(4), 0.3)
    x = torch.randn(2, 3, 4, 2)
    alone = torch.stack([net(x[i, j]) for i in range(2) for j in range(3)])
    torch.testing.assert_close(net(x), alone.view(2, 3, 4, 4), rtol=0, atol=SOLVED)


def test_items_may_be_bare_numbers() -> None:
    class Slopes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # (k,) -> (k, 3)
            return x[:, None] * torch.arange(3.0)

    x = torch.tensor([[3.0, 1.0, 2.0], [5.0, 6.0, 4.0]])
    net = SinkhornNetwork(Slopes(), item_dim=0).eval()
    assert torch.equal(restore(net(x), x), x.sort(-1).values)


def test_rows_are_items_and_columns_positions() -> None:
    """Which way it acts, on [3, 1, 2]: P[0, 2] = 1, since 3 goes to position 2."""
    net = SinkhornNetwork(nn.Linear(1, 3)).eval()
    net.f.weight.data = torch.arange(3.0)[:, None]
    x = torch.tensor([[3.0], [1.0], [2.0]])
    P = net(x)
    assert P[0, 2] == P[1, 0] == P[2, 1] == 1
    assert to_indices(P).tolist() == [2, 0, 1]
    assert torch.equal(to_matrix(to_indices(P)), P)
    assert (P.mT @ x).squeeze(-1).tolist() == [1.0, 2.0, 3.0]
    assert (P @ x).squeeze(-1).tolist() != [1.0, 2.0, 3.0]
    assert torch.equal(restore(P, x), P.mT @ x)
    # As an index it is the rank of every item, and its inverse is argsort.
    assert torch.equal(to_indices(P.mT), x.squeeze(-1).argsort())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_gradients_reach_every_weight(dtype: torch.dtype, noise: float) -> None:
    for make, shape in MODULES.values():
        f = make(5).to(dtype)
        net = SinkhornNetwork(f, 0.2, noise=noise, item_dim=len(shape))
        x = torch.randn(3, 5, *shape, dtype=dtype)
        P = net(x)
        assert P.dtype == dtype
        ((restore(P, x) - x) ** 2).mean().backward()
        for p in net.parameters():
            assert p.grad is not None
            assert p.grad.isfinite().all()
        assert f[0].weight.grad.abs().max() > 1e-6
        assert f[-1].weight.grad.abs().max() > 1e-6


def test_gradient_is_that_of_differences() -> None:
    net = SinkhornNetwork(nn.Linear(2, 4), 0.4)
    x = torch.randn(3, 4, 2)
    step = 1e-4

    def loss() -> Tensor:
        return (restore(net(x), x) ** 3).sum()

    loss().backward()
    weight = net.f.weight
    for i, j in ((0, 0), (2, 1), (3, 0)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i, j] += sign * step
                values.append(loss())
                weight[i, j] -= sign * step
        # Sums are right to about 1e-6, which the difference divides by the step.
        expected = (values[0] - values[1]) / (2 * step)
        assert abs(weight.grad[i, j] - expected) < 1e-3 * (1 + expected.abs())


def test_a_restored_sequence_has_a_gradient_and_an_indexed_one_has_not() -> None:
    net = SinkhornNetwork(perceptron(4))
    x = torch.randn(4, 2)
    P = net(x)
    assert restore(P, x).requires_grad
    perm = to_indices(matching(P))
    hard = restore(to_matrix(perm), x)
    assert torch.equal(hard[perm], x)  # the item i is at perm[i]
    assert torch.equal(x[perm], restore(to_matrix(perm).mT, x))
    assert not x[perm].requires_grad
    assert not hard.requires_grad


def test_training_learns_what_evaluation_uses() -> None:
    net = SinkhornNetwork(nn.Linear(1, 5), 0.1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(200):
        x = torch.rand(20, 5, 1)
        loss = (restore(net(x), x) - x.sort(1).values).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    slopes = net.f.weight.detach().squeeze(-1)
    assert (slopes.diff() > 0).all()
    x = torch.rand(100, 5, 1)
    assert torch.equal(restore(net.eval()(x), x), x.sort(1).values)


def test_noise_is_that_of_gumbel_sinkhorn_and_only_in_training() -> None:
    X = torch.randn(3, 3)

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return X.repeat(len(x) // 3, 1)

    net = SinkhornNetwork(Fixed(), 0.7, noise=1.0)
    x = torch.zeros(4000, 3, 1)
    found, expected = net(x), GumbelSinkhorn(X, 0.7).sample((4000,))
    for moment in (1, 2):
        a, b = found**moment, expected**moment
        error = (a.var(0) / 4000 + b.var(0) / 4000).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < SIGMAS * error).all()
    net.noise = 0.0
    assert torch.equal(net(x[:1])[0], sinkhorn(X, 0.7))
    net.noise = 1.0
    net.eval()
    assert torch.equal(net(x[:5]), matching(X).expand(5, 3, 3))
    # Half of the noise is the distribution of doubled scores at twice the temperature.
    net.train().noise = 0.5
    expected = GumbelSinkhorn(2 * X, 1.4).sample((4000,))
    found = net(x)
    error = (found.var(0) / 4000 + expected.var(0) / 4000).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < SIGMAS * error).all()


def test_noise_keeps_the_dtype() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(2, 4, dtype=x.dtype)

    for noise in (0.0, 1.0):
        net = SinkhornNetwork(Half(), noise=noise)
        assert net(torch.randn(4, 2, dtype=torch.float16)).dtype == torch.float16


def test_temperature_may_be_lowered() -> None:
    net = SinkhornNetwork(perceptron(5), 1.0)
    x = torch.randn(5, 2)
    warm = net(x)
    net.temperature = 1e-3
    cold = net(x)
    torch.testing.assert_close(warm, sinkhorn(net.scores(x), 1.0))
    hard = matching(net.scores(x))
    assert (cold - hard).abs().max() < (warm - hard).abs().max() / 10


def test_state_and_module_are_those_of_torch() -> None:
    net, copy = SinkhornNetwork(perceptron(5)), SinkhornNetwork(perceptron(5))
    copy.load_state_dict(net.state_dict())
    x = torch.randn(5, 2)
    assert torch.equal(net(x), copy(x))
    assert "temperature=1.0" in repr(net)
    assert net.double() is net


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature.*eval"):
        SinkhornNetwork(perceptron(5), temperature)
    net = SinkhornNetwork(perceptron(5))
    net.temperature = temperature
    with pytest.raises(ValueError, match="temperature"):
        net(torch.randn(5, 2))


def test_other_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="noise"):
        SinkhornNetwork(perceptron(5), noise=-1.0)
    with pytest.raises(ValueError, match="item_dim"):
        SinkhornNetwork(perceptron(5), item_dim=-1)
    net = SinkhornNetwork(perceptron(5))
    with pytest.raises(ValueError, match="4 items as many scores"):
        net(torch.randn(3, 4, 2))
    with pytest.raises(ValueError, match="item_dim="):
        net(torch.randn(2))
    with pytest.raises(ValueError, match="logits"):
        net(torch.full((5, 2), torch.nan))


def test_restore_keeps_items_whole() -> None:
    perm = torch.stack([torch.randperm(4) for _ in range(3)])
    pictures = torch.randn(3, 4, 2, 5, 5)
    P = to_matrix(perm)
    ordered = restore(P, pictures)
    for b in range(3):
        for i in range(4):
            assert torch.equal(ordered[b, perm[b, i]], pictures[b, i])
    assert torch.equal(restore(P.mT, ordered), pictures)
    assert restore(torch.zeros(0, 4, 4), torch.zeros(0, 4, 2)).shape == (0, 4, 2)
    soft = torch.full((3, 4, 4), 0.25)
    mean = pictures.mean(1, keepdim=True).expand_as(pictures)
    torch.testing.assert_close(restore(soft, pictures), mean)
    for shape in ((3, 5, 2), (2, 4, 2), (3,)):
        with pytest.raises(ValueError, match="shape"):
            restore(P, torch.randn(shape))
