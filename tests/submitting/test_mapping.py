"""A map over items: in order, a few at a time, and no item runs twice if the map is run again."""

from __future__ import annotations

import concurrent.futures
import gc
import logging
import threading
from collections import Counter
from concurrent.futures import CancelledError
from contextlib import suppress

import pytest
from helpers import PATIENCE, eventually, ids, no_rounds, parts_of
from storage.repositories import TinyRepository

from taskx import (
    Config,
    ConfigurationError,
    MemoryRepository,
    Middleware,
    PayloadError,
    Permanent,
    QueueStopped,
    RepositoryUnavailable,
    RetryPolicy,
    TaskFailed,
    TaskFilter,
    TaskHandle,
    TaskNotFound,
    TaskStatus,
    UnknownTaskType,
    executor,
)
from taskx.queue import mapping
from taskx.queue.mapping import MapOutcome, digest
from taskx.tasks.writes import Insert

# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = pytest.mark.usefixtures("calm")


class Square:
    """An executor that records its calls, and fails for the numbers in ``failing``."""

    def __init__(self, queue):
        self.asked = []
        self.failing = set()
        self.executor = queue.executor("square", max_attempts=1)(self.run)

    def run(self, n: int, plus: int = 0) -> int:
        self.asked.append(n)
        if n in self.failing:
            raise ValueError(f"no {n}")
        return n * n + plus


@pytest.fixture
def square(queue):
    return Square(queue)


@pytest.fixture
def running(queue, square):
    queue.start()
    return queue


class TestResults:
    def test_results_come_in_the_order_of_the_items(self, running, square):
        assert list(running.map(square.executor, range(50))) == [n * n for n in range(50)]
        assert Counter(square.asked) == dict.fromkeys(range(50), 1)

    def test_items_are_params_or_the_first_parameter(self, running, square):
        items = [2, {"n": 3}, {"n": 4, "plus": 1}]
        assert list(running.map(square.executor, items)) == [4, 9, 17]

    def test_map_accepts_the_name_of_a_type(self, running, square):
        assert list(running.map("square", [{"n": 3}, {"n": 4}])) == [9, 16]
        with pytest.raises(PayloadError, match="every item must be a dict"):
            next(running.map("square", [3]))

    def test_no_items_give_no_results(self, running, square):
        assert list(running.map(square.executor, [])) == []
        assert ids(running) == set()

    def test_nothing_is_submitted_before_the_first_result_is_asked_for(self, running, square):
        results = running.map(square.executor, [1])
        assert ids(running) == set()
        assert next(results) == 1
        assert len(ids(running)) == 1

    def test_the_text_of_a_map_that_was_not_iterated_says_what_to_do(self, running, square):
        assert repr(running.map(square.executor, [1])) == (
            "<MapResults of square: iterate over it, as by list(), to run the items>"
        )

    def test_equal_items_are_one_task(self, running, square):
        assert list(running.map(square.executor, [1, 2, {"n": 1}, 2])) == [1, 4, 1, 4]
        assert sorted(square.asked) == [1, 2]

    def test_equal_items_under_way_share_their_failure(self, running, square):
        """This also holds if the first one has failed before the second is read."""
        square.failing = {1}

        def items():
            yield 1
            eventually(lambda: running.dead_letters()[1])
            yield 1

        results = running.map(square.executor, items(), window=2, return_exceptions=True)
        assert [result.error for result in results] == ["ValueError: no 1"] * 2
        assert square.asked == [1]

    def test_equal_items_one_after_the_other_each_give_a_result(self, running, square):
        square.failing = {1}
        results = running.map(
            square.executor, [1, 1], window=1, timeout=PATIENCE, return_exceptions=True
        )
        assert [result.error for result in results] == ["ValueError: no 1"] * 2

    @pytest.mark.parametrize("ordered", [True, False])
    def test_a_map_keeps_no_results_that_were_taken(self, running, square, ordered):
        for _ in range(2):  # the second map finds the results of the first
            results = running.map(square.executor, range(200), name="big", ordered=ordered)
            for _ in range(190):
                next(results)
            gc.collect()
            # Not isinstance(), which asks dead proxies of other tests for their class.
            handles = [thing for thing in gc.get_objects() if type(thing) is TaskHandle]
            assert sum(handle.id.startswith("big:") for handle in handles) < 50

    def test_items_are_read_no_further_than_the_window_while_no_task_ends(self, queue, gate):
        hold = queue.executor("hold")(lambda n: gate() or n)
        read = []
        items = (read.append(n) or n for n in range(1000))
        results = queue.map(hold, items, window=7)
        queue.start()
        first = concurrent.futures.ThreadPoolExecutor(1).submit(next, results)
        eventually(lambda: len(ids(queue)) == 7)
        gate.wait_for(1)
        assert len(read) == 7
        gate.open()
        assert first.result(PATIENCE) == 0

    def test_an_abandoned_map_submits_no_more_tasks(self, queue, gate):
        hold = queue.executor("hold")(lambda n: gate() if n else n)
        queue.start()
        results = queue.map(hold, range(100), window=5)
        assert next(results) == 0
        del results
        gate.open()
        assert queue.drain(PATIENCE)
        assert len(ids(queue)) <= 5

    def test_an_item_whose_task_an_interrupt_has_prevented_keeps_no_worker_busy(
        self, make_queue, gate
    ):
        """The thread of the map makes that task later, if it goes on."""
        queue = make_queue(worker_num=1)
        hold = queue.executor("hold")(lambda n: gate() or n)
        fine = queue.executor("fine")(lambda: "fine")
        queue.start()
        struck = []

        def key(n):
            if n == 2 and not struck:
                struck.append(n)
                gate.wait_for(1)
                raise KeyboardInterrupt
            return n

        results = queue.map(hold, [1, 2], key=key, window=2)
        with pytest.raises(KeyboardInterrupt):
            next(results)
        gate.open()
        assert queue.submit(fine, {}).result(PATIENCE) == "fine"
        assert list(results) == [1, 2]

    def test_the_default_window_has_work_for_every_worker(self, make_queue, gate):
        queue = make_queue(worker_num=4, buffer_size=1)
        hold = queue.executor("hold")(lambda n: gate() or n)
        queue.start()
        results = queue.map(hold, range(10))
        first = concurrent.futures.ThreadPoolExecutor(1).submit(next, results)
        gate.wait_for(4)
        eventually(lambda: len(ids(queue)) == 5)
        gate.open()
        assert [first.result(PATIENCE), *results] == list(range(10))


