# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""An ELBO with the discrete KL between a relaxed guide and a permutation prior."""

from __future__ import annotations

__all__ = ["DiscreteKL_ELBO"]

from functools import lru_cache
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Independent, TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_permutations.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_permutations.infer.guide_marginals import (
    distinct,
    guide_marginals,
    repeated,
)
from pyro_permutations.infer.permutation_sites import innermost, permutation_prior
from pyro_permutations.matching_graph import MatchingGraph
from pyro_permutations.outside import outside
from pyro_permutations.permanents import calibrated_entropy, calibrated_log_permanent
from pyro_permutations.warnings import warn


class DiscreteKL_ELBO(TraceMeanField_ELBO):  # noqa: N801  # as Pyro names them
    r"""ELBO of a model with discrete permutations and a guide with relaxed ones.

    At a site whose prior is :class:`GibbsMatching` or :class:`UniformPermutation` and
    whose guide is :class:`GumbelSinkhorn`, the divergence is that of the permutations,

    .. math:: \text{KL} = \log Z(X) - \sum_{ij} X_{ij} B_{ij} - H_g(B),

    with X the scores of the prior, B the marginals of the guide's hard draws, and both
    log Z and H the calibrated ones (:func:`calibrated_log_permanent` and
    :func:`calibrated_entropy`). Everything else is as in Pyro's TraceMeanField_ELBO.
    Probabilities of pairs, ``guide.marginals()``, then come out nearly right, where a
    relaxed prior makes them far too cautious.

    B is the mean of hard draws; its gradient is that of the relaxed matrices that they
    come from. The particles of ``vectorize_particles`` are such draws, and so are the
    elements of batches over which the parameters of the guide are expanded (plates);
    where there are fewer than ``marginal_samples``, the rest is drawn in addition. If
    the particles are all there is, the noise of the divergence and that of the
    likelihood mostly cancel near the optimum, and training takes fewer draws: set
    ``num_particles`` and ``marginal_samples`` to the same number.

    The likelihood sees what the guide samples. Of :class:`GumbelSinkhorn` those are
    relaxed values, near enough to hard ones at a temperature of .1 or less: start at .5
    and lower it to .05. Of ``GumbelSinkhornStraightThrough`` they are hard, and the
    loss is that of hard permutations at any temperature; the gradient of a likelihood
    that is not linear in P is then off, the more the higher the temperature.

    What is approximate: H is exact for two items, at permutations and at the uniform
    law; between, see :func:`calibrated_entropy`. Where most of n items are certain and
    a few are in doubt, H is too small and probabilities are too sharp, the more the
    larger n: .75 for one of two items becomes .81 among 3, .92 among 6 and .94 among 8
    (``benchmarks/discrete_kl.py``). A mask that leaves the certain pairs alone cures
    it, as H is calibrated on each part of the mask; ``InformedSwaps`` has no such
    error. The estimate of B makes the divergence
    too large by about ``(n - 1)**2 / (2 * draws)`` for a spread-out guide of n items,
    less for a sharp one, and hardly touches its gradient; the divergence is never
    negative. So the loss is a bound on the evidence up to the error of H and, with
    relaxed values, up to what the likelihood gains between permutations.

    Args:
        args: Those of ``TraceMeanField_ELBO``: ``num_particles`` and the others.
        marginal_samples: Draws from which B is estimated, at least. Each takes n x m
            numbers of memory for every law.
        kwargs: As args.

    Raises:
        ValueError: If ``marginal_samples`` is not a positive integer. While training,
            if the guide of a permutation is not :class:`GumbelSinkhorn`, has another
            shape, or allows pairs, or unmatched items, that the prior forbids.

    Warns:
        UserWarning: At the first step with gradients: if the model has no such site, so
            that this is TraceMeanField_ELBO; and if all that follows from a permutation
            is cut off from its gradient, as by ``P.argmax(-1)``, so that the KL alone
            trains the guide. A gradient of zero, as of ``P.round()``, is not noticed.

    References:
        Wainwright and Jordan, "Graphical models, exponential families, and variational
        inference" (2008), for entropies as functions of marginals. Chertkov and
        Yedidia, "Approximating the permanent with fractional belief propagation"
        (2013), for those of permutations.

    Example:
        The odds are nine to one for the first of two items to be matched to itself.

        >>> import pyro
        >>> from pyro_permutations import GumbelSinkhorn, UniformPermutation
        >>> def model(temperature):
        ...     P = pyro.sample("P", UniformPermutation(2))
        ...     pyro.factor("odds", P[..., 0, 0] * torch.tensor(9.0).log())
        >>> def guide(temperature):
        ...     logits = pyro.param("logits", torch.zeros(2, 2))
        ...     pyro.sample("P", GumbelSinkhorn(logits, temperature))
        >>> elbo = DiscreteKL_ELBO(num_particles=256, vectorize_particles=True)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        >>> for step in range(100):
        ...     loss = svi.step(0.1)
        >>> P, error = GumbelSinkhorn(pyro.param("logits"), 0.1).marginals(20_000)
        >>> print(f"{P[0, 0].item():.1f}")
        0.9
    """

    def __init__(self, *args: Any, marginal_samples: int = 256, **kwargs: Any) -> None:
        if not isinstance(marginal_samples, int) or marginal_samples < 1:
            raise ValueError(
                "marginal_samples must be an integer of at least one, got "
                f"{marginal_samples!r}. A few hundred draws give marginals to some "
                "percent."
            )
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.marginal_samples = marginal_samples
        self._is_checked = False

    def _guess_max_plate_nesting(self, model: Any, *args: Any) -> None:
        super()._guess_max_plate_nesting(_Unscored()(model), *args)  # type: ignore[no-untyped-call]

    def _get_trace(
        self, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        pair = _ScoredPair(model, guide, self.marginal_samples)
        traces: tuple[Trace, Trace] = super()._get_trace(model, pair, args, kwargs)  # type: ignore[no-untyped-call]
        if not self._is_checked and torch.is_grad_enabled():
            self._is_checked = True
            _warn_if_untrained(*traces)
        return traces


class _ScoredPair(Messenger):
    """A guide and a model, run together, with the scores of permutations in place.

    Pyro takes it for a guide that handles its model (its ``GuideMessenger``), and
    scores what is left: neither a discrete prior at relaxed values, which is an error,
    nor the density of a guide that nobody needs. For a guide and a prior of these kinds
    no divergence is registered, so the objective reads the scores.
    """

    def __init__(self, model: Any, guide: Any, marginal_samples: int) -> None:
        super().__init__()
        self.model, self.guide = model, guide
        self.marginal_samples = marginal_samples

    def __call__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        handler = poutine.unwrap(self.guide)
        if isinstance(handler, Messenger):
            self.guide(*args, **kwargs)
            self.model_trace, self.guide_trace = handler.get_traces()  # type: ignore[attr-defined]
            return
        self.guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(self.model, trace=self.guide_trace)
        self.model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)

    def get_traces(self) -> tuple[Trace, Trace]:
        """Those of the model and of the guide."""
        for name, site in _permutations(self.model_trace).items():
            _check_guide(name, site["fn"], self.guide_trace)
            self._score(site, self.guide_trace.nodes[name])
        return self.model_trace, self.guide_trace

    def _score(self, site: dict[str, Any], guide_site: dict[str, Any]) -> None:
        guide, value = guide_site["fn"], guide_site["value"]
        kl = _divergence(guide, site["fn"], value, self.marginal_samples)
        kl = scale_and_mask(kl, guide_site["scale"], guide_site["mask"])
        zero = torch.zeros_like(kl)
        site["log_prob"], site["log_prob_sum"] = -kl, -kl.sum()
        guide_site["log_prob"], guide_site["log_prob_sum"] = zero, zero.sum()
        guide_site["score_parts"] = ScoreParts(zero, 0, zero)  # type: ignore[arg-type]


