# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: layers, never cycles; read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "pyro_permutations"

# Lowest first. A module may import every module before it in this list, but for the
# forbidden prefixes that stand beside its group.
NUMERICS = ("pyro", "torch.distributions")
NO_PYRO = ("pyro",)
NO_INFERENCE = ("pyro.infer", "pyro.poutine", "pyro.optim", "pyro.contrib")
LAYERS = [
    ("warnings", NUMERICS),
    ("outside", NUMERICS),
    ("mask_analysis", NUMERICS),
    ("matching_graph", NUMERICS),
    ("unmatched_scores", NUMERICS),
    ("matching_parts", NUMERICS),
    ("log_elimination", NUMERICS),
    ("resistor_network", NUMERICS),
    ("spanning_trees", NUMERICS),
    ("matching", NUMERICS),
    ("restore", NUMERICS),
    ("kernel_newton", NUMERICS),
    ("kernel_squaring", NUMERICS),
    ("kernel_scaling", NUMERICS),
    ("balancing_step", NUMERICS),
    ("sinkhorn_solvers", NUMERICS),
    ("sinkhorn_arguments", NUMERICS),
    ("sinkhorn", NUMERICS),
    ("shift_integral_cubature", NUMERICS),
    ("shift_integral_series", NUMERICS),
    ("shift_integral", NUMERICS),
    ("matching_blocks", NUMERICS),
    ("dual_prices", NUMERICS),
    ("subset_recursion", NUMERICS),
    ("matching_sampler", NUMERICS),
    ("matching_list", NUMERICS),
    ("perturbed_matching", NUMERICS),
    ("row_simplex", NUMERICS),
    ("fractional_solver", NUMERICS),
    ("fractional_entropy", NUMERICS),
    ("permanents", NUMERICS),
    ("effective_draws", NUMERICS),
    ("posterior_arguments", NUMERICS),
    ("birkhoff", NUMERICS),
    ("ranking_probability", NUMERICS),
    ("carried_log", NO_PYRO),
    ("constraints", NO_PYRO),
    ("contrasts_transform", NO_PYRO),
    ("transforms", NO_PYRO),
    ("harden_transform", NO_PYRO),
    ("ranking_transform", NO_PYRO),
    ("link_count", NO_PYRO),
    ("distributions", NO_INFERENCE),
    ("posterior", NUMERICS),
    ("plot", NUMERICS),
    ("metrics", NUMERICS),
    ("nn", NUMERICS),
    ("infer", ()),
]
# These stand aside: of ours they see the numerics and what is written here.
ASIDE = {
    "posterior": (),
    "plot": ("posterior",),
    "metrics": (),
    "nn": (),
}
NAMES = [name for name, _ in LAYERS]


def layer_of(path: Path) -> str:
    """The layer of a file of the package: its module, or its folder."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Dotted names that a file imports, anywhere in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out in full"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def allowed_layers(layer: str) -> set[str]:
    """Layers of ours that a module of this layer may import."""
    before = NAMES[: NAMES.index(layer)]
    if layer in ASIDE:
        before = before[: before.index("carried_log")] + list(ASIDE[layer])
    return {layer, *before}


def begins_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


SOURCES = [
    path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
    if path != ROOT / PACKAGE / "__init__.py"
]
SCRIPTS = sorted((ROOT / "tutorials").rglob("*.py")) + sorted(
    (ROOT / "benchmarks").rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_lower_layers(path):
    layer = layer_of(path)
    assert layer in NAMES, f"{path.name} has no place in the layers: give it one"
    for name in imports_of(path):
        for prefix in dict(LAYERS)[layer]:
            assert not begins_with(name, prefix), f"{path.name} imports {name}"
        if begins_with(name, PACKAGE):
            parts = name.split(".")
            assert len(parts) > 2, f"{path.name} imports the whole package"
            assert parts[1] in allowed_layers(layer), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_use_only_public_names(path):
    import pyro_permutations

    public = {f"{PACKAGE}.{name}" for name in pyro_permutations.__all__}
    for name in imports_of(path):
        if begins_with(name, PACKAGE):
            assert name in public | {PACKAGE}, f"{path.name} imports {name}"


def test_public_names_exist():
    import pyro_permutations

    for name in pyro_permutations.__all__:
        assert hasattr(pyro_permutations, name)