class TestLumps:
    """While work is under way, items are drawn and then submitted together."""

    @pytest.fixture
    def stored(self, make_queue, gate):
        """A queue with one worker, which the first item of a map holds; it counts the tasks of commits."""
        queue = make_queue(worker_num=1)
        queue.executor("hold")(lambda n: (gate() if n == 0 else None) or n)
        queue.stored = []
        apply = queue.repository.apply

        def count(writes, **options):
            if inserts := sum(isinstance(write, Insert) for write in writes):
                queue.stored.append(inserts)
            return apply(writes, **options)

        queue.repository.apply = count
        queue.start()
        return queue

    @staticmethod
    def begin(results):
        return concurrent.futures.ThreadPoolExecutor(1).submit(next, results)

    def test_a_thousand_items_are_submitted_in_five_commits(self, stored, gate):
        results = stored.map("hold", ({"n": n} for n in range(1000)), window=1000)
        first = self.begin(results)
        eventually(lambda: sum(stored.stored) == 1000)
        assert stored.stored == [1, 250, 250, 250, 249]
        gate.open()
        assert [first.result(PATIENCE), *results] == list(range(1000))

    def test_tasks_of_a_lump_are_watched_before_one_may_start(self, stored, gate):
        """So the repository is not asked whether they have ended. Spilled ones may start elsewhere."""
        asked, statuses = [], stored.repository.statuses
        stored.repository.statuses = lambda ids: asked.extend(ids) or statuses(ids)
        items = [{"n": n} for n in range(150)]
        results = stored.map("hold", items, lambda item: item["n"], window=1000)
        with no_rounds(stored):
            first = self.begin(results)
            eventually(lambda: sum(stored.stored) == 150 and "hold:149" in asked)
        assert stored.stored == [1, 149]
        spilled = {
            task.id for task in stored.iter_tasks(TaskFilter(status="pending")) if not task.owner
        }
        assert 0 < len(spilled) < 100
        assert {*asked} - {"hold:0"} == spilled
        gate.open()
        assert [first.result(PATIENCE), *results] == list(range(150))

    def test_results_of_an_earlier_run_are_found_in_few_reads(self, stored, gate):
        items, reads = [{"n": n} for n in range(1000)], []
        assert len(list(stored.map("hold", items[1:]))) == 999
        get_many = stored.repository.get_many
        stored.repository.get_many = lambda ids: reads.append(len(ids)) or get_many(ids)
        results = stored.map("hold", items, window=1000)
        first = self.begin(results)
        eventually(lambda: sum(reads) >= 1000)
        gate.open()
        assert [first.result(PATIENCE), *results] == list(range(1000))
        assert sum(number > 1 for number in reads) <= 10  # other threads look at single tasks

    def test_the_first_item_runs_while_the_second_one_is_drawn(self, stored, gate):
        def items():
            yield {"n": 0}
            gate.wait_for(1)
            gate.open()
            yield {"n": 1}

        assert list(stored.map("hold", items(), timeout=PATIENCE)) == [0, 1]

    def test_drawn_items_run_although_the_next_one_takes_long(self, stored, gate):
        """The thread that ends the first task submits the others: that of the map waits for an item."""
        drawn = threading.Event()

        def items():
            yield from ({"n": n} for n in range(4))
            drawn.set()
            done = TaskFilter(status="completed", limit=0)
            eventually(lambda: stored.list_tasks(done)[1] == 4)
            yield {"n": 4}

        results = stored.map("hold", items(), window=10, timeout=PATIENCE)
        first = self.begin(results)
        assert drawn.wait(PATIENCE)
        assert stored.stored == [1]
        gate.open()
        assert [first.result(PATIENCE), *results] == list(range(5))

    def test_a_ready_result_does_not_wait_for_many_slow_items(self, stored, gate, monkeypatch):
        monkeypatch.setattr(mapping, "_HOLD", 0.0)
        gate.open()
        drawn = []

        def items():
            for n in range(1000):
                drawn.append(n)
                yield {"n": n}
                if n == 0:  # the map is told of the end after the commit
                    eventually(lambda: not parts_of(stored).watcher.watching)

        results = stored.map("hold", items(), lambda item: item["n"], window=1000)
        assert next(results) == 0
        assert len(drawn) < 1000
        assert list(results) == list(range(1, 1000))

    def test_an_error_of_the_iterable_leaves_no_drawn_item_behind(self, stored, gate):
        def items():
            yield from ({"n": n} for n in range(4))
            raise OSError("the file is gone")

        results = stored.map("hold", items(), window=10)
        with pytest.raises(OSError, match="gone"):
            next(results)
        gate.open()
        assert list(results) == [0, 1, 2, 3]

    def test_an_item_that_is_not_valid_stops_no_other_of_its_lump(self, stored, gate):
        items = [{"n": 0}, {"n": 1}, {"n": 1, "m": 2}, {"n": float("nan")}, {"n": 3}]
        results = stored.map("hold", items, str, window=10, return_exceptions=True)
        first = self.begin(results)
        eventually(lambda: sum(stored.stored) == 3)
        gate.open()
        assert first.result(PATIENCE) == 0
        one, unknown, not_json, three = results
        assert (one, three) == (1, 3)
        assert "m" in str(unknown)
        assert "not valid JSON" in str(not_json)

    def test_equal_items_of_a_lump_are_one_task(self, stored, gate):
        results = stored.map("hold", [{"n": n} for n in (0, 1, 2, 1, 3)], window=10)
        first = self.begin(results)
        eventually(lambda: len(ids(stored)) == 4)
        gate.open()
        assert [first.result(PATIENCE), *results] == [0, 1, 2, 1, 3]

    def test_middleware_sees_each_item_alone_on_the_thread_of_the_map(self, make_queue, gate):
        seen = []

        class Sees(Middleware):
            def submit(self, tasks, store):
                seen.append((len(tasks), threading.current_thread()))
                return store(tasks)

        queue = make_queue(worker_num=1, middleware=[Sees()])
        queue.executor("hold")(lambda n: n)
        queue.start()
        assert list(queue.map("hold", [{"n": n} for n in range(20)])) == list(range(20))
        assert seen == [(1, threading.current_thread())] * 20

    def test_the_default_window_grows_to_a_limit_while_tasks_end_quickly(self, running, square):
        assert mapping.ahead(Config(worker_num=2)) == (8, 160)
        assert mapping.ahead(Config(worker_num=100)) == (200, 200)
        assert mapping.ahead(Config(worker_num=100, buffer_size=1000)) == (400, 400)
        results = running.map(square.executor, range(1000))
        assert len(list(results)) == 1000
        assert results._window <= 160

    def test_a_given_window_does_not_grow(self, running, square):
        results = running.map(square.executor, range(500), window=3)
        assert len(list(results)) == 500
        assert results._window == 3


