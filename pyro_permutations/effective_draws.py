# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""How many independent draws Markov chains are worth."""

from __future__ import annotations

__all__ = ["effective_counts", "effective_draws", "frequency_error"]

import torch
from torch import Tensor

# Numbers that are in memory at a time.
_CHUNK = 2**22


def effective_draws(
    x: Tensor,  # (chains, draws, *shape)
) -> Tensor:  # (*shape)
    r"""Effective sample size of the mean of each entry, over all chains together.

    .. math:: N_\text{eff} = \frac{C S}{-1 + 2 \sum_t (\rho_{2t} + \rho_{2t+1})}

    with the sum over pairs of autocorrelations that are positive and do not rise, and
    the correlations relative to the variance within and between chains, each of which
    is split in half: chains that disagree, or drift, are worth few draws. At most C S,
    although chains that go back and forth can do better. What never changes has no
    correlations: it counts as one draw for each half of a chain.

    Args:
        x: Values, or indicators, of shape ``(chains, draws, *shape)``, with at least
            four draws.

    Raises:
        ValueError: If there are fewer draws.

    References:
        Geyer, "Practical Markov chain Monte Carlo", Statistical Science 7 (1992).
        Vehtari, Gelman, Simpson, Carpenter and Bürkner, "Rank-normalization, folding
        and localization: an improved R-hat", Bayesian Analysis 16 (2021),
        https://arxiv.org/abs/1903.08008.

    Example:
        >>> x = torch.randn(4, 1000)
        >>> effective_draws(x) > 3000, effective_draws(x.cumsum(-1)) < 50
        (tensor(True), tensor(True))
    """
    chains, draws = x.shape[:2] if x.dim() >= 2 else (0, 0)
    if chains < 1 or draws < 4:
        raise ValueError(
            "x must have shape (chains, draws, *shape) with at least four draws, got "
            f"{tuple(x.shape)}."
        )
    size = draws // 2  # the middle draw of an odd number is left out
    halves = torch.cat([x[:, :size], x[:, draws - size :]]).double()
    mean = halves.mean(1)
    covariance = _autocovariance(halves - mean[:, None]).mean(0)  # (size, *shape)
    within = covariance[0] * size / (size - 1)
    total = within * (size - 1) / size + mean.var(0)
    changes = total > 0
    rho = 1 - (within - covariance) / torch.where(changes, total, 1.0)
    rho[0] = 1.0
    pairs = rho[: size // 2 * 2].reshape(size // 2, 2, *rho.shape[1:]).sum(1)
    positive = (pairs > 0).cumprod(0)
    pairs = torch.where(positive.bool(), pairs, 0.0).cummin(0).values
    time = (2 * pairs.sum(0) - 1).clamp_min(1)
    count = 2.0 * chains
    effective = torch.where(changes, count * size / time, count)
    return effective.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())


def effective_counts(
    values: Tensor,  # (chains, draws, n) long
    places: int,
) -> Tensor:  # (n, places) float64
    """Effective sample size of how often each value is each of 0 to places - 1.

    Of what no chain changes it cannot be known. It is taken to be the smallest of those
    that do change; if there are none, two for each chain.
    """
    chains, draws, n = values.shape
    flat = values.reshape(chains * draws, n)
    cell = flat + (places + 1) * torch.arange(n, device=flat.device)
    inside = cell[(flat >= 0) & (flat < places)]
    count = torch.bincount(inside, minlength=n * (places + 1))
    count = count.reshape(n, places + 1)[:, :places]
    size = torch.full(count.shape, torch.inf, dtype=torch.float64, device=flat.device)
    row, place = ((count > 0) & (count < len(flat))).nonzero(as_tuple=True)
    step = max(1, _CHUNK // len(flat))
    for start in range(0, len(row), step):
        some = slice(start, start + step)
        hits = values[:, :, row[some]] == place[some]
        size[row[some], place[some]] = effective_draws(hits.double())
    least = size.amin()
    return torch.where(size.isinf(), least if least.isfinite() else 2.0 * chains, size)


def frequency_error(
    frequency: Tensor,
    size: Tensor | float,  # number of independent draws, inf if it is exact
) -> Tensor:
    """Standard error of a frequency among so many draws, and half a one each way.

    So what was never or always drawn has an error, too, about .7 over the number.
    """
    size = torch.as_tensor(size, dtype=frequency.dtype, device=frequency.device)
    if bool(size.isinf().all()):
        return torch.zeros_like(frequency)
    p = (frequency * size + 0.5) / (size + 1)
    return (p * (1 - p) / size).sqrt()


def _autocovariance(x: Tensor) -> Tensor:  # (chains, size, *shape), of mean zero
    """Sums of products at each lag over the size, by Fourier transform."""
    size = x.shape[1]
    spectrum = torch.fft.rfft(x, 2 * size, dim=1)
    products: Tensor = torch.fft.irfft(spectrum.abs().square(), 2 * size, dim=1)
    return products[:, :size] / size
