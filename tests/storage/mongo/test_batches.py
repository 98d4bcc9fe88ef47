"""Tests of ``submit_many``: in a transaction, or hidden until one write commits all tasks."""

from __future__ import annotations

import threading
import time
from functools import partial

import pymongo
import pytest
from helpers import held_on, key_holders, parts_of, those_with
from mongo_server import PATIENCE, REAL

from taskx import Queue, RepositoryUnavailable, Task, TaskFilter, TaskStatus
from taskx.node.housekeeper import unfinished
from taskx.node.retention import needed
from taskx.stores.mongo.batches import Batches
from taskx.stores.queries import owners
from taskx.tasks import lifecycle
from taskx.tasks.timing import Timing

from .conftest import CommandCount, insert, sent_in_vain

IDS = [f"b{number}" for number in range(5)]


@pytest.fixture
def store(make, mock):
    return make(mock)


class Died(BaseException):
    """The simulated death of the process."""


def die_at(monkeypatch, store, step):
    """Store a batch in a process that dies before a step."""

    def die(*args):
        raise Died

    monkeypatch.setattr(store._batches, step, die)
    monkeypatch.setattr(store._batches, "_discard", lambda batch: None)
    with pytest.raises(Died):
        store.apply([keyed(task_id, owner="n") for task_id in IDS], all_or_nothing=True)


def keyed(task_id, **options):
    return insert(task_id, unique_key=f"key {task_id}", unique_scope="unfinished", **options)


def seen(store):
    """Return the ids that each query finds."""
    ways = {
        "list": {task.id for task in store.list(TaskFilter())},
        "get_many": set(store.get_many(IDS)),
        "owned": set(held_on(store, "n")),
        "statuses": set(store.statuses(IDS)),
        "keys": set(key_holders(store, [f"key {task_id}" for task_id in IDS]).values()),
    }
    assert store.count(TaskFilter()) == len(ways["list"])
    return ways