class TestFullBuffer:
    @pytest.mark.parametrize("overflow", ["reject", "block", "spill", "caller_runs"])
    def test_a_full_buffer_never_refuses_a_map(self, busy, gate, overflow):
        """Tasks that do not fit wait in the repository; the thread that maps runs none of them."""
        queue = busy(buffer_size=1, overflow=overflow)
        results = queue.map("note", [{"n": n} for n in range(10)], window=6, timeout=0)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        assert len(queue.list_tasks()[0]) == 1 + 6
        assert queue.ran == []
        gate.open()
        assert list(queue.map("note", [{"n": n} for n in range(10)])) == [None] * 10
        assert sorted(queue.ran) == list(range(10))


class TestItems:
    def test_outcomes_give_each_item_with_its_result_or_its_error(self, running, square):
        square.failing = {1}
        outcomes = [*running.map(square.executor, [0, 1, {"n": 2}, "x", 2]).outcomes()]
        assert [outcome.item for outcome in outcomes] == [0, 1, {"n": 2}, "x", 2]
        assert [outcome.result for outcome in outcomes] == [0, None, 4, None, 4]
        failed, misfit = outcomes[1].error, outcomes[3].error
        assert isinstance(failed, TaskFailed)
        assert isinstance(misfit, TaskFailed)
        assert not any(outcome.error for outcome in outcomes if outcome.result is not None)

    def test_outcomes_as_they_come_name_their_items(self, running, square):
        results = running.map(square.executor, range(20), ordered=False)
        assert sorted(results.outcomes()) == [(n, n * n, None) for n in range(20)]

    def test_outcomes_go_on_where_the_results_have_stopped(self, running, square):
        results = running.map(square.executor, [1, 2, 3])
        assert next(results) == 1
        assert [outcome.result for outcome in results.outcomes()] == [4, 9]

    def test_outcomes_are_the_rows_of_a_table(self, running, square):
        """pandas takes the names of the columns from them."""
        assert MapOutcome._fields == ("item", "result", "error")
        [outcome] = running.map(square.executor, [3]).outcomes()
        assert outcome == (3, 9, None)

    @pytest.fixture
    def wrong(self, make_queue, gate):
        """An executor that fails at the gate for all numbers but 0, and its queue, which has one worker."""
        queue = make_queue(worker_num=1)

        @queue.executor("wrong", max_attempts=1)
        def wrong(n: int):
            gate()
            return 1 // (n == 0)

        queue.start()
        return queue, wrong

    @staticmethod
    def taken(queue, gate, results, tasks):
        """Return all results. The worker logs each end before the map, which waits, hears of it."""
        with no_rounds(queue):
            taken = concurrent.futures.ThreadPoolExecutor(1).submit(list, results)
            eventually(lambda: len(parts_of(queue).watcher.watched) == tasks)
            gate.open()
            return taken.result(PATIENCE)

    @pytest.mark.timing(handles_every=10 * PATIENCE)
    def test_the_log_has_one_line_for_all_failures_that_the_map_returns(self, wrong, gate, caplog):
        """Each of them is logged at INFO, without its traceback."""
        caplog.set_level(logging.INFO, "taskx")
        queue, executor = wrong
        results = queue.map(executor, [0, 1, 2, 3, {"m": 1}], return_exceptions=True)
        assert len(self.taken(queue, gate, results, 4)) == 5
        failures = [record for record in caplog.records if "fail" in record.getMessage()]
        assert [record.levelno for record in failures] == [logging.INFO] * 3 + [logging.WARNING]
        assert "Traceback" not in caplog.text
        assert failures[-1].getMessage() == (
            "map wrong: 4 items failed: 3 ZeroDivisionError: integer division or modulo by zero, "
            "1 PayloadError: params: 'wrong' requires n and does not take 'm'; it takes n"
        )

    @pytest.mark.timing(handles_every=10 * PATIENCE)
    def test_different_errors_of_one_class_are_only_counted(self, wrong, gate, caplog):
        queue, _ = wrong
        keys = queue.executor("keys", max_attempts=1)(lambda n: (gate(), {}[n]))
        self.taken(queue, gate, queue.map(keys, range(3), name="of keys").outcomes(), 3)
        [line] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert line == "map of keys: 3 items failed: 3 KeyError"

    def test_a_failure_that_the_map_has_returned_before_it_is_logged(
        self, running, square, caplog, monkeypatch
    ):
        """Another thread may read of the end of a task before the one that stored it has logged it."""
        caplog.set_level(logging.INFO, "taskx")
        square.failing = {1}
        moves, returned, logged = parts_of(running).moves, threading.Event(), threading.Event()
        log_move = moves._log_move

        def log_late(row, task, *facts):
            if row.name == "fail":
                parts_of(running).watcher.check([task.id])
                assert returned.wait(PATIENCE)
            log_move(row, task, *facts)
            if row.name == "fail":
                logged.set()

        monkeypatch.setattr(moves, "_log_move", log_late)
        results = running.map(square.executor, [1], return_exceptions=True)
        assert isinstance(next(results), TaskFailed)
        returned.set()
        assert logged.wait(PATIENCE)
        assert "Traceback" not in caplog.text

    def test_failures_that_the_map_raises_are_logged_one_by_one(self, running, square, caplog):
        square.failing = {1}
        with pytest.raises(TaskFailed):
            list(running.map(square.executor, [1]))
        eventually(lambda: "Traceback" in caplog.text)

    def test_a_permanent_failure_is_logged_without_its_traceback(self, queue, caplog):
        @queue.executor("gone")
        def gone():
            raise Permanent("404")

        queue.start()
        assert queue.submit("gone").exception(PATIENCE).error == "Permanent: 404"
        queue.stop()  # until then a worker may be about to log
        [line] = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        assert line.endswith("(gone) failed: Permanent: 404 (params={})")

    def test_a_stop_is_no_outcome(self, running, square):
        outcomes = running.map(square.executor, [1, 2], window=1).outcomes()
        next(outcomes)
        running.stop()
        with pytest.raises(QueueStopped):
            next(outcomes)

    def test_with_star_the_values_of_an_item_are_the_arguments(self, running, square):
        items = [(2,), (3, 1), [4, 2], {"n": 5}]
        assert list(running.map(square.executor, items, star=True)) == [4, 10, 18, 25]

    def test_with_star_an_item_that_does_not_fit_fails_alone(self, running, square):
        items = [(1, 2, 3), 4, (2,)]
        results = list(running.map(square.executor, items, star=True, return_exceptions=True))
        assert [type(result) for result in results] == [PayloadError, TypeError, int]

    def test_star_needs_a_function(self, running):
        with pytest.raises(ConfigurationError, match="give it in place of its type"):
            running.map("square", [(1,)], star=True)

    def test_a_tuple_for_a_number_is_refused(self, running, square):
        """Somebody has expected ``starmap``."""
        with pytest.raises(TypeError) as caught:
            next(running.map(square.executor, [(2, 1)]))
        assert str(caught.value) == (
            "the item (2, 1) is a tuple, but n takes int: write map(…, star=True) to pass its values as "
            "arguments"
        )

    def test_a_tuple_is_the_first_parameter_if_that_may_be_one(self, queue):
        plain = queue.executor("plain")(lambda pair: pair)
        queue.start()
        assert list(queue.map(plain, [(1, 2)])) == [[1, 2]]


