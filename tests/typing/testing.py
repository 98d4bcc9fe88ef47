"""What a type checker sees of the test kit. Checked, never run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import taskx
from taskx import Context, MemoryRepository, Queue, SQLiteRepository, Task, TaskExecutor
from taskx.testing import (
    Fault,
    Faults,
    InlineQueue,
    ManualClock,
    ManualQueue,
    Outcome,
    fail_at,
    inline,
    kill_at,
    manual,
    run_executor,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type

queue = Queue(MemoryRepository())


@queue.executor("fetch")
def fetch(ctx: Context, url: str) -> dict[str, int]:
    return {url: 1}


class Classic(TaskExecutor):
    type = "classic"

    def execute(self, ctx: Context, task: Task) -> None:
        task.result = 1


def double(n: int) -> int:
    return 2 * n


def queues() -> None:
    with manual(queue) as q:
        assert_type(q, ManualQueue)
        assert_type(q.run_next(), Task | None)
        assert_type(q.run_all(), list[Task])
        assert_type(q.advance(5), list[Task])
        assert_type(q.clock, ManualClock)
        assert_type(q.submitted("fetch", params={"url": "u"}, priority=5), list[Task])
        assert_type(q.assert_submitted("fetch", times=1), Task)
        assert_type(fetch.submit(url="u").result(), dict[str, int])
        manual(queue, clock=1)  # type: ignore[arg-type]
    with inline(queue, SQLiteRepository("x.db"), clock=ManualClock()) as q2:
        assert_type(q2, InlineQueue)
    own = ManualQueue()

    @own.executor("own")
    def plain(n: int) -> str:
        return str(n)

    assert_type(plain.submit(n=1).result(), str)


@inline(queue)
def decorated(n: int) -> str:
    return str(n)


def executors() -> None:
    assert_type(run_executor(fetch, {"url": "u"}, cancel_after=5), Outcome[dict[str, int]])
    assert_type(run_executor(double, {"n": 1}).result, int)
    assert_type(run_executor(Classic()).result, Any)
    outcome = run_executor(fetch, {"url": "u"}, timeout=5, attempt=2, steps={"a": 1}, parents=[1])
    assert_type(outcome.progress, list[tuple[int, str]])
    assert_type(outcome.error, BaseException | None)
    assert_type(outcome.log, list[str])
    assert_type(outcome.status, taskx.TaskStatus)
    run_executor(fetch, delay=5)  # type: ignore[call-overload]
    assert_type(decorated(1), str)


def faults() -> None:
    with fail_at(queue, "after start commit", OSError) as fault:
        assert_type(fault, Fault)
    fail_at(queue, "during lunch")  # type: ignore[arg-type]
    kill_at("in the executor", double, 1)
    with Faults(queue.repository) as broken:
        assert_type(broken, Faults)
        broken.fail(on="apply", times=1)
