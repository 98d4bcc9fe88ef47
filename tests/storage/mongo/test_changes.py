"""Tests of noticing changes by others: with a change stream, or by polling once a second."""

from __future__ import annotations

import threading
import time

import pymongo
import pytest
from helpers import PATIENCE, eventually
from mongo_server import REAL, new_database
from pymongo.change_stream import CollectionChangeStream as Stream

from taskx import Queue, Task, open_repository
from taskx.stores.mongo.documents import MARKS
from taskx.tasks import lifecycle
from taskx.tasks.timing import DEFAULT_TIMING, Timing
from taskx.testing import ManualClock

from .conftest import CommandCount, insert


@pytest.fixture
def url(mongo_server):
    """A server with change streams: a standalone one has none, as with MongoDB."""
    if REAL:
        pytest.skip("the server may not have change streams")
    return mongo_server("set")


def quiet(repository):
    """Wait until the stream is open and all earlier changes were noticed."""
    eventually(lambda: repository._changes._watch and repository._changes._watch.heard > 0)
    eventually(lambda: not repository.changed())


@pytest.fixture
def ours(make, database):
    # On a slow machine a stream may be silent for long, and is not to be opened again.
    repository = make(database, timing=Timing(stream_broken_after=PATIENCE))
    repository.changed()
    quiet(repository)
    repository._changes._poll_interval = 1000.0  # only the stream can notice changes
    return repository


@pytest.fixture
def theirs(make, database):
    return make(database)


def test_changes_by_others_are_noticed_at_once(ours, theirs):
    writes = [
        [insert("a")],
        [lifecycle.take("a", "n")],
        [lifecycle.start(Task(id="a", type="t"), 1, "n")],
        [lifecycle.cancel("a", 2)[-1]],
    ]
    for some in writes:
        assert list(theirs.apply(some)) == [True]
        eventually(ours.changed)
        quiet(ours)


def test_own_writes_are_not_noticed(ours, theirs):
    """Otherwise a busy node would poll for others' work all the time."""
    ours.apply([insert(str(number)) for number in range(5)])
    ours.apply([insert(f"{number} of a batch") for number in range(5)], all_or_nothing=True)
    for _ in range(MARKS):  # so that the list of marks becomes full
        ours.apply([lifecycle.take(str(number), "n") for number in range(5)])
        ours.apply([lifecycle.free(str(number), "n") for number in range(5)])
    ours.apply([insert("b"), *(lifecycle.take(str(number), "n") for number in range(5))])
    told = []
    ring, ours._changes.ring = ours._changes.ring, lambda: (told.append(1), ring())
    theirs.apply([insert("last")])
    eventually(ours.changed)
    assert told == [1]


def test_queues_on_one_repository_hear_of_each_other(ours):
    queues = [Queue(ours), Queue(ours)]
    ours.apply([insert("a")])
    eventually(ours.changed)
    assert len(ours.queues) == len(queues)


def test_a_task_of_the_original_is_noticed(ours, database):
    database.tasks.insert_one({"_id": "go", "type": "t", "status": "pending"})
    eventually(ours.changed)


@pytest.mark.parametrize(
    "change", [{"$set": {"params.\u043a\u043b\u044e\u0447": 1}}, {"$unset": {"message": ""}}, None]
)
def test_a_change_by_others_in_an_own_task_is_noticed(ours, database, change):
    """Even if the last mark on the task is an own one."""
    ours.apply([insert("a")])
    quiet(ours)
    if change is None:
        document = database.tasks.find_one({"_id": "a"})
        database.tasks.replace_one({"_id": "a"}, {**document, "message": "said"})
    else:
        database.tasks.update_one({"_id": "a"}, change)
    eventually(ours.changed)


def test_own_writes_do_not_cause_many_requests_for_changes(url, database, make):
    """The stream filters them out and waits, or the client pauses between two requests."""
    count = CommandCount()
    with pymongo.MongoClient(url, event_listeners=[count]) as client:
        repository = make(client[database.name])
        repository.changed()
        quiet(repository)
        count.names.clear()
        began = time.monotonic()
        for number in range(100):
            repository.apply([insert(str(number))])
        asked, took = count.names.count("getMore"), time.monotonic() - began
        assert asked <= 2 + took / DEFAULT_TIMING.change_every
        repository.close()


def test_without_a_stream_the_version_changes_once_in_an_interval(make, mock):
    clock = ManualClock()
    repository = make(mock, poll_interval=1.0, clock=clock)
    assert repository.changed()
    eventually(lambda: not repository._changes._can_watch)
    answers = []
    for _ in range(24):
        clock.advance(0.125)
        answers.append(repository.changed())
    assert answers.count(True) == 3


def test_a_standalone_server_is_asked_for_a_stream_only_once(mongo_server, make):
    if REAL:
        pytest.skip("the server may not have change streams")
    database = new_database(mongo_server("standalone"))
    repository = make(database)
    assert repository.changed()
    eventually(lambda: not repository._changes._can_watch)
    assert repository._changes._watch.ended
    repository._changes._poll_interval = 0.0
    eventually(repository.changed)


def test_a_silent_stream_is_replaced_by_polling(through, proxy):
    """The connection is dead without an error, so the version changes once in an interval."""
    clock = ManualClock()
    repository = through(clock=clock)
    repository.apply([insert("a")])
    repository.changed()
    quiet(repository)
    proxy.judge = lambda direction, piece: False
    clock.advance(2.5)
    assert not repository.changed()
    eventually(lambda: clock.advance(1.0) or repository.changed())  # a last answer may have come
    assert not repository.changed()
    clock.advance(1.0)
    assert repository.changed()
    proxy.heal()


def test_the_stream_comes_back_after_an_outage(through, proxy, database, make):
    repository, theirs = through(), make(database)
    repository.changed()
    quiet(repository)
    repository._changes._poll_interval = 1000.0
    proxy.cut()
    theirs.apply([insert("a")])
    eventually(repository.changed)


def test_a_stream_that_fails_is_opened_again(ours, theirs, monkeypatch):
    """The server has lost the history that it would need to go on, for example."""
    streams, try_next = [], Stream.try_next

    def fail_in_the_first(stream):
        if stream not in streams:
            streams.append(stream)
        if stream is streams[0]:
            raise pymongo.errors.OperationFailure("the history is lost", 286)
        return try_next(stream)

    monkeypatch.setattr(Stream, "try_next", fail_in_the_first)
    eventually(lambda: len(streams) == 2)
    quiet(ours)
    theirs.apply([insert("a")])
    eventually(ours.changed)
    assert ours._changes._can_watch


def test_closing_the_repository_ends_the_thread(ours):
    watch = ours._changes._watch
    ours.close()
    eventually(lambda: watch.ended)


def test_the_thread_ends_without_an_error_if_the_driver_refuses_the_url():
    repository = open_repository("mongodb://host:port/db")
    repository.version()
    eventually(lambda: not any(t.name == "taskx-changes" for t in threading.enumerate()))
