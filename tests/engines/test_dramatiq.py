"""DramatiqEngine and pika: heartbeats, and the log of pika."""

from __future__ import annotations

import logging
import threading

import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from helpers import PATIENCE

from taskx.contrib.dramatiq import DramatiqEngine


class Connection:
    """A connection that counts what is asked of it."""

    is_open = False

    def __init__(self) -> None:
        self.tended = 0
        self.lost = False

    def process_data_events(self, time_limit: float) -> None:
        self.tended += 1
        if self.lost:
            raise OSError("the connection is lost")


@pytest.fixture
def engine() -> DramatiqEngine:
    return DramatiqEngine(RabbitmqBroker(url="amqp://localhost"), one_host=True)


def test_tending_sends_the_heartbeats_and_drops_a_lost_connection(engine):
    """RabbitMQ closes a connection without heartbeats, and pika logs errors when it is used again."""
    broker, connection = engine._broker, Connection()
    broker.state.connection = connection
    broker.connections.add(connection)
    engine.tend()
    assert connection.tended == 1
    connection.lost = True
    with pytest.raises(OSError, match="lost"):
        engine.tend()
    assert not broker.connections


def test_tasks_get_ten_minutes_at_the_end_if_dramatiq_does_not_wait_for_them(engine, monkeypatch):
    """With Redis, Dramatiq itself has waited for the tasks, which run in its threads."""
    redis = DramatiqEngine(RedisBroker(url="redis://localhost"), one_host=True)
    given = []
    for each in (engine, redis):
        monkeypatch.setattr(each, "end_work", given.append)
        each.end()
    assert given == [600, 10]


def test_pika_is_silent_in_threads_of_taskx_which_tell_of_errors_themselves(engine, caplog):
    logger = logging.getLogger("pika.adapters.blocking_connection")
    threads = [
        threading.Thread(target=logger.error, args=(name,), name=name)
        for name in ("taskx-dispatch", "mine")
    ]
    for thread in threads:
        thread.start()
        thread.join(PATIENCE)
    assert [record.getMessage() for record in caplog.records] == ["mine"]
