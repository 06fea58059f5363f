# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Weighted spanning trees of a bipartite graph, and solves with its Laplacian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph, matching_graph
from pyro_permutations.matching_parts import (
    decided,
    falls_apart,
    flattened,
    parts,
    take,
)
from pyro_permutations.resistor_network import Network

__all__ = ["currents", "log_spanning_trees", "to_front"]


def log_spanning_trees(
    log_weights: Tensor,  # (*batch, n, m)
    graph: MatchingGraph | None = None,
) -> Tensor:  # (*batch,)
    r"""Log of the weighted number of spanning trees of a bipartite graph.

    .. math:: \log T(K) = \log \sum_{\text{trees } t} \prod_{(i,j) \in t} K_{ij}

    with one tree per connected component where the graph has several. By the
    matrix-tree theorem (Kirchhoff, 1847) this is a determinant of the graph Laplacian,
    with one node per component struck out. All terms are positive, and the elimination
    subtracts nothing where that matters (Grassmann, Taksar and Heyman, 1985), so that
    the result is right to about 1e-11 for log weights of any size.

    The gradient with respect to ``log_weights[i, j]`` is the probability that the pair
    is in a tree drawn with these weights. It is differentiable again, to 1e-6 where log
    weights are within 50 of each other; beyond, second derivatives lose their digits.

    Args:
        log_weights: Log weights, ``(*batch, n, m)``; entries outside the graph's
            support are ignored.
        graph: What a mask allows; ``None`` is the complete bipartite graph. With slack
            there are weights for it, too, ``(*batch, N, M)``; the wire is part of every
            tree, and its weight is not counted.

    Returns:
        The logarithm in float64, ``(*batch,)``.

    Example:
        >>> log_spanning_trees(torch.zeros(2, 2)).exp()  # a cycle of four has 4 trees
        tensor(4.0000, dtype=torch.float64)
    """
    shape = (log_weights.shape[-2], log_weights.shape[-1])
    if graph is None:
        graph = matching_graph(graph, shape, log_weights.device)
    log_weights = log_weights.double()
    if not graph.is_full:
        log_weights = torch.where(graph.cells, log_weights, -torch.inf)
    if not falls_apart(graph):
        return _log_trees(log_weights, graph)
    # A forest is a tree in each component; that of a decided pair is its one edge.
    lead = torch.Size(torch.broadcast_shapes(log_weights.shape[:-2], graph.batch_shape))
    flat, graph = flattened(lead, graph)
    total = torch.where(decided(graph), log_weights, 0.0).sum((-2, -1)).expand(lead)
    total = total.reshape(flat)
    log_weights = log_weights.expand(*lead, *shape).reshape(*flat, *shape)
    pieces = take(log_weights, graph)
    for part, inside in zip(parts(graph), pieces, strict=True):
        total = total.index_add(1, part.element, _log_trees(inside, part.graph))
    return total.reshape(lead)


def _log_trees(log_weights: Tensor, graph: MatchingGraph) -> Tensor:
    root = graph.root[..., None, :]
    log_trees: Tensor
    log_trees, _ = _SpanningTrees.apply(log_weights, root)  # type: ignore[no-untyped-call]
    return log_trees - log_weights[..., -1, -1] if graph.has_slack else log_trees


def currents(
    log_weights: Tensor,  # (*batch, n, m), -inf where there is no edge
    flow: Tensor,  # (*batch, n, m), finite
    root: Tensor,  # (*batch, 1, m), one column per component
) -> Tensor:  # (*batch, n, m)
    r"""The current with the row and column sums of a flow, on a network of resistors.

    .. math:: y_{ij} = K_{ij} (a_i + b_j), \quad
        \textstyle\sum_j y_{ij} = \sum_j G_{ij}, \; \sum_i y_{ij} = \sum_i G_{ij}

    for weights K and a flow G, in float64. This is the part of a gradient with respect
    to ``log P`` that the potentials of a Sinkhorn scaling take up. Currents stay
    bounded where the potentials a, b overflow.
    """
    y: Tensor = _Currents.apply(log_weights, flow, root)  # type: ignore[no-untyped-call]
    return y


