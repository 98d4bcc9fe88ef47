"""What each operation costs, in processor seconds of programs, of the server of a store and of a broker."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import servers
from benchmarks.capacity import NOTHING, Cost, Operation
from benchmarks.children import PATIENCE
from benchmarks.engine_program import Setup, made
from benchmarks.engines import Pipe, burst, workers
from benchmarks.metering import Meter
from benchmarks.peers.base import until
from benchmarks.processes import node_process
from benchmarks.stores import Store, named
from benchmarks.taskx_bench import busy, noop, noops, queue_on
from taskx import Queue, Task

#: The type of tasks that only this process runs.
TASK = "scale"
#: The numbers of other nodes whose difference shows the cost of one.
FEW, MANY = 1, 3


@dataclass(frozen=True)
class Place:
    """The servers of an experiment, and the folder of its store."""

    store: Store
    server: int
    folder: str
    broker: servers.Running

    @contextmanager
    def nodes(self, count: int) -> Iterator[dict[str, int]]:
        """Run processes with started queues, which run "noop" only. Yield their ids by role."""
        with queue_on(self.store, self.folder) as first, first:
            first.drain()  # otherwise the nodes would first make the tables or indexes
        with ExitStack() as stack:
            kids = [
                stack.enter_context(node_process(self.store, "stand-by", self.folder))
                for _ in range(count)
            ]
            for kid in kids:
                kid.hear("ready")
            yield {f"node{number}": kid.pid for number, kid in enumerate(kids)}

    def meter(self, **pids: int) -> Meter:
        """Return a meter of this process, the store's server and others."""
        return Meter(store=self.server, **pids)


#: Meters so many tasks beside processes with these ids.
Run = Callable[[Place, int, Mapping[str, int]], Meter]


@dataclass(frozen=True)
class Measured:
    """The costs on a store: of operations, and of an idle node for a second (heartbeats and polls)."""

    submit: Cost
    backlog: Operation
    single: Operation
    ticket: Cost
    idle: Cost


def median(rounds: Sequence[Measured]) -> Measured:
    """Return the medians of several rounds."""

    def middle(costs: Iterable[Cost]) -> Cost:
        return Cost(*(statistics.median(parts) for parts in zip(*costs, strict=True)))

    def operation(tasks: Sequence[Operation]) -> Operation:
        parts = ((task.alone, task.beside, task.watching) for task in tasks)
        return Operation(*map(middle, zip(*parts, strict=True)))

    return Measured(
        submit=middle(one.submit for one in rounds),
        backlog=operation([one.backlog for one in rounds]),
        single=operation([one.single for one in rounds]),
        ticket=middle(one.ticket for one in rounds),
        idle=middle(one.idle for one in rounds),
    )


def whole_cost(meter: Meter, away: Cost = NOTHING) -> Cost:
    """Return what was used while a meter ran, without ``away`` for each second."""
    used = meter.used
    hosts = sum(used.values()) - used["store"] - used.get("broker", 0.0)
    return Cost(hosts, used["store"], used.get("broker", 0.0)) - away * meter.elapsed


def cost_of(meter: Meter, tasks: int, away: Cost = NOTHING) -> Cost:
    """Return the cost of one of so many tasks, without ``away`` for each second."""
    return whole_cost(meter, away) * (1 / tasks)


# --- what an operation costs


def of_submit(place: Place, tasks: int) -> Cost:
    """Measure submits to a store on which no node is alive."""
    with queue_on(place.store, place.folder) as queue:
        queue.declare(TASK)
        queue.submit(TASK)
        with place.meter() as meter:
            for _ in range(tasks):
                queue.submit(TASK)
    return cost_of(meter, tasks)


def of_idle_nodes(place: Place, seconds: float) -> Cost:
    """Measure a node for a second: its own time, and what one more node costs the store."""
    found = {}
    for count in (FEW, MANY):
        with place.nodes(count) as pids, place.meter(**pids) as meter:
            time.sleep(seconds)
        found[count] = meter
    few, many = found[FEW], found[MANY]
    hosts = sum(many.used[role] for role in many.used if role.startswith("node"))
    store = many.used["store"] / many.elapsed - few.used["store"] / few.elapsed
    return Cost(hosts / many.elapsed / MANY, max(0.0, store / (MANY - FEW)))


