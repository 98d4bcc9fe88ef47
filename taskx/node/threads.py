"""The threads of this process, and what they do: the answer of ``Queue.stacks``."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import attrs

from taskx.node.stuck import executed
from taskx.tasks.clock import to_datetime, to_ms
from taskx.tasks.findings import Answer
from taskx.tasks.stacks import top_frames

#: Most threads in an answer, and most characters of a stack; from a longer one the middle is left out.
MOST_THREADS, MOST_TEXT = 200, 4_000


@attrs.frozen(kw_only=True)
class ThreadStack(Answer):
    """A thread, and what it does: see :meth:`Queue.stacks`.

    Attributes:
        thread: the name of the thread.
        task_id: the id of the task that it runs; empty if it runs none.
        type: the type of that task.
        since: the time at which that task started; None if it runs none.
        stack: its stack as text, the most recent call last: from the executor on if it runs a task.
    """

    thread: str
    task_id: str = ""
    type: str = ""
    since: datetime | None = None
    stack: str = ""


def stacks_here() -> list[ThreadStack]:
    """Return the threads of this process: first those that run tasks, then the others by name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, top in top_frames().items():
        name = names.get(ident) or f"thread {ident}"
        for run, frames in executed(top):
            task, awaited = run.task, run.context._awaited
            stack = _text(frames) if awaited is None else awaited.stack()
            one = ThreadStack(
                thread=name, task_id=task.id, type=task.type, since=task.started_at, stack=stack
            )
            break
        else:
            one = ThreadStack(thread=name, stack=_text([*traceback.walk_stack(top)]))
        found.append(one)
    found.sort(key=lambda one: (not one.task_id, one.thread))
    return found[:MOST_THREADS]


def _text(frames: Sequence[Any]) -> str:
    text = "".join(traceback.StackSummary.extract(reversed(frames)).format())
    half = MOST_TEXT // 2
    return text if len(text) <= MOST_TEXT else f"{text[:half]}\n  …\n{text[-half:]}"


def to_json(stacks: Sequence[ThreadStack]) -> list[list[Any]]:
    """Return threads as JSON values, for another process."""
    return [
        [one.thread, one.task_id, one.type, one.since and to_ms(one.since), one.stack]
        for one in stacks
    ]


def from_json(values: Sequence[Sequence[Any]]) -> list[ThreadStack]:
    """Return the threads that another process has told of."""
    return [
        ThreadStack(
            thread=thread,
            task_id=task_id,
            type=type,
            since=None if since is None else to_datetime(since),
            stack=stack,
        )
        for thread, task_id, type, since, stack in values
    ]
