"""The contract of the primitives, which every repository keeps that the runtime can use."""

import itertools
import json
import threading
from contextlib import suppress

import pytest
from helpers import PATIENCE

from taskx import ConfigurationError, MemoryRepository, RepositoryError, Task, TaskFilter
from taskx.tasks.clock import SYSTEM_CLOCK
from taskx.tasks.writes import PRESENT, Delete, Insert, Note, Update, matches
from taskx.testing import PrimitivesContract

from .repositories import MAKERS, MONGO, Scramble, again, coded, insert, losing_answers


class OnKind(PrimitivesContract):
    """The contract, and tests of TaskX's own repositories, which group writes or can be in doubt."""

    @pytest.fixture
    def repository(self, tmp_path, kind):
        with MAKERS[kind](tmp_path, SYSTEM_CLOCK) as repository:
            yield repository

    def another(self, repository):
        return again(repository)

    def test_each_of_many_similar_writes_reports_its_own_result(self, repository):
        """It does so even if the repository sends many of them together."""
        owners = {str(number): "other" if number % 7 == 0 else "" for number in range(60)}
        self.apply(repository, *(self.insert(name, owner=owners[name]) for name in owners))
        takes = [Update(str(n), {"owner": ""}, {"owner": "node"}) for n in range(61)]
        held = [owners.get(write.id) == "" for write in takes]
        assert self.apply(repository, *takes) == held
        assert self.apply(repository, *takes) == [False] * 61
        given_up = Update("1", {"owner": "node"}, {"owner": ""})
        assert self.apply(repository, given_up, given_up) == [True, False]

    def test_a_write_that_is_sent_again_is_not_applied_twice(self, repository):
        """It must be the same object, after an error in doubt. An equal object is a new write."""
        self.add(repository, "ab")
        writes = [
            self.insert("c", created_by="me"),
            Update("a", {"starts": 0, "status": "pending"}, {"starts": 1, "status": "running"}),
            Delete("b", {"status": "pending"}),
        ]
        doubts = []
        for write in writes:
            losing = losing_answers(repository)
            self.skip_if(losing is None, "its errors are never in doubt")
            with losing:
                try:
                    self.apply(repository, write)
                except RepositoryError as error:
                    doubts.append(error.in_doubt)
        assert doubts == [True] * 3
        assert self.apply(repository, *writes) == [True] * 3
        assert self.columns(repository, "starts") == {"a": 1, "c": 0}
        assert self.apply(repository, *(write._replace() for write in writes)) == [False] * 3


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "adapter-13"])
class TestEach(OnKind):
    pass


@pytest.mark.parametrize("kind", ["memory", "mongomock", "example"])
class TestCoded(OnKind):
    """The contract also holds with a codec."""

    @pytest.fixture
    def repository(self, tmp_path, kind):
        with coded(kind, tmp_path, SYSTEM_CLOCK, Scramble()) as repository:
            yield repository


@pytest.mark.parametrize("kind", ["adapter-13"])
class TestAdapterOfThirteenFields(OnKind):
    keeps_every_field = False


@pytest.mark.parametrize("store", ["memory", "sqlite"], indirect=True)
def test_a_store_with_transactions_applies_all_writes_or_none(store, add, clock):
    add("a")
    writes = [
        Update("a", {"status": "pending"}, {"message": "changed"}),
        Update("a", {"status": "running"}, {"message": "no"}),
        insert("b", clock),
    ]
    assert not all(store.apply(writes, all_or_nothing=True))
    assert store.get_by_id("a").message == ""
    assert store.count(TaskFilter()) == 1


def test_create_makes_an_id_for_a_task_without_one(store):
    store.create(Task(type="t"))
    store.create(Task(type="t"))
    assert len({task.id for task in store.list(TaskFilter())} - {""}) == 2


@pytest.mark.parametrize("store", MONGO, indirect=True)
def test_mongodb_stores_all_or_none_of_new_tasks_only(store, add, clock):
    """It uses no transactions, as a standalone server has none."""
    add("a")
    writes = [Update("a", {}, {"message": "changed"}), insert("b", clock)]
    with pytest.raises(ConfigurationError, match="new tasks only"):
        store.apply(writes, all_or_nothing=True)
    assert store.get_by_id("a").message == ""
    assert store.count(TaskFilter()) == 1


