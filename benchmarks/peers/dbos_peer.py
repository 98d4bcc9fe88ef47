"""DBOS on an SQLite file, its workflows on four threads of this process."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from dbos import DBOS

from benchmarks.harness import WORKERS
from benchmarks.peers.base import Peer

_go = threading.Event()


@DBOS.workflow()
def noop() -> int:
    return 1


@DBOS.workflow()
def clock() -> float:
    return time.perf_counter()


@DBOS.workflow()
def gate() -> None:
    _go.wait()


class Dbos(Peer):
    """Workflows are started without a queue: those of DBOS are looked at once a second."""

    def __init__(self, folder: str) -> None:
        DBOS(
            config={
                "name": "bench",
                "system_database_url": f"sqlite:///{os.path.join(folder, 'dbos.db')}",
                "max_executor_threads": WORKERS,
                "log_level": "ERROR",
            }
        )
        DBOS.launch()
        self._handles: list[Any] = [DBOS.start_workflow(gate) for _ in range(WORKERS)]

    def submit(self) -> object:
        handle = DBOS.start_workflow(noop)
        self._handles.append(handle)
        return handle

    def work(self) -> None:
        _go.set()

    def wait(self, count: int) -> None:
        for handle in self._handles:
            handle.get_result()

    def clock(self) -> tuple[float, float | None]:
        return DBOS.start_workflow(clock).get_result(), time.perf_counter()

    def close(self) -> None:
        _go.set()
        DBOS.destroy()
