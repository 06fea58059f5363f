# Copyright Contributors to the pyro_permutations project.
# SPDX-License-Identifier: Apache-2.0
"""Turn the connectome that ships with c302 into the two tables of worm.py.

The source is the wheel of c302 0.12.1 on PyPI (OpenWorm, MIT licence). It is read as a
zip file and need not be installed; the standard library is enough. See README.md in
this folder for what the columns mean and whom to cite.

    pip download --no-deps --dest /tmp/c302 c302==0.12.1
    python tutorials/data/make_worm_data.py /tmp/c302/c302-0.12.1-py3-none-any.whl
"""

from __future__ import annotations

import argparse
import csv
import io
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
NEUROML = "{http://www.neuroml.org/schema/neuroml2}"
Counts = Counter[tuple[str, str]]
CONNECTOME = "c302/data/NeuronConnectFormatted.xlsx"


def read_sheet(workbook: bytes) -> Iterator[tuple[str, str, str, int]]:
    """Yield (neuron 1, neuron 2, type, number) for every row below the header."""
    with zipfile.ZipFile(io.BytesIO(workbook)) as book:
        strings = ElementTree.fromstring(book.read("xl/sharedStrings.xml"))
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
    shared = ["".join(item.itertext()) for item in strings.iter(f"{SHEET}si")]
    for row in list(sheet.iter(f"{SHEET}row"))[1:]:
        values = [cell.findtext(f"{SHEET}v", "") for cell in row.iter(f"{SHEET}c")]
        first, second, kind = (shared[int(value)] for value in values[:3])
        yield first, second, kind, int(values[3])


def read_connections(wheel: zipfile.ZipFile) -> tuple[Counts, Counts]:
    """Return directed chemical synapses and undirected gap junctions, with counts.

    The table lists a chemical synapse twice, as a send (S, or Sp where it has several
    receivers) and as a receive (R, Rp): the sends are kept. It lists a gap junction
    (EJ) from both sides, and one between a neuron and itself once. NMJ rows lead to
    muscles.
    """
    chemical: Counts = Counter()
    sides: Counts = Counter()
    for first, second, kind, number in read_sheet(wheel.read(CONNECTOME)):
        if kind in ("S", "Sp"):
            chemical[first, second] += number
        elif kind == "EJ":
            sides[first, second] += number
    assert all(sides[b, a] == count for (a, b), count in sides.items())
    return chemical, Counter({(a, b): sides[a, b] for a, b in sides if a <= b})


def read_position(wheel: zipfile.ZipFile, name: str) -> float:
    """Return the long-axis coordinate y of the soma, in micrometres, head negative."""
    cell = ElementTree.fromstring(wheel.read(f"c302/NeuroML2/{name}.cell.nml"))
    soma = next(s for s in cell.iter(f"{NEUROML}segment") if s.get("id") == "0")
    assert "soma" in soma.get("name", ""), name
    return float(soma.find(f"{NEUROML}proximal").attrib["y"])


def check(chemical: Counts, gap: Counts, names: set[str]) -> None:
    """Compare with the published counts of the network (Varshney et al., 2011)."""
    loops = {pair for pair in gap if pair[0] == pair[1]}
    assert len(names) == 279
    assert len(chemical) == 2194
    assert sum(chemical.values()) == 6394
    assert len(gap) - len(loops) == 514
    assert sum(count for pair, count in gap.items() if pair not in loops) == 887
    assert loops == {(name, name) for name in ("RIBL", "RIBR", "VA8")}
    assert all(gap[loop] == 1 for loop in loops)
    pairs = {*chemical, *gap}
    assert len(pairs | {(b, a) for a, b in pairs}) == 4577


def write(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Write one table as CSV with Unix line ends."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    print(f"{path}: {len(rows)} rows")


def main(args: argparse.Namespace) -> None:
    """Read the wheel, check it, write the two tables."""
    with zipfile.ZipFile(args.wheel) as wheel:
        chemical, gap = read_connections(wheel)
        names = {name for pair in (*chemical, *gap) for name in pair}
        check(chemical, gap, names)
        y = {name: read_position(wheel, name) for name in names}
    head, tail = min(y.values()), max(y.values())
    position = {name: (y[name] - head) / (tail - head) for name in names}
    order = sorted(names, key=lambda name: (position[name], name))
    write(
        args.folder / "worm_neurons.csv",
        ("name", "position"),
        [(name, f"{position[name]:.5f}") for name in order],
    )
    write(
        args.folder / "worm_connections.csv",
        ("sender", "receiver", "kind", "count"),
        [(*pair, "chemical", chemical[pair]) for pair in sorted(chemical)]
        + [(*pair, "gap", gap[pair]) for pair in sorted(gap)],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("wheel", type=Path, help="path of the c302 wheel")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    main(parser.parse_args())
