"""The Flask extension, inside this process."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flask
import pytest
from flask import Flask, current_app, g, has_request_context, redirect, request, session
from helpers import ROOT

from taskx import (
    ConfigurationError,
    Queue,
    QueueFull,
    RepositoryError,
    RepositoryUnavailable,
    TaskExecutor,
    TaskFilter,
    TaskNotFound,
    TaskStatus,
    current_context,
    every,
    testing,
)
from taskx.contrib.flask import KEYS, Taskx
from taskx.programs.cli.app import COMMANDS


def new_app(taskx: Taskx, name: str = "shop", **config: Any) -> Flask:
    """Return an app with a queue in memory, and a page that submits a task."""
    app = Flask(name)
    app.secret_key = "for tests"
    app.config.update({"TASKX_REPOSITORY": "memory://", **config})
    taskx.init_app(app)

    @app.get("/")
    def home() -> str:
        return "home"

    return app


apart = Taskx()


@apart.executor("pid", isolation="process")
def pid(double: int) -> list[Any]:
    """Run in a child process, which imports this module and has no app."""
    return [2 * double, os.getpid(), bool(current_app)]


def queue_of(app: Flask) -> Queue:
    """Return the queue of an app."""
    queue: Queue = app.extensions["taskx"].queue
    return queue


@pytest.fixture
def make_app(taskx: Taskx) -> Iterator[Callable[..., Flask]]:
    """Return a function that makes apps; their queues are stopped at the end."""
    made: list[Flask] = []

    def make(*args: Any, **config: Any) -> Flask:
        made.append(new_app(taskx, *args, **config))
        return made[-1]

    yield make
    for app in made:
        queue_of(app).stop(cancel=True)
        queue_of(app).close()


@pytest.fixture
def taskx() -> Taskx:
    return Taskx()


# --- init_app


def test_an_executor_made_before_the_app_runs_in_the_apps_context(taskx, make_app):
    @taskx.executor("name")
    def name(greeting: str) -> list[Any]:
        return [greeting, current_app.name, has_request_context()]

    app = make_app()
    assert app.test_client().get("/").text == "home"
    with app.app_context():
        assert name.submit(greeting="hello").result(timeout=60) == ["hello", "shop", False]


def test_an_executor_made_after_the_app_runs_too(taskx, make_app):
    app = make_app()

    @taskx.executor()
    def late() -> str:
        return current_app.name

    app.test_client().get("/")
    with app.app_context():
        assert taskx.submit("late").result(timeout=60) == "shop"
        assert taskx.submit(late).result(timeout=60) == "shop"


def test_executors_as_classes_and_declared_types_belong_to_every_app(taskx, make_app):
    class Name(TaskExecutor):
        type = "name"

        def execute(self, ctx, task):
            return current_app.name

    first = make_app("first")
    taskx.register_executor(Name())
    taskx.declare("elsewhere")
    for app in (first, make_app("second")):
        with testing.inline(queue_of(app)), app.app_context():
            assert taskx.submit("name").result() == app.name
        assert queue_of(app).submit("elsewhere").task().status is TaskStatus.PENDING


def test_executors_that_are_async_belong_to_every_app(taskx, make_app):
    @taskx.executor("name")
    async def name() -> str:
        return current_app.name

    @taskx.executor("letters")
    async def letters() -> AsyncIterator[str]:
        for letter in current_app.name:
            yield letter

    for app in make_app("one"), make_app("two"):
        with testing.inline(queue_of(app)), app.app_context():
            assert name.submit().result() == app.name
            assert [chunk.value for chunk in letters.submit().stream()] == [*app.name]


def test_two_apps_in_one_process_have_a_queue_each(taskx, make_app):
    @taskx.executor("name")
    def name() -> str:
        return current_app.name

    apps = [make_app("one"), make_app("two")]
    for app in apps:
        app.test_client().get("/")
    for app in apps:
        with app.app_context():
            assert taskx.queue is queue_of(app)
            assert name.submit().result(timeout=60) == app.name
            assert name.using(priority=2).submit().task().priority == 2
            assert name.on(taskx).submit().result(timeout=60) == app.name
            assert taskx.queue.list_tasks().total == 3


def test_without_an_app_context_flask_says_so(taskx, make_app):
    @taskx.executor("name")
    def name() -> None: ...

    make_app()
    with pytest.raises(RuntimeError, match="outside of application context"):
        name.submit()


def test_an_app_without_the_extension_is_named(taskx):
    app = Flask("bare")
    with app.app_context(), pytest.raises(ConfigurationError, match="'bare' has no Taskx"):
        taskx.submit("name")


def test_an_app_is_initialized_once(taskx, make_app):
    app = make_app()
    with pytest.raises(ConfigurationError, match="once for each app"):
        taskx.init_app(app)


def test_an_app_can_be_given_at_once():
    app = Flask("single")
    app.config["TASKX_REPOSITORY"] = "memory://"
    Taskx(app)
    assert queue_of(app).config.worker_num == 5


# --- settings


def test_settings_can_come_from_environment_variables(taskx, monkeypatch):
    for name, value in {
        "REPOSITORY": "memory://",
        "WORKERS": "3",
        "BUFFER_SIZE": "7",
        "OVERFLOW": "spill",
        "BLOCK_TIMEOUT": "2.5",
        "RETENTION__completed": "3600",
        "RETENTION__failed": "7200",
        "REDACT": '["iban"]',
        "AGEING": "60",
        "EMBEDDED": "false",
        "DASHBOARD_URL": "/ops/tasks/",
    }.items():
        monkeypatch.setenv(f"FLASK_TASKX_{name}", value)
    app = Flask("shop")
    app.config.from_prefixed_env()
    taskx.init_app(app)
    config = queue_of(app).config
    assert (config.worker_num, config.buffer_size, config.overflow) == (3, 7, "spill")
    assert (config.block_timeout, config.ageing, config.redact) == (2.5, 60, ("iban",))
    assert config.retention == {TaskStatus.COMPLETED: 3600, TaskStatus.FAILED: 7200}
    assert app.extensions["taskx"].embedded is False
    assert app.test_client().get("/ops/tasks/").status_code == 403


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("TASKX_WORKER", 3, "there is no setting 'TASKX_WORKER'; did you mean 'TASKX_WORKERS'?"),
        ("TASKX_QQQ", 3, "there is no setting 'TASKX_QQQ'; use TASKX_REPOSITORY, TASKX_EMBEDDED"),
        ("TASKX_WORKERS", 0, "TASKX_WORKERS: worker_num must be"),
        ("TASKX_WORKERS", "five", "TASKX_WORKERS: worker_num must be"),
        ("TASKX_RETENTION", {"pending": 1}, "TASKX_RETENTION: retention applies only"),
        ("TASKX_EMBEDDED", "no", "TASKX_EMBEDDED must be true or false, not 'no'"),
        ("TASKX_DASHBOARD_URL", "taskx", "TASKX_DASHBOARD_URL must be a path, such as '/taskx'"),
        ("TASKX_DASHBOARD_URL", "/", "must be a path"),
        ("TASKX_REPOSITORY", "tasks.db", "'tasks.db' is not the URL of a repository"),
        ("TASKX_REPOSITORY", None, "must be a URL, such as 'sqlite:///tasks.db', not None"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(taskx, key, value, complaint):
    with pytest.raises(ConfigurationError) as refused:
        new_app(taskx, **{key: value})
    assert str(refused.value).count("\n") == 0
    assert complaint in str(refused.value)


def test_the_page_on_flask_names_all_settings():
    text = (ROOT / "docs" / "flask.rst").read_text("utf-8")
    assert [key for key in KEYS if f"``{key}``" not in text] == []


# --- when the queue starts


def test_the_first_request_starts_the_queue_and_later_ones_do_not(taskx, make_app, monkeypatch):
    app = make_app()
    calls: list[int] = []
    start = queue_of(app).start
    monkeypatch.setattr(queue_of(app), "start", lambda: (calls.append(1), start()))
    with app.app_context():
        assert "not started" in repr(taskx.queue)
    client = app.test_client()
    assert [client.get("/").status_code for _ in range(3)] == [200, 200, 200]
    assert calls == [1]
    assert len(queue_of(app).repository.liveness.nodes()) == 1


def test_an_app_that_only_submits_starts_nothing(taskx, make_app):
    app = make_app(TASKX_EMBEDDED=False)
    app.test_client().get("/")
    taskx.start(app)
    assert "not started" in repr(queue_of(app))


def test_an_app_under_test_starts_nothing_unless_told(taskx, make_app):
    app = make_app(TESTING=True)
    app.test_client().get("/")
    assert "not started" in repr(queue_of(app))
    taskx.start(app)
    assert "<Queue" in repr(queue_of(app))
    assert "not started" not in repr(queue_of(app))


def test_threads_that_answer_the_first_requests_start_one_queue(taskx, make_app, monkeypatch):
    """One of them starts it; the others do not wait for it."""
    app = make_app()
    inside, go, calls = threading.Event(), threading.Event(), []

    def start() -> None:
        calls.append(1)
        inside.set()
        assert go.wait(60)

    monkeypatch.setattr(queue_of(app), "start", start)
    first = threading.Thread(target=lambda: app.test_client().get("/"))
    first.start()
    assert inside.wait(60)
    assert app.test_client().get("/").text == "home"
    go.set()
    first.join()
    assert calls == [1]


def test_while_the_repository_is_away_the_site_answers_and_tries_again(
    taskx, make_app, monkeypatch, caplog
):
    app, now = make_app(), [1000.0]
    answers: list[Exception | None] = [RepositoryUnavailable("the disk is away"), None]

    def start() -> None:
        if (error := answers.pop(0)) is not None:
            raise error

    monkeypatch.setattr(queue_of(app), "start", start)
    # Not for other threads, which use the same module.
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("taskx.contrib.flask.time", clock)
    client = app.test_client()
    assert [client.get("/").text for _ in range(2)] == ["home", "home"]
    assert len(answers) == 1
    assert "cannot be started yet: the disk is away" in caplog.text
    now[0] += 10
    assert client.get("/").text == "home"
    assert answers == []


def test_a_stopped_queue_is_not_started_again(make_app):
    app = make_app()
    client = app.test_client()
    client.get("/")
    queue_of(app).stop()
    assert client.get("/").text == "home"
    app.extensions["taskx"]._started_in.clear()
    assert client.get("/").text == "home"


def test_schedules_are_stored_when_the_queue_starts(taskx, make_app):
    @taskx.executor("beat")
    def beat(by: str) -> None: ...

    taskx.schedule("heart", every(3600), beat, {"by": "clock"}, overlap="skip")
    app = make_app()
    taskx.schedule("lungs", every(60), "beat", {"by": "clock"})  # the app has a queue already
    assert [one.stored for one in queue_of(app).schedules().values()] == [False, False]
    assert queue_of(app).repository.notes("schedule/") == {}
    app.test_client().get("/")
    heart, lungs = queue_of(app).schedules().values()
    assert (heart.name, heart.type, heart.stored) == ("heart", "beat", True)
    assert (lungs.name, lungs.type, lungs.stored) == ("lungs", "beat", True)


@pytest.mark.parametrize(
    ("spec", "type", "params", "options", "message"),
    [
        ("bad cron", "beat", {}, {}, "cron expression 'bad cron'"),
        (every(60), "misspelt", {}, {}, "type 'misspelt'"),
        (every(60), "beat", {"bye": 1}, {}, "bye"),
        (every(60), "beat", {}, {"owerlap": "skip"}, "no option owerlap"),
    ],
)
def test_a_wrong_schedule_is_told_by_init_app(
    taskx, make_app, spec, type, params, options, message
):
    taskx.executor("beat")(lambda by="": None)
    taskx.schedule("heart", spec, type, params, **options)
    with pytest.raises(ConfigurationError, match=f"schedule 'heart': .*{message}"):
        make_app()


def test_a_wrong_schedule_is_told_at_once_if_an_app_has_a_queue(taskx, make_app):
    app = make_app()
    taskx.executor("beat")(lambda: None)
    with pytest.raises(ConfigurationError, match="schedule 'heart': cron expression 'bad cron'"):
        taskx.schedule("heart", "bad cron", "beat")
    app.test_client().get("/")
    assert queue_of(app).schedules() == {}


# --- the context of the app


def test_each_execution_has_a_context_of_its_own(taskx, make_app):
    """Extensions clean up when it ends, also after an error."""
    ended: list[Any] = []

    @taskx.executor("mark")
    def mark(name: str) -> None:
        assert "name" not in g
        g.name = name
        if name == "bad":
            raise ValueError(name)

    app = make_app()

    @app.teardown_appcontext
    def clean_up(error: BaseException | None) -> None:
        if "name" in g:
            ended.append((g.name, type(error)))

    with testing.manual(queue_of(app)) as queue, app.app_context():
        for name in ("good", "bad"):
            mark.submit(name=name)
        queue.run_all(check=False)
    assert ended == [("good", type(None)), ("bad", ValueError)]


def test_a_task_never_sees_the_request_that_submits_it(taskx, make_app):
    """Not even if the thread of the request runs it, as it does in tests."""

    @taskx.executor("look")
    def look(ctx) -> list[Any]:
        return [has_request_context(), current_app.name, current_context() is ctx]

    app = make_app(TESTING=True)

    @app.post("/tasks")
    def submit() -> Any:
        result = look.submit().result()
        return {"seen": result, "here": request.path}

    with testing.inline(queue_of(app)):
        told = app.test_client().post("/tasks").get_json()
    assert told == {"seen": [False, "shop", True], "here": "/tasks"}


@pytest.mark.process
def test_an_executor_in_a_child_process_has_no_app():
    app = new_app(apart, TASKX_WORKERS=1)
    apart.start(app)
    try:
        with app.app_context():
            number, child, has_app = pid.submit(double=4).result(timeout=60)
            assert (number, child != os.getpid(), has_app) == (8, True, False)
    finally:
        queue_of(app).close()


def test_middleware_and_hooks_of_the_program_are_inside_the_context(make_app):
    def named(ctx, task, call_next):
        return [current_app.name, call_next()]

    taskx = Taskx(middleware=[named])
    taskx.executor("one")(lambda: 1)
    app = new_app(taskx)
    with testing.inline(queue_of(app)), app.app_context():
        assert taskx.submit("one").result() == ["shop", 1]


def test_the_buffer_of_the_settings_refuses_tasks(taskx, make_app):
    begun, gate = threading.Event(), threading.Event()
    wait = taskx.executor("wait")(lambda: begun.set() or gate.wait(60))
    app = make_app(TASKX_WORKERS=1, TASKX_BUFFER_SIZE=1)
    app.test_client().get("/")
    try:
        with app.app_context():
            wait.submit()
            assert begun.wait(60)
            wait.submit()
            with pytest.raises(QueueFull):
                wait.submit()
    finally:
        gate.set()


# --- Flask-SQLAlchemy


def test_a_task_is_stored_with_the_rows_of_the_session_or_not_at_all(taskx, make_app, tmp_path):
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    db = flask_sqlalchemy.SQLAlchemy()
    sessions: list[Any] = []

    class Order(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        book = db.Column(db.String)

    @taskx.executor("confirm")
    def confirm(order: int) -> str:
        sessions.append(db.session())
        return f"{db.session.get(Order, order).book} is confirmed"

    file = tmp_path / "shop.db"
    app = make_app(
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{file}",
        TASKX_REPOSITORY=f"sqlite:///{file}?prefix=taskx_",
        TASKX_WORKERS=1,
    )
    db.init_app(app)

    @app.post("/orders/<book>/<end>")
    def add(book: str, end: str) -> str:
        order = Order(book=book)
        db.session.add(order)
        db.session.flush()
        handle = taskx.submit(confirm, {"order": order.id}, connection=db.session)
        getattr(db.session, end)()
        return handle.id

    with app.app_context():
        db.create_all()
        with db.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    client, queue = app.test_client(), queue_of(app)
    ids = [
        client.post(f"/orders/{book}/{end}").text
        for book, end in (("Emma", "commit"), ("Lost", "rollback"), ("Ulysses", "commit"))
    ]
    results = [queue.handle(id).result(timeout=60) for id in (ids[0], ids[2])]
    assert results == ["Emma is confirmed", "Ulysses is confirmed"]
    assert queue.list_tasks().total == 2
    with app.app_context():
        assert [order.book for order in db.session.query(Order)] == ["Emma", "Ulysses"]
        assert len({*sessions, db.session()}) == 3, "each execution has a session of its own"
        queue.stop()
        db.session.remove()
        db.engine.dispose()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that makes an app whose database has its tasks, and what it has."""
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    made: list[Any] = []

    def make(uri: str = f"sqlite:///{tmp_path / '50%.db'}", **config: Any) -> Any:
        db = flask_sqlalchemy.SQLAlchemy()
        taskx = Taskx(db=db)

        class Order(db.Model):
            id = db.Column(db.Integer, primary_key=True)
            book = db.Column(db.String)

        @taskx.executor("confirm")
        def confirm(order: int) -> str:
            return f"{db.session.get(Order, order).book} is confirmed"

        app = Flask("shop")
        app.config.update(SQLALCHEMY_DATABASE_URI=uri, TASKX_WORKERS=1, **config)
        db.init_app(app)
        taskx.init_app(app)

        @app.post("/orders/<book>/<end>")
        def add(book: str, end: str) -> str:
            order = Order(book=book)
            db.session.add(order)
            db.session.flush()
            handle = taskx.submit(confirm, {"order": order.id}, connection=db.session)
            getattr(db.session, end)()
            return handle.id

        made.append((app, db))
        return app, db, taskx

    yield make
    for app, db in made:
        queue_of(app).stop(cancel=True)
        queue_of(app).close()
        with app.app_context():
            db.session.remove()
            db.engine.dispose()


