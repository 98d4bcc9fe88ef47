"""DBOS on an SQLite file, with workflows on four threads of this process."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from dbos import DBOS

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Peer, nap, noop, tell_time

_go = threading.Event()
_TASKS = {run.__name__: DBOS.workflow()(run) for run in (noop, nap, tell_time)}


@DBOS.workflow()
def gate() -> None:
    _go.wait()


class Dbos(Peer):
    """DBOS without its queues, which are polled only once per second: workflows start directly."""

    def __init__(self, folder: str, workers: int = WORKERS) -> None:
        DBOS(
            config={
                "name": "bench",
                "system_database_url": f"sqlite:///{os.path.join(folder, 'dbos.db')}",
                "max_executor_threads": workers,
                "log_level": "ERROR",
            }
        )
        DBOS.launch()
        self._handles: list[Any] = [DBOS.start_workflow(gate) for _ in range(workers)]

    def submit(self, task: str = "noop") -> object:
        handle = DBOS.start_workflow(_TASKS[task])
        self._handles.append(handle)
        return handle

    def work(self) -> None:
        _go.set()

    def wait(self, count: int) -> None:
        for handle in self._handles:
            handle.get_result()

    def clock(self) -> tuple[float, float | None]:
        return DBOS.start_workflow(_TASKS["tell_time"]).get_result(), time.perf_counter()

    def close(self) -> None:
        _go.set()
        DBOS.destroy()
