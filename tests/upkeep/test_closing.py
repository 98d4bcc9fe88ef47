"""``ctx.closing``: a cancel wakes an executor that blocks on any kind of IO."""

from __future__ import annotations

import ftplib
import http.client
import io
import os
import shlex
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from contextlib import contextmanager

import pytest
from helpers import PATIENCE, SOON, eventually, run_in_thread

from taskx import ConfigurationError

# Executors block here for real; each case calls ``about_to`` just before.


@contextmanager
def silent_server():
    """A server that accepts a connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def in_recv(ctx, about_to):
    ours, theirs = socket.socketpair()
    with theirs, ctx.closing(ours):
        about_to()
        return len(ours.recv(1))


def in_accept(ctx, about_to):
    with ctx.closing(socket.create_server(("127.0.0.1", 0))) as server:
        about_to()
        server.accept()


def in_send(ctx, about_to):
    ours, theirs = socket.socketpair()
    with theirs, ctx.closing(ours):
        about_to()
        ours.sendall(b"x" * 50_000_000)


def in_makefile(ctx, about_to):
    ours, theirs = socket.socketpair()
    with theirs, ctx.closing(ours), ours.makefile("rb") as lines:
        about_to()
        lines.readline()


def in_query(ctx, about_to):
    with ctx.closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:
        about_to()
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
        ).fetchone()


SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]  # blocks on purpose


def in_communicate(ctx, about_to):
    with ctx.closing(subprocess.Popen(SLEEP, stdout=subprocess.PIPE)) as process:
        about_to()
        process.communicate()


def in_pipe(ctx, about_to):
    with ctx.closing(subprocess.Popen(SLEEP, stdout=subprocess.PIPE)) as process:
        about_to()
        process.stdout.read()


def in_shell(ctx, about_to):
    """Run a program in a shell: the program holds the pipe, too."""
    command, pipe = shlex.join(SLEEP) + "; echo", subprocess.PIPE
    with ctx.closing(subprocess.Popen(command, shell=True, stdout=pipe)) as process:
        about_to()
        process.stdout.read()


SESSION = """
import subprocess, sys
program = subprocess.Popen(sys.argv[1:], start_new_session=True)
print(program.pid, flush=True)
program.wait()
"""


def in_a_session_of_its_own(ctx, about_to):
    """Run a shell in a session of its own, which its program shares."""
    with ctx.closing(
        subprocess.Popen([sys.executable, "-c", SESSION, *SLEEP], stdout=subprocess.PIPE)
    ) as process:
        assert process.stdout.readline()
        about_to()
        process.stdout.read()


def in_wait(ctx, about_to):
    with ctx.closing(subprocess.Popen(SLEEP)) as process:
        about_to()
        process.wait()


def in_http(ctx, about_to):
    with silent_server() as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        with ctx.closing(connection):
            connection.request("GET", "/")
            about_to()
            connection.getresponse()


def in_http_body(ctx, about_to):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.getsockname()[1])
        with ctx.closing(connection):
            connection.request("GET", "/")
            client, _ = server.accept()
            with client:
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
                response = connection.getresponse()
                about_to()
                response.read()


def in_ftp(ctx, about_to):
    with socket.create_server(("127.0.0.1", 0)) as server:
        greeted = run_in_thread(lambda: greet(server))
        ftp = ftplib.FTP()
        ftp.connect("127.0.0.1", server.getsockname()[1])
        with greeted(), ctx.closing(ftp):
            about_to()
            ftp.voidcmd("NOOP")


def greet(server):
    client, _ = server.accept()
    client.sendall(b"220 welcome\r\n")
    return client


class Aborts:
    """Like an HTTP client with an ``abort`` of its own."""

    how = "abort"

    def __init__(self):
        self.woken = threading.Event()
        self.closed = False
        setattr(self, self.how, self.woken.set)

    def close(self):
        self.closed = True


class ShutsDown(Aborts):
    how = "shutdown"


def in_own(make):
    def block(ctx, about_to):
        resource = make()
        try:
            with ctx.closing(resource):
                about_to()
                assert resource.woken.wait(PATIENCE)
        finally:
            assert resource.closed

    return block


KINDS = {
    "recv": in_recv,
    "accept": in_accept,
    "send": in_send,
    "makefile": in_makefile,
    "sqlite3": in_query,
    "communicate": in_communicate,
    "pipe of a process": in_pipe,
    "shell": in_shell,
    "session": in_a_session_of_its_own,
    "wait for a process": in_wait,
    "http response": in_http,
    "http body": in_http_body,
    "ftp": in_ftp,  # its abort() waits for the server
    "abort": in_own(Aborts),
    "shutdown": in_own(ShutsDown),
}
#: The cases that start a program.
PROCESSES = ("communicate", "pipe of a process", "shell", "session", "wait for a process")


def kinds(*names):
    return [
        pytest.param(name, marks=pytest.mark.process) if name in PROCESSES else name
        for name in names
    ]


@pytest.mark.parametrize("kind", kinds(*KINDS))
def test_a_cancel_wakes_a_blocked_executor(queue, kind):
    blocked = threading.Event()
    queue.executor("block")(lambda ctx: KINDS[kind](ctx, blocked.set))
    queue.start()
    handle = queue.submit("block")
    assert blocked.wait(PATIENCE)
    threading.Event().wait(0.1)  # then it blocks, unless the machine is very busy
    began = time.monotonic()
    assert queue.cancel_task(handle.id) is False
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize("kind", kinds("recv", "communicate"))
def test_a_deadline_wakes_a_blocked_executor(queue, kind):
    queue.executor("block", timeout=0.1)(lambda ctx: KINDS[kind](ctx, lambda: None))
    queue.start()
    handle = queue.submit("block")
    assert handle.exception(PATIENCE) is not None
    assert handle.task().errors == 1


def test_a_narrower_deadline_wakes_a_blocked_executor(queue):
    @queue.executor("block")
    def block(ctx):
        with pytest.raises(TimeoutError), ctx.timeout(0.05):
            in_recv(ctx, lambda: None)
        return "goes on"

    queue.start()
    assert queue.submit("block").result(PATIENCE) == "goes on"


def test_code_after_an_interrupted_read_does_not_run(queue):
    """``recv`` returns no data when it is woken: the end of the block raises."""
    reached = []

    @queue.executor("block")
    def block(ctx):
        in_recv(ctx, ready.set)
        reached.append("what follows")

    ready = threading.Event()
    queue.start()
    handle = queue.submit("block")
    assert ready.wait(PATIENCE)
    queue.cancel_task(handle.id)
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    assert reached == []


def is_closed(connection):
    try:
        connection.execute("SELECT 1")
    except sqlite3.ProgrammingError:
        return True


@pytest.mark.parametrize(
    ("make", "is_over"),
    [
        pytest.param(socket.socket, lambda made: made.fileno() == -1, id="socket"),
        pytest.param(
            lambda: sqlite3.connect(":memory:", check_same_thread=False), is_closed, id="sqlite3"
        ),
        pytest.param(
            lambda: subprocess.Popen(SLEEP),
            lambda made: made.returncode is not None,
            id="program",
            marks=pytest.mark.process,
        ),
    ],
)
def test_a_resource_is_closed_at_once_if_the_token_has_fired(queue, gate, make, is_over):
    """No other code would close it, or end the program."""
    made = []

    @queue.executor("block")
    def block(ctx):
        gate()
        made.append(make())
        with ctx.closing(made[0]):
            raise AssertionError("the block is not entered")

    queue.start()
    handle = queue.submit("block")
    gate.wait_for(1)
    queue.cancel_task(handle.id)
    gate.open()
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    assert is_over(made[0])


def test_a_resource_is_closed_at_the_end_of_the_block_and_not_woken_later(queue):
    made = []

    @queue.executor("block")
    def block(ctx):
        made.append(Aborts())
        with ctx.closing(made[0]) as resource:
            assert resource is made[0]
        ctx.sleep(PATIENCE)

    queue.start()
    handle = queue.submit("block")
    eventually(lambda: made and made[0].closed)
    queue.cancel_task(handle.id)
    with pytest.raises(CancelledError):
        handle.result(PATIENCE)
    assert not made[0].woken.is_set()


class OnlyCloses:
    def close(self):
        pass


class Session:
    """A class like ``requests.Session``: its ``close`` wakes no thread."""

    def get(self, url):
        pass

    def close(self):
        pass


def test_a_resource_that_cannot_be_woken_is_refused(queue, tmp_path):
    @queue.executor("block")
    def block(ctx):
        read, write = os.pipe()
        with os.fdopen(read) as pipe, os.fdopen(write, "w") as end, io.BytesIO() as buffer:
            for resource in (pipe, end, buffer, OnlyCloses(), Session(), None, 5):
                name = type(resource).__name__
                with pytest.raises(ConfigurationError, match=name), ctx.closing(resource):
                    pass
            assert not pipe.closed

    queue.start()
    queue.submit("block").result(PATIENCE)
