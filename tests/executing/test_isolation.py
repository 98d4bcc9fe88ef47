"""Executors in child processes: they work as in a thread, but can be killed and may die."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import PATIENCE, ROOT, SpySQLite, eventually, node_of, pool_of
from storage.repositories import TinyRepository

import taskx
from taskx import (
    ConfigurationError,
    Hook,
    MemoryRepository,
    PayloadError,
    Queue,
    RetryPolicy,
    Task,
    TaskFailed,
    TaskStatus,
)
from taskx.attempt.context import Shared
from taskx.attempt.process import channel, isolation
from taskx.attempt.registry import Registry
from taskx.tasks.options import Options
from taskx.testing import ManualClock

from . import isolated

# Tests count the starts of tasks, so a slow machine must hand no started task back.
pytestmark = [pytest.mark.process, pytest.mark.usefixtures("calm")]

TESTS = ROOT / "tests"


@pytest.fixture
def repository(database):
    """A repository on SQLite only: other tests check the writes on all stores."""
    with SpySQLite(database) as made:
        yield made


@pytest.fixture
def make(make_queue):
    """Return a function that makes and starts a queue with these executors."""

    def make(*executors, **options):
        queue = make_queue(worker_num=2, **options)
        for executor in executors:
            queue.register_executor(executor)
        queue.start()
        return queue

    return make


def alive(pid):
    """Return True if a process has not ended. A zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def busy(pid):
    """Return the processor time of a process in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def open_files(but):
    """Return the number of files that this process has open, without the database ``but``.

    The number of open connections to the database depends on how many threads have read at once.
    """
    count = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            count += not os.readlink(f"/proc/self/fd/{number}").startswith(str(but))
        except FileNotFoundError:  # closed in the meantime
            continue
    return count


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def outcomes(queue, task_id):
    task = queue.get_task_status(task_id)
    return [(attempt.outcome, attempt.error) for attempt in task.attempts]


# The same as in a thread


class TestAsInAThread:
    def test_each_run_has_its_own_child_and_uses_its_main_thread(self, make, capfd):
        queue = make(isolated.who)
        first, second = (queue.submit("who", timeout=500).result(PATIENCE) for _ in range(2))
        assert first["pid"] != second["pid"] != os.getpid()
        assert first["parent"] == second["parent"] == os.getpid()
        assert (first["states"], second["states"]) == (1, 1)
        assert first["main thread"]
        assert 400 < first["remaining"] < 500
        assert capfd.readouterr().out == 2 * "on the stdout of the child\n"

    def test_the_child_gets_the_task(self, make):
        queue = make(isolated.who)
        task = Task(id="☃", type="who", created_by="me", max_attempts=3, retry=RetryPolicy(7))
        given = queue.submit(task, timeout=90).result(PATIENCE)["task"]
        after = queue.get_task_status("☃")
        same = ("id", "type", "created_by", "max_attempts", "timeout", "starts")
        assert {name: given[name] for name in same} == {
            name: after.to_dict()[name] for name in same
        }
        assert Task.from_dict(given).retry == RetryPolicy(7)
        assert (given["status"], given["owner"]) == ("running", node_of(queue).record.id)

    def test_params_and_results_pass_unchanged_as_json(self, make):
        queue = make(isolated.add, isolated.give)
        words = ["a\nb", "☃", "\x00"]
        assert queue.submit("add", {"a": words, "b": [None]}).result(PATIENCE) == [*words, None]
        assert queue.submit("give", {"kind": "tuple"}).result(PATIENCE) == [1, "☃"]

    def test_a_value_larger_than_a_socket_buffer_passes(self, make):
        queue = make(isolated.add, max_payload_size=20_000_000)
        text = "☃" * 2_000_000
        assert queue.submit("add", {"a": text, "b": "!"}).result(PATIENCE) == text + "!"

    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            ("nan", "PayloadError: result: nan is not valid JSON: leave it out"),
            ("set", "PayloadError: result: set is not JSON"),
            ("large", "PayloadError: result: 3,002 bytes as JSON, more than max_payload_size (99)"),
        ],
    )
    def test_results_that_cannot_be_stored_are_refused(self, make, kind, error):
        queue = make(isolated.give, max_payload_size=99)
        with pytest.raises(TaskFailed) as failed:
            queue.submit("give", {"kind": kind}).result(PATIENCE)
        assert failed.value.error == error

    def test_params_that_do_not_fit_are_refused_at_submit(self, make):
        with pytest.raises(taskx.PayloadError, match="'add' does not take 'c'"):
            make(isolated.add).submit("add", {"a": 1, "c": 2})

    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            ("own", "OwnError: bad ☃"),
            ("key", "KeyError: 'name'"),
            ("exit", "SystemExit: 3"),
            ("memory", "MemoryError"),
            ("cancelled", "TaskCancelled: the task was told to stop: cancel"),
        ],
    )
    def test_an_error_keeps_its_text_and_the_childs_traceback(self, make, kind, error):
        queue = make(isolated.fail)
        with pytest.raises(TaskFailed) as failed:
            queue.submit("fail", {"kind": kind}).result(PATIENCE)
        assert failed.value.error == error
        trace = failed.value.remote_traceback
        assert "isolated.py" in trace
        assert trace.rstrip().splitlines()[-1].endswith(error)
        assert "child.py" not in trace
        assert "isolation.py" not in trace
        assert outcomes(queue, failed.value.task_id) == [("failed", error)]
        kind = queue.get_task_status(failed.value.task_id).error_type
        assert failed.value.error_type == kind
        assert kind.rpartition(".")[2] == error.partition(":")[0]

    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            ("by hand", "TaskCancelled: the task was told to stop: enough"),
            ("cancelled", "CancelledWithout: 5"),
            ("retry", "RetryWithout: 5"),
            ("snooze", "SnoozeWithout: 5"),
        ],
    )
    def test_an_error_without_the_attributes_of_its_class_is_not_a_crash(self, make, kind, error):
        queue = make(isolated.odd)
        with pytest.raises(TaskFailed) as failed:
            queue.submit("odd", {"kind": kind}).result(PATIENCE)
        assert failed.value.error == error
        task = queue.get_task_status(failed.value.task_id)
        assert (task.errors, task.crashes, task.starts) == (1, 0, 1)

    def test_retry_permanent_and_snooze_work_in_a_child(self, make, repository):
        queue = make(isolated.fail)
        again = queue.submit("fail", {"kind": "retry"}, max_attempts=2)
        with pytest.raises(TaskFailed, match="OwnRetry: again"):
            again.result(PATIENCE)
        assert [outcome for outcome, _ in outcomes(queue, again.id)] == ["retried", "failed"]
        [retried] = [
            write.changes
            for batch in repository.batches
            for write in batch
            if getattr(write, "changes", {}).get("held")
        ]
        assert retried["run_at"] > 0
        never = queue.submit("fail", {"kind": "permanent"}, max_attempts=5)
        with pytest.raises(TaskFailed, match="Permanent: never"):
            never.result(PATIENCE)
        assert len(outcomes(queue, never.id)) == 1
        later = queue.submit("fail", {"kind": "snooze"})
        assert eventually(lambda: later.task().snoozes)
        assert (later.task().status, later.task().errors) == (TaskStatus.PENDING, 0)

    @pytest.mark.parametrize(
        ("named", "attempts"),
        [(f"{isolated.__name__}.OwnError", 2), (Exception, 2), (OSError, 1)],
    )
    def test_retry_policies_know_the_class_of_a_childs_error(self, make, named, attempts):
        queue = make(isolated.fail)
        policy = RetryPolicy(2, base=0, retry_on=[named])
        handle = queue.submit("fail", {"kind": "own"}, retry=policy)
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        assert handle.task().errors == attempts

    def test_progress_is_stored_while_the_child_runs(self, make, tmp_path):
        queue = make(isolated.walk)
        handle = queue.submit("walk", {"path": str(tmp_path / "step")})
        for step in (1, 2, 3):
            eventually(
                lambda step=step: (
                    (handle.task().progress, handle.task().message) == (step * 10, f"step {step}")
                )
            )
            (tmp_path / f"step{step}").touch()
        handle.result(PATIENCE)
        assert (handle.task().progress, handle.task().message) == (100, "the last")

    def test_long_messages_of_children_are_cut_and_the_log_says_so_once(self, make, caplog):
        queue = make(isolated.tell)
        for _ in range(2):
            handle = queue.submit("tell", {"length": 20_000})
            handle.result(PATIENCE)
            assert handle.task().message == "x" * 9_999 + "…"
        told = [r.getMessage() for r in caplog.records if "are cut" in r.getMessage()]
        assert told == [
            "progress messages of type 'tell' with more than 10,000 characters are cut, and end in '…'"
        ]

    def test_log_records_of_the_child_reach_the_parents_loggers(self, make, caplog, monkeypatch):
        queue = make(isolated.log)
        own = []
        monkeypatch.setattr(logging.getLogger("app.own"), "filters", [own.append])
        with caplog.at_level(logging.INFO):
            logging.getLogger("app.quiet").setLevel(logging.ERROR)
            handle = queue.submit("log")
            handle.result(PATIENCE)
        told = [record for record in caplog.records if record.filename == "isolated.py"]
        assert [(record.name, record.levelname, record.getMessage()) for record in told] == [
            ("taskx", "INFO", f"[log {handle.id}] from the context: 1"),
            ("app.part", "WARNING", "from the module"),
            ("taskx", "ERROR", f"[log {handle.id}] with an error"),
        ]
        assert (told[0].task_id, told[0].more) == (handle.id, 5)
        assert "OwnError: logged" in told[2].exc_text
        assert [record.getMessage() for record in own] == ["from a logger with its own handlers"]

    def test_the_queues_own_logger_gets_the_childs_context_log(self, make):
        told = []
        logger = logging.Logger("own", logging.INFO)  # noqa: LOG001
        logger.addFilter(lambda record: told.append(record.getMessage()))
        queue = make(isolated.log, logger=logger)
        handle = queue.submit("log")
        handle.result(PATIENCE)
        assert f"[log {handle.id}] from the context: 1" in told

    def test_steps_run_once_and_the_cursor_is_kept(self, make, tmp_path):
        queue = make(isolated.steps)
        handle = queue.submit("steps", {"path": str(tmp_path / "done")})
        assert handle.result(PATIENCE) == [None, [1, {"a": "☃"}], {"at": 7}]
        assert lines(tmp_path / "done") == ["first"]
        assert handle.task().errors == 1

    def test_a_step_of_a_run_that_lost_its_task_is_not_stored(self, make, tmp_path, repository):
        queue = make(isolated.wait_to_step)
        handle = queue.submit("wait_to_step", {"path": str(tmp_path / "go")})
        eventually(lambda: handle.task().message)
        repository.update_status(handle.id, TaskStatus.FAILED)
        (tmp_path / "go").touch()
        eventually(lambda: not pool_of(queue).runs)
        assert handle.task().checkpoints is None

    def test_the_executor_can_handle_a_checkpoint_that_is_refused(self, make, monkeypatch):
        queue = make(isolated.goes_on_without)

        def store(*args, **options):
            raise PayloadError("checkpoints", "too large for this one")

        monkeypatch.setattr(pool_of(queue).starter._shared.keeper, "store", store)
        assert queue.submit("goes_on_without").result(PATIENCE) == [
            "checkpoints: too large for this one"
        ]

    def test_a_repository_without_checkpoints_refuses_them_in_a_child(self, make_queue, tmp_path):
        queue = make_queue(TinyRepository())
        queue.register_executor(isolated.steps, max_attempts=1)
        queue.start()
        with pytest.raises(TaskFailed, match=r"ConfigurationError: .*checkpoints"):
            queue.submit("steps", {"path": str(tmp_path / "done")}).result(PATIENCE)
        assert lines(tmp_path / "done") == []

    def test_the_last_message_of_an_ended_child_is_read_completely(self, monkeypatch):
        """The socket of an ended child may be kept open by a process that it started."""
        monkeypatch.setattr(channel, "_CHUNK", 1000)
        ours, theirs = socket.socketpair()
        hears, says = channel.Channel(ours), channel.Channel(theirs)
        said = ["returned", "x" * 100_000]
        says.say(*said)
        heard = hears.hear_rest()
        assert heard == [said]
        assert hears.hear_rest() is None
        ours.close()
        theirs.close()

    def test_the_child_can_read_the_tasks_it_depends_on(self, make):
        queue = make(isolated.add, isolated.ask)
        queue.submit("add", {"a": 1}, id="one")
        queue.submit("add", {"a": 2}, id="two")
        asked = queue.submit("ask", depends_on=["two", "one"])
        assert asked.result(PATIENCE) == [["two", 2, "completed"], ["one", 1, "completed"]]
        assert queue.submit("ask").result(PATIENCE) == []

    def test_a_deleted_parent_raises_task_not_found_in_the_child(self, make):
        clock = ManualClock()
        queue = make(isolated.ask, clock=clock)
        queue.executor("parent")(lambda: 1)
        queue.submit("parent", id="one").result(PATIENCE)
        asked = queue.submit("ask", depends_on=["one"], delay=60)
        queue.delete("one")
        clock.advance(60)
        with pytest.raises(TaskFailed, match="TaskNotFound: no task with id 'one'"):
            asked.result(PATIENCE)

    def test_capture_log_keeps_the_childs_log(self, make):
        queue = make()
        queue.register_executor(isolated.log, capture_log=True)
        handle = queue.submit("log")
        handle.result(PATIENCE)
        kept = handle.task().log
        assert [line.partition(" ")[2] for line in kept.splitlines()[1:4]] == [
            "INFO taskx: from the context: 1",
            "WARNING app.part: from the module",
            "ERROR taskx: with an error",
        ]
        assert "OwnError: logged" in kept

    def test_a_class_executor_can_run_in_a_child(self, make):
        queue = make()
        queue.register_executor(isolated.Classic(), isolation="process")
        queue.register_executor(isolated.Holder.Inner(), isolation="process")
        result = queue.submit("classic", {"n": 5}).result(PATIENCE)
        assert result["n"] == 5
        assert result["pid"] != os.getpid()
        assert queue.submit("inner").result(PATIENCE) == "inner"

    def test_an_undecorated_function_of_a_module_can_run_in_a_child(self, make):
        queue = make()
        queue.register_executor(taskx.executor("plain", isolation="process")(isolated.plain))
        assert queue.submit("plain", {"word": "x"}).result(PATIENCE) == "X"

    def test_a_direct_call_starts_no_process(self):
        assert isolated.add(1, b=2) == 3

    def test_middleware_runs_in_the_parent(self, make):
        seen = []

        def layer(ctx, task, call_next):
            seen.append((os.getpid(), threading.current_thread().name, task.id))
            try:
                return [call_next()]
            except isolated.Permanent as error:
                seen.append(str(error))
                return "caught"

        queue = make(isolated.add, isolated.fail, middleware=[layer])
        handle = queue.submit("add", {"a": 1})
        assert handle.result(PATIENCE) == [1]
        [(pid, thread, task_id)] = seen
        assert (pid, task_id) == (os.getpid(), handle.id)
        assert thread.startswith("taskx-worker")
        assert queue.submit("fail", {"kind": "permanent"}).result(PATIENCE) == "caught"
        assert seen[-1] == "Permanent: never"

    def test_the_submitting_thread_can_run_an_isolated_task(self, make, gate):
        queue = make(isolated.add, buffer_size=1, overflow="caller_runs")
        queue.executor("hold")(lambda: gate())
        for _ in range(2):
            queue.submit("hold")
            gate.wait_for()
        queue.submit("hold")
        assert queue.submit("add", {"a": 1}).result(0) == 1


# The token


class TestToken:
    def test_a_cancel_reaches_the_child(self, make, tmp_path):
        queue = make(isolated.listen)
        handle = queue.submit("listen", {"path": str(tmp_path / "heard")})
        pid = eventually(lambda: handle.task().message)
        handle.cancel()
        eventually(handle.cancelled)
        assert lines(tmp_path / "heard") == ["cancel cancel True"]
        eventually(lambda: not alive(pid))

    def test_a_cancel_from_another_process_reaches_the_child(self, run, tmp_path, make_queue):
        program = run("queue.start(); say('started'); signal.pause()")
        other = make_queue()
        other.declare("listen")
        handle = other.submit("listen", {"path": str(tmp_path / "heard")})
        assert program.read() == "started"
        eventually(lambda: handle.task().message)
        assert other.cancel_task(handle.id) is False
        eventually(lambda: handle.task().status is TaskStatus.CANCELLED)
        assert lines(tmp_path / "heard") == ["cancel cancel True"]

    def test_a_time_out_reaches_the_child(self, make, tmp_path):
        clock = ManualClock()
        queue = make(isolated.listen, clock=clock)
        handle = queue.submit("listen", {"path": str(tmp_path / "heard")}, timeout=3600)
        eventually(lambda: handle.task().message)
        clock.advance(3600)
        with pytest.raises(TaskFailed) as failed:
            handle.result(PATIENCE)
        assert failed.value.error == "timed out after 3600 s"
        assert "isolated.py" in failed.value.remote_traceback
        assert lines(tmp_path / "heard") == ["timeout timeout True"]

    def test_a_time_out_counts_even_if_only_the_childs_clock_has_reached_it(self, make):
        queue = make(isolated.listen, clock=ManualClock())  # which stands still
        with pytest.raises(TaskFailed) as failed:
            queue.submit("listen", timeout=0.5).result(PATIENCE)
        assert failed.value.error == "timed out after 0.5 s"

    def test_a_stop_returns_the_task_to_the_queue(self, make, tmp_path, repository):
        queue = make(isolated.listen)
        handle = queue.submit("listen", {"path": str(tmp_path / "heard")})
        eventually(lambda: handle.task().message)
        assert queue.stop(PATIENCE, cancel=True) == []
        assert lines(tmp_path / "heard") == ["stop stop True"]
        after = repository.get_by_id(handle.id)
        assert (after.status, after.interruptions, after.errors) == (TaskStatus.PENDING, 1, 0)

    def test_ctx_timeout_works_inside_the_child(self, make):
        queue = make(isolated.listen)
        assert queue.submit("listen", {"inner": True}).result(PATIENCE) == "inner"

    def test_ctx_timeout_works_around_the_child(self, make):
        def layer(ctx, task, call_next):
            try:
                with ctx.timeout(0.5):
                    return call_next()
            except TimeoutError:
                return "too slow"

        queue = make(isolated.listen, middleware=[layer])
        assert queue.submit("listen").result(PATIENCE) == "too slow"

    def test_a_task_cancelled_before_its_start_starts_no_process(self, make, monkeypatch):
        started, start = [], isolation._start
        monkeypatch.setattr(
            isolation, "_start", lambda *files: started.append(files) or start(*files)
        )
        queue = make(
            isolated.add, middleware=[lambda ctx, task, call_next: (cancel(task), call_next())]
        )
        cancel = lambda task: queue.cancel_task(task.id)  # noqa: E731
        handle = queue.submit("add", {"a": 1})
        eventually(handle.cancelled)
        assert not started


# Killed children


class TestUnresponsiveChild:
    """The executor ``ignore`` never checks its token, and holds the interpreter's lock."""

    @pytest.fixture
    def pids(self, make):
        """Return a function that runs ``ignore``, and returns its handle and two process ids.

        They belong to its child process and to a program that the child has started.
        """

        def start(queue, **options):
            handle = queue.submit("ignore", **options)
            return handle, eventually(lambda: handle.task().message).split()

        return start

    def test_a_time_out_kills_the_child_after_the_grace_period(self, make, pids):
        clock = ManualClock()
        queue = make(isolated.ignore, clock=clock)
        handle, running = pids(queue, timeout=3600)
        began = time.monotonic()
        clock.advance(3600)
        with pytest.raises(TaskFailed) as failed:
            handle.result(PATIENCE)
        assert time.monotonic() - began >= 0.2
        assert failed.value.error == (
            "timed out after 3600 s; its process did not end within 0.2 s and was killed"
        )
        eventually(lambda: not any(map(alive, running)))

    def test_a_task_whose_child_was_killed_by_a_time_out_can_be_retried(self, make, tmp_path):
        clock = ManualClock()
        queue = make(isolated.ignore, clock=clock)
        path = tmp_path / "pids"
        handle = queue.submit("ignore", {"path": str(path)}, timeout=3600, max_attempts=2)
        for attempt in (1, 2):
            eventually(lambda attempt=attempt: len(set(lines(path))) == attempt)
            clock.advance(3600)
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        assert [outcome for outcome, _ in outcomes(queue, handle.id)] == ["retried", "failed"]

    def test_a_cancel_kills_the_child_after_the_grace_period(self, make, pids):
        queue = make(isolated.ignore)
        handle, running = pids(queue)
        handle.cancel()
        eventually(handle.cancelled)
        eventually(lambda: not any(map(alive, running)))
        assert handle.task().crashes == 0

    def test_a_stop_kills_the_child_after_the_grace_period(self, make, pids, repository):
        queue = make(isolated.ignore)
        handle, running = pids(queue)
        assert queue.stop(PATIENCE, cancel=True) == []
        eventually(lambda: not any(map(alive, running)))
        after = repository.get_by_id(handle.id)
        assert (after.status, after.interruptions, after.crashes) == (TaskStatus.PENDING, 1, 0)

    @pytest.mark.parametrize("how", ["session", "daemon", "no environment"])
    def test_programs_in_their_own_session_are_killed_too(self, make, how):
        """They are found by their parents or, if the parents have ended, by their environment."""
        queue = make(isolated.leaves)
        handle = queue.submit("leaves", {"how": how})
        pid = eventually(lambda: handle.task().message)
        assert alive(pid)
        handle.cancel()
        eventually(handle.cancelled)
        eventually(lambda: not alive(pid))

    def test_programs_of_a_child_that_died_are_killed_too(self, make):
        queue = make(isolated.leaves)
        handle = queue.submit("leaves", {"how": "daemon", "dies": True}, max_crashes=1)
        with pytest.raises(TaskFailed, match="exit code 7"):
            handle.result(PATIENCE)
        eventually(lambda: not alive(handle.task().message))

    def test_a_child_that_ends_within_the_grace_period_is_not_killed(self, make, tmp_path):
        clock = ManualClock()
        queue = make(clock=clock)
        queue.register_executor(isolated.listen, grace=PATIENCE)
        heard = str(tmp_path / "heard")
        handle = queue.submit("listen", {"path": heard, "linger": 0.5}, timeout=3600)
        eventually(lambda: handle.task().message)
        clock.advance(3600)
        with pytest.raises(TaskFailed) as failed:
            handle.result(PATIENCE)
        assert failed.value.error == "timed out after 3600 s"
        assert lines(tmp_path / "heard") == ["timeout timeout True"]