class TestAsResultsCome:
    """Results with ``ordered=False``."""

    def test_each_result_comes_once(self, running, square):
        items = [1, 2, 3, 2]
        assert sorted(running.map(square.executor, items, ordered=False)) == [1, 4, 4, 9]

    def test_a_short_task_does_not_wait_for_a_long_one(self, make_queue, gate):
        queue = make_queue(worker_num=2)
        hold = queue.executor("hold")(lambda n: (gate() if n == 0 else None) or n)
        queue.start()
        results = queue.map(hold, range(4), ordered=False, timeout=PATIENCE)
        assert sorted(next(results) for _ in range(3)) == [1, 2, 3]
        gate.open()
        assert next(results) == 0

    def test_an_error_does_not_end_an_unordered_map(self, running, square):
        square.failing = {1}
        results = running.map(square.executor, range(3), ordered=False, return_exceptions=True)
        assert sorted(str(getattr(result, "error", result)) for result in results) == [
            "0",
            "4",
            "ValueError: no 1",
        ]


class TestCostAndKeys:
    @pytest.mark.every_store
    def test_all_items_have_a_cost_and_each_may_have_its_key(self, running):
        running.executor("think")(lambda prompt, tenant: prompt)
        items = [{"prompt": "a", "tenant": "x"}, {"prompt": "b", "tenant": ""}]
        given = {"concurrency_key": lambda item: item["tenant"] or None, "cost": {"tokens": 6}}
        assert list(running.map("think", items, **given)) == ["a", "b"]
        found = sorted((t.params["prompt"], t.concurrency_key, t.cost) for t in tasks_of(running))
        assert found == [("a", "x", {"tokens": 6}), ("b", None, {"tokens": 6})]

    def test_the_key_may_be_the_same_for_all(self, running, square):
        assert list(running.map(square.executor, [1, 2], concurrency_key="k")) == [1, 4]
        assert [task.concurrency_key for task in tasks_of(running)] == ["k", "k"]

    def test_an_executor_may_be_bound_with_both(self, running, square):
        bound = square.executor.using(key="k", cost={"tokens": 5})
        assert list(running.map(bound, [3], cost={"tokens": 7})) == [9]
        [task] = tasks_of(running)
        assert (task.id.partition(":")[0], task.concurrency_key) == ("square", "k")
        assert task.cost == {"tokens": 7}

    def test_a_key_that_is_no_text_is_the_error_of_its_item(self, running, square):
        results = running.map(
            square.executor, [1, 2], concurrency_key=lambda n: "k" if n > 1 else n
        )
        with pytest.raises(ConfigurationError, match="concurrency_key"):
            next(results)
        assert next(results) == 4