def test_guards_mean_the_same_in_python():
    row = {"a": None, "b": 0}
    assert matches(row, {"a": None, "b": (0, 1)})
    assert not matches(row, {"a": PRESENT})
    assert matches(row, {"b": PRESENT})


class Careless(MemoryRepository):
    """A repository that checks and changes without a lock, as find-then-replace does."""

    def __init__(self):
        super().__init__()
        self._meeting = threading.Barrier(2)

    def apply(self, writes, *, all_or_nothing=False):
        results = []
        for write in writes:
            if isinstance(write, Update):
                row = json.loads(json.dumps(self._rows[write.id]))
                if matches(row, write.guard):
                    with suppress(threading.BrokenBarrierError):  # two threads meet here, once
                        self._meeting.wait(PATIENCE)
                    self._meeting.abort()
                    self._rows[write.id] = {**row, **write.changes}
                    results.append(True)
                else:
                    results.append(False)
            else:
                results += super().apply([write])
        return results


class Broken(MemoryRepository):
    """A repository that breaks one rule."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self._numbers, self._latest = itertools.count(), {}

    def apply(self, writes, *, all_or_nothing=False):
        self._latest.update((write.id, next(self._numbers)) for write in writes)
        if self.rule == "length":
            writes = [self._cut(write) for write in writes]
        if self.rule == "all or nothing":
            all_or_nothing = False
        results = super().apply(writes, all_or_nothing=all_or_nothing)
        return results[::-1] if self.rule == "order of results" else results

    def _cut(self, write):
        key = isinstance(write, Insert) and write.row["unique_lock"]
        return Insert({**write.row, "unique_lock": key[:100]}) if key else write

    def find(self, column, values, fields, limit=None):
        if column == "line" and self.rule.startswith("line by "):
            return self._misplaced(values, fields)[:limit]
        if self.rule == "order of fields":
            return [row[::-1] for row in super().find(column, values, fields, limit)]
        return super().find(column, values, fields, None if self.rule == "limit" else limit)

    def _misplaced(self, values, fields):
        by = self.rule.removeprefix("line by ")
        rows = super().find("line", values, ("id", "id" if by == "change" else by, *fields))
        place = (lambda row: self._latest[row[0]]) if by == "change" else (lambda row: row[1])
        return [row[2:] for row in sorted(rows, key=place)]

    def distinct(self, column, after, limit):
        found = super().distinct(column, after, 10**6)
        return found[: limit - 1] if self.rule == "empty" else found[:limit]

    def due(self, before, limit):
        return super().due(None if self.rule == "due" else before, limit)

    def notes(self, prefix):
        found = super().notes(prefix)
        if self.rule != "version":
            return found
        return {name: Note(note.text, 1) for name, note in found.items()}


class TestTheContractItself:
    """The contract finds defects."""

    def test_the_race_finds_a_repository_without_atomic_writes(self):
        with pytest.raises(AssertionError):
            PrimitivesContract().test_one_of_many_threads_wins_a_start(Careless())

    @pytest.mark.parametrize(
        ("rule", "test"),
        [
            ("order of results", "test_each_write_says_whether_its_guard_held"),
            ("all or nothing", "test_several_new_tasks_are_stored_all_or_none"),
            ("order of fields", "test_tasks_are_found_by_their_id"),
            ("limit", "test_tasks_are_found_by_their_id"),
            ("empty", "test_tasks_are_found_by_their_owner"),
            *(
                (f"line by {what}", "test_tasks_that_wait_for_a_key_are_found_in_their_order")
                for what in ("id", "priority", "change")
            ),
            ("length", "test_a_unique_value_is_compared_as_a_whole"),
            ("due", "test_held_tasks_come_in_the_order_of_their_times"),
            ("version", "test_a_note_is_changed_only_with_its_current_version"),
        ],
    )
    def test_a_broken_rule_is_found(self, rule, test):
        check = getattr(PrimitivesContract(), test)
        with pytest.raises(AssertionError):
            check(Broken(rule))
        check(Broken(""))
