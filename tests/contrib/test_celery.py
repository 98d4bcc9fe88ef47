"""The Celery engine, without a broker."""

from __future__ import annotations

import socket
import sys
import time

import pytest
from celery import Celery
from helpers import PATIENCE, SOON, eventually

from taskx import ConfigurationError, Queue, SQLiteRepository, TaskStatus
from taskx.contrib.celery import CeleryEngine
from taskx.node.broker import Ticket


@pytest.fixture
def app() -> Celery:
    return Celery("test", broker="memory://", set_as_current=False)


def test_wrong_arguments_are_refused(app):
    with pytest.raises(ConfigurationError, match="Celery app"):
        CeleryEngine("app")  # type: ignore[arg-type]
    for wrong in ("gpu", {"video": 1}):
        with pytest.raises(ConfigurationError, match="queues must give"):
            CeleryEngine(app, queues=wrong)  # type: ignore[arg-type]
    CeleryEngine(app)
    with pytest.raises(ConfigurationError, match="has a CeleryEngine already"):
        CeleryEngine(app)


def test_a_missing_package_is_named_with_its_extra(app, monkeypatch):
    monkeypatch.setitem(sys.modules, "celery", None)
    with pytest.raises(ConfigurationError, match=r"taskx-queue\[celery\]"):
        CeleryEngine(app)


def test_celery_keeps_no_result_acknowledges_early_and_does_not_retry(app):
    CeleryEngine(app)
    task = app.tasks["taskx.run"]
    assert (task.ignore_result, task.acks_late, task.max_retries) == (True, False, 0)


def test_types_have_queues_of_their_own(app):
    engine = CeleryEngine(app, queues={"video": "gpu"})
    engine.send(Ticket("1", "video"))
    engine.send(Ticket("2", "mail"))
    with app.connection_for_read() as connection:
        for name, expected in (("gpu", ["1", "video"]), ("celery", ["2", "mail"])):
            message = connection.SimpleQueue(name).get(timeout=PATIENCE)
            assert message.payload[0] == expected
            assert message.headers["task"] == "taskx.run"
            assert (message.headers["eta"], message.headers["retries"]) == (None, 0)
    engine.renew_after_fork()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{}/0", "amqp://127.0.0.1:{}//"])
def test_a_ticket_to_a_broker_that_is_not_there_fails_in_time(url):
    with socket.socket() as taken:  # nobody listens there, and nobody else can
        taken.bind(("127.0.0.1", 0))
        url = url.format(taken.getsockname()[1])
        engine = CeleryEngine(Celery("test", broker=url, set_as_current=False))
        began = time.monotonic()
        with pytest.raises(Exception, match="refused"):
            engine.send(Ticket("1", "mail"))
    assert time.monotonic() - began < SOON


def test_without_a_worker_tasks_are_stored_and_wait(app, tmp_path):
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        queue = Queue(repository, engine=CeleryEngine(app, one_host=True))
        queue.executor("add")(lambda a, b: a + b)
        with queue:
            handle = queue.submit("add", {"a": 1, "b": 2})
            (node,) = queue.nodes()
            assert (node.types, node.workers) == ((), 0)
            assert queue.why(handle.id)[0].kind == "no_node"
            assert handle.task().status is TaskStatus.PENDING
            assert handle.cancel()
        assert eventually(lambda: not queue.nodes())