def tasks_of(queue):
    return queue.list_tasks().tasks


class TestALongTask:
    def test_a_long_task_does_not_stop_later_items(self, make_queue, gate):
        """Other tasks run while the iterator waits for the first result."""
        queue = make_queue(worker_num=2)
        ran = []
        hold = queue.executor("hold")(lambda n: gate() if n == 0 else ran.append(n))
        queue.start()
        results = queue.map(hold, range(20), window=2, timeout=PATIENCE)
        first = concurrent.futures.ThreadPoolExecutor(1).submit(next, results)
        eventually(lambda: ran == list(range(1, 20)))
        gate.open()
        first.result(PATIENCE)
        assert len(list(results)) == 19

    def test_a_limited_number_of_results_waits_behind_a_long_task(self, make_queue, gate):
        queue = make_queue(worker_num=2)
        read = []
        hold = queue.executor("hold")(lambda n: gate() if n == 0 else None)
        queue.start()
        items = (read.append(n) or n for n in range(1000))
        results = queue.map(hold, items, window=2, timeout=PATIENCE)
        first = concurrent.futures.ThreadPoolExecutor(1).submit(next, results)
        eventually(lambda: queue.list_tasks(TaskFilter(status="completed", limit=0))[1] == 63)
        assert len(read) == 64
        gate.open()
        first.result(PATIENCE)


