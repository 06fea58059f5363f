# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""How far an estimated permutation is from the true one, for each element of a batch.

A permutation is given as a matrix with ``P[i, j] = 1`` where item i goes to position j,
or as integers, ``perm[i] = j``; integers are always read as the second. For items that
are to be sorted by numbers x these are ``x.argsort(-1).argsort(-1)``: a single argsort
lists the items in order, which is the inverse.

Example:
    >>> from pyro_permutations import metrics
    >>> found, truth = torch.tensor([[0, 1, 2], [0, 2, 1]]), torch.arange(3)
    >>> metrics.proportion_wrong(found, truth), metrics.any_wrong(found, truth)
    (tensor([0.0000, 0.6667]), tensor([0., 1.]))
    >>> metrics.kendall_tau(found, truth)
    tensor([1.0000, 0.3333])
    >>> x = torch.tensor([1.0, 5.0, 8.0]).expand(2, 3)
    >>> metrics.l1(found, truth, x), metrics.l2(found, truth, x)
    (tensor([0., 2.]), tensor([0., 6.]))
"""

from __future__ import annotations

__all__ = ["any_wrong", "kendall_tau", "l1", "l2", "proportion_wrong"]

import torch
from torch import Tensor

from pyro_permutations.matching import to_indices, to_matrix
from pyro_permutations.restore import restore


def proportion_wrong(
    estimate: Tensor,  # (*batch, n, n) or (*batch, n) of integers
    truth: Tensor,  # (*batch, n, n) or (*batch, n) of integers
) -> Tensor:  # (*batch)
    """Fraction of the items that are not at their position.

    Raises:
        ValueError: If either is not a permutation. A soft matrix has to be hardened by
            :func:`~pyro_permutations.matching` first.
    """
    found, true, dtype = _both(estimate, truth)
    return (found != true).to(dtype).mean(-1)


def any_wrong(
    estimate: Tensor,  # (*batch, n, n) or (*batch, n) of integers
    truth: Tensor,  # (*batch, n, n) or (*batch, n) of integers
) -> Tensor:  # (*batch)
    """One where any item is not at its position, zero where all are.

    Its mean over a batch is the proportion of lists with an error.

    Raises:
        ValueError: If either is not a permutation.
    """
    found, true, dtype = _both(estimate, truth)
    return (found != true).any(-1).to(dtype)


def kendall_tau(
    estimate: Tensor,  # (*batch, n, n) or (*batch, n) of integers
    truth: Tensor,  # (*batch, n, n) or (*batch, n) of integers
) -> Tensor:  # (*batch)
    r"""Pairs of items in the right order, less those in the wrong one, over all pairs.

    .. math:: \tau = \binom{n}{2}^{-1} \sum_{i < k}
        \mathrm{sign}(\hat p_i - \hat p_k)\, \mathrm{sign}(p_i - p_k)

    with :math:`p_i` the position of item i. It is one for equal permutations, minus one
    for reversed ones, about zero at random; one item alone counts as one.

    Raises:
        ValueError: If either is not a permutation.

    References:
        Kendall, "A new measure of rank correlation", Biometrika 30 (1938).
    """
    found, true, dtype = _both(estimate, truth)
    n = found.shape[-1]
    if n == 1:
        return torch.ones_like(found[..., 0], dtype=dtype)
    agree = _order(found) * _order(true)
    # Half precision has no n (n - 1) for large n.
    return (agree.sum((-2, -1)).double() / (n * (n - 1))).to(dtype)


def l1(
    estimate: Tensor,  # (*batch, n, n) or (*batch, n) of integers
    truth: Tensor,  # (*batch, n, n) or (*batch, n) of integers
    items: Tensor,  # (*batch, n, *item_shape)
) -> Tensor:  # (*batch)
    """Mean absolute difference of the restored items from the truly ordered ones.

    Items that look alike may be exchanged without an error. The mean is over positions
    and the entries of an item. Matrices may be soft, and then it has a gradient.

    Raises:
        ValueError: If integers are not a permutation, or shapes do not fit.
    """
    return _differences(estimate, truth, items).abs().mean(-1)


def l2(
    estimate: Tensor,  # (*batch, n, n) or (*batch, n) of integers
    truth: Tensor,  # (*batch, n, n) or (*batch, n) of integers
    items: Tensor,  # (*batch, n, *item_shape)
) -> Tensor:  # (*batch)
    """Mean squared difference (no root); otherwise as :func:`l1`."""
    return _differences(estimate, truth, items).square().mean(-1)


def _both(
    estimate: Tensor, truth: Tensor
) -> tuple[Tensor, Tensor, torch.dtype]:  # (*batch, n), (*batch, n)
    """Positions of all items, and the type of a metric."""
    found, true = _positions(estimate), _positions(truth)
    if found.shape[-1] != true.shape[-1]:
        raise ValueError(
            f"estimate and truth are permutations of {found.shape[-1]} and of "
            f"{true.shape[-1]} items."
        )
    try:
        torch.broadcast_shapes(found.shape, true.shape)
    except RuntimeError:
        raise ValueError(
            f"the batch of estimate, {tuple(found.shape[:-1])}, does not broadcast "
            f"with that of truth, {tuple(true.shape[:-1])}."
        ) from None
    dtype = torch.get_default_dtype()
    for P in (truth, estimate):
        dtype = P.dtype if P.is_floating_point() else dtype
    return found, true, dtype


def _positions(P: Tensor) -> Tensor:  # (*batch, n)
    perm = P if _is_indices(P) else to_indices(P)
    n = perm.shape[-1] if perm.dim() else 0
    places = torch.arange(n, device=perm.device)
    square = _is_indices(P) or P.shape[-1] == n
    if n == 0 or not square or not bool((perm.long().sort(-1).values == places).all()):
        raise ValueError(
            "expected permutation matrices (*batch, n, n), or integers (*batch, n) "
            f"with each of 0..n-1 once, got {P.dtype} of shape {tuple(P.shape)}."
        )
    return perm.long()


def _is_indices(P: Tensor) -> bool:
    return not (P.is_floating_point() or P.dtype == torch.bool)


def _order(perm: Tensor) -> Tensor:  # (*batch, n, n)
    return (perm[..., :, None] - perm[..., None, :]).sign()


def _differences(
    estimate: Tensor, truth: Tensor, items: Tensor
) -> Tensor:  # (*batch, entries of all items)
    if not items.is_floating_point():  # pictures are often of whole numbers
        items = items.to(torch.get_default_dtype())
    found, true = (
        to_matrix(_positions(P), items.dtype) if _is_indices(P) else P.to(items.dtype)
        for P in (estimate, truth)
    )
    found, true = torch.broadcast_tensors(found, true)
    return (restore(found, items) - restore(true, items)).flatten(found.dim() - 2)
