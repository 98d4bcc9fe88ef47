"""The Dramatiq engine, without a broker."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.stub import StubBroker
from helpers import PATIENCE, eventually

from taskx import ConfigurationError, Queue, SQLiteRepository
from taskx.contrib.dramatiq import DramatiqEngine
from taskx.node.broker import Ticket


@pytest.fixture
def broker() -> Iterator[StubBroker]:
    made = StubBroker()
    yield made
    made.close()


def test_wrong_arguments_are_refused(broker):
    with pytest.raises(ConfigurationError, match="Dramatiq broker"):
        DramatiqEngine("redis://")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="queues must give"):
        DramatiqEngine(broker, queues="gpu")  # type: ignore[arg-type]
    DramatiqEngine(broker)
    with pytest.raises(ConfigurationError, match="has a DramatiqEngine already"):
        DramatiqEngine(broker)


def test_a_missing_package_is_named_with_its_extra(broker, monkeypatch):
    monkeypatch.setitem(sys.modules, "dramatiq", None)
    with pytest.raises(ConfigurationError, match=r"taskx-queue\[dramatiq\]"):
        DramatiqEngine(broker)


def test_dramatiq_does_not_retry_nor_end_a_long_task(broker):
    DramatiqEngine(broker)
    options = broker.get_actor("taskx.run").options
    assert options["max_retries"] == 0
    assert options["time_limit"] > 365 * 24 * 3600 * 1000


def test_a_ticket_on_a_broker_without_middleware(broker):
    bare = StubBroker(middleware=[])
    DramatiqEngine(bare).send(Ticket("1", "mail"))
    assert bare.queues["taskx"].qsize() == 1
    bare.close()


def test_types_have_queues_of_their_own(broker):
    engine = DramatiqEngine(broker, queue_name="common", queues={"video": "gpu"})
    engine.send(Ticket("1", "video"))
    engine.send(Ticket("2", "mail"))
    for name, args in (("gpu", ("1", "video")), ("common", ("2", "mail"))):
        message = dramatiq.Message.decode(broker.queues[name].get())
        assert (message.args, message.kwargs, message.queue_name) == (args, {}, name)
        assert "eta" not in message.options
        broker.queues[name].task_done()


@pytest.mark.parametrize("threads", ["of Dramatiq", "of TaskX"])
def test_a_worker_in_this_process_runs_the_tasks(broker, tmp_path, threads):
    """With RabbitMQ's broker, which the last case stands for, threads of TaskX run them."""
    with SQLiteRepository(tmp_path / "tasks.db") as repository:
        engine = DramatiqEngine(broker, one_host=True)
        assert not engine.hands_over
        engine.hands_over = threads == "of TaskX"
        queue = Queue(repository, engine=engine)
        queue.executor("add")(lambda a, b: a + b)
        worker = dramatiq.Worker(broker, worker_threads=2, worker_timeout=10)
        worker.start()
        eventually(lambda: [node.workers for node in queue.nodes()] == [2])
        handles = [queue.submit("add", {"a": n, "b": 1}) for n in range(20)]
        assert [handle.result(PATIENCE) for handle in handles] == list(range(1, 21))
        assert ("taskx-ticket" in handles[0].task().worker) is engine.hands_over
        worker.stop()
        assert queue.nodes() == []


def test_rabbitmqs_broker_hands_tickets_over():
    broker = RabbitmqBroker(url="amqp://127.0.0.1:1/")
    assert DramatiqEngine(broker).hands_over