class _Unscored(Messenger):
    """Discrete priors without a score, for a run of the model that is about shapes."""

    def _pyro_sample(self, msg: Any) -> None:
        if permutation_prior(msg["fn"]) is not None and not msg["is_observed"]:
            msg["fn"] = msg["fn"].mask(False)


def _permutations(model_trace: Trace) -> dict[str, dict[str, Any]]:
    """The latent sites with a discrete prior over permutations."""
    nodes: Any = model_trace.nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and permutation_prior(site["fn"]) is not None
    }


def _warn_if_untrained(model_trace: Trace, guide_trace: Trace) -> None:
    """Warn where there is no permutation, or nothing but the KL has its gradient."""
    names = _permutations(model_trace)
    if not names:
        warn(
            "DiscreteKL_ELBO found no latent site with the prior GibbsMatching or "
            "UniformPermutation, and so is TraceMeanField_ELBO. Pass it the discrete "
            "model, not relax(model, temperature)."
        )
    for name in names:
        # Of the scores, not of P: what reads the log or the slack of P depends on them.
        scores = innermost(guide_trace.nodes[name]["fn"]).base_dist.logits
        others = [
            site["log_prob_sum"]
            for other, site in model_trace.nodes.items()
            if site["type"] == "sample" and other != name
        ]
        if not others or not scores.requires_grad:
            continue
        if not _depends(sum(others), scores):
            warn(
                f"no other site of the model has a gradient to permutation '{name}', "
                "so that its guide is trained by the KL alone. Use P @ x in place of "
                "what cuts the gradient off: P.argmax(-1), to_indices(P), P.detach()."
            )


