"""Access: closed by default, users, permissions, the origin of changes, the name of the host."""

from __future__ import annotations

import base64
import io
import threading

import pytest
from helpers import PATIENCE
from werkzeug import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.test import Client

from taskx import ConfigurationError, TaskStatus
from taskx.programs.dashboard import ALL, PERMISSIONS, Dashboard, bodies, braking, security
from taskx.programs.dashboard.app import Dashboard as App
from taskx.programs.dashboard.braking import Brake
from taskx.programs.dashboard.serving import bind


@pytest.fixture
def queue(make_queue):
    queue = make_queue()
    queue.declare("report")
    return queue


def basic(user, password):
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def local(app):
    """Return the app as a server on the loopback address calls it."""
    return Client(lambda environ, start: app({**environ, security.LOCAL: True}, start))


# --- who gets in


def test_a_dashboard_without_users_and_permissions_is_closed(queue):
    answer = Client(Dashboard(queue)).get("/")
    assert answer.status_code == 403
    assert "The dashboard is closed" in answer.text


def test_a_password_is_asked_for_and_checked(queue):
    client = Client(Dashboard(queue, users={"ann": "s3cret"}))
    answer = client.get("/")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    for wrong in (
        basic("ann", "no"),
        basic("ben", "s3cret"),
        basic("", ""),
        {"Authorization": "Bearer x"},
    ):
        assert client.get("/", headers=wrong).status_code == 401
    assert client.get("/", headers=basic("ann", "s3cret")).status_code == 200


# --- wrong passwords


@pytest.fixture
def door(make_queue, clock):
    """Return a function that sends a password from an address; it returns the answer."""
    client = Client(Dashboard(make_queue(clock=clock), users={"ann": "s3cret"}))

    def knock(password="wrong", address="192.0.2.1", user="ann", **headers):
        return client.get(
            "/static/icon.svg",
            headers={**basic(user, password), **headers},
            environ_overrides={"REMOTE_ADDR": address},
        )

    return knock


def status(answer):
    """Return the status of an answer, and the seconds to wait."""
    return answer.status_code, answer.headers.get("Retry-After")


def test_five_wrong_passwords_make_an_address_wait_longer_and_longer(door, clock):
    for _ in range(5):
        assert status(door()) == (401, None)
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        assert status(door()) == (429, str(seconds))
        clock.advance(seconds - 0.5)
        assert status(door()) == (429, "1")
        clock.advance(0.5)
        assert status(door()) == (401, None)


def test_the_right_password_waits_too_and_then_forgets_the_wrong_ones(door, clock):
    for _ in range(5):
        door()
    answer = door("s3cret")
    assert status(answer) == (429, "1")
    assert "Try again in 1 second." in answer.text
    clock.advance(1)
    assert door("s3cret").status_code == 200
    for _ in range(5):
        assert door().status_code == 401
    assert status(door()) == (429, "1")


def test_another_address_does_not_wait(door):
    for _ in range(6):
        door()
    assert door("s3cret", "192.0.2.2").status_code == 200
    assert door("s3cret").status_code == 429


def test_unknown_users_count_and_requests_without_a_password_do_not(door):
    for _ in range(10):
        assert door(Authorization="").status_code == 401
        assert door(Authorization="Bearer x").status_code == 401
    for number in range(5):
        assert door(user=f"user {number}").status_code == 401
    assert door().status_code == 429
    assert door(Authorization="").status_code == 401  # asks for a password, tries none


def test_what_is_refused_while_an_address_waits_does_not_make_it_wait_longer(door, clock):
    """A browser sends many requests with the one wrong password that it has kept."""
    for _ in range(50):
        door()
    clock.advance(1)
    assert door("s3cret").status_code == 200


def test_a_hundred_guesses_at_once_are_not_more_than_five(clock):
    brake, compared, start = Brake(clock), [], threading.Barrier(100)

    def guess():
        start.wait(PATIENCE)
        brake.check("192.0.2.1", lambda: compared.append(1))

    threads = [threading.Thread(target=guess) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compared) == 5


