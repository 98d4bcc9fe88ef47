"""Brokers that fail, lose and double messages, workers that die, and programs of two versions."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import django_project
import pytest
from helpers import PATIENCE, eventually

from engines.conftest import Ground, with_workers
from taskx import TaskStatus
from taskx.node.broker.dispatch import DEPTH

BROKERS = ["celery", "dramatiq"]


@pytest.fixture(params=BROKERS)
def site(request, ground) -> Ground:
    """A ground without workers."""
    made = ground(request.param)
    made.edge()
    return made


@pytest.fixture(scope="module", params=BROKERS)
def crewed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    """A ground with two workers, which the tests of an engine share."""
    with with_workers(request.param, tmp_path_factory.mktemp(request.param)) as ground:
        yield ground


@pytest.fixture
def staffed(crewed: Ground) -> Ground:
    """A ground with two workers and a new queue. The test may stop all of them."""
    crewed.renew()
    if crewed.crew.processes[-1].poll() is not None:
        crewed.crew.start()
    crewed.workers(2)
    return crewed


@contextmanager
def held_up(site: Ground) -> Iterator[None]:
    """Keep both workers busy during a block."""
    words = [f"busy-{uuid.uuid4().hex}" for _ in range(2)]
    gates = [site.hold(word)[1] for word in words]
    try:
        for word in words:
            site.begun(word)
        yield
    finally:
        for free in gates:
            free()


def tickets(site: Ground) -> list[tuple[str, str]]:
    """Return the tickets in the broker of tasks that do not hold up a worker."""
    with site.broker.client() as client:
        if site.engine == "celery":
            found = [json.loads(message)["body"] for message in client.lrange("celery", 0, -1)]
            bodies = [json.loads(b64decode(body))[0] for body in found]
        else:
            messages = client.hgetall("dramatiq:taskx.msgs").values()
            bodies = [json.loads(message)["args"] for message in messages]
    return [(id, type) for id, type in bodies if type != "hold"]


def all_ran_once(site: Ground, handles: list, prefix: str) -> None:
    for handle in handles:
        handle.result(PATIENCE)
    counts = Counter(site.began(prefix))
    assert (len(counts), set(counts.values())) == (len(handles), {1})


def threads(site: Ground, node: str) -> list[str]:
    """Return the names of the threads that TaskX has started in the process of a node."""
    stacks = site.queue.stacks(node, timeout=PATIENCE)
    return sorted(s.thread for s in stacks if s.thread.startswith("taskx-"))


def test_a_worker_process_has_one_thread_beside_those_that_run_tasks(staffed):
    staffed.note("first").result(PATIENCE)
    workers = [node.id for node in staffed.queue.nodes() if node.workers]
    for node in workers:
        eventually(lambda node=node: threads(staffed, node) == ["taskx-housekeeper"])


def test_a_broker_that_is_away_only_delays(staffed):
    assert staffed.note("first").result(PATIENCE)
    staffed.broker.kill()
    handles = [staffed.note(f"away{number}") for number in range(10)]
    assert {handle.task().status for handle in handles} == {TaskStatus.PENDING}
    staffed.broker.start()
    all_ran_once(staffed, handles, "away")


def test_a_broker_that_hangs_holds_up_neither_submit_nor_cancel_nor_stop(staffed):
    assert staffed.note("first").result(PATIENCE)
    running, _ = staffed.hold("held")
    staffed.begun("held")
    staffed.broker.freeze()
    began = time.monotonic()
    [edge] = [node.id for node in staffed.queue.nodes() if node.this]
    handles = [staffed.note(f"later{number}") for number in range(10)]
    assert handles[0].cancel()
    running.cancel()
    eventually(lambda: running.task().status is TaskStatus.CANCELLED)
    assert staffed.queue.stop(timeout=2 * PATIENCE) == []
    assert time.monotonic() - began < PATIENCE
    assert edge not in {handle.task().owner for handle in handles}  # others may send their tickets
    staffed.broker.thaw()
    all_ran_once(staffed, handles[1:], "later")


def test_a_flushed_broker_is_refilled(staffed):
    with held_up(staffed):
        handles = [staffed.note(f"flushed{number}") for number in range(6)]
        eventually(lambda: tickets(staffed))
        staffed.broker.flush()
    all_ran_once(staffed, handles, "flushed")


def test_a_ticket_has_an_id_and_a_type_and_a_backlog_is_not_in_the_broker_twice(staffed):
    with held_up(staffed):
        handles = [staffed.note(f"waits{number:03}") for number in range(100)]
        known = {handle.id for handle in handles}
        found = eventually(lambda: tickets(staffed))
        assert {(id in known, type) for id, type in found} == {(True, "note")}
        for _ in range(3):  # each makes the dispatcher look again
            staffed.queue.submit("add", {"a": 1, "b": 1})
            notes = [id for id, type in tickets(staffed) if type == "note"]
            # Another node sends tickets, too, if the first one has done nothing for a second.
            senders = Counter(staffed.queue.get_task_status(id).owner for id in notes)
            assert max(senders.values(), default=0) <= DEPTH * 2
            assert len(notes) < len(handles) / 2
    all_ran_once(staffed, handles, "waits")


def test_lost_doubled_and_delayed_tickets_start_each_task_once(staffed, monkeypatch):
    engine, sent, late = staffed.engine_of_edge, Counter(), []
    send = engine.send

    def unreliable(ticket):
        sent[ticket.id] += 1
        number = sum(sent.values())
        for _ in range((0, 3, 1, 0)[number % 4]):  # lost, tripled, sent, delayed
            send(ticket)
        if number % 4 == 3:
            late.append(ticket)

    monkeypatch.setattr(engine, "send", unreliable)
    monkeypatch.setattr(engine, "resend", 0.2)
    handles = [staffed.note(f"one{number}") for number in range(15)]
    all_ran_once(staffed, handles, "one")
    for ticket in late:  # its task has ended
        send(ticket)
    engine.disconnect()
    staffed.note("after").result(PATIENCE)
    all_ran_once(staffed, handles, "one")


def test_killed_workers_lose_nothing_on_mongodb(request, ground, mongo_store):
    site = ground("celery", mongo_store)
    site.edge()
    site.crew.start(TOUCH="1")  # the parent has used its connections before it forks
    site.workers(2)
    handles = [site.note(f"task{number}", 0.01) for number in range(30)]
    eventually(lambda: len(site.began("task")) > 5)
    [node, _] = [node.id for node in site.queue.nodes() if node.workers]
    eventually(lambda: threads(site, node) == ["taskx-housekeeper", "taskx-lease"])
    held, free = site.hold("held")
    victim = site.begun("held")
    os.kill(victim, signal.SIGKILL)
    free()
    assert held.result(PATIENCE) != victim
    assert held.task().crashes == 1
    for handle in handles:
        handle.result(PATIENCE)
    again = [task for task in (handle.task() for handle in handles) if task.starts > 1]
    assert len(site.began("task")) <= 30 + len(again)


@pytest.mark.postgres
def test_killed_workers_lose_nothing_on_postgresql(ground, tmp_path, postgres_server):
    """Celery's children get connections of their own to the database of Django."""
    name = postgres_server.new_database()
    store = f"postgresql://127.0.0.1:{postgres_server.port}/{name} {tmp_path / 'run'}"
    site = ground("celery", store)
    django_project.set_up()
    django_project.add_postgres(name, postgres_server.port, name)
    django_project.migrate(name)
    site.edge()
    site.crew.start(TOUCH="1")  # the parent has used its connections before it forks
    site.workers(2)
    held, free = site.hold("held")
    victim = site.begun("held")
    handles = [site.note(f"task{number}") for number in range(10)]
    os.kill(victim, signal.SIGKILL)
    free()
    assert held.result(PATIENCE) != victim
    assert held.task().crashes == 1
    for handle in handles:
        handle.result(PATIENCE)
    assert sorted(site.began("task")) == sorted(f"task{number}" for number in range(10))


