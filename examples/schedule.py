"""Schedules: cron expressions and intervals, a preview, a pause, a trigger by hand, a back-fill, a restart.

    python examples/schedule.py

The cron expression needs ``pip install 'taskx-queue[schedules]'``. Intervals need no extra package.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

from taskx import Config, Context, Queue, SQLiteRepository, every, tick_of

BERLIN = ZoneInfo("Europe/Berlin")


def make_queue(database: Path) -> Queue:
    """Return the queue with its schedules, the same at every start of the program."""
    queue = Queue(SQLiteRepository(database), Config(worker_num=2))

    @queue.executor()
    def report(ctx: Context, kind: str) -> str:
        # Use the tick and not the current time: the task may run later, or be back-filled.
        day = (tick_of(ctx.task) or datetime.now(timezone.utc)).astimezone(BERLIN).date()
        return f"{kind} until {day}"

    @queue.executor()
    def ping() -> None:
        """Check that the system works."""

    @queue.executor()
    def measure(ctx: Context) -> None:
        time.sleep(0.3)

    # At 02:30 in Berlin, also when clocks are shifted there. A task has three attempts.
    queue.schedule(
        "nightly", "30 2 * * *", "report", {"kind": "sales"}, tz="Europe/Berlin", max_attempts=3
    )
    # Every tick counts: ticks of the last minute that were missed get a task later.
    queue.schedule("beat", every(0.2), "ping", misfire="all", misfire_grace=60)
    # Never two tasks at a time. Missed ticks get no task.
    queue.schedule("gauge", every(0.1), "measure", misfire="skip", overlap="skip")
    return queue


def ticks(queue: Queue, name: str) -> list[datetime]:
    """Return the ticks of a schedule that have a task."""
    tasks = queue.iter_tasks(created_by=f"schedule:{name}")
    return sorted(tick for task in tasks if (tick := tick_of(task)))


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    while not holds():
        time.sleep(0.02)


def main() -> None:
    """Declare, tick, pause, trigger, back-fill, restart."""
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "schedule.db"
        queue = make_queue(database)
        for schedule in queue.schedules().values():
            print(schedule)
        nightly = queue.schedules()["nightly"]
        print(
            "nightly comes next at",
            ", ".join(f"{tick:%d.%m. %H:%M %Z}" for tick in nightly.next(3)),
        )

        with queue:
            wait_until(lambda: len(ticks(queue, "beat")) >= 5 and len(ticks(queue, "gauge")) >= 2)
            print("beat and gauge have ticked, and run at the same time")

            gauge = queue.schedules()["gauge"]
            gauge.pause()
            print("gauge is paused:", queue.schedules()["gauge"].next_tick is None)

            print("by hand:", nightly.trigger().result(timeout=60).partition(" until ")[0])

            # At Easter 2024 the clocks were set forward: the night of the 31st had no 02:30.
            easter = datetime(2024, 3, 29, tzinfo=BERLIN), datetime(2024, 4, 2, tzinfo=BERLIN)
            for handle in nightly.backfill(*easter):
                print("back-filled:", handle.result(timeout=60))
            nightly.backfill(*easter)  # ticks that already have a task get no second one
            print("tasks of nightly:", len(ticks(queue, "nightly")))
        queue.repository.close()

        time.sleep(0.6)  # no queue runs, and beat misses some ticks
        queue = make_queue(database)  # the stored schedules go on
        last = ticks(queue, "beat")[-1]
        with queue:
            wait_until(lambda: (queue.schedules()["beat"].last_tick or last) > last)
            queue.schedules()["beat"].pause()
            found = ticks(queue, "beat")
            print("beat has a task for every tick:", no_gap(found, timedelta(seconds=0.2)))
            print("gauge is still paused:", queue.schedules()["gauge"].paused)
            for schedule in queue.schedules().values():
                schedule.remove()
            print("left:", len(queue.schedules()))
        queue.repository.close()


def no_gap(moments: list[datetime], step: timedelta) -> bool:
    """Return True if each moment is one step after the previous one."""
    return all(later - sooner == step for sooner, later in pairwise(moments))


if __name__ == "__main__":
    main()
