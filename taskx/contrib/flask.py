"""TaskX in Flask: the extension :class:`Taskx`. It needs Flask: ``pip install 'taskx-queue[flask]'``.

The commands ``flask taskx …`` and the dashboard need the extras ``cli`` and ``dashboard``, too. They are
imported at their first use.
"""

from __future__ import annotations

import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from contextvars import Context as Variables
from copy import copy
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, overload
from urllib.parse import quote

import attrs

try:
    import click
    from flask import Flask, current_app, has_request_context
    from flask.cli import ScriptInfo
    from werkzeug.exceptions import Forbidden
except ImportError as error:
    raise ImportError(
        f"the Flask extension needs the package {error.name}: pip install 'taskx-queue[flask]'",
        name=error.name,
    ) from error

from taskx import (
    BoundExecutor,
    Codec,
    Config,
    ConfigurationError,
    Context,
    Executor,
    Hook,
    Middleware,
    PayloadError,
    Queue,
    QueueStopped,
    RepositoryError,
    Task,
    TaskExecutor,
    TaskHandle,
    UnknownTaskType,
    executor,
    open_repository,
)

if TYPE_CHECKING:
    import logging

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from flask_sqlalchemy import SQLAlchemy
    from typing_extensions import Unpack  # in typing from 3.11 on

    from taskx.attempt.executors import BatchDecorator, ExecutorDecorator
    from taskx.attempt.registry import Layer
    from taskx.tasks.checks import Duration
    from taskx.tasks.options import ExecutorOptions, PlainOptions, SubmitOptions
    from taskx.tasks.ticks import Every

R = TypeVar("R")
#: The check of the dashboard: it returns permissions, True for all of them, or False or None for none.
Check = Callable[[], "Iterable[str] | bool | None"]
C = TypeVar("C", bound=Check)

#: The name of the extension in ``app.extensions``.
NAME = "taskx"

_PREFIX = "TASKX_"
# The keys that set a field of Config: TASKX_BUFFER_SIZE for buffer_size, and so on.
_FIELDS: Mapping[str, str] = {
    "TASKX_WORKERS" if field.name == "worker_num" else _PREFIX + field.name.upper(): field.name
    for field in attrs.fields(Config)
}
_REPOSITORY, _EMBEDDED, _DASHBOARD = "TASKX_REPOSITORY", "TASKX_EMBEDDED", "TASKX_DASHBOARD_URL"
#: All config keys.
KEYS: tuple[str, ...] = (_REPOSITORY, _EMBEDDED, _DASHBOARD, *_FIELDS)

# Seconds between two tries to start a queue whose repository is away.
_PATIENCE = 5.0
# The WSGI key with the result of the check of the dashboard.
_GRANTED = "taskx.flask.granted"


