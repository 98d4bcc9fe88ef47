"""The types of engines, and of ``find_executor``. Type checkers check this file; it never runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import taskx
from taskx import Executor, MemoryRepository, Queue, SQLiteRepository, TaskExecutor, TaskHandle
from taskx.contrib.celery import CeleryEngine
from taskx.contrib.dramatiq import DramatiqEngine
from taskx.node.broker import BrokerEngine, Engine, Threads, Ticket

if TYPE_CHECKING:
    from celery import Celery
    from dramatiq import Broker
    from typing_extensions import assert_type


@taskx.executor("fetch")
def fetch(url: str) -> int:
    return len(url)


class MyEngine(BrokerEngine):
    name = "mine"

    def send(self, ticket: Ticket) -> None:
        assert_type(ticket.id, str)
        assert_type(ticket.type, str)


def find(type: str) -> Executor[..., Any] | None:
    return fetch if type == "fetch" else None


def find_class(type: str) -> TaskExecutor | None:
    return None


def use(app: Celery, broker: Broker) -> None:
    queue = Queue(SQLiteRepository("tasks.db"), engine=CeleryEngine(app, queues={"fetch": "fast"}))
    Queue(SQLiteRepository("tasks.db"), engine=DramatiqEngine(broker, one_host=True, resend=2))
    Queue(MemoryRepository(), engine=Threads(), find_executor=find)
    Queue(MemoryRepository(), find_executor=find_class)
    engine: Engine = MyEngine(one_host=True)
    assert_type(engine.name, str)
    assert_type(queue.submit(fetch, {"url": "a"}, connection=object()), TaskHandle[int])
    assert_type(queue.cancel_task("id", connection=object()), bool)
    MyEngine().begin_work(4, hand_over=True)
    MyEngine().run("id", "fetch")

    Queue(MemoryRepository(), engine="celery")  # type: ignore[arg-type]
    Queue(MemoryRepository(), find_executor=len)  # type: ignore[arg-type]
    MyEngine(hosts=1)  # type: ignore[call-arg]
    BrokerEngine()  # type: ignore[abstract]
    MyEngine().send("id")  # type: ignore[arg-type]
