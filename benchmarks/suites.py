"""The cells of one run: on SQLite, or on a MongoDB server."""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from benchmarks import processes, report, taskx_bench
from benchmarks.harness import QUICK, Cell, Plan
from benchmarks.stores import OnSQLite


@dataclass(frozen=True)
class Suite:
    """The cells of a run, and facts for the document.

    Attributes:
        cells: the cells.
        store: the name and version of the store.
        versions: the versions of the packages that peers need.
        marks: the lines of the document between which the tables are.
    """

    cells: list[Cell]
    store: str
    versions: Mapping[str, str | None]
    marks: tuple[str, str]


@contextmanager
def chosen(options: argparse.Namespace) -> Iterator[Suite]:
    """Yield the suite that the options select."""
    with _on_sqlite(options) if options.mongo is None else _on_mongo(options) as suite:
        yield replace(suite, cells=[c for c in suite.cells if c.matches(options.only)])


@contextmanager
def _on_sqlite(options: argparse.Namespace) -> Iterator[Suite]:
    plan = _sized(QUICK if options.quick else Plan(), options)
    store = f"SQLite {sqlite3.sqlite_version}"
    cells = [*taskx_bench.cells(plan), *processes.cells(plan, OnSQLite("accepted"))]
    if options.against is not None:
        # Only cells that import nothing else from TaskX than its public names: an earlier tree has those.
        yield Suite(cells, store, {}, report.MARKS)
        return
    from benchmarks import bursts, floor, peers

    cells = [*floor.cells(plan), *cells, *bursts.cells(plan)]
    if not options.no_peers:
        cells += peers.cells(plan)
    yield Suite(cells, store, peers.versions(), report.MARKS)


@contextmanager
def _on_mongo(options: argparse.Namespace) -> Iterator[Suite]:
    from benchmarks import mongo, peers
    from benchmarks.mongo import server

    plan = _sized(mongo.QUICK_PLAN if options.quick else mongo.PLAN, options)
    with server.running(options.mongo) as url:
        cells = mongo.cells(plan, url, with_peers=not options.no_peers)
        versions = peers.versions(peers.on_mongo(url))
        yield Suite(cells, server.described(url), versions, report.MARKS_ON_MONGO)


def _sized(plan: Plan, options: argparse.Namespace) -> Plan:
    if options.tasks:
        plan = plan.limited_to(options.tasks)
    return replace(plan, finished=options.finished) if options.finished else plan