def with_others(place: Place, tasks: int, idle: Cost, many: int, run: Run) -> Operation:
    """Measure tasks beside no other node, beside one, and beside ``many``, at least two.

    The last two show both unknowns: what a task costs, and what each other node costs in a second.
    """
    used, elapsed = {}, {}
    for others in (0, 1, many):
        inside = replace(place, folder=f"{place.folder}/{others}")
        os.mkdir(inside.folder)
        with inside.nodes(others) as pids:
            meter = run(inside, tasks, pids)
        used[others], elapsed[others] = whole_cost(meter, idle * (1 + others)), meter.elapsed
    watching = (used[many] - used[1]) * (1 / (many * elapsed[many] - elapsed[1]))
    watching = Cost(*(max(0.0, part) for part in watching))
    beside = (used[1] - watching * elapsed[1]) * (1 / tasks)
    return Operation(used[0] * (1 / tasks), Cost(*(max(0.0, part) for part in beside)), watching)


@contextmanager
def _two_queues(place: Place) -> Iterator[tuple[Queue, Queue]]:
    """Yield a queue that runs tasks, and one that only submits."""
    with (
        queue_on(place.store, place.folder, overflow="spill") as runs,
        queue_on(place.store, place.folder) as submits,
    ):
        runs.executor(TASK)(noop)
        submits.declare(TASK)
        yield runs, submits


def drain(place: Place, tasks: int, pids: Mapping[str, int]) -> Meter:
    """Meter runs of a backlog: claim, run and outcome."""
    with _two_queues(place) as (runs, submits), busy(runs) as go:
        submits.submit_many([Task(type=TASK, params={}) for _ in range(tasks)])
        with place.meter(**pids) as meter:
            go()
            runs.drain()
    return meter


def one_by_one(place: Place, tasks: int, pids: Mapping[str, int]) -> Meter:
    """Meter tasks that are submitted one by one, each after the result of the one before."""
    with _two_queues(place) as (queue, _), queue:
        queue.submit(TASK).result(PATIENCE)
        with place.meter(**pids) as meter:
            for _ in range(tasks):
                queue.submit(TASK).result(PATIENCE)
    return meter


def with_tickets(place: Place, tasks: int, pids: Mapping[str, int], processes: int = 1) -> Meter:
    """Meter a burst of tasks that Dramatiq's workers run for tickets, with their submits."""
    url, broker = place.broker
    setup = Setup("dramatiq", False, url, place.store.name(), place.folder)
    with workers(setup, processes) as pid, made(setup) as program:
        assert program.queue is not None
        pipe = Pipe(Path(place.folder))
        with program.queue:
            burst(program, pipe, 10 * processes)
            with place.meter(workers=pid, broker=broker, **pids) as meter:
                burst(program, pipe, tasks)
        pipe.close()
    return meter


def drain_by_two(place: Place, tasks: int) -> Meter:
    """Meter two processes that drain a backlog. They have started before they may run it."""
    with queue_on(place.store, place.folder) as queue, place.nodes(2) as pids:
        queue.pause("noop")
        queue.submit_many(noops(tasks))
        with place.meter(**pids) as meter:
            queue.resume("noop")
            until(lambda: queue.count_tasks(status="completed") >= tasks, 0.05)
    return meter


def trips(url: str, folder: str, tasks: int) -> tuple[float, float]:
    """Return the round trips of a submit, and of a run of a backlog with its polls, counted by a proxy."""
    where = urlsplit(url)
    assert where.port is not None
    asked = 0

    def judge(direction: str, piece: bytes) -> bool:
        nonlocal asked
        asked += direction == "ask"
        return True

    proxy = servers.proxy(where.port, judge)
    store = named(
        where._replace(netloc=where.netloc.replace(str(where.port), str(proxy.port))).geturl()
    )
    place = Place(store, 0, folder, ("", 0))
    with _two_queues(place) as (runs, submits):
        submits.submit(TASK)
        asked = 0
        for _ in range(tasks):
            submits.submit(TASK)
        stored = asked
        with busy(runs) as go:
            asked = 0
            go()
            runs.drain()
            ran = asked
    proxy.close()
    return stored / tasks, ran / tasks


# --- one store


def measure(
    make: Callable[[str], Place], tasks: int, backlog: int, seconds: float, others: int
) -> Measured:
    """Measure all operations on a store, each in a new folder."""
    idle = of_idle_nodes(make("idle"), seconds)
    return Measured(
        submit=of_submit(make("submit"), tasks),
        backlog=with_others(make("backlog"), backlog, idle, others, drain),
        single=with_others(make("single"), tasks // 4, idle, others, one_by_one),
        ticket=cost_of(with_tickets(make("tickets"), tasks // 2, {}), tasks // 2, idle * 2),
        idle=idle,
    )