@pytest.mark.timing(line_every=10 * PATIENCE)
class TestProgress:
    def test_progress_shows_how_many_items_are_done_and_failed(self, running, square, capsys):
        square.failing = {1}
        results = running.map(square.executor, range(4), progress=True, return_exceptions=True)
        assert len(list(results)) == 4
        assert capsys.readouterr() == ("", "square: 4 of 4 (100%), 1 failed\n")

    def test_progress_has_no_percentage_if_the_number_of_items_is_unknown(
        self, running, square, capsys
    ):
        list(running.map(square.executor, iter(range(4)), name="some", progress=True))
        assert capsys.readouterr() == ("", "some: 4\n")

    def test_progress_is_shown_before_an_error_is_raised(self, running, square, capsys):
        square.failing = {1}
        results = running.map(square.executor, range(3), window=1, progress=True)
        next(results)
        with pytest.raises(TaskFailed):
            next(results)
        assert capsys.readouterr().err == "square: 2 of 3 (67%), 1 failed\n"
        assert next(results) == 4

    def test_progress_says_how_many_results_were_stored(self, running, square, capsys, monkeypatch):
        """A failed item runs again, so it is no stored one. Nor is an item that is equal to another."""
        monkeypatch.setattr(mapping, "_HOLD", PATIENCE)  # both are drawn before a result is taken
        square.failing = {1}
        first = [0, 1, 2]
        for items in (first, [*first, 2, 3, 3]):
            list(running.map(square.executor, items, progress=True, return_exceptions=True))
        assert capsys.readouterr().err.splitlines() == [
            "square: 3 of 3 (100%), 1 failed",
            "square: 6 of 6 (100%), 2 stored, 1 failed",
        ]

    def test_progress_of_many_items_has_commas(self, running, square, capsys):
        list(running.map(square.executor, range(1234), progress=True))
        assert capsys.readouterr().err.splitlines()[-1] == "square: 1,234 of 1,234 (100%)"

    def test_progress_ends_with_the_last_result(self, running, square, capsys):
        """``zip`` with the map second never asks it for its end."""
        results = running.map(square.executor, range(3), progress=True)
        assert [n for n, _result in zip(range(3), results, strict=False)] == [0, 1, 2]
        assert capsys.readouterr().err == "square: 3 of 3 (100%)\n"
        assert list(results) == []
        assert capsys.readouterr().err == ""

    def test_progress_counts_items_behind_one_that_takes_long(self, make_queue, gate, capsys):
        queue = make_queue(worker_num=2)
        queue.start()

        @queue.executor("hold")
        def hold(n: int):
            if n == 0:
                gate()
            if n == 3:
                raise ValueError

        results = queue.map(hold, range(20), window=2, timeout=0, progress=True)

        def shown():
            with pytest.raises(concurrent.futures.TimeoutError):
                next(results)
            return capsys.readouterr().err == "hold: 19 of 20 (95%), 1 failed\n"

        eventually(shown)
        gate.open()

    def test_progress_of_an_abandoned_map_is_shown(self, running, square, capsys):
        gc.collect()  # the displays of other tests
        capsys.readouterr()
        for _ in running.map(square.executor, range(3), window=1, progress=True):
            break
        gc.collect()
        assert capsys.readouterr().err == "square: 1 of 3 (33%)\n"


class TestFailures:
    @pytest.mark.every_store
    def test_an_error_comes_in_its_place_and_the_map_goes_on(self, running, square):
        square.failing = {2}
        results = running.map(square.executor, range(5))
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(TaskFailed, match="no 2"):
            next(results)
        assert list(results) == [9, 16]

    def test_errors_can_be_returned_in_place_of_results(self, running, square):
        square.failing = {0, 3}
        results = list(running.map(square.executor, range(5), return_exceptions=True))
        assert [result for result in results if isinstance(result, int)] == [1, 4, 16]
        assert [type(results[n]) for n in (0, 3)] == [TaskFailed, TaskFailed]

    def test_a_cancelled_or_deleted_task_raises_in_its_place(self, queue, square):
        results = queue.map(square.executor, [1, 2, 3], key=str, window=3, timeout=0)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        queue.cancel_task("square:1")
        queue.delete("square:2")
        with pytest.raises(CancelledError):
            next(results)
        with pytest.raises(TaskNotFound):
            next(results)
        queue.start()
        assert queue.handle("square:3").result(PATIENCE) == 9
        assert next(results) == 9

    def test_a_timeout_skips_no_item(self, queue, square):
        results = queue.map(square.executor, range(3), timeout=0.01)
        for _ in range(2):
            with pytest.raises(concurrent.futures.TimeoutError):
                next(results)
        queue.start()
        assert queue.drain(PATIENCE)
        assert list(results) == [0, 1, 4]

    def test_an_outage_skips_no_item(self, running, square):
        results = running.map(square.executor, range(10), window=2)
        found = [next(results)]
        running.repository.down = True
        with pytest.raises(RepositoryUnavailable):
            found.extend(iter(lambda: next(results), None))
        running.repository.down = False
        assert [*found, *results] == [n * n for n in range(10)]
        assert Counter(square.asked) == dict.fromkeys(range(10), 1)

    @pytest.mark.parametrize("window", [1, 9])
    def test_an_invalid_item_raises_in_its_place(self, running, square, window):
        """After wrong params, a value that is not JSON or a bad key, the iterator goes on."""

        def key(item):
            return item if isinstance(item, int) else f"{item!r:.9}{1 // (item != 'no')}"

        items = [1, {"m": 2}, 3, float("nan"), 4, "no", 5]
        results = running.map(square.executor, items, key, window=window)
        assert next(results) == 1
        with pytest.raises(PayloadError, match="requires n"):
            next(results)
        assert next(results) == 9
        with pytest.raises(PayloadError, match="not valid JSON"):
            next(results)
        assert next(results) == 16
        with pytest.raises(ZeroDivisionError):
            next(results)
        assert list(results) == [25]
        again = running.map(square.executor, items, key, window=window, return_exceptions=True)
        assert [type(result).__name__ for result in again] == [
            *("int", "PayloadError", "int", "PayloadError", "int", "ZeroDivisionError", "int")
        ]

    def test_a_map_on_a_stopped_queue_raises(self, running, square):
        results = running.map(square.executor, range(10), window=1)
        assert next(results) == 0
        running.stop()
        with pytest.raises(QueueStopped):
            next(results)


