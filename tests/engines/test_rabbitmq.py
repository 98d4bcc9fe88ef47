"""RabbitMQ: no message is held for a task that runs, and a server that dies costs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from helpers import PATIENCE
from kinds import NO_RABBITMQ

from engines.conftest import Ground
from engines.servers import RABBITMQ, Rabbit
from taskx import TaskStatus

pytestmark = pytest.mark.skipif(not RABBITMQ.exists(), reason=NO_RABBITMQ)


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rabbit]:
    server = Rabbit(tmp_path_factory.mktemp("rabbit"))
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture(params=["celery", "dramatiq"])
def site(request, tmp_path, rabbit) -> Iterator[Ground]:
    made = Ground(request.param, tmp_path, rabbit)
    made.edge()
    made.crew.start()
    made.workers(2)
    yield made
    made.close()


def test_a_server_that_is_killed_while_tasks_run_starts_none_of_them_again(site, rabbit):
    early = [site.note(f"early{number}") for number in range(20)]
    for handle in early:
        handle.result(PATIENCE)
    held, free = site.hold("held")
    site.begun("held")
    if site.engine == "dramatiq":  # the actor has returned, and its message is acknowledged
        assert "taskx-ticket" in held.task().worker
    rabbit.kill()
    late = [site.note(f"late{number}") for number in range(10)]
    assert {handle.task().status for handle in late} == {TaskStatus.PENDING}
    rabbit.start()
    free()
    for handle in [held, *late]:
        handle.result(PATIENCE)
    assert held.task().starts == 1
    assert set(Counter([*site.began("early"), *site.began("late")]).values()) == {1}


def test_a_server_that_was_restarted_between_two_tasks_is_not_told_as_a_failure(
    site, rabbit, caplog
):
    assert site.note("before").result(PATIENCE)
    rabbit.kill()
    rabbit.start()
    assert site.note("after").result(PATIENCE)
    if site.engine == "celery":  # pika's heartbeats tell of the time without a server
        assert "cannot be used" not in caplog.text