class Taskx:
    """The Flask extension: a queue for each app.

    Make one for a program, register executors with it, and call :meth:`init_app` for each app::

        taskx = Taskx()

        @taskx.executor("report")
        def report(month: str) -> str: ...

        def create_app():
            app = Flask(__name__)
            app.config.from_prefixed_env()  # FLASK_TASKX_REPOSITORY=sqlite:///tasks.db
            taskx.init_app(app)
            return app

    The queue of an app starts with the first request that a process answers. So no command starts it, no
    parent of the debug reloader, and no process that only forks others. An app with ``TESTING`` never
    starts it. Executors run inside the context of their app, without a request.

    Args:
        app: an app, if there is only one and it exists already.
        db: the ``SQLAlchemy`` object of Flask-SQLAlchemy. The tasks are then in tables ``taskx_…`` of its
            SQLite file, in place of ``TASKX_REPOSITORY``, and the file gets a write-ahead log. Call
            ``db.init_app(app)`` first.
        hooks: hooks of the queues, as of :class:`Queue`.
        middleware: middleware of the queues, called inside the context of the app.
        codec: the codec or codecs of the repositories, as of ``open_repository``.
        logger: the logger of the queues.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        db: SQLAlchemy | None = None,
        hooks: Iterable[Hook] = (),
        middleware: Iterable[Middleware | Layer] = (),
        codec: Codec | Iterable[Codec] | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        self._db = db
        self._hooks = tuple(hooks)
        self._middleware = tuple(middleware)
        self._codec = codec
        self._logger = logger
        self._executors: list[tuple[TaskExecutor | Executor[Any, Any], dict[str, Any]]] = []
        self._declared: list[str] = []
        self._schedules: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._check: Check | None = None
        # The queues of the apps, for executors that are registered later.
        self._queues: weakref.WeakSet[Queue] = weakref.WeakSet()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give an app its queue, the commands ``flask taskx``, and the dashboard if it has a URL.

        Starts nothing and opens no file, but for that of ``db`` if it exists.

        Raises:
            ConfigurationError: a config key is missing, unknown or not valid, a schedule is not valid, the
                app has a queue already, or its database cannot have tasks.
        """
        if NAME in app.extensions:
            raise ConfigurationError(
                f"app {app.name!r} has a Taskx already: call init_app() once for each app"
            )
        settings = _settings_of(app, self._db)
        queue = Queue(
            open_repository(settings.repository, codec=self._codec),
            settings.config,
            self._logger,
            hooks=self._hooks,
            middleware=[_inside(app), *self._middleware],
        )
        for made, options in self._executors:
            queue.register_executor(_copy(made), **options)
        queue.declare(*self._declared)
        for given, options in self._schedules:
            _schedule(queue, given, options)
        self._queues.add(queue)
        state = AppState(self, app, queue, embedded=settings.embedded)
        app.extensions[NAME] = state
        app.wsgi_app = _Entrance(  # type: ignore[method-assign]
            app, state, app.wsgi_app, settings.dashboard_url
        )
        app.cli.add_command(_Commands(state))

    # --- before the app exists

    @overload
    def executor(
        self,
        type: str | None = None,
        *,
        batch: int,
        wait: Duration | None = None,
        **options: Unpack[PlainOptions],
    ) -> BatchDecorator: ...
    @overload
    def executor(
        self, type: str | None = None, **options: Unpack[PlainOptions]
    ) -> ExecutorDecorator: ...
    def executor(self, type: str | None = None, **options: Any) -> ExecutorDecorator:
        """Turn the decorated function into an executor of all apps, also of those made later.

        Its ``submit`` submits to the queue of the current app. The arguments are those of
        ``Queue.executor``.

        Raises:
            ConfigurationError: an option is not valid, or the function cannot be an executor.
        """
        decorator = executor(type, **options)

        def make(function: Callable[..., Any]) -> Executor[Any, Any]:
            made: Executor[Any, Any] = decorator(function)
            self.register_executor(made)
            return made

        return make  # type: ignore[return-value]  # the decorator, for type checkers

    def register_executor(
        self, executor: TaskExecutor | Executor[Any, Any], **options: Unpack[ExecutorOptions]
    ) -> None:
        """Register an executor that was made elsewhere, with all apps.

        Raises:
            ConfigurationError: it is not an executor, an option is not valid, or the type is taken.
        """
        for queue in [*self._queues]:
            queue.register_executor(_copy(executor), **options)
        self._executors.append((executor, {**options}))
        if isinstance(executor, Executor):
            executor._bind(self)

    def declare(self, *types: str) -> None:
        """Accept tasks of types whose executors are registered only in another process."""
        for queue in [*self._queues]:
            queue.declare(*types)
        self._declared += types

    def schedule(
        self,
        name: str,
        spec: str | Every,
        task: Task | Executor[..., Any] | BoundExecutor[..., Any] | str,
        params: dict[str, Any] | None = None,
        /,
        **options: Any,
    ) -> None:
        """Declare a schedule; each app stores it when its queue starts, here or in ``flask taskx worker``.

        The arguments are those of ``Queue.schedule``. :meth:`init_app` checks them, or this call if it
        comes later.

        Raises:
            ConfigurationError: an app has a queue, and the schedule is not valid.
        """
        given = (name, spec, task) if params is None else (name, spec, task, params)
        for queue in [*self._queues]:
            _schedule(queue, given, options)
        self._schedules.append((given, options))

    def dashboard_check(self, check: C) -> C:
        """Let the decorated function decide who may use the dashboard. Without one it is closed.

        The function is called for each request to the dashboard, inside that request's context, without
        arguments. It returns the permissions (see ``taskx.dashboard.PERMISSIONS``), True for all of them,
        or False for none. It can also call ``flask.abort()``, for example with a redirect to a login. Set
        ``request.environ["REMOTE_USER"]`` to have the user's name in the log of changes.
        """
        self._check = check
        return check

    # --- the current app

    @property
    def queue(self) -> Queue:
        """The queue of the current app.

        Raises:
            RuntimeError: there is no app context.
            ConfigurationError: :meth:`init_app` was not called for this app.
        """
        return _state_of(current_app).queue

    @property
    def stopped(self) -> bool:
        """False: there may always be another app."""
        return False

    @overload
    def submit(
        self, task: Task, /, *, connection: object = None, **options: Unpack[SubmitOptions]
    ) -> TaskHandle[Any]: ...
    @overload
    def submit(
        self,
        executor: Executor[..., R] | BoundExecutor[..., R],
        params: dict[str, Any] | None = None,
        /,
        *,
        connection: object = None,
        **options: Unpack[SubmitOptions],
    ) -> TaskHandle[R]: ...
    @overload
    def submit(
        self,
        type: str,
        params: dict[str, Any] | None = None,
        /,
        *,
        connection: object = None,
        **options: Unpack[SubmitOptions],
    ) -> TaskHandle[Any]: ...
    def submit(self, task: Any, params: Any = None, /, **options: Any) -> TaskHandle[Any]:
        """Submit a task to the queue of the current app. The arguments are those of ``Queue.submit``."""
        handle: TaskHandle[Any] = self.queue.submit(task, params, **options)
        return handle

    def start(self, app: Flask | None = None) -> None:
        """Start the queue of an app in this process, without waiting for a request.

        Call it in a hook of the server, such as ``post_worker_init`` of gunicorn. It does nothing if
        ``TASKX_EMBEDDED`` is false, or if the queue is started already.

        Args:
            app: the app; the current one by default.

        Raises:
            ConfigurationError: :meth:`init_app` was not called for this app.
            TaskxError: the errors of ``Queue.start``.
        """
        _state_of(app or current_app).start()