class TestAgain:
    def test_completed_items_do_not_run_again(self, running, square):
        assert list(running.map(square.executor, range(5))) == [0, 1, 4, 9, 16]
        assert list(running.map(square.executor, range(7))) == [0, 1, 4, 9, 16, 25, 36]
        assert Counter(square.asked) == dict.fromkeys(range(7), 1)

    def test_failed_items_run_again(self, running, square):
        square.failing = {1, 3}
        failed = list(running.map(square.executor, range(5), return_exceptions=True))
        square.failing = {3}
        results = running.map(square.executor, range(5), return_exceptions=True)
        assert [str(result) if isinstance(result, int) else "" for result in results] == [
            *("0", "1", "4", "", "16")
        ]
        assert Counter(square.asked) == {0: 1, 1: 2, 2: 1, 3: 2, 4: 1}
        assert running.get_task_status(failed[3].task_id).starts == 2

    def test_failed_items_stay_failed_without_retry_failed(self, running, square):
        square.failing = {1}
        queue = running
        first = list(queue.map(square.executor, range(3), return_exceptions=True))
        square.failing = set()
        again = queue.map(square.executor, range(3), return_exceptions=True, retry_failed=False)
        assert list(map(str, again)) == list(map(str, first))
        assert Counter(square.asked) == dict.fromkeys(range(3), 1)

    def test_cancelled_items_stay_cancelled_without_retry_failed(self, queue, square):
        queue.submit("square", {"n": 4}, id="square:4")
        queue.cancel_task("square:4")
        results = queue.map(square.executor, [4], lambda n: n, retry_failed=False, timeout=PATIENCE)
        with pytest.raises(CancelledError):
            next(results)

    def test_cancelled_items_run_again(self, queue, square):
        queue.submit("square", {"n": 4}, id="square:4")
        queue.cancel_task("square:4")
        queue.start()
        assert list(queue.map(square.executor, [4], key=str)) == [16]
        assert square.asked == [4]

    def test_unfinished_items_are_waited_for(self, queue, square):
        """The queue is not started, as if another process ran the task."""
        queue.submit("square", {"n": 4}, id="square:4")
        results = queue.map(square.executor, [4], key=str, timeout=0.01)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        queue.start()

        def result():
            with suppress(concurrent.futures.TimeoutError):
                return next(results)

        assert eventually(result) == 16  # it goes on after a time-out
        assert square.asked == [4]

    def test_a_requeue_by_another_process_is_no_error(self, running, square, monkeypatch):
        """Both processes find the task failed, and one requeues it first."""
        square.failing = {1}
        [failed] = running.map(square.executor, [1], return_exceptions=True)
        square.failing = set()
        requeue = running.requeue

        def twice(task_id):
            requeue(task_id)
            requeue(task_id)

        monkeypatch.setattr(running, "requeue", twice)
        assert list(running.map(square.executor, [1])) == [1]
        assert running.get_task_status(failed.task_id).starts == 2

    def test_a_task_that_is_deleted_meanwhile_is_submitted_again(self, queue, square, monkeypatch):
        handle = queue.submit("square", {"n": 4}, id="square:4")
        get_many = queue.repository.get_many

        def delete_first(task_ids):
            monkeypatch.setattr(queue.repository, "get_many", get_many)
            queue.delete(*task_ids)
            return get_many(task_ids)

        monkeypatch.setattr(queue.repository, "get_many", delete_first)
        results = queue.map(square.executor, [4], key=str, timeout=0.01)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        assert handle.task().status is TaskStatus.PENDING
        queue.start()
        assert queue.drain(PATIENCE)
        assert next(results) == 16

    def test_maps_with_different_names_are_different(self, running, square):
        assert list(running.map(square.executor, [1, 2])) == [1, 4]
        assert list(running.map(square.executor, [1, 2], name="monday")) == [1, 4]
        assert square.asked.count(1) == 2

    def test_a_task_of_another_type_does_not_belong_to_the_map(self, running, square):
        cube = running.executor("cube")(lambda n: n**3)
        assert list(running.map(square.executor, [2], str, name="powers")) == [4]
        with pytest.raises(ConfigurationError, match=r"powers:2 has type 'square'.*another name"):
            next(running.map(cube, [2], str, name="powers"))


class TestKeys:
    def test_keys_are_made_from_the_params(self, running, square):
        """The keys are part of stored ids: a new version must make the same ones."""
        list(running.map(square.executor, [{"n": 7, "plus": 1}]))
        assert ids(running) == {"square:974f0ef61bddc04afde404638468a49d"}
        assert digest({"plus": 1, "n": 7}) == "974f0ef61bddc04afde404638468a49d"
        assert digest({"n": "7", "plus": 1}) != digest({"n": 7, "plus": 1})
        assert digest({"a": (1, "ä")}) == digest({"a": [1, "ä"]})

    def test_keys_can_be_chosen(self, running, square):
        list(running.map(square.executor, [7, {"n": 8}], key=lambda i: i if i == 7 else "eight"))
        assert ids(running) == {"square:7", "square:eight"}

    @pytest.mark.parametrize("key", [None, "", 1.5, True, ["a"]])
    def test_keys_must_be_texts_or_whole_numbers(self, running, square, key):
        with pytest.raises(ConfigurationError, match="key must return"):
            next(running.map(square.executor, [7], key=lambda _: key))
        assert ids(running) == set()

    def test_keys_must_not_be_too_long(self, running, square):
        with pytest.raises(ConfigurationError, match="more than 255"):
            next(running.map(square.executor, [7], key=lambda _: "x" * 250))


