"""What a type checker sees of the Flask extension. Checked, never run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Flask

from taskx import Context, Queue, TaskHandle, every
from taskx.contrib.flask import Taskx
from taskx.programs.dashboard import ALL

if TYPE_CHECKING:
    from typing_extensions import assert_type

taskx = Taskx()


@taskx.executor("report", max_attempts=2)
def report(ctx: Context, month: str) -> int:
    return len(month)


@taskx.executor()
def plain(count: int) -> str:
    return str(count)


@taskx.dashboard_check
def check() -> Any:
    return ALL


@taskx.dashboard_check
def yes_or_no() -> bool:
    return True


def use(app: Flask) -> None:
    assert_type(report.submit(month="2024-05"), TaskHandle[int])
    assert_type(plain.submit(count=1), TaskHandle[str])
    assert_type(plain(1), str)
    assert_type(taskx.queue, Queue)
    assert_type(taskx.submit(report, {"month": "2024-05"}), TaskHandle[int])
    assert_type(taskx.submit(plain.using(priority=2), {"count": 1}), TaskHandle[str])
    assert_type(taskx.submit("report", {"month": "2024-05"}, priority=1), TaskHandle[Any])
    assert_type(taskx.submit(report, {"month": "x"}, connection=object()), TaskHandle[int])
    taskx.schedule("nightly", every(60), report, {"month": "2024-05"}, overlap="skip")
    taskx.init_app(app)
    taskx.start()
    taskx.start(app)

    report.submit(month=5)  # type: ignore[arg-type]
    taskx.submit(report, priority="high")  # type: ignore[call-overload]
    taskx.init_app("app")  # type: ignore[arg-type]
    report.on(taskx).submit(month="2024-05")


@taskx.executor("other", max_attemps=2)  # type: ignore[call-overload, untyped-decorator]
def other() -> None: ...


@taskx.dashboard_check  # type: ignore[type-var]
def takes_arguments(request: object) -> bool:
    return True
