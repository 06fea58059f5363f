# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The exact posterior over the matchings of a few items, from all of them."""

from __future__ import annotations

__all__ = ["posterior_by_enumeration"]

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_permutations.infer.permutation_sites import innermost
from pyro_permutations.infer.posteriors import check_whole, is_enumerable, node_of
from pyro_permutations.matching import to_indices
from pyro_permutations.posterior import MatchingPosterior

# Numbers that a chunk of the matchings holds.
_CHUNK = 2**20


def posterior_by_enumeration(
    model: Callable[..., Any], site: str, *args: Any, **kwargs: Any
) -> MatchingPosterior:
    r"""Compute the exact posterior of a discrete site from all its matchings.

    .. math:: \Pr(P \mid y) = \frac{p(P, y)}{\sum_{P'} p(P', y)}

    The model is run with the site conditioned on each of up to 8! matchings: on many at
    a time, in a dimension to the left of its plates, if that agrees with four runs on
    one, and else on one by one. A site in plates has a posterior for each of their
    elements, if all else is in those plates, too, or ahead of the site: what is
    observed before a matching is drawn has the same density whatever that is.

    Args:
        model: The model. All other sites have to be observed: ``pyro.condition`` the
            model on values of them.
        site: Name of the site; its prior is discrete and of at most 8 items, such as
            ``UniformPermutation``.
        *args: Arguments of the model.
        **kwargs: Keyword arguments of the model.

    Raises:
        ValueError: If other sites are latent, if the site is relaxed, of too many items
            or in a batch that is not a plate, if sites after it are not in its plates
            or tie their elements together, if a plate is subsampled, or if no matching
            is possible.
    """
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        batch = _check(trace, site)
        d = innermost(trace.nodes[site]["fn"])
        support = d.enumerate_support()  # (k, *batch of d, n, m)
        lead = (1,) * (len(batch) - len(d.batch_shape))
        support = support.reshape(len(support), *lead, *support.shape[1:])
        support = support.expand(-1, *batch, -1, -1)

        def run(P: Tensor) -> Any:
            conditioned = poutine.condition(model, data={site: P})
            result = poutine.trace(conditioned).get_trace(*args, **kwargs)
            result.compute_log_prob()
            return result

        trace.compute_log_prob()
        try:
            log_joint = _at_once(run, site, support, batch, _depth(trace))
            right = _agrees(log_joint, run, site, support, batch)
        except Exception:  # whatever a model does that is written for one matching
            right = False
        if not right:
            log_joint = torch.stack(
                [_of_elements(run(P), site, batch) for P in support]
            )
            if not _agrees(log_joint, run, site, support, batch):
                raise ValueError(
                    f"the log joint density of an element of {site!r} changes with the "
                    "matchings of others, or from run to run. Enumerate one of them, "
                    "in a model without other randomness."
                )
    if not (log_joint.amax(0).isfinite().all()):
        raise ValueError(
            f"the log joint density has to be a number or -inf for every value of "
            f"{site!r}, and a number for one; got NaN, +inf or only -inf."
        )
    return MatchingPosterior(
        to_indices(support), support.shape[-1], weights=log_joint.softmax(0), exact=True
    )


def _check(trace: Any, site: str) -> torch.Size:
    """The batch shape of a site that can be enumerated."""
    node = node_of(trace, site, "model")
    if node["is_observed"]:
        raise ValueError(
            f"site {site!r} is observed, so that nothing is left to enumerate. Give it "
            "no obs; pairs that are known belong into the mask of its prior."
        )
    latent = [
        name
        for name, other in _scored(trace)
        if name != site and not other["is_observed"]
    ]
    if latent:
        raise ValueError(
            f"to enumerate {site!r} all other sites have to be observed, but {latent} "
            "are latent: pyro.condition(model, data=...) on values of them."
        )
    d, batch = innermost(node["fn"]), torch.Size(node["fn"].batch_shape)
    if not is_enumerable(d) or len(node["fn"].event_shape) != 2:
        raise ValueError(
            f"site {site!r} must have a discrete prior over one matching of at most 8 "
            f"items, such as UniformPermutation, got {type(d).__name__} of shape "
            f"{tuple(node['fn'].event_shape)}."
        )
    frames = {f.name: f.dim for f in node["cond_indep_stack"] if f.vectorized}
    for k, size in enumerate(reversed(batch), 1):
        if size > 1 and -k not in frames.values():
            raise ValueError(
                f"site {site!r} has batch shape {tuple(batch)}, of which dimension "
                f"{-k} is no plate; declare one, or the elements may depend on another."
            )
    ahead = True  # of P, and so without a dependence on it
    for name, other in _scored(trace):
        check_whole(name, other)
        ahead = ahead and name != site
        missing = _plates_outside(other, node)
        if missing and not ahead:
            raise ValueError(
                f"site {name!r} is outside of {sorted(missing)}, a plate of {site!r}, "
                "and may tie its elements together. If it depends on them, enumerate "
                f"one of them. If it does not, put it ahead of {site!r} in the model, "
                f"or hide it, observed: poutine.block(model, hide=[{name!r}])."
            )
    return batch


