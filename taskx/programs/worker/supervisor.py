"""The supervisor: it starts the processes of a queue, replaces them, and stops them on a signal."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from types import FrameType
from typing import Any

from taskx.attempt.process.channel import Channel
from taskx.attempt.process.interpreter import start_python
from taskx.attempt.process.processes import kill_family
from taskx.programs.worker.fleet import Fleet, Member
from taskx.programs.worker.health import HealthFile, HealthPort, Report
from taskx.programs.worker.logs import set_up_log
from taskx.programs.worker.notify import Notifier
from taskx.programs.worker.settings import RECYCLE, Settings
from taskx.tasks.errors import ConfigurationError, on_main_thread
from taskx.tasks.ids import new_id
from taskx.tasks.timing import DEFAULT_TIMING, Timing

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

log = logging.getLogger("taskx.worker")


def supervise(settings: Settings) -> int:
    """Run a queue in several processes until a signal; return the exit code of the program.

    Returns:
        0 after a stop in which all tasks ended; 1 if a task still ran at the end, or the processes cannot
        start; 2 if there is no such queue; 5 if the repository cannot be used; 143 or 130 after a second
        signal.

    Raises:
        ConfigurationError: not called in the main thread, or the health cannot be shown as asked.
    """
    if not on_main_thread():
        raise ConfigurationError("a supervisor must run in the main thread, which gets the signals")
    set_up_log(settings.log_level)
    return Supervisor(settings).run()


class Started:
    """A process that the supervisor has started, and its end of the socket between them.

    Raises:
        OSError: the system cannot start a process now.
    """

    def __init__(self, settings: Settings) -> None:
        own, other = socket.socketpair()
        self._mark = new_id()
        # A fresh interpreter: it loads the newest code, even of TaskX, and inherits no thread and no lock.
        with other, ExitStack() as on_error:
            on_error.push(own)
            self.process = start_python(
                "taskx.programs.worker.process:main",
                str(other.fileno()),
                settings.target,
                mark=self._mark,
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                # Ctrl-C in a terminal is for the supervisor only. And a kill ends the whole group.
                start_new_session=True,
            )
            on_error.pop_all()
        self.socket = own
        self.channel: Channel | None = Channel(own)
        self.say(settings.to_json())

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, *message: Any) -> None:
        if self.channel is not None:
            self.channel.say(*message)

    def hear(self) -> list[list[Any]]:
        """Return the new messages, without waiting."""
        messages = None if self.channel is None else self.channel.hear(0)
        if messages is None:
            self.close()
        return messages or []

    def close(self) -> None:
        """Close the socket."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def kill(self) -> None:
        kill_family(self.pid, self._mark, reaped=self.process.returncode is not None)