def test_a_limited_number_of_addresses_is_remembered(clock, monkeypatch):
    monkeypatch.setattr(braking, "MOST_ADDRESSES", 3)
    brake = Brake(clock)
    for _ in range(5):
        brake.check("first", lambda: False)
    for address in ("second", "third"):
        brake.check(address, lambda: False)
    assert brake.check("first", lambda: True) == (False, 1)
    for number in range(100):
        brake.check(f"{number}", lambda: False)
    assert len(brake._tries) == 3
    assert brake.check("first", lambda: True) == (True, 0)  # was forgotten


def test_the_page_of_an_address_that_waits_comes_back_by_itself(door, make_queue, clock):
    client = Client(Dashboard(make_queue(clock=clock), users={"ann": "s3cret"}))
    for _ in range(5):
        client.get("/", headers=basic("ann", "no"))
    answer = client.get("/tasks", headers={**basic("ann", "no"), "Accept-Language": "zh"})
    assert answer.status_code == 429
    assert 'data-url="/tasks"' in answer.text
    assert "密码" in answer.text


@pytest.mark.parametrize("path", ["/static/taskx.css", "/tasks/export", "/nowhere", "/task?id=x"])
def test_nothing_is_shown_without_the_password(queue, path):
    assert Client(Dashboard(queue, users={"ann": "s3cret"})).get(path).status_code == 401


def test_a_function_tells_the_permissions_of_each_request(queue):
    app = Dashboard(queue, permissions=lambda environ: {"read"} if environ.get("admin") else None)
    assert Client(app).get("/").status_code == 403
    assert Client(app).get("/", environ_overrides={"admin": True}).status_code == 200


def test_the_function_sees_the_user_whose_password_was_checked(queue):
    may = {"ann": ALL, "ben": {"read"}}
    app = Dashboard(
        queue,
        users={"ann": "a", "ben": "b"},
        permissions=lambda environ: may[environ["REMOTE_USER"]],
    )
    task_id = queue.submit("report").id
    for user, password, status in (("ben", "b", 403), ("ann", "a", 303)):
        headers = {**basic(user, password), "Sec-Fetch-Site": "same-origin"}
        data = {"id": task_id, "confirmed": "1"}
        answer = Client(app).post("/task/cancel", data=data, headers=headers)
        assert answer.status_code == status


READS = {
    "form": lambda environ: [*Request(environ).form],
    "data": lambda environ: Request(environ).get_data(),
    "some": lambda environ: environ["wsgi.input"].read(3),
    "line": lambda environ: environ["wsgi.input"].readline(7),
    "nothing": lambda environ: None,
}


@pytest.mark.parametrize("how", READS)
def test_the_function_may_read_the_form(queue, how):
    read = []

    def permissions(environ):
        read.append(READS[how](environ))
        return ALL

    client = Client(Dashboard(queue, permissions=permissions))
    task_ids = [queue.submit("report").id for _ in range(3)]
    same = {"Sec-Fetch-Site": "same-origin"}
    form = {"id": task_ids[0], "confirmed": "1"}
    assert client.post("/task/cancel", data=form, headers=same).status_code == 303
    form = {"data": {**form, "id": task_ids[1]}, "content_type": "multipart/form-data"}
    assert client.post("/task/cancel", **form, headers=same).status_code == 303
    answer = client.post("/api/cancel", json={"ids": [task_ids[2]]})
    assert answer.json["changed"] == 1
    assert queue.count_tasks(status=TaskStatus.CANCELLED) == 3
    if how == "form":
        assert read == [["id", "confirmed"], ["id", "confirmed"], []]


