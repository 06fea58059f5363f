# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Items in the order that a permutation gives them, with a gradient."""

from __future__ import annotations

__all__ = ["restore"]

from torch import Tensor


def restore(
    P: Tensor,  # (*batch, n, n)
    items: Tensor,  # (*batch, n, *item_shape)
) -> Tensor:  # (*batch, n, *item_shape)
    r"""Put every item where a permutation sends it.

    .. math:: y_j = \sum_i P_{ij} x_i, \qquad y = P^\top x

    ``P[i, j] = 1`` says that item i goes to position j, as in all of this package. A
    soft, doubly stochastic P mixes items. Gradients flow to P and to the items;
    indexing with integers, ``x[perm]``, would cut off those to P. The inverse, that
    scrambles y again, is ``restore(P.mT, y)``.

    Args:
        P: Matrices of shape ``(*batch, n, n)``.
        items: What is to be reordered, of shape ``(*batch, n, *item_shape)``: numbers,
            vectors, pictures.

    Raises:
        ValueError: If the shapes do not fit, or the types.

    Example:
        >>> import torch
        >>> x = torch.tensor([3.0, 1.0, 2.0])
        >>> P = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])  # 3 to the end, ...
        >>> restore(P, x), P.mT @ x
        (tensor([1., 2., 3.]), tensor([1., 2., 3.]))
        >>> restore(P.mT, restore(P, x)), P @ (P.mT @ x)
        (tensor([3., 1., 2.]), tensor([3., 1., 2.]))
    """
    lead = P.shape[:-1]
    if P.dim() < 2 or P.shape[-1] != P.shape[-2] or items.shape[: len(lead)] != lead:
        raise ValueError(
            "expected P of shape (*batch, n, n) and items of shape (*batch, n, "
            f"*item_shape), got {tuple(P.shape)} and {tuple(items.shape)}. To apply "
            "several P to the same items, expand the items."
        )
    if items.dtype != P.dtype:
        raise ValueError(
            f"P is of type {P.dtype}, but items are {items.dtype}. Convert one of them."
        )
    # Not n - 1 of flatten: items may be numbers, and a batch may be empty.
    size = items.shape[len(lead) :].numel()
    return (P.mT @ items.reshape(*lead, size)).reshape(items.shape)
