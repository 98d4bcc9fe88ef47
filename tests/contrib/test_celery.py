"""The Celery engine, without a broker."""

from __future__ import annotations

import sys
import time

import pytest
from celery import Celery
from helpers import eventually
from mongo_server import free_port

from taskx import ConfigurationError, Queue, SQLiteRepository, TaskStatus
from taskx.contrib.celery import TIMEOUT, CeleryEngine
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
            message = connection.SimpleQueue(name).get(timeout=5)
            assert message.payload[0] == expected
            assert message.headers["task"] == "taskx.run"
            assert (message.headers["eta"], message.headers["retries"]) == (None, 0)
    engine.renew_after_fork()


def test_a_ticket_to_a_broker_that_is_not_there_fails_in_time():
    for url in (f"redis://127.0.0.1:{free_port()}/0", f"amqp://127.0.0.1:{free_port()}//"):
        engine = CeleryEngine(Celery("test", broker=url, set_as_current=False))
        began = time.monotonic()
        with pytest.raises(Exception, match="refused"):
            engine.send(Ticket("1", "mail"))
        assert time.monotonic() - began < 10 * TIMEOUT


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