class TestOptions:
    def test_options_are_those_of_submit(self, queue, square):
        retry = RetryPolicy(9)
        results = queue.map(
            *(square.executor, [1]),
            created_by="me",
            priority=0,
            max_attempts=4,
            max_crashes=2,
            retry=retry,
            timeout=0,
        )
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        [task] = queue.list_tasks()[0]
        assert (task.created_by, task.priority, task.max_attempts) == ("me", 0, 4)
        assert (task.max_crashes, task.retry) == (2, retry)

    def test_priority_zero_overrides_the_executors_priority(self, queue):
        urgent = queue.executor("urgent", priority=9)(lambda n: n)
        for priority in (None, 0):
            results = queue.map(urgent, [1], name=f"p{priority}", priority=priority, timeout=0)
            with pytest.raises(concurrent.futures.TimeoutError):
                next(results)
        assert [task.priority for task in queue.list_tasks()[0]] == [0, 9]

    @pytest.mark.parametrize(
        "options",
        [
            {"window": 0},
            {"window": 1.5},
            {"timeout": -1},
            {"key": "id"},
            {"name": 5},
        ],
    )
    def test_wrong_options_are_refused_at_the_call(self, queue, square, options):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            queue.map(square.executor, [1], **options)

    def test_unknown_options_are_refused_at_the_call(self, queue, square):
        with pytest.raises(TypeError, match="no option delay"):
            queue.map(square.executor, [1], delay=5)

    def test_a_plain_function_is_refused(self, queue):
        with pytest.raises(ConfigurationError, match="map requires a type or an executor"):
            queue.map(abs, [1])

    def test_an_unknown_executor_is_refused(self, queue):
        with pytest.raises(UnknownTaskType):
            next(queue.map(executor("stranger")(lambda n: n), [1]))


def test_a_map_works_on_eight_methods(make_queue):
    queue = make_queue(TinyRepository(), worker_num=2)
    square = Square(queue)
    square.failing = {1}
    queue.start()
    results = list(queue.map(square.executor, range(4), return_exceptions=True))
    assert results[2:] == [4, 9]
    square.failing = set()
    assert list(queue.map(square.executor, range(4))) == [0, 1, 4, 9]
    assert Counter(square.asked) == {0: 1, 1: 2, 2: 1, 3: 1}


def test_two_queues_share_a_map(make_queue):
    """Each queue gets all results, and each item runs once, as with two processes."""
    repository = MemoryRepository()
    queues = [make_queue(repository, worker_num=2) for _ in range(2)]
    squares = [Square(queue) for queue in queues]
    for queue in queues:
        queue.start()
    maps = [
        queue.map(square.executor, range(30)) for queue, square in zip(queues, squares, strict=True)
    ]
    for n, pair in enumerate(zip(*maps, strict=True)):
        assert pair == (n * n, n * n)
    assert Counter(squares[0].asked + squares[1].asked) == dict.fromkeys(range(30), 1)


MAPS = """
import sys, threading
from taskx import Config, Queue, SQLiteRepository

path = sys.argv[1]
queue = Queue(SQLiteRepository(path), Config(worker_num=2, buffer_size=4))

def say(word):
    sys.stdout.write(f"{word}\\n")  # as one write, as several threads call this
    sys.stdout.flush()

@queue.executor()
def work(n: int) -> int:
    with open(path + ".log", "a") as log:
        log.write(f"{n}\\n")
    if n == 20 and sys.argv[2] == "hang":
        say("at 20")
        threading.Event().wait()
    return n * n

with queue:
    for result in queue.map(work, range(40)):
        say(result)
"""


def test_a_map_continues_after_its_process_was_killed(spawn, database):
    """The second process returns all results, and only unfinished items run again."""
    child = spawn(MAPS, database, "hang")
    said = [child.read()]
    while "at 20" not in said or str(19 * 19) not in said:
        said.append(child.read())
    child.kill()
    child = spawn(MAPS, database, "go on")
    assert [child.read() for _ in range(40)] == [str(n * n) for n in range(40)]
    assert child.ends()[0] == ""
    ran = Counter(map(int, (database.parent / "tasks.db.log").read_text().split()))
    assert set(ran) == set(range(40))
    assert {n for n, times in ran.items() if times > 1} <= set(range(20, 40))
    assert ran[20] == 2


IN_A_CHILD = """
import os, sys, warnings
from concurrent.futures import TimeoutError
from contextlib import suppress
from taskx import Config, Queue, SQLiteRepository

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of fork beside threads
queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=1))
queue.executor("twice")(lambda n: 2 * n)
queue.start()
results = queue.map("twice", ({"n": n} for n in range(10)), window=1)
assert next(results) == 0
pool = queue._node.pool
if (child := os.fork()) == 0:
    results._timeout = 0.0
    with suppress(TimeoutError):
        next(results)
    os._exit(len(queue.list_tasks()[0]) + len(pool.buffer))
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
queue.stop()
print(code)
"""


def test_a_map_in_a_forked_child_leaves_its_tasks_to_other_nodes(spawn, database):
    """The intake of the parent, with its buffer, must not be used in the child."""
    assert spawn(IN_A_CHILD, database).ends()[0] == "2\n"