# Dead children


class TestCrash:
    @pytest.mark.parametrize(
        ("how", "error"),
        [
            ("segfault", "its process was killed by SIGSEGV"),
            ("exit", "its process ended with exit code 7"),
            ("fork", "its process ended with exit code 7"),
            ("kill", "its process was killed by SIGKILL, perhaps because memory ran out"),
        ],
    )
    def test_a_dead_child_is_a_crash_of_its_task_only(self, make, gate, how, error):
        """The task runs again up to its last crash. A task beside it is not affected."""
        queue = make(isolated.die)
        beside = queue.executor("hold")(lambda: gate()).submit()
        gate.wait_for()
        handle = queue.submit("die", {"how": how}, max_crashes=2)
        with pytest.raises(TaskFailed) as failed:
            handle.result(PATIENCE)
        assert failed.value.error == f"{error} (2 of max_crashes=2)"
        task = handle.task()
        assert (task.crashes, task.errors, task.interruptions, task.dead_letter) == (2, 0, 0, True)
        assert outcomes(queue, handle.id) == [("crashed", error)] * 2
        assert all(attempt.worker == task.worker for attempt in task.attempts)
        gate.open()
        beside.result(PATIENCE)
        assert (beside.task().crashes, beside.task().starts) == (0, 1)

    def test_a_crash_reports_where_the_child_was(self, make):
        queue = make(isolated.die)
        with pytest.raises(TaskFailed) as failed:
            queue.submit("die", {"how": "segfault"}, max_crashes=1).result(PATIENCE)
        assert "Segmentation fault" in failed.value.remote_traceback
        assert 'isolated.py", line' in failed.value.remote_traceback

    def test_the_attempt_after_a_crash_can_succeed(self, make):
        queue = make(isolated.die)
        handle = queue.submit("die", {"how": "once"})
        assert handle.result(PATIENCE) == "second time"
        task = handle.task()
        assert [attempt.outcome for attempt in task.attempts] == ["crashed", "completed"]
        assert (task.crashes, task.attempt, task.error) == (1, 1, "")

    def test_an_isolated_suspect_runs_beside_other_tasks(self, make, gate):
        """Its crash cannot affect other tasks, so they do not wait, unlike for a suspect in a thread."""
        queue = make(isolated.die)
        queue.executor("hold")(lambda: gate())
        queue.submit("hold")
        gate.wait_for()
        began = time.monotonic()
        with pytest.raises(TaskFailed):
            queue.submit("die", {"how": "exit"}).result(PATIENCE)
        assert time.monotonic() - began < PATIENCE
        assert pool_of(queue).starter.suspects.item is None

    @pytest.mark.parametrize(
        ("reason", "status", "error"),
        [
            ("cancel", "cancelled", ""),
            ("timeout", "failed", "timed out after 900 s"),
            ("stop", "pending", ""),
        ],
    )
    def test_a_child_that_dies_after_its_token_has_fired_is_not_a_crash(
        self, make, monkeypatch, reason, status, error
    ):
        monkeypatch.setattr(isolation._Attendance, "_tell_to_stop", lambda self: None)
        queue = make(isolated.listen)
        handle = queue.submit("listen", timeout=900)
        pid = int(eventually(lambda: handle.task().message))
        run = pool_of(queue).runs[handle.id]
        pool_of(queue).begin_stop()  # so that the task does not run again
        run.token.fire(taskx.CancelReason(reason))
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: handle.task().status != "running")
        task = handle.task()
        assert (task.status.value, task.error, task.crashes) == (status, error, 0)

    def test_hooks_are_told_of_a_crash(self, make):
        told = []

        class Told(Hook):
            def rescued(self, task):
                told.append(("rescued", task.status.value, task.crashes))

            def finished(self, task):
                told.append(("finished", task.status.value, task.crashes))

            def interrupted(self, task):
                told.append("interrupted")

        queue = make(isolated.die, hooks=[Told()])
        queue.submit("die", {"how": "exit"}, max_crashes=2)
        assert queue.drain(PATIENCE)
        assert told == [
            ("rescued", "pending", 1),
            ("rescued", "failed", 2),
            ("finished", "failed", 2),
        ]

    def test_a_child_leaves_no_file_open_in_the_parent(self, make, database):
        queue = make(isolated.add, isolated.die)
        queue.submit("add", {"a": 1}).result(PATIENCE)
        before = open_files(but=database)
        for _ in range(3):
            queue.submit("add", {"a": 1}).result(PATIENCE)
        with pytest.raises(TaskFailed):
            queue.submit("die", {"how": "exit"}).result(PATIENCE)
        eventually(lambda: open_files(but=database) <= before)