class TestASubmitterThatDied:
    def test_a_death_before_the_commit_leaves_nothing_visible(self, store, monkeypatch, mock):
        die_at(monkeypatch, store, "_commit")
        assert set().union(*seen(store).values()) == set()
        assert owners(store) == []
        assert not unfinished(store, ["t"])
        assert not any(store.apply(lifecycle.cancel("b0", 1)))
        assert mock.tasks.count_documents({}) == 5

    def test_a_death_after_the_commit_leaves_all_tasks_visible(
        self, store, monkeypatch, make, mock
    ):
        """Each query reveals them."""
        die_at(monkeypatch, store, "_reveal")
        for query in (
            lambda other: other.get_many(IDS[:1]),
            lambda other: other.list(TaskFilter(limit=1)),
            lambda other: other.count(TaskFilter()),
            lambda other: other.ready(["t"], 1),
            lambda other: other.statuses(IDS[:1]),
            lambda other: key_holders(other, ["key b0"]),
        ):
            mock.tasks.update_many({}, {"$set": {"taskx.batch": "again"}})
            mock["tasks.batches"].insert_one({"_id": "again", "committed": True})
            other = make(mock)
            query(other)
            assert all(found == set(IDS) for found in seen(other).values())
            assert mock["tasks.batches"].find_one({"_id": "again"}) is None

    def test_a_hidden_parent_counts_as_present_for_its_revealed_child(
        self, store, monkeypatch, make, mock
    ):
        """Documents are revealed one by one: a node that finds the child must also find the parent."""
        tasks = [Task(id="p", type="t"), Task(id="c", type="t", depends_on=["p"])]
        queue, onlooker = Queue(store), Queue(make(mock))
        queue.declare("t")
        reveal = store._batches._reveal

        def half(batch):
            one = {"_id": "c", "taskx.batch": batch}
            mock.tasks.update_one(one, {"$unset": {"taskx.batch": ""}})
            monkeypatch.setattr(store._batches, "_reveal", reveal)
            parts_of(onlooker).moves.dependents.process()

        monkeypatch.setattr(store._batches, "_reveal", half)
        handles = queue.submit_many(tasks)
        assert [handle.task().status for handle in handles] == ["pending", "pending"]
        assert those_with(store, "waiting_on", "p") == ["c"]

    def test_a_parent_of_a_hidden_child_is_not_pruned(self, store, monkeypatch):
        """The child may soon be visible, and read the parent's result."""
        queue = Queue(store)
        queue.declare("t")
        queue.submit("t", id="p")
        for status in ("running", "completed"):
            store.update_status("p", TaskStatus(status))
        moment = store.get_by_id("p").completed_at.timestamp() * 1000 + 1000
        assert [task.stub.id for task in store.ended("completed", moment, 9)] == ["p"]
        assert needed(store, ["p"]) == set()
        monkeypatch.setattr(store._batches, "_reveal", lambda batch: None)
        queue.submit_many([Task(type="t", depends_on=["p"]), Task(type="t")])
        assert needed(store, ["p"]) == {"p"}

    def test_hidden_tasks_of_a_dead_submitter_are_removed_after_a_while(
        self, store, monkeypatch, mock
    ):
        """The time is measured by the clock of the process that removes them."""
        die_at(monkeypatch, store, "_commit")
        now = [100.0]
        patient = Batches(store._connection, 10.0, lambda: now[0])
        patient.recover()
        now[0] += 9.9
        patient.recover()
        assert mock.tasks.count_documents({}) == 5
        now[0] += 0.1
        patient.recover()
        assert mock.tasks.count_documents({}) == 0
        assert list(store.apply([insert(task_id) for task_id in IDS])) == [True] * 5

    def test_a_slow_submitter_hears_that_its_batch_was_abandoned(self, store, monkeypatch, mock):
        """The first of commit and abandon decides, so no batch is stored in part."""
        commit = store._batches._commit

        def late(batch):
            Batches(store._connection, 0.0, time.monotonic).recover()
            commit(batch)

        monkeypatch.setattr(store._batches, "_commit", late)
        with pytest.raises(RepositoryUnavailable, match="abandoned"):
            store.apply([insert(task_id) for task_id in IDS], all_or_nothing=True)
        assert mock.tasks.count_documents({}) == 0

    @pytest.mark.parametrize("together", [False, True])
    def test_hidden_tasks_of_a_dead_submitter_block_no_id(
        self, store, monkeypatch, make, mock, together
    ):
        """A caller who hears that an id is taken must find the task."""
        die_at(monkeypatch, store, "_commit")
        other = make(mock, timing=Timing(abandon_after=0.0))
        again = [insert(task_id) for task_id in IDS[:2]]
        assert list(other.apply(again, all_or_nothing=together)) == [True, True]
        assert set(other.get_many(IDS)) == set(IDS[:2])
        assert mock.tasks.count_documents({}) == 2

    def test_committed_tasks_of_a_dead_submitter_keep_their_ids(
        self, store, monkeypatch, make, mock
    ):
        die_at(monkeypatch, store, "_reveal")
        other = make(mock)
        assert list(other.apply([insert("b0"), insert("new")])) == [False, True]
        assert seen(other)["list"] == {*IDS, "new"}

    def test_tasks_of_the_original_keep_their_ids(self, store, mock):
        mock.tasks.insert_one({"_id": "b0", "type": "t", "status": "pending", "params": {}})
        assert list(store.apply([insert("b0"), insert("b1")])) == [False, True]

    def test_an_insert_waits_for_a_batch_that_holds_its_id(self, store, monkeypatch, make, mock):
        """The batch came first, so the insert is the duplicate."""
        asked = threading.Event()
        other = make(mock, timing=Timing(abandon_after=PATIENCE))
        results = []
        late = threading.Thread(target=lambda: results.extend(other.apply([insert("b0")])))
        commit = store._batches._commit

        def slow(batch):
            late.start()
            assert asked.wait(PATIENCE)
            commit(batch)

        make_way = other._batches.make_way
        answered = lambda *args: (make_way(*args), asked.set())[0]  # noqa: E731
        monkeypatch.setattr(other._batches, "make_way", answered)
        monkeypatch.setattr(store._batches, "_commit", slow)
        writes = [insert(task_id) for task_id in IDS]
        assert list(store.apply(writes, all_or_nothing=True)) == [True] * 5
        late.join(PATIENCE)
        assert results == [False]

    def test_tasks_that_are_revealed_during_a_query_are_found(self, store, monkeypatch, make, mock):
        die_at(monkeypatch, store, "_reveal")
        other, third = make(mock), make(mock)
        reveal = other._batches.reveal_committed

        def late(hidden):
            third._batches.reveal_committed(hidden)
            return reveal(hidden)

        monkeypatch.setattr(other._batches, "reveal_committed", late)
        assert set(other.get_many(IDS)) == set(IDS)

    def test_a_committed_batch_is_never_abandoned(self, store, monkeypatch, mock):
        die_at(monkeypatch, store, "_reveal")
        Batches(store._connection, 0.0, time.monotonic).recover()
        assert all(found == set(IDS) for found in seen(store).values())