def _depends(result: Any, cause: Tensor) -> bool:
    """Whether there is a way for a gradient, without taking it.

    To take it would need the graph once more, which compiled functions do not keep.
    """
    target, seen = cause.grad_fn, set()
    found = [getattr(result, "grad_fn", None)]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        if node is target or getattr(node, "variable", None) is cause:
            return True
        seen.add(node)
        found += [following for following, _ in node.next_functions]
    return False


def _divergence(
    guide: TorchDistribution,
    prior: TorchDistribution,
    value: Tensor,  # (*batch, *event), drawn from the guide
    marginal_samples: int,
) -> Tensor:  # (*batch,)
    """The discrete KL. A mask on one side takes out its terms, as in other ELBOs."""
    q, p = innermost(guide), permutation_prior(prior)
    assert isinstance(q, GumbelSinkhorn)
    assert p is not None
    B = guide_marginals(q, value, marginal_samples)
    dims = repeated(p.graph, p.logits[..., 0, 0])
    X = distinct(p.logits, [d - 2 for d in dims]).double()
    # Both by the same approximation, on the mask of the prior: the maximum over B of
    # <X, B> + H is log Z, so that nothing is ever negative.
    cross = _log_partition(X, p.graph) - (X * B).sum((-2, -1))
    entropy = calibrated_entropy(B, mask=p.graph)
    kl = _through(prior, cross) - _through(guide, entropy)
    return kl.reshape(guide.batch_shape).to(q.logits.dtype)


def _log_partition(X: Tensor, graph: MatchingGraph) -> Tensor:
    if X.requires_grad or bool(X.any()):
        return calibrated_log_permanent(X, mask=graph)
    return _log_count(graph, str(X.device))


@lru_cache(maxsize=64)
@outside
def _log_count(graph: MatchingGraph, device: str) -> Tensor:
    """That of a uniform prior, which is the same at every step."""
    zeros = torch.zeros(graph.shape, dtype=torch.float64, device=device)
    return calibrated_log_permanent(zeros, mask=graph)


def _without_ones(fn: Any) -> tuple[Any, Any]:
    """The shape of a site but for plates of one on the left, which Pyro lets pass."""
    batch = list(fn.batch_shape)
    while batch and batch[0] == 1:
        batch.pop(0)
    return tuple(batch), fn.event_shape


def _through(fn: Any, term: Tensor) -> Tensor:
    """A term of what is inside, summed, masked and expanded as the distribution is."""
    if isinstance(fn, Independent):
        dims = fn.reinterpreted_batch_ndims
        term = sum_rightmost(_through(fn.base_dist, term), dims)
    elif isinstance(fn, MaskedDistribution):
        term = scale_and_mask(_through(fn.base_dist, term), mask=fn._mask)
    elif isinstance(fn, ExpandedDistribution):
        term = _through(fn.base_dist, term)
    return term.expand(torch.broadcast_shapes(term.shape, fn.batch_shape))


def _check_guide(name: str, prior: TorchDistribution, guide_trace: Trace) -> None:
    where = f"site '{name}' is a permutation with a discrete prior, and its guide "
    p = permutation_prior(prior)
    assert p is not None
    guide: Any = guide_trace.nodes[name]["fn"] if name in guide_trace.nodes else None
    q = innermost(guide)
    if not isinstance(q, GumbelSinkhorn):
        given = "is missing" if guide is None else f"is {type(q).__name__}"
        raise ValueError(
            f"{where}{given}. DiscreteKL_ELBO needs pyro.sample('{name}', "
            "GumbelSinkhorn(logits, temperature)) in the guide, with the mask of the "
            "prior if it has one."
        )
    shapes = [tuple(d.batch_shape + d.event_shape) for d in (guide, prior)]
    if _without_ones(guide) != _without_ones(prior):
        raise ValueError(
            f"{where}has shape {shapes[0]}, but the prior has {shapes[1]}. Put both "
            "into the same plates."
        )
    allowed = (~q.graph.support | p.graph.allowed).all()
    slack = zip(q.graph.slack_cells(), p.graph.slack_cells(), strict=True)
    if not (allowed and all(bool((~mine | theirs).all()) for mine, theirs in slack)):
        raise ValueError(
            f"{where}allows pairs or unmatched items that the prior forbids, so that "
            "the divergence is infinite. Pass mask=prior.graph to GumbelSinkhorn."
        )
