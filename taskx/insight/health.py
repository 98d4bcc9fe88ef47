"""The state of a queue and its repository: the answers to ``Queue.health`` and ``Queue.healthy``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import attrs

from taskx.insight.limits import held_words
from taskx.insight.nodes import age_of_beat, silence
from taskx.node.pool import WorkerPool
from taskx.node.schedules import PREFIX, Entry, entry_of
from taskx.node.stuck import MOST as MOST_STUCK
from taskx.node.stuck import stuck_types
from taskx.stores import queries
from taskx.stores.base import Repository
from taskx.stores.controls import Controls, Paused
from taskx.stores.liveness.base import Node
from taskx.tasks.checks import Duration, check_int, check_number
from taskx.tasks.clock import to_datetime, to_ms
from taskx.tasks.errors import ConfigurationError, RepositoryCorrupt, RepositoryError
from taskx.tasks.findings import Answer, Problem, counted, duration, listed, moment
from taskx.tasks.lifecycle import FAILED, NO_WORK
from taskx.tasks.model import check_key
from taskx.tasks.rate import Limit
from taskx.tasks.timing import Timing

if TYPE_CHECKING:
    from taskx.attempt.coroutines import Blocked

# Most names in the facts of a problem.
_NAMED = 100
# A hold that lasts longer than these seconds is a problem, and so are more snoozes of a task.
_LONG_HOLD, _MANY_SNOOZES = 60.0, 1000
# Seconds for which a transaction may keep a database from cleaning up.
_LONG_TRANSACTION = 600.0


@attrs.frozen
class Health(Answer):
    """The answer of :meth:`Queue.health`. It is true if nothing is wrong; ``str()`` says what is wrong.

    Attributes:
        problems: everything that is wrong, the most serious first.
        checked_at: the time of the check.
    """

    problems: tuple[Problem, ...]
    checked_at: datetime

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return " ".join(map(str, self.problems)) or "All is well."

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values; times are ISO text."""
        return {"ok": self.ok, **Answer.to_dict(self)}


@attrs.frozen(kw_only=True)
class Thresholds:
    """The thresholds of a check, in the units of the repository; None: not checked.

    Attributes:
        oldest_due: milliseconds.
        failed: a number of tasks, and milliseconds.
        nodes: live nodes, for all types together and for each type that has tasks to run.
        nodes_of: live nodes for types that need another number.
        stuck: threads on one node.
        file_size: bytes.
        schedule_overdue: milliseconds.
    """

    oldest_due: int | None
    failed: tuple[int, int] | None
    nodes: int
    nodes_of: Mapping[str, int]
    stuck: int
    file_size: int | None
    schedule_overdue: int | None


def thresholds(
    *,
    oldest_due: Duration | None,
    failed: tuple[int, Duration] | None,
    nodes: int | Mapping[str, int],
    stuck: int,
    file_size: int | None,
    schedule_overdue: Duration | None,
) -> Thresholds:
    """Return the arguments of ``Queue.health`` as thresholds.

    Raises:
        ConfigurationError: an argument is not valid.
    """
    if failed is not None and not (isinstance(failed, tuple) and len(failed) == 2):
        raise ConfigurationError(
            f"failed must be a pair (count, seconds), such as (10, 300), not {failed!r}"
        )
    of_types = nodes if isinstance(nodes, Mapping) else {}
    return Thresholds(
        oldest_due=_optional_ms(oldest_due, "oldest_due"),
        failed=failed
        and (check_int(failed[0], "the count of failed", 0), _ms(failed[1], "the time of failed")),
        nodes=1 if isinstance(nodes, Mapping) else check_int(nodes, "nodes", 0),
        nodes_of={
            check_key(type, "a type in nodes"): check_int(count, f"nodes of {type!r}", 0)
            for type, count in of_types.items()
        },
        stuck=check_int(stuck, "stuck", 0),
        file_size=None if file_size is None else check_int(file_size, "file_size", 0, 1 << 62),
        schedule_overdue=_optional_ms(schedule_overdue, "schedule_overdue"),
    )


def _ms(value: Duration, what: str) -> int:
    return round(check_number(value, what) * 1000)


def _optional_ms(value: Duration | None, what: str) -> int | None:
    return None if value is None else _ms(value, what)


