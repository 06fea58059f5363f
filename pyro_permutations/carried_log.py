# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A log that travels with a doubly stochastic value, and survives its underflow."""

from __future__ import annotations

__all__ = ["carry_log", "log_of", "slack_of"]

import math
import pickle
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_permutations.matching_graph import WIRE, MatchingGraph
from pyro_permutations.warnings import LostLogWarning


def carry_log(
    P: Tensor,  # (*lead, n, m)
    log_P: Tensor,  # (*lead, n, m) or (*lead, n + 1, m + 1) float64
) -> Tensor:  # (*lead, n, m)
    """Attach the log of a value to it, for :func:`log_of` to find.

    At low temperature entries of P underflow while their logs are known exactly. The
    log stays valid while P is not changed in place. It is dropped under
    ``torch.inference_mode``, where such changes leave no trace.

    A log with slack has one more row and column than the value. Then the value that
    carries it is a view of a larger one, so that views of it find their slack.

    Returns:
        P itself; with slack, a view of a copy.
    """
    slack = bool(log_P.shape[-1] > P.shape[-1])  # a tensor under torch.jit.trace
    whole = pad(P, (0, 1, 0, 1)) if slack else P
    if whole.is_inference():
        return P
    if log_P.stride() != whole.stride():
        # Laid out as P, so that a view of P is the same view of the log.
        log_P = torch.empty_like(whole, dtype=log_P.dtype).copy_(log_P)
    whole._carried_log = _CarriedLog(whole, log_P, slack)  # type: ignore[attr-defined]
    if slack:
        P = whole[..., :-1, :-1]
        P._carried_log = _CarriedLog(P, log_P, slack)  # type: ignore[attr-defined]
    return P


def log_of(
    P: Tensor,  # (*lead, n, m)
    graph: MatchingGraph | None = None,
) -> Tensor:  # (*lead, n, m) float64
    """The log of a doubly stochastic matrix: the one that it carries, if it does.

    Values from the transforms and distributions of this package carry their log, and
    so do views of them (expanded, indexed, transposed). Anything that makes a new
    tensor loses it: arithmetic, ``clone``, ``detach``, ``torch.stack``. Then this is
    ``log(P)``, exact where no entry has underflowed; zeros count as the smallest
    positive number of their type. That is finite, but can be far off, and a warning
    says so.

    Args:
        P: Shape ``(*lead, n, m)``.
        graph: What a mask allows. Zeros outside its support are right, and have the log
            ``-inf``.

    Warns:
        LostLogWarning: If an entry that may be positive is exactly zero and P carries
            no log.

    Example:
        >>> from pyro_permutations import BirkhoffTransform
        >>> P = BirkhoffTransform(0.001)(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        >>> P
        tensor([[1., 0.],
                [0., 1.]])
        >>> log_of(P)[0]
        tensor([   0., -500.], dtype=torch.float64)
    """
    log_P, lost = log_and_lost(P, graph)
    warn_if_lost(lost)
    return log_P


def warn_if_lost(lost: Tensor | None) -> None:
    """Warn where a log is a guess, also under ``torch.func`` transforms."""
    if lost is not None:
        _WarnIfAny.apply(lost)  # type: ignore[no-untyped-call]


def slack_of(
    P: Tensor,  # (*lead, n, m)
) -> tuple[Tensor, Tensor]:  # (*lead, n), (*lead, m)
    """How much of each row and of each column is unmatched: what it lacks to one.

    Relaxed values from this package carry it, exact where it is tiny; of others, hard
    ones too, it is one less the sums. Padding is unmatched.

    Example:
        >>> rows, columns = slack_of(torch.tensor([[0.9, 0.0], [0.0, 0.2]]))
        >>> rows
        tensor([0.1000, 0.8000])
    """
    if not P.is_floating_point():
        P = P.to(torch.get_default_dtype())
    found = _found(P, True)
    lacking = []
    for dim in (-1, -2):
        lack = (1 - P.sum(dim, dtype=torch.float64)).clamp_min(0)
        if found is not None:
            exact = found[..., :-1, -1] if dim == -1 else found[..., -1, :-1]
            exact = exact.exp()
            # A hard value carries the log of a relaxed one, whose slack is another.
            near = (exact - lack).abs() < 4 * torch.finfo(P.dtype).eps ** 0.5
            lack = torch.where(near, exact, lack)
        lacking.append(lack.to(P.dtype))
    return lacking[0], lacking[1]


def log_and_lost(
    P: Tensor,  # (*lead, n, m)
    graph: MatchingGraph | None,
) -> tuple[Tensor, Tensor | None]:  # (*lead, n, m) float64, and bool
    """:func:`log_of` without the warning; where it is a guess, if none is carried."""
    log_P = _found(P, False)
    if log_P is not None:
        return (
            (log_P, None) if graph is None else _where_allowed(log_P, graph.support, P)
        )
    return _guess(P.double(), None if graph is None else graph.support.to(P.device), P)