class TestOnAServer:
    def test_a_commit_whose_answer_is_lost_counts(self, through, proxy):
        repository = through()
        repository.apply([insert("warm")])
        asked = threading.Event()

        def judge(direction, piece):
            if direction == "ask" and b"committed" in piece:
                asked.set()
            elif direction == "answer" and asked.is_set():
                proxy.heal()
                return False
            return True

        proxy.judge = judge
        writes = [insert(task_id) for task_id in IDS]
        assert list(repository.apply(writes, all_or_nothing=True)) == [True] * 5
        assert asked.is_set()
        assert repository.count(TaskFilter()) == 6

    def test_a_commit_that_stays_in_doubt_says_so(self, through, proxy):
        repository = through()
        repository.apply([insert("warm")])
        repository._connection.timeout = 1.0
        writes = [insert(task_id) for task_id in IDS]
        store = partial(repository.apply, writes, all_or_nothing=True)
        assert sent_in_vain(proxy, "answer", [b"committed"], store).in_doubt

    def test_a_reader_beside_many_batches_reveals_none_too_soon(self, make, database):
        """And nothing of the batches is left over."""
        ours, theirs = make(database), make(database)
        failures: list[str] = []
        stop = threading.Event()

        def read():
            while not stop.is_set():
                theirs.list(TaskFilter())
                if theirs.get_many(["refused-0"]):
                    failures.append("a task of a batch that was refused was seen")

        thread = threading.Thread(target=read)
        thread.start()
        ours.apply([insert("taken")])
        for number in range(6):
            writes = [insert(f"{number}-{i}") for i in range(5)]
            assert all(ours.apply(writes, all_or_nothing=True))
            refused = [insert("refused-0"), insert("taken")]
            assert list(ours.apply(refused, all_or_nothing=True)) == [True, False]
        stop.set()
        thread.join()
        assert failures == []
        assert theirs.count(TaskFilter()) == 31
        assert len(theirs.list(TaskFilter())) == 31
        assert database["tasks.batches"].count_documents({}) == 0


