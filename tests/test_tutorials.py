# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Every script in tutorials/ runs, and reports what is clearly better than chance."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_permutations import SinkhornNetwork, metrics

TUTORIALS = Path(__file__).parent.parent / "tutorials"


def worm(output: str) -> None:
    """A smoke run takes a quarter of the neurons, and names most of them."""

    def unknown(title: str) -> float:
        (row,) = re.findall(rf"^{title}.* (\S+)$", output, flags=re.MULTILINE)
        return float(row)

    # Seeds 0, 1, 2 give .87 to .93, where a random assignment gives .53. The standard
    # error of a fraction of 120 names is below .05: chance would be off by four of it.
    assert 0.45 < unknown("random feasible assignment") < 0.61
    assert unknown("noise-free") > 0.7


def trust(output: str) -> None:
    """The discrete KL is nearer to the truth than the relaxed one, swaps are there."""

    def variation(name: str) -> float:
        (number,) = re.findall(rf"^{name} +([\d.]+) ", output, flags=re.MULTILINE)
        return float(number)

    # Seeds 0 to 4: relaxed .16 to .25, discrete KL .04 to .08 in a short run; swaps
    # .004 to .021, with 340 to 750 effective draws: a probability has a standard error
    # of at most .027, and a row's total variation is about one of them, not two.
    assert variation("exact") == 0
    assert variation("relaxed SVI") > 0.1
    assert variation("discrete-KL SVI") < 0.7 * variation("relaxed SVI")
    assert variation("informed swaps") < 0.054


def ranking(output: str) -> None:
    """Discrete guides are nearer to the truth than the relaxed one."""

    def variation(name: str) -> float:
        (number,) = re.findall(rf"^{name} +([\d.]+) ", output, flags=re.MULTILINE)
        return float(number)

    # Seeds 0 to 4, short runs: relaxed .22 to .31, discrete KL .05 to .08,
    # Plackett-Luce .06 to .08.
    assert variation("exact") == 0
    assert variation("Gumbel-Sinkhorn, relaxed") > 0.15
    assert variation("Gumbel-Sinkhorn, discrete KL") < 0.15
    assert variation("Plackett-Luce") < 0.15


def jigsaw(output: str) -> None:
    """A smoke run solves most puzzles of 3 x 3 pieces, and says how many it could."""

    def numbers(title: str) -> list[float]:
        (row,) = re.findall(rf"^{title}  .*$", output, flags=re.MULTILINE)
        return [float(word) for word in row.split()[-5:]]

    # Seeds 0, 1, 2 give a tau of .76 to .78 and .13 to .14 of the pieces wrong; up to
    # identical pieces .97 to .98 and .02 to .03. By chance tau has mean 0 and variance
    # 2 (2n + 5) / 9n (n - 1), and .27 / sqrt(200) = .019 for 200 pictures of 9 pieces.
    tau, wrong, any_wrong, l1, l2 = numbers("raw")
    assert tau > 0.65
    assert wrong < 0.25
    fair_tau, fair_wrong, fair_any, *pictures = numbers("up to identical")
    assert fair_tau > 0.9
    assert fair_wrong < 0.1
    assert fair_any < any_wrong
    assert [l1, l2] == pictures  # the picture does not see which blank piece is which
    assert 0 < l2 < l1 < 0.01
    # Not even identical pieces make a scrambled picture that good.
    assert abs(numbers("as scrambled, raw")[0]) < 4 * 0.019
    scrambled = numbers("as scrambled, up to identical")
    assert scrambled[0] < fair_tau - 4 * 0.03
    assert scrambled[1] > fair_wrong + 4 * 0.03
    assert scrambled[3] > 10 * l1
    # The digits and their blank pieces are the same each time, on every machine.
    (ceiling,) = re.findall(r"^ceiling.* (\S+)$", output, flags=re.MULTILINE)
    assert abs(float(ceiling) - 0.7790) < 1e-3


CHECKS = {
    "jigsaw.py": jigsaw,
    "ranking.py": ranking,
    "trust.py": trust,
    "worm.py": worm,
}


