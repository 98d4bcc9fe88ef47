"""The limits for which no node can start a task: missing slots and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import attrs

from taskx.attempt.registry import Registry
from taskx.node.pool import WorkerPool
from taskx.node.shared_limits import SharedBucket, slots_by_node, until_token
from taskx.stores.base import Repository
from taskx.stores.controls import Controls, Hold, named_limit, named_options
from taskx.stores.liveness.base import Node
from taskx.tasks import lifecycle
from taskx.tasks.clock import Clock, to_datetime, to_ms, to_text
from taskx.tasks.findings import Reason, counted, duration, listed, moment
from taskx.tasks.log import GuardedLogger
from taskx.tasks.model import Task
from taskx.tasks.options import NamedOptions
from taskx.tasks.rate import MOST_TURNS, NO_LIMIT, NOTHING, OF_TYPE, Cost, Limit, is_key

# Most tasks that are named as the holders of slots.
_NAMED = 1000


class Busy(NamedTuple):
    """A task that runs on a node, or whose thread is stuck there."""

    id: str
    type: str
    node: str
    crashes: int = 0
    max_crashes: int | None = None
    started_at: int | None = None


class Limits:
    """The limits of the live nodes, and what is left of them.

    Args:
        repository: the repository, as the caller sees it.
        clock: tells the time.
        log: the logger of the queue.
        pool: the worker pool of the queue, which knows its node's own tokens; None if it is not started.
        busy: the tasks that hold slots.
    """

    def __init__(
        self,
        repository: Repository,
        clock: Clock,
        log: GuardedLogger,
        pool: WorkerPool | None,
        busy: Sequence[Busy],
    ) -> None:
        self._repository = repository
        self._clock = clock
        self._log = log
        self._pool = pool
        self._busy = busy
        self._controls = Controls(repository)
        self._controls.refresh()

    def holds(self, task: Task, able: Sequence[Node]) -> Iterator[Reason]:
        """Yield the holds of the limits of a task."""
        names = [
            OF_TYPE + task.type,
            *(name for node in able for name in node.limited.get(task.type, ())),
        ]
        holds = self._controls.holds
        if (key := task.concurrency_key) is not None and is_key(key):
            names += [
                name for name in holds if name == key or (name[-1:] == ":" and key.startswith(name))
            ]
        for name in dict.fromkeys(names):
            if (hold := holds.get(name)) is not None and hold.until > self._clock.now_ms():
                facts = {"limit": name, "until": to_datetime(hold.until), "by": hold.by}
                yield Reason("hold", f"{_capital(held_words(name, hold))}.", facts)

    def reasons(self, task: Task, able: Sequence[Node]) -> Iterator[Reason]:
        """Yield the limits for which none of these nodes can start a task."""
        names = dict.fromkeys(name for node in able for name in node.limited.get(task.type, ()))
        for name in names:
            if all(name in node.limits_of(task.type) for node in able):
                yield from self._of(name, task.cost or NOTHING, able)

    def _of(self, name: str, cost: Cost, able: Sequence[Node]) -> Iterator[Reason]:
        holders: dict[str, None] = {}
        full: dict[str, int] = {}
        waits: dict[str, float | None] = {}
        groups = _grouped(name, able)
        for limit, nodes in groups:
            slots = self._slots(name, limit, nodes[0])
            is_full = limit.max_concurrency is not None and (
                max(len(slots), sum(self._shares(name, limit).values())) >= limit.max_concurrency
            )
            wait = self._until_token(name, limit, nodes[0], cost)
            if not is_full and wait == 0:
                return
            if is_full:
                holders.update(dict.fromkeys(slots))
                full[nodes[0].id] = len(slots)
            if wait != 0:
                waits[nodes[0].name] = wait
        limit = groups[-1][0] if groups else NO_LIMIT
        names = {node.id: node.name for node in able}
        if full:
            shares = self._shares(name, limit) or full
            by_name = {names.get(node, node): count for node, count in shares.items()}
            yield _slot(name, limit, [*holders][:_NAMED], by_name)
        if waits:
            yield _token(name, limit, cost, waits, self._clock.now_ms())

    def _slots(self, name: str, limit: Limit, node: Node) -> list[str]:
        """Return the tasks that hold the slots which a node needs."""
        everywhere = limit.scope == "global"
        types = {type for type, names in node.limited.items() if name in names}
        return [b.id for b in self._busy if b.type in types and (everywhere or b.node == node.id)]

    def _shares(self, name: str, limit: Limit) -> Mapping[str, int]:
        """Return the slots that each node keeps of those that all nodes share."""
        if limit.scope == "node" or limit.max_concurrency is None:
            return {}
        return slots_by_node(self._repository, name)

    def _until_token(self, name: str, limit: Limit, node: Node, cost: Cost) -> float | None:
        """Return the seconds until a token comes on a node; None if only that node knows."""
        if not limit.rates:
            return 0.0
        pool = self._pool
        if limit.scope == "global":
            given = limit.rates, self._clock, self._log, self._controls.held_until
            return until_token(SharedBucket(self._repository, name, *given), cost)
        if pool is not None and node.id == pool.node.id:
            return pool.admission.until_token(name, cost)
        return None


def _grouped(name: str, able: Sequence[Node]) -> list[tuple[Limit, list[Node]]]:
    """Return the nodes in groups that share one limit, each with this limit."""
    groups: dict[tuple[Limit, str], list[Node]] = {}
    for node in able:
        limit = node.limits[name]
        groups.setdefault((limit, "" if limit.scope == "global" else node.id), []).append(node)
    return [(limit, nodes) for (limit, _), nodes in groups.items()]


def _shown(name: str) -> str:
    """Return the words for a limit."""
    if name.startswith(OF_TYPE):
        return f"type {name.removeprefix(OF_TYPE)!r}"
    return f"limit {name!r}"


def held_words(name: str, hold: Hold) -> str:
    """Return until when a limit is held, and by whom."""
    who = f"task {hold.by}" if hold.by else "hand"
    return f"{_shown(name)} is held until {moment(to_datetime(hold.until))} by {who}"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _slot(name: str, limit: Limit, holders: Sequence[str], nodes: Mapping[str, int]) -> Reason:
    most = limit.max_concurrency or 0
    facts = {
        "limit": name,
        "max_concurrency": most,
        "scope": limit.scope,
        "holders": holders,
        "nodes": nodes,
    }
    if limit.scope == "global":
        where = "of all nodes together"
    else:
        where = f"on {'node' if len(nodes) == 1 else 'each of the nodes'} {listed([*nodes])}"
    if holders:
        who = f"held by {'task' if len(holders) == 1 else 'tasks'} {listed(holders)}"
    else:
        who = f"kept by {'node' if len(nodes) == 1 else 'nodes'} {listed([*nodes])}"
    slots = "The only slot" if most == 1 else f"All {counted(most, 'slot')}"
    words = f"{slots} of {_shown(name)} {where} {'is' if most == 1 else 'are'} {who}."
    return Reason("slot", words, facts)


def _token(
    name: str, limit: Limit, cost: Cost, waits: Mapping[str, float | None], now: int
) -> Reason:
    wait = min((seconds for seconds in waits.values() if seconds is not None), default=None)
    asked = [rate for rate in limit.rates if rate.share(cost)] or limit.rates
    facts = {
        "limit": name,
        "count": asked[0].count,
        "period": asked[0].seconds,
        "burst": asked[0].burst,
        "scope": limit.scope,
        "next_at": None if wait is None else to_datetime(now + round(wait * 1000)),
        "seconds": wait,
    }
    each = [
        f"{rate.count} {rate.unit}".rstrip() + f" in {duration(rate.seconds)}" for rate in asked
    ]
    rates = f"{'its rate is' if len(each) == 1 else 'its rates are'} {listed(each)}"
    if wait is None:
        words = (
            f"It may wait for a token of {_shown(name)} ({rates} on each node): only node "
            f"{listed([*waits])} knows when the next one comes."
        )
    elif cost and any(rate.unit for rate in asked):
        needs = listed([f"{number} {unit}" for unit, number in cost.items()])
        words = f"It needs {needs} of {_shown(name)}, which come in {duration(wait)} ({rates})."
    else:
        words = f"The next token of {_shown(name)} comes in {duration(wait)} ({rates})."
    return Reason("token", words, facts)


@attrs.frozen(kw_only=True)
class LimitInfo:
    """A limit with a name, as it is in effect: see :meth:`Queue.limits`.

    Attributes:
        name: its name; one that ends in a colon holds for each key that begins so.
        concurrency: most tasks that run at the same time; None for no limit.
        rates: its rates, as texts such as ``"500/m"`` or ``"90000 tokens/m"``.
        bursts: the burst of each rate.
        taken: the slots that nodes keep, most of them for running tasks; None for a limit that holds for
            each key, or on each node: there is no one number.
        free: what is left of each rate now; empty for the limit of keys.
        types: the types of tasks on live nodes that have this limit.
        tuned: the options that :meth:`Queue.tune` overrides.
        share: the weight with which each of its keys shares the workers; None if they do not share them.
        held_until: the end of its hold; None if it is not held. Limits of types, and keys, are listed only
            while they are held.
        held_by: the id of the task that was refused; empty if it is held by hand, or not at all.
    """

    name: str
    concurrency: int | None
    rates: tuple[str, ...]
    bursts: tuple[int, ...]
    taken: int | None
    free: tuple[int, ...]
    types: tuple[str, ...]
    tuned: NamedOptions = attrs.field(hash=False)
    share: int | None = None
    held_until: datetime | None = None
    held_by: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values."""
        until = None if self.held_until is None else to_text(to_ms(self.held_until))
        return {**attrs.asdict(self), "held_until": until}


