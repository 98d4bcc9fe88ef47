"""``taskx dashboard``."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from taskx.programs.cli.dashboard import PASSWORD


@pytest.fixture
def served(monkeypatch):
    """The calls of ``serve``, which does not serve here."""
    calls: list[dict[str, Any]] = []

    def serve(queue, host, port, *, ready, **options):
        calls.append({"queue": queue, "host": host, "port": port, **options})
        ready(f"http://{host}:{port}/")

    monkeypatch.setattr("taskx.programs.dashboard.serve", serve)
    return calls


def test_the_dashboard_is_served_with_its_options(served, outside, taskx):
    said = taskx("dashboard", "--port", "9000", "--read-only", "--allow", "read", "--title", "Shop")
    assert said.code == 0
    assert said.out == "Ctrl-C ends the dashboard at http://127.0.0.1:9000/\n"
    assert served == [
        {
            "queue": outside,
            "host": "127.0.0.1",
            "port": 9000,
            "users": None,
            "permissions": ("read",),
            "read_only": True,
            "title": "Shop",
            "allowed_hosts": (),
            "prefix": "",
            "behind_proxy": False,
        }
    ]
    assert taskx("dashboard", "--json").rows == [{"url": "http://127.0.0.1:8642/"}]


def test_the_default_port_is_that_of_the_dashboard(served, taskx):
    from taskx.programs.dashboard.serving import PORT

    assert taskx("dashboard").code == 0
    assert served[0]["port"] == PORT


def test_the_password_comes_from_the_environment(served, taskx):
    assert taskx("dashboard", "--user", "ops", **{PASSWORD: "hunter2"}).code == 0
    assert served[0]["users"] == {"ops": "hunter2"}


def test_a_user_without_a_password_is_a_wrong_call(served, taskx):
    said = taskx("dashboard", "--user", "ops", **{PASSWORD: None})
    assert said.code == 2
    assert f"--user ops needs a password: set {PASSWORD}" in said.err
    assert served == []


def test_another_address_without_a_user_is_refused(taskx):
    said = taskx("dashboard", "--host", "0.0.0.0", "--port", "0")
    assert said.code == 2
    assert "lets other machines connect" in said.err


def test_the_dashboard_is_served_behind_a_proxy(served, taskx):
    options = ["--allowed-host", "a.example", "--allowed-host", "b.example", "--behind-proxy"]
    assert (
        taskx("dashboard", "--user", "ops", *options, "--prefix", "/x", **{PASSWORD: "p"}).code == 0
    )
    assert served[0]["allowed_hosts"] == ("a.example", "b.example")
    assert (served[0]["prefix"], served[0]["behind_proxy"]) == ("/x", True)


def test_an_allowed_name_without_a_user_is_refused(taskx):
    said = taskx("dashboard", "--allowed-host", "dash.example.org", "--port", "0")
    assert said.code == 2
    assert "lets other machines connect" in said.err


def test_a_taken_port_is_a_failure(taskx):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = taskx("dashboard", "--port", str(port))
    assert said.code == 1
    taken_port = f"cannot listen on 127.0.0.1, port {port}: Address already in use"
    assert said.err.splitlines() == [f"taskx: {taken_port}; --port chooses another one"]


def test_an_address_that_cannot_be_used_is_a_failure(taskx, monkeypatch):
    def serve(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("taskx.programs.dashboard.serve", serve)
    said = taskx("dashboard", "--port", "80")
    assert said.code == 1
    assert said.err == (
        "taskx: cannot listen on 127.0.0.1, port 80: Permission denied; --port chooses another one\n"
    )


def test_an_address_that_is_none_is_a_failure_of_no_port(taskx):
    said = taskx("dashboard", "--host", "no such host", "--user", "ops", **{PASSWORD: "p"})
    assert said.code == 1
    assert said.err.startswith("taskx: cannot listen on no such host, port 8642: ")
    assert "Unknown error" not in said.err
    assert "--port" not in said.err


def test_an_unknown_permission_is_a_wrong_call(taskx):
    said = taskx("dashboard", "--allow", "everything", "--port", "0")
    assert said.code == 2
    assert "everything" in said.err
