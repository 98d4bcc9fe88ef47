"""The logger of TaskX's own lines: whatever logging raises, it goes nowhere but to stderr."""

import io
import logging
import threading

import pytest

from taskx.core.log import GuardedLogger


class Fails(logging.Filter):
    """Cannot do its work in this thread, as one that adds who asked for the page."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error or RuntimeError("working outside of request context")

    def filter(self, record):
        raise self.error


class FailsToEmit(logging.Handler):
    def emit(self, record):
        raise RuntimeError("working outside of request context")


@pytest.fixture
def lines():
    return io.StringIO()


@pytest.fixture
def inner(lines):
    logger = logging.Logger("app")  # noqa: LOG001  (of this test alone)
    handler = logging.StreamHandler(lines)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(funcName)s %(message)s"))
    logger.addHandler(handler)
    return logger


@pytest.fixture
def log(inner):
    return GuardedLogger(inner)


def in_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_it_logs_as_the_logger_in_it_does(log, inner, lines):
    """Under its name and level, and as if whoever logs had called it."""
    inner.setLevel(logging.INFO)
    log.debug("too low")
    log.info("%s of %s", 1, 2)
    log.log(logging.ERROR, "grave")
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("failed")
    here = "test_it_logs_as_the_logger_in_it_does"
    told = lines.getvalue().splitlines()
    assert told[:3] == [
        f"app INFO {here} 1 of 2",
        f"app ERROR {here} grave",
        f"app ERROR {here} failed",
    ]
    assert told[-1] == "ValueError: bad"
    assert log.isEnabledFor(logging.INFO)
    assert not log.isEnabledFor(logging.DEBUG)


def break_handler(logger):
    logger.handlers[0].addFilter(Fails())


def break_record(logger):
    logger.makeRecord = Fails().filter


@pytest.mark.parametrize(
    "broken",
    [
        lambda logger: logger.addFilter(Fails()),
        break_handler,
        lambda logger: logger.addHandler(FailsToEmit()),
        break_record,
    ],
    ids=["filter", "filter of a handler", "handler", "record"],
)
def test_what_logging_raises_is_shown_on_stderr(log, inner, capsys, broken):
    """With what was to be logged, as a handler does that cannot write."""
    broken(inner)
    log.warning("task %s is retried", "x")
    shown = capsys.readouterr().err
    assert shown.startswith("could not be logged: task x is retried\nTraceback")


def test_it_can_be_told_not_to_show_that(log, inner, capsys, monkeypatch):
    """By the same switch as handlers."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    inner.addFilter(Fails())
    log.warning("x")
    assert capsys.readouterr().err == ""


def test_a_program_without_stderr_goes_on(log, inner, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    inner.addFilter(Fails())
    log.warning("x")


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_who_wants_to_end_the_program_ends_no_thread_in_silence(log, inner, capsys, error):
    """In the main thread it does end the program."""
    inner.addFilter(Fails(error))
    over = []
    in_thread(lambda: over.append(log.error("x")))
    assert over
    assert capsys.readouterr().err.startswith("could not be logged: x\n")
    with pytest.raises(type(error)):
        log.error("x")


def test_an_error_that_cannot_be_shown_is_told_all_the_same(log, lines):
    class Secretive(Exception):
        def __getattribute__(self, name):
            raise SystemExit

    def fail():
        try:
            raise Secretive
        except Secretive:
            log.exception("hook %s failed", "x")

    in_thread(fail)
    assert lines.getvalue() == "app ERROR fail hook x failed (and its error cannot be shown)\n"
