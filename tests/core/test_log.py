"""The logger of TaskX's own messages: errors in logging only appear on stderr."""

import io
import logging
import threading

import pytest

from taskx.tasks.log import GuardedLogger


class Fails(logging.Filter):
    """A filter that raises in this thread, like one that needs the current web request."""

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


def test_a_guarded_logger_logs_as_the_inner_logger_does(log, inner, lines):
    """With its name and level, and with the caller's function name."""
    inner.setLevel(logging.INFO)
    log.debug("too low")
    log.info("%s of %s", 1, 2)
    log.log(logging.ERROR, "grave")
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("failed")
    here = "test_a_guarded_logger_logs_as_the_inner_logger_does"
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
def test_errors_in_logging_are_shown_on_stderr(log, inner, capsys, broken):
    """Together with the message, as a failing handler does."""
    broken(inner)
    log.warning("task %s is retried", "x")
    shown = capsys.readouterr().err
    assert shown.startswith("could not be logged: task x is retried\nTraceback")


def test_logging_raise_exceptions_turns_that_off(log, inner, capsys, monkeypatch):
    """Handlers use the same switch."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    inner.addFilter(Fails())
    log.warning("x")
    assert capsys.readouterr().err == ""


def test_a_program_without_stderr_goes_on(log, inner, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    inner.addFilter(Fails())
    log.warning("x")


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_an_exit_while_logging_never_silently_ends_a_thread(log, inner, capsys, error):
    """In the main thread it ends the program."""
    inner.addFilter(Fails(error))
    over = []
    in_thread(lambda: over.append(log.error("x")))
    assert over
    assert capsys.readouterr().err.startswith("could not be logged: x\n")
    with pytest.raises(type(error)):
        log.error("x")


def test_an_error_that_cannot_be_formatted_is_still_logged(log, lines):
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
