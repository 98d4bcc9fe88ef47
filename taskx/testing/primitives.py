"""The contract of the primitives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, get_args

import attrs

from taskx.stores.base import Listed, Lookup, Repository
from taskx.tasks.codec import CODED
from taskx.tasks.errors import ConfigurationError
from taskx.tasks.ids import new_id
from taskx.tasks.lifecycle import start_all
from taskx.tasks.model import TASK_FIELDS, TaskFilter, TaskStatus
from taskx.tasks.payload import CODEC_KEY
from taskx.tasks.record import (
    BY_THREAD,
    COLUMNS,
    DEFAULTS,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    UNTIL_DUE,
    Stub,
    ids_to_text,
    plain_tasks,
    policy_to_text,
    task_from_row,
)
from taskx.tasks.retry import RetryPolicy
from taskx.tasks.tags import labels_to_text
from taskx.tasks.writes import CREATED, PRESENT, Delete, Insert, NoteChange, Update, Write
from taskx.testing.contract import ROUNDS, Contract

#: Values that have a meaning in a query language, and none here.
HOSTILE = ("", "%", "_", "$ne", ".*", "' OR 1=1 --", '{"$ne": null}')
#: The values that tasks are looked up by. A value that no task has finds nothing.
VALUES = ("p", "q", "r", *HOSTILE)
#: The column with the value, if its name differs from that of the lookup.
VALUE_OF = {"line": "concurrency_key", "running_on": "owner", "buffered_on": "owner"}

#: Tasks to find by a filter: by id, each with its error, the type of its error and its params.
FILTERED: Mapping[str, tuple[str, str, Any]] = {
    "ab1": (
        "ValueError: NO ünswer",
        "ValueError",
        {"user": {"id": 7}, "n": 1, "list": [7], "a.b": {"c~d": "x"}},
    ),
    "ab2": ("", "", {"user": {"id": "7"}, "n": 1.0, "flag": True, "c~d": "y", "big": 2**62}),
    "a%": ("", "", {"user": [{"id": 7}], "n": True, "null": None, "list": 7}),
    "B": ("E: 100% no Änswer", "m.E", {"user.id": 7, "n": 1.5, "$x": "y", "c~d": "y"}),
}
#: Filters, each with the ids of the tasks that it finds.
FILTERS: Sequence[tuple[dict[str, Any], Sequence[str]]] = [
    ({"error": "no"}, ["ab1", "B"]),
    ({"error": "e: no ü"}, []),
    ({"error": "ERROR: no ü"}, ["ab1"]),
    ({"error": "Ü"}, []),
    ({"error": "no Ä"}, ["B"]),
    ({"error": "ä"}, []),
    ({"error": "%"}, ["B"]),
    *(({"error": hostile}, []) for hostile in HOSTILE if hostile not in ("", "%")),
    ({"error": ""}, [*FILTERED]),
    ({"error_type": "m.E"}, ["B"]),
    ({"error_type": "E"}, []),
    ({"error_type": ""}, ["ab2", "a%"]),
    ({"id_prefix": "ab"}, ["ab1", "ab2"]),
    ({"id_prefix": "ab2"}, ["ab2"]),
    ({"id_prefix": "a%"}, ["a%"]),
    ({"id_prefix": "b"}, []),
    ({"id_prefix": "a", "status": "pending"}, ["ab1", "ab2", "a%"]),
    ({"id_prefix": "a", "status": "failed"}, []),
    *(({"id_prefix": hostile}, []) for hostile in HOSTILE if hostile != ""),
    ({"id_prefix": ""}, [*FILTERED]),
    ({"params": {"user.id": 7}}, ["ab1"]),
    ({"params": {"user.id": 7.0}}, ["ab1"]),
    ({"params": {"user.id": "7"}}, ["ab2"]),
    ({"params": {("user.id",): 7}}, ["B"]),
    ({"params": {"user": 7}}, []),
    ({"params": {"n": 1}}, ["ab1", "ab2"]),
    ({"params": {"n": True}}, ["a%"]),
    ({"params": {"n": 1.5}}, ["B"]),
    ({"params": {"n": None}}, []),
    ({"params": {"flag": True}}, ["ab2"]),
    ({"params": {"flag": False}}, []),
    ({"params": {"flag": 1}}, []),
    ({"params": {"null": None}}, ["a%"]),
    ({"params": {"list": 7}}, ["a%"]),
    ({"params": {"list.0": 7}}, []),
    ({"params": {("a.b", "c~d"): "x"}}, ["ab1"]),
    ({"params": {"c~d": "y"}}, ["ab2", "B"]),
    ({"params": {"$x": "y"}}, ["B"]),
    ({"params": {"big": 2**62}}, ["ab2"]),
    ({"params": {"big": 2**62 + 1}}, []),
    ({"params": {"user.id": 7, "n": 1}}, ["ab1"]),
    ({"params": {"user.id": 7, "n": 2}}, []),
    ({"params": {"n": 1}, "id_prefix": "ab", "error": "no", "status": "pending"}, ["ab1"]),
]


class PrimitivesContract(Contract):
    """Tests of what every :class:`~taskx.stores.base.Repository` must do besides the eight methods.

    Use it like :class:`~taskx.testing.RepositoryContract`, with a fixture and a method :meth:`another`. Run
    it a second time with a repository that has a codec. A repository declares what it cannot do by its
    :attr:`~taskx.stores.base.Repository.shortcoming`, and by ``keeps_every_field`` here.
    """

    #: The creation time of the tasks of these tests, in milliseconds.
    NOW = 1_709_208_000_123

    def another(self, repository: Repository) -> Repository | None:
        """Make another object on the same data, as another process would; None if that is not possible."""
        return None

    # --- apply

    def test_each_write_says_whether_its_guard_held(self, repository: Repository) -> None:
        """Writes are applied in order: a later one sees an earlier one."""
        self.add(repository, "a")
        first = Update("a", {"message": ""}, {"message": "one"})
        second = Update("a", {"message": "one"}, {"message": "two"})
        told = self.apply(repository, second, self.insert("a"), first, second, second)
        assert told == [False, False, True, True, False]
        changed = Update("b", {}, {"message": "no such task"})
        told = self.apply(repository, changed, Delete("b", {}), self.insert("b"))
        assert told == [False, False, True]
        assert self.apply(repository) == []
        assert self.columns(repository, "message") == {"a": "two", "b": ""}
        assert self.apply(repository, Delete("a", {}), self.insert("a")) == [True, True]
        assert self.columns(repository, "message") == {"a": "", "b": ""}

    def test_every_form_of_guard_holds_or_fails(self, repository: Repository) -> None:
        """A guard wants a value, None, one of several values, or any value; all its parts must hold."""
        cases: list[tuple[dict[str, Any], bool]] = [
            ({}, True),
            ({"message": "said"}, True),
            ({"message": "SAID"}, False),
            ({"message": ""}, False),
            ({"progress": 0}, True),
            ({"progress": 1}, False),
            ({"run_at": None}, True),
            ({"run_at": 0}, False),
            ({"started_at": None}, False),
            ({"started_at": PRESENT}, True),
            ({"run_at": PRESENT}, False),
            ({"status": ("pending", "running")}, True),
            ({"status": ("completed",)}, False),
            ({"status": ()}, False),
            ({"status": ("running", None), "message": "said", "run_at": None}, True),
            ({"status": "running", "message": "said", "run_at": PRESENT}, False),
            *(({"message": text}, False) for text in HOSTILE),
        ]
        for guard, holds in cases:
            self.add(repository, "a")
            self.change(repository, "a", status="running", started_at=self.NOW, message="said")
            update = Update("a", guard, {"progress": 0})
            told = self.apply(repository, update, Delete("a", guard), Delete("a", {}))
            assert told == [holds, holds, not holds], guard

    def test_every_column_is_kept(self, repository: Repository) -> None:
        self.skip_if(not self.keeps_every_field, "keeps the original's thirteen fields only")
        given: dict[str, Any] = {"params": '{"text":"naïve ☃","n":[1,-0.5,null]}'}
        given |= {"created_by": "user123", "priority": -7, "run_at": self.NOW + 1, "timeout": 2.5}
        given |= {"max_attempts": 4, "max_crashes": 2, "owner": "node", "held": UNTIL_DUE}
        given["expires_at"] = self.NOW + 9
        given["tags"] = labels_to_text(["red", "größe"], "f")
        given["retry"] = policy_to_text(RetryPolicy(4, backoff="linear", retry_on=(OSError,)))
        changed: dict[str, Any] = {"status": "running", "progress": 50, "message": "half"}
        changed |= {"error": "broke", "error_type": "OSError", "traceback": "Traceback …"}
        changed |= {"started_at": self.NOW + 2, "cancel_requested_at": self.NOW + 3}
        changed |= {"errors": 1, "crashes": 2, "interruptions": 3, "snoozes": 4, "starts": 5}
        changed |= {
            "dead_letter": 1,
            "worker": "host:1",
            "log": "ä\nö\n",
            "held": FREE,
            "version": "2",
        }
        changed["earlier_attempts"] = '[["failed",1,2,"w","e","t","T"]]'
        changed["checkpoints"] = '{"steps":{"a.$b":[1,null,{"":2.5}]},"cursor":"ä"}'
        if not repository.shortcoming:
            given |= {"unique_key": "k", "unique_scope": "ever", "unique_lock": "k", "turn": "c"}
            given |= {"depends_on": ids_to_text(["p"]), "on_parent_failure": "run"}
            given |= {"concurrency_key": "c"}
        self.add(repository, "a", **given)
        self.change(repository, "a", **changed)
        expected = {**DEFAULTS, "id": "a", "type": "t", "created_at": self.NOW, **given, **changed}
        [whole] = repository.find("id", ["a"], TASK_FIELDS)
        task = task_from_row(whole, repository.codecs)
        assert task == task_from_row([expected[name] for name in TASK_FIELDS])
        if not repository.shortcoming:
            assert [*repository.list(TaskFilter(status=TaskStatus.RUNNING))] == [task]
        plain = tuple(name for name in COLUMNS if name not in CODED)  # a codec changes the others
        [row] = repository.find("id", ["a"], plain)
        assert dict(zip(plain, row, strict=True)) == {name: expected[name] for name in plain}

    def test_a_new_task_may_be_stored_as_started(self, repository: Repository) -> None:
        self.skip_if(repository.shortcoming)
        began: dict[str, Any] = {"status": "running", "starts": 1, "started_at": self.NOW + 1}
        self.add(repository, "a", **began, owner="n", worker="host:1")
        assert repository.find("running_on", ["n"], ("id", "starts")) == [("a", 1)]
        assert [*repository.ready(["t"], 10, "n")] == []
        assert repository.count(TaskFilter(status=TaskStatus.RUNNING)) == 1

    def test_several_new_tasks_are_stored_all_or_none(self, repository: Repository) -> None:
        """The result is False for each id that prevents it."""
        self.skip_if(repository.shortcoming)
        a, b, c, again = map(self.insert, "abcb")
        for writes, told in (
            ([a], [True]),
            ([b, a], [True, False]),
            ([b, again, a], [True, False, False]),
            ([b, c, again], [True, True, False]),
            ([b, c], [True, True]),
        ):
            assert list(repository.apply(writes, all_or_nothing=True)) == told
            assert sorted(self.columns(repository)) == list("abc" if writes == [b, c] else "a")

    def test_no_two_tasks_have_the_same_value_in_a_unique_column(
        self, repository: Repository
    ) -> None:
        """The second write does not hold. Clearing the value, or deleting its task, frees it."""
        self.skip_if(repository.shortcoming)
        self.add(repository, "a", unique_key="k", unique_lock="k")
        second = self.insert("c", unique_key="k", unique_lock="k")
        for whole, kept in ((True, ["a"]), (False, ["a", "b"])):
            writes = [self.insert("b"), second]
            assert list(repository.apply(writes, all_or_nothing=whole)) == [True, False]
            assert sorted(self.columns(repository)) == kept
        first, last = (Update(i, {"turn": None}, {"turn": "t", "message": "has it"}) for i in "ab")
        assert self.apply(repository, first, last) == [True, False]
        assert self.apply(repository, last) == [False]
        assert self.columns(repository, "message") == {"a": "has it", "b": ""}
        freed = Update("a", {"turn": "t"}, {"turn": None})
        assert self.apply(repository, freed, last) == [True, True]
        self.change(repository, "b", turn="t")  # its own
        assert self.apply(repository, Update("a", {}, {"unique_lock": None}), second) == [True] * 2
        assert self.apply(repository, Delete("c", {}), second) == [True] * 2

    def test_a_unique_value_is_compared_as_a_whole(self, repository: Repository) -> None:
        """All of its 255 characters count, and so do its case and a space at its end."""
        self.skip_if(repository.shortcoming)
        columns: Sequence[Lookup] = ("unique_lock", "turn")
        keys = ["k", "K", "k ", *(f"{'ü' * 254}{end}" for end in "12")]
        for task_id, key in enumerate(keys):
            self.add(repository, [str(task_id)], unique_key=key, unique_lock=key, turn=key)
            for column in columns:
                assert repository.find(column, [key], ("id", column)) == [(str(task_id), key)]
            assert self.apply(repository, self.insert("again", unique_lock=key)) == [False]

    # --- several threads

    def test_one_of_many_threads_wins_a_start(self, repository: Repository) -> None:
        """A guard and its change are one step, also with several objects or processes."""
        self.add(repository, map(str, range(ROUNDS)))
        with self.second(repository) as other:

            def start(thread: int, number: int) -> bool:
                changes = {"status": "running", "starts": 1, "owner": f"node {thread}"}
                write = Update(str(number), {"status": "pending", "starts": 0}, changes)
                return self.apply((repository, other)[thread % 2], write) == [True]

            self.assert_one_wins(start)

    def test_one_of_many_threads_gets_a_unique_value(self, repository: Repository) -> None:
        self.skip_if(repository.shortcoming)

        def insert(thread: int, number: int) -> bool:
            write = self.insert(f"{number} {thread}", unique_lock=f"{number}")
            return self.apply(repository, write) == [True]

        self.assert_one_wins(insert)

    def test_one_of_many_racing_changes_of_a_note_is_made(self, repository: Repository) -> None:
        self.skip_if(repository.shortcoming)
        repository.put_notes([NoteChange(str(number), "", 0) for number in range(ROUNDS)])
        versions = {name: note.version for name, note in repository.notes("").items()}

        def change(thread: int, number: int) -> bool:
            return repository.put_note(f"{number}", f"by {thread}", versions[f"{number}"])

        self.assert_one_wins(change)
        for name, note in repository.notes("").items():
            assert note.version == versions[name] + 1

    # --- find and distinct

    def test_tasks_are_found_by_their_id(self, repository: Repository) -> None:
        """Tasks that exist are found, with the given fields in the given order."""
        ids = [f"task-{number}" for number in range(601)]
        self.apply(repository, *(self.insert(i, created_by=f"by {i}") for i in ids))
        found = repository.find("id", [*ids, "missing"], ("created_by", "status", "id"))
        assert sorted(found) == sorted((f"by {i}", "pending", i) for i in ids)
        assert list(repository.find("id", [], ("id",))) == []
        assert list(repository.find("id", HOSTILE, ("id",))) == []
        for limit in (0, 3, 500):
            assert len(repository.find("id", ids, ("id",), limit)) == limit

    def test_tasks_are_found_by_their_unique_columns(self, repository: Repository) -> None:
        """Their status does not matter."""
        self.skip_if(repository.shortcoming)
        self.add(repository, "a", unique_key="p", unique_lock="p")
        self.add(repository, "b", turn="q")
        self.end(repository, "a")
        self.assert_found(repository, "unique_lock", {"p": "a"})
        self.assert_found(repository, "turn", {"q": "b"})
        self.change(repository, "a", unique_lock=None)
        self.apply(repository, Delete("b", {}))
        self.assert_found(repository, "unique_lock", {})
        self.assert_found(repository, "turn", {})

    def test_waiting_tasks_are_found_by_their_parent(self, repository: Repository) -> None:
        """Each is found by the parent that it waits for, as long as it waits."""
        self.skip_if(repository.shortcoming)
        for children, parent in (("a", "p"), ("bc", "q"), ("d", "r")):
            parents = ids_to_text([parent, "other"])
            self.add(repository, children, depends_on=parents, held=FOR_PARENTS, waiting_on=parent)
        self.assert_found(repository, "waiting_on", {"p": "a", "q": "bc", "r": "d"})
        self.change(repository, "b", {"waiting_on": "q"}, waiting_on="p")
        self.change(repository, "c", {"waiting_on": "q"}, waiting_on=None, held=FREE)
        self.apply(repository, Delete("d", {}))
        self.assert_found(repository, "waiting_on", {"p": "ab"})

    def test_tasks_are_found_by_each_of_their_parents(self, repository: Repository) -> None:
        """They are found in pairs, in any status, until they are deleted."""
        self.skip_if(repository.shortcoming)
        self.add(repository, "r", depends_on=ids_to_text(["p", "q"]))
        self.add(repository, "s", depends_on=ids_to_text(["r", "q"]))
        self.assert_found(repository, "parent", {"p": "r", "q": "rs", "r": "s"})
        self.change(
            repository, "s", depends_on=ids_to_text(["r", "q", "p"])
        )  # it gets more of them
        self.assert_found(repository, "parent", {"p": "rs", "q": "rs", "r": "s"})
        self.end(repository, "s")
        self.apply(repository, Delete("r", {}))
        self.assert_found(repository, "parent", {"p": "s", "q": "s", "r": "s"})
        self.apply(repository, Delete("s", {}))
        self.assert_found(repository, "parent", {})

    def test_tasks_that_wait_for_a_key_are_found_in_their_order(
        self, repository: Repository
    ) -> None:
        """Their order is that in which they were stored, whatever their priorities and changes."""
        self.skip_if(repository.shortcoming)
        for task_id, key, priority in zip("fcabd", "ppppq", (0, 3, 1, 4, 2), strict=True):
            columns: dict[str, Any] = {"concurrency_key": key, "priority": priority}
            self.add(repository, task_id, held=FOR_TURN, **columns)
        self.change(repository, "c", held=FREE)
        self.change(repository, "cf", held=FOR_TURN)
        self.assert_found(repository, "line", {"p": "fcab", "q": "d"})
        assert self.ids(repository.find("line", ["p"], ("id",), 2)) == ["f", "c"]
        self.change(repository, "f", {"held": FOR_TURN}, held=FREE, turn="p")
        self.apply(repository, Delete("d", {}))
        self.end(repository, "c", status="cancelled")
        self.assert_found(repository, "line", {"p": "ab"})

    def test_tasks_are_found_by_their_owner(self, repository: Repository) -> None:
        """Running tasks and buffered ones are found apart; an empty owner finds none."""
        for ids, owner in (("a", "p"), ("bc", "q"), ("d", "r"), ("ef", "")):
            self.add(repository, ids, owner=owner, type=owner or "t")
        self.change(repository, "d", held=BY_THREAD, stuck_on="p")
        self.change(repository, "be", status="running")
        self.assert_found(repository, "buffered_on", {"p": "a", "q": "c"})
        self.assert_found(repository, "running_on", {"q": "b"})
        self.end(repository, "b")
        self.change(repository, "c", owner="p")
        self.assert_found(repository, "buffered_on", {"p": "ac"})
        self.assert_found(repository, "running_on", {})

    def test_tasks_with_a_stuck_thread_are_found(self, repository: Repository) -> None:
        """They are found by the node of the thread, in any status."""
        self.add(repository, "abc")
        self.change(repository, "ab", held=BY_THREAD, stuck_on="p")
        self.end(repository, "a", status="failed")
        self.assert_found(repository, "stuck_on", {"p": "ab"})
        self.change(repository, "ab", {"stuck_on": "p"}, stuck_on="", held=FREE)
        self.assert_found(repository, "stuck_on", {})

    def test_the_types_of_ready_tasks_are_listed(self, repository: Repository) -> None:
        """The owner does not matter."""
        for task_id, kind in zip("abcd", "utvw", strict=True):
            self.add(repository, task_id, type=kind, owner="p" if kind == "u" else "")
        self.change(repository, "c", held=BY_THREAD, stuck_on="p")
        self.change(repository, "d", status="running")
        self.assert_listed(repository, "ready_type", ["t", "u"])

    # --- ready

    def test_ready_tasks_come_by_priority_and_then_by_age(self, repository: Repository) -> None:
        """The type does not matter."""
        for number, priority in enumerate([0, 5, -5, 5, 0]):
            columns: dict[str, Any] = {"priority": priority} if self.keeps_every_field else {}
            columns["type"] = "ttuut"[number]
            self.add(repository, "dbeac"[number], **columns)
        order = "badce" if self.keeps_every_field else "dbeac"
        self.assert_ready(repository, order, "ut")
        self.assert_ready(repository, "", "")
        ready = self.ids(repository.ready(["t", *HOSTILE], 10))
        assert ready == [task_id for task_id in order if task_id in "dbc"]

    def test_new_tasks_of_one_call_keep_their_order(self, repository: Repository) -> None:
        """It does not matter that some of them have columns that others have not."""
        extras: list[dict[str, Any]] = [{}, {"message": "m"}, {}, {"progress": 3}, {}, {}]
        new = [self.insert(i, **more) for i, more in zip("fbdace", extras, strict=True)]
        assert self.apply(repository, *new) == [True] * 6
        self.assert_ready(repository, "fbdace")
        keyed = [{"held": FOR_TURN, "concurrency_key": "k", **more} for more in extras]
        new = [self.insert(i, **more) for i, more in zip("lhjgik", keyed, strict=True)]
        if not repository.shortcoming:
            assert self.apply(repository, *new) == [True] * 6
            assert self.ids(repository.find("line", ["k"], ("id",))) == [*"lhjgik"]

    def test_ready_tasks_are_pending_free_and_of_one_owner(self, repository: Repository) -> None:
        """Tasks without an owner are listed, unless a node is given."""
        for ids, owner in (("a", ""), ("b", "p"), ("c", "q"), ("deg", "p"), ("f", "")):
            self.add(repository, ids, owner=owner)
        self.change(repository, "f", held=BY_THREAD, stuck_on="p")
        self.change(repository, "d", status="running")
        self.end(repository, "e", status="cancelled")
        self.end(repository, "g", status="failed")
        self.assert_ready(repository, "a")
        self.assert_ready(repository, "b", owner="p")
        self.assert_ready(repository, "", owner="r")
        self.change(repository, "b", {"owner": "p"}, owner="q")
        self.change(repository, "a", {"owner": ""}, owner="p")
        self.change(repository, "f", {"held": BY_THREAD}, held=FREE)
        self.assert_ready(repository, "f")
        self.assert_ready(repository, "bc", owner="q")

    def test_ready_tasks_are_counted_up_to_a_number(self, repository: Repository) -> None:
        """The count is that of the tasks of one type and one owner that may start."""
        self.add(repository, "abcdeg")
        self.add(repository, "f", type="u")
        self.change(repository, "g", held=BY_THREAD)
        self.change(repository, "d", owner="n")
        self.change(repository, "e", status="running", owner="n")
        for type, owner, count in ("t", "", 3), ("u", "", 1), ("t", "n", 1), ("u", "n", 0):
            assert repository.reads.count_ready(type, owner, 10) == count, (type, owner)
        assert repository.reads.count_ready("t", "", 2) == 2

    def test_with_ageing_a_long_wait_counts_as_priority(self, repository: Repository) -> None:
        """A task waits since it was stored or became due; equal tasks keep the order of storing."""
        self.skip_if(not self.keeps_every_field, "keeps no priority")
        for name, priority, kind, second in (
            ("a", 0, "t", 0),
            ("b", 1, "u", 20),
            ("c", 1, "t", 30),
            ("d", 1, "u", 30),
            ("e", 2, "t", 40),
            ("f", 0, "t", 51),
        ):
            created_at = self.NOW + second * 1000
            self.add(repository, name, priority=priority, type=kind, created_at=created_at)
        self.add(repository, "g", run_at=self.NOW + 60_000, held=UNTIL_DUE)
        self.change(repository, "g", held=FREE)
        self.assert_ready(repository, "abcdefg", "tu", ageing=10_000)
        self.assert_ready(repository, "bd", "u", ageing=10_000)
        self.assert_ready(repository, "ebcdafg", "tu", ageing=10**9)
        self.assert_ready(repository, "", "", ageing=1)

    def test_a_stub_has_what_the_runtime_needs(self, repository: Repository) -> None:
        self.add(repository, "a")
        self.change(repository, "a", starts=3, cancel_requested_at=self.NOW)
        [stub] = repository.ready(["t"], 10)
        assert stub == Stub("a", "pending", 3, 0, self.NOW, True, "t", None)
        assert isinstance(stub, Stub)

    def test_the_row_of_a_stub_makes_the_task_that_is_stored(self, repository: Repository) -> None:
        self.skip_if(not self.keeps_every_field, "keeps no priority")
        self.add(repository, ["chosen"])
        task_id = new_id(self.NOW)
        self.add(repository, [task_id], params='{"n":1}', created_by="me", priority=1)
        one, other = repository.ready(["t"], 10)
        assert (one.id, other.id) == (task_id, "chosen")
        for stub in (one, other):
            if stub.row is not None:  # it saves a read, unless a codec has written it
                made = plain_tasks([stub.row])
                coded = CODEC_KEY in stub.row["params"]
                assert made == ({} if coded else repository.get_many([stub.id]))

    def test_a_start_from_the_row_of_a_stub_is_refused_by_another_task_with_its_id(
        self, repository: Repository
    ) -> None:
        """Only a chosen id is used again. Its row has the number that the start is bound to."""
        self.add(repository, ["chosen"])
        [stub] = repository.ready(["t"], 10)
        self.skip_if(stub.row is None, "rows of tasks with chosen ids are read before the start")
        row = stub.row or {}

        def start() -> Update:
            tasks = [*plain_tasks([row]).values()]
            [start] = start_all(tasks, self.NOW, "node", "worker", {"chosen": row["seq"]})
            assert start is not None
            return start

        assert self.apply(repository, Delete("chosen", {})) == [True]
        self.add(repository, ["chosen"])
        assert self.apply(repository, start()) == [False]
        [stub] = repository.ready(["t"], 10)
        row = stub.row or {}
        assert self.apply(repository, start()) == [True]

    # --- due and ended

    def test_held_tasks_come_in_the_order_of_their_times(self, repository: Repository) -> None:
        """Tasks due at a moment are listed, the earliest first; without a moment, all held ones."""
        self.skip_if(not self.keeps_every_field, "keeps no run_at")
        self.add(repository, "d", run_at=self.NOW - 1)
        for name, later in (("a", 2), ("b", 1), ("c", 3)):
            self.add(repository, name, run_at=self.NOW + later, held=UNTIL_DUE)
        due = [("b", self.NOW + 1), ("a", self.NOW + 2), ("c", self.NOW + 3)]
        for before, count in ((None, 3), (self.NOW, 0), (self.NOW + 2, 2)):
            for limit in range(4):
                assert list(repository.due(before, limit)) == due[:count][:limit]
        self.end(repository, "c", status="cancelled")
        self.change(repository, "b", {"held": UNTIL_DUE}, held=FREE)
        assert list(repository.due(None, 10)) == [due[1]]

    def test_tasks_that_can_expire_come_by_their_expiry(self, repository: Repository) -> None:
        """Whatever they wait for, as long as they are pending; the earliest first."""
        self.skip_if(not self.keeps_every_field, "keeps no expires_at")
        self.add(repository, "e", run_at=self.NOW, held=UNTIL_DUE)
        for name, later, held in (("a", 2, FREE), ("b", 1, UNTIL_DUE), ("c", 3, BY_THREAD)):
            run_at = self.NOW + 9 if held == UNTIL_DUE else None
            expires_at = self.NOW + later
            self.add(repository, name, expires_at=expires_at, run_at=run_at, held=held)
        self.add(repository, "d", expires_at=self.NOW, owner="node")
        expiring = [("d", 0), ("b", 1), ("a", 2), ("c", 3)]
        expected = [(name, self.NOW + later) for name, later in expiring]
        for before, count in ((None, 4), (self.NOW - 1, 0), (self.NOW, 1), (self.NOW + 2, 3)):
            for limit in range(5):
                found = repository.due(before, limit, "expires_at")
                assert list(found) == expected[:count][:limit]
        self.change(repository, "d", status="running")
        self.change(repository, "b", expires_at=None)
        self.end(repository, "c", status="cancelled")
        self.change(repository, "e", expires_at=self.NOW + 5)
        expected = [("a", self.NOW + 2), ("e", self.NOW + 5)]
        assert list(repository.due(None, 10, "expires_at")) == expected
        assert list(repository.due(None, 10)) == [("e", self.NOW), ("b", self.NOW + 9)]

    def test_ended_tasks_are_those_that_ended_before_a_moment(self, repository: Repository) -> None:
        """Tasks of one status are listed by their end, not by their creation."""
        done = {"completed": {"a": 9, "b": 20, "c": 5}, "failed": {"d": 1}, "cancelled": {"e": 2}}
        for status, ends in done.items():
            for name, end in ends.items():
                self.add(repository, name)
                self.end(repository, name, status=status, completed_at=self.NOW + end)
        self.add(repository, "fg")
        self.change(repository, "g", status="running")
        for status, ends in done.items():
            for before in range(22):
                found = repository.ended(status, self.NOW + before, 10)
                names = [name for name, end in ends.items() if end < before]
                assert {task.stub.id for task in found} == set(names), (status, before)
        assert len(repository.ended("completed", self.NOW + 100, 2)) == 2

    def test_ended_tasks_are_read_page_by_page(self, repository: Repository) -> None:
        """Pages begin with the newest task and list each once, even if listed tasks are removed."""
        self.add(repository, "vwxyz", created_at=self.NOW - 1000)
        self.end(repository, "vwxyz")
        for number, name in enumerate("abcde", 1):
            self.add(repository, name, created_at=self.NOW + number)
            self.end(repository, name, completed_at=self.NOW + number)
        for remove in (False, True)[bool(repository.shortcoming) :]:
            found: list[str] = []
            after = None
            while page := repository.ended("completed", self.NOW + 10, 2, after):
                found += (task.stub.id for task in page)
                after = page[-1].place
                if remove:
                    self.apply(repository, *(Delete(task.stub.id, {}) for task in page))
            assert [*found[:5], *sorted(found[5:])] == list("edcbavwxyz")

    def test_fields_of_the_newest_ended_tasks_are_read(self, repository: Repository) -> None:
        """They are those of one status, and come in the order of the question."""
        for number, name in enumerate("abcdefg"):
            self.add(repository, name, created_at=self.NOW + number)
        for name, end in ("a", 9), ("b", 10), ("c", 20), ("d", 30):
            self.end(repository, name, completed_at=self.NOW + end, duration=float(end))
        self.end(repository, "e", status="failed", error="no", completed_at=self.NOW + 40)
        fields = ("duration", "id", "completed_at")
        times = {"a": 9, "b": 10, "c": 20, "d": 30}
        for limit, names in (9, "abcd"), (4, "abcd"), (2, "cd"):
            found = sorted(repository.reads.newest("completed", limit, fields))
            assert found == sorted((float(times[i]), i, self.NOW + times[i]) for i in names), limit
        assert [tuple(row) for row in repository.reads.newest("failed", 9, ("error",))] == [("no",)]
        assert [*repository.reads.newest("cancelled", 9, ("id",))] == []

    # --- lists

    def test_a_list_is_read_page_by_page(self, repository: Repository) -> None:
        """Newest first, each task once, also if many were created at one moment."""
        for number, names in enumerate(("ab", "cdefg", "h")):
            self.add(repository, names, created_at=self.NOW + number)
        for names in ("ij", "k"):
            self.add(repository, names, type="u")
        filters: list[dict[str, Any]] = [{}, {"status": "pending"}]
        filters += ({"type": name} for name in "tux")
        for conditions in filters:
            whole = [task.id for task in repository.list(TaskFilter(**conditions))]
            for limit in (1, 2, 3, 20):
                assert self.paged(repository, TaskFilter(**conditions, limit=limit)) == whole

    def test_a_page_follows_whatever_is_stored_or_removed(self, repository: Repository) -> None:
        self.add(repository, "ab", created_at=self.NOW)
        self.add(repository, "cdefg", created_at=self.NOW + 1)
        whole = [task.id for task in repository.list(TaskFilter())]

        def disturb(page: Sequence[str]) -> None:
            self.apply(repository, *(Delete(task_id, {}) for task_id in page))
            self.add(repository, (f"new-{page[0]}",), created_at=self.NOW + 2)

        assert self.paged(repository, TaskFilter(limit=2), disturb) == whole

    def test_a_filter_finds_the_tasks_that_meet_its_conditions(
        self, repository: Repository
    ) -> None:
        """All conditions that it declares are applied: by lists, by pages of them, and by counts."""
        for task_id, (error, error_type, params) in FILTERED.items():
            given = {"error": error, "error_type": error_type, "params": json.dumps(params)}
            known = {name: given[name] for name in repository.conditions & given.keys()}
            self.add(repository, [task_id], **known)
        for conditions, expected in FILTERS:
            filter = TaskFilter(**conditions)
            if not filter.given <= repository.conditions:
                continue
            if filter.params is not None and repository.codecs.given:
                for method in (repository.list, repository.count):
                    with self.raises(ConfigurationError):
                        method(filter)
                continue
            listed = [task.id for task in repository.list(filter)]
            assert sorted(listed) == sorted(expected), conditions
            assert self.paged(repository, attrs.evolve(filter, limit=1)) == listed, conditions
            assert repository.count(filter) == len(expected), conditions
            assert all(filter.matches(repository.get_by_id(task_id)) for task_id in expected)

    def test_a_filter_finds_the_children_of_a_task(self, repository: Repository) -> None:
        self.skip_if("parent" not in repository.conditions, "does not filter by parent")
        for task_id, parents in {"a": "pq", "b": "p", "c": "a"}.items():
            self.add(repository, task_id, depends_on=ids_to_text([*parents]))
        for parent, expected in {"p": "ba", "q": "a", "a": "c", "c": "", "%": "", "": ""}.items():
            filter = TaskFilter(parent=parent, limit=1)
            assert self.paged(repository, filter) == [*expected]
            assert repository.count(filter) == repository.reads.count_to(filter, 5) == len(expected)
            assert all(filter.matches(repository.get_by_id(task_id)) for task_id in expected)
        assert self.paged(repository, TaskFilter(parent="p", type="other")) == []

    def test_a_filter_finds_the_tasks_with_all_its_tags(self, repository: Repository) -> None:
        """In lists, in pages of them and in counts. New tags replace the old ones, and go with the task."""
        self.skip_if("tag" not in repository.conditions, "does not filter by tag")
        tagged = {"a": ("red", "x"), "b": ("red",), "c": (), "d": ("Red", "re"), "e": ("x", "red")}
        for task_id, tags in tagged.items():
            flow = "f" if task_id in "ce" else ""
            self.add(repository, [task_id], tags=labels_to_text(tags, flow), type=task_id)
        self.end(repository, "ab")
        cases: list[tuple[dict[str, Any], str]] = [
            ({"tag": "red"}, "eba"),
            ({"tag": "re"}, "d"),
            ({"tag": "flow"}, ""),
            ({"tag": ["x", "red"]}, "ea"),
            ({"tag": ["red", "x", "re"]}, ""),
            ({"flow": "f"}, "ec"),
            ({"flow": "red"}, ""),
            ({"flow": "f", "tag": "red"}, "e"),
            ({"tag": "red", "status": "completed"}, "ba"),
            ({"tag": ["red", "x"], "status": "completed"}, "a"),
            ({"tag": "red", "status": "pending"}, "e"),
            ({"tag": "red", "type": "b"}, "b"),
            ({"tag": "red", "id_prefix": "a"}, "a"),
            ({"tag": "red", "parent": "a"}, ""),
            *(({"tag": text}, "") for text in HOSTILE if text and " " not in text),
        ]
        for conditions, expected in cases:
            filter = TaskFilter(**conditions, limit=1)
            assert self.paged(repository, filter) == [*expected], conditions
            assert repository.count(filter) == repository.reads.count_to(filter, 5) == len(expected)
            assert all(filter.matches(repository.get_by_id(task_id)) for task_id in expected)
        self.change(repository, "a", tags=labels_to_text(["new"]))
        self.change(repository, "b", tags=None)
        self.apply(repository, Delete("e", {}))
        self.add(repository, "e")
        found = [self.paged(repository, TaskFilter(tag=tag)) for tag in ("red", "x", "new")]
        assert found == [[], [], ["a"]]

    def test_flows_come_in_the_reverse_order_of_their_ids(self, repository: Repository) -> None:
        self.skip_if(not self.keeps_every_field, "keeps no tags")
        assert list(repository.reads.flows("", 5)) == []
        for task_id, flow in zip("abcde", ("f2", "f1", "f3", "f2", ""), strict=True):
            self.add(repository, task_id, tags=labels_to_text(["x", "z"], flow))
        self.end(repository, "a")
        every = ["f3", "f2", "f1"]
        for before, expected in {"": every, "f4": every, "f3": every[1:], "f1": []}.items():
            for limit in range(1, 5):
                assert list(repository.reads.flows(before, limit)) == expected[:limit]
        if "flow" in repository.conditions:
            counts = self.by_status(repository, TaskFilter(flow="f2"), 5)
            assert counts == {"pending": 1, "completed": 1}
        self.change(repository, "c", tags=labels_to_text(["x"]))
        self.apply(repository, Delete("b", {}))
        assert list(repository.reads.flows("", 5)) == ["f2"]

    def test_tasks_are_counted_by_their_status(self, repository: Repository) -> None:
        self.add(repository, "abcd")
        self.end(repository, "ab")
        self.end(repository, "c", status="failed")
        every = {"pending": 1, "completed": 2, "failed": 1}
        assert self.by_status(repository, TaskFilter(limit=1), 4) == every
        assert self.by_status(repository, TaskFilter(status=TaskStatus.FAILED), 4) == {"failed": 1}
        assert self.by_status(repository, TaskFilter(type="other"), 4) == {}
        for most in range(1, 4):
            assert sum(self.by_status(repository, TaskFilter(), most).values()) == most

    def by_status(self, repository: Repository, filter: TaskFilter, most: int) -> dict[str, int]:
        """Return the counts of the statuses that some tasks have."""
        counts = repository.reads.count_by_status(filter, most)
        return {status: count for status, count in counts.items() if count}

    def test_several_tagged_tasks_are_stored_all_or_none(self, repository: Repository) -> None:
        self.skip_if("tag" not in repository.conditions, "does not filter by tag")
        self.add(repository, "b")
        tagged = [self.insert(task_id, tags=labels_to_text(["red"])) for task_id in "abc"]
        results = repository.apply(tagged, all_or_nothing=True)
        assert [*results] == [True, False, True]
        assert repository.count(TaskFilter(tag="red")) == 0
        assert all(repository.apply([tagged[0], tagged[2]], all_or_nothing=True))
        assert self.paged(repository, TaskFilter(tag="red", limit=1)) == ["c", "a"]

    def test_a_count_stops_at_the_largest_number(self, repository: Repository) -> None:
        self.add(repository, "abc")
        for most in range(5):
            assert repository.reads.count_to(TaskFilter(limit=1), most) == min(most, 3)
        assert repository.reads.count_to(TaskFilter(type="other"), 2) == 0

    def test_an_ended_task_has_what_pruning_needs(self, repository: Repository) -> None:
        """Its parents and its key are listed; a task whose thread still runs is left out."""
        self.skip_if(repository.shortcoming)
        key = {"unique_key": "k", "unique_scope": "60.0", "unique_lock": "l"}
        self.add(repository, "a", depends_on=ids_to_text(["p"]), **key)
        self.add(repository, "b")
        self.end(repository, "ab")
        self.change(repository, "b", stuck_on="p")
        [found] = repository.ended("completed", self.NOW + 1, 10)
        assert (found.stub.id, found.stub.status) == ("a", "completed")
        assert ([*found.depends_on], found.unique_lock, found.unique_scope) == (["p"], "l", "60.0")

    # --- notes

    def test_a_note_is_changed_only_with_its_current_version(self, repository: Repository) -> None:
        """Each change raises the version by one; a note that is made again has another version."""
        self.skip_if(repository.shortcoming)
        assert repository.notes("") == {}
        assert repository.put_note("a/1", "one ☃", 0)
        version = repository.notes("a/1")["a/1"].version
        assert version > 0
        for stale in (
            ("a/1", "again", 0),
            ("a/1", "stale", version + 1),
            ("a/1", None, version - 1),
            ("a/1", None, 0),
            ("b", "there is none", version),
        ):
            assert not repository.put_note(*stale), stale
        assert repository.put_note("b", None, 0)
        assert repository.notes("") == {"a/1": ("one ☃", version)}
        assert repository.put_note("a/1", "two", version)
        assert repository.notes("") == {"a/1": ("two", version + 1)}
        assert not repository.put_note("a/1", "stale", version)
        assert repository.put_note("a/1", None, version + 1)
        assert repository.notes("") == {}
        assert repository.put_note("a/1", "new", 0)
        assert not repository.put_note("a/1", "stale", version)

    def test_each_of_several_notes_is_put_if_its_version_fits(self, repository: Repository) -> None:
        self.skip_if(repository.shortcoming)
        assert list(repository.put_notes([NoteChange(i, "old", 0) for i in "abc"])) == [True] * 3
        versions = {name: note.version for name, note in repository.notes("").items()}
        assert repository.put_note("c", "another's", versions["c"])
        changes = [NoteChange(name, f"new {name}", versions[name]) for name in "abc"]
        assert list(repository.put_notes(changes)) == [True, True, False]
        notes = repository.notes("")
        assert [notes[name].text for name in "abc"] == ["new a", "new b", "another's"]
        mixed = [NoteChange("a", None, notes["a"].version), NoteChange("d", "first", 0)]
        assert list(repository.put_notes(mixed)) == [True, True]
        assert sorted(repository.notes("")) == ["b", "c", "d"]

    def test_notes_are_found_by_the_beginning_of_their_name(self, repository: Repository) -> None:
        self.skip_if(repository.shortcoming)
        names = ["x", "x/%", "x/.*", "x/_", "x/ü", "y/x/"]
        repository.put_notes([NoteChange(name, name, 0) for name in names])
        for prefix, found in (("x/", names[1:5]), ("x/_", ["x/_"]), ("x/.", ["x/.*"]), ("", names)):
            assert sorted(repository.notes(prefix)) == found

    def test_notes_are_found_by_their_names(self, repository: Repository) -> None:
        self.skip_if(repository.shortcoming)
        names = [f"x/{n:04}" for n in range(600)]  # more than a query may take
        stored = names[::30]
        repository.put_notes([NoteChange(name, name, 0) for name in ("x", "x/00", *stored)])
        assert repository.reads.notes_named([]) == {}
        asked = [*names, "y"]
        assert {name: note.text for name, note in repository.reads.notes_named(asked).items()} == {
            name: name for name in stored
        }
        assert repository.reads.notes_named(["x/00"]) == repository.reads.notes_named(
            ["x/00", "x/000"]
        )

    def test_notes_are_read_in_pages(self, repository: Repository) -> None:
        self.skip_if(repository.shortcoming)
        names = ["w/z", "x", "x/", "x/%", "x/B", "x/_", "x/a", "x/é", "x/😀", "x0"]
        repository.put_notes([NoteChange(name, name, 0) for name in names])
        found, after = list[str](), "x/"
        while page := repository.reads.notes_after("x/", after, 2):
            assert len(page) <= 2
            assert page == repository.reads.notes_named([*page])
            found += page
            after = found[-1]
        assert found == names[3:9]

    # --- changes, opening and closing

    def test_the_version_changes_when_others_write(self, repository: Repository) -> None:
        """The version may change late, and need not change for the object's own writes."""
        with self.second(repository) as other:
            self.skip_if(other is repository, "there is one object on the data")
            pause, seen = threading.Event(), repository.version()
            self.add(other, "a")
            for _ in range(1000):
                if repository.version() != seen:
                    return
                pause.wait(0.01)  # a store may ask its server now and then
            raise AssertionError("the version is still the same")

    def test_the_revision_changes_with_every_commit(self, repository: Repository) -> None:
        """A repository that cannot tell of all commits has none."""
        self.add(repository, "a")
        self.skip_if(
            repository.news.revision() is None, "the repository cannot tell of all commits"
        )
        with self.second(repository) as other:
            seen = [repr(repository.news.revision())]
            self.add(repository, "b")
            seen.append(repr(repository.news.revision()))
            assert repository.put_note("n", "text", 0)
            seen.append(repr(repository.news.revision()))
            self.add(other, "c")
            seen.append(repr(repository.news.revision()))
            assert len({*seen}) == len(seen)
            assert repr(repository.news.revision()) == seen[-1]

    def test_another_object_sees_and_changes_the_same_tasks(self, repository: Repository) -> None:
        """Changes are seen at once, by guards, too."""
        with self.second(repository) as other:
            self.add(repository, "a")
            take = Update("a", {"owner": ""}, {"owner": "node"})
            assert self.apply(other, take, self.insert("a")) == [True, False]
            assert self.apply(repository, take) == [False]
            assert self.columns(repository, "owner") == {"a": "node"}
            if not repository.shortcoming:
                assert other.put_note("n", "text", 0)
                assert not repository.put_note("n", "text", 0)

    def test_a_closed_repository_opens_again(self, repository: Repository) -> None:
        """It opens at the next operation; closing it twice is no error."""
        self.add(repository, "a")
        repository.house.ensure_there()
        repository.close()
        repository.close()
        repository.house.ensure_there()
        self.add(repository, "b")
        assert {"b"} <= set(self.columns(repository)) <= {"a", "b"}
        assert not repository.entered

    # --- helpers

    def second(self, repository: Repository) -> AbstractContextManager[Repository]:
        """Return another object on the same data; the same one if no other is possible."""
        return self.another(repository) or nullcontext(repository)

    def insert(self, task_id: str, **columns: Any) -> Insert:
        """Return the write of a new task of type ``t``, with these columns."""
        row = {name: DEFAULTS.get(name) for name in CREATED}
        row |= {"id": task_id, "type": "t", "created_at": self.NOW, "held": FREE}
        return Insert({**row, **columns})

    def apply(self, repository: Repository, *writes: Write) -> list[bool]:
        """Apply writes; return for each True if its guard held."""
        return list(repository.apply(writes))

    def add(self, repository: Repository, ids: Iterable[str], **columns: Any) -> None:
        """Store new tasks with these columns."""
        assert all(self.apply(repository, *(self.insert(task_id, **columns) for task_id in ids)))

    def change(self, repository: Repository, ids: str, guard: Any = None, **columns: Any) -> None:
        """Set columns of tasks, and assert that they meet a guard."""
        assert all(self.apply(repository, *(Update(i, guard or {}, columns) for i in ids)))

    def end(self, repository: Repository, ids: str, **columns: Any) -> None:
        """End tasks: completed at :attr:`NOW`, unless ``columns`` say otherwise."""
        completed = {"status": "completed", "completed_at": self.NOW, "owner": ""}
        self.change(repository, ids, **{**completed, **columns})

    def columns(self, repository: Repository, column: str = "status") -> dict[str, Any]:
        """Return a column of the tasks ``a``, ``b`` and ``c``, by id."""
        return dict(repository.find("id", ["a", "b", "c"], ("id", column)))

    def paged(
        self,
        repository: Repository,
        filter: TaskFilter,
        between: Callable[[Sequence[str]], None] = lambda page: None,
    ) -> list[str]:
        """Return the ids of a list that is read page by page; call ``between`` with each page."""
        found: list[str] = []
        tasks, after = repository.reads.list_after(filter)
        while tasks:
            page = [task.id for task in tasks]
            found += page
            between(page)
            place = json.loads(json.dumps(after))  # a place may be kept as text between two pages
            tasks, after = repository.reads.list_after(filter, place)
        return found

    def ids(self, rows: Iterable[Sequence[Any]]) -> list[str]:
        """Return the ids of stubs or of rows that begin with an id."""
        return [row[0] for row in rows]

    def assert_found(
        self, repository: Repository, column: Lookup, expected: Mapping[str, str]
    ) -> None:
        """Assert that each value finds these tasks, that others find none, and that values are listed."""
        rows = repository.find(column, VALUES, (VALUE_OF.get(column, column), "id"))
        found: dict[str, str] = {}
        for value, task_id in rows if column == "line" else sorted(rows):
            found[value] = found.get(value, "") + task_id
        assert found == expected
        for limit in range(len(rows) + 1):
            assert len(repository.find(column, VALUES, ("id",), limit)) == limit
        if column in get_args(Listed):
            self.assert_listed(repository, cast("Listed", column), sorted(expected))

    def assert_listed(self, repository: Repository, column: Listed, values: list[str]) -> None:
        """Assert that a column has these values: all at once, and page by page."""
        for limit in (1, 2, 10):
            listed: list[str] = []
            while page := repository.distinct(column, listed[-1] if listed else "", limit):
                assert list(page) == values[len(listed) :][:limit]
                listed += page
            assert listed == values

    def assert_ready(
        self, repository: Repository, ids: str, types: str = "t", **asked: Any
    ) -> None:
        """Assert that these tasks may start, best first, for every limit."""
        for limit in range(len(ids) + 2):
            assert self.ids(repository.ready([*types], limit, **asked)) == [*ids[:limit]]
