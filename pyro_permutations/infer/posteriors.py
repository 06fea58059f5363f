# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""The posterior over matchings from a distribution, from a guide and from MCMC."""

from __future__ import annotations

__all__ = [
    "posterior_from_guide",
    "posterior_from_mcmc",
    "posterior_of",
]

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.mcmc.api import StreamingMCMC
from torch.distributions import Distribution

from pyro_permutations.distributions import GumbelSinkhorn
from pyro_permutations.infer.hard_draws import guide_draws, hard_draws, sampled_sites
from pyro_permutations.infer.permutation_sites import innermost
from pyro_permutations.matching import to_indices
from pyro_permutations.matching_parts import undecided
from pyro_permutations.posterior import MatchingPosterior


def posterior_of(
    distribution: Distribution, num_samples: int = 1000
) -> MatchingPosterior:
    """Read a distribution over matchings, or a relaxed one, as a posterior.

    Of ``GumbelSinkhorn`` these are hard draws, the best matchings of its noisy logits,
    as its ``marginals`` counts them; the temperature has no say in them. They are not
    draws of the probabilities exp<X, P>. Those are what ``GibbsMatching`` gives, all of
    them and exact for up to 8 items, and draws beyond.

    Args:
        distribution: ``GumbelSinkhorn``, or a distribution of permutation matrices.
        num_samples: How many draws, where draws are needed.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> d = GumbelSinkhorn(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 0.5)
        >>> posterior_of(d, 1000)
        MatchingPosterior(1000 draws of 2 x 2)
    """
    d = innermost(distribution)
    if not isinstance(d, GumbelSinkhorn) and is_enumerable(d):
        support = d.enumerate_support()
        weights = d.log_prob(support).detach().softmax(0)
        perm, columns = to_indices(support), support.shape[-1]
        return MatchingPosterior(perm, columns, weights=weights, exact=True)
    posterior = MatchingPosterior(hard_draws(d, num_samples), d.event_shape[-1])
    if hasattr(d, "graph"):
        posterior._undecided = undecided(d.graph.expand(d.batch_shape))
    return posterior


def posterior_from_guide(
    guide: Callable[..., Any],
    site: str,
    *args: Any,
    num_samples: int = 1000,
    **kwargs: Any,
) -> MatchingPosterior:
    """Read the posterior of a site off a fitted guide, as :func:`posterior_of` does.

    It is what the guide says, and not necessarily true: after SVI on a relaxed model
    the best matching is right and the probabilities are too cautious.

    Args:
        guide: The guide. If it has other random sites, on which the logits of this one
            may depend, every draw is one given values of its own of these. Then the
            guide is run under an outermost plate of draws, as by ``Predictive`` with
            ``parallel=True``; where that fails, or differs from the guide run on four
            of the draws alone, it is run for every draw.
        site: Name of the permutation site.
        *args: Arguments of the guide.
        num_samples: How many draws, where draws are needed.
        **kwargs: Keyword arguments of the guide.

    Raises:
        ValueError: If the guide has no such site, one of another kind, or one in a
            plate that is subsampled.

    Example:
        >>> import pyro
        >>> def guide():
        ...     logits = pyro.param("logits", torch.zeros(3, 3))
        ...     pyro.sample("P", GumbelSinkhorn(logits, 0.5))
        >>> posterior_from_guide(guide, "P").marginals()[0].shape
        torch.Size([3, 4])
    """
    run_guide = partial(guide, *args, **kwargs)
    with torch.no_grad():
        trace = poutine.trace(run_guide).get_trace()
        node = node_of(trace, site, "guide")
        check_whole(site, node)
        d = innermost(node["fn"])
        if sampled_sites(trace) == [site]:
            return posterior_of(d, num_samples)
        perm = guide_draws(run_guide, trace, site, num_samples)
    return MatchingPosterior(perm, d.event_shape[-1])


def posterior_from_mcmc(mcmc: MCMC | StreamingMCMC, site: str) -> MatchingPosterior:
    """Collect the draws of a permutation site of a finished MCMC run.

    The errors of the result take account of the correlation within chains and of the
    differences between them.

    Args:
        mcmc: ``pyro.infer.MCMC``, or ``StreamingMCMC`` with :class:`MatchingDraws` as
            the statistic of the site, after ``run``.
        site: Name of the permutation site.

    Raises:
        ValueError: If the run has no such site, its values are not matchings, or there
            are fewer than four draws.
    """
    if isinstance(mcmc, StreamingMCMC):
        kept = mcmc.get_statistics()
        found = [kept.get((chain, site), {}) for chain in range(mcmc.num_chains)]
        if not all("perm" in each for each in found):
            lacking = next(each for each in found if "perm" not in each)
            raise ValueError(
                f"site {site!r} needs MatchingDraws as its statistic, statistics="
                f"StatsOfDict({{(chain, {site!r}): MatchingDraws for chain in "
                f"range({mcmc.num_chains})}}), and a run(...), but has "
                f"{sorted(lacking) or 'none'}."
            )
        perm = torch.cat([each["perm"] for each in found])
        columns = found[0]["columns"]
    elif mcmc._samples is None:
        raise ValueError("the MCMC has no samples yet: call its run(...) first.")
    else:
        samples = mcmc.get_samples(group_by_chain=True)
        if site not in samples:
            raise ValueError(f"the run has sites {sorted(samples)}, and not {site!r}.")
        perm, columns = to_indices(samples[site]), samples[site].shape[-1]
    return MatchingPosterior(perm.flatten(0, 1), columns, chains=len(perm))


def node_of(trace: Any, site: str, what: str) -> dict[str, Any]:
    """The site of a trace, or a ValueError that says which there are."""
    if site not in trace.nodes:
        found = [*trace.stochastic_nodes]
        raise ValueError(f"the {what} has no site {site!r}; it samples {found}.")
    node: dict[str, Any] = trace.nodes[site]
    return node


def check_whole(name: str, node: dict[str, Any]) -> None:
    """Raise a ValueError if a site is in a subsampled plate."""
    frames = node["cond_indep_stack"]
    if any(f.full_size is not None and f.size < f.full_size for f in frames):
        raise ValueError(
            f"site {name!r} is in a plate that is subsampled: each run is about other "
            "elements. Use a plate of all."
        )


def is_enumerable(d: Any) -> bool:
    """Whether it is a discrete distribution of few matchings."""
    support = getattr(d, "support", None)
    discrete = bool(getattr(support, "is_discrete", False))
    return discrete and len(d.event_shape) == 2 and bool(d.has_enumerate_support)