def own_problems(repository: Repository, pool: WorkerPool | None, stuck: int) -> Iterator[Problem]:
    """Yield the problems that this queue knows of without asking the repository.

    Args:
        repository: the repository of the queue.
        pool: the worker pool of the queue; None if it is not started.
        stuck: the number of threads that may be stuck.
    """
    try:
        repository.house.ensure_there()
    except RepositoryError as error:
        yield _away(error)
    if pool is None:
        return
    if (number := len(pool.stuck.runs)) > stuck:
        yield _stuck(pool.node.id, pool.node.name, number, stuck)
    if (loop := pool.runner.loop) is not None and (blocked := loop.blocked()) is not None:
        yield _blocked_loop(pool.node.id, pool.node.name, blocked)


def check(
    repository: Repository,
    controls: Controls,
    timing: Timing,
    pool: WorkerPool | None,
    wanted: Thresholds,
    now: int,
) -> Health:
    """Compare the queue with thresholds, and return the problems: see ``Queue.health``."""
    problems = [*own_problems(repository, pool, wanted.stuck)]
    checking = _Check(repository, controls, timing, pool, wanted, now)
    if not any(problem.kind == "repository" for problem in problems):
        try:
            with repository.house.within(timing.answer_within):
                problems.extend(checking.problems())
        except RepositoryError as error:
            problems.insert(0, _away(error))
    return Health(tuple(problems), to_datetime(checking.now))


def _away(error: RepositoryError) -> Problem:
    facts = {"error": str(error), "error_type": type(error).__name__}
    return Problem("repository", f"The repository cannot be used: {error}.", facts)


def _stuck(node: str, name: str, number: int, most: int) -> Problem:
    words = (
        f"On node {name}, {counted(number, 'thread')} of timed-out tasks run on, more than {most}."
    )
    return Problem("stuck", words, {"node": node, "name": name, "threads": number, "most": most})


def _blocked_loop(node: str, name: str, blocked: Blocked) -> Problem:
    by = f"task {blocked.by}" if blocked.by else "a coroutine"
    seconds = duration(round(blocked.seconds))
    words = f"On node {name}, {by} blocks the event loop for {seconds}: no other coroutine goes on."
    facts = {"node": node, "name": name, "seconds": blocked.seconds, "stack": blocked.stack}
    return Problem("blocked_loop", words, {**facts, "task_id": blocked.task_id or None})


def _brokers(nodes: Sequence[Node]) -> Iterator[Problem]:
    for node in nodes:
        if node.broker_error:
            facts = {"node": node.id, "name": node.name, "error": node.broker_error}
            words = f"Node {node.name} cannot use the broker of {node.about.engine}: {node.broker_error}."
            yield Problem("broker", words, facts)


def _limits(nodes: Sequence[Node]) -> Iterator[Problem]:
    """Yield a problem for each limit that programs declare differently, or that none declares."""
    said: dict[str, dict[Limit, list[str]]] = {}
    for node in nodes:
        for name, limit in node.declared.items():
            said.setdefault(name, {}).setdefault(limit, []).append(node.name)
    for name, values in said.items():
        if len(values) > 1:
            names = [names[0] for names in values.values()]
            words = (
                f"Limit {name!r} is declared with different values, for example by nodes {listed(names)}: "
                "the one that started last holds."
            )
            yield Problem("limit", words, {"limit": name, "nodes": [*values.values()]})
    for node in nodes:
        for type, limits in node.limited.items():
            for name in limits:
                if name not in node.limits and name not in said:
                    said[name] = {}  # told once
                    words = f"Type {type!r} names the limit {name!r}, which no program declares."
                    yield Problem("limit", words, {"limit": name, "type": type})


