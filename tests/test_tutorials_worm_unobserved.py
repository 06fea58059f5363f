# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""worm.py where only part of the neurons is recorded in each worm."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.nn.functional import one_hot

TUTORIAL = Path(__file__).parent.parent / "tutorials" / "worm.py"


@pytest.fixture
def worm() -> Iterator[ModuleType]:
    spec = spec_from_file_location("worm", TUTORIAL)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)  # main asks for one


@pytest.mark.parametrize("recorded", [6, 4])
def test_evidence_is_that_of_the_regressions(worm: ModuleType, recorded: int) -> None:
    """Each neuron on its recorded neighbours, in the worms that recorded it."""
    worms, n, times = 3, 6, 12
    connected = torch.rand(n, n) < 0.5
    connected = connected | connected.T | torch.eye(n, dtype=torch.bool)
    truth = torch.rand(worms, n).argsort(-1)[:, :recorded]
    Y = 3 * torch.randn(worms, times, recorded)
    data = worm.Recordings(
        past=Y[:, :-1].mT @ Y[:, :-1],
        lagged=Y[:, 1:].mT @ Y[:, :-1],
        power=Y[:, 1:].square().sum(1),
        times=times - 1,
        allowed=torch.ones(worms, recorded, n, dtype=torch.bool),
        known=torch.zeros(worms, recorded, dtype=torch.bool),
        truth=truth,
    )
    P = one_hot(truth, n).to(Y.dtype)
    variance = worm.noise_variance(data, connected)
    assert (variance == 1).all() if recorded == n else (variance > 1).all()

    y = Y @ P  # in the order of the names, zero where hidden
    expected = -torch.distributions.Normal(0.0, 1.0).log_prob(Y[:, 1:]).sum()
    for j in range(n):
        here = (truth == j).any(-1)  # the worms that say something about this row
        if here.any():
            x = worm.WEIGHT_SCALE * y[here, :-1][..., connected[j]].flatten(0, 1)
            covariance = x @ x.T + variance[j] * torch.eye(len(x))
            law = MultivariateNormal(torch.zeros(len(x)), covariance)
            expected = expected + law.log_prob(y[here, 1:, j].flatten())
    torch.testing.assert_close(worm.activity_evidence(data, connected, P), expected)


def test_each_worm_has_its_own_half_of_the_same_worms(worm: ModuleType) -> None:
    connectome = worm.load_connectome(every=4)
    torch.manual_seed(0)
    whole = worm.simulate(connectome, 3, 5, 10, times=20)
    torch.manual_seed(0)
    half = worm.simulate(connectome, 3, 5, 10, unobserved=0.5, times=20)
    r, n = half.allowed.shape[-2:]
    assert (r, n) == (35, 70)
    assert len({frozenset(names) for names in half.truth.tolist()}) == 3
    assert half.allowed.gather(-1, half.truth[..., None]).all()
    assert (half.allowed[half.known].sum(-1) == 1).all()
    for name in ("past", "lagged"):
        torch.testing.assert_close(getattr(half, name), getattr(whole, name)[:, :r, :r])
    for name in ("allowed", "known", "truth"):
        assert torch.equal(getattr(half, name), getattr(whole, name)[:, :r])


def test_names_are_found_with_half_of_the_neurons(
    worm: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = worm.load_connectome
    monkeypatch.setattr(worm, "load_connectome", lambda every: load(2 * every))
    args = Namespace(worms=4, candidates=8, known=20, unobserved=0.5, steps=30)
    args.temperature, args.seed, args.smoke = (2.0, 0.5), 0, False
    args.picture = tmp_path / "picture.png"
    worm.main(args)
    assert args.picture.stat().st_size > 0
    rows = re.findall(
        r"^(\d+)% of the neurons unobserved +(\S+) +(\S+)$",
        capsys.readouterr().out,
        flags=re.MULTILINE,
    )
    (_, whole, _), (percent, half, chance) = [map(float, row) for row in rows]
    assert percent == 50
    # Chance gives .43, and as few steps as here .7 with half of the neurons. The
    # standard error of a fraction of 240 names is .03.
    assert 0.3 < chance < 0.55
    assert whole > half > 1.4 * chance
