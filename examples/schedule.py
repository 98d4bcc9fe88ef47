"""Schedules: what ticks when, a preview, a pause, a task by hand, a back-fill, and a restart.

    python examples/schedule.py

It needs ``pip install 'taskx-queue[schedules]'`` for the cron expression; intervals need nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

from taskx import Config, Context, Queue, SQLiteRepository, TaskFilter, every, tick_of

BERLIN = ZoneInfo("Europe/Berlin")


def make_queue(database: Path) -> Queue:
    """The queue as every start of the program makes it, schedules included."""
    queue = Queue(SQLiteRepository(database), Config(worker_num=2))

    @queue.executor()
    def report(ctx: Context, kind: str) -> str:
        # What it is about is told by its tick: it may run later, or be back-filled.
        day = (tick_of(ctx.task) or datetime.now(timezone.utc)).astimezone(BERLIN).date()
        return f"{kind} until {day}"

    @queue.executor()
    def ping() -> None:
        """Look whether all is well."""

    @queue.executor()
    def measure(ctx: Context) -> None:
        time.sleep(0.3)

    # At half past 2 in Berlin, whatever the clocks do there; its tasks may fail twice.
    queue.schedule(
        "nightly", "30 2 * * *", "report", {"kind": "sales"}, tz="Europe/Berlin", max_attempts=3
    )
    # Each tick counts: those of the last minute that nobody was there for are made good.
    queue.schedule("beat", every(0.2), "ping", misfire="all", misfire_grace=60)
    # Never two at a time, and a tick that was missed is not made good.
    queue.schedule("gauge", every(0.1), "measure", misfire="skip", overlap="skip")
    return queue


def ticks(queue: Queue, name: str) -> list[datetime]:
    """The ticks of a schedule that have a task."""
    tasks, _ = queue.list_tasks(TaskFilter(created_by=f"schedule:{name}", limit=1000))
    return sorted(tick for task in tasks if (tick := tick_of(task)))


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
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
            print("beat has ticked, and runs beside gauge")

            gauge = queue.schedules()["gauge"]
            gauge.pause()
            print("gauge is paused:", queue.schedules()["gauge"].next_tick is None)

            print("by hand:", nightly.trigger().result(timeout=60).partition(" until ")[0])

            # Easter 2024, when the clocks went forward: the night of the 31st had no 02:30.
            easter = datetime(2024, 3, 29, tzinfo=BERLIN), datetime(2024, 4, 2, tzinfo=BERLIN)
            for handle in nightly.backfill(*easter):
                print("back-filled:", handle.result(timeout=60))
            nightly.backfill(*easter)  # again: what is there is not made twice
            print("tasks of nightly:", len(ticks(queue, "nightly")))
        queue.repository.close()

        time.sleep(0.6)  # the program is away, while beat ticks on
        queue = make_queue(database)  # the same schedules: nothing begins anew
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
    """Whether each moment is one step after the one before."""
    return all(later - sooner == step for sooner, later in pairwise(moments))


if __name__ == "__main__":
    main()