class AppState:
    """The state of an app: ``app.extensions["taskx"]``.

    Attributes:
        queue: the queue of the app.
        embedded: True if processes that answer requests also run tasks.
    """

    def __init__(self, taskx: Taskx, app: Flask, queue: Queue, *, embedded: bool) -> None:
        self._taskx = taskx
        self._app = app
        self.queue = queue
        self.embedded = embedded
        self._started_in: dict[int, object] = {}  # the ids of processes: a fork copies it
        self._again_at = 0.0

    @property
    def check(self) -> Check | None:
        """The check of the dashboard."""
        return self._taskx._check

    def start(self) -> None:
        """Start the queue, if tasks run in the processes of the site."""
        if self.embedded:
            self.queue.start()

    def answer(self) -> None:
        """Start the queue at the first request of this process.

        If the repository is away, the request goes on, and a later one tries again.
        """
        pid = os.getpid()
        if pid in self._started_in or self._app.testing or time.monotonic() < self._again_at:
            return
        mine = object()
        if self._started_in.setdefault(pid, mine) is not mine:  # another thread starts it
            return
        try:
            self.start()
        except QueueStopped:
            return
        except BaseException as error:
            self._again_at = time.monotonic() + _PATIENCE
            del self._started_in[pid]
            if not isinstance(error, RepositoryError):
                raise
            self._app.logger.error("the task queue cannot be started yet: %s", error)

    def answered(self) -> None:
        """Under test, run what the request has submitted and committed, if submits run tasks there."""
        if self._app.testing:
            from taskx.testing import InlineQueue

            if isinstance(self.queue, InlineQueue):
                self.queue.drain()