# Death of the parent

PROGRAM = """
import signal, sys
sys.path.insert(0, sys.argv[2])
from executing import isolated
from taskx import Config, Queue, SQLiteRepository

def say(word):
    print(word, flush=True)

queue = Queue(SQLiteRepository(sys.argv[1]), Config(worker_num=2))
queue.register_executor(isolated.listen)
queue.register_executor(isolated.ignore)
"""


@pytest.fixture
def run(spawn, database):
    """Return a function that starts a program with a queue and more lines."""
    return lambda more: spawn(PROGRAM + more, database, TESTS)


class TestDiesWithItsParent:
    @pytest.mark.parametrize("type", ["listen", "ignore"])
    def test_a_killed_parent_leaves_no_running_child(self, run, make_queue, type):
        """Not even a child that blocks all of its other threads stays behind."""
        program = run(f"queue.start(); queue.submit({type!r}, id='x'); signal.pause()")
        survivor = make_queue()
        survivor.executor(type)(lambda ctx, **params: "again")
        pid, *programs = eventually(lambda: message(survivor, "x")).split()
        assert alive(pid)
        if programs:  # it holds the interpreter's lock
            before = busy(pid)
            eventually(lambda: busy(pid) > before + 30)
        program.kill()
        for started in programs:  # programs that the child has started are not killed with it
            os.kill(int(started), signal.SIGKILL)
        eventually(lambda: not alive(pid))
        survivor.start()
        assert survivor.handle("x").result(PATIENCE) == "again"
        assert survivor.get_task_status("x").crashes == 1

    def test_a_child_ends_when_its_socket_closes(self, make, monkeypatch):
        """For systems whose kernel does not kill it. Here the parent lives and closes the socket."""
        queue = make(isolated.listen)
        cut = []
        hear = isolation._Attendance._hear

        def hear_or_cut(self):
            if cut == ["now"]:
                cut[:] = [self._child]
                self._child.channel.close()
            if cut:
                self._child._process.wait(PATIENCE)
                raise ConnectionError("cut")
            return hear(self)

        monkeypatch.setattr(isolation._Attendance, "_hear", hear_or_cut)
        handle = queue.submit("listen")
        eventually(lambda: handle.task().message)
        cut.append("now")
        with pytest.raises(TaskFailed, match="cut"):
            handle.result(PATIENCE)
        assert cut[0]._process.returncode == -signal.SIGKILL

    def test_a_child_ignores_ctrl_c_and_sigterm(self, make, tmp_path):
        queue = make(isolated.walk)
        handle = queue.submit("walk", {"path": str(tmp_path / "step")})
        [pid] = map(int, eventually(lambda: lines(tmp_path / "steppid")))
        assert os.getpgid(pid) != os.getpgrp()
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        for step in (1, 2, 3):
            (tmp_path / f"step{step}").touch()
        handle.result(PATIENCE)
        assert lines(tmp_path / "steppid") == [str(pid)]

    def test_an_interrupt_of_the_parent_ends_the_child(self, monkeypatch):
        started = []  # the main thread runs the task here
        start = isolation._start

        def interrupted(self):
            raise KeyboardInterrupt

        monkeypatch.setattr(
            isolation, "_start", lambda *files: started.append(start(*files)) or started[0]
        )
        monkeypatch.setattr(isolation._Attendance, "_hear", interrupted)
        registry = Registry()
        registry.register(isolated.listen, Options())
        keeper = SimpleNamespace(check=lambda: None)
        log = logging.getLogger("taskx")
        shared = Shared(None, log, keeper, None)
        ctx = taskx.Context(Task(type="listen"), taskx.CancelToken(), shared)
        with pytest.raises(KeyboardInterrupt):
            registry.get("listen").function(ctx)
        assert started[0].returncode == -signal.SIGKILL


