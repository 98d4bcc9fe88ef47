"""The log lines of an executor are kept with its task, if ``capture_log`` asks for it."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import threading

import pytest
from helpers import PATIENCE, eventually, no_rounds, run_in_thread
from storage.repositories import TinyRepository

import taskx
from taskx import (
    ConfigurationError,
    Hook,
    Retry,
    Snooze,
    Task,
    TaskExecutor,
    TaskFailed,
    TaskStatus,
)
from taskx.attempt import capture
from taskx.attempt.capture import MAX_LINE
from taskx.attempt.context import Context
from taskx.tasks.lifecycle import MAX_LOG


@pytest.fixture
def log():
    """A logger of the program that lets all lines through."""
    logger = logging.getLogger("program.part")
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Check that the root logger has the same handlers as before the test."""
    before = list(logging.getLogger().handlers)
    yield
    eventually(lambda: capture._router not in logging.getLogger().handlers)
    assert [h for h in logging.getLogger().handlers if h not in before] == []


def lines(task):
    """Return the lines that were kept, without their times."""
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    kept = task.log.splitlines()
    assert all(re.match(f"{moment}|---|Traceback| |ValueError", line) for line in kept), kept
    return [re.sub(moment, "", line) for line in kept]


class TestKeptLines:
    def test_the_record_has_lines_while_the_attempt_runs(self, queue):
        seen = threading.Event()

        @queue.executor(capture_log=True)
        def talk(ctx):
            ctx.logger.info("first")
            assert seen.wait(PATIENCE)
            ctx.logger.info("second")

        queue.start()
        handle = queue.submit("talk")
        live = eventually(lambda: lines(handle.task()))
        assert (live, handle.running()) == (
            ["--- attempt 1, start 1", "INFO taskx: first"],
            True,
        )
        seen.set()
        handle.result(PATIENCE)
        assert lines(handle.task()) == [*live, "INFO taskx: second"]

    def test_a_long_log_is_written_less_often(self):
        kept = capture.Capture(logging.INFO, "")
        assert kept.new(0) is None
        record = logging.LogRecord("a", logging.INFO, "", 1, "x" * 5000, (), None)
        for now, count, due in ((0, 1, 1), (10, 12, 14)):
            for _ in range(count):
                kept.add(record)
            assert kept.new(now) is None
            assert kept.new(due - 0.1) is None
            assert kept.new(due) == kept.text()
            assert kept.new(due + 9) is None
            kept.not_stored()
            assert kept.new(due) is None
            assert kept.new(due + 9) == kept.text()

    def test_lines_of_the_task_logger_and_of_other_loggers_are_kept(self, queue, log):
        @queue.executor(capture_log=True)
        def talk(ctx, name: str):
            ctx.logger.info("hello %s", name)
            log.warning("part of %s", name)
            ctx.logger.debug("too low")
            log.debug("too low")
            logging.getLogger("quiet").info("not let through by its own level")

        queue.start()
        handle = queue.submit("talk", {"name": "Ada"})
        handle.result(PATIENCE)
        assert lines(handle.task()) == [
            "--- attempt 1, start 1",
            "INFO taskx: hello Ada",
            "WARNING program.part: part of Ada",
        ]

    def test_a_percent_sign_in_the_id_or_the_type_is_no_format(self, queue, caplog):
        @queue.executor("50%off", capture_log=True)
        def talk(ctx):
            ctx.logger.info("page %d of %d", 1, 9)
            ctx.logger.info("all of it, 100%")

        queue.start()
        with caplog.at_level(logging.INFO, "taskx"):
            handle = queue.submit("50%off", id="https://example.org/a%20b")
            handle.result(PATIENCE)
        assert lines(handle.task())[1:] == [
            "INFO taskx: page 1 of 9",
            "INFO taskx: all of it, 100%",
        ]
        start = "[50%off https://example.org/a%20b] "
        told = [r for r in caplog.records if r.getMessage().startswith(start)]
        sent = [pickle.loads(pickle.dumps(record.getMessage())) for record in told]
        assert [(type(text), text) for text in sent] == [
            (str, f"{start}page 1 of 9"),
            (str, f"{start}all of it, 100%"),
        ]

    @pytest.mark.parametrize(
        ("level", "kept"),
        [
            (True, "IWE"),
            ("debug", "DIWE"),
            (logging.DEBUG, "DIWE"),
            ("WARNING", "WE"),
            (logging.ERROR, "E"),
            (False, ""),
            (None, ""),
        ],
    )
    def test_lines_below_the_chosen_level_are_not_kept(self, queue, log, level, kept):
        @queue.executor(capture_log=level)
        def talk(ctx):
            for name in ("debug", "info", "warning", "error"):
                getattr(log, name)("that")
                getattr(ctx.logger, name)("this")

        queue.start()
        handle = queue.submit("talk")
        handle.result(PATIENCE)
        found = [line for line in lines(handle.task()) if not line.startswith("---")]
        assert [line[0] for line in found if "that" in line] == list(kept)
        assert [line[0] for line in found if "this" in line] == list(kept)

    def test_a_logged_exception_is_kept_with_its_traceback(self, queue, log):
        @queue.executor(capture_log=True)
        def fail():
            try:
                raise ValueError("odd")
            except ValueError:
                log.exception("went on")

        queue.start()
        handle = queue.submit("fail")
        handle.result(PATIENCE)
        found = lines(handle.task())
        assert found[1:3] == ["ERROR program.part: went on", "Traceback (most recent call last):"]
        assert found[-1] == "ValueError: odd"

    def test_lines_of_class_executors_and_middleware_are_kept(self, make_queue, log):
        class Talk(TaskExecutor):
            type = "talk"

            def execute(self, ctx, task):
                ctx.logger.info("inside")

        def around(ctx, task, call_next):
            log.info("before")
            call_next()
            log.info("after")

        queue = make_queue(middleware=[around])
        queue.register_executor(Talk(), capture_log=True)
        queue.start()
        handle = queue.submit("talk")
        handle.result(PATIENCE)
        assert [line.split()[-1] for line in lines(handle.task())[1:]] == [
            *("before", "inside", "after")
        ]

    def test_lines_of_other_threads_and_tasks_are_not_kept(self, make_queue, gate, log):
        queue = make_queue(worker_num=3)

        @queue.executor(capture_log=True)
        def talk(ctx, n: int):
            gate()
            log.info("part %d", n)

            def other_thread():
                log.info("of another thread")
                ctx.logger.info("thread of %d", n)  # kept: ctx.logger belongs to the task

            run_in_thread(other_thread)()

        @queue.executor()
        def silent():
            gate()
            log.info("not asked for")

        queue.start()
        handles = [queue.submit("talk", {"n": n}) for n in range(2)]
        other = queue.submit("silent")
        gate.wait_for(3)
        log.info("of the main thread")
        gate.open()
        for n, handle in enumerate(handles):
            handle.result(PATIENCE)
            assert lines(handle.task())[1:] == [
                f"INFO program.part: part {n}",
                f"INFO taskx: thread of {n}",
            ]
        other.result(PATIENCE)
        assert other.task().log == ""

    def test_lines_of_a_logger_that_does_not_propagate_are_kept(self, make_queue, monkeypatch):
        """The queue's own logger may be such a logger."""
        logger = logging.getLogger("apart")
        monkeypatch.setattr(logger, "propagate", False)
        queue = make_queue(logger=logger)
        queue.executor("talk", capture_log=True)(lambda ctx: ctx.logger.info("heard"))
        queue.start()
        handle = queue.submit("talk")
        handle.result(PATIENCE)
        assert lines(handle.task())[1:] == ["INFO apart: heard"]

    def test_a_line_that_cannot_be_formatted_does_no_harm(self, queue, log, monkeypatch):
        monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's handler would complain
        monkeypatch.setattr(logging, "lastResort", None)

        @queue.executor(capture_log=True)
        def talk():
            log.warning("%d of", "none")
            log.warning("a surrogate \ud800")
            return "done"

        queue.start()
        handle = queue.submit("talk")
        assert handle.result(PATIENCE) == "done"
        text = handle.task().log
        assert "<a WARNING message that cannot be formatted>\n" in text
        assert text.endswith("WARNING program.part: a surrogate \\ud800\n")