class Supervisor:
    """Reads the signals, the messages and the ends of the processes, and lets the fleet decide."""

    def __init__(self, settings: Settings, timing: Timing = DEFAULT_TIMING) -> None:
        self._settings = settings
        self._timing = timing
        self._fleet = Fleet(
            settings.processes,
            settings.stop_timeout,
            lambda place: Started(settings),
            time.monotonic,
            patient=settings.reload,
            timing=timing,
        )
        self._notifier = Notifier()
        self._signals: deque[int] = deque()
        self._stop_signals: list[int] = []
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._told_ready = self._told_reloading = False
        self._beat_at = 0.0
        self._report: tuple[Report, float] = (self._reported(), time.monotonic())
        self._file = HealthFile(settings.health_file, timing) if settings.health_file else None
        self._port = (
            HealthPort(settings.health_host, settings.health_port, lambda: self._report, timing)
            if settings.health_port is not None
            else None
        )

    def run(self) -> int:
        """Run the processes until a signal, and return the exit code: see :func:`supervise`."""
        settings, fleet = self._settings, self._fleet
        log.info(
            "supervisor (pid %d): %d process%s of %s, stop time-out %g s",
            os.getpid(),
            settings.processes,
            "" if settings.processes == 1 else "es",
            settings.target,
            settings.stop_timeout,
        )
        if self._port is not None:
            log.info("health: %s/health, /live and /ready", self._port.url)
        try:
            with self._listening() as wake:
                while not fleet.over:
                    fleet.step()
                    self._show()
                    self._wait(wake)
                    self._heed_signals()
                    self._hear()
                    self._reap()
        finally:
            for member in fleet.members():  # after an error of the supervisor itself
                member.handle.kill()
            if self._file is not None:
                self._file.close()
            if self._port is not None:
                self._port.close()
            self._notifier.close()
        code = 128 + self._stop_signals[1] if len(self._stop_signals) > 1 else fleet.code
        log.info("supervisor (pid %d) ends with exit code %d", os.getpid(), code)
        return code

    @contextmanager
    def _listening(self) -> Iterator[socket.socket]:
        """Catch the signals. Each one makes the returned socket readable."""
        wake, written = socket.socketpair()
        wake.setblocking(False)
        written.setblocking(False)
        # A shell starts a job in the background with SIGINT ignored. It must stay ignored.
        ignored = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else set()
        heard = [number for number in _SIGNALS if number not in ignored]
        before = {number: signal.signal(number, self._note) for number in heard}
        fd = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            yield wake
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            wake.close()
            written.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._signals.append(number)

    def _wait(self, wake: socket.socket) -> None:
        """Wait for a signal or a message, not longer than a tick."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        for started in self._started():
            if started.channel is not None:
                poll.register(started.socket, select.POLLIN)
        timeout = self._timing.supervise_every
        if self._notifier.watchdog is not None:
            timeout = min(timeout, self._notifier.watchdog / 2)
        poll.poll(timeout * 1000)
        with suppress(BlockingIOError):
            while wake.recv(4096):
                continue

    def _started(self) -> list[Started]:
        return [one.handle for one in self._fleet.members() if isinstance(one.handle, Started)]

    # --- events

    def _heed_signals(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            name = signal.Signals(number).name
            if number != signal.SIGHUP or self._terminal_is_gone():
                self._stop(number, name)
            elif not self._fleet.stops:
                log.info("%s: the processes are replaced one by one", name)
                self._notifier.reloading()
                self._told_reloading = True
                self._fleet.replace()

    def _terminal_is_gone(self) -> bool:
        """Return True if this program was started on a terminal that has been closed."""
        return self._on_terminal and not sys.stderr.isatty()

    def _stop(self, number: int, name: str) -> None:
        self._stop_signals.append(number)
        self._notifier.stopping()
        self._fleet.stop()
        if self._fleet.stops == 1:
            log.info(
                "%s: running tasks have %g s to end; a second signal stops the processes at once",
                name,
                self._settings.stop_timeout,
            )
        else:
            how = "stop at once" if self._fleet.stops == 2 else "are killed"
            log.warning("%s: the processes %s", name, how)

    def _hear(self) -> None:
        for member in list(self._fleet.members()):
            self._hear_one(member)

    def _hear_one(self, member: Member) -> None:
        assert isinstance(member.handle, Started)
        for kind, *facts in member.handle.hear():
            self._fleet.heard(member, kind, *facts)

    def _reap(self) -> None:
        """Take in the ended processes; as process 1 of a container, also those that it has adopted."""
        members = {member.handle.pid: member for member in self._fleet.members()}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (member := members.get(pid)) is not None:
                self._take_in(member, os.waitstatus_to_exitcode(status))

    def _take_in(self, member: Member, status: int) -> None:
        assert isinstance(member.handle, Started)
        self._hear_one(member)  # its last words
        member.handle.close()
        member.handle.process.returncode = status  # reaped here, so that Popen need not
        if status not in (0, RECYCLE):
            # Its tasks run again, and the programs that they have started must not run beside them.
            member.handle.kill()
        self._fleet.ended(member, status)

    # --- the state

    def _reported(self) -> Report:
        fleet, problems = self._fleet, self._fleet.problems()
        ready = [place.member for place in fleet.places if place.member and place.member.ready]
        status = "stopping" if fleet.stops else "ok" if fleet.begun else "starting"
        return {
            "ok": not problems,
            "live": not fleet.broken(),
            "ready": bool(fleet.begun and ready and not fleet.stops),
            "status": "unhealthy" if problems else status,
            "problems": [*problems],
            "queue": self._settings.target,
            "pid": os.getpid(),
            "processes": [_described(member) for member in fleet.members()],
            "at": datetime.now(timezone.utc).isoformat(),
        }

    def _show(self) -> None:
        """Tell the state to everything that asks for it."""
        now = time.monotonic()
        report = self._reported()
        self._report = report, now
        self._notifier.flush()
        if self._file is not None:
            self._file.show(report, now)
        told = self._told_ready and not (self._told_reloading and not self._fleet.replacing)
        if self._fleet.begun and not self._fleet.stops and not told:
            self._notifier.ready()
            log.info("all processes are ready")
            self._told_ready, self._told_reloading = True, False
        self._notifier.status(_words(report))
        if self._notifier.watchdog is not None and now >= self._beat_at:
            self._beat_at = now + self._notifier.watchdog / 2
            self._notifier.beat()


def _described(member: Member) -> Report:
    state = "leaving" if member.kill_at is not None else "ready" if member.ready else "starting"
    return {
        "process": member.place,
        "pid": member.handle.pid,
        "state": state,
        **member.facts,
    }


def _words(report: Report) -> str:
    """Return the state in one line."""
    ready = [one for one in report["processes"] if one["state"] == "ready"]
    running = sum(one.get("running", 0) for one in report["processes"])
    words = f"{report['status']}: {len(ready)} of {len(report['processes'])} processes ready"
    return " ".join([f"{words}, {running} tasks running", *report["problems"]])