def _plates_outside(node: dict[str, Any], site: dict[str, Any]) -> set[str]:
    """Plates of several elements that the permutation is in and another site is not."""
    inside = {f.name for f in node["cond_indep_stack"]}
    plates = (f for f in site["cond_indep_stack"] if f.vectorized and f.size > 1)
    return {f.name for f in plates} - inside


def _scored(trace: Any) -> list[tuple[str, dict[str, Any]]]:
    nodes = trace.nodes.items()
    return [
        (name, node)
        for name, node in nodes
        if node["type"] == "sample" and not site_is_subsample(node)
    ]


def _depth(trace: Any) -> int:
    """Dimensions that plates or batches have taken."""
    return max(int(node["log_prob"].dim()) for _, node in _scored(trace))


def _of_elements(
    trace: Any, site: str, batch: torch.Size, depth: int | None = None
) -> Tensor:  # (*batch), or (k, *batch) where k matchings are left of the depth
    """Log joint density of each element of the batch: all else is summed."""
    terms = []
    for name, node in _scored(trace):
        x = torch.as_tensor(node["log_prob"])
        if _plates_outside(node, trace.nodes[site]):
            terms.append(x.sum())  # a constant
            continue
        lead = () if depth is None else x.shape[: max(0, x.dim() - depth)]
        inside = (1,) * (len(batch) - x.dim() + len(lead)) + x.shape[len(lead) :]
        x = x.reshape(*lead, -1, *inside[len(inside) - len(batch) :]).sum(len(lead))
        for k, size in enumerate(reversed(batch), 1):
            x = x.sum(-k, keepdim=True) if size == 1 else x
        if x.shape[len(lead) :] != batch:
            raise ValueError(
                f"site {name!r} has log probabilities of shape {tuple(inside)} in "
                f"plates of shape {tuple(batch)}: one for each element is needed."
            )
        terms.append(x)
    total: Tensor = sum(terms[1:], terms[0])
    return total


def _at_once(
    run: Callable[[Tensor], Any],
    site: str,
    support: Tensor,
    batch: torch.Size,
    depth: int,
) -> Tensor:  # (k, *batch)
    """The log joint densities with the matchings in a dimension of their own."""
    gap = (1,) * (depth - len(batch))
    parts = []
    for some in support.split(max(1, _CHUNK // support[0].numel())):
        P = some.reshape(len(some), *gap, *some.shape[1:])
        parts.append(_of_elements(run(P), site, batch, depth).expand(len(some), *batch))
    return torch.cat(parts)


def _agrees(
    log_joint: Tensor,  # (k, *batch)
    run: Callable[[Tensor], Any],
    site: str,
    support: Tensor,  # (k, *batch, n, m)
    batch: torch.Size,
) -> bool:
    """Whether single runs, with another matching in each element, say the same."""
    count, numbers = len(support), torch.arange(batch.numel())
    flat = support.reshape(count, batch.numel(), *support.shape[-2:])
    for start in (0, count // 3, 2 * count // 3, count - 1):
        chosen = (start + 101 * numbers) % count
        P = flat[chosen, numbers].reshape(support.shape[1:])
        alone = _of_elements(run(P), site, batch)
        found = log_joint.reshape(count, -1)[chosen, numbers].reshape(batch)
        close = torch.finfo(alone.dtype).eps ** 0.5
        if not torch.allclose(found, alone, close, close, equal_nan=True):
            return False
    return True
