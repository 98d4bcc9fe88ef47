"""The floor: TaskX's own statements, on its own schema, in a bare loop of one thread.

No validation, no JSON, no ids made, no threads, no locks: what is left is what SQLite takes. Only the
idle latencies have two threads, as a task is handed from one to another.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.harness import (
    DURABILITIES,
    FLOOR,
    IDLE,
    LATENCIES,
    Cell,
    Plan,
    Stopwatch,
    percentile,
)
from taskx import Task
from taskx.core import lifecycle
from taskx.core.clock import SYSTEM_CLOCK
from taskx.core.ids import new_id
from taskx.core.lifecycle import Ending
from taskx.storage.sqlite import statements
from taskx.storage.sqlite.connections import Connections

Rows = Sequence[Sequence[Any]]


class Statements:
    """The statements of one task's life, and their values for each of many ids."""

    def __init__(self, ids: Sequence[str]) -> None:
        now = SYSTEM_CLOCK.now_ms()
        task = Task(type="noop", params={}, id="?", max_attempts=1, max_crashes=3)
        start = lifecycle.start(task, now, new_id())
        assert start is not None
        self.starting, self.starts = self._update(start, ids)
        lifecycle.mark_started(task, start)
        ending = Ending(returned=True, result="1", duration=0.00001, worker="host:1:aaaaaa/1")
        [finish] = lifecycle.conclude(task, ending, now)
        self.finishing, self.finishes = self._update(finish, ids)
        self.inserting = statements.INSERT
        self.inserting_many = statements.INSERT_OR_FAIL
        self.inserts = [
            tuple(
                lifecycle.create(
                    task_id=id_, type="noop", params="{}", created_by="", now=now
                ).row.values()
            )
            for id_ in ids
        ]
        self.selecting = statements.select_many(1)
        self.selects = [(id_,) for id_ in ids]

    @staticmethod
    def _update(update: Any, ids: Sequence[str]) -> tuple[str, Rows]:
        sql, values = statements.update((update.id,), update.guard, update.changes)
        position = list(values).index(update.id)
        before, after = tuple(values[:position]), tuple(values[position + 1 :])
        return sql, [(*before, id_, *after) for id_ in ids]


class Loop:
    """A file with TaskX's schema and a connection set up as its writer is."""

    def __init__(self, folder: str, durability: str, count: int) -> None:
        self._connections = Connections(os.path.join(folder, "floor.db"), 10.0)
        self.cursor: sqlite3.Cursor = self._connections.writer().cursor()
        self.accepting = "NORMAL" if durability == "process" else "FULL"
        self.running = "FULL" if durability == "full" else "NORMAL"
        self.count = count
        self.statements = Statements([new_id() for _ in range(count)])

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connections.close()

    def synchronous(self, level: str) -> None:
        self.cursor.execute(f"PRAGMA synchronous = {level}")

    def insert(self) -> None:
        """One task, one commit."""
        execute, sql = self.cursor.execute, self.statements.inserting
        self.synchronous(self.accepting)
        for row in self.statements.inserts:
            execute("BEGIN IMMEDIATE")
            execute(sql, row)
            execute("COMMIT")

    def insert_many(self) -> None:
        """All tasks, one commit."""
        self.synchronous(self.accepting)
        self.cursor.execute("BEGIN IMMEDIATE")
        self.cursor.executemany(self.statements.inserting_many, self.statements.inserts)
        self.cursor.execute("COMMIT")

    def start_and_finish(self) -> None:
        """One task, one commit."""
        execute, own = self.cursor.execute, self.statements
        self.synchronous(self.running)
        for select, start, finish in zip(own.selects, own.starts, own.finishes, strict=True):
            execute("BEGIN IMMEDIATE")
            execute(own.selecting, select).fetchall()
            execute(own.starting, start)
            execute(own.finishing, finish)
            execute("COMMIT")

    def insert_start_finish(self) -> None:
        """One task, two commits: what was accepted must be safe before it starts."""
        execute, own = self.cursor.execute, self.statements
        switch = self.accepting != self.running
        self.synchronous(self.accepting)
        for row, select, start, finish in zip(
            own.inserts, own.selects, own.starts, own.finishes, strict=True
        ):
            if switch:
                self.synchronous(self.accepting)
            execute("BEGIN IMMEDIATE")
            execute(own.inserting, row)
            execute("COMMIT")
            if switch:
                self.synchronous(self.running)
            execute("BEGIN IMMEDIATE")
            execute(own.selecting, select).fetchall()
            execute(own.starting, start)
            execute(own.finishing, finish)
            execute("COMMIT")

    def commit(self, level: str, sql: str, values: Sequence[Any]) -> None:
        """One statement, one commit."""
        if self.accepting != self.running:
            self.synchronous(level)
        self.cursor.execute("BEGIN IMMEDIATE")
        self.cursor.execute(sql, values)
        self.cursor.execute("COMMIT")

    def one_at_a_time(self) -> tuple[list[float], list[float]]:
        """Insert on one thread, start and finish on another, each with a commit, with pauses.

        Returns:
            microseconds from before the insert to after each start, and to when the end is seen.
        """
        begins: list[float] = []
        results: list[float] = []
        handed: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        own, submitted = self.statements, 0.0

        def work() -> None:
            while (index := handed.get()) is not None:
                self.cursor.execute(own.selecting, own.selects[index]).fetchall()
                self.commit(self.running, own.starting, own.starts[index])
                begins.append(1e6 * (time.perf_counter() - submitted))
                self.commit(self.running, own.finishing, own.finishes[index])
                ended.put(None)

        thread = threading.Thread(target=work)
        thread.start()
        self.synchronous(self.accepting)
        for index, row in enumerate(own.inserts):
            time.sleep(IDLE)
            submitted = time.perf_counter()
            self.commit(self.accepting, own.inserting, row)
            handed.put(index)
            ended.get()
            results.append(1e6 * (time.perf_counter() - submitted))
        handed.put(None)
        thread.join()
        return begins, results


