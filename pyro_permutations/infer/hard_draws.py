# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Hard draws, as indices: of a distribution, and of a site of a guide with others."""

from __future__ import annotations

__all__ = ["guide_draws", "hard_draws", "sampled_sites"]

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_permutations.distributions import GumbelSinkhorn, RelaxedPlackettLuce
from pyro_permutations.infer.permutation_sites import innermost
from pyro_permutations.matching import matching, to_indices

# Numbers that are in memory at a time.
_CHUNK = 2**22


def hard_draws(d: Any, num_samples: int) -> Tensor:  # (num_samples, *batch, n) long
    """Draws of a distribution of matchings, or the best matchings of noisy logits."""
    draws = []
    for size in _chunks(d, num_samples):
        shape = torch.Size((size,))
        if isinstance(d, GumbelSinkhorn):
            noisy = d.base_dist._noisy_scores(shape).detach()
            draws.append(to_indices(matching(noisy, mask=d.graph)))
        elif isinstance(d, RelaxedPlackettLuce):
            draws.append(to_indices(d._hard.sample(shape)))
        elif d.support.is_discrete and len(d.event_shape) == 2:
            draws.append(to_indices(d.sample(shape)))
        else:
            raise ValueError(
                "expected GumbelSinkhorn or a distribution of permutation matrices, "
                f"got {type(d).__name__}. Soft draws P of another distribution are "
                "hard ones after matching: MatchingPosterior(to_indices(matching(P))); "
                "draws that are indices are MatchingPosterior(perm, columns)."
            )
    return torch.cat(draws)


def guide_draws(
    guide: Callable[[], Any],
    trace: Any,
    site: str,
    num_samples: int,
) -> Tensor:  # (num_samples, *batch, n) long
    """Hard draws of a site, each given draws of its own of the guide's other sites.

    The guide is run under an outermost plate of draws. Four of these are compared with
    the guide run on their values alone; where it fails or differs, as one that is
    written for one draw does, it is run for every draw instead. ``trace`` is one run.
    """
    sizes = [*_chunks(innermost(trace.nodes[site]["fn"]), num_samples)]
    # Few first: what is not written for a plate may broadcast many against many.
    few = min(4, num_samples)
    found = _tried(guide, trace, site, few)
    if found is not None and num_samples == few:
        return found
    together, draws = found is not None, []
    for size in sizes:
        found = _tried(guide, trace, site, size) if together else None
        if found is None:
            runs = (poutine.trace(guide).get_trace() for _ in range(size))
            laws = (innermost(run.nodes[site]["fn"]) for run in runs)
            found = torch.cat([hard_draws(law, 1) for law in laws])
        draws.append(found)
    return torch.cat(draws)


def sampled_sites(trace: Any) -> list[str]:
    """Names of the random sites, without the indices of subsamples."""
    return [
        name
        for name in trace.stochastic_nodes
        if not site_is_subsample(trace.nodes[name])
    ]


def _chunks(d: Any, num_samples: int) -> Iterator[int]:
    """How many draws to take at a time."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    step = max(1, _CHUNK // max(1, d.batch_shape.numel() * d.event_shape.numel()))
    return (min(step, num_samples - start) for start in range(0, num_samples, step))


def _tried(
    guide: Callable[[], Any], trace: Any, site: str, count: int
) -> Tensor | None:  # (count, *batch, n); None if the guide fails or differs
    try:
        return _at_once(guide, trace, site, count)
    except Exception:  # whatever a guide does that is written for one draw
        return None


def _at_once(
    guide: Callable[[], Any], trace: Any, site: str, count: int
) -> Tensor | None:  # (count, *batch, n); None if the guide says something else alone
    names = sampled_sites(trace)
    depth = max(len(trace.nodes[name]["fn"].batch_shape) for name in names)
    plate = pyro.plate("_draws", count, dim=-1 - depth)
    many: Any = poutine.trace(plate(guide)).get_trace()
    for k in {0, count // 3, 2 * count // 3, count - 1}:
        # What follows from other values is not given, so that it can be compared.
        given = {
            name: many.nodes[name]["value"]
            .reshape(count, *trace.nodes[name]["value"].shape)
            .select(0, k)
            for name in names
            if name == site or not _is_delta(many.nodes[name])
        }
        alone: Any = poutine.trace(poutine.condition(guide, data=given)).get_trace()
        for name in names:
            parts = (
                _said_of(run.nodes[name], whole=name == site) for run in (many, alone)
            )
            for together, single in zip(*parts, strict=True):
                if not _same(together.reshape(count, *single.shape)[k], single):
                    return None
    law = innermost(many.nodes[site]["fn"])
    batch = innermost(trace.nodes[site]["fn"]).batch_shape
    return hard_draws(law, 1).reshape(count, *batch, -1)


def _is_delta(node: dict[str, Any]) -> bool:
    return isinstance(innermost(node["fn"]), Delta)


def _said_of(node: dict[str, Any], whole: bool) -> list[Tensor]:
    """What the guide says of a site: where it is, how likely, or what its law is."""
    d = innermost(node["fn"])
    if not whole:
        return [node["value"] if _is_delta(node) else d.log_prob(node["value"])]
    parts = [d.logits]
    if hasattr(d, "graph"):
        graph = d.graph.expand(d.batch_shape)
        parts += [graph.allowed, graph.free_rows, graph.free_columns]
    return parts


def _same(found: Tensor, expected: Tensor) -> bool:
    close = 0.0
    if expected.is_floating_point():
        close = torch.finfo(expected.dtype).eps ** 0.5
    return torch.allclose(found.double(), expected.double(), close, close)
