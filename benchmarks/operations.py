"""What each operation costs, in processor seconds of programs, of the server of a store and of a broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import servers
from benchmarks.capacity import NOTHING, Cost
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
#: The nodes that stand by, whose difference shows the cost of one, and the pause between paced tasks.
FEW, MANY, PACE = 1, 3, 0.025


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


@dataclass(frozen=True)
class Measured:
    """The costs of the operations on a store; ``idle`` and ``awake`` are those of a node for a second.

    A node is awake if it sees tasks of others come and go.
    """

    submit: Cost
    backlog: Cost
    single: Cost
    ticket: Cost
    idle: Cost
    awake: Cost


def cost_of(meter: Meter, count: float, away: Cost = NOTHING) -> Cost:
    """Return the cost of one of ``count`` operations, without ``away`` for each second."""
    used = meter.used
    hosts = sum(used.values()) - used["store"] - used.get("broker", 0.0)
    whole = Cost(hosts, used["store"], used.get("broker", 0.0))
    return (whole - away * meter.elapsed) * (1 / count)


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


def of_nodes(place: Place, seconds: float, *, awake: bool) -> Cost:
    """Measure a node for a second: its own time, and what one more node costs the store."""
    found = {}
    for count in (FEW, MANY):
        with place.nodes(count) as pids, queue_on(place.store, place.folder) as queue:
            queue.declare(TASK)
            with place.meter(**pids) as meter:
                for _ in range(round(seconds / PACE)):
                    if awake:
                        queue.submit(TASK)
                    time.sleep(PACE)
        found[count] = meter
    many, few = found[MANY], found[FEW]
    hosts = sum(many.used[role] for role in many.used if role.startswith("node"))
    store = many.used["store"] / many.elapsed - few.used["store"] / few.elapsed
    return Cost(hosts / many.elapsed / MANY, max(0.0, store / (MANY - FEW)))


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


def of_backlog(place: Place, tasks: int, awake: Cost) -> Cost:
    """Measure runs of a backlog, beside another node: claim, run and outcome."""
    with place.nodes(1), _two_queues(place) as (runs, submits), busy(runs) as go:
        submits.submit_many([Task(type=TASK, params={}) for _ in range(tasks)])
        with place.meter() as meter:
            go()
            runs.drain()
    return cost_of(meter, tasks, Cost(awake.hosts, 2 * awake.store))


def of_single(place: Place, tasks: int, awake: Cost) -> Cost:
    """Measure tasks that are submitted one by one, each after the result of the one before."""
    with place.nodes(1), _two_queues(place) as (queue, _), queue:
        queue.submit(TASK).result(PATIENCE)
        with place.meter() as meter:
            for _ in range(tasks):
                queue.submit(TASK).result(PATIENCE)
    return cost_of(meter, tasks, Cost(awake.hosts, 2 * awake.store))


def with_tickets(place: Place, tasks: int, processes: int) -> Meter:
    """Meter a burst of tasks that Dramatiq's workers run for tickets, with their submits."""
    url, broker = place.broker
    setup = Setup("dramatiq", False, url, place.store.name(), place.folder)
    with workers(setup, processes) as pid, made(setup) as program:
        assert program.queue is not None
        pipe = Pipe(Path(place.folder))
        with program.queue:
            burst(program, pipe, 10 * processes)
            with place.meter(workers=pid, broker=broker) as meter:
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


def measure(make: Callable[[str], Place], tasks: int, seconds: float) -> Measured:
    """Measure all operations on a store, each in a new folder."""
    submit = of_submit(make("submit"), tasks)
    idle = of_nodes(make("idle"), seconds, awake=False)
    awake = of_nodes(make("awake"), seconds, awake=True)
    backlog = of_backlog(make("backlog"), tasks, awake)
    single = of_single(make("single"), tasks // 4, awake)
    ticket = cost_of(with_tickets(make("tickets"), tasks, 1), tasks, awake * 2)
    return Measured(submit, backlog, single, ticket, idle, awake)