def _taken(repository: Repository, name: str, limit: Limit) -> int | None:
    """Return the number of slots of a limit that are taken, or of turns, for a key."""
    if limit.scope == "node" or name.endswith(":"):
        return None
    if is_key(name):
        return len(repository.find("turn", lifecycle.turns_of(name, MOST_TURNS), ("id",)))
    return sum(slots_by_node(repository, name).values())


def limits_of(
    repository: Repository, registry: Registry, clock: Clock, log: GuardedLogger
) -> list[LimitInfo]:
    """Return the limits with names: see ``Queue.limits``."""
    controls = Controls(repository)
    controls.refresh()
    by_hand, own = controls.overrides.limits, registry.declared
    declared, now = {**own, **controls.declared}, clock.now_ms()
    holds = {name: hold for name, hold in controls.holds.items() if hold.until > now}
    types: dict[str, dict[str, None]] = {}
    of_types: dict[str, Limit] = {}
    for node in repository.nodes():
        of_types.update(node.limits if node.lives else {})
        for type, names in node.limited.items() if node.lives else ():
            for name in names:
                types.setdefault(name, {})[type] = None
    found = []
    for name in sorted({*declared, *by_hand, *holds}):
        options, hold = by_hand.get(name, {}), holds.get(name)
        limit = named_limit(declared.get(name, {}), options) or of_types.get(name, NO_LIMIT)
        given = limit.rates, clock, log, controls.held_until
        bucket, own_of_node = SharedBucket(repository, name, *given), limit.scope == "node"
        keyed = is_key(name) or own_of_node
        found.append(
            LimitInfo(
                name=name,
                concurrency=limit.max_concurrency,
                rates=tuple(str(rate) for rate in limit.rates),
                bursts=tuple(rate.burst for rate in limit.rates),
                taken=_taken(repository, name, limit),
                free=() if keyed else bucket.tokens(),
                types=tuple(sorted(types.get(name, ()))),
                tuned=named_options(options),
                share=limit.share,
                held_until=None if hold is None else to_datetime(hold.until),
                held_by="" if hold is None else hold.by,
            )
        )
    return found
