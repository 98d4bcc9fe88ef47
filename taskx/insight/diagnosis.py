"""The examination of everything around the tasks: the answer to ``Queue.diagnose``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

import attrs

from taskx.attempt.registry import Registry
from taskx.insight.nodes import silence
from taskx.insight.parked import places
from taskx.stores.base import Repository
from taskx.stores.liveness.base import Node
from taskx.tasks.clock import to_datetime
from taskx.tasks.errors import RepositoryError
from taskx.tasks.findings import Answer, Check, counted, duration, fail, listed, ok, warn
from taskx.tasks.model import TaskFilter

#: Milliseconds by which the newest task may be in the future: the clocks of hosts differ a little.
_TOLERANCE = 2000
# Milliseconds since 1970 before which no clock is right: TaskX is younger.
_YOUNGEST = 1_700_000_000_000
# Most tasks of dead nodes that are counted.
_MOST = 1000
# Most places at which tasks wait that are told.
_PLACES = 50


@attrs.frozen
class Diagnosis(Answer):
    """The answer of :meth:`Queue.diagnose`. It is true if no check has failed.

    Attributes:
        checks: everything that was examined, in order.
        checked_at: the time of the check.
    """

    checks: tuple[Check, ...]
    checked_at: datetime

    @property
    def ok(self) -> bool:
        """True if no check has failed; there may be warnings."""
        return not any(check.level == "fail" for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return (
            " ".join(str(check) for check in self.checks if check.level != "ok") or "All is well."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of JSON values; times are ISO text."""
        return {"ok": self.ok, **Answer.to_dict(self)}


def diagnose(repository: Repository, registry: Registry, now: int) -> Diagnosis:
    """Examine what is around the tasks, as versions, the store and nodes: see ``Queue.diagnose``."""
    checks = [_versions(), *repository.house.examine()]
    # An older schema is only a warning, but the tasks cannot be read before it is migrated.
    readable = all(check.level == "ok" for check in checks if check.name in ("file", "schema"))
    if readable and not any(check.level == "fail" for check in checks):
        for examine in (_nodes, _clock):
            checks.extend(_asked(examine, repository, now))
        versions = {type: entry.options.version for type, entry in registry.registered.items()}
        checks.extend(_asked(partial(_parked, versions), repository, now))
    return Diagnosis(tuple(checks), to_datetime(now))


def _versions() -> Check:
    import platform  # slow to load, and not needed to run tasks

    taskx, python = _version(), platform.python_version()
    return ok("versions", f"This is TaskX {taskx} on Python {python}.", taskx=taskx, python=python)


def _version() -> str:
    """Return the version of TaskX; the package itself imports this module."""
    return str(sys.modules["taskx"].__version__)


def _asked(
    examine: Callable[[Repository, int], Iterator[Check]], repository: Repository, now: int
) -> Iterator[Check]:
    try:
        yield from examine(repository, now)
    except RepositoryError as error:
        yield fail("repository", f"The repository cannot be read: {error}.", "")


def _nodes(repository: Repository, now: int) -> Iterator[Check]:
    nodes = repository.nodes()
    dead = [node for node in nodes if node.alive is False]
    silent = [node for node in nodes if node.silent]
    live = len(nodes) - len(dead) - len(silent)
    versions = {node.about.version for node in nodes if node.lives} - {""}
    if others := sorted(versions - {_version()}):
        yield warn(
            "node versions",
            f"Live nodes run TaskX {', '.join(others)}, and this is TaskX {_version()}.",
            "Restart them with the same version.",
            versions=sorted(versions),
        )
    for node in nodes:
        if node.lives and node.broker_error:
            yield fail(
                "broker",
                f"Node {node.name} cannot use the broker of {node.about.engine}: {node.broker_error}.",
                "Check the address in that program, the user and the password, and that the broker runs.",
                node=node.id,
                error=node.broker_error,
            )
    if silent:
        names = [f"{node.name} ({silence(node, now, repository.lease_timeout)})" for node in silent]
        yield warn(
            "heartbeats",
            f"{counted(len(silent), 'node')} may be dead: {listed(names)}.",
            "If its process is dead, start a worker, which takes over its tasks. If it lives, synchronize "
            "the clocks of the hosts, for example with chrony.",
            silent=[node.id for node in silent],
        )
    if not dead:
        yield ok("nodes", f"{counted(live, 'live node')} and no dead one.", live=live, dead=0)
        return
    held = _held(repository, dead)
    facts = {"live": live, "dead": len(dead), "tasks": held}
    if not held:
        words = f"{counted(live, 'live node')}, and {counted(len(dead), 'dead one')} without tasks."
        yield ok("nodes", words, **facts)
        return
    words = f"{counted(len(dead), 'dead node')} left {counted(held, 'task')} behind."
    if live:
        yield ok("nodes", f"{words} A live node takes them over.", **facts)
    else:
        yield warn(
            "nodes", words, "The next worker that starts takes them over: start one.", **facts
        )


def _held(repository: Repository, dead: list[Node]) -> int:
    ids = [node.id for node in dead]
    with suppress(RepositoryError):
        return sum(
            len(repository.find(column, ids, ("id",), _MOST))
            for column in ("running_on", "buffered_on")
        )
    return 0


def _parked(
    versions: Mapping[str, str | None], repository: Repository, now: int
) -> Iterator[Check]:
    """Tell where tasks wait in the middle of an attempt: another version of the code goes on there."""
    if repository.shortcoming:
        return
    for place, count in places(repository).most_common(_PLACES):
        type, version, step = place
        by = f"version {version}" if version is not None else "no version"
        words = (
            f"{counted(count, 'task')} of type {type!r}, {by}, {'waits' if count == 1 else 'wait'} "
            f"without a thread in {step or 'an unknown step'}."
        )
        facts = {**place._asdict(), "tasks": count}
        if type in versions and (here := versions[type]) != version:
            advice = (
                f"Here the executor has {'no version' if here is None else f'version {here}'}: it goes on "
                "with the steps that they have stored, by their names."
            )
            yield warn("waiting tasks", words, advice, **facts, here=here)
        else:
            yield ok("waiting tasks", words, **facts)


def _clock(repository: Repository, now: int) -> Iterator[Check]:
    if now < _YOUNGEST:
        words = f"The clock of this machine says {to_datetime(now):%Y-%m-%d}."
        yield fail("clock", words, "Set it: delays and schedules depend on it.")
        return
    newest = next(iter(repository.list(TaskFilter(limit=1))), None)
    if newest is None or newest.created_at is None:
        yield ok(
            "clock", f"The clock of this machine says {to_datetime(now):%Y-%m-%d %H:%M:%S} UTC."
        )
        return
    ahead = round(newest.created_at.timestamp() * 1000) - now
    if ahead > _TOLERANCE:
        yield warn(
            "clock",
            f"The newest task was submitted {duration(ahead / 1000)} in the future.",
            "The clock of this machine is behind that of the submitter, or was set back: synchronize the "
            "clocks, for example with chrony.",
            seconds=ahead / 1000,
        )
    else:
        yield ok("clock", f"The newest task was submitted {duration(max(0, -ahead) / 1000)} ago.")
