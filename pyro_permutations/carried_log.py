# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""A log that travels with a doubly stochastic value, and survives its underflow."""

from __future__ import annotations

__all__ = ["carry_log", "log_of"]

import pickle
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.warnings import LostLogWarning


def carry_log(
    P: Tensor,  # (*lead, n, n)
    log_P: Tensor,  # (*lead, n, n) float64
) -> Tensor:  # (*lead, n, n), the same object as P
    """Attach the log of a value to it, for :func:`log_of` to find.

    At low temperature entries of P underflow while their logs are known exactly. The
    log stays valid while P is not changed in place. It is dropped under
    ``torch.inference_mode``, where such changes leave no trace.
    """
    if not P.is_inference():
        if log_P.stride() != P.stride():
            # Laid out as P, so that a view of P is the same view of the log.
            log_P = torch.empty_like(P, dtype=log_P.dtype).copy_(log_P)
        P._carried_log = _CarriedLog(P, log_P)  # type: ignore[attr-defined]
    return P


def log_of(
    P: Tensor,  # (*lead, n, n)
    graph: MatchingGraph | None = None,
) -> Tensor:  # (*lead, n, n) float64
    """The log of a doubly stochastic matrix: the one that it carries, if it does.

    Values from the transforms and distributions of this package carry their log, and
    so do views of them (expanded, indexed, transposed). Anything that makes a new
    tensor loses it: arithmetic, ``clone``, ``detach``, ``torch.stack``. Then this is
    ``log(P)``, exact where no entry has underflowed; zeros count as the smallest
    positive number of their type. That is finite, but can be far off, and a warning
    says so.

    Args:
        P: Shape ``(*lead, n, n)``.
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
    if lost is not None:
        _WarnIfAny.apply(lost)  # type: ignore[no-untyped-call]
    return log_P


def log_and_lost(
    P: Tensor,  # (*lead, n, n)
    graph: MatchingGraph | None,
) -> tuple[Tensor, Tensor | None]:  # (*lead, n, n) float64, and bool
    """:func:`log_of` without the warning; where it is a guess, if none is carried."""
    log_P = _carried(P)
    base = P._base
    if log_P is None and base is not None and base.dtype == P.dtype:
        whole = _carried(base)
        if whole is not None:
            offset = P.storage_offset() - base.storage_offset()
            log_P = whole.as_strided(
                P.size(), P.stride(), whole.storage_offset() + offset
            )
    if log_P is not None:
        return log_P, None
    value, zero = P.double(), P <= 0
    support = None if graph is None else graph.support.to(P.device)
    lost = zero if support is None else zero & support
    kind = torch.finfo(P.dtype)
    log_P = torch.where(zero, kind.tiny * kind.eps, value).log()
    log_P = log_P if support is None else torch.where(support, log_P, -torch.inf)
    return log_P, lost


class _CarriedLog:
    """A log, and the version of the value that it belongs to."""

    def __init__(self, P: Tensor, log_P: Tensor | None) -> None:
        self.log_P, self.version, self.owner = log_P, P._version, weakref.ref(P)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled or deep-copied along with its value, if it is still right.
        P = self.owner()
        valid = P is not None and P._version == self.version
        return _revive, (self.log_P if valid else None,)


def _revive(log_P: Tensor | None) -> _CarriedLog:
    # The value is not known here, but torch counts its rebuilding as a version.
    rebuilt = pickle.loads(pickle.dumps(torch.empty(0)))
    return _CarriedLog(rebuilt, log_P)


def _carried(P: Tensor) -> Tensor | None:
    """The attached log, unless P was changed or has to be differentiated itself."""
    carried = getattr(P, "_carried_log", None)
    if carried is None or carried.version != P._version:
        return None
    log_P: Tensor | None = carried.log_P
    return None if P.is_leaf and P.requires_grad else log_P


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
