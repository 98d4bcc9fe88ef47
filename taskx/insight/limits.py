"""The limits for which no node can start a task: missing slots and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from taskx.node.admission import until_token
from taskx.node.moving import Services
from taskx.node.pool import WorkerPool
from taskx.node.shared_limits import SharedBucket, slots_by_node
from taskx.stores.base import Repository
from taskx.stores.liveness.base import Node
from taskx.tasks.clock import to_datetime
from taskx.tasks.findings import Reason, counted, duration, listed
from taskx.tasks.rate import Limit

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
        services: the parts of the queue.
        pool: the worker pool of the queue, which knows its node's own tokens; None if it is not started.
        busy: the tasks that hold slots.
    """

    def __init__(
        self,
        repository: Repository,
        services: Services,
        pool: WorkerPool | None,
        busy: Sequence[Busy],
    ) -> None:
        self._repository = repository
        self._services = services
        self._pool = pool
        self._busy = busy

    def reasons(self, type: str, able: Sequence[Node]) -> Iterator[Reason]:
        """Yield the limits for which none of these nodes can start a task of a type."""
        if not all(type in node.limits for node in able):
            return
        holders: dict[str, None] = {}
        full: dict[str, int] = {}
        waits: dict[str, float | None] = {}
        groups = _grouped(type, able)
        for limit, nodes in groups:
            slots = self._slots(type, limit, nodes[0])
            is_full = limit.max_concurrency is not None and (
                max(len(slots), sum(self._shares(type, limit).values())) >= limit.max_concurrency
            )
            wait = self._until_token(type, limit, nodes[0])
            if not is_full and wait == 0:
                return
            if is_full:
                holders.update(dict.fromkeys(slots))
                full[nodes[0].id] = len(slots)
            if wait != 0:
                waits[nodes[0].name] = wait
        limit = groups[-1][0] if groups else Limit(None, None, "node")
        names = {node.id: node.name for node in able}
        if full:
            shares = self._shares(type, limit) or full
            by_name = {names.get(node, node): count for node, count in shares.items()}
            yield _slot(type, limit, [*holders][:_NAMED], by_name)
        if waits:
            yield _token(type, limit, waits, self._services.clock.now_ms())

    def _slots(self, type: str, limit: Limit, node: Node) -> list[str]:
        """Return the tasks that hold the slots which a node needs."""
        everywhere = limit.scope == "global"
        return [b.id for b in self._busy if b.type == type and (everywhere or b.node == node.id)]

    def _shares(self, type: str, limit: Limit) -> Mapping[str, int]:
        """Return the slots that each node keeps of those that all nodes share."""
        if limit.scope == "node" or limit.max_concurrency is None:
            return {}
        return slots_by_node(self._repository, type)

    def _until_token(self, type: str, limit: Limit, node: Node) -> float | None:
        """Return the seconds until a token comes on a node; None if only that node knows."""
        if limit.rate is None:
            return 0.0
        services, pool = self._services, self._pool
        if limit.scope == "global":
            bucket = SharedBucket(self._repository, type, limit.rate, services.clock, services.log)
            return until_token(bucket, services.clock)
        if pool is not None and node.id == pool.node.id:
            return pool.admission.until_token(type)
        return None


def _grouped(type: str, able: Sequence[Node]) -> list[tuple[Limit, list[Node]]]:
    """Return the nodes in groups that share one limit, each with this limit."""
    groups: dict[tuple[Limit, str], list[Node]] = {}
    for node in able:
        limit = node.limits[type]
        groups.setdefault((limit, "" if limit.scope == "global" else node.id), []).append(node)
    return [(limit, nodes) for (limit, _), nodes in groups.items()]


def _slot(type: str, limit: Limit, holders: Sequence[str], nodes: Mapping[str, int]) -> Reason:
    most = limit.max_concurrency or 0
    facts = {
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
    words = f"{slots} of type {type!r} {where} {'is' if most == 1 else 'are'} {who}."
    return Reason("slot", words, facts)


def _token(type: str, limit: Limit, waits: Mapping[str, float | None], now: int) -> Reason:
    rate = limit.rate
    assert rate is not None
    wait = min((seconds for seconds in waits.values() if seconds is not None), default=None)
    facts = {
        "count": rate.count,
        "period": rate.seconds,
        "burst": rate.burst,
        "scope": limit.scope,
        "next_at": None if wait is None else to_datetime(now + round(wait * 1000)),
        "seconds": wait,
    }
    starts = f"{rate.count} in {duration(rate.seconds)}"
    if wait is None:
        words = (
            f"It may wait for a token of type {type!r} (its rate is {starts} on each node): only node "
            f"{listed([*waits])} knows when the next one comes."
        )
    else:
        words = f"The next token of type {type!r} comes in {duration(wait)} (its rate is {starts})."
    return Reason("token", words, facts)