def _insert(plan: Plan, durability: str, folder: str) -> dict[str, float]:
    with Loop(folder, durability, plan.count(durability)) as loop:
        with Stopwatch() as watch:
            loop.insert()
        return {"submit": watch.rate(loop.count)}


def _insert_many(plan: Plan, durability: str, folder: str) -> dict[str, float]:
    with Loop(folder, durability, plan.many) as loop:
        with Stopwatch() as watch:
            loop.insert_many()
        return {"many": watch.rate(loop.count)}


def _start_and_finish(plan: Plan, durability: str, folder: str) -> dict[str, float]:
    # What it drains without waiting for the disk, TaskX does, too: the same size of file.
    with Loop(folder, durability, plan.count(_runs_as(durability))) as loop:
        loop.insert_many()
        with Stopwatch() as watch:
            loop.start_and_finish()
        return {"drain": watch.rate(loop.count)}


def _left(plan: Plan, folder: str) -> dict[str, float]:
    with Loop(folder, "accepted", plan.left) as loop:
        loop.insert_many()
        with Stopwatch() as watch:
            loop.start_and_finish()
        return {"left": watch.rate(loop.count)}


def _runs_as(durability: str) -> str:
    return "full" if durability == "full" else "process"


def _insert_start_finish(plan: Plan, durability: str, folder: str) -> dict[str, float]:
    with Loop(folder, durability, plan.count(durability)) as loop:
        with Stopwatch() as watch:
            loop.insert_start_finish()
        return {"together": watch.rate(loop.count)}


def _one_at_a_time(plan: Plan, durability: str, folder: str) -> dict[str, float]:
    with Loop(folder, durability, plan.samples) as loop:
        begins, results = loop.one_at_a_time()
    values = (percentile(times, share) for times in (begins, results) for share in (50, 99))
    return dict(zip(LATENCIES, values, strict=True))


def cells(plan: Plan) -> list[Cell]:
    """All cells of the floor."""
    runs = {
        "submit": _insert,
        "many": _insert_many,
        "drain": _start_and_finish,
        "together": _insert_start_finish,
    }
    return [
        *(
            Cell(FLOOR, durability, partial(run, plan, durability), (figure,))
            for figure, run in runs.items()
            for durability in DURABILITIES
        ),
        Cell(FLOOR, "accepted", partial(_left, plan), ("left",)),
        *(
            Cell(FLOOR, durability, partial(_one_at_a_time, plan, durability), LATENCIES)
            for durability in ("accepted", "process")
        ),
    ]
