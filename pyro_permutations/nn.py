# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A network that puts items in order: soft while it learns, a permutation after."""

from __future__ import annotations

__all__ = ["SinkhornNetwork"]

import torch
from torch import Tensor, nn

from pyro_permutations.matching import matching
from pyro_permutations.sinkhorn import sinkhorn


class SinkhornNetwork(nn.Module):
    r"""Scores of items for positions by one module, and the permutation they ask for.

    .. math:: X_{i \cdot} = f(x_i), \qquad
        P = S\big((X + s\,\epsilon) / \tau\big) \text{ in training}, \qquad
        P = M(X) \text{ after } \texttt{eval()}

    The module f sees an item, whichever place it has, and gives it a score for every
    position. ``P[i, j]`` near one says that item i goes to position j, and
    :func:`~pyro_permutations.restore`, :math:`y = P^\top x`, puts the items there.
    Permuting the items permutes the rows of scores, whatever the weights are (unless
    the module itself draws at random, as dropout does), and so the rows of P, where the
    best matching is unique: the restored order does not depend on the given one.

    In training P is the converged Sinkhorn operator, doubly stochastic and with a
    gradient to the weights; with ``noise`` it is a draw of Gumbel-Sinkhorn. In
    evaluation it is the exact best matching of the scores without noise, a permutation
    matrix that carries no gradient.

    ``temperature`` is an attribute: assign to it to lower it as training goes on. The
    lower it is, the nearer P is to a permutation, and the smaller the gradient of what
    is decided. With two items and :math:`c = X_{11} + X_{22} - X_{12} - X_{21}` it is
    :math:`P_{11} = \sigma(c / 2 \tau)`, whose derivative by a score is
    :math:`P_{11} (1 - P_{11}) / 2 \tau`: at most :math:`1 / 8 \tau`, and about
    :math:`e^{-c / 2 \tau} / 2 \tau` once it is decided. If all entries of P are within
    1e-6 of 0 and 1 the network hardly learns any more: raise the temperature, or take
    noise, under which some draws are always undecided.

    Args:
        f: A module from items ``(k, *item_shape)`` to scores ``(k, n)``: a
            perceptron on numbers, a convolutional network on pieces of a picture. It
            may look at other items of a list, too, if it treats them all alike.
        temperature: Positive.
        noise: Scale s of the Gumbel noise in training; zero for none. With one it is
            the noise of :class:`~pyro_permutations.GumbelSinkhorn`.
        item_dim: Number of dimensions of an item: 1 for vectors, 3 for pictures with
            channels, 0 for bare numbers.

    Raises:
        ValueError: If the temperature is not positive and finite, the noise is negative
            or not finite, the module gives another number of scores than there are
            items, or they are NaN or +inf. A score of -inf forbids a position.

    References:
        Mena, Belanger, Linderman and Snoek, "Learning latent permutations with
        Gumbel-Sinkhorn networks" (2018), https://arxiv.org/abs/1802.08665.

    Example:
        >>> from pyro_permutations import restore, to_indices
        >>> slopes = nn.Linear(1, 3)  # scores of a number for three positions
        >>> net = SinkhornNetwork(slopes, temperature=0.1)
        >>> _ = slopes.weight.data.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> x = torch.tensor([[3.0], [1.0], [2.0]])
        >>> P = net(x)  # soft, with a gradient to the slopes
        >>> P.requires_grad, P.sum(-1).detach(), P.sum(-2).detach()
        (True, tensor([1., 1., 1.]), tensor([1., 1., 1.]))
        >>> P = net.eval()(x)
        >>> P  # 3 goes to position 2, 1 to 0, 2 to 1
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]])
        >>> to_indices(P), restore(P, x).squeeze(-1)
        (tensor([2, 0, 1]), tensor([1., 2., 3.]))
    """

    def __init__(
        self,
        f: nn.Module,
        temperature: float = 1.0,
        *,
        noise: float = 0.0,
        item_dim: int = 1,
    ) -> None:
        super().__init__()
        if not 0 < temperature < torch.inf:
            raise ValueError(
                f"temperature must be positive and finite, but is {temperature}. For "
                "hard permutations call eval() on the network."
            )
        if not 0 <= noise < torch.inf:
            raise ValueError(f"noise must be finite and not negative, but is {noise}.")
        if item_dim < 0:
            raise ValueError(f"item_dim must not be negative, but is {item_dim}.")
        self.f, self.temperature = f, temperature
        self.noise, self.item_dim = noise, item_dim

    def scores(
        self,
        x: Tensor,  # (*batch, n, *item_shape)
    ) -> Tensor:  # (*batch, n, n)
        """Scores of every item for every position, before noise and temperature."""
        lead = x.shape[: x.dim() - self.item_dim]
        if not lead:
            raise ValueError(
                "expected items of shape (*batch, n, *item_shape) with "
                f"{self.item_dim} dimensions of an item, got {tuple(x.shape)}. Pass "
                "item_dim= for items of other kinds."
            )
        items = x.reshape(lead.numel(), *x.shape[len(lead) :])
        scores: Tensor = self.f(items)
        if scores.shape != (lead.numel(), lead[-1]):
            raise ValueError(
                f"the module has to give {lead[-1]} items as many scores each, so "
                f"{lead.numel()} items scores of shape {(lead.numel(), lead[-1])}, "
                f"but from items of shape {tuple(items.shape)} it made "
                f"{tuple(scores.shape)}."
            )
        return scores.reshape(*lead, lead[-1])

    def forward(
        self,
        x: Tensor,  # (*batch, n, *item_shape)
    ) -> Tensor:  # (*batch, n, n)
        """A doubly stochastic matrix in training, a permutation matrix after it."""
        scores = noisy = self.scores(x)
        if not self.training:
            return matching(scores)
        if not 0 <= self.noise < torch.inf:
            raise ValueError(
                f"noise must be finite and not negative, but is {self.noise}."
            )
        if self.noise:
            # Rare draws are exactly zero, and half precision has too few numbers.
            wide = torch.promote_types(scores.dtype, torch.float32)
            waits = torch.empty_like(scores, dtype=wide).exponential_()
            tiny = torch.finfo(wide).tiny
            noisy = scores - self.noise * waits.clamp_min(tiny).log()
        return sinkhorn(noisy, self.temperature).to(scores.dtype)

    def extra_repr(self) -> str:
        """What stands in the representation beside the module."""
        return f"temperature={self.temperature}, noise={self.noise}"