def test_every_tutorial_is_listed() -> None:
    assert {path.name for path in TUTORIALS.glob("*.py")} == {
        *CHECKS,
        "record_linkage.py",
        "sorting.py",
    }


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_smoke_run(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    command = [sys.executable, str(TUTORIALS / name), "--smoke"]
    done = subprocess.run(
        [*command, "--picture", str(picture)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TUTORIALS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert picture.stat().st_size > 0
    CHECKS[name](done.stdout)


def test_record_linkage(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(TUTORIALS / "record_linkage.py"))
    results = script["main"](["--smoke"])
    output = capsys.readouterr().out

    # The whole posterior, and that of having no partner, on both sides.
    posterior, truth = results["posterior"], script["simulate"](14, 10, 0).truth
    assert posterior.shape == truth.shape == (24, 24)
    torch.testing.assert_close(
        posterior.sum(-1) + results["alone_a"], torch.ones(24).double()
    )
    torch.testing.assert_close(
        posterior.sum(0) + results["alone_b"], torch.ones(24).double()
    )
    # Seeds 0 to 3, 300 steps: 12 to 14 of 14 links, none wrong; independent pairs .86
    # to .89. Those without a partner have .9 or more, where a coin has .5.
    files = results["files"]
    assert files["joint"]["f1"] > 0.85
    assert files["joint"]["f1"] >= files["greedy"]["f1"]
    assert files["joint"]["f1"] >= files["independent pairs"]["f1"]
    assert results["alone_a"][~truth.any(1)].min() > 0.7
    assert re.search(r"^joint .*\d", output, flags=re.MULTILINE)

    # Greedy linking takes a1-b1; the right answer is a1-b2, a2-b1.
    small = results["small"]
    right = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    assert abs(float(small["perfect"]["probability"]) - 0.9991) < 1e-4
    for case in small.values():
        torch.testing.assert_close(case["mode"], right)
        torch.testing.assert_close(case["best"], right)
        assert case["guide"][0, 1] > 0.7  # .85 and more
    assert "greedy links a1-b1\n" in output


def test_jigsaw_scores_do_not_depend_on_the_order() -> None:
    # The tutorial trains on pieces in their true order, which must not help.
    script = runpy.run_path(str(TUTORIALS / "jigsaw.py"))
    torch.manual_seed(0)
    x = torch.rand(3, 9, 2, 4, 4)
    scores = SinkhornNetwork(script["Scores"](9, 32), item_dim=3).scores
    perm = torch.randperm(9)
    expected = scores(x)[:, perm]
    assert expected.std(1).min() > 0.01  # pieces are told apart
    torch.testing.assert_close(scores(x[:, perm]), expected)
    # Cut in rows of pieces, and glued together again.
    picture = torch.arange(36.0).reshape(1, 1, 6, 6)
    pieces = script["cut"](picture, 3)
    assert pieces[0, 1].tolist() == [[[2.0, 3.0], [8.0, 9.0]]]
    torch.testing.assert_close(script["glue"](pieces), picture)


def test_jigsaw_identical_pieces() -> None:
    script = runpy.run_path(str(TUTORIALS / "jigsaw.py"))
    looks = torch.tensor([0, 1, 0, 2, 0, 1])
    pieces = looks.double().reshape(1, 6, 1, 1, 1)
    truth = torch.tensor([[3, 0, 5, 1, 2, 4]])
    # All perfect solutions: those that give every look its own positions.
    perfect = [
        perm
        for perm in itertools.permutations(range(6))
        if all(looks[truth[0] == j] == looks[i] for i, j in enumerate(perm))
    ]
    assert len(perfect) == 12
    tau = metrics.kendall_tau(torch.tensor(perfect), truth.expand(12, 6))
    ceiling = script["ceiling"](pieces, truth)
    torch.testing.assert_close(ceiling, tau.mean()[None], check_dtype=False)
    for perm in perfect:
        fair = script["among_equals"](torch.tensor([perm]), truth, pieces)
        assert fair.tolist() == truth.tolist()
    # An error between looks stays one, for as few pieces as can be: here the first and
    # the fourth have been exchanged, and two of the same look besides.
    found = torch.tensor([[1, 0, 2, 3, 5, 4]])
    fair = script["among_equals"](found, truth, pieces)
    assert fair.tolist() == [[1, 0, 5, 3, 2, 4]]


def test_sorting(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(TUTORIALS / "sorting.py"))
    results = script["main"](["--smoke"])
    output = capsys.readouterr().out
    # Two seeds, seven ranges, 200 lists of 5 numbers each. Of random orders 119 in 120
    # are wrong, and tau is 0; a hundredth of the lists would be far from that.
    assert results["any wrong"].shape == (2, 7)
    assert results["any wrong"].max() == results["wrong"].max() == 0
    assert results["tau"].min() == 1
    assert results["l1"].max() == results["l2"].max() == 0
    assert "seeds without an error on any range: 2 of 2" in output
    assert output.count("2 of 2") == 8
    for low, high in script["RANGES"]:
        (row,) = re.findall(rf"^U\({low}, {high}\) .*$", output, flags=re.MULTILINE)
        assert row.split()[-8] == "0.000"
    # The slopes are what has been learned: sorted, so that any range is.
    slopes = script["fit"]("line", 5, seed=2).f.weight.squeeze(-1)
    assert (slopes.diff() > 0).all()
    # The other networks start; they need more steps than this to be right.
    for network in ("perceptron", "standardised"):
        model = script["fit"](network, 5, seed=0, steps=5)
        assert script["score"](model, 5, lists=10, seed=0)["tau"].shape == (7,)
