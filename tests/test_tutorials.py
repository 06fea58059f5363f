# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Every script in tutorials/ runs, and reports what is clearly better than chance."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


CHECKS = {"worm.py": worm}


def test_every_tutorial_is_listed() -> None:
    assert {path.name for path in TUTORIALS.glob("*.py")} == set(CHECKS)


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
