"""Tests of guarded writes: their round trips, and that each is applied once on any network."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from functools import partial

import pymongo
import pytest
from helpers import PATIENCE, SOON, eventually, held_on
from mongo_proxy import swallowing
from mongo_server import REAL, free_port

from taskx import (
    ConfigurationError,
    PayloadError,
    RepositoryUnavailable,
    Task,
    TaskFilter,
    TaskStatus,
)
from taskx.stores.mongo.sender import _SMALL
from taskx.stores.queries import shown
from taskx.tasks import lifecycle, payload
from taskx.tasks.writes import NoteChange, Update

from .conftest import CommandCount, insert, run, sent_in_vain

NOW = 1_700_000_000_000
FINE = lifecycle.Ending(returned=True, result="1")


@pytest.fixture(params=["standalone", "set"])
def url(request, mongo_server):
    """A server of each kind: on a replica set the driver itself repeats lost commands."""
    if REAL and request.param == "set":
        pytest.skip("the only real server has run the test already")
    return mongo_server(request.param)


@pytest.fixture
def counted(url, database, make):
    """A repository, and the commands that it sends after its first write."""
    count = CommandCount()
    with pymongo.MongoClient(url, event_listeners=[count]) as client:
        repository = make(client[database.name])
        repository.apply([insert("warm")])
        count.names.clear()
        yield repository, count.names


class TestTrips:
    """Round trips are expensive: the server may be on another host."""

    def test_a_submit_takes_one_round_trip(self, counted):
        repository, sent = counted
        repository.create(Task(id="a", type="t"))
        assert sent == ["insert"]

    def test_writes_to_many_tasks_take_one_round_trip(self, counted):
        repository, sent = counted
        tasks = [run(repository, str(number)) for number in range(20)]
        sent.clear()
        writes = [write for task in tasks for write in lifecycle.conclude(task, FINE, NOW)]
        assert repository.apply(writes) == [True] * 20
        assert sent == ["update"]

    def test_new_notes_take_one_round_trip(self, counted):
        repository, sent = counted
        repository.put_notes([NoteChange("b", "known", 0)])
        sent.clear()
        changes = [NoteChange(name, f"new {name}", 0) for name in "abc"]
        assert repository.put_notes(changes) == [True, False, True]
        assert sent == ["insert"]
        known = repository.notes("")
        assert [note.text for note in known.values()] == ["new a", "known", "new c"]
        mixed = [NoteChange("d", "new d", 0), *(NoteChange(n, "", known[n].version) for n in "ab")]
        assert repository.put_note("b", "changed", known["b"].version)
        assert repository.put_notes(mixed) == [True, True, False]

    def test_a_submit_with_writes_to_other_tasks_takes_one_round_trip(self, counted):
        repository, sent = counted
        task = run(repository, "a")
        sent.clear()
        finish = lifecycle.conclude(task, FINE, NOW)
        assert repository.apply([insert("b", priority=7), *finish, insert("c")]) == [True] * 3
        assert sent == ["update"]
        assert repository.get_by_id("a").status is TaskStatus.COMPLETED
        assert repository.get_by_id("b").priority == 7

    def test_a_taken_id_is_refused_among_writes_to_other_tasks(self, counted):
        repository, _ = counted
        task = run(repository, "a")
        run(repository, "b")
        writes = [insert("b"), *lifecycle.conclude(task, FINE, NOW), insert("c")]
        assert repository.apply(writes) == [False, True, True]
        assert repository.get_by_id("b").status is TaskStatus.RUNNING

    def test_a_taken_key_is_refused_among_writes_to_other_tasks(self, counted):
        repository, _ = counted
        key = {"unique_key": "k", "unique_scope": "unfinished"}
        repository.apply([insert("k", **key)])
        task = run(repository, "a")
        writes = [insert("b", **key), *lifecycle.conclude(task, FINE, NOW), insert("c")]
        assert repository.apply(writes) == [False, True, True]
        assert not repository.get_many(["b"])

    def test_a_new_task_that_is_sent_again_does_not_count_as_an_update(self, counted, monkeypatch):
        """The task is found, but an update that finds no document was still not applied."""
        repository, _ = counted
        writes = [insert("b"), lifecycle.take("nobody", "n")]
        with monkeypatch.context() as patch:
            patch.setattr(repository._sender, "_confirm_by_marks", interrupt)
            with pytest.raises(KeyboardInterrupt):
                repository.apply(writes)
        assert repository.apply(writes) == [True, False]

    def test_a_task_with_large_params_is_sent_separately(self, counted):
        repository, sent = counted
        task = run(repository, "a")
        sent.clear()
        params = payload.encode({"x": "x" * _SMALL}, "params", payload.NO_LIMIT)
        large = insert("b", params=params)
        assert repository.apply([large, *lifecycle.conclude(task, FINE, NOW)]) == [True, True]
        assert sent == ["insert", "update"]

    def test_alternatives_whose_first_holds_take_one_round_trip(self, counted):
        repository, sent = counted
        task = run(repository, "a")
        sent.clear()
        assert repository.apply(lifecycle.hand_back(task, NOW)) == [True, False]
        assert sent == ["update"]

    def test_writes_of_which_some_fail_cost_one_more_read(self, counted):
        repository, sent = counted
        for number in range(20):
            repository.apply([insert(str(number))])
        run(repository, "runs")
        sent.clear()
        writes = [lifecycle.take(str(number), "n") for number in range(20)]
        writes.insert(7, lifecycle.take("runs", "n"))
        writes.insert(3, lifecycle.take("nobody", "n"))
        results = repository.apply(writes)
        assert [i for i, held in enumerate(results) if not held] == [3, 8]
        assert sent == ["update", "find"]


def interrupt(*args):
    raise KeyboardInterrupt


class TestSeveralOfOneTask:
    """Several writes to one task in one batch: each is applied, in order."""

    def test_a_request_to_cancel_and_an_outcome_are_both_applied(self, repository):
        """If both had the same mark, the outcome would be mistaken for the request."""
        task = run(repository, "a")
        other = run(repository, "b")
        asked = lifecycle.cancel("a", NOW)
        outcomes = [*lifecycle.conclude(other, FINE, NOW), *lifecycle.conclude(task, FINE, NOW)]
        held = list(repository.apply([*asked, *outcomes]))
        assert held == [False, False, False, True, True, True]
        task = repository.get_by_id("a")
        assert (task.status, task.result) == (TaskStatus.COMPLETED, 1)
        assert task.cancel_requested_at is not None

    @pytest.mark.parametrize("lost", ["before the first", "between the two"])
    def test_writes_that_are_sent_again_are_applied_once(
        self, repository, database, monkeypatch, lost
    ):
        """The error did not tell which of them were applied."""
        writes = [Update("a", {}, {"message": "said"}), Update("a", {}, {"progress": 7})]
        run(repository, "a")
        send, left = repository._sender._send, [0 if lost == "before the first" else 1]

        def failing(ops):
            if not left[0]:
                raise RepositoryUnavailable("lost")
            left[0] -= 1
            return send(ops)

        with monkeypatch.context() as patch:
            patch.setattr(repository._sender, "_send", failing)
            with pytest.raises(RepositoryUnavailable):
                repository.apply(writes)
        assert list(repository.apply(writes)) == [True, True]
        document = database.tasks.find_one({"_id": "a"})
        assert (document["message"], document["progress"]) == ("said", 7)
        marks = document["taskx"]["w"]
        assert len(marks) == len(set(marks)) == 4


class TestManyAtOnce:
    def test_nodes_that_compete_for_tasks_never_get_the_same_one(self, repository):
        """Each node gets exactly those tasks that have its marks."""
        ids = [str(number) for number in range(60)]
        repository.apply([insert(task_id) for task_id in ids])
        won: dict[str, list[str]] = {}
        barrier = threading.Barrier(4)

        def take(node):
            barrier.wait()
            won[node] = []
            for start in range(0, 60, 10):
                some = ids[start : start + 10]
                held = repository.apply([lifecycle.take(task_id, node) for task_id in some])
                won[node] += [task_id for task_id, mine in zip(some, held, strict=True) if mine]

        threads = [threading.Thread(target=take, args=(f"n{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(task_id for mine in won.values() for task_id in mine) == sorted(ids)
        for node, mine in won.items():
            assert sorted(held_on(repository, node)) == sorted(mine)


WRITES = {
    "insert": lambda repository: [insert("new", owner="n")],
    "start": lambda repository: [lifecycle.start(repository.get_by_id("p"), NOW, "n")],
    "conclude": lambda repository: lifecycle.conclude(repository.get_by_id("r"), FINE, NOW),
    "delete": lambda repository: [lifecycle.delete("p")],
    "insert of a key": lambda repository: [insert("new", unique_key="n", unique_scope="ever")],
    "several alike": lambda repository: [
        lifecycle.take(task_id, "n") for task_id in ("p", "nobody", "q", "r")
    ],
    "requeue of a key": lambda repository: [lifecycle.requeue(repository.get_by_id("c"), NOW)],
    "all of them": lambda repository: [
        insert("new"),
        *lifecycle.conclude(repository.get_by_id("r"), FINE, NOW),
        lifecycle.take("p", "n"),
        lifecycle.take("nobody", "n"),
        insert("r"),
    ],
}
HELD = {
    "all of them": [True, True, True, False, False],
    "several alike": [True, False, True, False],
}
#: The names of the write commands in the messages to the server.
COMMANDS = (b"insert\0", b"update\0", b"delete\0")


class TestAlikeWrites:
    """Equal changes of several tasks are one statement; each task has its own guard."""

    @pytest.fixture
    def statements(self, url, database, make):
        """A repository, and the number of statements in each of its commands."""
        sent = []

        class Listener(CommandCount):
            def started(self, event):
                sent.append(len(event.command.get("updates", ())))

        with pymongo.MongoClient(url, event_listeners=[Listener()]) as client:
            repository = make(client[database.name])
            repository.apply([insert("warm")])
            yield repository, sent

    def test_equal_changes_are_one_statement(self, statements):
        repository, sent = statements
        ids = [str(number) for number in range(20)]
        repository.apply([insert(task_id) for task_id in ids])
        tasks = repository.get_many(ids)
        sent.clear()
        starts = [lifecycle.start(tasks[task_id], NOW, "n") for task_id in ids]
        assert list(repository.apply(starts)) == [True] * 20
        assert sent == [1]
        assert {(t.status, t.starts) for t in repository.get_many(ids).values()} == {("running", 1)}

    def test_equal_changes_share_a_command_with_other_writes(self, statements):
        repository, sent = statements
        tasks = [run(repository, str(number)) for number in range(3)]
        repository.apply([insert("a"), insert("b")])
        sent.clear()
        ends = [write for task in tasks for write in lifecycle.conclude(task, FINE, NOW)]
        writes = [lifecycle.take("a", "n"), *ends, insert("c"), lifecycle.take("b", "n")]
        assert list(repository.apply(writes)) == [True] * 6
        assert len(sent) == 1
        assert sorted(held_on(repository, "n")) == ["a", "b"]

    def test_the_same_write_twice_is_applied_twice(self, statements):
        repository, _ = statements
        repository.apply([insert("a"), insert("b")])
        to_n, back = lifecycle.take("a", "n"), lifecycle.free("a", "n")
        again = [lifecycle.take("a", "n"), lifecycle.take("b", "n"), lifecycle.take("b", "n")]
        assert list(repository.apply([to_n, back, *again])) == [True] * 4 + [False]
        assert sorted(held_on(repository, "n")) == ["a", "b"]

    def test_a_task_whose_key_is_taken_does_not_stop_others(self, statements):
        repository, _ = statements
        for number in range(3):
            key = {"unique_key": f"k{number}", "unique_scope": "unfinished"}
            repository.apply([insert(str(number), **key)])
            repository.apply(lifecycle.cancel(str(number), NOW))
        repository.apply([insert("holder", unique_key="k1", unique_scope="unfinished")])
        cancelled = repository.get_many(["0", "1", "2"])
        again = [lifecycle.requeue(cancelled[str(number)], NOW) for number in range(3)]
        assert list(repository.apply(again)) == [True, False, True]


class TestAnswersThatAreLost:
    """A write that was sent may have been applied: its outcome is found out, not guessed."""

    @pytest.fixture
    def prepared(self, repository):
        repository.apply([insert("p"), insert("c", unique_key="k", unique_scope="ever")])
        repository.apply([insert("q")])
        repository.apply(lifecycle.cancel("c", NOW))
        run(repository, "r")
        return repository

    def losing(self, proxy, times=1):
        """Cut the connection when the answer to a write comes back, ``times`` times.

        The headers tell which answer belongs to which request, because other messages pass, too.
        """
        asked, left = set(), [times]

        def judge(direction, piece):
            if direction == "ask" and any(command in piece for command in COMMANDS):
                asked.add(piece[4:8])
            elif direction == "answer" and piece[8:12] in asked and left[0] > 0:
                left[0] -= 1
                proxy.cut()
                return False
            return True

        proxy.judge = judge
        return left

    @pytest.mark.parametrize("what", WRITES)
    @pytest.mark.parametrize("times", [1, 3])
    def test_the_caller_gets_the_outcome_of_a_lost_answer(
        self, prepared, through, proxy, what, times
    ):
        repository = through()
        writes = WRITES[what](repository)
        left = self.losing(proxy, times)
        assert list(repository.apply(writes)) == HELD.get(what, [True] * len(writes))
        assert left == [0]

    def test_a_write_whose_guard_still_holds_is_not_applied_twice(
        self, prepared, through, proxy, database
    ):
        repository = through()
        self.losing(proxy, 2)
        assert list(repository.apply([Update("r", {}, {"message": "said"})])) == [True]
        marks = database.tasks.find_one({"_id": "r"})["taskx"]["w"]
        assert len(marks) == len(set(marks)) == 3

    @pytest.mark.parametrize("what", WRITES)
    def test_an_error_with_unknown_outcome_is_in_doubt(self, prepared, through, proxy, what):
        """If the writes are sent again later, they are recognized and not applied twice."""
        repository = through()
        repository.apply([insert("warm")])
        repository.init_indexes()
        writes = WRITES[what](repository)
        repository._connection.timeout = 0.3
        began = time.monotonic()
        error = sent_in_vain(proxy, "answer", COMMANDS, lambda: repository.apply(writes))
        assert error.in_doubt
        assert time.monotonic() - began < SOON
        proxy.heal()
        expected = HELD.get(what, [True] * len(writes))

        def is_done():
            """Return True once the server, which has received the first write, has applied it."""
            with suppress(RepositoryUnavailable):
                return list(shown(repository, writes[:1])) == [True]

        def results():
            with suppress(RepositoryUnavailable):  # the server is slow, and in doubt again
                return list(repository.apply(writes))

        eventually(is_done)
        assert eventually(results) == expected

    @pytest.mark.parametrize("text", ["first", "changed", None])
    def test_an_error_about_a_note_is_in_doubt(self, repository, through, proxy, text):
        """The note is not stored again automatically: it may have changed in the meantime."""
        if text != "first":
            assert repository.put_note("a", "first", 0)
        version = repository.notes("a")["a"].version if text != "first" else 0
        lost = through()
        assert len(lost.notes("a")) == bool(version)
        lost._connection.timeout = 0.3
        store = partial(lost.put_note, "a", text, version)
        assert sent_in_vain(proxy, "answer", COMMANDS, store).in_doubt
        proxy.heal()
        stored = lambda: {name: note.text for name, note in repository.notes("a").items()}  # noqa: E731
        # The server has received the change, and may carry it out after the time-out.
        eventually(lambda: stored() == ({} if text is None else {"a": text}))

    def test_an_unreachable_server_leaves_no_doubt(self, make):
        client = pymongo.MongoClient("127.0.0.1", free_port())
        repository = make(client.tasks, timeout=0.5)
        began = time.monotonic()
        with client:
            for write in (
                lambda: repository.apply([insert("a")]),
                lambda: repository.put_note("a", "text", 0),
            ):
                with pytest.raises(RepositoryUnavailable) as caught:
                    write()
                assert not caught.value.in_doubt
        assert time.monotonic() - began < SOON

    def test_requests_that_never_arrive_are_sent_again(self, prepared, through, proxy):
        repository = through()
        proxy.judge = swallowing("ask", [b"insert\0"], seen := threading.Event())
        outcome = []
        thread = threading.Thread(target=lambda: outcome.extend(repository.apply([insert("new")])))
        thread.start()
        assert seen.wait(PATIENCE)
        proxy.heal()
        thread.join(PATIENCE)
        assert outcome == [True]
        assert repository.count(TaskFilter()) == 5

    def test_a_slow_network_changes_nothing(self, prepared, through, proxy):
        repository = through()
        pause = threading.Event()
        proxy.judge = lambda direction, piece: not pause.wait(0.05)
        assert list(repository.apply(WRITES["all of them"](repository))) == HELD["all of them"]


class TestAnInterrupt:
    """An interrupt of ``apply``: if the same objects are sent again, applied writes are recognized."""

    @pytest.fixture
    def store(self, repository):
        repository.apply([insert("p"), insert("c", unique_key="k", unique_scope="ever")])
        repository.apply([insert("q")])
        repository.apply(lifecycle.cancel("c", NOW))
        run(repository, "r")
        return repository

    @pytest.mark.parametrize("what", WRITES)
    @pytest.mark.parametrize("sent", [True, False], ids=["after it was sent", "before"])
    def test_an_interrupted_write_that_is_sent_again_is_applied_once(
        self, store, monkeypatch, what, sent
    ):
        writes = WRITES[what](store)
        send = store._sender._send_once

        def interrupted(ops, **options):
            if sent:
                send(ops, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store._sender, "_send_once", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.apply(writes)
        between = store.find(
            "id", [write.id for write in writes], ("id", "status", "starts", "owner")
        )
        assert list(store.apply(writes)) == HELD.get(what, [True] * len(writes))
        after = store.find(
            "id", [write.id for write in writes], ("id", "status", "starts", "owner")
        )
        assert (sorted(after) == sorted(between)) is sent

    def test_its_mark_shows_that_an_interrupted_write_was_applied(self, store, monkeypatch):
        """Its guard still holds, and other writes are sent with it."""
        said = Update("r", {}, {"message": "said"})
        send = store._sender._send

        def interrupted(ops):
            send(ops)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store._sender, "_send", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.apply([said])
        other = Update("r", {"message": "said"}, {"message": "said since"})
        assert list(store.apply([other])) == [True]
        assert list(store.apply([said, other])) == [True, False]
        assert store.get_by_id("r").message == "said since"


class TestAnInterruptBesideAMock(TestAnInterrupt):
    @pytest.fixture
    def repository(self, make, mock):
        return make(mock)


class TestRefusals:
    def test_a_task_of_more_than_16_mib_is_refused(self, repository):
        """``max_payload_size`` does not matter, and other tasks of the batch can be stored."""
        huge = insert("huge", params='{"x":"' + "x" * 17 * 2**20 + '"}')
        with pytest.raises(PayloadError, match=r"params: .* MongoDB allows 16,777,216"):
            repository.apply([huge])
        with pytest.raises(PayloadError):
            repository.apply([insert("a"), huge, insert("b")])
        assert list(repository.apply([insert("a"), insert("b")])) == [True, True]
        assert repository.count(TaskFilter()) == 2

    def test_a_result_that_makes_a_document_too_large_is_refused(self, repository):
        task = run(repository, "a", params='{"x":"' + "x" * 9 * 2**20 + '"}')
        ending = lifecycle.Ending(returned=True, result='"' + "x" * 9 * 2**20 + '"')
        with pytest.raises(PayloadError):
            repository.apply(lifecycle.conclude(task, ending, NOW))
        assert repository.get_by_id("a").status == "running"

    def test_writes_that_were_applied_beside_a_refused_one_are_recognized(self, repository):
        """After a failed batch the ledger sends its writes again, one by one."""
        tasks = [run(repository, str(number)) for number in range(2)]
        large = '"' + "x" * 9 * 2**20 + '"'
        full = run(repository, "full", params=f'{{"x":{large}}}')
        [huge] = lifecycle.conclude(full, lifecycle.Ending(returned=True, result=large), NOW)
        moves = [lifecycle.conclude(task, FINE, NOW)[0] for task in tasks]
        with pytest.raises(PayloadError):
            repository.apply([moves[0], huge, moves[1]])
        for move in moves:
            assert list(repository.apply([move])) == [True]
        assert repository.count(TaskFilter(status="completed")) == 2

    def test_operators_in_guards_are_never_sent(self, repository):
        repository.apply([insert("a", owner="n"), insert("b", owner="n")])
        hostile = [Update(each, {"owner": {"$ne": ""}}, {"message": "changed"}) for each in "ab"]
        with pytest.raises(ConfigurationError):
            repository.apply(hostile)
        assert {task.message for task in repository.list(TaskFilter())} == {""}

    @pytest.mark.parametrize("hostile", [{"$ne": ""}, {"$gt": ""}, ["a"], b"a", 1, None])
    def test_operators_in_arguments_are_never_sent(self, repository, hostile):
        """An argument that must be a string raises an error for any other type."""
        repository.apply([insert("a", owner="n")])
        calls = [
            lambda: repository.get_many([hostile]),
            lambda: repository.get_by_id(hostile),
            lambda: repository.delete(hostile),
            lambda: repository.update_status(hostile, "cancelled"),
            lambda: repository.update_progress(hostile, 5),
            lambda: repository.apply([Update(hostile, {}, {"message": "changed"})]),
            lambda: repository.apply(2 * [Update(hostile, {}, {"message": "changed"})]),
            lambda: repository.apply(lifecycle.cancel(hostile, NOW)),
            lambda: held_on(repository, hostile),
            lambda: repository.ready([hostile], 5),
            lambda: repository.ready(["t"], 5, hostile),
            lambda: repository.find("parent", [hostile], ("id",)),
            lambda: repository.distinct("line", hostile, 5),
            lambda: TaskFilter(type=hostile if hostile is not None else 1),
            lambda: TaskFilter(created_by=hostile if hostile is not None else 1),
        ]
        for call in calls:
            with pytest.raises(ConfigurationError):
                call()
        if not isinstance(hostile, (int, type(None))):
            with pytest.raises(ConfigurationError):
                repository.apply([Update("a", {"message": hostile}, {"message": "changed"})])
        assert repository.get_by_id("a").message == ""