class TestAttempts:
    @pytest.mark.parametrize(
        ("end", "status", "outcome"),
        [
            (None, TaskStatus.COMPLETED, "completed"),
            (OSError("down"), TaskStatus.FAILED, "failed"),
        ],
    )
    def test_the_log_is_stored_when_the_task_ends(self, queue, end, status, outcome):
        @queue.executor(capture_log=True)
        def talk(ctx):
            ctx.logger.info("said")
            if end is not None:
                raise end

        queue.start()
        handle = queue.submit("talk")
        eventually(lambda: handle.task().status is status)
        assert lines(handle.task()) == ["--- attempt 1, start 1", "INFO taskx: said"]

    def test_the_log_separates_the_attempts(self, queue):
        """A snooze gets its own heading, too, and a requeue keeps the log."""
        ends = [Retry("once"), Snooze(0.001), Snooze(0.001), OSError("down")]

        @queue.executor(capture_log=True, max_attempts=2)
        def talk(ctx):
            if len(ends) != 2:
                ctx.logger.info("%d left", len(ends))
            if ends:
                raise ends.pop(0)

        queue.start()
        handle = queue.submit("talk")
        with pytest.raises(TaskFailed):
            handle.result(PATIENCE)
        queue.requeue(handle.id)
        queue.handle(handle.id).result(PATIENCE)
        assert lines(handle.task()) == [
            *("--- attempt 1, start 1", "INFO taskx: 4 left"),
            *("--- attempt 2, start 2", "INFO taskx: 3 left"),
            *("--- attempt 2, start 4", "INFO taskx: 1 left"),
            *("--- attempt 1, start 5", "INFO taskx: 0 left"),
        ]

    @pytest.mark.parametrize("how", ["cancel", "timeout", "stop"])
    def test_the_log_of_an_interrupted_attempt_is_stored(self, make_queue, clock, how):
        queue = make_queue(worker_num=2, clock=clock)
        begun = threading.Event()

        @queue.executor(capture_log=True, timeout=60)
        def talk(ctx):
            ctx.logger.info("begins")
            begun.set()
            try:
                ctx.sleep(PATIENCE)
            finally:
                ctx.logger.info("ends")

        queue.start()
        handle = queue.submit("talk")
        assert begun.wait(PATIENCE)
        if how == "cancel":
            handle.cancel()
        elif how == "timeout":
            clock.advance(60)
        else:
            queue.stop(PATIENCE, cancel=True)
        eventually(lambda: handle.task().status is not TaskStatus.RUNNING)
        assert lines(handle.task())[1:] == ["INFO taskx: begins", "INFO taskx: ends"]

    def test_lines_logged_after_an_attempt_was_abandoned_are_dropped(self, make_queue, clock, gate):
        queue = make_queue(worker_num=2, clock=clock)

        @queue.executor(capture_log=True, timeout=60, grace=0.0)
        def talk(ctx):
            ctx.logger.info("hangs")
            gate()
            ctx.logger.info("is back")

        queue.start()
        handle = queue.submit("talk")
        gate.wait_for()
        clock.advance(60)
        with pytest.raises(TaskFailed, match="still runs"):
            handle.result(PATIENCE)
        gate.open()
        eventually(lambda: not handle.task().stuck_on)
        assert lines(handle.task())[1:] == ["INFO taskx: hangs"]

    def test_the_log_is_stored_in_the_same_write_as_the_outcome(self, queue, repository):
        queue.executor("talk", capture_log=True)(lambda ctx: ctx.logger.info("said"))
        queue.start()
        with no_rounds(queue):  # the housekeeper stores the log of an attempt that goes on
            queue.submit("talk").result(PATIENCE)
        writes = [write for batch in repository.batches for write in batch]
        # Without the start, which may be part of the create.
        moves = [write.move for write in writes if write.move != "start"]
        assert moves == ["create", "complete"]
        assert "log" in writes[-1].changes

    def test_an_executor_that_logs_nothing_stores_no_log(self, queue, repository):
        queue.executor("mute", capture_log=True)(lambda: None)
        queue.start()
        handle = queue.submit("mute")
        handle.result(PATIENCE)
        assert handle.task().log == ""
        assert not any("log" in w.changes for batch in repository.batches[1:] for w in batch)

    def test_hooks_see_the_log(self, make_queue):
        seen = []

        class Look(Hook):
            def finished(self, task):
                seen.append(lines(task)[1:])

        queue = make_queue(hooks=[Look()])
        queue.executor("talk", capture_log=True)(lambda ctx: ctx.logger.info("said"))
        queue.start()
        queue.submit("talk")
        assert queue.drain(PATIENCE)
        assert seen == [["INFO taskx: said"]]


