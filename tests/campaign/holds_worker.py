"""A process of the campaign about refusals: its executors call an API that refuses too many calls."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from taskx import Config, Context, Queue, Snooze, SQLiteRepository, retry_after


class Rule(NamedTuple):
    """How many calls the API allows in a period, in seconds."""

    calls: int
    period: float


class Api:
    """An API that all processes call: a file with the times of its last calls, under a lock of the kernel.

    It allows so many calls in any period, and says to the others when there will be room for one. At the
    first call, another program has just used it up.
    """

    def __init__(self, folder: Path, rule: Rule) -> None:
        self._rule, self._folder = rule, folder
        self._log = os.open(folder / "calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        with open(self._folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._folder / "times"

    def call(self) -> dict[str, str] | None:
        """Call it; return None, or the headers of a refusal."""
        with self._locked() as file:
            now, (calls, period) = time.time(), self._rule
            known = json.loads(file.read_text()) if file.exists() else [now] * calls
            times = [at for at in known if at > now - period]
            refused = len(times) >= calls
            wait = times[0] + period - now if refused else 0.0
            file.write_text(json.dumps(times if refused else [*times, now]))
            os.write(self._log, f"{now} {int(refused)} {wait}\n".encode())
        return {"Retry-After": f"{wait:.3f}"} if refused else None


def main(file: str, folder: Path, burst: int, rule: Rule) -> None:
    """Run tasks until somebody kills this process."""
    queue = Queue(SQLiteRepository(file), Config(worker_num=8))
    queue.limit("api", rate=(rule.calls - burst, rule.period), burst=burst)
    api = Api(folder, rule)

    @queue.executor("call", limit="api")
    def call(ctx: Context) -> None:
        if (refusal := api.call()) is not None:
            raise Snooze(retry_after(refusal), limit=True)

    queue.start()
    print("started", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    rule = Rule(int(sys.argv[4]), float(sys.argv[5]))
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), rule)