class _Entrance:
    """The WSGI app of an app with TaskX: requests start the queue, and find the dashboard."""

    def __init__(
        self, app: Flask, state: AppState, inner: WSGIApplication, dashboard_url: str | None
    ) -> None:
        self._app = app
        self._state = state
        self._inner = inner
        self._url = dashboard_url

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self._state.answer()
        path: str = environ.get("PATH_INFO", "")
        if self._url is None or not f"{path}/".startswith(f"{self._url}/"):
            answer = self._inner(environ, start_response)
            self._state.answered()
            return answer
        granted = self._granted(environ)
        mounted = {
            **environ,  # the check may have set REMOTE_USER
            "SCRIPT_NAME": environ.get("SCRIPT_NAME", "") + self._url,
            "PATH_INFO": path.removeprefix(self._url),
            _GRANTED: granted,
        }
        return self._dashboard(mounted, start_response)

    def _granted(self, environ: WSGIEnvironment) -> Any:
        """Return what the app's check returns or raises."""
        if self._state.check is None:
            return Forbidden(
                "The dashboard is closed: the app has no check of its requests. Decorate a function with "
                "@taskx.dashboard_check; it returns True if the request may see and change everything."
            )
        from taskx.programs.dashboard.bodies import kept_body, largest_body

        most = largest_body(self._state.queue)
        try:
            with kept_body(environ, most), self._app.request_context(environ):
                return self._state.check()
        except Exception as error:  # noqa: BLE001  (the dashboard makes a page of it)
            return error

    @cached_property
    def _dashboard(self) -> WSGIApplication:
        from taskx.programs.dashboard import ALL, Dashboard

        def permissions(environ: Mapping[str, Any]) -> Iterable[str] | None:
            granted = environ[_GRANTED]
            if isinstance(granted, Exception):
                raise granted
            return ALL if granted is True else granted or None

        return Dashboard(self._state.queue, permissions=permissions)


class _Commands(click.Group):
    """The command ``flask taskx``. Its commands are imported when it is called."""

    def __init__(self, state: AppState) -> None:
        super().__init__(NAME, short_help="See and steer the tasks of the app, and run them.")
        self._state = state

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Go on with the group of all commands, on the queue of the app."""
        try:
            import rich  # noqa: F401

            from taskx.programs.cli.app import make_group
        except ImportError as error:
            raise click.UsageError(
                f"the command line needs the package {error.name}: pip install 'taskx-queue[cli]'"
            ) from error
        group = make_group(lambda: self._state.queue, target=_target_of_worker)
        return group.make_context(info_name, args, parent, **extra)


def _target_of_worker() -> str:
    """Return the place of the queue for the processes of a worker, which load the app as ``flask`` does."""
    info = click.get_current_context().find_object(ScriptInfo)
    if info is None or info.create_app is not None:
        raise ConfigurationError(
            "the processes of a worker cannot make the app of this command line again: run it as "
            "flask --app module:create_app taskx worker"
        )
    if info.app_import_path:
        os.environ["FLASK_APP"] = info.app_import_path
    return f"{__name__}:load_queue"


def load_queue() -> Queue:
    """Return the queue of the app that ``flask`` would find: in ``FLASK_APP``, ``wsgi.py`` or ``app.py``.

    It is a queue for other programs to name: ``taskx top --app taskx.contrib.flask:load_queue``.

    Raises:
        ConfigurationError: the app has no Taskx.
    """
    return _state_of(ScriptInfo(app_import_path=os.environ.get("FLASK_APP")).load_app()).queue


def _state_of(app: Flask) -> AppState:
    state: AppState | None = app.extensions.get(NAME)
    if state is None:
        raise ConfigurationError(f"app {app.name!r} has no Taskx: call taskx.init_app(app)")
    return state


def _inside(app: Flask) -> Layer:
    """Return middleware that runs executors inside the context of an app, and outside of any request."""

    def in_app_context(ctx: Context, task: Task, call_next: Callable[[], Any]) -> Any:
        def run() -> Any:
            with app.app_context():
                return call_next()

        # A thread that answers a request may run a task: overflow="caller_runs", or a queue for tests.
        return Variables().run(run) if has_request_context() else run()

    return in_app_context


def _copy(made: TaskExecutor | Executor[Any, Any]) -> TaskExecutor | Executor[Any, Any]:
    """Return an executor for one queue; the given one submits to the queue of the current app."""
    return copy(made) if isinstance(made, Executor) else made


def _schedule(queue: Queue, given: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Declare a schedule of a queue; an error names the schedule."""
    try:
        queue.schedule(*given, **options)
    except (ConfigurationError, PayloadError, UnknownTaskType, TypeError) as error:
        raise ConfigurationError(f"schedule {given[0]!r}: {error}") from error


