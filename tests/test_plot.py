# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The order of a heat map, and what is drawn in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import matplotlib as mpl
import pytest
import torch

from pyro_permutations import MatchingPosterior, heat_map, structural_order

mpl.use("agg")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    from matplotlib import pyplot as plt

    yield
    plt.close("all")


def blocks(sizes: list[int]) -> torch.Tensor:
    """Doubly stochastic, uniform inside of each block."""
    return torch.block_diag(*[torch.full((k, k), 1 / k) for k in sizes])


def test_groups_come_together_again() -> None:
    B = blocks([3, 1, 4, 2])
    rows, columns = torch.randperm(10), torch.randperm(10)
    mixed = B[rows][:, columns]
    order = structural_order(mixed)
    assert order[0].sort().values.tolist() == list(range(10))
    assert order[1].sort().values.tolist() == list(range(10))
    found = mixed[order[0]][:, order[1]]
    assert (found.diagonal() > 0).all()
    assert torch.equal(found, found.mT)
    # Each row's cells are an interval: blocks, in some order.
    for row in found > 0:
        where = row.nonzero()[:, 0]
        assert int(where[-1] - where[0]) == len(where) - 1


def test_a_band_is_a_band_again() -> None:
    """Neighbours on a line, each confused with the next: reordering finds the line."""
    n = 20
    B = torch.diag(torch.full((n,), 0.8)) + 0.1 * (
        torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
    )
    mixed = B[torch.randperm(n)][:, torch.randperm(n)]
    rows, columns = structural_order(mixed)
    i, j = (mixed[rows][:, columns] > 0).nonzero(as_tuple=True)
    assert int((i - j).abs().max()) <= 2  # it is 1 in the best order
    i, j = (mixed > 0).nonzero(as_tuple=True)
    assert int((i - j).abs().max()) > 10


def test_the_best_matching_is_the_diagonal_and_the_rest_comes_last() -> None:
    p = torch.tensor([[0.1, 0.0, 0.9, 0.0], [0.2, 0.7, 0.1, 0.0]])
    rows, columns = structural_order(p)
    found = p[rows][:, columns]
    assert sorted(found.diagonal().tolist()) == [0.7, 0.9]
    assert columns[-1] == 3 or columns[-2] == 3
    tall = structural_order(p.mT)
    assert (len(tall[0]), len(tall[1])) == (4, 2)
    assert structural_order(torch.zeros(3, 2))[1].sort().values.tolist() == [0, 1]


def drawn(axes) -> torch.Tensor:
    return torch.as_tensor(axes.images[0].get_array().data)


def test_names_stand_where_their_probabilities_are() -> None:
    perm = torch.tensor([[2, 0, 1]] * 7 + [[2, 1, 0]] * 2 + [[2, -1, 0]])
    posterior = MatchingPosterior(perm, 4)
    axes = heat_map(posterior, names=("abc", ["W", "X", "Y", "Z"]))
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert sorted(rows) == ["a", "b", "c"]
    assert columns[-1] == "unmatched"
    value = {
        (r, c): float(x)
        for r, line in zip(rows, drawn(axes), strict=True)
        for c, x in zip(columns, line, strict=True)
    }
    expected = {("a", "Y"): 1.0, ("b", "W"): 0.7, ("b", "X"): 0.2, ("c", "W"): 0.3}
    expected |= {("b", "unmatched"): 0.1, ("a", "unmatched"): 0.0, ("a", "Z"): 0.0}
    for pair, p in expected.items():
        assert abs(value[pair] - p) < 1e-6
    assert len(axes.figure.axes) == 2, "a colour bar"


def test_a_given_order_and_axes_are_used() -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots()
    posterior = MatchingPosterior(torch.tensor([[1, 0, 2]]))
    order = torch.tensor([2, 1, 0]), torch.tensor([0, 1, 2])
    assert heat_map(posterior, order=order, axes=axes) is axes
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert torch.equal(drawn(axes), expected)
    assert len(figure.axes) == 1
    large = MatchingPosterior(torch.arange(100)[None])
    assert heat_map(large).get_xticklabels() == []


def test_wrong_arguments_are_named() -> None:
    posterior = MatchingPosterior(torch.tensor([[1, 0, 2]]))
    with pytest.raises(ValueError, match=r"of 3 rows and 3 columns, got \[2, 3\]"):
        heat_map(posterior, names=("ab", "abc"))
    with pytest.raises(ValueError, match=r"an order of \[3, 2\]"):
        heat_map(posterior, order=(torch.arange(3), torch.arange(2)))
    batch = MatchingPosterior(torch.arange(3).expand(4, 2, 3))
    with pytest.raises(ValueError, match=r"batch shape \(2,\): select one"):
        heat_map(batch)


def test_matplotlib_is_needed_only_to_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    structural_order(torch.eye(3))
    with pytest.raises(ImportError, match="heat_map draws with matplotlib"):
        heat_map(MatchingPosterior(torch.tensor([[0, 1]])))