class _Check:
    """One check of a repository by thresholds."""

    def __init__(
        self,
        repository: Repository,
        controls: Controls,
        timing: Timing,
        pool: WorkerPool | None,
        wanted: Thresholds,
        now: int,
    ) -> None:
        self._repository = repository
        self._controls = controls
        self._timing = timing
        self._pool = pool
        self._wanted = wanted
        self.now = now

    def problems(self) -> Iterator[Problem]:
        """Yield everything that is wrong with the repository."""
        self._repository.version()  # notices a newer schema
        self._repository.house.ensure_there()
        nodes = [node for node in self._repository.nodes() if node.alive is not False]
        paused = self._controls.read_paused()
        due = [t for t in queries.every(self._repository, "ready_type") if t not in paused]
        yield from self._repository.house.problems()
        yield from self._silent([node for node in nodes if node.silent])
        yield from self._nodes(nodes, due)
        yield from _brokers([node for node in nodes if node.lives])
        yield from _limits([node for node in nodes if node.lives])
        yield from self._holds()
        yield from self._snoozing()
        yield from self._stuck_elsewhere(nodes)
        yield from stuck_types(self._repository, nodes, paused)
        yield from self._oldest_due(due, paused)
        yield from self._failed()
        yield from self._schedules()
        yield from self._file_size()
        yield from self._held_back()

    def _silent(self, nodes: Sequence[Node]) -> Iterator[Problem]:
        if not (nodes and self._wanted.nodes):
            return
        lease = self._repository.lease_timeout
        ages = {node.id: age_of_beat(node, self.now) for node in nodes}
        nearest = min(nodes, key=lambda node: abs(ages[node.id]))
        many = f"{len(nodes)} nodes may be dead ({listed([node.name for node in nodes])})"
        words = (
            f"{f'Node {nearest.name} may be dead' if len(nodes) == 1 else many}: "
            f"{silence(nearest, self.now, lease)}. If not, the clocks of the hosts differ."
        )
        facts = {"nodes": dict([*ages.items()][:_NAMED]), "number": len(nodes), "lease": lease}
        yield Problem("silent_node", words, {**facts, "seconds": ages[nearest.id]})

    def _nodes(self, nodes: Sequence[Node], due: Sequence[str]) -> Iterator[Problem]:
        most = self._wanted.nodes
        at_work = [node for node in nodes if node.lives and not node.stopping]
        wanted = {**dict.fromkeys(due, most), **self._wanted.nodes_of}
        if len(at_work) < most:
            words = (
                f"{_number_with_verb(len(at_work), 'live node', 'runs', 'run')} tasks of this "
                f"repository; at least {most} must."
            )
            yield Problem("nodes", words, {"type": None, "nodes": len(at_work), "least": most})
            wanted = {**self._wanted.nodes_of}
        for type, least in wanted.items():
            able = [node for node in at_work if type in node.types]
            if len(able) < least:
                words = (
                    f"{_number_with_verb(len(able), 'live node', 'has', 'have')} an executor for type "
                    f"{type!r}; at least {least} must."
                )
                yield Problem("nodes", words, {"type": type, "nodes": len(able), "least": least})

    def _holds(self) -> Iterator[Problem]:
        """Yield a problem for each limit that is held for more than a minute."""
        controls = Controls(self._repository)
        controls.refresh()
        for name, hold in controls.holds.items():
            if (seconds := (hold.until - self.now) / 1000) > _LONG_HOLD:
                facts = {"limit": name, "until": to_datetime(hold.until), "seconds": seconds}
                words = f"Nothing starts for {duration(seconds)}: {held_words(name, hold)}."
                yield Problem("hold", words, {**facts, "by": hold.by})

    def _snoozing(self) -> Iterator[Problem]:
        """Yield a problem for each of the next due tasks that asks to run later again and again."""
        if self._repository.shortcoming:
            return
        ids = [task_id for task_id, _ in self._repository.due(None, self._timing.most_explained)]
        found = self._repository.find("id", ids, ("id", "type", "snoozes")) if ids else ()
        for task_id, type, snoozes in found:
            if (snoozes or 0) > _MANY_SNOOZES:
                words = (
                    f"Task {task_id} of type {type!r} has asked {snoozes} times to run later: "
                    "max_snoozes would end this."
                )
                facts = {"task_id": task_id, "type": type, "snoozes": snoozes}
                yield Problem("snoozes", words, facts)

    def _stuck_elsewhere(self, nodes: Sequence[Node]) -> Iterator[Problem]:
        own = None if self._pool is None else self._pool.node.id
        others = {node.id: node.name for node in nodes if node.id != own}
        if not others:
            return
        found = self._repository.find("stuck_on", [*others], ("stuck_on",), MOST_STUCK)
        for node, number in Counter(node for (node,) in found).items():
            if number > self._wanted.stuck:
                yield _stuck(node, others[node], number, self._wanted.stuck)

    def _oldest_due(self, due: Sequence[str], paused: Paused) -> Iterator[Problem]:
        most = self._wanted.oldest_due
        if most is None or paused.everything:
            return
        limit = self._timing.most_explained
        # Delayed tasks whose time has come, and which no queue has released.
        times = dict(self._repository.due(self.now, limit))
        found = self._repository.find("id", [*times], ("id", "type")) if times else ()
        delayed = [(times[task_id], task_id) for task_id, type in found if type not in paused]
        ready = queries.waiting_since(self._repository, due, limit)
        late = [one for one in (*delayed, *ready) if self.now - one[0] > most]
        if not late:
            return
        since, task_id = min(late)
        seconds, more = (self.now - since) / 1000, len(late) >= limit
        words = f"Task {task_id} could have started {duration(seconds)} ago, at {_moment(since)}"
        if len(late) > 1:
            number = f"{'at least ' * more}{len(late)} tasks"
            words += f"; {number} could have started more than {duration(most / 1000)} ago"
        facts = {"task_id": task_id, "since": to_datetime(since), "seconds": seconds}
        counts = {"number": len(late), "more": more}
        yield Problem("oldest_due", f"{words}.", {**facts, **counts, "most": most / 1000})

    def _failed(self) -> Iterator[Problem]:
        if self._wanted.failed is None:
            return
        most, period = self._wanted.failed
        limit = max(self._timing.most_explained, 2 * most)
        newest = self._repository.reads.newest(FAILED, limit, ("type", "completed_at"))
        late = [
            type
            for type, at in newest
            if isinstance(at, int) and at >= self.now - period and type not in NO_WORK
        ]
        if len(late) <= most:
            return
        by_type, more = Counter(late), len(late) == limit
        names = listed([f"{count} of {type}" for type, count in by_type.most_common()])
        words = (
            f"{'At least ' * more}{counted(len(late), 'task')} failed in the last "
            f"{duration(period / 1000)} ({names}), more than {most}."
        )
        facts = {"failed": len(late), "types": dict(by_type), "more": more}
        yield Problem("failed", words, {**facts, "most": most, "seconds": period / 1000})

    def _schedules(self) -> Iterator[Problem]:
        most = self._wanted.schedule_overdue
        if most is None:
            return
        overdue: dict[str, datetime] = {}
        damaged: dict[str, str] = {}
        for name, entry in self._entries():
            if isinstance(entry, str):
                damaged[name] = entry
            elif not entry.paused and entry.next is not None and self.now - entry.next > most:
                overdue[name] = to_datetime(entry.next)
        if overdue:
            since = min(overdue.values())
            words = (
                f"{_number_with_verb(len(overdue), 'schedule', 'is', 'are')} overdue "
                f"({listed(overdue)}): the oldest tick without a task was at {moment(since)}."
            )
            facts = {
                "since": since,
                "seconds": (self.now - to_ms(since)) / 1000,
                "most": most / 1000,
            }
            yield Problem("schedule_overdue", words, _some(overdue, **facts))
        if damaged:
            words = (
                f"{_number_with_verb(len(damaged), 'schedule', 'cannot', 'cannot')} be read "
                f"({listed(damaged)})."
            )
            yield Problem("schedule_damaged", words, _some(damaged))

    def _entries(self) -> Iterator[tuple[str, Entry | str]]:
        """Yield all schedules with their names; an error text for one that cannot be read."""
        after = PREFIX
        while notes := self._repository.reads.notes_after(PREFIX, after, self._timing.scan_batch):
            for after in sorted(notes):
                name = after.removeprefix(PREFIX)
                try:
                    yield name, entry_of(notes[after])
                except RepositoryCorrupt as error:
                    yield name, str(error)

    def _file_size(self) -> Iterator[Problem]:
        most = self._wanted.file_size
        if most is None:
            return
        sizes = self._repository.house.file_sizes()
        if not sizes:
            raise ConfigurationError(
                f"file_size requires a repository in a file: {self._repository!r} has none"
            )
        if (size := sum(sizes.values())) > most:
            words = f"The file has {size:,} bytes, more than {most:,}."
            yield Problem("file_size", words, {"bytes": size, "most": most})

    def _held_back(self) -> Iterator[Problem]:
        """Yield a problem for a transaction that is open for more than ten minutes."""
        if (seconds := self._repository.house.held_back()) > _LONG_TRANSACTION:
            words = (
                f"A transaction in the database has been open for {duration(seconds)}. Until it ends, no "
                "removed row is cleaned up, and it gets slower to find a task."
            )
            yield Problem("open_transaction", words, {"seconds": seconds})


def _moment(ms: int) -> str:
    return moment(to_datetime(ms))


def _number_with_verb(count: int, word: str, one: str, more: str) -> str:
    return f"{counted(count, word)} {one if count == 1 else more}"


def _some(names: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Return facts about named things: the first of them, and their number."""
    first = dict(list(names.items())[:_NAMED])
    return {"schedules": first, "number": len(names), **facts}
