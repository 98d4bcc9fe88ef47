"""The dashboard on a server of its own: behind a proxy, below a path, and with many clients at once."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import threading
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import PATIENCE

from taskx import ConfigurationError, TaskStatus
from taskx.programs.dashboard import ALL, Dashboard, api, serve
from taskx.programs.dashboard.serving import bind

NAME = "dash.example.org"
USER = {"ann": "s3cret"}
BASIC = {"Authorization": "Basic " + base64.b64encode(b"ann:s3cret").decode()}
LINK = re.compile(r'(?:href|src|action|formaction|hx-get)="([^"]*)"')


@pytest.fixture
def queue(make_queue):
    queue = make_queue()
    queue.declare("report")
    return queue


@contextmanager
def serving(server):
    """Let a server serve."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Proxy(BaseHTTPRequestHandler):
    """A proxy that keeps the header ``Host``, says who asks, and sends on each part as it comes."""

    port: int  # of the server behind it
    removed = ""  # the part of the path that it removes
    scheme = "http"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        given = self.headers.get("X-Forwarded-For")
        headers = {
            **self.headers,
            "X-Forwarded-For": f"{given}, 10.0.0.1" if given else "10.0.0.1",
            "X-Forwarded-Proto": self.scheme,
            "Connection": "close",
        }
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE)) as behind:
            path = self.path.removeprefix(self.removed)
            behind.request(self.command, path, body, headers)
            answer = behind.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name not in ("Transfer-Encoding", "Connection"):
                    self.send_header(name, value)
            self.end_headers()
            try:
                while part := answer.read1(65536):
                    self.wfile.write(part)
            except OSError:  # the client has gone
                self.close_connection = True

    do_POST = do_GET  # noqa: N815  (the name is that of the base class)

    def log_message(self, format, *args):
        """Log nothing."""


@pytest.fixture
def through(queue):
    """Return a function that serves the dashboard behind a proxy; it returns a function that asks it."""
    with ExitStack() as stack:

        def served(app=None, removed="", scheme="http", **options):
            app = app or Dashboard(queue, users=USER)
            options = {"allowed_hosts": [NAME], "prefix": "/taskx", **options}
            port = stack.enter_context(serving(bind(app, port=0, **options)))
            names = {"port": port, "removed": removed, "scheme": scheme}
            proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("At", (Proxy,), names))
            front = stack.enter_context(serving(proxy))

            def ask(path, method="GET", body=None, host=NAME, **headers):
                client = http.client.HTTPConnection("127.0.0.1", front, timeout=PATIENCE)
                stack.callback(client.close)
                headers = {name.replace("_", "-"): value for name, value in headers.items()}
                client.request(method, path, body, {"Host": host, **BASIC, **headers})
                return client.getresponse()

            return ask

        yield served


FORM = {"Content_Type": "application/x-www-form-urlencoded", "Origin": f"http://{NAME}"}


@pytest.mark.parametrize("removed", ["", "/taskx"])
def test_every_link_works_behind_a_proxy_below_a_path(through, queue, removed):
    task_id = queue.submit("report").id
    ask = through(removed=removed)
    links = {"/taskx", "/taskx/", f"/taskx/task?id={task_id}"}
    for page in ("/taskx/", "/taskx/tasks", f"/taskx/task?id={task_id}", "/taskx/types"):
        links |= {link.replace("&amp;", "&") for link in LINK.findall(ask(page).read().decode())}
    links = {link for link in links if not link.startswith("#")}
    assert len(links) > 20
    for link in links:
        assert link.startswith("/taskx")
        assert ask(link).status in (200, 405), link  # 405: the place of a form
    document = json.loads(ask("/taskx/api/openapi.json").read())
    assert document["servers"] == [{"url": "/taskx/api"}]


def test_forms_redirects_and_cookies_work_behind_a_proxy(through, queue):
    task_id = queue.submit("report").id
    ask = through()
    chosen = ask("/taskx/language", "POST", "to=zh&back=/taskx/tasks", **FORM)
    assert (chosen.status, chosen.headers["Location"]) == (303, "/taskx/tasks")
    assert "Path=/taskx" in chosen.headers["Set-Cookie"]
    body = f"id={task_id}&confirmed=1&back=/taskx/task?id={task_id}"
    for origin in ("http://evil.example", "http://127.0.0.1", "null"):
        refused = ask("/taskx/task/cancel", "POST", body, **{**FORM, "Origin": origin})
        assert refused.status == 403
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING
    done = ask("/taskx/task/cancel", "POST", body, **FORM)
    assert (done.status, done.headers["Location"]) == (303, f"/taskx/task?id={task_id}")
    assert queue.get_task_status(task_id).status is TaskStatus.CANCELLED


def test_an_old_browser_sends_the_token_of_the_page_behind_a_proxy(through, queue):
    task_id = queue.submit("report").id
    ask = through()
    cookie = ask(f"/taskx/task?id={task_id}").headers["Set-Cookie"].partition(";")[0]
    body = f"id={task_id}&confirmed=1&{cookie}"
    form = {"Content_Type": FORM["Content_Type"], "Cookie": cookie}
    assert ask("/taskx/task/cancel", "POST", body, **form).status == 303


