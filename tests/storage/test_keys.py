"""The keys of rows in SQLite: part of an id, or else made for it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from helpers import PATIENCE, connections_of

from taskx import DuplicateTask, RepositoryError, SQLiteRepository, Task, TaskFilter, TaskStatus
from taskx.tasks import ids, lifecycle
from taskx.tasks.clock import to_ms
from taskx.tasks.ids import key_of, new_id
from taskx.tasks.writes import Delete, Insert, Update

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
MADE = "019b7c01-0400-7abc-a02d-0123456789ab"  # as ``new_id`` makes them at NOW
TWIN = MADE[:-6] + "abcdef"  # another id with the same key
VERSION_7 = "01977f2a-1c00-7abc-8def-0123456789ab"  # made by a program


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def repository(path):
    with SQLiteRepository(path) as repository:
        yield repository


def fresh(task_id: str, **columns) -> Insert:
    """Return the write of a task whose id was made for it, as far as the store knows."""
    given = {"id": task_id, "type": "t", "created_by": "", "created_at": to_ms(NOW), **columns}
    return lifecycle.created(given, key_of(task_id) or 0)


def keys(path) -> dict[str, int]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT id, seq FROM tasks"))


def listed(repository, **filter) -> list[str]:
    return [task.id for task in repository.list(TaskFilter(**filter))]


def test_the_key_in_a_made_id_is_that_of_its_row(repository, path):
    repository.apply([fresh(MADE)])
    assert keys(path) == {MADE: key_of(MADE)}


@pytest.mark.parametrize("chosen", ["a", VERSION_7, MADE])
def test_a_chosen_id_has_an_odd_key_of_the_time_of_its_creation(repository, path, chosen):
    repository.create(Task(id=chosen, type="t", created_at=NOW))
    key = keys(path)[chosen]
    assert key & 1
    assert ids.key_at(to_ms(NOW)) < key < ids.key_at(to_ms(NOW) + 1)


def test_tasks_with_chosen_ids_keep_their_order_when_the_counter_begins_anew(
    repository, monkeypatch
):
    monkeypatch.setattr(ids, "_counted", ids._FULL - 5)
    for task_id in "abcdefgh":
        repository.create(Task(id=task_id, type="t", created_at=NOW))
        ids.new_id()  # it uses the same counter
    assert [stub.id for stub in repository.ready(["t"], 9)] == [*"abcdefgh"]


class TestTasksWithTheSameKey:
    """Two processes can make ids with the same key at the same moment: all of both tasks works."""

    @pytest.fixture
    def twins(self, repository):
        assert key_of(TWIN) == key_of(MADE) != None  # noqa: E711
        assert repository.apply([fresh(MADE)]) == [True]
        assert repository.apply([fresh(TWIN, tags='["x"]', depends_on=["p"])]) == [True]
        return repository

    def test_both_are_stored(self, twins, path):
        stored = keys(path)
        assert stored[MADE] == key_of(MADE)
        assert stored[TWIN] & 1

    def test_both_are_found(self, twins):
        for wanted in ([MADE], [TWIN], [MADE, TWIN], [TWIN, "no such task", MADE]):
            assert set(twins.get_many(wanted)) == {*wanted} - {"no such task"}
        assert listed(twins, id_prefix=TWIN[:-1]) == [TWIN]
        assert set(listed(twins, id_prefix=MADE[:20])) == {MADE, TWIN}
        assert listed(twins, tag="x") == listed(twins, parent="p") == [TWIN]
        assert twins.find("parent", ["p"], ("parent", "id")) == [("p", TWIN)]

    def test_each_write_changes_its_own_task(self, twins):
        one = Update(TWIN, {"status": "pending"}, {"message": "twin"})
        assert twins.apply([one]) == [True]
        both = [Update(task_id, {}, {"progress": 7}) for task_id in (MADE, TWIN)]
        assert twins.apply(both) == [True, True]
        found = twins.get_many([MADE, TWIN])
        assert (found[MADE].message, found[TWIN].message) == ("", "twin")
        assert {task.progress for task in found.values()} == {7}
        refused = Update(TWIN, {"status": "running"}, {"message": "no"})
        assert twins.apply([refused]) == twins.apply([refused, refused])[:1] == [False]

    def test_each_delete_removes_its_own_task(self, twins, path):
        twins.delete(MADE)
        assert set(keys(path)) == {TWIN}
        twins.delete(TWIN)
        assert keys(path) == {}
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT * FROM tagged, parents").fetchall() == []

    def test_neither_can_be_stored_again(self, twins):
        twins.delete(MADE)
        with pytest.raises(DuplicateTask):
            twins.create(Task(id=TWIN, type="t"))
        assert list(twins.get_many([TWIN])) == [TWIN]

    def test_many_tasks_are_stored_whole(self, repository):
        made = [new_id(to_ms(NOW)) for _ in range(40)]
        twin = made[20][:-6] + "abcdef"
        writes = [fresh(task_id) for task_id in (*made, twin)]
        assert all(repository.apply(writes, all_or_nothing=True))
        assert len(repository.get_many([*made, twin])) == 41


def test_a_stored_id_is_taken_wherever_its_row_is(repository):
    repository.apply([fresh(MADE)])
    repository.create(Task(id="a", type="t"))
    repository.create(Task(id=VERSION_7, type="t"))
    for taken in (MADE, "a", VERSION_7):
        with pytest.raises(DuplicateTask):
            repository.create(Task(id=taken, type="t"))
    assert len(listed(repository)) == 3


def test_an_id_that_cannot_be_stored_is_an_error_of_the_repository(repository):
    repository.create(Task(id="a", type="t"))
    with pytest.raises(RepositoryError, match="surrogates not allowed"):
        repository.find("id", ["\ud800"], ("id",))


def test_a_task_is_stored_although_all_keys_of_its_moment_are_taken(repository, path, monkeypatch):
    monkeypatch.setattr("taskx.stores.sqlite.writing.new_key", lambda moment: moment * 2 + 1)
    for task_id in "abc":
        repository.create(Task(id=task_id, type="t", created_at=NOW))
    first = to_ms(NOW) * 2 + 1
    assert keys(path) == {"a": first, "b": first + 2, "c": first + 4}


def said(repository, writes) -> tuple[list[bool], list[str]]:
    """Apply writes together. Return which were applied, and the statements that this took."""
    statements: list[str] = []
    connection = connections_of(repository).writer()
    connection.set_trace_callback(statements.append)
    results = repository.apply(writes, all_or_nothing=True)
    connection.set_trace_callback(None)
    return results, [sql for sql in statements if "PRAGMA" not in sql]


class TestChosenIds:
    """The index of chosen ids alone tells whether one is taken: nothing is read."""

    def test_a_task_is_stored_by_one_statement(self, repository):
        said(repository, [fresh("first")])  # compiled in a transaction
        results, statements = said(repository, [fresh("a")])
        assert results == [True]
        assert [sql.split()[0] for sql in statements] == ["INSERT"]

    def test_a_task_whose_id_seems_to_be_made_here_is_looked_for_first(self, repository):
        write = fresh(MADE)._replace(key=0)
        results, statements = said(repository, [write])
        assert results == [True]
        assert [sql.split()[0] for sql in statements] == ["BEGIN", "SELECT", "INSERT", "COMMIT"]

    def test_many_tasks_are_stored_without_a_look_at_each(self, repository, path):
        names = [str(number) for number in range(100)]
        results, statements = said(repository, [fresh(name) for name in names])
        assert results == [True] * 100
        assert {sql.split()[0] for sql in statements} == {"BEGIN", "INSERT", "COMMIT"}
        assert sorted(keys(path), key=keys(path).__getitem__) == names

    @pytest.mark.parametrize("taken", [{"0"}, {"3"}, {"4"}, {"0", "1", "2", "3", "4"}])
    def test_none_of_them_is_stored_if_one_is_taken(self, repository, path, taken):
        for name in taken:
            repository.create(Task(id=name, type="t"))
        results, _ = said(repository, [fresh(str(number)) for number in range(5)])
        assert results == [str(number) not in taken for number in range(5)]
        assert keys(path).keys() == taken

    @pytest.mark.parametrize("stored", ["", "x"], ids=["one", "all"])
    def test_all_are_stored_although_keys_are_taken(self, repository, path, monkeypatch, stored):
        monkeypatch.setattr("taskx.stores.sqlite.writing.new_key", lambda moment: moment * 2 + 1)
        for name in stored:
            repository.create(Task(id=name, type="t", created_at=NOW))
        results, _ = said(repository, [fresh(name) for name in "abc"])
        assert results == [True, True, True]
        assert keys(path).keys() == {"a", "b", "c", *stored}


class TestSeveralAtOnce:
    """Tasks whose values differ share statements, each for 1, 2, 4, 8, … of them."""

    def ended(self, *task_ids: str, before: str = "pending") -> list[Update]:
        return [
            Update(
                name,
                {"status": before, "starts": 0},
                {"status": "completed", "result": f'"{name}"'},
            )
            for name in task_ids
        ]

    @pytest.mark.parametrize("chosen", [True, False])
    @pytest.mark.parametrize(("count", "statements"), [(2, 1), (3, 2), (37, 3), (64, 1), (100, 3)])
    def test_each_gets_its_own_values(self, repository, chosen, count, statements):
        names = [f"{number:03}" if chosen else new_id() for number in range(count)]
        repository.apply([fresh("first")])
        repository.apply([fresh(name) for name in names])
        results, sql = said(repository, self.ended(*names))
        assert results == [True] * count
        assert [one.split()[0] for one in sql] == ["BEGIN", *["UPDATE"] * statements, "COMMIT"]
        found = repository.get_many(names)
        assert {name: task.result for name, task in found.items()} == {n: n for n in names}
        assert {task.status for task in found.values()} == {TaskStatus.COMPLETED}
        assert repository.get_many(["first"])["first"].status is TaskStatus.PENDING

    def test_many_are_stored_by_few_statements(self, repository, path):
        names = [str(number) for number in range(37)]
        _, statements = said(repository, [fresh(name, priority=int(name)) for name in names])
        assert [sql.split()[0] for sql in statements] == ["BEGIN", *["INSERT"] * 3, "COMMIT"]
        found = repository.get_many(names)
        assert {name: found[name].priority for name in names} == {n: int(n) for n in names}

    def test_tasks_with_made_and_with_chosen_ids_share_a_transaction(self, repository):
        repository.apply([fresh(MADE), fresh("a"), fresh("b")])
        results, statements = said(repository, self.ended("a", MADE, "b"))
        assert results == [True, True, True]
        assert [sql.split()[0] for sql in statements] == ["BEGIN", "UPDATE", "UPDATE", "COMMIT"]
        found = repository.get_many(["a", MADE, "b"])
        assert {name: task.result for name, task in found.items()} == {n: n for n in found}

    @pytest.mark.parametrize("gone", ["a", "b", MADE])
    def test_one_that_is_not_as_its_guard_wants_it_keeps_none_from_it(self, repository, gone):
        names = ["a", MADE, "b"]
        repository.apply([fresh(name) for name in names])
        repository.apply(self.ended(gone))
        results = repository.apply(self.ended(*names))
        assert results == [name != gone for name in names]

    def test_the_same_task_twice_is_written_twice_in_order(self, repository):
        repository.apply([fresh("a"), fresh("b")])
        writes = [
            Update(name, {"status": "pending"}, {"progress": percent})
            for name, percent in (("a", 1), ("b", 2), ("a", 3), ("b", 4))
        ]
        assert repository.apply(writes) == [True] * 4
        found = repository.get_many(["a", "b"])
        assert {name: task.progress for name, task in found.items()} == {"a": 3, "b": 4}

    def test_their_values_are_kept_in_memory_not_in_a_temporary_file(self, repository):
        ((place,),) = connections_of(repository).writer().execute("PRAGMA temp_store").fetchall()
        assert place == 2  # MEMORY

    @pytest.mark.process
    def test_in_a_transaction_of_a_caller_no_temporary_file_is_needed(self, tmp_path):
        """A large statement would need one, unless the connection keeps it in memory."""
        command = [sys.executable, "-c", OF_A_CALLER, str(tmp_path / "app.db")]
        env = {**os.environ, "SQLITE_TMPDIR": "/proc"}
        told = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, timeout=PATIENCE, check=True
        )
        assert told.stdout.split() == [b"3200"]


_STORED = {
    "one made": [MADE],
    "one chosen": ["a"],
    "several": [MADE, *"abcde"],
    "twins": [MADE, TWIN],
}
_SAME = {"progress": 7}
# The number of writes, and the changes of each: writes that are alike share a statement.
_WRITES = {
    "one": (1, lambda n: _SAME),
    "the same": (12, lambda n: _SAME),
    "alike": (12, lambda n: {"progress": n}),
    "different": (12, lambda n: {"progress": n} if n % 3 else {"message": f"{n}"}),
}


class TestNumbers:
    """A write may name its record by the number that the store has noted in the row of the record."""

    @pytest.mark.parametrize("ids", _STORED.values(), ids=_STORED)
    @pytest.mark.parametrize("whole", [True, False])
    def test_the_store_notes_the_number_of_each_new_record(self, repository, path, ids, whole):
        writes = [fresh(task_id) for task_id in ids]
        assert repository.apply(writes, all_or_nothing=whole) == [True] * len(ids)
        assert {write.id: write.row["seq"] for write in writes} == keys(path)

    def test_a_record_that_is_stored_again_gets_another_number(self, repository, path):
        write = fresh("a")
        repository.apply([write])
        number = write.row["seq"]
        repository.apply([Delete("a", {})])
        assert repository.apply([write]) == [True]
        assert {"a": write.row["seq"]} == keys(path)
        assert write.row["seq"] != number

    def test_new_records_that_are_sent_again_share_a_statement_still(self, repository, path):
        writes = [fresh(f"t{n}") for n in range(8)]
        blocker = Insert({**writes[0].row, "id": "blocker"})
        repository.apply([blocker])
        refused = repository.apply([*writes, blocker], all_or_nothing=True)
        assert refused == [*[True] * 8, False]
        results, statements = said(repository, writes)
        assert results == [True] * 8
        assert [sql.split()[0] for sql in statements] == ["BEGIN", "INSERT", "COMMIT"]
        found = keys(path)
        assert {write.id: write.row["seq"] for write in writes} == {
            w.id: found[w.id] for w in writes
        }

    @pytest.fixture
    def stored(self, repository):
        """Twelve records, half of them with chosen ids, and their numbers."""
        writes = [fresh(f"t{n}" if n % 2 else new_id()) for n in range(12)]
        repository.apply(writes)
        return [(write.id, write.row["seq"]) for write in writes]

    @pytest.mark.parametrize(("count", "changes"), _WRITES.values(), ids=_WRITES)
    @pytest.mark.parametrize("known", [1, 2, 3])
    def test_each_write_changes_its_own_record(self, repository, stored, count, changes, known):
        """Also if the numbers of only some records are known: each, every second, every third."""
        writes = [
            Update(task_id, {"status": "pending"}, changes(n), seq=0 if n % known else number)
            for n, (task_id, number) in enumerate(stored[:count])
        ]
        assert repository.apply(writes) == [True] * count
        found = repository.get_many([task_id for task_id, _ in stored])
        for n, (task_id, _) in enumerate(stored):
            expected = {"progress": 0, "message": "", **(changes(n) if n < count else {})}
            task = found[task_id]
            assert {"progress": task.progress, "message": task.message} == expected

    @pytest.mark.parametrize(("count", "changes"), _WRITES.values(), ids=_WRITES)
    @pytest.mark.parametrize("all_gone", [True, False])
    def test_no_write_is_for_a_later_record_with_the_id(
        self, repository, stored, count, changes, all_gone
    ):
        stored = stored[:count]
        gone = [task_id for task_id, _ in (stored if all_gone else stored[:1])]
        repository.apply([Delete(task_id, {}) for task_id in gone])
        repository.apply([fresh(task_id)._replace(key=0) for task_id in gone])
        writes = [
            Update(task_id, {"status": "pending"}, changes(n), seq=number)
            for n, (task_id, number) in enumerate(stored)
        ]
        assert repository.apply(writes) == [task_id not in gone for task_id, _ in stored]
        for task in repository.get_many(gone).values():
            assert (task.progress, task.message) == (0, "")


#: Submits tasks with chosen ids in a transaction of its own, and prints how many are stored.
OF_A_CALLER = """
import sqlite3, sys
from taskx import Queue, SQLiteRepository, Task, TaskFilter

connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("CREATE TABLE app (x)")
queue = Queue(SQLiteRepository(sys.argv[1], prefix="tx_"))
queue.declare("t")


def tasks(prefix, count):
    names = (f"{prefix}{n * 7919 % 100_003}" for n in range(count))
    return [Task(type="t", params={"a": "x" * 300}, id=name) for name in names]


queue.submit_many(tasks("before", 3000))
with connection:
    queue.submit_many(tasks("c", 200), connection=connection)
print(queue.repository.count(TaskFilter()))
"""


class TestOrder:
    def test_lists_have_the_newest_first_whether_ids_are_made_or_chosen(self, repository):
        made = []
        for number in range(20):
            task_id = new_id(to_ms(NOW)) if number % 3 else str(number)
            repository.apply([fresh(task_id)])
            made.append(task_id)
        assert listed(repository) == made[::-1]
        assert [stub.id for stub in repository.ready(["t"], 99)] == made

    def test_tasks_of_one_call_keep_their_order_whether_ids_are_made_or_chosen(
        self, repository, monkeypatch
    ):
        monkeypatch.setattr(ids, "_counted", 0)
        made = [new_id(to_ms(NOW)) if number % 3 else str(number) for number in range(20)]
        writes = [fresh(task_id) for task_id in made]
        assert all(repository.apply(writes, all_or_nothing=True))
        assert listed(repository) == made[::-1]
        assert [stub.id for stub in repository.ready(["t"], 99)] == made
        assert set(repository.get_many(made)) == {*made}

    def test_tasks_that_were_created_after_the_clock_was_set_back_come_where_it_says(
        self, repository
    ):
        moments = [NOW, NOW + timedelta(hours=2), NOW + timedelta(hours=1)]
        first, later, back = (
            fresh(new_id(to_ms(moment)), created_at=to_ms(moment)) for moment in moments
        )
        for write in (first, later, back):
            repository.apply([write])
        assert listed(repository) == [later.id, back.id, first.id]
        assert [s.id for s in repository.ready(["t"], 9)] == [first.id, back.id, later.id]

    @pytest.mark.parametrize("early", [0, 1, ids.KEPT_ORDER - 1])
    def test_dates_are_exact_if_the_clock_was_set_back_a_little(self, repository, early):
        """The key in an id is then later than ``created_at``."""
        new_id(to_ms(NOW))
        created_at = NOW - timedelta(milliseconds=early)
        write = fresh(new_id(to_ms(created_at)), created_at=to_ms(created_at))
        repository.apply([write])
        after = created_at + timedelta(milliseconds=1)
        assert listed(repository, start_date=created_at, end_date=created_at) == [write.id]
        assert listed(repository, start_date=after) == []
        assert listed(repository, end_date=created_at - timedelta(milliseconds=1)) == []
        for filter in ({"start_date": created_at}, {"end_date": created_at}):
            assert repository.count(TaskFilter(**filter)) == 1

    def test_dates_are_exact_where_the_years_of_keys_end(self, repository):
        """A key has the milliseconds from 1970 until 2248."""
        for year in (1950, 1960, 1969, 2024, 2300, 2400):
            moment = datetime(year, 12, 31, 23, 59, 59, 999_000, timezone.utc)
            repository.create(Task(id=str(year), type="t", created_at=moment))
        years = {"1950", "1960", "1969", "2024", "2300", "2400"}
        for year in (1955, 1965, 1970, 2000, 2248, 2249, 2350, 2500):
            edge = datetime(year, 1, 1, tzinfo=timezone.utc)
            early, late = TaskFilter(end_date=edge), TaskFilter(start_date=edge)
            before = {stored for stored in years if int(stored) < year}
            assert {task.id for task in repository.list(early)} == before
            assert {task.id for task in repository.list(late)} == years - before
            assert repository.count(early) == len(before)

    def test_ended_tasks_are_found_until_they_are_removed(self, repository):
        for seconds in range(5):
            moment = NOW + timedelta(seconds=seconds)
            task_id = new_id(to_ms(moment))
            repository.apply([fresh(task_id, created_at=to_ms(moment))])
            repository.update_status(task_id, TaskStatus.CANCELLED)
        later = 2**62
        page = repository.ended("cancelled", later, 2)
        rest = repository.ended("cancelled", later, 9, page[-1].place)
        found = [ended.stub.id for ended in (*page, *rest)]
        assert found == listed(repository)
        assert len(found) == 5
