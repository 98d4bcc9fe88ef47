"""The contract of the eight methods."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import attrs

from taskx.stores.eight import TaskRepository
from taskx.tasks.errors import DuplicateTask, InvalidTransition, TaskNotFound
from taskx.tasks.model import Task, TaskFilter, TaskStatus
from taskx.tasks.retry import RetryPolicy
from taskx.testing.contract import Contract


class RepositoryContract(Contract):
    """Tests of what every repository must do, for your repository.

    Inherit it in a test module, give it a fixture ``repository`` that makes an empty one, and run
    pytest:

    .. code-block:: python

        class TestMyRepository(RepositoryContract):
            keeps_every_field = True

            @pytest.fixture
            def repository(self, tmp_path):
                return MyRepository(tmp_path)

    Only the eight methods of ``TaskRepository`` are called. The class attributes declare what repositories
    may do differently. With ``pytest.register_assert_rewrite("taskx.testing")`` in
    ``conftest.py``, a failure shows the values compared.

    Attributes:
        guards_moves: True if the repository refuses forbidden changes of status, as TaskX's own
            repositories do; False if it stores every change.
        atomic: True if exactly one thread succeeds when several create the same id at once.
    """

    guards_moves: bool = False
    atomic: bool = True

    #: The creation time of the first task of a test; each further one is created a second later.
    CREATED_AT = datetime(2024, 2, 29, 12, 0, 0, 123_000, tzinfo=timezone.utc)

    # --- create and get_by_id

    def test_a_created_task_is_given_back(self, repository: TaskRepository) -> None:
        task = self.task(
            "a",
            params={"text": "naïve ☃ \N{MUSICAL SYMBOL G CLEF}", "n": [1, -0.5, 2**53, None, True]},
            created_by="user123",
        )
        repository.create(task)
        self.assert_kept(repository, task)

    def test_the_options_of_a_task_and_its_error_are_kept(self, repository: TaskRepository) -> None:
        """Fields that the original TaskX does not have are kept, too."""
        self.skip_if(not self.keeps_every_field, "keeps the original's thirteen fields only")
        options: dict[str, Any] = {
            "priority": -7,
            "run_at": self.CREATED_AT + timedelta(hours=1),
            "timeout": 2.5,
            "max_attempts": 4,
            "max_crashes": 2,
            "retry": RetryPolicy(4, backoff="linear", retry_on=(OSError,)),
            "tags": ("red", "größe"),
            "flow": "f",
        }
        told: dict[str, Any] = {
            "error": "Timeout: no answer",
            "error_type": "requests.exceptions.Timeout",
            "traceback": "Traceback …",
            "worker": "host:1:abc taskx-worker-1",
        }
        self.create_running(repository, "a", **options)
        running = repository.get_by_id("a")
        assert {name: getattr(running, name) for name in options} == options
        repository.update(attrs.evolve(running, status=TaskStatus.FAILED, **told))
        stored = repository.get_by_id("a")
        assert {name: getattr(stored, name) for name in options | told} == options | told

    def test_an_id_is_stored_once(self, repository: TaskRepository) -> None:
        repository.create(self.task("a", params={"first": True}))
        with self.raises(DuplicateTask):
            repository.create(self.task("a", params={"first": False}))
        assert repository.get_by_id("a").params == {"first": True}
        assert repository.count(TaskFilter()) == 1

    def test_the_store_shares_no_object_with_its_callers(self, repository: TaskRepository) -> None:
        task = self.task("a", params={"list": [1]})
        repository.create(task)
        task.params["list"].append(2)
        task.message = "changed"
        for given in (repository.get_by_id("a"), *repository.list(TaskFilter())):
            given.params["list"].append(3)
            given.message = "changed"
        stored = repository.get_by_id("a")
        assert stored.params == {"list": [1]}
        assert stored.message == ""

    def test_an_unknown_id_raises_task_not_found(self, repository: TaskRepository) -> None:
        repository.create(self.task("other"))
        calls: list[Callable[[], object]] = [
            lambda: repository.get_by_id("a"),
            lambda: repository.update(self.task("a")),
            lambda: repository.update_status("a", TaskStatus.RUNNING, ""),
            lambda: repository.update_progress("a", 50, "half"),
            lambda: repository.delete("a"),
        ]
        for call in calls:
            with self.raises(TaskNotFound):
                call()
        assert self.listed(repository) == ["other"]

    def test_an_id_may_be_any_text(self, repository: TaskRepository) -> None:
        ids = ["a", "A", "a ", "a'; DROP TABLE tasks; --", '"', "%", "_", "$ne", "{}", "../a"]
        ids += ["\N{LATIN SMALL LETTER E WITH ACUTE}", "e\N{COMBINING ACUTE ACCENT}"]
        for task_id in ids:
            repository.create(self.task(task_id, params={"id": task_id}))
        assert [repository.get_by_id(task_id).params["id"] for task_id in ids] == ids
        repository.delete("%")
        assert sorted(self.listed(repository)) == sorted(set(ids) - {"%"})

    # --- update, update_status, update_progress, delete

    def test_update_replaces_the_task_and_no_other(self, repository: TaskRepository) -> None:
        """The record holds the caller's values, and no other record changes."""
        repository.create(self.task("b"))
        self.create_running(repository, "a")
        task = repository.get_by_id("a")
        task.status = TaskStatus.COMPLETED
        task.result = {"count": 100, "items": ["x", None]}
        task.progress = 100
        task.message = "done"
        task.completed_at = self.CREATED_AT + timedelta(seconds=9)
        task.duration = 3.0
        repository.update(task)
        self.assert_kept(repository, task)
        self.assert_kept(repository, self.task("b"))

    def test_a_result_may_be_any_json_value(self, repository: TaskRepository) -> None:
        values: list[Any] = [None, 0, "", [], False, {}, "text", -1.5, 2**53, [[{"a": [None]}]]]
        for value in values:
            self.create_running(repository, "a")
            running = repository.get_by_id("a")
            repository.update(attrs.evolve(running, status=TaskStatus.COMPLETED, result=value))
            stored = repository.get_by_id("a").result
            assert (type(stored), stored) == (type(value), value)
            repository.delete("a")

    def test_update_status_sets_status_and_message(self, repository: TaskRepository) -> None:
        repository.create(self.task("a", params={"x": 1}))
        for status, message in ((TaskStatus.RUNNING, "working"), (TaskStatus.FAILED, "it broke")):
            repository.update_status("a", status, message)
            task = repository.get_by_id("a")
            assert (task.status, task.message, task.params) == (status, message, {"x": 1})

    def test_update_progress_sets_progress_and_message(self, repository: TaskRepository) -> None:
        self.create_running(repository, "a")
        for percent in (0, 50, 100):
            repository.update_progress("a", percent, f"{percent} %")
            task = repository.get_by_id("a")
            told = (task.status, task.progress, task.message)
            assert told == (TaskStatus.RUNNING, percent, f"{percent} %")

    def test_a_deleted_task_is_gone(self, repository: TaskRepository) -> None:
        repository.create(self.task("a"))
        repository.create(self.task("b"))
        repository.delete("a")
        with self.raises(TaskNotFound):
            repository.get_by_id("a")
        assert self.listed(repository) == ["b"]
        assert repository.count(TaskFilter()) == 1
        repository.create(self.task("a", params={"second": True}))
        assert repository.get_by_id("a").params == {"second": True}

    # --- list and count

    def test_lists_are_newest_first(self, repository: TaskRepository) -> None:
        """The order is that of ``created_at``, and the count ignores offset and limit."""
        for second in (2, 0, 3, 1):
            repository.create(self.task(str(second), second))
        for offset in (0, 2, 3, 4, 10**9):
            for limit in (0, 1, 4, 10**9):
                page = self.listed(repository, offset=offset, limit=limit)
                assert page == ["3", "2", "1", "0"][offset : offset + limit]
                assert repository.count(TaskFilter(offset=offset, limit=limit)) == 4

    def test_pages_cover_a_list_exactly_once(self, repository: TaskRepository) -> None:
        """Tasks with the same ``created_at`` keep their order between calls."""
        for number in range(7):
            repository.create(self.task(str(number), second=number // 4))
        pages = [self.listed(repository, offset=offset, limit=3) for offset in (0, 3, 6, 9)]
        assert [len(page) for page in pages] == [3, 3, 1, 0]
        assert [task_id for page in pages for task_id in page] == self.listed(repository)
        assert set(pages[0]) == {"4", "5", "6"}

    def test_a_list_has_a_hundred_tasks_unless_told(self, repository: TaskRepository) -> None:
        for number in range(101):
            repository.create(self.task(str(number), number))
        assert len(repository.list(TaskFilter())) == 100
        assert self.listed(repository, limit=101)[-1] == "0"

    def test_every_condition_of_a_filter_must_hold(self, repository: TaskRepository) -> None:
        repository.create(self.task("a", 0, type="x", created_by="u"))
        repository.create(self.task("b", 1, type="x", created_by="v"))
        repository.create(self.task("c", 2, type="y", created_by="u"))
        repository.update_status("b", TaskStatus.CANCELLED, "")
        cases: list[tuple[dict[str, Any], list[str]]] = [
            ({"type": "x"}, ["b", "a"]),
            ({"created_by": "u"}, ["c", "a"]),
            ({"status": TaskStatus.PENDING}, ["c", "a"]),
            ({"status": TaskStatus.CANCELLED}, ["b"]),
            ({"status": TaskStatus.COMPLETED}, []),
            ({"type": "x", "created_by": "u"}, ["a"]),
            ({"type": "x", "status": TaskStatus.PENDING}, ["a"]),
            ({"type": "y", "created_by": "v"}, []),
            ({"type": "y", "status": TaskStatus.PENDING, "created_by": "u"}, ["c"]),
        ]
        for conditions, expected in cases:
            assert self.listed(repository, **conditions) == expected, conditions
            assert repository.count(TaskFilter(**conditions)) == len(expected), conditions

    def test_tasks_are_found_by_their_status(self, repository: TaskRepository) -> None:
        for status in TaskStatus:
            repository.create(self.task(status.value))
            if status not in (TaskStatus.PENDING, TaskStatus.CANCELLED):
                repository.update_status(status.value, TaskStatus.RUNNING, "")
            if status.finished:
                repository.update_status(status.value, status, "")
        for status in TaskStatus:
            assert self.listed(repository, status=status) == [status.value]
            assert repository.count(TaskFilter(status=status)) == 1

    def test_start_and_end_dates_are_included(self, repository: TaskRepository) -> None:
        moment, tick = self.CREATED_AT, timedelta(milliseconds=1)
        for number, name in enumerate(["before", "at", "after"]):
            repository.create(self.task(name, created_at=moment + (number - 1) * tick))
        assert self.listed(repository, start_date=moment) == ["after", "at"]
        assert self.listed(repository, end_date=moment) == ["at", "before"]
        assert self.listed(repository, start_date=moment, end_date=moment) == ["at"]
        assert self.listed(repository, start_date=moment + tick, end_date=moment) == []
        elsewhere = moment.astimezone(timezone(timedelta(hours=8)))
        assert self.listed(repository, start_date=elsewhere, end_date=elsewhere) == ["at"]
        assert repository.count(TaskFilter(start_date=moment)) == 2

    def test_values_of_filters_have_no_special_meaning(self, repository: TaskRepository) -> None:
        repository.create(self.task("a", created_by="user"))
        for hostile in ("' OR '1'='1", "%", "u%", "_ser", "$ne", '{"$ne": null}', ".*", "USER", ""):
            assert self.listed(repository, created_by=hostile) == [], hostile
            assert self.listed(repository, type=hostile) == [], hostile
            assert repository.count(TaskFilter(created_by=hostile)) == 0, hostile

    # --- several threads

    def test_threads_may_call_at_once(self, repository: TaskRepository) -> None:
        def store(thread: int, number: int) -> bool:
            task_id = f"{thread}-{number}"
            repository.create(self.task(task_id))
            repository.update_status(task_id, TaskStatus.RUNNING, "")
            repository.update_progress(task_id, number, str(thread))
            return True

        self.race(store, 10)
        tasks = repository.list(TaskFilter())
        assert len(tasks) == 40
        assert all(f"{task.message}-{task.progress}" == task.id for task in tasks)

    def test_one_of_many_threads_creates_an_id(self, repository: TaskRepository) -> None:
        self.skip_if(not self.atomic, "declared not atomic")

        def create(thread: int, number: int) -> bool:
            try:
                repository.create(self.task(str(number)))
            except DuplicateTask:
                return False
            return True

        self.assert_one_wins(create)

    # --- repositories that guard the status of a task

    def test_a_forbidden_change_of_status_is_refused(self, repository: TaskRepository) -> None:
        """A new task must be pending, a running one cannot be deleted, and an ended one cannot change."""
        self.skip_if(not self.guards_moves, "stores what it is told")
        for status in set(TaskStatus) - {TaskStatus.PENDING}:
            with self.raises(InvalidTransition):
                repository.create(self.task("a", status=status))
        assert repository.count(TaskFilter()) == 0
        self.create_running(repository, "a")
        with self.raises(InvalidTransition):
            repository.delete("a")
        repository.update_status("a", TaskStatus.COMPLETED, "done")
        before = repository.get_by_id("a")
        for status in set(TaskStatus) - {TaskStatus.COMPLETED}:
            with self.raises(InvalidTransition):
                repository.update_status("a", status, "no")
            with self.raises(InvalidTransition):
                repository.update(attrs.evolve(before, status=status))
        assert repository.get_by_id("a") == before
        repository.delete("a")
        assert repository.count(TaskFilter()) == 0

    def test_only_a_running_task_takes_progress(self, repository: TaskRepository) -> None:
        """Progress is kept between 0 and 100, and only a running task accepts it."""
        self.skip_if(not self.guards_moves, "stores what it is told")
        repository.create(self.task("a"))
        repository.update_progress("a", 50, "too early")
        assert (repository.get_by_id("a").progress, repository.get_by_id("a").message) == (0, "")
        repository.update_status("a", TaskStatus.RUNNING, "")
        for given, kept in ((-1, 0), (0, 0), (100, 100), (101, 100)):
            repository.update_progress("a", given, "")
            assert repository.get_by_id("a").progress == kept
        repository.update_status("a", TaskStatus.FAILED, "broke")
        repository.update_progress("a", 7, "too late")
        assert repository.get_by_id("a").message == "broke"

    # --- helpers

    def task(self, task_id: str, second: int = 0, **fields: Any) -> Task:
        """Return a task created ``second`` seconds after :attr:`CREATED_AT`."""
        created_at = self.CREATED_AT + timedelta(seconds=second)
        return Task(**{"id": task_id, "type": "test", "created_at": created_at, **fields})

    def create_running(self, repository: TaskRepository, task_id: str, **fields: Any) -> None:
        """Store a task that is running."""
        repository.create(self.task(task_id, **fields))
        task = repository.get_by_id(task_id)
        started_at = self.CREATED_AT + timedelta(seconds=6)
        repository.update(attrs.evolve(task, status=TaskStatus.RUNNING, started_at=started_at))

    def listed(self, repository: TaskRepository, **conditions: Any) -> list[str]:
        """Return the ids that a filter selects, in order."""
        return [task.id for task in repository.list(TaskFilter(**conditions))]

    def assert_kept(self, repository: TaskRepository, task: Task) -> None:
        """Assert that the stored task has the same thirteen fields of the original TaskX."""
        stored, given = repository.get_by_id(task.id).to_dict(), task.to_dict()
        assert [*stored.items()][:13] == [*given.items()][:13]