@pytest.mark.timing(stream_every=0.01, silence_within=0.01)
def test_changes_are_streamed_through_a_proxy(through, queue, monkeypatch):
    monkeypatch.setattr(api, "_streams", threading.BoundedSemaphore(1))
    task_id = queue.submit("report").id
    answer = through()("/taskx/api/changes?type=report&seconds=300")
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert json.loads(answer.readline())["status"] == "pending"
    queue.cancel_task(task_id)
    changed = next(record for record in map(json.loads, answer) if "status" in record)
    assert changed["status"] == "cancelled"
    answer.close()
    assert api._streams.acquire(timeout=PATIENCE)


def test_a_name_that_was_not_allowed_is_refused(through):
    ask = through()
    for host in ("evil.example", f"{NAME}.evil.example", f"evil.{NAME}"):
        answer = ask("/taskx/", host=host)
        assert answer.status == 403
        assert "--allowed-host" in answer.read().decode()
    for host in (NAME, f"{NAME.upper()}:8443", "localhost", "127.0.0.1:80"):
        assert ask("/taskx/", host=host).status == 200


def test_an_address_that_others_can_reach_answers_only_to_the_allowed_names(queue):
    server = bind(Dashboard(queue, users=USER), "0.0.0.0", 0, allowed_hosts=[NAME])
    with serving(server) as port:
        for host, status in (("evil.example", 403), (NAME, 200)):
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            client.request("GET", "/", headers={"Host": host, **BASIC})
            assert client.getresponse().status == status
            client.close()


def test_an_allowed_name_requires_users(queue):
    for options in ({}, {"permissions": ALL}):
        with pytest.raises(ConfigurationError, match="needs users with passwords"):
            bind(Dashboard(queue, **options), port=0, allowed_hosts=[NAME])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allowed_hosts": NAME}, "must be a list of names"),
        ({"allowed_hosts": [f"https://{NAME}"]}, "is not the name of a host"),
        ({"allowed_hosts": [f"{NAME}:8443"]}, "is not the name of a host"),
        ({"allowed_hosts": [f"{NAME}/taskx"]}, "is not the name of a host"),
        ({"allowed_hosts": ["*"]}, "is not the name of a host"),
        ({"allowed_hosts": [f".{NAME}"]}, "is not the name of a host"),
        ({"allowed_hosts": ["fd00::1"]}, "is not the name of a host"),
        ({"allowed_hosts": [""]}, "is not the name of a host"),
        ({"prefix": "taskx"}, "must be a path"),
        ({"prefix": "//evil.example"}, "must be a path"),
        ({"prefix": "/a?b"}, "must be a path"),
        ({"prefix": "/täsk"}, "must be a path"),
        ({"prefix": None}, "must be a path"),
    ],
)
def test_a_wrong_name_or_path_is_refused(queue, options, message):
    with pytest.raises(ConfigurationError, match=message):
        bind(Dashboard(queue, users=USER), port=0, **options)


def test_names_and_paths_may_be_written_in_other_ways(queue):
    for options in (
        {"allowed_hosts": ["[fd00::1]", "DASH", "10.0.0.1"]},
        {"prefix": "/"},
        {"prefix": "/a/b/"},
    ):
        bind(Dashboard(queue, users=USER), port=0, **options).server_close()


def test_the_url_that_is_told_has_the_path(queue, monkeypatch):
    monkeypatch.setattr("werkzeug.serving.BaseWSGIServer.serve_forever", lambda self: None)
    told = []
    serve(queue, port=0, prefix="/taskx/", ready=told.append)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/taskx/", told[0])


# --- what a proxy says


@pytest.mark.parametrize("told", [True, False])
def test_an_address_in_a_header_is_trusted_only_if_told(queue, through, told):
    seen = []

    def permissions(environ):
        seen.append((environ["REMOTE_ADDR"], environ["wsgi.url_scheme"]))
        return ALL

    app = Dashboard(queue, users=USER, permissions=permissions)
    ask = through(app, scheme="https", behind_proxy=told)
    answer = ask("/taskx/", X_Forwarded_For="192.0.2.7")  # invented by the client
    assert answer.status == 200
    assert seen == [("10.0.0.1", "https") if told else ("127.0.0.1", "http")]
    assert ("Secure" in answer.headers["Set-Cookie"]) is told


# --- many at once


def test_a_hundred_clients_at_once_are_all_answered(queue):
    """None is accepted before all have connected: the kernel keeps them."""
    server = bind(Dashboard(queue), port=0)
    address = "127.0.0.1", server.server_port
    with ExitStack() as stack:
        stack.callback(server.server_close)
        clients = [
            stack.enter_context(socket.create_connection(address, timeout=PATIENCE))
            for _ in range(100)
        ]
        for client in clients:
            client.sendall(b"GET /api/health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        with serving(server):
            answers = [client.makefile("rb").readline() for client in clients]
    assert {answer.split()[1] for answer in answers} == {b"503"}  # no node runs