class _SpanningTrees(torch.autograd.Function):
    """(log T, leverages): the leverages are the gradient of the first output."""

    @staticmethod
    def forward(log_weights: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        lead = log_weights.shape[:-2]
        log_trees, leverages = Network(log_weights, root[..., 0, :]).trees()
        return log_trees.reshape(lead), leverages.reshape(log_weights.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g_trees: Tensor | None, g_leverages: Tensor | None) -> Any:
        log_weights, root, leverages = ctx.saved_tensors
        gradient = None if g_trees is None else g_trees[..., None, None] * leverages
        if g_leverages is not None:
            second = _squared_transfer(log_weights, g_leverages, root)
            second = leverages * g_leverages - second
            gradient = second if gradient is None else gradient + second
        return gradient, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _SpanningTrees.apply(*to_front(info, in_dims, arguments)), (0, 0)  # type: ignore[no-untyped-call]


class _Currents(torch.autograd.Function):
    """K * E(G), where E(G) solves the Laplacian for the row and column sums of G."""

    @staticmethod
    def forward(log_weights: Tensor, flow: Tensor, root: Tensor) -> Tensor:
        log_weights, flow = _together(log_weights, flow)
        return Network(log_weights, root[..., 0, :]).currents(flow).reshape(flow.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[2], output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        # dy = y dlogK - K E(dlogK y), and the adjoint of G -> K E(G) is response.
        log_weights, root, y = ctx.saved_tensors
        back = _Response.apply(log_weights, g, root)  # type: ignore[no-untyped-call]
        return y * (g - back), back, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _Currents.apply(*to_front(info, in_dims, arguments)), 0  # type: ignore[no-untyped-call]


class _Response(torch.autograd.Function):
    """E(K h), the change of the potentials with the scores."""

    @staticmethod
    def forward(log_weights: Tensor, change: Tensor, root: Tensor) -> Tensor:
        log_weights, change = _together(log_weights, change)
        return (
            Network(log_weights, root[..., 0, :]).response(change).reshape(change.shape)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        # dq = E(K dlogK h) - E(K dlogK q), and the adjoint of h -> E(K h) is currents.
        log_weights, change, root, q = ctx.saved_tensors
        back = _Currents.apply(log_weights, g, root)  # type: ignore[no-untyped-call]
        return back * (change - q), back, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _Response.apply(*to_front(info, in_dims, arguments)), 0  # type: ignore[no-untyped-call]


def to_front(info: Any, in_dims: Any, arguments: Any) -> list[Any]:
    """The mapped axis first, as one more batch dimension of each tensor."""
    moved = [
        x.movedim(d, 0) if d is not None else x
        for x, d in zip(arguments, in_dims, strict=True)
    ]
    rank = max(x.dim() for x in moved if isinstance(x, Tensor))
    return [
        x.expand(info.batch_size, *(1,) * (rank - 1 - x.dim()), *x.shape)
        if isinstance(x, Tensor) and d is None
        else x[(slice(None),) + (None,) * (rank - x.dim())]
        if isinstance(x, Tensor)
        else x
        for x, d in zip(moved, in_dims, strict=True)
    ]


def _together(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of one shape; is_grads_batched knows no rule for broadcast_tensors."""
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return x.expand(shape), y.expand(shape)


def _squared_transfer(
    log_weights: Tensor, g: Tensor, root: Tensor
) -> Tensor:  # (*batch, n, m)
    """Sum over edges f of g_f (transfer current between e and f)^2, differentiable.

    With x_e the difference of the two ends of e and S the inverse Laplacian this is
    K_e x_e' S [sum_f g_f K_f x_f x_f'] S x_e: the resistance of e under S L(g K) S.
    """
    n = log_weights.shape[-2]
    weights = log_weights.exp()
    laplacian = _full_laplacian(weights, root[..., 0, :])
    scale = laplacian.diagonal(dim1=-2, dim2=-1).clamp_min(1e-290).rsqrt()
    scaled = laplacian * scale[..., None, :] * scale[..., :, None]
    ridge = 1e-14 * torch.eye(scaled.shape[-1], dtype=g.dtype, device=g.device)
    factor, _ = torch.linalg.cholesky_ex(scaled + ridge)
    s = torch.cholesky_inverse(factor) * scale[..., None, :] * scale[..., :, None]
    middle = s @ _full_laplacian(weights * g, None) @ s
    d = middle.diagonal(dim1=-2, dim2=-1)
    quadratic = d[..., :n, None] + d[..., None, n:] - 2 * middle[..., :n, n:]
    return torch.where(weights > 0, weights * quadratic, 0.0)


def _full_laplacian(weights: Tensor, root: Tensor | None) -> Tensor:
    """The Laplacian over rows and columns; with ``root`` grounded at its columns."""
    rows = torch.diag_embed(weights.sum(-1))
    columns = weights.sum(-2)
    if root is not None:
        # A unit resistor to the ground changes nothing but the potentials' zero.
        columns = columns + root.to(weights.dtype)
    top = torch.cat([rows, -weights], -1)
    bottom = torch.cat([-weights.mT, torch.diag_embed(columns)], -1)
    return torch.cat([top, bottom], -2)
