# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Scores to soft rankings and back."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.distributions import biject_to, transform_to
from torch.func import vmap

import pyro_permutations as pp
from pyro_permutations import RankingTransform, log_of, soft_ranking

SAME = 1e-9  # relative, of scores that went through a converged Sinkhorn


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.001])
@pytest.mark.parametrize(("n", "top"), [(2, None), (5, None), (5, 4), (5, 1), (30, 7)])
def test_inverse(n, top, temperature):
    transform = RankingTransform(temperature, top)
    x = 2 * torch.randn(3, n - 1)
    P = transform(x)
    assert P.shape == transform.forward_shape(x.shape)
    assert transform.inverse_shape(P.shape) == x.shape
    assert transform.codomain.check(P).all()
    assert torch.allclose(transform.inv(P), x, rtol=SAME, atol=SAME)
    volume = transform.log_abs_det_jacobian(x, P)
    expected = -(n - 1) * torch.tensor(temperature).log()
    assert torch.allclose(volume, expected.expand(3))


def test_is_the_descending_sort_at_low_temperature():
    x = torch.tensor([3.0, 1.0, -1.0, 2.0])  # and zero
    P = RankingTransform(0.001)(x)
    z = torch.cat([x, torch.zeros(1)])
    assert torch.equal(P.round(), pp.to_matrix(z.argsort(descending=True)))
    assert torch.allclose(P @ z, z.sort(descending=True).values)
    top = RankingTransform(0.001, 2)(x)
    assert torch.allclose(top @ z, torch.tensor([3.0, 2.0]))


def test_is_sinkhorn_of_scores_times_positions():
    x = torch.randn(4)
    z = torch.cat([x, torch.zeros(1)])
    position = torch.arange(5.0, 0, -1)
    for top in (None, 3):
        rows = position[-3:] if top else position
        expected = pp.sinkhorn(rows[:, None] * z, 0.7)
        assert torch.allclose(RankingTransform(0.7, top)(x), expected, atol=1e-6)


def test_permuting_the_scores_permutes_the_items():
    z = torch.randn(6)
    order = torch.randperm(6)

    def soft(z):
        return RankingTransform(0.5)(z[:-1] - z[-1])

    assert torch.allclose(soft(z[order]), soft(z)[:, order], rtol=SAME, atol=SAME)


def test_batches_of_temperatures_and_vmap():
    x, temperature = torch.randn(3, 4), torch.tensor([1.0, 0.5, 0.1])
    P = RankingTransform(temperature)(x)
    each = [RankingTransform(t)(v) for t, v in zip(temperature, x, strict=True)]
    assert torch.allclose(P, torch.stack(each), rtol=1e-6)
    assert RankingTransform(temperature)(x[0]).shape == (3, 5, 5)
    assert RankingTransform(temperature).forward_shape((4,)) == (3, 5, 5)
    assert torch.allclose(vmap(RankingTransform(0.5))(x), RankingTransform(0.5)(x))
    assert vmap(soft_ranking.check)(RankingTransform(0.5)(x)).all()


def test_registrations_and_python():
    for registry in (biject_to, transform_to):
        assert registry(soft_ranking) == RankingTransform(1.0)
        assert registry(soft_ranking(2)) == RankingTransform(1.0, 2)
    transform = RankingTransform(0.5, 2)
    assert transform != RankingTransform(0.4, 2)
    assert transform != RankingTransform(0.5)
    assert transform.with_cache(1)._cache_size == 1
    copy = pickle.loads(pickle.dumps(transform))
    assert copy == transform
    assert hash(copy) == hash(transform)
    assert soft_ranking != soft_ranking(2)
    assert "soft_ranking(2)" in repr(soft_ranking(2))
    assert "0.5" in repr(transform)
    with pytest.raises(ValueError, match="temperature"):
        RankingTransform(0.0)


def test_samples_carry_their_log():
    x = torch.randn(6, dtype=torch.float32)
    P = RankingTransform(0.001)(x)
    assert (P == 0).any()
    assert log_of(P).isfinite().all()
    assert torch.allclose(RankingTransform(0.001).inv(P), x, rtol=1e-5)
