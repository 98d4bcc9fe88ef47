"""``version=`` of an executor: records have it, and a map runs items of other versions again."""

from __future__ import annotations

import concurrent.futures
import logging

import pytest
from helpers import PATIENCE, run_in_thread
from storage.repositories import TinyRepository

from taskx import ConfigurationError, MemoryRepository, Queue, Task, TaskFailed, executor
from taskx.tasks.lifecycle import created, start_all
from taskx.tasks.record import created_task
from taskx.testing import ManualQueue

pytestmark = pytest.mark.usefixtures("calm")


class TestTheRecord:
    @pytest.mark.every_store
    def test_a_task_has_the_version_that_ran_it(self, queue):
        queue.executor("old")(lambda: 1)
        queue.executor("new", version=2)(lambda: 2)
        queue.start()
        handles = [queue.submit(type) for type in ("old", "new") for _ in range(3)]
        assert [handle.result(PATIENCE) for handle in handles] == [1, 1, 1, 2, 2, 2]
        versions = [queue.get_task_status(handle.id).version for handle in handles]
        assert versions == [None, None, None, "2", "2", "2"]

    def test_a_number_and_the_same_text_are_one_version(self):
        assert executor("a", version=2)(lambda: 1).options.version == "2"
        assert executor("a", version="2")(lambda: 1).options.version == "2"

    @pytest.mark.parametrize("value", [True, 1.5, "", b"1", "a\0"])
    def test_any_other_value_is_refused(self, value):
        with pytest.raises(ConfigurationError, match="version"):
            executor("a", version=value)

    def test_a_task_that_was_not_started_has_none(self, queue):
        queue.executor("a", version=2)(lambda: 1)
        assert queue.submit("a").task().version is None

    def test_the_next_attempt_stores_its_own(self):
        queue = ManualQueue()

        def fails():
            raise ValueError

        queue.executor("a", version=1, max_attempts=3)(fails)
        handle = queue.submit("a")
        queue.run_next()
        assert handle.task().version == "1"
        queue.executor("a", version="2b", max_attempts=3, replace=True)(fails)
        queue.run_next()
        assert handle.task().version == "2b"
        queue.executor("a", max_attempts=3, replace=True)(fails)
        queue.run_all()
        assert (handle.task().status, handle.task().version) == ("failed", None)

    def test_starts_of_different_versions_are_told_apart(self):
        tasks = [
            created_task(created({"id": f"t{n}", "type": "a", "params": "{}", "created_at": 0}).row)
            for n in range(2)
        ]
        tasks[1].version = "2"
        first, second = start_all(tasks, 1, "node", "worker")
        assert "version" not in first.changes
        assert second.changes["version"] == "2"

    def test_a_user_cannot_change_it(self, queue):
        queue.executor("a", version=2)(lambda: 1)
        handle = queue.submit("a")
        task = handle.task()
        task.version = "3"
        queue.repository.update(task)
        assert handle.task().version is None

    def test_it_survives_json(self):
        assert Task.from_dict(Task(type="a", version="2").to_dict()).version == "2"

    def test_a_repository_of_eight_methods_refuses_it(self):
        queue = Queue(TinyRepository())
        with pytest.raises(ConfigurationError, match="versions of executors"):
            queue.executor("a", version=2)(lambda: 1)


class TestMaps:
    @pytest.fixture
    def run(self, repository):
        """Return a function that runs a map with an executor of a version, as a new program would."""
        ran = []

        def run(version, *, broken=(), **options):
            queue = Queue(repository)

            def square(n: int) -> list:
                ran.append(n)
                if n in broken:
                    raise ValueError(f"no {n}")
                return [n * n, version]

            made = executor("square", version=version)(square)
            queue.register_executor(made)
            with queue:
                ran.clear()
                found = list(queue.map(made, range(3), return_exceptions=True, **options))
            return found, sorted(ran)

        return run

    @pytest.mark.every_store
    def test_items_of_another_version_run_again(self, run, caplog):
        assert run(1) == ([[0, 1], [1, 1], [4, 1]], [0, 1, 2])
        with caplog.at_level(logging.WARNING):
            assert run(2) == ([[0, 2], [1, 2], [4, 2]], [0, 1, 2])
        assert caplog.messages == [
            "map square: items that version 1 of the executor has run are run again by version 2"
        ]
        assert run(2) == ([[0, 2], [1, 2], [4, 2]], [])

    def test_items_that_ran_before_there_was_a_version_run_again(self, run, caplog):
        run(None)
        assert run(1)[1] == [0, 1, 2]
        assert "items that no version of the executor has run" in caplog.text

    def test_without_a_version_no_item_runs_again(self, run):
        run(1)
        assert run(None) == ([[0, 1], [1, 1], [4, 1]], [])

    def test_an_item_that_failed_in_another_version_runs_again_without_retry_failed(self, run):
        assert run(1, broken=[1], retry_failed=False)[1] == [0, 1, 2]
        assert run(1, retry_failed=False)[1] == []
        assert run(2, retry_failed=False) == ([[0, 2], [1, 2], [4, 2]], [0, 1, 2])

    def test_an_item_with_a_stuck_thread_waits_for_that(self, make_queue, gate):
        queue = make_queue(worker_num=1)
        old = queue.executor("f", version=1, timeout=0.01, grace=0.01)(lambda n: gate())
        queue.start()
        with pytest.raises(TaskFailed):
            list(queue.map(old, [1], timeout=PATIENCE))
        new = queue.executor("f", version=2, replace=True)(lambda n: n)
        again = run_in_thread(lambda: list(queue.map(new, [1], timeout=0)))
        with pytest.raises(concurrent.futures.TimeoutError):
            again()
        gate.open()
        assert list(queue.map(new, [1], timeout=PATIENCE)) == [1]


def test_the_memory_repository_is_enough():
    with Queue(MemoryRepository()) as queue:
        made = queue.executor("a", version="x")(lambda: 1)
        assert made.submit().result(PATIENCE) == 1