class TestSize:
    def told_twice(self, queue, log, count):
        """Return the log of a task that logs ``count`` lines in each of two attempts."""

        @queue.executor(capture_log=True, max_attempts=2)
        def talk(ctx):
            for n in range(count):
                log.info("line %d of attempt %d %s", n, ctx.task.attempt, "x" * 30)
            if ctx.task.attempt == 1:
                raise Retry

        queue.start()
        handle = queue.submit("talk")
        handle.result(PATIENCE)
        return handle.task().log

    def test_only_the_last_lines_of_a_long_log_are_kept(self, queue, log):
        text = self.told_twice(queue, log, 2000)
        assert MAX_LOG - 200 < len(text) <= MAX_LOG
        assert "of attempt 1" not in text
        assert text.endswith(f"line 1999 of attempt 2 {'x' * 30}\n")
        first = int(re.search(r"line (\d+)", text)[1])
        assert re.findall(r"line (\d+)", text) == [str(n) for n in range(first, 2000)]
        lines(Task(log=text))  # no half line at the beginning

    def test_an_earlier_attempt_keeps_the_lines_that_still_fit(self, queue, log):
        text = self.told_twice(queue, log, 500)
        assert len(text) <= MAX_LOG
        assert text.count("of attempt 2") == 500
        assert 50 < text.count("of attempt 1") < 400
        assert "--- attempt 2, start 2\n" in text

    def test_a_long_line_is_cut(self, queue, log):
        @queue.executor(capture_log=True)
        def talk():
            for letter in "abcdefghi":
                log.info(letter * 3 * MAX_LOG)

        queue.start()
        handle = queue.submit("talk")
        handle.result(PATIENCE)
        _, *kept = handle.task().log.splitlines()
        assert [line[-2:] for line in kept] == [f"{letter}…" for letter in "cdefghi"]
        assert {len(line) for line in kept} == {MAX_LINE}