def test_the_tasks_are_in_the_database_of_the_app(shop):
    """One argument does the path, the prefix and the write-ahead log."""
    app, db, _ = shop()
    with app.app_context():
        db.create_all()
    ids = [app.test_client().post(f"/orders/{book}/commit").text for book in ("Emma", "Ulysses")]
    results = [queue_of(app).handle(task_id).result(timeout=60) for task_id in ids]
    assert results == ["Emma is confirmed", "Ulysses is confirmed"]


def test_a_file_that_is_there_already_gets_a_log(shop, tmp_path):
    file = tmp_path / "old.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE old (id)")
    app, _, taskx = shop(f"sqlite:///{file}")
    taskx.start(app)
    assert queue_of(app).list_tasks().total == 0


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"uri": "sqlite://"}, "requires an SQLite file, such as .*, not 'sqlite://'"),
        ({"TASKX_REPOSITORY": "memory://"}, "remove TASKX_REPOSITORY, or db="),
    ],
)
def test_a_database_that_cannot_have_tasks_is_refused(shop, config, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        shop(**config)


def test_the_database_must_know_the_app_first():
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///shop.db"
    with pytest.raises(ConfigurationError, match=r"call db.init_app\(app\) before"):
        Taskx(app, db=flask_sqlalchemy.SQLAlchemy())


@pytest.mark.parametrize("memory", [True, False])
def test_under_test_a_view_that_commits_has_its_task_run(shop, tmp_path, memory):
    """Nothing is called in between, and a database in memory is enough."""
    uri = "sqlite://" if memory else f"sqlite:///{tmp_path / 'shop.db'}"
    app, db, _ = shop(uri, TESTING=True)
    with app.app_context():
        db.create_all()
        with testing.inline(queue_of(app)) as queue:
            kept = app.test_client().post("/orders/Emma/commit").text
            lost = app.test_client().post("/orders/Lost/rollback").text
            ran = [task.id for task in queue.repository.list(TaskFilter())]
            assert ran == [kept]
            assert queue.get_task_status(kept).result == "Emma is confirmed"
            with pytest.raises(TaskNotFound):
                queue.get_task_status(lost)


def test_a_view_that_needs_a_log_says_so(taskx, make_app, tmp_path):
    """Its error names the cause, not that the queue could not start because of it."""
    file = tmp_path / "shop.db"
    app = make_app(TASKX_REPOSITORY=f"sqlite:///{file}?prefix=taskx_")
    taskx.executor("one")(lambda: 1)
    with closing(sqlite3.connect(file)) as connection, app.app_context():
        connection.execute("CREATE TABLE orders (id)")
        app.test_client().get("/")
        connection.execute("INSERT INTO orders VALUES (1)")
        with pytest.raises(RepositoryError, match=r"requires WAL.*PRAGMA journal_mode = WAL once"):
            taskx.submit("one", connection=connection)


# --- flask taskx


def test_the_commands_are_those_of_the_command_line(taskx, make_app):
    taskx.executor("one")(lambda: 1)
    app = make_app()
    runner = app.test_cli_runner()
    queue_of(app).submit("one", id="first")
    listed = runner.invoke(args=["taskx", "list", "--json"])
    assert listed.exit_code == 0, listed.output
    assert json.loads(listed.stdout.splitlines()[0])["id"] == "first"
    assert runner.invoke(args=["taskx", "cancel", "first"]).exit_code == 0
    assert queue_of(app).get_task_status("first").status is TaskStatus.CANCELLED
    assert "not started" in repr(queue_of(app))
    missing = runner.invoke(args=["taskx", "show", "nobody"])
    assert (missing.exit_code, missing.stderr.count("\n")) == (3, 1)
    usage = runner.invoke(args=["taskx", "lisst"])
    assert usage.exit_code == 2
    assert "did you mean 'list'" in usage.stderr


def test_the_help_of_flask_names_the_commands(make_app):
    runner = make_app().test_cli_runner()
    assert "See and steer the tasks of the app" in runner.invoke(args=["--help"]).output
    shown = runner.invoke(args=["taskx", "--help"]).output
    assert "dead-letters" in shown or "requeue" in shown
    assert "--repository" not in shown


def test_the_help_of_a_command_says_how_flask_calls_it(make_app):
    runner = make_app().test_cli_runner()
    worker = runner.invoke(args=["taskx", "worker", "--help"]).output
    called = worker.splitlines()[0].removeprefix("Usage: ").removesuffix(" worker [OPTIONS]")
    assert called.endswith(" taskx")
    assert f"$ {called} worker --processes 4" in worker
    assert "module:name" not in worker
    for command in COMMANDS:
        text = runner.invoke(args=["taskx", command.name, "--help"]).output
        assert f"$ {called} {command.name}" in text
        assert not re.search(r"(--app|--repository)\b", text)
    for text in (worker, runner.invoke(args=["taskx", "--help"]).output):
        assert not re.search(rf"(?<!{called.removesuffix('taskx')})\btaskx \w", text)
    refused = runner.invoke(args=["taskx", "tune", "--rate", "1/m"]).stderr
    assert f": {called} tune TYPE --rate 100/m" in refused


def test_a_worker_needs_an_app_that_its_processes_can_load(make_app):
    ran = make_app().test_cli_runner().invoke(args=["taskx", "worker"])
    assert ran.exit_code == 2
    assert "flask --app module:create_app taskx worker" in ran.stderr


def test_without_rich_the_command_names_the_extra(make_app, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    ran = make_app().test_cli_runner().invoke(args=["taskx", "list"])
    assert ran.exit_code == 2
    assert "pip install 'taskx-queue[cli]'" in ran.stderr


# --- the dashboard


def test_the_dashboard_is_closed_without_a_check(make_app):
    app = make_app(TASKX_DASHBOARD_URL="/taskx")
    answer = app.test_client().get("/taskx/")
    assert answer.status_code == 403
    assert "@taskx.dashboard_check" in answer.text
    assert app.test_client().get("/taskxx").status_code == 404
    assert app.test_client().get("/").text == "home"


def test_without_a_url_there_is_no_dashboard(taskx, make_app):
    taskx.dashboard_check(lambda: True)
    assert make_app().test_client().get("/taskx/").status_code == 404


@pytest.fixture
def guarded(taskx: Taskx, make_app: Any) -> Flask:
    """An app whose check looks into the session, as a login would."""

    @taskx.executor("one")
    def one() -> int:
        return 1

    @taskx.dashboard_check
    def check() -> Any:
        if "role" not in session:
            flask.abort(redirect(flask.url_for("home", next=request.path)))
        request.environ["REMOTE_USER"] = session["role"]
        return {"admin": True, "reader": ["read"], "guest": False}[session["role"]]

    app: Flask = make_app(TESTING=True, TASKX_DASHBOARD_URL="/ops/taskx")
    queue_of(app).submit(one, id="first")
    return app


def visit(app: Flask, role: str) -> Any:
    """Return a client that has logged in."""
    client = app.test_client()
    with client.session_transaction() as cookies:
        cookies["role"] = role
    return client


def test_the_check_sees_the_session_and_can_redirect(guarded):
    answer = guarded.test_client().get("/ops/taskx/tasks")
    assert (answer.status_code, answer.location) == (302, "/?next=/ops/taskx/tasks")
    assert visit(guarded, "guest").get("/ops/taskx/tasks").status_code == 403
    assert "first" in visit(guarded, "admin").get("/ops/taskx/tasks").text


def test_the_check_gives_permissions_and_the_name_for_the_log(guarded):
    change = {"data": {"type": "one"}, "headers": {"Sec-Fetch-Site": "same-origin"}}
    refused = visit(guarded, "reader").post("/ops/taskx/types/pause", **change)
    assert refused.status_code == 403
    done = visit(guarded, "admin").post("/ops/taskx/types/pause", **change)
    assert done.status_code == 303
    assert queue_of(guarded).paused.types
    assert [noted.by for noted in queue_of(guarded).changes()] == ["admin"]


def test_the_check_may_read_the_form(taskx, make_app):
    """It sees the fields of the pages, and the dashboard sees them after it."""
    read = []

    @taskx.dashboard_check
    def check() -> bool:
        read.append({**request.form} or request.get_json())
        return True

    app = make_app(TESTING=True, TASKX_DASHBOARD_URL="/taskx")
    queue_of(app).declare("one")
    form = {"data": {"type": "one"}, "headers": {"Sec-Fetch-Site": "same-origin"}}
    assert app.test_client().post("/taskx/types/pause", **form).status_code == 303
    assert queue_of(app).paused.types
    task_id = queue_of(app).submit("one").id
    answer = app.test_client().post("/taskx/api/cancel", json={"ids": [task_id]})
    assert answer.json["changed"] == 1
    assert read == [{"type": "one"}, {"ids": [task_id]}]


def test_an_error_of_the_check_is_a_closed_door(guarded):
    assert visit(guarded, "unknown").get("/ops/taskx/").status_code == 500


def test_the_links_of_the_dashboard_lead_into_it(guarded):
    page = visit(guarded, "admin").get("/ops/taskx/tasks")
    assert 'href="/ops/taskx/' in page.text
    static = visit(guarded, "admin").get("/ops/taskx/static/taskx.css")
    assert static.status_code == 200


@pytest.mark.process
def test_an_app_imports_neither_the_dashboard_nor_the_command_line(tmp_path: Path):
    program = (
        "import sys; from flask import Flask; from taskx.contrib.flask import Taskx\n"
        "app = Flask('x'); app.config.update(TASKX_REPOSITORY='memory://', TASKX_DASHBOARD_URL='/t')\n"
        "Taskx(app); app.testing = True; app.test_client().get('/')\n"
        "print([name for name in sys.modules if name in ('rich', 'taskx.programs')])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ran.stdout == "[]\n"