def test_a_body_can_be_read_again_in_all_ways():
    lines = [b"one\n", b"two\n", b"\n", b"four"]
    environ = {"wsgi.input": io.BytesIO(b"".join(lines))}
    with bodies.kept_body(environ, 100):
        body = environ["wsgi.input"]
        assert [body.read(2), body.readline(), body.readline(1)] == [b"on", b"e\n", b"t"]
    assert [*body] == lines
    body.rewind()
    assert body.readlines() == lines
    body.rewind()
    assert (body.read(None), body.read(), body.readline(None)) == (b"".join(lines), b"", b"")


@pytest.mark.parametrize("read", ["read", "readline", "readlines"])
def test_more_of_a_body_than_the_dashboard_accepts_is_not_kept(read):
    environ = {"wsgi.input": io.BytesIO(b"x" * 100)}
    with bodies.kept_body(environ, 99):
        assert len(environ["wsgi.input"].read(99)) == 99
    for _ in range(2):
        with pytest.raises(RequestEntityTooLarge):
            getattr(environ["wsgi.input"], read)()


def test_a_form_that_is_too_large_is_refused_in_the_function(make_queue):
    queue = make_queue(max_payload_size=1000)
    app = Dashboard(queue, permissions=lambda environ: Request(environ).form and ALL)
    assert Client(app).post("/task/edit", data={"params": "x" * 2_000_000}).status_code == 413


def test_a_body_that_the_function_does_not_read_stays_unread(queue):
    class Unread:
        def read(self, *args):
            raise AssertionError("the body was read")

        readline = __iter__ = read

    client = Client(Dashboard(queue, permissions=lambda environ: None))
    answer = client.post("/task/cancel", environ_overrides={"wsgi.input": Unread()})
    assert answer.status_code == 403


def test_a_function_that_names_an_unknown_permission_lets_nobody_in(queue):
    answer = Client(Dashboard(queue, permissions=lambda environ: {"read", "fly"})).get("/")
    assert answer.status_code == 400
    assert "unknown permission" in answer.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": {}}, "at least one user"),
        ({"users": {"a:b": "x"}}, "is not a user name"),
        ({"users": {"ann": ""}}, "has no password"),
        ({"permissions": {"read", "fly"}}, "unknown permission 'fly'"),
        ({"permissions": "read"}, "must be a set of names"),
    ],
)
def test_wrong_options_are_refused(queue, options, message):
    with pytest.raises(ConfigurationError, match=message):
        Dashboard(queue, **options)


# --- a server of its own


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", ""])
def test_an_address_that_others_can_reach_requires_users(queue, host):
    for app in (App(queue), App(queue, permissions=ALL)):
        with pytest.raises(ConfigurationError, match="needs users with passwords"):
            bind(app, host, 0)


def test_a_server_on_the_loopback_address_needs_no_users(queue):
    server = bind(App(queue), port=0)
    try:
        assert server.server_port
        assert server.server_address[0] == "127.0.0.1"
    finally:
        server.server_close()


def test_a_server_with_users_may_be_reached_by_others(queue):
    server = bind(App(queue, users={"ann": "s3cret"}), "0.0.0.0", 0)
    server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8642", "[::1]:8642", "LOCALHOST"])
def test_the_own_server_answers_to_its_own_names(queue, host):
    assert local(App(queue)).get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "[", "::1"]
)
def test_the_own_server_refuses_other_names(queue, host):
    answer = local(App(queue)).get("/", headers={"Host": host})
    assert answer.status_code in (400, 403)
    assert "<table" not in answer.text


# --- the origin of changes


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:81"},
        {"Origin": "null"},
        {},
    ],
)
@pytest.mark.parametrize("path", ["/task/cancel", "/tasks/delete", "/language"])
def test_a_change_from_elsewhere_is_refused(queue, headers, path):
    task_id = queue.submit("report").id
    data = {"id": task_id, "confirmed": "1", "to": "zh"}
    answer = Client(Dashboard(queue, permissions=ALL)).post(path, data=data, headers=headers)
    assert answer.status_code == 403
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING


