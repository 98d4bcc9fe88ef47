"""The floor: TaskX's own writes to its own store, in a plain loop on one thread; and a lean floor.

The loop has no validation, no JSON, no generation of ids, no threads and no locks. It measures the time of
the store alone. Only the idle latencies use two threads, because one hands each task to the other.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import (
    DURABILITIES,
    FLOOR,
    LATENCIES,
    LEAN,
    RECORD,
    Cell,
    Plan,
    Stopwatch,
    percentile,
)
from benchmarks.stores import LeanOnSQLite, OnSQLite, Store


def _insert(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    with store.loop(folder, plan.count(store.durability)) as loop:
        with Stopwatch() as watch:
            loop.insert()
        return {"submit": watch.rate(loop.count)}


def _insert_many(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    with store.loop(folder, plan.many) as loop:
        with Stopwatch() as watch:
            loop.insert_many()
        return {"many": watch.rate(loop.count)}


def _start_and_finish(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    # TaskX drains the same number of tasks without waiting for the disk, so that the files are equal.
    with store.loop(folder, plan.count(_runs_as(store.durability))) as loop:
        loop.insert_many()
        with Stopwatch() as watch:
            loop.start_and_finish()
        return {"drain": watch.rate(loop.count)}


def _left(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    with store.loop(folder, plan.left) as loop:
        loop.insert_many()
        with Stopwatch() as watch:
            loop.start_and_finish()
        return {"left": watch.rate(loop.count)}


def _runs_as(durability: str) -> str:
    return "full" if durability == "full" else "process"


def _insert_start_finish(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    with store.loop(folder, plan.count(store.durability)) as loop:
        with Stopwatch() as watch:
            loop.insert_start_finish()
        return {"together": watch.rate(loop.count)}


def _one_at_a_time(plan: Plan, store: Store, folder: str) -> dict[str, float]:
    with store.loop(folder, plan.samples) as loop:
        begins, results = loop.one_at_a_time()
    values = (percentile(times, share) for times in (begins, results) for share in (50, 99))
    return dict(zip(LATENCIES, values, strict=True))


_THROUGHPUT = {
    "submit": _insert,
    "many": _insert_many,
    "drain": _start_and_finish,
    "together": _insert_start_finish,
}


# What is kept of a task that has ended, if it is no record.
_KEEPS = {LEAN: "status, result"}


def cells(plan: Plan) -> list[Cell]:
    """Return all cells of the floor on SQLite."""
    floors = (
        *((FLOOR, OnSQLite(durability)) for durability in DURABILITIES),
        *((LEAN, LeanOnSQLite(durability)) for durability in DURABILITIES),
    )
    return [
        *(cell(plan, store, figure, who) for figure in _THROUGHPUT for who, store in floors),
        _left_cell(plan, OnSQLite("accepted")),
        *(_latencies(plan, store, who) for who, store in floors if store.durability != "full"),
    ]


def cells_on(plan: Plan, store: Store) -> list[Cell]:
    """Return all cells of the floor on a store."""
    throughput = [cell(plan, store, figure) for figure in _THROUGHPUT]
    return [*throughput, _left_cell(plan, store), _latencies(plan, store)]


def cell(plan: Plan, store: Store, figure: str, who: str = FLOOR) -> Cell:
    """Return one cell of throughput."""
    run = partial(_THROUGHPUT[figure], plan, store)
    return Cell(who, store.durability, run, (figure,), keeps=_KEEPS.get(who, RECORD))


def _left_cell(plan: Plan, store: Store) -> Cell:
    return Cell(FLOOR, store.durability, partial(_left, plan, store), ("left",))


def _latencies(plan: Plan, store: Store, who: str = FLOOR) -> Cell:
    run = partial(_one_at_a_time, plan, store)
    return Cell(who, store.durability, run, LATENCIES, keeps=_KEEPS.get(who, RECORD))
