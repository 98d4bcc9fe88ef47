"""``python -m benchmarks``: measure, and print tables."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from benchmarks import against, report, suites
from benchmarks.harness import measure
from benchmarks.suites import Suite


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these options."""
    argv = sys.argv[1:] if argv is None else argv
    options = _options(argv)
    if options.rounds is None:
        options.rounds = 7 if options.against else 2 if options.quick else 3
    if not sys.platform.startswith("linux"):
        sys.exit("the benchmark needs Linux: it reads /proc and pins threads to cores")
    logging.getLogger("taskx").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _end)
    with suites.chosen(options) as suite:
        if options.cell is not None:
            against.print_cell(suite.cells[options.cell])
            return
        if options.against is not None:
            _compare(options, argv, suite)
            return
        runs = [_measured(options, suite)]
        if options.pin:
            with _one_core():
                runs.append(_measured(options, suite))
    if options.update is not None:
        text = options.update.read_text(encoding="utf-8")
        text = report.put_between_marks(text, "\n\n".join(runs), suite.marks)
        options.update.write_text(text, encoding="utf-8")
    if any(report.FAILED in run for run in runs):
        sys.exit("a peer failed; see above")


def _end(number: int, frame: object) -> None:
    """End as after Ctrl-C: everything that was started is ended first."""
    raise KeyboardInterrupt


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: about a minute")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="only figures whose name begins with NAME, or rows of NAME; can be repeated: "
        f"{', '.join(dict.fromkeys(name.split('-')[0] for name in report.FIGURES))}; "
        "floor, TaskX, huey …",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="default 3; 2 with --quick")
    parser.add_argument("--pin", action="store_true", help="measure again on a single core")
    parser.add_argument("--rst", action="store_true", help="print as reStructuredText")
    parser.add_argument(
        "--update",
        type=Path,
        metavar="FILE",
        help="write the tables into a document such as docs/performance.rst",
    )
    parser.add_argument("--tasks", type=int, metavar="N", help="at most N tasks per cell")
    parser.add_argument(
        "--finished",
        type=int,
        metavar="N",
        help="number of finished tasks to compare with 1,000 (default 1,000,000)",
    )
    parser.add_argument("--no-peers", action="store_true", help="only floor and TaskX")
    parser.add_argument(
        "--mongo",
        nargs="?",
        const="",
        metavar="URL",
        help="measure on a MongoDB server: URL, the one in TASKX_TEST_MONGO_URL, "
        "or a small one that is started",
    )
    parser.add_argument(
        "--against",
        metavar="REF",
        help="only compare TaskX with that of an earlier commit, in turns (default 7 rounds)",
    )
    parser.add_argument("--cell", type=int, help=argparse.SUPPRESS)  # in a child of --against
    options = parser.parse_args(argv)
    if options.against is not None and (options.update or options.mongo is not None):
        parser.error("--against cannot be combined with --update or --mongo")
    if options.pin and options.mongo is not None:
        parser.error("--pin cannot be combined with --mongo: the server would use all cores")
    return options


def _measured(options: argparse.Namespace, suite: Suite) -> str:
    """Measure and print the results. Return the printed text."""
    began = time.perf_counter()
    measured = measure(suite.cells, options.rounds, progress=os.isatty(2))
    took = time.perf_counter() - began
    short = report.complaints(measured)
    rounds = f"{options.rounds} round{'s' if options.rounds > 1 else ''}"
    shown = report.as_rst if options.rst or options.update else report.as_text
    tables = (
        (report.side_by_side(measured), report.HEADER_SIDE_BY_SIDE),
        (report.rows(measured), report.HEADER),
    )
    machine = report.machine(suite.store, suite.versions)
    text = "\n\n".join(
        [
            f"{machine}; {rounds} in {took:.0f} s: medians, for rivals the best.",
            *([f"NOT MEASURED: {', '.join(short)}"] if short else []),
            *(shown(table, header) for table, header in tables if table),
        ]
    )
    print(f"\n{text}")
    return text


def _compare(options: argparse.Namespace, argv: Sequence[str], suite: Suite) -> None:
    """Print a comparison of this tree with an earlier one; with ``--pin`` only on a single core."""
    began = time.perf_counter()
    with _one_core() if options.pin else nullcontext():
        table = against.rows(options.against, argv, suite.cells, options.rounds)
        took = time.perf_counter() - began
        machine = report.machine(suite.store, {})
    print(f"\n{machine}; {options.rounds} rounds in {took:.0f} s.\n")
    shown = report.as_rst if options.rst else report.as_text
    print(shown(table, against.HEADER))


@contextmanager
def _one_core() -> Iterator[None]:
    """Make threads and children that are started in the block share one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; all started processes have been ended")
