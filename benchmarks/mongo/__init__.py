"""The benchmark on a MongoDB server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from benchmarks import floor, peers, processes, taskx_bench
from benchmarks.harness import QUICK, Cell, Plan
from benchmarks.mongo import trips
from benchmarks.mongo.store import OnMongo

#: Small numbers, because a small server does only a few hundred writes per second.
PLAN = Plan(
    tasks=400,
    synced=400,
    many=2_000,
    samples=60,
    sleepers=200,
    left=400,
    messages=20,
    kills=2,
)
#: Another floor, which reads and starts a task with one command.
_AT_ONCE = "find_one_and_update"
QUICK_PLAN = replace(PLAN.limited_to(100), many=400, samples=20, kills=QUICK.kills)


def cells(plan: Plan, url: str, *, with_peers: bool = True) -> list[Cell]:
    """Return all cells."""
    store, at_once = OnMongo(url), OnMongo(url, at_once=True)
    found = [
        *floor.cells_on(plan, store),
        *(floor.cell(plan, at_once, figure, _AT_ONCE) for figure in ("drain", "together")),
        *taskx_bench.throughput(plan, store),
        *taskx_bench.latency(plan, store),
        *processes.cells(plan, store),
        *trips.cells(plan, url),
        *(peers.cells_on_mongo(plan, url) if with_peers else ()),
    ]
    return [replace(cell, run=partial(_run, store, cell.run)) for cell in found]


def _run(
    store: OnMongo, run: Callable[[str], Mapping[str, float]], folder: str
) -> Mapping[str, float]:
    """Run a cell, and drop its databases."""
    try:
        return run(folder)
    finally:
        store.drop(folder)
