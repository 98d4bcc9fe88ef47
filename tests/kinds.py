"""The kinds of tests that ``make quick`` leaves out.

``conftest.py`` registers this module as a plugin. The plugin marks tests by the resources that they use,
fails a test that lacks a required mark, and prints how many tests of each kind were left out. ``setup.cfg``
declares the marks.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mariadb_server import INSTALLED as HAS_MARIADB
from mariadb_server import SERVER_USED as MARIADB_USED
from mongo_server import SERVER_USED
from postgres_server import SERVER_USED as POSTGRES_USED

#: Each test is counted for the first kind that fits.
KINDS = ("campaign", "mongo", "postgres", "mariadb", "browser", "process", "slow")

#: The kind of tests that use a fixture.
BY_FIXTURE = {"mongo_server": "mongo", "postgres_server": "postgres", "spawn": "process"}

#: The kind of tests that have a parameter.
BY_PARAMETER = {
    **dict.fromkeys(("mongo", "mongo-set", "mongomock", "standalone", "set"), "mongo"),
    **dict.fromkeys(("postgres", "django-postgres"), "postgres"),
    **dict.fromkeys(("mariadb", "django-mariadb"), "mariadb"),
}

#: The kind of all tests in a folder.
TESTS = Path(__file__).parent
BY_FOLDER = {
    TESTS / "campaign": "campaign",
    TESTS / "engines": "process",
    TESTS / "storage" / "mongo": "mongo",
    TESTS / "dashboard" / "browser": "browser",
}

#: The reason for which tests in a browser are skipped if there is none.
NO_BROWSER = "Chromium is missing"

#: The reason for which tests of engines are skipped if there is no RabbitMQ.
NO_RABBITMQ = "RabbitMQ is missing"

#: The reason for which tests on MariaDB are skipped if it is not installed.
NO_MARIADB = "MariaDB is missing"

#: The reasons for which tests of networks of hosts are skipped.
NO_NAMESPACES = "network namespaces cannot be made"
NO_NETEM = "the kernel has no netem"

#: The reason for which tests of a full disk of a server are skipped.
NO_SMALL_DISK = "a small disk cannot be mounted"

#: The reason for which tests of connections with ``autocommit=`` are skipped on older Pythons.
NO_MANUAL_COMMITS = "sqlite3 has no autocommit before Python 3.12"

#: The lines that say at the very end what did not run, by the reason of the skipped tests.
MISSING = {
    NO_BROWSER: "CHROMIUM IS MISSING: {} tests of the dashboard in a browser did not run",
    NO_RABBITMQ: "RABBITMQ IS MISSING: {} tests of engines did not run",
    NO_MARIADB: "MARIADB IS MISSING: {} tests of Django's database did not run on it",
    NO_NAMESPACES: "NETWORK NAMESPACES ARE MISSING: the tests of hosts ran on loopback addresses",
    NO_MANUAL_COMMITS: "PYTHON 3.12 IS MISSING: {} states of connections were not checked",
    NO_SMALL_DISK: "MOUNTS ARE MISSING: {} tests of a PostgreSQL server with a full disk did not run",
    NO_NETEM: "TC NETEM IS MISSING: a proxy delayed the traffic of the slow host",
}

#: Audit events for which a test needs a mark.
NEEDS_MARK = {
    SERVER_USED: "uses a MongoDB server: mark it with @pytest.mark.mongo",
    MARIADB_USED: "uses a MariaDB server: mark it with @pytest.mark.mariadb",
    POSTGRES_USED: "uses a PostgreSQL server: mark it with @pytest.mark.postgres",
    "os.fork": "forks: mark it with @pytest.mark.process",
    "os.forkpty": "forks: mark it with @pytest.mark.process",
    "os.posix_spawn": "starts a program: mark it with @pytest.mark.process",
    "os.system": "starts a program: mark it with @pytest.mark.process",
    "subprocess.Popen": "starts a program: mark it with @pytest.mark.process",
}

_heard: set[str] = set()
_left_out: Counter[str] = Counter()


def _hear(event: str, args: Any) -> None:
    if event in NEEDS_MARK:
        _heard.add(event)


sys.addaudithook(_hear)


def marks_of(item: pytest.Item) -> Iterator[str]:
    """Yield the marks of a test, by its fixtures, its parameters and its folder."""
    for fixture in getattr(item, "fixturenames", ()):
        if fixture in BY_FIXTURE:
            yield BY_FIXTURE[fixture]
    if callspec := getattr(item, "callspec", None):
        for value in callspec.params.values():
            if isinstance(value, str) and value in BY_PARAMETER:
                yield BY_PARAMETER[value]
    for folder in item.path.parents:
        if folder in BY_FOLDER:
            yield BY_FOLDER[folder]


def kind_of(item: pytest.Item) -> str:
    """Return the first kind of a test, or an empty text for a quick test."""
    return next(filter(item.get_closest_marker, KINDS), "")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in set(marks_of(item)):
            item.add_marker(mark)
        if not HAS_MARIADB and item.get_closest_marker("mariadb"):
            reason = (
                f"{NO_MARIADB}: install Debian's packages mariadb-server-core, mariadb-client-core"
            )
            item.add_marker(pytest.mark.skip(reason=reason))


# The guard


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _heard.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fail a test that lacks a required mark, in every run and not only in a quick one."""
    yield
    if _heard and not any(map(item.get_closest_marker, KINDS[:-1])):
        # A set, because from Python 3.13 on subprocess.Popen may call os.posix_spawn: the same text twice.
        done = "; ".join(sorted({f"this test {NEEDS_MARK[event]}" for event in _heard}))
        pytest.fail(done, pytrace=False)


# The count


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if kind := kind_of(item):
            _left_out[kind] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes reports to the first one
        session.config.workeroutput["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the count of any other process: all of them collect the same tests."""
    if not _left_out:
        _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say at the very end, below the skipped tests, what did not run."""
    yield
    skipped = terminalreporter.stats.get("skipped", ())
    for reason, words in MISSING.items():
        if missed := sum(reason in str(report.longrepr) for report in skipped):
            line = f"!!!! {words.format(missed)} !!!!"
            terminalreporter.write_line(line, red=True, bold=True)
    if _left_out and terminalreporter.config.option.markexpr:
        counts = ", ".join(f"{_left_out[kind]} {kind}" for kind in KINDS if _left_out[kind])
        terminalreporter.write_line(
            f"left out: {counts}; CONTRIBUTING.rst describes these kinds, make test runs them"
        )
