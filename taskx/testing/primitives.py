"""The contract of the primitives."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from taskx.core.codec import CODED
from taskx.core.errors import ConfigurationError, RepositoryError
from taskx.core.model import TASK_FIELDS, Task, TaskFilter, TaskStatus
from taskx.core.payload import loads
from taskx.core.record import (
    BY_THREAD,
    COLUMNS,
    DEFAULTS,
    FOR_PARENTS,
    FOR_TURN,
    FREE,
    UNTIL_DUE,
    Ended,
    Stub,
    ids_to_text,
    policy_to_text,
    task_from_row,
)
from taskx.core.retry import RetryPolicy
from taskx.core.writes import CREATED, PRESENT, Delete, Insert, NoteChange, Update, Write
from taskx.storage.base import Listed, Lookup, Repository
from taskx.testing.contract import Contract

#: Values that mean something in a query language, and nothing here.
HOSTILE = ("", "%", "_", "$ne", ".*", "' OR 1=1 --", '{"$ne": null}')


class PrimitivesContract(Contract):
    """What every :class:`~taskx.storage.base.Repository` must do, beside the eight methods, as tests.

    Inherit it in a test module, give it a fixture ``repository`` that makes an empty one, and run
    pytest:

    .. code-block:: python

        class TestMyPrimitives(PrimitivesContract):
            @pytest.fixture
            def repository(self, tmp_path):
                with MyRepository(tmp_path) as repository:
                    yield repository

            def another(self, repository):
                return MyRepository(repository.path)

    Run it once more with a repository that has a codec: all is as without one. What a repository cannot do
    is declared: by itself in :attr:`~taskx.storage.base.Repository.shortcoming`, and here.

    Attributes:
        keeps_every_field: True if it keeps every field of a task, False if only the thirteen of the
            original TaskX.
    """

    keeps_every_field: bool = True

    #: When the tasks of these tests were created, in milliseconds.
    NOW = 1_709_208_000_123

    def another(self, repository: Repository) -> Repository | None:
        """Make another object on the same data, as another process would; None where there can be none."""
        return None

    def losing_answers(self, repository: Repository) -> AbstractContextManager[object] | None:
        """Let ``apply`` do its work and then fail, in doubt; None where it cannot be in doubt."""
        return None

    # --- apply

    def test_each_write_says_whether_its_guard_held(self, repository: Repository) -> None:
        """In the order of the writes; those that held are applied."""
        self.add(repository, "a")
        writes: list[Write] = [
            self.insert("a"),
            Update("a", {"status": "pending"}, {"message": "held"}),
            Update("a", {"status": "running"}, {"message": "did not"}),
            Update("nobody", {}, {"message": "no such task"}),
            Delete("nobody", {}),
            self.insert("b"),
        ]
        assert self.apply(repository, *writes) == [False, True, False, False, False, True]
        assert self.columns(repository, "message") == {"a": "held", "b": ""}

    def test_a_later_write_sees_an_earlier_one(self, repository: Repository) -> None:
        """Of one task, in one call."""
        self.add(repository, "a")
        first = Update("a", {"message": ""}, {"message": "one"})
        second = Update("a", {"message": "one"}, {"message": "two"})
        assert self.apply(repository, second, first, second, second) == [False, True, True, False]
        assert self.apply(repository, Delete("a", {}), self.insert("a")) == [True, True]
        assert self.columns(repository, "message") == {"a": ""}

    def test_alike_writes_are_told_apart(self, repository: Repository) -> None:
        """Also if the repository sends many of them together."""
        owners = {str(number): "other" if number % 7 == 0 else "" for number in range(60)}
        self.apply(repository, *(self.insert(name, owner=owners[name]) for name in owners))
        takes = [Update(str(n), {"owner": ""}, {"owner": "node"}) for n in range(61)]
        held = [owners.get(write.id) == "" for write in takes]
        assert self.apply(repository, *takes) == held
        assert self.apply(repository, *takes) == [False] * 61
        given_up = Update("1", {"owner": "node"}, {"owner": ""})
        assert self.apply(repository, given_up, given_up) == [True, False]

    def test_no_writes_are_fine(self, repository: Repository) -> None:
        """Nothing is done then."""
        assert self.apply(repository) == []

    def test_every_form_of_guard(self, repository: Repository) -> None:
        """A value, None, one of several, or present; all of them must hold."""
        cases: list[tuple[dict[str, Any], bool]] = [
            ({}, True),
            ({"message": "said"}, True),
            ({"message": "SAID"}, False),
            ({"message": ""}, False),
            ({"progress": 0}, True),
            ({"progress": 1}, False),
            ({"run_at": None}, True),
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
        for number, (guard, holds) in enumerate(cases):
            task_id = str(number)
            self.add(repository, task_id)
            changes = {"status": "running", "started_at": self.NOW, "message": "said"}
            assert self.apply(repository, Update(task_id, {}, changes)) == [True]
            change = Update(task_id, guard, {"progress": 0})
            assert self.apply(repository, change) == [holds], guard
            assert self.apply(repository, Delete(task_id, guard)) == [holds], guard
            assert bool(self.columns(repository, "status", [task_id])) is not holds, guard

    def test_every_column_is_kept(self, repository: Repository) -> None:
        """As it was given, value and type, by inserts and by updates."""
        if not self.keeps_every_field:
            self.skip("keeps the original's thirteen fields only")
        given: dict[str, Any] = {"params": '{"text":"naïve ☃","n":[1,-0.5,null]}'}
        given |= {"created_by": "user123", "priority": -7, "run_at": self.NOW + 1, "timeout": 2.5}
        given |= {"max_attempts": 4, "max_crashes": 2, "owner": "node", "held": UNTIL_DUE}
        given["retry"] = policy_to_text(RetryPolicy(4, backoff="linear", retry_on=(OSError,)))
        changed: dict[str, Any] = {"status": "running", "progress": 50, "message": "half"}
        changed |= {"error": "broke", "error_type": "OSError", "traceback": "Traceback …"}
        changed |= {"started_at": self.NOW + 2, "cancel_requested_at": self.NOW + 3}
        changed |= {"errors": 1, "crashes": 2, "interruptions": 3, "snoozes": 4, "starts": 5}
        changed |= {"dead_letter": 1, "worker": "host:1", "log": "ä\nö\n", "held": FREE}
        changed["earlier_attempts"] = '[["failed",1,2,"w","e","t","T"]]'
        changed["checkpoints"] = '{"steps":{"a.$b":[1,null,{"":2.5}]},"cursor":"ä"}'
        if not repository.shortcoming:
            given |= {"unique_key": "k", "unique_scope": "ever", "unique_lock": "k", "turn": "c"}
            given |= {"depends_on": ids_to_text(["p"]), "on_parent_failure": "run"}
            given |= {"concurrency_key": "c"}
        self.add(repository, "a", **given)
        assert self.apply(repository, Update("a", {}, changed)) == [True]
        expected = {**DEFAULTS, "id": "a", "type": "t", "created_at": self.NOW, **given, **changed}
        task = self.task(repository, "a")
        assert task == task_from_row([expected[name] for name in TASK_FIELDS])
        if not repository.shortcoming:
            assert [*repository.list(TaskFilter(status=TaskStatus.RUNNING))] == [task]
        [row] = repository.find("id", ["a"], COLUMNS)
        stored = dict(zip(COLUMNS, row, strict=True))
        plain = [name for name in COLUMNS if name not in CODED]  # a codec changes the others
        assert {name: stored[name] for name in plain} == {name: expected[name] for name in plain}

    def test_any_json_value_comes_back(self, repository: Repository) -> None:
        """As a result; coded or not."""
        self.add(repository, "a")
        for text in ('{"a":[1]}', "[]", "0", "-1.5", '"text ☃"', "false", "null", None):
            changes = {"result": text, "message": f"{text}"}
            assert self.apply(repository, Update("a", {}, changes)) == [True]
            task = self.task(repository, "a")
            assert task.result == (None if text is None else loads(text))
            assert task.damage == ""

    def test_several_new_tasks_are_stored_all_or_none(self, repository: Repository) -> None:
        """The ids at fault are those that are told False."""
        a, b, c = self.insert("a"), self.insert("b"), self.insert("c")
        assert list(repository.apply([a], all_or_nothing=True)) == [True]
        if repository.shortcoming:
            with self.raises(ConfigurationError):
                repository.apply([b, c], all_or_nothing=True)
            assert [*self.columns(repository)] == ["a"]
            return
        again = self.insert("b")
        for writes, told in (
            ([b, a], [True, False]),
            ([b, again, a], [True, False, False]),
            ([b, c, again], [True, True, False]),
        ):
            assert list(repository.apply(writes, all_or_nothing=True)) == told
            assert [*self.columns(repository)] == ["a"]
        assert list(repository.apply([b, c], all_or_nothing=True)) == [True, True]
        assert sorted(self.columns(repository)) == ["a", "b", "c"]

    def test_no_two_tasks_have_the_same_in_a_unique_column(self, repository: Repository) -> None:
        """The write that would make it so does not hold; given up or deleted, the value is free."""
        if self.refused(repository, self.insert("a", unique_key="k", unique_lock="k")):
            return
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
        assert self.apply(repository, Update("b", {}, {"turn": "t"})) == [True]  # its own
        assert self.apply(repository, Update("a", {}, {"unique_lock": None}), second) == [True] * 2
        assert self.apply(repository, Delete("c", {}), second) == [True] * 2

    def test_one_of_many_threads_wins_a_start(self, repository: Repository) -> None:
        """A guard and its change are one step."""
        self.assert_one_winner([repository] * 4)

    def test_one_of_several_objects_wins_a_start(self, repository: Repository) -> None:
        """So it is between processes."""
        with self.second(repository) as other:
            self.assert_one_winner([repository, other] * 2)

    def test_one_of_many_threads_gets_a_unique_value(self, repository: Repository) -> None:
        """Whichever inserts first."""
        if repository.shortcoming:
            self.skip(repository.shortcoming)

        def work(thread: int) -> list[str]:
            keys = [(key, f"{key}{thread}") for key in "abcdefgh"]
            held = [self.apply(repository, self.insert(i, unique_lock=key)) for key, i in keys]
            return [key for (key, _), [won] in zip(keys, held, strict=True) if won]

        won = cast("list[list[str]]", self.in_threads(work))
        assert sorted(key for keys in won for key in keys) == list("abcdefgh")

    def test_a_write_that_is_sent_again_is_not_done_twice(self, repository: Repository) -> None:
        """As the same object, after an error in doubt; another object is another write."""
        self.add(repository, "a")
        self.add(repository, "b")
        writes: list[Write] = [
            self.insert("c", created_by="me"),
            Update("a", {"starts": 0, "status": "pending"}, {"starts": 1, "status": "running"}),
            Delete("b", {"status": "pending"}),
        ]
        doubts = []
        for write in writes:
            losing = self.losing_answers(repository)
            if losing is None:
                self.skip("its errors are never in doubt")
            with losing:
                try:
                    self.apply(repository, write)
                except RepositoryError as error:
                    doubts.append(error.in_doubt)
        assert doubts == [True] * 3
        assert self.apply(repository, *writes) == [True] * 3
        assert self.columns(repository, "starts") == {"a": 1, "c": 0}
        assert self.apply(repository, *(write._replace() for write in writes)) == [False] * 3

    # --- find and distinct

    def test_tasks_are_found_by_their_id(self, repository: Repository) -> None:
        """Those that exist, with the fields asked for in the order asked for."""
        self.apply(repository, *(self.insert(f"task-{n}", created_by=str(n)) for n in range(1201)))
        ids = [f"task-{number}" for number in range(1201)]
        found = repository.find("id", [*ids, "missing"], ("created_by", "status", "id"))
        assert sorted(found) == sorted((str(n), "pending", f"task-{n}") for n in range(1201))
        assert list(repository.find("id", [], ("id",))) == []
        assert list(repository.find("id", HOSTILE, ("id",))) == []
        assert len(repository.find("id", ids, ("id",), 3)) == 3
        assert len(repository.find("id", ids, ("id",), 1000)) == 1000
        assert list(repository.find("id", ids, ("id",), 0)) == []

    def test_tasks_are_found_by_what_is_unique(self, repository: Repository) -> None:
        """Whatever their status; none where nobody has it."""
        if self.refused(repository, self.insert("a", unique_key="k", unique_lock="k")):
            return
        self.add(repository, "b", turn="t")
        self.end(repository, "a", self.NOW)
        assert list(repository.find("unique_lock", ["k", "l"], ("unique_lock", "id"))) == [
            ("k", "a")
        ]
        assert list(repository.find("turn", ["t", "k"], ("id", "turn"))) == [("b", "t")]
        self.apply(repository, Update("a", {}, {"unique_lock": None}), Delete("b", {}))
        assert [*repository.find("unique_lock", ["k"], ("id",))] == []
        assert [*repository.find("turn", ["t"], ("id",))] == []

    def test_waiting_tasks_are_found_by_their_parent(self, repository: Repository) -> None:
        """By the one that they wait on, as long as they wait for it."""
        if self.refused(repository, self.insert("x", depends_on=ids_to_text(["p"]))):
            return
        for child, parent in {"a": "p", "b": "q", "c": "q", "d": "r"}.items():
            parents = ids_to_text([parent, "other"])
            self.add(repository, child, depends_on=parents, held=FOR_PARENTS, waiting_on=parent)
        assert self.found(repository, "waiting_on", ["q", "r", "s"]) == ["b", "c", "d"]
        self.assert_listed(repository, "waiting_on", ["p", "q", "r"])
        moved = Update("b", {"waiting_on": "q"}, {"waiting_on": "p"})
        freed = Update("c", {"waiting_on": "q"}, {"waiting_on": None, "held": FREE})
        assert self.apply(repository, moved, freed, Delete("d", {})) == [True] * 3
        assert self.found(repository, "waiting_on", ["p", "q", "r"]) == ["a", "b"]
        self.assert_listed(repository, "waiting_on", ["p"])

    def test_tasks_are_found_by_each_of_their_parents(self, repository: Repository) -> None:
        """In pairs, whatever their status, until they are deleted."""
        if self.refused(repository, self.insert("x", depends_on=ids_to_text(["p", "q"]))):
            return
        self.add(repository, "y", depends_on=ids_to_text(["x", "q"]))
        pairs = repository.find("parent", ["q", "x", "y"], ("parent", "id"))
        assert sorted(pairs) == [("q", "x"), ("q", "y"), ("x", "y")]
        assert len(repository.find("parent", ["q", "x"], ("id",), 2)) == 2
        self.end(repository, "y", self.NOW)
        self.apply(repository, Delete("x", {}))
        assert sorted(repository.find("parent", ["p", "q", "x"], ("id", "parent"))) == [
            ("y", "q"),
            ("y", "x"),
        ]
        self.apply(repository, Delete("y", {}))
        assert [*repository.find("parent", ["p", "q", "x"], ("id",))] == []

    def test_those_in_line_are_found_in_their_order(self, repository: Repository) -> None:
        """First come, first served."""
        if self.refused(repository, self.insert("f", concurrency_key="k", held=FOR_TURN)):
            return
        for task_id in "cab":
            self.add(repository, task_id, concurrency_key="k", held=FOR_TURN)
        self.add(repository, "x", concurrency_key="other", held=FOR_TURN)
        assert self.ids(repository.find("line", ["k"], ("id",))) == list("fcab")
        assert self.ids(repository.find("line", ["k"], ("id",), 2)) == ["f", "c"]
        assert sorted(repository.find("line", ["other", "k", "no"], ("id",)))[-1] == ("x",)
        self.assert_listed(repository, "line", ["k", "other"])
        served = Update("f", {"held": FOR_TURN}, {"held": FREE, "turn": "k"})
        assert self.apply(repository, served, Delete("x", {})) == [True, True]
        self.end(repository, "c", self.NOW, "cancelled")
        assert self.ids(repository.find("line", ["k", "other"], ("id",))) == ["a", "b"]
        self.assert_listed(repository, "line", ["k"])

    def test_tasks_are_found_by_their_owner(self, repository: Repository) -> None:
        """The running ones, and those that wait in a buffer; nobody is no owner."""
        self.add(repository, "free")
        for name, owner in (("a", "one"), ("b", "two"), ("c", "two")):
            self.add(repository, name, owner=owner)
        self.add(repository, "held", owner="three")
        self.hold(repository, "held")
        self.start(repository, "b")
        assert self.found(repository, "buffered_on", ["one", "two", "three", "nobody"]) == [
            "a",
            "c",
        ]
        assert self.found(repository, "running_on", ["one", "two", "three", "nobody"]) == ["b"]
        self.assert_listed(repository, "buffered_on", ["one", "two"])
        self.assert_listed(repository, "running_on", ["two"])
        self.end(repository, "b", self.NOW)
        assert self.apply(repository, Update("c", {}, {"owner": "one"})) == [True]
        self.assert_listed(repository, "running_on", [])
        self.assert_listed(repository, "buffered_on", ["one"])
        assert len(repository.find("buffered_on", ["one"], ("id",), 1)) == 1
        assert self.found(repository, "buffered_on", HOSTILE) == []
        assert self.found(repository, "running_on", HOSTILE) == []

    def test_tasks_with_a_stuck_thread_are_found(self, repository: Repository) -> None:
        """By the node of the thread, whatever their status."""
        self.add(repository, "a")
        self.add(repository, "b")
        self.hold(repository, "a")
        self.hold(repository, "b")
        self.end(repository, "a", self.NOW, "failed")
        assert self.found(repository, "stuck_on", ["node", *HOSTILE]) == ["a", "b"]
        self.assert_listed(repository, "stuck_on", ["node"])
        lifted = [Update(i, {"stuck_on": "node"}, {"stuck_on": "", "held": FREE}) for i in "ab"]
        assert self.apply(repository, *lifted) == [True, True]
        assert self.found(repository, "stuck_on", ["node"]) == []
        self.assert_listed(repository, "stuck_on", [])

    def test_the_types_of_what_may_start_are_listed(self, repository: Repository) -> None:
        """Whoever holds it."""
        self.add(repository, "a", type="u", owner="node")
        self.add(repository, "b", type="t")
        self.add(repository, "c", type="v")
        self.hold(repository, "c")
        self.add(repository, "d", type="w")
        self.start(repository, "d")
        self.assert_listed(repository, "ready_type", ["t", "u"])

    # --- ready

    def test_ready_tasks_come_by_priority_and_then_as_they_were_stored(
        self, repository: Repository
    ) -> None:
        """Whatever their type, and whatever the clock said."""
        kept = self.keeps_every_field
        for number, priority in enumerate([0, 5, -5, 5, 0]):
            options = {"priority": priority} if kept else {}
            created_at = self.NOW - number * 1000
            kind = "tu"[number % 2]
            self.add(repository, str(number), type=kind, created_at=created_at, **options)
        order = list("13042" if kept else "01234")
        assert self.ids(repository.ready(["u", "t"], 10)) == order
        assert self.ids(repository.ready(["u", "t"], 3)) == order[:3]
        assert self.ids(repository.ready(["u", "t"], 0)) == []
        assert self.ids(repository.ready([], 10)) == []
        assert self.ids(repository.ready(["t", *HOSTILE], 10)) == [i for i in order if i in "024"]

    def test_ready_tasks_are_pending_not_held_and_of_one_owner(
        self, repository: Repository
    ) -> None:
        """Nobody's unless asked for those of a node."""
        for name, owner in (("a", ""), ("b", "one"), ("c", "two"), ("d", "one"), ("e", "one")):
            self.add(repository, name, owner=owner)
        self.add(repository, "f")
        self.hold(repository, "f")
        self.start(repository, "d")
        self.end(repository, "e", self.NOW, "cancelled")
        assert self.ids(repository.ready(["t"], 10)) == ["a"]
        assert self.ids(repository.ready(["t"], 10, "one")) == ["b"]
        assert self.ids(repository.ready(["t"], 10, "nobody")) == []
        moves = [
            Update("b", {"owner": "one"}, {"owner": "two"}),
            Update("a", {"owner": ""}, {"owner": "one"}),
            Update("f", {"held": BY_THREAD}, {"held": FREE}),
        ]
        assert self.apply(repository, *moves) == [True] * 3
        assert self.ids(repository.ready(["t"], 10)) == ["f"]
        assert self.ids(repository.ready(["t"], 10, "two")) == ["b", "c"]
        assert self.ids(repository.ready(["t"], 1, "two")) == ["b"]

    def test_with_ageing_so_much_waiting_counts_as_one_priority_more(
        self, repository: Repository
    ) -> None:
        """It waits since it was stored, or since its time came; equal ones go as they were stored."""
        if not self.keeps_every_field:
            self.skip("keeps no priority")
        for name, priority, kind, second in (
            ("old", 0, "t", 0),
            ("higher", 1, "u", 20),
            ("middle", 1, "t", 30),
            ("same", 1, "u", 30),
            ("high", 2, "t", 40),
            ("new", 0, "t", 51),
        ):
            created_at = self.NOW + second * 1000
            self.add(repository, name, priority=priority, type=kind, created_at=created_at)
        late = self.NOW + 60_000
        self.add(repository, "late", run_at=late, held=UNTIL_DUE)
        self.apply(repository, Update("late", {}, {"held": FREE}))
        order = ["old", "higher", "middle", "same", "high", "new", "late"]
        assert self.ids(repository.ready(["t", "u"], 10, ageing=10_000)) == order
        assert self.ids(repository.ready(["t", "u"], 3, ageing=10_000)) == order[:3]
        assert self.ids(repository.ready(["u"], 10, ageing=10_000)) == ["higher", "same"]
        assert self.ids(repository.ready(["t", "u"], 1, ageing=10**9)) == ["high"]
        assert self.ids(repository.ready([], 10, ageing=1)) == []

    def test_with_ageing_many_of_a_high_priority_hide_no_old_one(
        self, repository: Repository
    ) -> None:
        """However few are asked for."""
        if not self.keeps_every_field:
            self.skip("keeps no priority")
        self.add(repository, "old")
        later = self.NOW + 100_000
        self.apply(
            repository,
            *(self.insert(f"new {n}", priority=9, created_at=later) for n in range(50)),
        )
        assert self.ids(repository.ready(["t"], 1)) == ["new 0"]
        assert self.ids(repository.ready(["t"], 2, ageing=1000)) == ["old", "new 0"]

    def test_a_stub_says_what_the_runtime_moves_a_task_by(self, repository: Repository) -> None:
        """Its fields have the types of a row."""
        self.add(repository, "a")
        asked = Update("a", {}, {"starts": 3, "cancel_requested_at": self.NOW})
        assert self.apply(repository, asked) == [True]
        [stub] = repository.ready(["t"], 10)
        assert stub == Stub("a", "pending", 3, 0, self.NOW, True, "t", None)
        assert isinstance(stub, Stub)

    # --- due and ended

    def test_held_tasks_come_by_their_time(self, repository: Repository) -> None:
        """Those of a moment, the earliest first; all of them if no moment is given."""
        if not self.keeps_every_field:
            self.skip("keeps no run_at")
        for name, second in (("a", 2), ("b", 1), ("c", 3)):
            self.add(repository, name, run_at=self.NOW + second, held=UNTIL_DUE)
        self.add(repository, "past", run_at=self.NOW - 1)
        a, b, c = ("a", self.NOW + 2), ("b", self.NOW + 1), ("c", self.NOW + 3)
        assert list(repository.due(None, 10)) == [b, a, c]
        assert list(repository.due(self.NOW, 10)) == []
        assert list(repository.due(self.NOW + 2, 10)) == [b, a]
        assert list(repository.due(self.NOW + 2, 1)) == [b]
        assert list(repository.due(None, 0)) == []
        self.end(repository, "c", self.NOW, "cancelled")
        assert self.apply(repository, Update("b", {"held": UNTIL_DUE}, {"held": FREE})) == [True]
        assert list(repository.due(None, 10)) == [a]

    def test_ended_tasks_are_those_that_ended_before_a_moment(self, repository: Repository) -> None:
        """Of one status; it is the end that counts, not when a task was created."""
        ends = {"a": 10, "b": 20, "c": 5, "long": 30}
        for name, end in ends.items():
            self.add(repository, name, created_at=self.NOW + (0 if name == "long" else end - 5))
            self.end(repository, name, self.NOW + end)
        for name, status in (("failed", "failed"), ("cancelled", "cancelled")):
            self.add(repository, name)
            self.end(repository, name, self.NOW + 1, status)
        self.add(repository, "pending")
        self.add(repository, "running")
        self.start(repository, "running")
        for before, names in ((10, "c"), (11, "ac"), (20, "ac"), (21, "abc")):
            assert self.ended(repository, "completed", before) == list(names)
        assert self.ended(repository, "completed", 31) == ["a", "b", "c", "long"]
        assert self.ended(repository, "failed", 100) == ["failed"]
        assert self.ended(repository, "cancelled", 100) == ["cancelled"]
        assert len(repository.ended("completed", self.NOW + 100, 2)) == 2

    def test_ended_tasks_are_read_page_by_page(self, repository: Repository) -> None:
        """From the newest on, also if what was read is removed meanwhile."""
        for number, name in enumerate("abcde"):
            moment = self.NOW + number * 1000
            self.add(repository, name, created_at=moment)
            self.end(repository, name, moment + 10)
        pages, after = [], None
        while page := repository.ended("completed", self.NOW + 10**6, 2, after):
            pages.append([task.stub.id for task in page])
            after = page[-1].place
            self.apply(repository, *(Delete(task.stub.id, {}) for task in page))
        assert pages == [["e", "d"], ["c", "b"], ["a"]]

    def test_pages_go_on_if_all_tasks_ended_at_once_and_some_stay(
        self, repository: Repository
    ) -> None:
        """Each task is on one page."""
        if repository.shortcoming:
            self.skip(repository.shortcoming)
        for name in "abcde":
            self.add(repository, name)
            self.end(repository, name, self.NOW + 10)
        found: list[str] = []
        after = None
        while page := repository.ended("completed", self.NOW + 11, 2, after):
            found += (task.stub.id for task in page)
            after = page[-1].place
        assert sorted(found) == list("abcde")

    def test_an_ended_task_has_all_that_pruning_decides_by(self, repository: Repository) -> None:
        """Its parents, and the key that it holds; what a thread still runs is left out."""
        columns = {"unique_key": "k", "unique_scope": "60.0", "unique_lock": "k"}
        if self.refused(repository, self.insert("a", depends_on=ids_to_text(["p"]), **columns)):
            return
        self.add(repository, "stuck")
        self.end(repository, "stuck", self.NOW + 10)
        self.end(repository, "a", self.NOW + 10)
        self.apply(repository, Update("stuck", {}, {"stuck_on": "node"}))
        [found] = repository.ended("completed", self.NOW + 11, 10)
        assert isinstance(found, Ended)
        assert (found.stub.id, found.stub.status) == ("a", "completed")
        assert ([*found.depends_on], found.unique_lock, found.unique_scope) == (["p"], "k", "60.0")

    # --- notes

    def test_notes_are_stored_read_changed_and_removed(self, repository: Repository) -> None:
        """Each change raises the version by one."""
        if self.has_no_notes(repository):
            return
        assert repository.notes("") == {}
        assert repository.put_note("a/1", "one ☃", 0)
        version = repository.notes("a/1")["a/1"].version
        assert version > 0
        assert repository.put_note("a/1", "two", version)
        assert repository.notes("a/1")["a/1"] == ("two", version + 1)
        assert repository.put_note("a/1", None, version + 1)
        assert repository.notes("") == {}

    def test_a_stale_version_changes_no_note(self, repository: Repository) -> None:
        """Nor one that was made again: its version is new, whatever the clock says."""
        if self.has_no_notes(repository):
            return
        assert repository.put_note("a", "one", 0)
        version = repository.notes("a")["a"].version
        assert not repository.put_note("a", "again", 0)
        assert not repository.put_note("a", "stale", version + 1)
        assert not repository.put_note("a", None, version - 1)
        assert not repository.put_note("a", None, 0)
        assert not repository.put_note("b", "there is none", version)
        assert repository.put_note("b", None, 0)
        assert repository.notes("") == {"a": ("one", version)}
        assert repository.put_note("a", None, version)
        assert repository.put_note("a", "new", 0)
        assert not repository.put_note("a", "stale", version)

    def test_each_of_several_notes_is_put_if_its_version_fits(self, repository: Repository) -> None:
        """Changes and removals, in one call."""
        if self.has_no_notes(repository):
            return
        for name in "abc":
            assert repository.put_note(name, "old", 0)
        versions = {name: note.version for name, note in repository.notes("").items()}
        assert repository.put_note("b", "another's", versions["b"])
        changes = [NoteChange(name, f"new {name}", versions[name]) for name in "abc"]
        assert list(repository.put_notes(changes)) == [True, False, True]
        notes = repository.notes("")
        assert [notes[name].text for name in "abc"] == ["new a", "another's", "new c"]
        mixed = [NoteChange("a", None, notes["a"].version), NoteChange("d", "first", 0)]
        assert list(repository.put_notes(mixed)) == [True, True]
        assert sorted(repository.notes("")) == ["b", "c", "d"]

    def test_notes_are_found_by_the_beginning_of_their_name(self, repository: Repository) -> None:
        """Which is only text."""
        if self.has_no_notes(repository):
            return
        for name in ("x/%", "x/_", "x/ü", "x/.*", "y", "x"):
            assert repository.put_note(name, name, 0)
        assert sorted(repository.notes("x/")) == ["x/%", "x/.*", "x/_", "x/ü"]
        assert sorted(repository.notes("x/_")) == ["x/_"]
        assert sorted(repository.notes("x/.")) == ["x/.*"]
        assert len(repository.notes("")) == 6

    def test_of_racing_changes_of_a_note_one_is_made(self, repository: Repository) -> None:
        """No change is lost."""
        if self.has_no_notes(repository):
            return
        repository.put_note("a", "0", 0)

        def work(thread: int) -> int:
            won = 0
            for _ in range(20):
                note = repository.notes("a")["a"]
                won += repository.put_note("a", str(int(note.text) + 1), note.version)
            return won

        won = cast("list[int]", self.in_threads(work))
        assert repository.notes("a")["a"].text == str(sum(won))
        assert sum(won) >= 20

    # --- changes, opening and closing

    def test_the_version_tells_that_others_changed_something(self, repository: Repository) -> None:
        """Sooner or later; its own changes it need not tell."""
        with self.second(repository) as other:
            pause, seen = threading.Event(), repository.version()
            assert self.apply(other, self.insert("a")) == [True]
            for _ in range(1000):
                if repository.version() != seen:
                    return
                pause.wait(0.01)  # a store may ask its server now and then
            raise AssertionError("the version is still the same")

    def test_another_object_sees_and_changes_the_same_tasks(self, repository: Repository) -> None:
        """As soon as they are stored; a guard knows what the other did."""
        with self.second(repository) as other:
            self.add(repository, "a")
            take = Update("a", {"owner": ""}, {"owner": "node"})
            assert self.apply(other, take, self.insert("a")) == [True, False]
            assert self.apply(repository, take) == [False]
            assert self.columns(repository, "owner") == {"a": "node"}
            if not repository.shortcoming:
                assert other.put_note("n", "text", 0)
                assert not repository.put_note("n", "text", 0)

    def test_what_was_closed_opens_again(self, repository: Repository) -> None:
        """At the next operation; to close it twice is no error."""
        self.add(repository, "a")
        repository.ensure_there()
        repository.close()
        repository.close()
        repository.ensure_there()
        self.add(repository, "b")
        assert {"b"} <= set(self.columns(repository)) <= {"a", "b"}
        assert not repository.entered

    # --- what the tests are written with

    def second(self, repository: Repository) -> Repository:
        """Another object on the same data; skip the test where there can be none."""
        other = self.another(repository)
        if other is None:
            self.skip("there is one object on the data")
        return other

    def insert(self, task_id: str, **columns: Any) -> Insert:
        """A new task of type ``t``, with these columns."""
        row = {name: DEFAULTS.get(name) for name in CREATED}
        row |= {"id": task_id, "type": "t", "created_at": self.NOW, "held": FREE}
        return Insert({**row, **columns})

    def add(self, repository: Repository, task_id: str, **columns: Any) -> None:
        """Store a new task."""
        assert self.apply(repository, self.insert(task_id, **columns)) == [True]

    def start(self, repository: Repository, task_id: str) -> None:
        """Have a task run."""
        changes = {"status": "running", "starts": 1, "started_at": self.NOW}
        assert self.apply(repository, Update(task_id, {}, changes)) == [True]

    def hold(self, repository: Repository, task_id: str) -> None:
        """Have a pending task held back, by a thread of an earlier attempt."""
        changes = {"held": BY_THREAD, "stuck_on": "node"}
        assert self.apply(repository, Update(task_id, {}, changes)) == [True]

    def end(
        self, repository: Repository, task_id: str, moment: int, status: str = "completed"
    ) -> None:
        """Have a task ended at a moment."""
        changes = {"status": status, "completed_at": moment, "owner": ""}
        assert self.apply(repository, Update(task_id, {}, changes)) == [True]

    def apply(self, repository: Repository, *writes: Write) -> list[bool]:
        """Apply writes, and say for each whether its guard held."""
        return list(repository.apply(writes))

    def task(self, repository: Repository, task_id: str) -> Task:
        """The task with that id."""
        [row] = repository.find("id", [task_id], TASK_FIELDS)
        return task_from_row(row, repository.codecs)

    def columns(
        self, repository: Repository, column: str = "status", task_ids: Sequence[str] = "abc"
    ) -> dict[str, Any]:
        """A column of these tasks, by id."""
        return dict(repository.find("id", [*task_ids], ("id", column)))

    def found(self, repository: Repository, column: Lookup, values: Iterable[str]) -> list[str]:
        """The ids found by a lookup column, sorted."""
        return sorted(self.ids(repository.find(column, [*values], ("id",))))

    def ids(self, rows: Iterable[Sequence[Any]]) -> list[str]:
        """The ids of stubs, and of rows of an id."""
        return [row[0] for row in rows]

    def ended(self, repository: Repository, status: str, before: int) -> list[str]:
        """The ids of what ended so many milliseconds after :attr:`NOW`, sorted."""
        return sorted(task.stub.id for task in repository.ended(status, self.NOW + before, 10))

    def assert_listed(self, repository: Repository, column: Listed, values: list[str]) -> None:
        """Assert that a column has these values now: all at once, and page by page."""
        assert list(repository.distinct(column, "", 10)) == values
        for limit in (1, 2):
            listed: list[str] = []
            while page := repository.distinct(column, listed[-1] if listed else "", limit):
                assert len(page) <= limit
                listed += page
            assert listed == values

    def assert_one_winner(self, repositories: Sequence[Repository]) -> None:
        """Assert that of racing starts, one on each of these, one wins each round."""
        rounds = 50
        self.apply(repositories[0], *(self.insert(str(number)) for number in range(rounds)))
        barrier = threading.Barrier(len(repositories))

        def work(thread: int) -> list[bool]:
            won = []
            for number in range(rounds):
                start = Update(
                    str(number),
                    {"status": "pending", "starts": 0},
                    {"status": "running", "starts": 1, "owner": f"node {thread}"},
                )
                barrier.wait()
                won += self.apply(repositories[thread], start)
            return won

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            outcomes = cast("list[list[bool]]", self.in_threads(work, len(repositories)))
        finally:
            sys.setswitchinterval(interval)
        assert [sum(won) for won in zip(*outcomes, strict=True)] == [1] * rounds

    def refused(self, repository: Repository, insert: Insert) -> bool:
        """Store a task, unless the repository declares that it can hold nothing between tasks."""
        if not repository.shortcoming:
            assert self.apply(repository, insert) == [True]
            return False
        with self.raises(ConfigurationError):
            self.apply(repository, insert)
        assert not self.columns(repository, "status", [insert.id])
        return True

    def has_no_notes(self, repository: Repository) -> bool:
        """Assert that it refuses notes if it declares that it keeps none."""
        if not repository.shortcoming:
            return False
        with self.raises(ConfigurationError):
            repository.put_note("a", "one", 0)
        assert repository.notes("") == {}
        return True