def message(queue, task_id):
    found = queue.repository.get_many([task_id])
    return found[task_id].message if found else ""


# Importing executors


class TestImportableExecutors:
    @pytest.fixture
    def queue(self):
        return Queue(MemoryRepository())

    def test_invalid_options_of_isolation_are_refused(self, queue):
        with pytest.raises(ConfigurationError, match="isolation must be"):
            queue.executor("x", isolation="thread")
        for grace in (-1, float("inf"), "5"):
            with pytest.raises(ConfigurationError, match="grace"):
                queue.executor("x", grace=grace)
        queue.executor("x", isolation=None, grace=0)(lambda: 1)

    def test_an_executor_that_a_child_cannot_import_is_refused(self, queue):
        def inner():
            return 1

        class Inner(isolated.Classic):
            pass

        refused = "isolation=.process., because a child process must be able to import it"
        for function in (inner, lambda: 1, print_name, isolated.Classic().execute, Callable()):
            with pytest.raises(ConfigurationError, match=refused):
                queue.executor("x", isolation="process")(function)
        with pytest.raises(ConfigurationError, match=refused):
            queue.register_executor(Inner(), isolation="process")
        with pytest.raises(ConfigurationError, match="Needy cannot be created without arguments"):
            queue.register_executor(isolated.Needy("x"), isolation="process")
        assert queue._registry.types == ()

    def test_an_executor_outside_any_module_is_refused(self, queue):
        namespace = {"__name__": "nowhere"}
        exec("def f(): pass", namespace)
        with pytest.raises(ConfigurationError, match="not at the top level of a module"):
            queue.executor(isolation="process")(namespace["f"])

    def test_another_object_with_the_executors_name_is_not_run(self, make):
        queue = make()
        made = taskx.executor("replaced", isolation="process")(isolated.really_replaced)
        queue.register_executor(made)
        with pytest.raises(TaskFailed, match=r"ConfigurationError: .*isolated.replaced is another"):
            queue.submit("replaced").result(PATIENCE)

    def test_a_folder_that_is_in_sys_path_only_during_the_import_is_known_to_the_child(
        self, make, tmp_path, monkeypatch
    ):
        """Celery and Dramatiq import a program from the current folder in this way."""
        (tmp_path / "far_away.py").write_text("def where():\n    return __name__\n")
        with monkeypatch.context() as during:
            during.syspath_prepend(tmp_path)
            import far_away

            queue = make(taskx.executor("where", isolation="process")(far_away.where))
        assert queue.submit("where").result(PATIENCE) == "far_away"

    def test_an_executor_missing_in_the_child_fails_its_task(self, make, monkeypatch):
        monkeypatch.setattr(isolated, "vanishing", vanishing, raising=False)
        monkeypatch.setattr(vanishing, "__module__", isolated.__name__)
        queue = make()
        queue.executor("vanishing", isolation="process")(vanishing)
        with pytest.raises(TaskFailed, match="isolated has no vanishing"):
            queue.submit("vanishing").result(PATIENCE)