@pytest.mark.parametrize(
    "headers", [{"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://localhost"}]
)
def test_a_change_from_a_page_of_the_dashboard_is_made(queue, headers):
    task_id = queue.submit("report").id
    client = Client(Dashboard(queue, permissions=ALL))
    data = {"id": task_id, "confirmed": "1"}
    answer = client.post("/task/cancel", data=data, headers=headers)
    assert answer.status_code == 303
    assert queue.get_task_status(task_id).status is TaskStatus.CANCELLED


def test_an_old_browser_sends_the_token_of_the_page(queue):
    task_id = queue.submit("report").id
    client = Client(Dashboard(queue, permissions=ALL))
    assert "taskx_token" in client.get(f"/task?id={task_id}").text
    cookie = client.get_cookie("taskx_token")
    data = {"id": task_id, "confirmed": "1"}
    wrong = client.post("/task/cancel", data={**data, "taskx_token": "x"})
    assert wrong.status_code == 403
    right = client.post("/task/cancel", data={**data, "taskx_token": cookie.value})
    assert right.status_code == 303


def test_a_browser_of_today_gets_no_token(look, queue):
    answer = look(queue).get("/")
    assert "taskx_token" not in answer.text
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("path", ["/task/cancel", "/tasks/delete"])
def test_nothing_is_changed_by_get(look, queue, path):
    task_id = queue.submit("report").id
    assert look(queue).get(path, query_string={"id": task_id}).status_code == 405
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING


@pytest.mark.parametrize(
    "back", ["http://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)", ""]
)
def test_an_action_never_leads_to_another_site(look, queue, back):
    task_id = queue.submit("report").id
    answer = look(queue).post("/task/cancel", data={"id": task_id, "confirmed": "1", "back": back})
    assert answer.location == "/"


# --- permissions


def actions():
    """Return each action of each screen: the permission that it needs, and its URL."""
    from taskx.programs.dashboard.screens import SCREENS

    return [
        (action.permission, f"/{screen.name}/{name}")
        for screen in SCREENS
        for name, action in screen.actions.items()
        if (screen.name, name) != ("nodes", "stacks")  # changes nothing but asks a node by POST
    ]


def test_each_action_needs_a_known_permission_that_changes_something():
    assert {needed for needed, _ in actions()} <= {*PERMISSIONS} - {"read", "see_params"}


@pytest.mark.parametrize(("needed", "path"), actions())
def test_an_action_is_refused_without_its_permission(look, queue, needed, path):
    task_id = queue.submit("report").id
    answer = look(queue, permissions=ALL - {needed}).post(path, data={"id": task_id})
    assert answer.status_code == 403
    assert f"“{needed}”" in answer.text
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING


@pytest.mark.parametrize(("needed", "path"), actions())
def test_nothing_can_be_changed_if_the_dashboard_is_read_only(look, queue, needed, path):
    assert look(queue, read_only=True).post(path, data={"id": "x"}).status_code == 403


@pytest.mark.parametrize("path", ["/", "/tasks", "/task?id={}", "/tasks/export"])
def test_pages_without_the_permission_to_change_have_no_forms_for_it(look, queue, path):
    task_id = queue.submit("report").id
    text = look(queue, read_only=True).get(path.format(task_id)).text
    assert text.count('method="post"') <= 2  # the language, and the list without buttons
    assert "formaction" not in text
    assert "/task/" not in text


# --- what a user may see


def test_params_are_hidden_without_the_permission_to_see_them(look, make_queue, repository):
    queue = make_queue()
    queue.declare("report")
    task_id = queue.submit("report", {"customer": "hunter2"}).id
    paths = [f"/task?id={task_id}", "/tasks", "/tasks/export"]
    seen = look(queue)
    hidden = look(queue, permissions={"read"})
    assert "hunter2" in seen.get(paths[0]).text
    assert "hunter2" in seen.get(paths[2]).text
    for path in paths:
        assert "hunter2" not in hidden.get(path).text


