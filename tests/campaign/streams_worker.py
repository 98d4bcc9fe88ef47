"""The processes of the campaign about streams: one that emits, and readers that are cut off at random."""

from __future__ import annotations

import json
import random
import sys
import threading
from pathlib import Path

from taskx import Config, Queue, SQLiteRepository

#: The chunks that a step emits; so many steps, and the rest, make the whole.
STEP = 250


def produce(file: str, workers: str) -> None:
    """Run tasks until somebody kills this process."""
    queue = Queue(SQLiteRepository(file), Config(worker_num=int(workers)))

    @queue.executor("speak", max_crashes=100)
    def speak(ctx: object, chunks: int, pause: float, until: str | None = None) -> int:
        """Emit chunks, the last one when the file ``until`` exists."""
        rest = max(1, round(0.01 / pause))  # a short pause is one after several chunks

        def some(first: int) -> int:
            for n in range(first, min(first + STEP, chunks)):
                while until is not None and n == chunks - 1 and not Path(until).exists():
                    threading.Event().wait(0.01)
                ctx.emit([ctx.task.starts, n])  # type: ignore[attr-defined]
                if n % rest == 0:
                    threading.Event().wait(pause * rest)
            return first

        for number, first in enumerate(range(0, chunks, STEP)):
            if number % 2:
                ctx.step(f"from {first}", some, first)  # type: ignore[attr-defined]
            else:
                some(first)
        return chunks

    queue.start()
    threading.Event().wait()


def read(file: str, task_id: str, seed: str, to: str) -> None:
    """Read a stream to its end, and store what was there after the last restart."""
    chance, values, after = random.Random(int(seed)), [], None
    facts = {"restarts": 0, "breaks": 0}
    while True:
        queue = Queue(SQLiteRepository(file))
        left = chance.randrange(1, 2000)
        for chunk in queue.handle(task_id).stream(after):
            if chunk.restart:
                values, facts["restarts"] = [], facts["restarts"] + 1
            values.append([chunk.position, chunk.value])
            after, left = chunk.position, left - 1
            if not left:
                facts["breaks"] += 1
                break
        else:
            break
        queue.close()
    Path(to).write_text(json.dumps({**facts, "values": values}), encoding="utf-8")


if __name__ == "__main__":
    {"produce": produce, "read": read}[sys.argv[1]](*sys.argv[2:])
