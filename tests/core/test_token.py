"""The cancellation token: it fires once, and its callbacks do not disturb one another."""

import itertools
import os
import signal
import sys
import threading
import time

import pytest
from helpers import PATIENCE, eventually

from taskx import CancelReason, CancelToken, ConfigurationError, TaskCancelled
from taskx.tasks.clock import SYSTEM_CLOCK


def _read_at(point, token):
    """Fire a token, and read its reason before a step of that, as another thread may.

    Return what was read, in a list; it is empty if there are fewer steps.
    """
    seen, steps = [], itertools.count()

    def trace(frame, event, argument):
        if frame.f_code is not CancelToken.fire.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(steps) == point:
            seen.append(token.reason)
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 needs it before settrace
    sys.settrace(trace)
    try:
        token.fire(CancelReason.TIMEOUT)
    finally:
        sys.settrace(before)
    return seen


class TestFiring:
    def test_a_token_fires_once_for_one_reason(self):
        token = CancelToken()
        assert (token.cancelled, token.reason) == (False, None)
        token.raise_if_cancelled()
        assert token.fire(CancelReason.STOP)
        assert not token.fire(CancelReason.CANCEL)
        assert (token.cancelled, token.reason) == (True, CancelReason.STOP)
        with pytest.raises(TaskCancelled) as caught:
            token.raise_if_cancelled()
        assert caught.value.reason is CancelReason.STOP

    def test_one_of_several_racing_threads_fires_the_token(self):
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(50):
                token, barrier, calls, won = CancelToken(), threading.Barrier(4), [], []
                token.on_cancel(lambda calls=calls: calls.append(1))

                def race(reason, token=token, barrier=barrier, won=won):
                    barrier.wait()
                    if token.fire(reason):
                        won.append(reason)

                threads = [threading.Thread(target=race, args=(reason,)) for reason in CancelReason]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert won == [token.reason]
        finally:
            sys.setswitchinterval(interval)

    def test_whoever_finds_it_just_being_fired_sees_why(self):
        # Else a run whose time is up goes on, and ends as if it had been in time.
        for point in itertools.count():
            token = CancelToken(deadline=time.monotonic())
            seen = _read_at(point, token)
            if not seen:
                break
            assert seen == [CancelReason.TIMEOUT], point
        assert point > 10

    def test_the_repr_names_the_reason(self):
        token = CancelToken()
        assert repr(token) == "<CancelToken not fired>"
        token.fire(CancelReason.LEASE_LOST)
        assert repr(token) == "<CancelToken lease lost>"
        assert [f"{reason}" for reason in CancelReason] == [
            "cancel",
            "timeout",
            "stop",
            "lease lost",
        ]


class TestDeadline:
    def test_a_token_fires_at_its_deadline(self, clock):
        token = CancelToken(clock.monotonic() + 5, clock)
        clock.advance(4.999)
        assert not token.cancelled
        assert token.remaining() == pytest.approx(0.001)
        clock.advance(0.001)
        assert token.reason is CancelReason.TIMEOUT
        with pytest.raises(TaskCancelled):
            token.remaining()

    def test_the_wall_clock_does_not_move_a_deadline(self, clock):
        token = CancelToken(clock.monotonic() + 5, clock)
        clock.set_wall(clock.now().replace(year=2050))
        assert token.remaining() == 5

    def test_remaining_is_none_without_a_deadline(self):
        assert CancelToken().remaining() is None

    def test_remaining_raises_after_the_token_has_fired(self, clock):
        token = CancelToken(clock.monotonic() + 5, clock)
        token.fire(CancelReason.CANCEL)
        with pytest.raises(TaskCancelled) as caught:
            token.remaining()
        assert caught.value.reason is CancelReason.CANCEL

    def test_a_deadline_after_another_reason_changes_nothing(self, clock):
        token = CancelToken(clock.monotonic() + 5, clock)
        token.fire(CancelReason.CANCEL)
        clock.advance(9)
        assert token.reason is CancelReason.CANCEL

    def test_wait_ends_at_the_deadline(self):
        token = CancelToken(SYSTEM_CLOCK.monotonic() + 0.01)
        assert token.wait()
        assert token.reason is CancelReason.TIMEOUT


