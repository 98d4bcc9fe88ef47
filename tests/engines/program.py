"""The program of the tests: the same executors on each engine. The environment says where its tasks are.

``python -m program`` and ``celery -A program worker`` run the tasks; the tests import :class:`Site`, too.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from taskx import Config, Context, MongoRepository, Queue, SQLiteRepository, executor
from taskx import run as run_queue


class Site:
    """A queue on an engine, with what the engine needs: ``queue``, and ``app`` for Celery."""

    def __init__(self, engine: str, store: str, broker: str, **options: Any) -> None:
        self.app: Any = None
        self.engine: Any = None
        if engine == "celery":
            self.engine = self._celery(broker, options)
        elif engine == "dramatiq":
            self.engine = self._dramatiq(broker, options)
        self._client: Any = None
        self.repository = self._repository(store)
        settings = Config(worker_num=int(os.environ.get("WORKERS", "2")))
        self.queue = Queue(self.repository, settings, engine=self.engine)
        _register(self.queue)

    def _dramatiq(self, broker: str, options: dict[str, Any]) -> Any:
        from taskx.contrib.dramatiq import DramatiqEngine

        self.app = _dramatiq_broker(broker)
        return DramatiqEngine(self.app, one_host=True, **{"resend": 1.0, **options})

    def _repository(self, store: str) -> Any:
        if store.startswith("postgresql"):
            return _django_repository(store)
        if not store.startswith("mongodb"):
            return SQLiteRepository(store)
        import pymongo

        url, _, name = store.rpartition("/")
        self._client = pymongo.MongoClient(url)
        return MongoRepository(self._client[name], poll_interval=0.05, timeout=60)

    def close(self) -> None:
        self.queue.close()
        if hasattr(self.app, "declare_actor"):  # a broker of Dramatiq
            self.app.close()
        if self._client is not None:
            self._client.close()

    def _celery(self, broker: str, options: dict[str, Any]) -> Any:
        from celery import Celery

        from taskx.contrib.celery import CeleryEngine

        self.app = Celery("program", broker=broker, set_as_current=False)
        self.app.conf.worker_prefetch_multiplier = 1
        self.app.conf.broker_connection_retry_on_startup = True
        self.app.conf.worker_enable_remote_control = "CONTROL" in os.environ
        return CeleryEngine(self.app, one_host=True, **{"resend": 1.0, **options})


def _django_repository(store: str) -> Any:
    """Return a repository in a database of Django, whose address and run folder the text has."""
    url, _, folder = store.partition(" ")
    server, _, name = url.rpartition("/")
    import django_project

    django_project.set_up()
    from taskx.contrib.django import DjangoRepository

    django_project.add_postgres(name, int(server.rpartition(":")[2]), name)
    return DjangoRepository(name, run_folder=folder)


def _dramatiq_broker(url: str) -> Any:
    if url.startswith("amqp"):
        from dramatiq.brokers.rabbitmq import RabbitmqBroker

        return RabbitmqBroker(url=url)
    from dramatiq.brokers.redis import RedisBroker

    return RedisBroker(url=f"{url}?socket_timeout=2&socket_connect_timeout=2")


def note(log: str, *words: object) -> None:
    """Add a line to a file, in one write, so that the lines of several processes do not mix."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (" ".join(map(str, words)) + "\n").encode())
    os.close(file)


@executor("limited")
def _limited(log: str, word: str) -> None:
    note(log, "begin", word)
    time.sleep(0.03)  # blocks on purpose
    note(log, "end", word)


def _register(queue: Queue) -> None:
    @queue.executor("add")
    def add(a: int, b: int) -> int:
        return a + b

    @queue.executor("total")
    def total(ctx: Context) -> int:
        return sum(parent.result for parent in ctx.parents)

    @queue.executor("fail", max_attempts=3)
    def fail(ctx: Context, times: int) -> int:
        if ctx.task.errors < times:
            raise ValueError(f"error {ctx.task.errors}")
        return ctx.task.errors

    @queue.executor("note")
    def note_once(log: str, word: str, seconds: float = 0.0) -> int:
        note(log, "begin", word)
        time.sleep(seconds)  # blocks on purpose
        note(log, "end", word)
        return os.getpid()

    @queue.executor("submits")
    def submits(log: str, word: str) -> None:
        queue.submit("note", {"log": log, "word": word})

    @queue.executor("hold")
    def hold(ctx: Context, log: str, word: str, gate: str) -> int:
        note(log, "begin", word, os.getpid())
        while not Path(gate).exists():
            ctx.sleep(0.02)
        note(log, "end", word, os.getpid())
        return os.getpid()

    queue.register_executor(_limited, max_concurrency=1, limit_scope="global")
    if "OLD" not in os.environ:

        @queue.executor("new")
        def new() -> str:
            return "new"


if "ENGINE" in os.environ:
    site = Site(os.environ["ENGINE"], os.environ["STORE"], os.environ["BROKER"])
    app, queue = site.app, site.queue
    if "TOUCH" in os.environ:
        queue.list_tasks()

if __name__ == "__main__":
    sys.exit(run_queue(queue))
