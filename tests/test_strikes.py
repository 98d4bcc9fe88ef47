"""The tool that strikes at every point: only where a signal handler could run."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
import threading
import weakref

from helpers import PATIENCE
from strikes import Strike, every_strike, strike_at


def test_each_call_is_struck_at_the_next_point():
    ran = []

    def work(point):
        ran.append(point)
        len("a")
        len("b")

    strikes = list(every_strike(work))
    assert len(strikes) == 4  # at its start, and after each of its calls
    assert ran == [1, 2, 3, 4]


def test_no_strike_happens_after_the_last_point():
    assert strike_at(10_000, lambda: len("a")) is None


def test_a_caught_strike_is_still_returned():
    def work(point):
        try:
            len("a")
        except Strike:
            return

    assert any(strike is not None for strike in every_strike(work))


def test_a_lock_in_a_with_statement_is_never_left_locked():
    lock = threading.Lock()

    def work(point):
        with lock:
            return len("a")

    for strike in every_strike(work):
        assert not lock.locked(), strike


def test_a_condition_can_be_left_locked():
    condition = threading.Condition(threading.Lock())
    left = []

    def work(point):
        with condition:
            len("a")

    for strike in every_strike(work):
        if condition._lock.locked():
            left.append(strike)
            condition._lock.release()
    assert left


def test_no_strike_hits_what_a_finalizer_calls():
    """Python would print the exception, and the call would go on."""
    ended = []

    class Owner:
        """What has a finalizer."""

    def end(point):
        ended.append(point)

    def work(point):
        owner = Owner()
        weakref.finalize(owner, end, point)
        del owner

    assert not any("in end " in str(strike) for strike in every_strike(work))
    assert ended


def test_no_strike_follows_a_call_that_raised():
    """CPython would leave the thread in the ``except`` block for ever."""

    def work(point):
        try:
            int("a")
        except ValueError:
            return False

    assert len(list(every_strike(work))) == 1  # at its start only
    assert sys.exc_info()[1] is None


def test_a_struck_import_keeps_no_lock_of_python(tmp_path, monkeypatch):
    """Python's own import may not be struck: if it keeps its lock, no other thread can import."""
    monkeypatch.syspath_prepend(tmp_path)
    # The import hook of pytest has many points, and another number each time.
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    for name in ("struck_module", "later_module"):
        (tmp_path / f"{name}.py").write_text("value = len('a')\n")

    def work(point):
        sys.modules.pop("struck_module", None)
        importlib.import_module("struck_module")

    struck = sum(1 for _ in every_strike(work))
    assert struck > 2
    other = threading.Thread(target=importlib.import_module, args=("later_module",), daemon=True)
    other.start()
    other.join(PATIENCE)
    assert "later_module" in sys.modules


def test_a_struck_log_line_keeps_no_lock_of_its_handler(caplog):
    log = logging.getLogger("struck")
    for _ in every_strike(lambda point: log.warning("struck")):
        other = threading.Thread(target=log.warning, args=("another thread",), daemon=True)
        other.start()
        other.join(PATIENCE)
        assert not other.is_alive()


def test_a_struck_start_of_a_thread_leaves_no_thread_that_never_runs():
    """An exception in ``Thread.start`` keeps the lock of the event that the new thread sets first."""
    made = []

    def work(point):
        made.append(threading.Thread(target=len, args=("a",), daemon=True))
        made[-1].start()

    assert list(every_strike(work))
    for thread in made:
        if thread.ident is not None:
            thread.join(PATIENCE)
            assert not thread.is_alive()
