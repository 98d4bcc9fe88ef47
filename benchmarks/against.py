"""A comparison of this tree with an earlier one, cell by cell in turns: did a change make anything slower?

Two runs of the same code on the same machine differ by a tenth. So each cell is measured in a process of
its own, first on one tree and immediately afterwards on the other; the result is the ratio. This tree's
benchmark measures both. A figure that cannot be measured on the earlier tree is left out.
"""

from __future__ import annotations

import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

from benchmarks import children
from benchmarks.harness import TASKX, Cell, run_cell
from benchmarks.report import FIGURES, Row

HEADER = ("what", "who", "durability", "earlier", "now", "× earlier", "from … to")
#: Time limit of a cell, in seconds.
_LONGEST = 1800.0

#: Pairs of values of a figure: on the earlier tree and on this one.
Pairs = list[tuple[float, float]]


def unpack(ref: str, folder: str) -> None:
    """Put the package of a commit into a folder. Exit if git does not know the commit."""
    made = subprocess.run(
        ["git", "archive", "--format=zip", ref, "taskx"],
        cwd=children.ROOT,
        capture_output=True,
        check=False,
    )
    if made.returncode != 0:
        sys.exit(f"--against {ref}: {made.stderr.decode().strip()}")
    with zipfile.ZipFile(io.BytesIO(made.stdout)) as archive:
        archive.extractall(folder)


def rows(ref: str, argv: Sequence[str], cells: Sequence[Cell], rounds: int) -> list[Row]:
    """Measure the cells of TaskX on both trees. Return the rows of the table.

    Args:
        ref: the earlier commit.
        argv: the options that select the same cells in a child.
        cells: all cells selected by the options.
        rounds: the number of pairs to measure for each cell.
    """
    pairs: dict[tuple[str, int], Pairs] = {}
    with tempfile.TemporaryDirectory(prefix="taskx-against-") as folder:
        unpack(ref, folder)
        for number in range(rounds):
            for index, cell in enumerate(cells):
                if not cell.who.startswith(TASKX) or (cell.once and number):
                    continue
                trees = [folder, str(children.ROOT)]
                # The second tree may find warm caches, so the trees take turns in being second.
                order = trees if number % 2 else trees[::-1]
                found = {tree: _measured(tree, index, argv) for tree in order}
                for figure in cell.figures:
                    if all(figure in found[tree] for tree in trees):
                        earlier, now = (found[tree][figure] for tree in trees)
                        pairs.setdefault((figure, index), []).append((earlier, now))
    return [
        _row(figure, cells[index], pairs[figure, index])
        for figure in FIGURES
        for index in range(len(cells))
        if (figure, index) in pairs
    ]


def _measured(tree: str, index: int, argv: Sequence[str]) -> dict[str, float]:
    """Measure a cell of a tree. If it fails, print the error and return no figures."""
    try:
        printed = children.run(
            *("-m", "benchmarks", *argv, "--cell", str(index)), seconds=_LONGEST, tree=tree
        )
    except children.ChildFailed as error:
        print(f"not measured on {tree}: {error}", file=sys.stderr)
        return {}
    found: dict[str, float] = json.loads(printed)
    return found


def print_cell(cell: Cell) -> None:
    """Measure one cell, in a child, and print its figures."""
    logging.getLogger("taskx").setLevel(logging.ERROR)
    print(json.dumps(run_cell(cell)))


def _row(name: str, cell: Cell, pairs: Pairs) -> Row:
    figure = FIGURES[name]
    earlier, now = (
        figure.form.format(statistics.median(side)) for side in zip(*pairs, strict=True)
    )
    ratios = sorted(after / before for before, after in pairs if before)
    if not ratios:
        return (figure.title, cell.who, cell.durability, earlier, now, "", "")
    spread = f"{ratios[0]:.2f} … {ratios[-1]:.2f}"
    median = f"{statistics.median(ratios):.2f}"
    return (figure.title, cell.who, cell.durability, earlier, now, median, spread)
