# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""R-hat and effective sample size by item, against those of every entry."""

from __future__ import annotations

import pytest
import torch
from pyro.ops.stats import split_gelman_rubin

from pyro_permutations import MatchingPosterior, mixing, to_indices, to_matrix
from pyro_permutations.effective_draws import effective_draws

SAME = 1e-9  # the same number by two routes, relative


def sticky_chains(chains: int, count: int, n: int) -> torch.Tensor:
    """Permutations that change now and then; the last row never does."""
    perm = torch.arange(n).expand(chains, n).clone()
    found = []
    for _ in range(count):
        for c in range(chains):
            if torch.rand(()) < 0.3:
                i, k = torch.randperm(n - 1)[:2]
                perm[c, i], perm[c, k] = perm[c, k].clone(), perm[c, i].clone()
        found.append(perm.clone())
    return to_matrix(torch.stack(found, 1))


@pytest.mark.parametrize("chains", [1, 3])
def test_the_worst_entry_of_each_row(chains: int) -> None:
    samples = sticky_chains(chains, 61, 4)
    found = mixing(samples)
    r_hat = split_gelman_rubin(samples)[:3, :3]
    size = effective_draws(samples)[:3, :3]  # itself tested with known chains
    assert torch.allclose(found.r_hat[:3], r_hat.amax(-1), rtol=SAME)
    assert torch.allclose(found.effective_size[:3], size.amin(-1), rtol=SAME)
    # Entries of the last row and column never change: left out, and counted.
    assert found.r_hat[3].isnan()
    assert found.effective_size[3].isnan()
    assert found.constant.tolist() == [1, 1, 1, 4]


def test_a_posterior_of_chains_is_its_samples() -> None:
    samples = sticky_chains(2, 40, 4)
    perm = to_indices(samples)
    found = mixing(MatchingPosterior(perm.flatten(0, 1), chains=2))
    for one, other in zip(found, mixing(samples), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    with pytest.raises(ValueError, match="Markov chains"):
        mixing(MatchingPosterior(perm.flatten(0, 1)))


def test_a_chain_that_alternates_has_no_negative_size() -> None:
    perm = torch.tensor([[0, 1], [1, 0]]).repeat(50, 1)
    found = mixing(to_matrix(perm)[None])
    assert (found.effective_size > 0).all()
    assert (found.effective_size <= 100).all()


def test_chains_that_are_stuck_apart() -> None:
    samples = torch.stack([torch.eye(3), torch.eye(3).flip(0)])[:, None]
    found = mixing(samples.expand(2, 10, 3, 3))
    assert found.r_hat.tolist()[::2] == [torch.inf, torch.inf]
    assert found.effective_size.tolist()[::2] == [0.0, 0.0]
    assert found.constant.tolist() == [1, 3, 1]


def test_being_unmatched_counts_and_batches_are_kept() -> None:
    samples = torch.zeros(2, 20, 5, 2, 3)
    samples[..., 1, 0] = torch.randint(0, 2, (2, 20, 5)).double()
    found = mixing(samples)
    assert found.r_hat.shape == (5, 2)
    assert found.r_hat[:, 0].isnan().all()
    assert found.r_hat[:, 1].isfinite().all()
    assert (found.constant == torch.tensor([4, 2])).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="group_by_chain"):
        mixing(torch.zeros(10, 3, 3))
    with pytest.raises(ValueError, match="at least 4"):
        mixing(torch.zeros(2, 3, 3, 3))
