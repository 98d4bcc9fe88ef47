"""A model of hosts, a store and a broker: the most tasks per second, the bottleneck, and the waits.

The most follows from the utilisation law and the asymptotic bounds of operational analysis (Lazowska,
Zahorjan, Graham and Sevcik, *Quantitative System Performance*, 1984, chapters 3 and 5): a resource that a
task uses for D seconds cannot do more than 1/D tasks in a second, and the first that is used up is the
bottleneck. The waits below that come from a simulation of events.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

#: What to do first, by the bottleneck.
SPLIT = {
    "hosts": "add hosts or processes",
    "store": "give some types a store of their own",
    "broker": "give some types a broker of their own",
}


@dataclass(frozen=True)
class Cost:
    """The processor seconds that something uses: of the hosts, of the store's server, and of the broker."""

    hosts: float = 0.0
    store: float = 0.0
    broker: float = 0.0

    def __iter__(self) -> Iterator[float]:
        return iter((self.hosts, self.store, self.broker))

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(self, other, strict=True)))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(factor * part for part in self))


NOTHING = Cost()


@dataclass(frozen=True)
class Operation:
    """The cost of an operation on one host that is ``alone``, and on each of several, ``beside`` others.

    While others work, each of several nodes costs ``watching`` more in a second: it polls a store that
    changes, and looks what has changed. The polls come at fixed times, however many tasks there are.
    """

    alone: Cost
    beside: Cost
    watching: Cost = NOTHING

    def at(self, hosts: int) -> Cost:
        """Return the cost if there are so many hosts."""
        return self.alone if hosts == 1 else self.beside

    def __add__(self, other: Cost) -> Operation:
        return Operation(self.alone + other, self.beside + other, self.watching)


@dataclass(frozen=True)
class Site:
    """Hosts with a store and perhaps a broker. A host has one process, which uses one core.

    Attributes:
        name: its name.
        task: the cost of one task.
        node: the cost of one idle node for a second, for its heartbeats and polls.
        store_cores: the cores that the store's server can use. The broker can use one.
    """

    name: str
    task: Operation
    node: Cost
    store_cores: float = 1.0

    def polls(self, nodes: int) -> Cost:
        """Return what so many nodes use in a second beside their tasks."""
        return (self.node if nodes == 1 else self.node + self.task.watching) * nodes

    def room(self, hosts: int) -> dict[str, float]:
        """Return the processor seconds that each resource has for tasks in a second."""
        has = Cost(hosts, self.store_cores, 1.0) - self.polls(hosts)
        return {"hosts": has.hosts, "store": has.store, "broker": has.broker}

    def demand(self, hosts: int) -> dict[str, float]:
        """Return the processor seconds that one task needs of each resource that it uses."""
        task = self.task.at(hosts)
        needs = {"hosts": task.hosts, "store": task.store, "broker": task.broker}
        return {name: seconds for name, seconds in needs.items() if seconds > 0}

    def most(self, hosts: int) -> tuple[float, str]:
        """Return the most tasks per second, and the bottleneck."""
        room = self.room(hosts)
        return min(
            (max(room[name], 0.0) / needs, name) for name, needs in self.demand(hosts).items()
        )

    def most_on(self, cores: float, processes: int, nodes: int) -> float:
        """Return the most tasks per second if all of this shares the cores of one machine.

        ``processes`` run the tasks, and ``nodes`` are alive, these included.
        """
        demand, polls = self.demand(processes), self.polls(nodes)
        room = self.room(nodes) | {"hosts": processes * (1 - polls.hosts / nodes)}
        together = (cores - sum(polls)) / sum(demand.values())
        return max(0.0, min(together, *(room[name] / demand[name] for name in demand)))

    def waits(self, hosts: int, rate: float, tasks: int) -> list[float]:
        """Simulate tasks that come at random at ``rate`` a second, and return the seconds that each takes.

        A task passes the hosts, the store and the broker, in any order, with exponential times of service
        and first come first served. The seconds are infinite if the rate is more than the most.
        """
        if rate >= self.most(hosts)[0]:
            return [math.inf] * tasks
        chance, room = random.Random(0), self.room(hosts)
        path = []
        for name, needs in self.demand(hosts).items():
            servers = max(1, math.floor(room[name]))
            path.append(([0.0] * servers, needs * servers / room[name]))
        events, now = [], 0.0
        for number in range(tasks):
            now += chance.expovariate(rate)
            events.append((now, number, 0, now))
        found = []
        while events:
            at, number, step, came = heapq.heappop(events)
            if step == len(path):
                found.append(at - came)
                continue
            free, seconds = path[step]
            ended = max(at, heapq.heappop(free)) + chance.expovariate(1 / seconds)
            heapq.heappush(free, ended)
            heapq.heappush(events, (ended, number, step + 1, came))
        return found