def log_with_slack(
    P: Tensor,  # (*lead, n, m)
    graph: MatchingGraph,
) -> tuple[Tensor, Tensor | None]:  # (*lead, N, M) float64, and bool
    """The same with the logs of the slack beside it, where the graph has some."""
    if not graph.has_slack:
        return log_and_lost(P, graph)
    found = _found(P, True)
    if found is not None:
        return _where_allowed(found, graph.cells, P)
    log_P, lost = log_and_lost(P, graph)
    sums = log_P.exp()
    rows, columns = graph.slack_cells()
    log_r, lost_r = _guess(1 - sums.sum(-1), rows.to(P.device), P)
    log_s, lost_s = _guess(1 - sums.sum(-2), columns.to(P.device), P)
    corner = log_P.new_full((*log_P.shape[:-2], 1, 1), WIRE)
    bottom = torch.cat([log_s[..., None, :], corner], -1)
    whole = torch.cat([torch.cat([log_P, log_r[..., None]], -1), bottom], -2)
    losses = [lost_r.any(-1), lost_s.any(-1)]
    if lost is not None:
        losses.append(lost.any(-1).any(-1))
    return whole, torch.stack(losses).any(0)


def _found(P: Tensor, slack: bool) -> Tensor | None:
    """The log that a value or its base carries; with slack or without."""
    carried = _carried(P)
    if carried is not None:
        log_P: Tensor = carried.log_P
        if slack or not carried.slack:
            return log_P if slack == carried.slack else None
        return log_P[..., :-1, :-1]
    base = P._base
    carried = None if base is None or base.dtype != P.dtype else _carried(base)
    if carried is None or base is None or (P.is_leaf and P.requires_grad):
        return None
    whole: Tensor = carried.log_P
    size = P.size()
    if slack:
        # Only of whole matrices is the slack beside them, transposed or not.
        size = torch.Size((*size[:-2], size[-2] + 1, size[-1] + 1))
        mine, theirs = (
            list(zip(s[-2:], x.stride()[-2:], strict=True))
            for s, x in ((size, P), (whole.shape, whole))
        )
        if not carried.slack or mine not in (theirs, theirs[::-1]):
            return None
    offset = whole.storage_offset() + P.storage_offset() - base.storage_offset()
    return whole.as_strided(size, P.stride(), offset)


def _where_allowed(
    log_P: Tensor, cells: Tensor, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A carried log where it is one, and a guess for zeros of a narrower mask."""
    zero = (log_P == -torch.inf) & cells.to(log_P.device)
    try:
        if not bool(zero.any()):
            return log_P, None
    except RuntimeError:  # under torch.func.vmap
        return log_P, None
    kind = torch.finfo(like.dtype)
    return log_P.masked_fill(zero, math.log(kind.tiny * kind.eps)), zero


def _guess(
    value: Tensor, support: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Log of a value, of the smallest positive number of a type where it is zero."""
    zero = value <= 0
    kind = torch.finfo(like.dtype)
    log = torch.where(zero, kind.tiny * kind.eps, value).log()
    if support is None:
        return log, zero
    return torch.where(support, log, -torch.inf), zero & support


class _CarriedLog:
    """A log, and the version of the value that it belongs to."""

    def __init__(self, P: Tensor, log_P: Tensor, slack: bool) -> None:
        self.log_P, self.slack = log_P, slack
        self.version, self.owner = P._version, weakref.ref(P)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled or deep-copied along with its value, if it is still right.
        P = self.owner()
        valid = P is not None and P._version == self.version
        return _revive, (self.log_P if valid else None, self.slack)


def _revive(log_P: Tensor | None, slack: bool) -> _CarriedLog | None:
    # The value is not known here, but torch counts its rebuilding as a version.
    if log_P is None:
        return None
    rebuilt = pickle.loads(pickle.dumps(torch.empty(0)))
    return _CarriedLog(rebuilt, log_P, slack)


def _carried(P: Tensor) -> _CarriedLog | None:
    """What is attached, unless P was changed or has to be differentiated itself."""
    carried: _CarriedLog | None = getattr(P, "_carried_log", None)
    if carried is None or carried.version != P._version:
        return None
    return None if P.is_leaf and P.requires_grad else carried


class _WarnIfAny(torch.autograd.Function):
    """Warns of lost logs; a Function, because under vmap only those see real values."""

    @staticmethod
    def forward(lost: Tensor) -> Tensor:
        if lost.any():
            # Always from this line, so that Python shows it once per process.
            warnings.warn(
                LostLogWarning(
                    "a doubly stochastic value has entries of exactly zero and no "
                    "longer carries its log, so its density is that of the smallest "
                    "positive number and can be far off. Keep the log: use the "
                    "sample itself or a view of it, not a copy (no clone, detach, "
                    "stack, arithmetic or inference_mode); or infer the contrasts "
                    "instead (TransformReparam); or work in float64; or raise the "
                    "temperature."
                ),
                stacklevel=1,
            )
        return lost.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], lost: Tensor) -> Any:
        return _WarnIfAny.apply(lost), in_dims[0]  # type: ignore[no-untyped-call]