def vanishing():
    return 1


def print_name(word):
    return word


print_name.__qualname__ = "Some.<locals>.print_name"


class Callable:
    def __call__(self):
        return 1


SCRIPT = """
import os
from taskx import Config, Queue, SQLiteRepository

queue = Queue(SQLiteRepository("tasks.db"), Config(worker_num=1))

class OwnError(Exception):
    pass

@queue.executor(isolation="process", retry=taskx.RetryPolicy(2, base=0, retry_on=OwnError))
def where(parent):
    if os.getpid() == parent:
        return "here"
    if not os.path.exists("tried"):
        open("tried", "w").close()
        raise OwnError("once")
    return f"{__name__} {globals()['__file__'] is not None}"
"""


class TestMainModule:
    """A child process imports the executors of a script from the script's file."""

    @pytest.fixture
    def script(self, tmp_path):
        def run(tail, *command):
            (tmp_path / "script.py").write_text("import taskx\n" + SCRIPT + tail)
            return subprocess.run(
                [sys.executable, *(command or ("script.py",))],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )

        return run

    GUARDED = """
if __name__ == "__main__":
    with queue:
        handle = where.submit(parent=os.getpid())
        print(handle.result(timeout=100), [a.outcome for a in handle.task().attempts])
"""

    def test_a_script_that_submits_on_import_submits_once(self, script):
        """The import in the child must not submit, or each task would submit another one."""
        ran = script("""
handle = where.submit(parent=0)
with queue:
    print(handle.exception(timeout=100).error)
    print(queue.list_tasks()[1])
""")
        told, count = ran.stdout.splitlines()
        assert 'start queues there only under: if __name__ == "__main__"' in told, ran.stderr
        assert count == "1"

    def test_an_executor_of_a_script_runs_in_a_child(self, script):
        ran = script(self.GUARDED)
        assert (ran.stdout, ran.returncode) == ("__mp_main__ True ['retried', 'completed']\n", 0), (
            ran.stderr
        )

    def test_an_executor_of_a_module_run_with_m_runs_in_a_child(self, script):
        ran = script(self.GUARDED, "-m", "script")
        assert ran.stdout.startswith("script True"), ran.stderr

    def test_a_script_that_starts_its_queue_on_import_is_told_what_to_do(self, script):
        ran = script(
            """
queue.start()
handle = queue.submit("where", {"parent": os.getpid()})
print(handle.exception(timeout=100).error)
queue.stop()
"""
        )
        assert ran.returncode == 0, ran.stderr
        assert 'start queues there only under: if __name__ == "__main__"' in ran.stdout

    @pytest.mark.parametrize("repository", ["MemoryRepository()", "SQLiteRepository('tasks.db')"])
    def test_a_submit_in_the_child_is_stored_for_the_parent_or_refused(self, script, repository):
        """A task in the memory of the child would be lost with it."""
        ran = script(f"""
shared = taskx.Queue(taskx.{repository})
shared.executor("after")(lambda: "after")

@shared.executor("first", isolation="process", max_attempts=1)
def first():
    return shared.submit("after", id="second").id

if __name__ == "__main__":
    with shared:
        handle = first.submit()
        if handle.exception(timeout=100) is None:
            print(shared.handle(handle.result()).result(timeout=100))
        else:
            print(handle.exception().error, shared.list_tasks()[1])
""")
        if "SQLite" in repository:
            assert ran.stdout == "after\n", ran.stderr
        else:
            assert ran.stdout.startswith("ConfigurationError: in the child process"), ran.stderr
            assert ran.stdout.endswith("nothing was stored 1\n")

    def test_a_program_without_a_file_is_refused(self, script):
        ran = script("", "-c", "import taskx\n" + SCRIPT)
        assert "the main module of this program is not a file" in ran.stderr
