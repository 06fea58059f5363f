# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A picture of a matching posterior; matplotlib is imported when one is drawn."""

from __future__ import annotations

__all__ = ["plot_marginals"]

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from pyro_permutations.posterior import MatchingPosterior

# Names of more items than this cannot be read.
_LEGIBLE = 60


def plot_marginals(
    posterior: MatchingPosterior,
    axes: Any = None,
    *,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    like: MatchingPosterior | None = None,
) -> Any:
    r"""Draw how likely each pair is, ordered so that the items in doubt stand together.

    Columns that the same rows could have are neighbours: leaves of a tree of average
    linkage, ordered optimally, with the distance of columns j and k one less the cosine
    of their probabilities. Rows follow the columns of ``posterior.best``, so that the
    best matching is the diagonal, and what is in doubt a block around it. A last column
    is being unmatched, if that was ever drawn; rows that are best unmatched come last.

    Args:
        posterior: Of a single matching; select one of a batch by ``posterior[0]``.
        axes: Axes of matplotlib to draw in. None: those of a figure of their own.
        row_names: A name for each row; their numbers if not given. Up to 60 rows or
            columns get their names written beside them.
        column_names: A name for each column; their numbers if not given.
        like: A posterior of the same items that gives the order instead, so that
            pictures of several can be compared.

    Returns:
        The axes; ``axes.figure.savefig(path)`` writes the picture, and
        ``axes.figure.colorbar(axes.images[0])`` adds a scale.

    Raises:
        ValueError: If a posterior has a batch, if names are not as many as items, or
            if ``like`` is of other numbers of them.
        ModuleNotFoundError: Without matplotlib.

    References:
        Bar-Joseph, Gifford and Jaakkola, "Fast optimal leaf ordering for hierarchical
        clustering", Bioinformatics 17 (2001).

    Example:
        >>> posterior = MatchingPosterior(torch.tensor([[2, 0, 1], [2, 1, 0]]))
        >>> axes = plot_marginals(posterior, row_names="abc")
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['b', 'c', 'a']
    """
    probability = _marginals(posterior)
    n, m = probability.shape[0], posterior.columns
    rows = _names(row_names, n, "row_names")
    columns = [*_names(column_names, m, "column_names"), "unmatched"]
    first = posterior if like is None else like
    if first.perm.shape[-1] != n or first.columns != m:
        raise ValueError(
            f"like must be of {n} rows and {m} columns as the posterior is, got "
            f"{first.perm.shape[-1]} and {first.columns}."
        )
    by_column = _column_order(_marginals(first)[:, :m])
    by_row = _row_order(first.best.cpu(), by_column)
    shown = [*by_column.tolist(), *([m] if (probability[:, m] > 0).any() else [])]

    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(layout="constrained").subplots()
    picture = probability[by_row][:, shown].numpy()
    axes.imshow(picture, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if n <= _LEGIBLE:
        axes.set_yticks(range(n), [rows[i] for i in by_row.tolist()])
    if len(shown) <= _LEGIBLE:
        axes.set_xticks(range(len(shown)), [columns[j] for j in shown], rotation=90)
    return axes


def _marginals(posterior: MatchingPosterior) -> Tensor:  # (n, m + 1)
    if posterior.batch_shape:
        raise ValueError(
            f"a picture is of one matching, but the posterior has batch shape "
            f"{tuple(posterior.batch_shape)}: select one, as in posterior[0]."
        )
    return posterior.marginals()[0].cpu()


def _names(names: Sequence[str] | None, count: int, argument: str) -> list[str]:
    if names is None:
        return [str(k) for k in range(count)]
    if len(names) != count:
        raise ValueError(
            f"{argument} must have one for each of {count}, got {len(names)}."
        )
    return list(names)


def _column_order(
    probability: Tensor,  # (n, m)
) -> Tensor:  # (m,) long
    """Columns, those that the same rows could have side by side."""
    m = probability.shape[-1]
    if m < 3:
        return torch.arange(m)
    columns: NDArray[np.float64] = probability.double().numpy()
    length = np.linalg.norm(columns, axis=0)
    cosine = (columns / np.where(length > 0, length, 1)).T
    distance = (1 - cosine @ cosine.T).clip(0)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    order = leaves_list(tree)
    # A tree can be read from both ends: begin with the end that has the first column.
    return torch.as_tensor(order[::-1].copy() if order[0] > order[-1] else order)


def _row_order(
    best: Tensor,  # (n,) long
    by_column: Tensor,  # (m,) long
) -> Tensor:  # (n,) long
    """Rows in the order of their columns, those without one last."""
    place = torch.full((len(by_column) + 1,), len(by_column))
    place[by_column] = torch.arange(len(by_column))
    return place[best].argsort(stable=True)  # -1 is the last place