# --- settings


@attrs.frozen
class _Settings:
    repository: str
    embedded: bool
    dashboard_url: str | None
    config: Config


def _settings_of(app: Flask, db: SQLAlchemy | None) -> _Settings:
    """Return the settings in the config of an app.

    Raises:
        ConfigurationError: a key is missing or unknown, or a value is not valid.
    """
    given = {key: value for key, value in app.config.items() if key.startswith(_PREFIX)}
    for key in given:
        if key not in KEYS:
            # Without the prefix, which all of them share: it would make any two of them similar.
            names = {known.removeprefix(_PREFIX): known for known in KEYS}
            close = get_close_matches(key.removeprefix(_PREFIX), names, n=1)
            hint = f"; did you mean {names[close[0]]!r}?" if close else f"; use {', '.join(KEYS)}"
            raise ConfigurationError(f"there is no setting {key!r}{hint}")
    if db is not None:
        if given.get(_REPOSITORY) is not None:
            raise ConfigurationError(
                f"with Taskx(db=db) the tasks are in the database of the app: remove {_REPOSITORY}, or db="
            )
        given[_REPOSITORY] = _repository_in(app, db)
    if not isinstance(given.get(_REPOSITORY), str):
        raise ConfigurationError(
            f"app.config[{_REPOSITORY!r}] must be a URL, such as 'sqlite:///tasks.db', not "
            f"{given.get(_REPOSITORY)!r}"
        )
    embedded = given.get(_EMBEDDED, True)
    if not isinstance(embedded, bool):
        raise ConfigurationError(f"{_EMBEDDED} must be true or false, not {embedded!r}")
    return _Settings(given[_REPOSITORY], embedded, _path(given.get(_DASHBOARD)), _config_of(given))


def _repository_in(app: Flask, db: SQLAlchemy) -> str:
    """Return the URL of the tables of TaskX in the database of an app. See to its write-ahead log.

    Raises:
        ConfigurationError: it is no SQLite file, or not known yet.
    """
    if "sqlalchemy" not in app.extensions:
        raise ConfigurationError("call db.init_app(app) before taskx.init_app(app)")
    from sqlalchemy import event

    with app.app_context():
        engine = db.engine
    file = engine.url.database or ":memory:"
    if app.testing and file == ":memory:":  # a queue for tests takes its connection all the same
        return "memory://"
    if engine.dialect.name != "sqlite" or file == ":memory:" or file.startswith("file:"):
        raise ConfigurationError(
            "Taskx(db=db) requires an SQLite file, such as SQLALCHEMY_DATABASE_URI = "
            f"'sqlite:///shop.db', not {engine.url.render_as_string(hide_password=True)!r}; for tasks "
            f"elsewhere, set {_REPOSITORY} in place of db="
        )
    if os.path.exists(file):
        with closing(sqlite3.connect(file)) as connection:
            _use_log(connection)
    event.listen(engine, "connect", _use_log)  # the file may not exist yet
    return f"sqlite:///{quote(file)}?prefix=taskx_"


def _use_log(connection: Any, _: object = None) -> None:
    """Give a file that is open a write-ahead log. The file keeps it."""
    with suppress(sqlite3.Error):  # the queue says later what it misses
        connection.execute("PRAGMA journal_mode = WAL")


def _path(url: Any) -> str | None:
    if url is None:
        return None
    if not (isinstance(url, str) and url.startswith("/") and url.strip("/")):
        raise ConfigurationError(f"{_DASHBOARD} must be a path, such as '/taskx', not {url!r}")
    return url.rstrip("/")


def _config_of(given: Mapping[str, Any]) -> Config:
    wanted = {key: given[key] for key in _FIELDS if key in given}
    for key, value in wanted.items():  # one by one, so that the error names the key
        try:
            Config(**{_FIELDS[key]: value})
        except ConfigurationError as error:
            raise ConfigurationError(f"{key}: {error}") from None
    return Config(**{_FIELDS[key]: value for key, value in wanted.items()})
