"""Tests of documents: they have the fields and types of the original TaskX."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
from bson import ObjectId, decode, encode
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from helpers import earliest_due, held_on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskx import InvalidTransition, Task, TaskFilter, TaskStatus
from taskx.node.housekeeper import unfinished
from taskx.stores.mongo import documents
from taskx.stores.queries import owners
from taskx.tasks import lifecycle

from .conftest import insert, run

NOW = 1_700_000_000_000
AT = datetime(2024, 2, 29, 12, 0, 0, 123_000)

#: Documents as the Go library stores them. Nil maps and pointers are null, and some empty fields are
#: absent. An ``int`` has 32 bits if it fits, and an ``int64`` always has 64.
GO = [
    {
        "_id": "go-pending",
        "type": "sync",
        "status": "pending",
        "params": {"region": "cn", "ids": [1, 2], "$where": 1},
        "result": None,
        "error": "",
        "progress": 0,
        "message": "",
        "created_by": "user123",
        "created_at": AT,
        "started_at": None,
        "completed_at": None,
        "duration": Int64(0),
    },
    {
        "_id": "go-running",
        "type": "sync",
        "status": "running",
        "params": None,
        "progress": 40,
        "message": "处理中...",
        "created_by": "user123",
        "created_at": AT + timedelta(seconds=1),
        "started_at": AT + timedelta(seconds=2),
        "duration": Int64(0),
    },
    {
        "_id": "go-completed",
        "type": "sync",
        "status": "completed",
        "params": {"when": AT, "oid": ObjectId("5f" * 12), "price": Decimal128("1.50")},
        "result": {"count": 100, "big": Int64(2**40)},
        "progress": 100,
        "message": "",
        "created_by": "",
        "created_at": AT + timedelta(seconds=2),
        "started_at": AT + timedelta(seconds=3),
        "completed_at": AT + timedelta(seconds=63),
        "duration": Int64(60),
    },
    {
        "_id": "go-failed",
        "type": "other",
        "status": "failed",
        "error": "永久错误",
        "created_at": AT + timedelta(seconds=3),
    },
    {
        "_id": "go-zero-time",
        "type": "other",
        "status": "cancelled",
        "created_at": datetime(1, 1, 1),
    },
]


@pytest.fixture
def with_go(repository, database):
    database.tasks.insert_many([dict(document) for document in GO])
    return repository


def decode_as_go(document):
    """Decode a document as strictly as the Go driver does for the original; ignore other fields."""

    def take(name, *kinds):
        value = document.get(name)
        assert value is None or type(value) in kinds, f"{name}: {value!r} is not one of {kinds}"
        return value

    task = {name: take(name, str) or "" for name in ("_id", "type", "status", "error", "message")}
    task["created_by"] = take("created_by", str) or ""
    task["params"], task["result"] = take("params", dict), take("result", dict)
    task["progress"] = take("progress", int, Int64) or 0
    task["created_at"] = take("created_at", datetime)
    assert task["created_at"] is not None, "a time.Time, not a pointer"
    task["started_at"] = take("started_at", datetime)
    task["completed_at"] = take("completed_at", datetime)
    task["duration"] = take("duration", Int64) or 0
    return task


class TestOurs:
    """Our documents, as the Go library sees them."""

    def test_go_reads_a_new_task(self, repository, database):
        repository.apply([insert("a", params='{"z":1,"a":[{"b":null}]}', created_by="user123")])
        document = database.tasks.find_one({"_id": "a"})
        assert set(document) == {*decode_as_go(document), "taskx"}
        assert decode_as_go(document) == {
            "_id": "a",
            "type": "t",
            "status": "pending",
            "params": {"z": 1, "a": [{"b": None}]},
            "result": None,
            "error": "",
            "progress": 0,
            "message": "",
            "created_by": "user123",
            "created_at": datetime(2023, 11, 14, 22, 13, 20),
            "started_at": None,
            "completed_at": None,
            "duration": 0,
        }
        assert list(document["params"]) == ["z", "a"]

    def test_go_reads_a_completed_task(self, repository, database):
        task = run(repository, "a")
        ending = lifecycle.Ending(returned=True, result='{"count":100}', duration=61.75)
        repository.apply(lifecycle.conclude(task, ending, NOW + 61_751))
        document = database.tasks.find_one({"_id": "a"})
        seen = decode_as_go(document)
        assert (seen["status"], seen["result"], seen["progress"]) == (
            "completed",
            {"count": 100},
            100,
        )
        assert seen["duration"] == 61
        assert seen["completed_at"] - seen["started_at"] == timedelta(seconds=61.75)
        assert repository.get_by_id("a").duration == 61.75

    @pytest.mark.parametrize(
        "outcome", ["retried", "failed", "cancelled", "interrupted", "rescued"]
    )
    def test_go_reads_a_task_with_any_outcome(self, repository, database, outcome):
        task = run(repository, "a", max_attempts=2 if outcome == "retried" else 1)
        ending = lifecycle.Ending(returned=False, error="it broke", traceback="here")
        moves = {
            "cancelled": [lifecycle.set_status(task, TaskStatus.CANCELLED, "no", NOW)],
            "rescued": lifecycle.rescue([task], NOW, stopping=False)[0],
            "interrupted": lifecycle.hand_back(task, NOW),
        }
        repository.apply(moves.get(outcome) or lifecycle.conclude(task, ending, NOW))
        seen = decode_as_go(database.tasks.find_one({"_id": "a"}))
        assert seen["status"] == {"failed": "failed", "cancelled": "cancelled"}.get(
            outcome, "pending"
        )

    @pytest.mark.parametrize(
        "result",
        [0, False, "", "text", [], [1, [{"a.b": None}]], -1.5, {}, {"value": 1}, {"$x": 1}],
    )
    def test_go_finds_an_object_for_any_result(self, repository, database, result):
        """TaskX itself reads the result as it was stored."""
        task = run(repository, "a")
        ending = lifecycle.Ending(returned=True, result=json.dumps(result))
        repository.apply(lifecycle.conclude(task, ending, NOW))
        assert type(decode_as_go(database.tasks.find_one({"_id": "a"}))["result"]) is dict
        stored = repository.get_by_id("a").result
        assert (stored, type(stored)) == (result, type(result))

    @pytest.mark.parametrize(
        "params",
        [
            {"$set": {"a.b": 1}},
            {"": 1, "a": {"": {"": 2}}},
            {"$ref": "c", "$id": 1},
            {"~": 1, "~s": 2, "~~d": 3, "$": 4, ".": 5, "~e": 6},
            {"plain ~ $ key": 1, "price": "$1.50"},
            {"b": 1, "a": 2, "_id": 3, "10": 4, "9": 5},
        ],
    )
    def test_params_may_have_keys_that_servers_refuse(self, repository, database, params):
        repository.create(Task(id="a", type="t", params=params))
        stored = repository.get_by_id("a").params
        assert json.dumps(stored) == json.dumps(params)
        assert "$" not in {key[:1] for key in decode_as_go(database.tasks.find_one())["params"]}

    def test_numbers_are_stored_exactly(self, repository):
        params = {"n": [2**63 - 1, -(2**63), 2**31, 1.0, 1, -0.0, 5e-324, 1.7976931348623157e308]}
        repository.create(Task(id="a", type="t", params=params))
        assert repr(repository.get_by_id("a").params) == repr(params)

    def test_params_may_be_ninety_levels_deep(self, repository):
        deep: object = 1
        for _ in range(89):
            deep = [deep]
        repository.create(Task(id="a", type="t", params={"deep": deep}))
        assert repository.get_by_id("a").params == {"deep": deep}

    def test_the_log_of_attempts_is_bounded(self, make, mock):
        """A document has at most 16 MiB, and fifty long tracebacks might not fit."""
        repository = make(mock)
        task = run(repository, "a", max_attempts=100)
        for number in range(1, 60):
            ending = lifecycle.Ending(returned=False, error=f"{number}", traceback="t" * 100_000)
            repository.apply(lifecycle.conclude(task, ending, NOW))
            task = repository.get_by_id("a")
            repository.apply([lifecycle.start(task, NOW, "node")])
            task = repository.get_by_id("a")
        assert task.damage == ""
        assert task.errors == 59
        assert 5 <= len(task.earlier_attempts) <= 25
        assert task.earlier_attempts[-1].error == "59"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("a~.$sde_", max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(value=json_values)
def test_every_json_value_comes_back_as_it_was(value):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    fields = documents.fields({"result": text})
    stored = {
        "_id": "a",
        "result": fields["result"],
        "taskx": {"result_as": fields["taskx.result_as"]},
    }
    assert stored["result"] is None or type(stored["result"]) is dict
    row = documents.row_from_document(stored)
    assert (row["result"] or "null") == text


class TestTheirs:
    """Documents of the Go library, as TaskX reads them."""

    def test_documents_of_go_are_read(self, with_go):
        tasks = with_go.get_many([document["_id"] for document in GO])
        assert [task.damage for task in tasks.values()] == [""] * 5
        pending, running = tasks["go-pending"], tasks["go-running"]
        assert pending.params == {"region": "cn", "ids": [1, 2], "$where": 1}
        assert (pending.created_at, pending.started_at) == (AT.replace(tzinfo=timezone.utc), None)
        assert (pending.starts, pending.owner, pending.priority) == (0, "", 0)
        assert (running.params, running.progress, running.message) == ({}, 40, "处理中...")
        completed = tasks["go-completed"]
        assert completed.result == {"count": 100, "big": 2**40}
        assert completed.duration == 60.0
        assert completed.params == {
            "when": "2024-02-29T12:00:00.123000+00:00",
            "oid": "5f" * 12,
            "price": "1.50",
        }
        assert tasks["go-failed"].error == "永久错误"
        assert tasks["go-zero-time"].created_at.year == 1

    def test_documents_of_go_are_listed_and_counted(self, with_go):
        with_go.create(Task(id="ours", type="sync", created_at=AT.replace(tzinfo=timezone.utc)))
        listed = [task.id for task in with_go.list(TaskFilter(type="sync"))]
        assert listed == ["go-completed", "go-running", "ours", "go-pending"]
        for status in TaskStatus:
            expected = [d["_id"] for d in GO if d["status"] == status.value]
            expected += ["ours"] if status is TaskStatus.PENDING else []
            filter = TaskFilter(status=status)
            assert sorted(t.id for t in with_go.list(filter)) == sorted(expected)
            assert with_go.count(filter) == len(expected)
        assert with_go.count(TaskFilter(created_by="user123")) == 2

    def test_tasks_of_go_can_be_cancelled_and_deleted(self, with_go, database):
        pending, running = (
            lifecycle.cancel(f"go-{status}", NOW) for status in ("pending", "running")
        )
        assert with_go.apply(pending) == [True, False, False, False]
        assert with_go.apply(running) == [False, False, False, True]
        assert decode_as_go(database.tasks.find_one({"_id": "go-pending"}))["status"] == "cancelled"
        with_go.delete("go-pending")
        with_go.delete("go-failed")
        with pytest.raises(InvalidTransition):
            with_go.delete("go-running")
        assert with_go.count(TaskFilter()) == 3

    def test_tasks_of_go_can_be_changed_by_hand(self, with_go):
        with_go.update_progress("go-running", 60, "further")
        with_go.update_status("go-running", TaskStatus.COMPLETED, "done")
        task = with_go.get_by_id("go-running")
        assert (task.status, task.progress, task.message) == (TaskStatus.COMPLETED, 100, "done")

    def test_pending_tasks_of_go_are_left_to_its_process(self, with_go):
        """The process may hold them in its channel."""
        task = with_go.get_by_id("go-pending")
        assert with_go.ready(["sync"], 10) == []
        assert not unfinished(with_go, ["sync"])
        assert list(with_go.apply([lifecycle.start(task, NOW, "node")])) == [False]
        assert owners(with_go) == []

    def test_adopted_tasks_run_once(self, make, database):
        database.tasks.insert_many([dict(document) for document in GO])
        ones = [make(database, adopt_foreign=True) for _ in range(2)]
        assert unfinished(ones[0], ["sync"])
        for one in ones:
            assert [stub.id for stub in one.ready(["sync"], 10)] == ["go-pending"]
        starts = [
            lifecycle.start(one.get_by_id("go-pending"), NOW, f"node {number}")
            for number, one in enumerate(ones)
        ]
        assert [one.apply([start])[0] for one, start in zip(ones, starts, strict=True)] == [
            True,
            False,
        ]
        assert held_on(ones[1], "node 0") == ["go-pending"]
        assert decode_as_go(database.tasks.find_one({"_id": "go-pending"}))["status"] == "running"
        assert ones[0].ready(["other"], 10) == []

    def test_tasks_are_adopted_in_the_order_of_their_creation(self, make, database):
        repository = make(database, adopt_foreign=True)
        repository.apply([insert("ours", type="sync")])
        for number in (2, 0, 1):
            database.tasks.insert_one(
                {**GO[0], "_id": f"go-{number}", "created_at": AT + timedelta(seconds=number)}
            )
        for _ in range(2):
            stubs = repository.ready(["sync"], 10)
        assert sorted(stub.id for stub in stubs) == ["go-0", "go-1", "go-2", "ours"]
        assert [stub.id for stub in stubs if stub.id != "ours"] == ["go-0", "go-1", "go-2"]

    def test_the_oldest_tasks_are_adopted_first(self, make, database):
        repository = make(database, adopt_foreign=True)
        for number in (2, 0, 1):
            database.tasks.insert_one(
                {**GO[0], "_id": f"go-{number}", "created_at": AT + timedelta(seconds=number)}
            )
        assert [stub.id for stub in repository.ready(["sync"], 1)] == ["go-0"]

    def test_a_change_by_go_in_our_task_is_read(self, repository, database):
        task = run(repository, "a")
        ending = lifecycle.Ending(returned=True, result="[1]", duration=1.5)
        repository.apply(lifecycle.conclude(task, ending, NOW))
        database.tasks.update_one(
            {"_id": "a"}, {"$set": {"result": {"count": 1}, "duration": Int64(7)}}
        )
        task = repository.get_by_id("a")
        assert (task.result, task.duration) == ({"count": 1}, 7.0)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("params", [1]),
            ("params", {"x": float("nan")}),
            ("status", "sleeping"),
            ("error", 5),
            ("progress", "half"),
            ("created_at", "yesterday"),
        ],
    )
    def test_a_damaged_field_is_named(self, repository, database, field, value):
        """One damaged document does not spoil a list."""
        database.tasks.insert_many([{**GO[0], field: value}, GO[3]])
        tasks = {task.id: task for task in repository.list(TaskFilter())}
        assert "damaged" in tasks["go-pending"].damage
        assert tasks["go-failed"].damage == ""

    @pytest.mark.parametrize("limit", [1, 2, 3])
    def test_a_document_without_a_date_ends_the_list(self, repository, database, limit):
        odd = {"text": "yesterday", "earlier": "a", "number": 5, "null": None}
        documents = [{**GO[0], "_id": name, "created_at": value} for name, value in odd.items()]
        dateless = {name: value for name, value in GO[0].items() if name != "created_at"}
        documents += [{**dateless, "_id": "absent"}, {**dateless, "_id": "lacking"}]
        database.tasks.insert_many([*GO, *documents])
        whole = [task.id for task in repository.list(TaskFilter())]
        assert whole[-6:-3] == ["text", "earlier", "number"]
        found = []
        tasks, after = repository.reads.list_after(TaskFilter(limit=limit))
        while tasks:
            found += (task.id for task in tasks)
            tasks, after = repository.reads.list_after(TaskFilter(limit=limit), after)
        assert found == whole

    @pytest.mark.parametrize("field", ["params", "message", "created_by"])
    def test_text_that_is_not_utf8_is_named_as_damage(self, repository, field):
        """Go's strings may hold any bytes, and its driver sends them unchanged."""
        whole = encode({**GO[0], field: {"x": "a??b"} if field == "params" else "a??b"})
        options = repository._connection.tasks.codec_options  # the options of every read
        document = decode(whole.replace(b"a??b", b"a\xff\xfeb"), options)
        task = documents.task_from_document(document)
        assert (task.id, task.type, task.status) == ("go-pending", "sync", "pending")
        assert "damaged" in task.damage
        json.dumps(task.to_dict(), ensure_ascii=False).encode()
        document = decode(encode({**GO[0], "message": "处理中..."}), options)
        assert documents.task_from_document(document).damage == ""

    @pytest.mark.parametrize(
        "odd",
        [{"_id": ObjectId()}, {"_id": 5}, {"_id": "no room", "taskx": 5}],
        ids=lambda odd: type(odd["_id"]).__name__,
    )
    def test_a_task_that_cannot_be_adopted_does_not_stop_others(self, make, database, odd):
        """For example, a document that was stored by hand and got its id from the server."""
        database.tasks.insert_many([{**GO[0], **odd}, {**GO[0], "_id": "sound"}])
        repository = make(database, adopt_foreign=True)
        assert "sound" in [stub.id for stub in repository.ready(["sync"], 10)]
        assert {type(stub.id) for stub in repository.ready(["sync"], 10)} == {str}
        assert len(repository.list(TaskFilter())) == 2

    @pytest.mark.parametrize("run_at", [None, "soon", 5])
    def test_a_task_with_a_damaged_time_does_not_hide_due_tasks(self, repository, database, run_at):
        repository.apply([insert("lost", run_at=NOW + 1000), insert("due", run_at=NOW + 2000)])
        repository.apply([insert("free")])
        change = {"$set": {"taskx.run_at": run_at}} if run_at else {"$unset": {"taskx.run_at": 1}}
        database.tasks.update_one({"_id": "lost"}, change)
        assert earliest_due(repository) == NOW + 2000
        assert [task_id for task_id, _ in repository.due(NOW + 10_000, 10)] == ["due"]
        database.tasks.update_one({"_id": "free"}, {"$set": {"taskx.priority": "high"}})
        assert [(stub.id, stub.priority) for stub in repository.ready(["t"], 10)] == [("free", 0)]


