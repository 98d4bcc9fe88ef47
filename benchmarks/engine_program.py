"""The program of :mod:`benchmarks.engines`: what submits tasks, and what a worker process imports.

A task adds a byte to a pipe, which the benchmark reads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.counting import COMMITS, READS, WRITES, Seen, watching
from benchmarks.stores import named

if TYPE_CHECKING:
    from taskx import Queue
    from taskx.stores.base import Repository

#: The environment variable of a worker process with its setup.
VARIABLE = "TASKX_BENCH_SETUP"
THREADS = 2
TASK, COUNTS = "add_byte", "counts"


class Setup(NamedTuple):
    """What a program runs: an engine with TaskX or alone, on a broker, with records in a folder's store.

    ``counting`` is True if the statements of SQLite are counted, which takes time.
    """

    engine: str
    alone: bool
    broker: str
    store: str
    folder: str
    counting: bool = False

    def command(self, processes: int = 1) -> list[str]:
        """Return the arguments of Python for a program of workers, with two threads in each process."""
        if self.engine == "threads":
            return ["-m", __name__]
        if self.engine == "celery":
            options = f"--pool threads --concurrency {THREADS} --without-gossip --without-mingle"
            return ["-m", "celery", "-A", __name__, "worker", *options.split()]
        options = f"--processes {processes} --threads {THREADS}"
        return ["-m", "dramatiq", f"{__name__}:app", *options.split()]

    def environment(self) -> dict[str, str]:
        """Return the variable by which the workers make the same program."""
        return {VARIABLE: json.dumps(self)}


class Program(NamedTuple):
    """An app or broker, a function that submits a task that writes to a pipe, and the queue, if it has one.

    ``seen`` are the statements of this process, if they are counted.
    """

    app: Any
    submit: Callable[[str], object]
    queue: Queue | None
    seen: Seen


def add_byte(path: str) -> None:
    """Add a byte to a pipe."""
    pipe = os.open(path, os.O_WRONLY)
    os.write(pipe, b".")
    os.close(pipe)


@contextmanager
def made(setup: Setup) -> Iterator[Program]:
    """Make a program, and close its queue at the end."""
    app, submit, engine = _ENGINES[setup.engine](setup)
    if setup.alone:
        yield Program(app, submit, None, Seen())
        return
    from taskx import Config, Queue

    with ExitStack() as stack:
        seen = stack.enter_context(watching()) if setup.counting else Seen()
        repository: Repository = stack.enter_context(named(setup.store).repository(setup.folder))
        queue = Queue(repository, Config(worker_num=THREADS), engine=engine)
        queue.executor(TASK)(add_byte)
        queue.executor(COUNTS)(lambda: counted(seen))
        stack.callback(queue.close)
        yield Program(app, lambda path: queue.submit(TASK, {"path": path}), queue, seen)


def counted(seen: Seen) -> list[int]:
    """Return the statements and the commits of this process."""
    return [seen.count(READS + WRITES), seen.count(COMMITS)]


def _threads(setup: Setup) -> tuple[Any, Callable[[str], object], Any]:
    from taskx.node.broker import Threads

    return None, add_byte, Threads()


def _celery(setup: Setup) -> tuple[Any, Callable[[str], object], Any]:
    from celery import Celery

    from taskx.contrib.celery import CeleryEngine

    app = Celery("bench", broker=setup.broker)
    app.conf.update(worker_prefetch_multiplier=1, task_ignore_result=True)
    if setup.alone:
        return app, app.task(name="alone")(add_byte).delay, None
    return app, add_byte, CeleryEngine(app, one_host=True)


def _dramatiq(setup: Setup) -> tuple[Any, Callable[[str], object], Any]:
    import dramatiq
    from dramatiq.brokers.rabbitmq import RabbitmqBroker
    from dramatiq.brokers.redis import RedisBroker

    from taskx.contrib.dramatiq import DramatiqEngine

    kinds: dict[bool, Any] = {True: RabbitmqBroker, False: RedisBroker}
    broker = kinds[setup.broker.startswith("amqp")](url=setup.broker)
    if setup.alone:
        return broker, dramatiq.actor(actor_name="alone", broker=broker)(add_byte).send, None
    return broker, add_byte, DramatiqEngine(broker, one_host=True)


_ENGINES: dict[str, Callable[[Setup], tuple[Any, Callable[[str], object], Any]]] = {
    "threads": _threads,
    "celery": _celery,
    "dramatiq": _dramatiq,
}


def _work_until_end_of_input(queue: Queue) -> None:
    with queue:
        sys.stdin.read()


if VARIABLE in os.environ:  # in the workers
    _stack = ExitStack()
    _program = _stack.enter_context(made(Setup(*json.loads(os.environ[VARIABLE]))))
    app, queue = _program.app, _program.queue
    if __name__ == "__main__" and queue is not None:
        _work_until_end_of_input(queue)