def test_the_values_of_secret_keys_are_never_shown(look, make_queue):
    queue = make_queue(redact=("pin",))
    queue.declare("report")
    params = {"a": [{"user_PIN": "4711", "name": "ann"}]}
    task_id = queue.submit("report", params).id
    for path in (f"/task?id={task_id}", "/tasks/export"):
        text = look(queue).get(path).text
        assert "4711" not in text
        assert "ann" in text


def test_a_filter_cannot_find_out_hidden_params(look, make_queue):
    queue = make_queue(redact=("pin",))
    queue.declare("report")
    queue.submit("report", {"pin": 4711, "name": "ann"})
    for path in ("/tasks", "/tasks/export"):
        refused = look(queue).get(path, query_string={"q": "params.pin:4711"})
        assert refused.status_code == 403
        refused = look(queue, permissions={"read"}).get(path, query_string={"q": "params.name:ann"})
        assert refused.status_code == 403
        assert look(queue).get(path, query_string={"q": "params.name:ann"}).status_code == 200


@pytest.mark.every_store
def test_the_audit_log_does_not_show_params_that_were_searched(look, make_queue):
    queue = make_queue()
    queue.declare("report")
    queue.submit("report", {"customer": "hunter2"})
    line = 'params.customer:"hunter2"'
    data = {"whole": "1", "q": line, "confirmed": "1"}
    assert look(queue).post("/tasks/cancel", data=data).status_code == 303
    assert "hunter2" in look(queue).get("/system").text
    assert "hunter2" not in look(queue, permissions={"read"}).get("/system").text


# --- the way in


def test_a_request_that_is_too_large_is_refused(look, make_queue):
    queue = make_queue(max_payload_size=1000)
    queue.declare("report")
    answer = look(queue).post("/task/edit", data={"id": "x", "params": "x" * 2_000_000})
    assert answer.status_code == 413


def test_an_error_page_does_not_read_the_body_of_somebody_unknown(queue):
    class Unread:
        def read(self, *args):
            raise AssertionError("the body was read")

        readline = __iter__ = __next__ = read

    client = Client(Dashboard(queue, users={"ann": "s3cret"}))
    answer = client.post(
        "/task/cancel",
        data={"id": "x"},
        environ_overrides={"wsgi.input": Unread()},
    )
    assert answer.status_code == 401


# --- questions


@pytest.mark.parametrize("action", ["cancel", "delete"])
def test_a_change_of_one_task_is_asked_for_without_scripts(look, queue, action):
    task_id = queue.submit("report").id
    browser = look(queue)
    asked = browser.post(f"/task/{action}", data={"id": task_id, "back": f"/task?id={task_id}"})
    assert asked.status_code == 200
    assert 'name="confirmed"' in asked.text
    assert queue.get_task_status(task_id).status is TaskStatus.PENDING
    data = {"id": task_id, "confirmed": "1"}
    assert browser.post(f"/task/{action}", data=data).status_code == 303
    assert queue.count_tasks(status=TaskStatus.PENDING) == 0


def test_the_language_of_a_question_leads_back_to_a_page_that_exists(look, queue):
    task_id = queue.submit("report").id
    back = f"/task?id={task_id}"
    asked = look(queue).post("/task/cancel", data={"id": task_id, "back": back})
    assert 'value="/task/cancel"' not in asked.text
    assert asked.text.count(f'name="back" value="{back}"') == 2


@pytest.mark.parametrize("action", ["cancel", "delete"])
def test_a_form_with_a_field_of_another_action_does_no_harm(look, queue, action):
    queue.submit("report")
    data = {"whole": "1", "q": "type:report", "confirmed": "1", "rate": "1/m"}
    assert look(queue).post(f"/tasks/{action}", data=data).status_code == 303
