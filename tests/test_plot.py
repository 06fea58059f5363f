# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The picture shows the marginals, in an order in which doubt is a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyro_permutations import MatchingPosterior, plot_marginals


def shuffled_blocks() -> tuple[MatchingPosterior, torch.Tensor]:
    """Six rows, of which three pairs are in doubt about each other, shuffled."""
    torch.manual_seed(0)
    rows, columns = torch.randperm(6), torch.randperm(6)
    draws = []
    for swaps in range(8):
        perm = torch.arange(6)
        for pair in range(3):
            if swaps >> pair & 1:
                perm[[2 * pair, 2 * pair + 1]] = perm[[2 * pair + 1, 2 * pair]]
        shuffled = torch.empty(6, dtype=torch.long)
        shuffled[rows] = columns[perm]
        draws.append(shuffled)
    weights = torch.tensor([8.0, 4, 4, 2, 4, 2, 2, 1])
    return MatchingPosterior(torch.stack(draws), weights=weights, exact=True), columns


def test_pairs_in_doubt_are_blocks_on_the_diagonal() -> None:
    posterior, _ = shuffled_blocks()
    picture = torch.as_tensor(plot_marginals(posterior).images[0].get_array().data)
    # Each row is right with 2/3 and has its partner's column with 1/3.
    block = torch.tensor([[2.0, 1.0], [1.0, 2.0]]) / 3
    expected = torch.block_diag(block, block, block)
    torch.testing.assert_close(picture.double(), expected.double())


def test_the_order_of_another_posterior() -> None:
    posterior, _ = shuffled_blocks()
    other = MatchingPosterior(posterior.mode.flip(0)[None])
    axes = plot_marginals(other, like=posterior)
    labels = [label.get_text() for label in plot_marginals(posterior).get_yticklabels()]
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    picture = torch.as_tensor(axes.images[0].get_array().data)
    for i, j in (picture == 1).nonzero().tolist():
        column = int(axes.get_xticklabels()[j].get_text())
        assert other.mode[int(labels[i])] == column
    with pytest.raises(ValueError, match="like must be of 6 rows and 6 columns"):
        plot_marginals(posterior, like=MatchingPosterior(torch.arange(3)[None]))


def test_names_stand_at_their_items() -> None:
    posterior, _ = shuffled_blocks()
    axes = plot_marginals(posterior, row_names="abcdef", column_names="uvwxyz")
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    picture, probability = axes.images[0].get_array().data, posterior.marginals()[0]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            assert (
                picture[i, j]
                == probability["abcdef".index(row)]["uvwxyz".index(column)].item()
            )


def test_unmatched_rows_are_last_and_have_a_column() -> None:
    perm = torch.tensor([[-1, 1], [-1, 0], [2, 1]])
    axes = plot_marginals(MatchingPosterior(perm, 3))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "0"]
    assert axes.get_xticklabels()[-1].get_text() == "unmatched"
    last = torch.as_tensor(axes.images[0].get_array().data)[:, -1]
    torch.testing.assert_close(last.double(), torch.tensor([0.0, 2 / 3]).double())


def test_many_items_have_no_names_and_given_axes_are_used(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    perm = torch.rand(20, 80).argsort(-1)
    assert plot_marginals(MatchingPosterior(perm), axes) is axes
    assert len(axes.get_yticks()) < 80
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_items(n: int) -> None:
    picture = plot_marginals(MatchingPosterior(torch.arange(n)[None])).images[0]
    assert (picture.get_array().data == torch.eye(n).numpy()).all()


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(ValueError, match=r"batch shape \(2,\).*posterior\[0\]"):
        plot_marginals(MatchingPosterior(torch.arange(3).expand(4, 2, 3)))
    with pytest.raises(ValueError, match="row_names must have one for each of 3, got"):
        plot_marginals(MatchingPosterior(torch.arange(3)[None]), row_names="ab")