def test_only_a_task_that_can_expire_has_a_date_for_that(repository, database):
    repository.apply([insert("fine"), *(insert(i, expires_at=NOW + 1000) for i in ("late", "odd"))])
    database.tasks.update_one({"_id": "odd"}, {"$set": {"taskx.expires_at": "soon"}})
    stored = {one["_id"]: one["taskx"] for one in database.tasks.find()}
    assert "expires_at" not in stored["fine"]
    assert isinstance(stored["late"]["expires_at"], datetime)
    assert list(repository.due(None, 9, "expires_at")) == [("late", NOW + 1000)]


def test_fields_of_a_later_version_are_ignored_and_kept(repository, database):
    """Several versions share a collection: later ones add fields, and no version number is stored."""
    run(repository, "a")
    attempt = ["retried", NOW, NOW + 1, "w", "broke", "", "ValueError", {"mood": "bad"}]
    later = {
        "taskx.mood": {"is": "bad"},
        "taskx.earlier_attempts": json.dumps([attempt]),
        "mood": 1,
    }
    database.tasks.update_one({"_id": "a"}, {"$set": later})
    task = repository.get_by_id("a")
    assert not task.damage
    assert [attempt.error_type for attempt in task.earlier_attempts] == ["ValueError"]
    task.message = "changed by the version before"
    repository.update(task)
    stored = database.tasks.find_one({"_id": "a"})
    assert (stored["mood"], stored["taskx"]["mood"]) == (1, {"is": "bad"})
