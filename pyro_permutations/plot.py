# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A picture of the probabilities of a matching, in an order that shows structure."""

from __future__ import annotations

__all__ = ["heat_map", "structural_order"]

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Tensor

from pyro_permutations.matching import matching, to_indices
from pyro_permutations.posterior import MatchingPosterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Less likely pairs do not tell what belongs together.
_LIKELY = 0.02
# More names than this cannot be read.
_NAMES = 80


def structural_order(
    probability: Tensor,  # (n, m)
) -> tuple[Tensor, Tensor]:  # (n,), (m,) long
    """Order rows and columns so that what may be confused stands side by side.

    Rows that share a column which either may have, with a probability of .02 or more,
    become neighbours, group by group (reverse Cuthill-McKee). Columns follow the best
    matching, which is then the diagonal, where every row has a partner; columns that it
    leaves over come last.

    Args:
        probability: Of each pair, without that of being unmatched.

    Example:
        >>> mixed = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
        >>> rows, columns = structural_order(mixed)
        >>> mixed[rows][:, columns]
        tensor([[0.5000, 0.5000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    likely = (probability >= _LIKELY).double().cpu().numpy()
    shared = csr_matrix(likely @ likely.T)
    found = reverse_cuthill_mckee(shared, symmetric_mode=True)
    rows = torch.from_numpy(found.astype(np.int64)).to(probability.device)
    # Nothing is gained by leaving a pair apart: what can be matched is.
    perm = to_indices(matching(probability, unmatched=(-1.0, -1.0)))[rows]
    used = perm[perm >= 0]
    over = torch.ones(probability.shape[1], dtype=torch.bool, device=used.device)
    over[used] = False
    return rows, torch.cat([used, over.nonzero()[:, 0]])


def heat_map(
    posterior: MatchingPosterior,
    *,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
    order: tuple[Tensor, Tensor] | None = None,  # (n,), (m,) long
    axes: Axes | None = None,
) -> Axes:
    """Draw how likely each pair is, white for never and dark for always.

    Where something may be unmatched, that is a last column. Names are written for up to
    80 items a side, and all must be there. Needs matplotlib.

    Args:
        posterior: The posterior of one matching.
        names: Those of rows and of columns; their numbers if not given.
        order: In which order to draw rows and columns, such as that of another picture;
            :func:`structural_order` if not given.
        axes: Where to draw; a new figure with a colour bar if not given.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the posterior has a batch, or names or order another length.

    Example:
        >>> perm = torch.tensor([[0, 1, 2], [1, 0, 2]])
        >>> axes = heat_map(MatchingPosterior(perm), names=("abc", "ABC"))
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['b', 'a', 'c']
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("heat_map draws with matplotlib: pip install it.") from error
    if posterior.batch_shape:
        raise ValueError(
            "heat_map draws one matching, but the posterior has batch shape "
            f"{tuple(posterior.batch_shape)}: select one, as in heat_map(posterior[0])."
        )
    probability = posterior.marginals()[0]
    n, m = probability.shape[0], posterior.columns
    rows, columns = structural_order(probability[:, :m]) if order is None else order
    labels = ([*map(str, range(n))], [*map(str, range(m))])
    if names is not None:
        labels = ([*names[0]], [*names[1]])
    given = [len(x) for x in (*labels, rows, columns)]
    if given != [n, m, n, m]:
        raise ValueError(
            f"names and order must be of {n} rows and {m} columns, got {given[:2]} "
            f"names and an order of {given[2:]}."
        )
    shown = probability[rows][:, columns]
    texts = [labels[1][j] for j in columns.tolist()]
    if bool((probability[:, m] > 0).any()):
        shown = torch.cat([shown, probability[rows, m:]], -1)
        texts.append("unmatched")
    alone = axes is None
    if axes is None:
        _, axes = plt.subplots(layout="constrained")
    image = axes.imshow(shown.cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    if alone:
        axes.figure.colorbar(image, ax=axes, label="probability")
    axes.set_xticks(range(len(texts)) if len(texts) <= _NAMES else [])
    axes.set_yticks(range(n) if n <= _NAMES else [])
    if len(texts) <= _NAMES:
        axes.set_xticklabels(texts, rotation=90)
    if n <= _NAMES:
        axes.set_yticklabels([labels[0][i] for i in rows.tolist()])
    return axes
