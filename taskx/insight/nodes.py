"""The nodes of a repository and what they do: the answer of ``Queue.nodes``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime

import attrs

from taskx.node.pool import WorkerPool
from taskx.node.stuck import MOST as MOST_STUCK
from taskx.stores.base import Repository
from taskx.stores.controls import options_of_limit
from taskx.stores.liveness.base import Node
from taskx.tasks.clock import to_datetime
from taskx.tasks.findings import Answer, duration
from taskx.tasks.options import LimitOptions
from taskx.tasks.rate import OF_TYPE

#: Most running tasks that are read for all nodes, and most buffered ones that are counted for a node.
MOST_RUNNING, MOST_BUFFERED = 10_000, 1_000


@attrs.frozen(kw_only=True)
class RunningTask:
    """A task that a node is running.

    Attributes:
        id: the id of the task.
        type: its type.
        since: the time at which it started.
        thread: the name of its worker thread; empty if the record does not name it, because several tasks
            were started at once.
    """

    id: str
    type: str
    since: datetime | None
    thread: str = ""


@attrs.frozen(kw_only=True)
class NodeInfo(Answer):
    """A node: one started queue in one process. See :meth:`Queue.nodes`.

    Attributes:
        id: the id of the node, unique for every start.
        name: a name for people: host, process and start.
        this: True if the queue that was asked, or another one on the same repository object, is this node.
        alive: True while its process lives, False once it is known to be dead, None if neither is known. A
            queue that looks rarely cannot know it: then an old heartbeat makes this None.
        suspected: True if it may be dead: nothing is known, or its heartbeat is late.
        stopping: True after it was asked to stop.
        host: the name of its host.
        pid: the id of its process.
        version: the version of TaskX.
        python: the version of Python.
        started_at: the time of its start.
        last_beat: the time of its last heartbeat, by its own clock; None if it needs none, because a lock
            of the system shows that it is alive.
        types: the types of tasks that it runs.
        limits: the limits of its types that have one, overridden or not, as options of :meth:`Queue.tune`.
        own_limits: the limits that its program set for the types whose limits are overridden.
        workers: the number of workers that it shall have, overridden or not.
        worker_num: the number of workers that its program configured.
        buffered: the number of pending tasks in its buffer; at most 1,000 are counted.
        buffer_size: the number of submitted tasks that fit into its buffer.
        running: the tasks that it is running, the first started first.
        engine: the name of the engine whose broker brings its tasks; empty if it fetches them itself.
        broker_error: the error of that broker, if it could not be used when it was tried last.
        stuck: the number of its threads that run on after the time-out of their tasks.
        lease: the seconds after which it is dead without a heartbeat, for those who watch it; None if it
            needs none.
    """

    id: str
    name: str
    this: bool
    alive: bool | None
    suspected: bool
    stopping: bool
    host: str
    pid: int
    version: str
    python: str
    started_at: datetime | None
    last_beat: datetime | None
    types: tuple[str, ...]
    limits: Mapping[str, LimitOptions] = attrs.field(hash=False)
    own_limits: Mapping[str, LimitOptions] = attrs.field(hash=False)
    workers: int
    worker_num: int
    buffered: int
    buffer_size: int
    running: tuple[RunningTask, ...]
    engine: str = ""
    broker_error: str = ""
    stuck: int = 0
    lease: float | None = None

    @property
    def silent(self) -> bool:
        """True if its last heartbeat is so old that nobody who looks rarely can know if it lives."""
        return self.alive is None and self.last_beat is not None

    @property
    def lives(self) -> bool:
        """True if it counts as alive: it is neither dead nor silent."""
        return self.alive is not False and not self.silent


def nodes(repository: Repository, pool: WorkerPool | None) -> list[NodeInfo]:
    """Return the nodes, and what they run; ``pool`` is the worker pool of a started queue."""
    repository.require("what its nodes do")
    found = repository.nodes()
    running, ids = _running(repository, found), [node.id for node in found]
    find = repository.find
    stuck = Counter(i for (i,) in (find("stuck_on", ids, ("stuck_on",), MOST_STUCK) if ids else ()))
    return [
        _info(repository, pool, node, running.get(node.id, ()), stuck[node.id]) for node in found
    ]


def age_of_beat(node: Node, now: int) -> float:
    """Return the seconds since the last heartbeat of a node, by the clock of this process."""
    return (now - (node.beat_at or 0)) / 1000


def silence(node: Node, now: int, lease: float) -> str:
    """Return in words why it is not known if a silent node lives.

    Args:
        node: the node.
        now: the time of this process, in milliseconds.
        lease: the length of a lease in seconds.
    """
    seconds = age_of_beat(node, now)
    when = (
        f"was {duration(seconds)} ago" if seconds >= 0 else f"is {duration(-seconds)} in the future"
    )
    return f"the last heartbeat {when}, and a lease is {duration(lease)}"


def _running(repository: Repository, nodes: Sequence[Node]) -> Mapping[str, list[RunningTask]]:
    names = {node.id: node.name for node in nodes}
    fields = ("owner", "id", "type", "started_at", "worker")
    tasks: defaultdict[str, list[RunningTask]] = defaultdict(list)
    if names:
        rows = repository.find("running_on", [*names], fields, MOST_RUNNING)
        for owner, task_id, type, since, worker in sorted(rows, key=lambda row: row[3] or 0):
            tasks[owner].append(
                RunningTask(
                    id=task_id,
                    type=type,
                    since=_moment(since),
                    thread=(worker or "").removeprefix(names[owner]).strip(),
                )
            )
    return tasks


def _info(
    repository: Repository,
    pool: WorkerPool | None,
    node: Node,
    running: Sequence[RunningTask],
    stuck: int,
) -> NodeInfo:
    about = node.about
    if pool is not None and pool.node.id == node.id:
        buffered = len(pool.buffer)
    else:
        find = repository.find
        buffered = len(find("buffered_on", [node.id], ("id",), MOST_BUFFERED))
    return NodeInfo(
        id=node.id,
        name=node.name,
        this=repository.liveness.has(node.id),
        alive=node.alive,
        suspected=node.alive is None or node.late,
        stopping=node.stopping,
        host=about.host,
        pid=about.pid,
        version=about.version,
        python=about.python,
        started_at=_moment(about.started_at),
        last_beat=_moment(node.beat_at),
        lease=None if node.beat_at is None else repository.lease_timeout,
        types=node.types,
        limits={
            name.removeprefix(OF_TYPE): options_of_limit(limit)
            for name, limit in node.limits.items()
            if name.startswith(OF_TYPE)
        },
        own_limits={type: options_of_limit(limit) for type, limit in node.own_limits.items()},
        workers=node.workers,
        worker_num=about.worker_num,
        buffered=buffered,
        buffer_size=about.buffer_size,
        running=tuple(running),
        stuck=stuck,
        engine=about.engine,
        broker_error=node.broker_error,
    )


def _moment(milliseconds: int | None) -> datetime | None:
    return to_datetime(milliseconds) if milliseconds else None