class TestInATransaction:
    """On a server with transactions no task is hidden."""

    @pytest.fixture
    def url(self, mongo_server):
        if REAL:
            pytest.skip("the server may not support transactions")
        return mongo_server("set")

    @pytest.fixture
    def counted(self, url, database, make):
        """A repository, and the commands that it sends after its first write."""
        count = CommandCount()
        with pymongo.MongoClient(url, event_listeners=[count]) as client:
            repository = make(client[database.name])
            repository.apply([insert("warm")])
            count.names.clear()
            yield repository, count.names

    def test_a_batch_takes_two_round_trips(self, counted, database):
        repository, sent = counted
        writes = [insert(task_id) for task_id in IDS]
        assert list(repository.apply(writes, all_or_nothing=True)) == [True] * 5
        assert sent == ["insert", "commitTransaction"]
        assert repository.count(TaskFilter()) == 6
        assert not any("batch" in document["taskx"] for document in database.tasks.find())

    def test_a_client_that_reads_from_secondaries_can_store_a_batch(self, url, database, make):
        options = "readPreference=secondaryPreferred&w=1&readConcernLevel=available"
        with pymongo.MongoClient(f"{url}/?{options}") as client:
            writes = [insert(task_id) for task_id in IDS]
            assert (
                list(make(client[database.name]).apply(writes, all_or_nothing=True)) == [True] * 5
            )

    def test_the_change_stream_ignores_own_batches(self, repository, make, database):
        repository.apply([insert(task_id) for task_id in IDS], all_or_nothing=True)
        with database.tasks.watch() as stream:
            repository.apply([insert(f"c{task_id}") for task_id in IDS], all_or_nothing=True)
            changes = [stream.next() for _ in IDS]
        marks = [change["fullDocument"]["taskx"]["w"][-1] for change in changes]
        assert all(mark in repository._sender.own for mark in marks)

    @pytest.mark.parametrize("taken", ["an id", "a key", "an id of its own"])
    def test_if_one_task_is_refused_none_is_stored(self, repository, database, taken):
        key = {"unique_key": "k", "unique_scope": "unfinished"}
        repository.apply([insert("there", **key)])
        refused = {
            "an id": insert("there"),
            "a key": insert("new", **key),
            "an id of its own": insert("b0"),
        }[taken]
        writes = [*(insert(task_id) for task_id in IDS), refused]
        assert list(repository.apply(writes, all_or_nothing=True)) == [True] * 5 + [False]
        assert [document["_id"] for document in database.tasks.find()] == ["there"]
        assert list(repository.apply(writes[:5], all_or_nothing=True)) == [True] * 5

    def test_only_one_of_two_submitters_stores_the_same_batch(self, make, database):
        """Even if one of them sees the other's transaction."""
        stores, barrier = [make(database), make(database)], threading.Barrier(2)
        for number in range(5):
            results: list[list[bool]] = []

            def store(repository, number=number, results=results):
                writes = [insert(f"{number}-{i}") for i in range(20)]
                barrier.wait()
                results.append(list(repository.apply(writes, all_or_nothing=True)))

            threads = [threading.Thread(target=store, args=(each,)) for each in stores]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(all(held) for held in results) == [False, True]
        assert stores[0].count(TaskFilter()) == 100

    @pytest.mark.parametrize("command", [b"insert\0", b"commitTransaction\0"])
    @pytest.mark.parametrize("direction", ["ask", "answer"])
    def test_a_lost_command_is_sent_again(self, through, proxy, database, command, direction):
        repository = through()
        repository.apply([insert("warm")])
        asked: set[bytes] = set()
        lost = threading.Event()

        def judge(way, piece):
            if way == "ask" and command in piece:
                asked.add(piece[4:8])
            header = piece[4:8] if direction == "ask" else piece[8:12]
            if way == direction and header in asked and not lost.is_set():
                lost.set()
                proxy.cut()
                return False
            return True

        proxy.judge = judge
        writes = [insert(task_id) for task_id in IDS]
        assert list(repository.apply(writes, all_or_nothing=True)) == [True] * 5
        assert lost.is_set()
        assert sorted(document["_id"] for document in database.tasks.find()) == [*IDS, "warm"]

    def test_a_commit_that_stays_in_doubt_says_so(self, through, proxy):
        """If the same objects are sent again later, they are not stored twice."""
        repository = through()
        repository.apply([insert("warm")])
        repository._connection.timeout = 1.0
        writes = [insert(task_id) for task_id in IDS]
        store = partial(repository.apply, writes, all_or_nothing=True)
        assert sent_in_vain(proxy, "answer", [b"commitTransaction\0"], store).in_doubt
        proxy.heal()
        repository._connection.timeout = PATIENCE
        assert list(store()) == [True] * 5
        assert repository.count(TaskFilter()) == 6

    def test_an_open_transaction_does_not_block_others(self, through, proxy, database, make):
        """The server rolls it back later."""
        repository = through()
        repository.apply([insert("warm")])
        repository._connection.timeout = 1.0
        writes = [insert(task_id) for task_id in IDS]
        store = partial(repository.apply, writes, all_or_nothing=True)
        assert sent_in_vain(proxy, "ask", [b"commitTransaction\0"], store).in_doubt
        other = make(database)
        assert list(other.apply([insert("c0"), insert("c1")], all_or_nothing=True)) == [True, True]
        assert other.apply([insert("d0"), *lifecycle.cancel("c0", 1)])
        pending = other.list(TaskFilter(status="pending"))
        assert {task.id for task in pending} == {"c1", "d0", "warm"}

    def test_an_error_before_anything_was_sent_is_not_in_doubt(self, through, proxy):
        repository = through()
        repository.apply([insert("warm")])
        repository._connection.timeout = 0.5
        proxy.cut(refuse=True)
        with pytest.raises(RepositoryUnavailable) as caught:
            repository.apply([insert(task_id) for task_id in IDS], all_or_nothing=True)
        assert not caught.value.in_doubt
        proxy.heal()  # the client sends a message when it closes

    def test_an_interrupted_batch_stores_nothing(self, repository, database, monkeypatch):
        def interrupted(*args):
            raise KeyboardInterrupt

        writes = [insert(task_id) for task_id in IDS]
        with monkeypatch.context() as patch:
            patch.setattr(pymongo.client_session.ClientSession, "commit_transaction", interrupted)
            with pytest.raises(KeyboardInterrupt):
                repository.apply(writes, all_or_nothing=True)
        assert database.tasks.count_documents({}) == 0
        assert list(repository.apply(writes, all_or_nothing=True)) == [True] * 5


def test_on_a_standalone_server_tasks_are_hidden_first(make, database, url):
    """A standalone server does not support transactions."""
    count = CommandCount()
    with pymongo.MongoClient(url, event_listeners=[count]) as client:
        repository = make(client[database.name])
        repository.apply([insert("warm")])
        count.names.clear()
        writes = [insert(task_id) for task_id in IDS]
        assert list(repository.apply(writes, all_or_nothing=True)) == [True] * 5
        assert count.names == ["insert", "insert", "update", "delete"]