class TestWaiting:
    def test_wait_returns_at_once_if_the_token_has_fired(self):
        token = CancelToken()
        token.fire(CancelReason.STOP)
        assert token.wait()
        assert token.wait(0)

    @pytest.mark.parametrize("timeout", [0, -1, 0.01])
    def test_wait_ends_after_its_timeout(self, timeout):
        assert not CancelToken().wait(timeout)

    def test_firing_wakes_every_waiter(self):
        token, woken = CancelToken(), []
        inside = threading.Barrier(5)

        def wait():
            inside.wait()
            woken.append(token.wait(PATIENCE))

        threads = [threading.Thread(target=wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        inside.wait()
        token.fire(CancelReason.CANCEL)
        for thread in threads:
            thread.join()
        assert woken == [True] * 4
        assert token._waiters == []

    def test_a_very_long_wait_is_no_error(self):
        token = CancelToken()
        threading.Timer(0.01, token.fire, [CancelReason.STOP]).start()
        assert token.wait(1e12)

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
    @pytest.mark.parametrize("timeout", [None, PATIENCE])
    def test_a_signal_handler_may_fire_it(self, timeout):
        """Also one that interrupts ``wait`` or another method of the token in the main thread."""
        for delay in (0.02, 0.001, 0.0001):
            token = CancelToken()
            called = threading.Event()
            token.on_cancel(called.set)
            before = signal.signal(
                signal.SIGALRM, lambda *_, token=token: token.fire(CancelReason.STOP)
            )
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                assert token.wait(timeout)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            assert token.reason is CancelReason.STOP
            assert called.wait(PATIENCE)

    @pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals for threads here")
    def test_a_signal_that_does_not_wake_the_main_thread_is_handled_soon(self):
        """As one that strikes just before the thread blocks. Here another thread gets it."""
        token = CancelToken()

        def strike():
            eventually(lambda: token._waiters)
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, lambda *_: token.fire(CancelReason.STOP))
        try:
            thread = threading.Thread(target=strike)
            began = time.monotonic()
            thread.start()
            assert token.wait(PATIENCE)
            thread.join()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert time.monotonic() - began < PATIENCE / 2


class TestCallbacks:
    def test_callbacks_run_on_threads_of_their_own(self):
        token, threads = CancelToken(), []
        done = threading.Event()
        token.on_cancel(lambda: (threads.append(threading.current_thread()), done.set()))
        token.fire(CancelReason.CANCEL)
        assert done.wait(PATIENCE)
        assert threads[0] is not threading.current_thread()
        assert threads[0].daemon

    def test_a_callback_on_a_fired_token_runs_at_once(self):
        token, done = CancelToken(), threading.Event()
        token.fire(CancelReason.CANCEL)
        token.on_cancel(done.set)
        assert done.wait(PATIENCE)

    @pytest.mark.parametrize("fired", [False, True])
    def test_a_callback_that_is_not_callable_is_refused(self, fired):
        token, done = CancelToken(), threading.Event()
        if fired:
            token.fire(CancelReason.CANCEL)
        with pytest.raises(ConfigurationError, match="callback must be a function, not 5"):
            token.on_cancel(5)
        token.on_cancel(done.set)
        token.fire(CancelReason.CANCEL)
        assert done.wait(PATIENCE)

    def test_each_callback_runs_once(self):
        token, calls, done = CancelToken(), [], threading.Event()
        token.on_cancel(lambda: calls.append(1))
        token.fire(CancelReason.CANCEL)
        token.fire(CancelReason.STOP)
        token.on_cancel(done.set)
        assert done.wait(PATIENCE)
        assert calls == [1]

    def test_a_removed_callback_does_not_run(self):
        token, calls, done = CancelToken(), [], threading.Event()
        remove = token.on_cancel(lambda: calls.append(1))
        remove()
        remove()
        token.on_cancel(done.set)
        token.fire(CancelReason.CANCEL)
        assert done.wait(PATIENCE)
        assert calls == []

    def test_a_blocking_callback_does_not_delay_the_others(self):
        """Neither the canceller nor other callbacks, before or after it."""
        token, release = CancelToken(), threading.Event()
        before, after, ended = threading.Event(), threading.Event(), threading.Event()
        token.on_cancel(before.set)
        token.on_cancel(lambda: (release.wait(PATIENCE), ended.set()))
        token.on_cancel(after.set)
        token.fire(CancelReason.CANCEL)
        assert before.wait(PATIENCE)
        assert after.wait(PATIENCE)
        assert not ended.is_set()
        release.set()
        assert ended.wait(PATIENCE)

    @pytest.mark.parametrize("error", [ValueError("broke"), SystemExit(3), KeyboardInterrupt()])
    def test_a_callback_that_raises_is_logged_and_stops_nothing_else(self, error, caplog):
        token, done = CancelToken(), threading.Event()
        threads = []

        def raises():
            threads.append(threading.current_thread())
            raise error

        token.on_cancel(raises)
        token.on_cancel(done.set)
        token.fire(CancelReason.CANCEL)
        assert done.wait(PATIENCE)
        token.on_cancel(done.set)
        while not threads:
            done.wait(0.001)
        threads[0].join(PATIENCE)
        assert "a cancel callback raised" in caplog.text


class TestChildren:
    def test_child_tokens_fire_with_their_parent(self):
        parent = CancelToken()
        child = parent._child(60)
        grandchild = child._child(60)
        parent.fire(CancelReason.STOP)
        assert (child.reason, grandchild.reason) == (CancelReason.STOP, CancelReason.STOP)

    def test_a_child_token_can_time_out_alone(self, clock):
        parent = CancelToken(clock.monotonic() + 10, clock)
        child = parent._child(2)
        clock.advance(2)
        assert (child.reason, parent.reason) == (CancelReason.TIMEOUT, None)

    def test_a_child_never_outlasts_its_parent(self, clock):
        parent = CancelToken(clock.monotonic() + 10, clock)
        assert parent._child(60).remaining() == 10
        assert parent._child(6).remaining() == 6

    def test_a_child_of_a_fired_parent_has_fired(self):
        parent = CancelToken()
        parent.fire(CancelReason.CANCEL)
        assert parent._child(60).reason is CancelReason.CANCEL

    def test_a_disowned_child_does_not_fire(self):
        parent = CancelToken()
        child = parent._child(60)
        child._leave(parent)
        parent.fire(CancelReason.CANCEL)
        assert child.reason is None

    def test_a_child_does_not_fire_its_parent(self):
        parent = CancelToken()
        parent._child(60).fire(CancelReason.CANCEL)
        assert parent.reason is None


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_token_works_in_a_forked_child():
    token = CancelToken()
    if (child := os.fork()) == 0:
        token.fire(CancelReason.STOP)
        os._exit(0 if token.wait(1) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not token.cancelled