def test_two_versions_of_the_program_share_the_broker(site):
    site.crew.start(OLD="1")
    site.workers(2)
    site.queue.declare("new")
    early = site.queue.submit("new")
    assert site.queue.submit("add", {"a": 1, "b": 2}).result(PATIENCE) == 3
    assert early.task().status is TaskStatus.PENDING
    assert site.queue.why(early.id)[0].kind == "no_node"
    site.crew.start()
    site.workers(4)
    handles = [site.queue.submit("new") for _ in range(5)]
    assert [handle.result(PATIENCE) for handle in [early, *handles]] == ["new"] * 6


def test_a_task_submitted_by_an_executor_needs_no_program_that_sends_tickets(staffed):
    """The workers send the tickets themselves when no other node does."""
    handle = staffed.queue.submit("submits", {"log": staffed.log, "word": "inner"}, delay=0.5)
    staffed.queue.stop()
    eventually(lambda: staffed.began("inner"))
    assert handle.task().status in (TaskStatus.RUNNING, TaskStatus.COMPLETED)


def test_workers_that_are_stopped_finish_their_tasks(staffed):
    held, free = staffed.hold("last")
    staffed.begun("last")
    process = staffed.crew.processes[-1]
    process.terminate()
    eventually(lambda: "arm shutdown" in staffed.crew.said() or staffed.engine != "celery")
    free()
    process.wait(PATIENCE)
    assert held.result(PATIENCE)
    assert held.task().starts == 1
    assert [node for node in staffed.queue.nodes() if node.workers] == []
