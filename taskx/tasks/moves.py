"""The table of moves: for each move the change of status, and what follows once it is committed."""

from __future__ import annotations

import logging
from typing import NamedTuple

from taskx.tasks.model import TaskStatus

_PENDING, _RUNNING, _COMPLETED, _FAILED, _CANCELLED = (status.value for status in TaskStatus)


class Move(NamedTuple):
    """A row of the table.

    Attributes:
        name: the name of the move, which its writes carry.
        sources: the statuses from which it leads to another one; empty if it does not.
        target: the status that it sets; None if it sets none.
        event: the hook method that is called, besides ``finished``; empty for none.
        facts: names of the further arguments of that method.
        ends: True if the task has ended or was deleted. Then these are told: the hooks (``finished``), the
            threads that wait for it, its dependents, and the next task of its concurrency key.
        may_start: True if the task may start, now or when the reason for holding it has passed.
        leaves: True if the task leaves the buffer of this process.
        fires: True if the task's token fires, if it runs in this process.
        level: the level of the log message.
        words: the log message, with placeholders for facts about the move; empty for none.
        digest: True if only the number of these moves is logged at that level, once a minute for each type
            of tasks, and the others at INFO.
    """

    name: str
    sources: tuple[str, ...]
    target: str | None
    event: str = ""
    facts: tuple[str, ...] = ()
    ends: bool = False
    may_start: bool = False
    leaves: bool = False
    fires: bool = False
    level: int = logging.DEBUG
    words: str = ""
    digest: bool = False

    @property
    def edges(self) -> list[tuple[str, str]]:
        """The changes of status that it can make, each from the old one to the new one."""
        return [(source, self.target) for source in self.sources if self.target is not None]

    @property
    def has_consequences(self) -> bool:
        """True if anything follows from the move."""
        return any((self.event, self.ends, self.may_start, self.leaves, self.fires, self.words))


#: The part of a log message that shows the params.
PARAMS = " (params=%(params)s)"
_ENDED = "task %(id)s (%(type)s) %(status)s"
_BECAUSE = "task %(id)s (%(type)s) is %(status)s: %(error)s"
#: The part that shows where an error was raised.
TRACEBACK = "\n%(traceback)s"
_HAS_FAILED = f"task %(id)s (%(type)s) failed: %(error)s{PARAMS}{TRACEBACK}"
#: The log message of a retry.
RETRIED = f"task %(id)s (%(type)s) is retried %(when)s after attempt %(attempt)d: %(error)s{PARAMS}"
_SNOOZED = "task %(id)s (%(type)s) asked to run again in %(snooze)g s"
_INTERRUPTED = "task %(id)s (%(type)s) was interrupted and is pending again"
_CRASHED = f"task %(id)s (%(type)s) crashed, it runs again: %(error)s{PARAMS}"
_DIED = "task %(id)s was running on %(node)s, which died: "
_PARKED = "task %(id)s (%(type)s) waits without a thread"
_RESCUED, _LOST = f"{_DIED}it runs again", f"{_DIED}it has failed and is a dead letter{PARAMS}"
_NOT_RESCUED = f"{_DIED}it is cancelled, as requested"

_PEND, _RUN, _END = (_PENDING,), (_RUNNING,), (_FAILED, _CANCELLED)
_ERROR, _WARNING, _INFO = logging.ERROR, logging.WARNING, logging.INFO

#: Every move. Its name and its new status are different from those of all others.
MOVES = (
    # The code that stores a free task puts it into the buffer, or calls ``fetch_soon``.
    Move("create", (), None, "submitted", may_start=True),
    # The task is ready for a worker that waits.
    Move("create", (), _RUNNING, "submitted"),
    # Hooks are told when a thread begins to execute the task.
    Move("start", _PEND, _RUNNING),
    Move("progress", (), None, "progressed", ("progress", "message")),
    Move("checkpoint", (), None),
    Move("complete", _RUN, _COMPLETED, ends=True, words=_ENDED),
    Move("fail", _RUN, _FAILED, ends=True, level=_ERROR, words=_HAS_FAILED),
    Move(
        "retry",
        _RUN,
        _PENDING,
        "retried",
        ("error", "delay"),
        may_start=True,
        level=_WARNING,
        words=RETRIED,
        digest=True,
    ),
    Move(
        "snooze",
        _RUN,
        _PENDING,
        "snoozed",
        ("snooze",),
        may_start=True,
        level=_INFO,
        words=_SNOOZED,
    ),
    # No hook is told: the attempt goes on later.
    Move("park", _RUN, _PENDING, may_start=True, words=_PARKED),
    Move(
        "interrupt", _RUN, _PENDING, "interrupted", may_start=True, level=_INFO, words=_INTERRUPTED
    ),
    Move("hand back", _RUN, _PENDING, may_start=True),
    Move("crash", _RUN, _PENDING, "rescued", may_start=True, level=_WARNING, words=_CRASHED),
    Move("crash", _RUN, _FAILED, "rescued", ends=True, level=_ERROR, words=_HAS_FAILED),
    Move("crash", _RUN, _CANCELLED, "rescued", ends=True, words=_ENDED),
    # The recovery logs how many tasks of a node run again.
    Move("rescue", _RUN, _PENDING, "rescued", may_start=True, words=_RESCUED),
    Move("rescue", _RUN, _FAILED, "rescued", ends=True, level=_ERROR, words=_LOST),
    Move("rescue", _RUN, _CANCELLED, "rescued", ends=True, level=_WARNING, words=_NOT_RESCUED),
    Move("cancel", _PEND, _CANCELLED, ends=True, leaves=True),
    Move("request cancel", (), None, fires=True),
    Move("expire", _PEND, _CANCELLED, ends=True, leaves=True, level=_INFO, words=_BECAUSE),
    Move("orphan", _PEND, _CANCELLED, ends=True, level=_WARNING, words=_BECAUSE),
    Move("orphan", _PEND, _FAILED, ends=True, level=_WARNING, words=_BECAUSE),
    Move("cancelled", _RUN, _CANCELLED, ends=True, words=_ENDED),
    Move("parents moved", (), None, may_start=True),
    Move("wake", (), None, may_start=True),
    Move("finish", _PEND, _COMPLETED, ends=True, leaves=True, words=_ENDED),
    Move("finish", _PEND, _FAILED, ends=True, leaves=True, words=_BECAUSE),
    Move("give turn", (), None, may_start=True),
    Move("release", (), None, may_start=True),
    Move("lift bar", (), None, may_start=True),
    Move("requeue", _END, _PENDING, "requeued", may_start=True),
    # The task is fetched again, because its new priority gives it another place in the buffer.
    Move("replace", (), None, may_start=True, leaves=True),
    # A node takes tasks that it can start, and frees the others.
    Move("take", (), None),
    Move("free", (), None),
    Move("put off", (), None, may_start=True),
    Move("release key", (), None),
    Move("delete", (), None, ends=True, leaves=True),
    # These tasks had ended, and no other task needs them.
    Move("prune", (), None),
    Move("discard", (), None),
)