class TestOtherHandlers:
    """Capturing changes nothing for the code that logs and for other handlers."""

    def test_each_line_reaches_other_handlers_once(self, queue, log, caplog, monkeypatch):
        last = logging.StreamHandler(io.StringIO())
        monkeypatch.setattr(logging, "lastResort", last)

        @queue.executor(capture_log=True)
        def talk(ctx):
            ctx.logger.warning("of ctx")
            log.warning("of the program")

        queue.start()
        handle = queue.submit("talk")
        handle.result(PATIENCE)
        told = [r for r in caplog.records if "of ctx" in r.message or "of the program" in r.message]
        assert [r.getMessage() for r in told] == [f"[talk {handle.id}] of ctx", "of the program"]
        assert [(r.funcName, os.path.basename(r.pathname)) for r in told] == [
            ("talk", os.path.basename(__file__))
        ] * 2
        assert told[0].task_id == handle.id
        assert last.stream.getvalue() == ""
        assert len(lines(handle.task())) == 3

    def test_the_level_of_the_queues_logger_still_applies_to_its_handlers(
        self, queue, monkeypatch, caplog
    ):
        shown = io.StringIO()
        logger = logging.getLogger("taskx")
        monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(shown)])
        caplog.set_level(logging.WARNING, "taskx")

        @queue.executor("talk", capture_log=True)
        def talk(ctx):
            ctx.logger.info("only kept")
            ctx.logger.warning("shown")

        queue.start()
        handle = queue.submit("talk")
        handle.result(PATIENCE)
        assert [line.split()[-1] for line in lines(handle.task())[1:]] == ["kept", "shown"]
        assert shown.getvalue() == f"[talk {handle.id}] shown\n"

    def test_without_handlers_warnings_still_go_to_stderr(self, queue, monkeypatch):
        """Python prints warnings if there is no handler. The capture handler must not count."""
        shown = io.StringIO()
        last = logging.StreamHandler(shown)
        last.setLevel(logging.WARNING)
        monkeypatch.setattr(logging, "lastResort", last)
        monkeypatch.setattr(logging.getLogger(), "handlers", [])

        @queue.executor(capture_log=True)
        def talk(ctx):
            logging.getLogger("bare").warning("shown")
            logging.getLogger("bare").info("not shown")
            ctx.logger.warning("shown, too")

        queue.start()
        handle = queue.submit("talk")
        handle.result(PATIENCE)
        assert shown.getvalue() == f"shown\n[talk {handle.id}] shown, too\n"
        assert len(lines(handle.task())) == 3

    def test_no_handler_is_installed_while_no_log_is_captured(self, queue, gate):
        seen = []
        installed = lambda: capture._router in logging.getLogger().handlers  # noqa: E731

        @queue.executor(capture_log=True)
        def captured():
            seen.append(installed())

        queue.executor("other")(lambda: seen.append(installed()))
        queue.start()
        for name in ("other", "captured", "other"):
            queue.submit(name).result(PATIENCE)
        assert seen == [False, True, False]

    def test_a_task_run_by_the_caller_does_not_log_into_the_callers_task(
        self, make_queue, gate, log
    ):
        """With a full buffer, an executor that submits runs another task on its own thread."""
        queue = make_queue(worker_num=1, buffer_size=1, overflow="caller_runs")

        @queue.executor(capture_log=True)
        def outer():
            log.info("before")
            inner = [queue.submit("inner") for _ in range(3)]
            log.info("after")
            return [handle.id for handle in inner]

        queue.executor("inner", capture_log=True)(lambda: log.info("inner"))
        queue.start()
        handle = queue.submit("outer")
        inner = handle.result(PATIENCE)
        assert queue.drain(PATIENCE)
        assert lines(handle.task())[1:] == [f"INFO program.part: {w}" for w in ("before", "after")]
        for task_id in inner:
            assert lines(queue.get_task_status(task_id))[1:] == ["INFO program.part: inner"]

    @pytest.mark.process
    # Python 3.12 warns if threads are left.
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_child_starts_without_the_handler(self, log):
        made = capture.Capture(logging.INFO, "")
        with capture.capturing(made):
            pid = os.fork()
            if not pid:
                clean = capture._router not in logging.getLogger().handlers
                with capture.capturing(made):
                    log.info("in the child")
                os._exit(0 if clean and "in the child" in made.text() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            log.info("in the parent")
        assert made.text().endswith("in the parent\n")


def test_a_transaction_waits_for_progress_that_is_stored_with_the_log():
    context = Context(None, None, None)
    context._told, context._unwritten = (50, "half"), True
    assert context._new_progress() == (50, "half")
    context._quiet = True  # a transaction begins, and waits while the progress is stored
    assert context._may_write()
    assert context._storing
    context._progress_written(stored=True)
    assert not context._may_write()


def test_progress_that_was_told_once_is_stored_once_however_many_lines_follow(make_queue, log):
    """A capture asks for a write of its own."""
    told, went_on = [], threading.Semaphore(0)

    class Told(Hook):
        def progressed(self, task, progress, message):
            told.append(progress)

    queue = make_queue(hooks=[Told()])

    @queue.executor("talk", capture_log=True)
    def talk(ctx):
        ctx.progress(10)
        for number in range(3):
            log.info("line %d", number)
            lines = f"line {number}"
            eventually(lambda lines=lines: lines in ctx_log(ctx))
        went_on.release()

    def ctx_log(ctx):
        return queue.get_task_status(ctx.task.id).log

    queue.start()
    queue.submit("talk").result(PATIENCE)
    queue.stop()
    assert told == [10]


class TestOption:
    @pytest.mark.parametrize("level", ["LOUD", 1.5, [], "Level 5"])
    def test_capture_log_must_be_a_level(self, queue, level):
        with pytest.raises(ConfigurationError, match="capture_log must be True or a level"):
            queue.executor("talk", capture_log=level)(lambda: None)

    def test_capture_log_given_at_registration_wins(self, queue, log):
        @taskx.executor(capture_log=True)
        def talk():
            log.info("said")

        queue.register_executor(talk, capture_log=False)
        queue.start()
        handle = talk.submit()
        handle.result(PATIENCE)
        assert handle.task().log == ""

    def test_a_repository_with_eight_methods_refuses_capture_log(self, make_queue):
        queue = make_queue(TinyRepository())
        with pytest.raises(
            ConfigurationError, match="TinyRepository has only the eight methods and cannot store"
        ):
            queue.executor("talk", capture_log=True)(lambda: None)
        queue.executor("talk", capture_log=False)(lambda: None)
