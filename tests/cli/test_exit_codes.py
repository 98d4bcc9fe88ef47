"""The exit codes, each of them; and that every error is one line on stderr."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import PATIENCE

from taskx import Queue, SQLiteRepository
from taskx.programs.cli import errors
from taskx.programs.cli.app import EPILOG

from .conftest import call

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def url(tmp_path):
    """The URL of a file with a pending task ``one``."""
    queue = Queue(SQLiteRepository(tmp_path / "tasks.db"))
    queue.declare("email")
    queue.submit("email", {"n": 1}, id="one")
    queue.close()
    return f"sqlite:///{tmp_path}/tasks.db"


@contextmanager
def program(*args: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``python -m taskx`` during a block."""
    command = [sys.executable, "-m", "taskx", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as started:
        try:
            yield started
        finally:
            started.kill()


def test_0_is_ok(url):
    assert call("list", "--repository", url).code == 0
    assert call("--help").code == 0
    assert call("--version").code == 0


def test_1_is_unhealthy_or_failed(url):
    assert call("check", "--repository", url).code == 1
    assert call("wait", "one", "--timeout", "0s", "--repository", url).code == 1


def test_1_is_also_an_error_that_nobody_expected(url, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no \x1b[31mway")

    monkeypatch.setattr(Queue, "stats", fail)
    said = call("stats", "--repository", url)
    assert said.code == 1
    assert said.err == "taskx: unexpected RuntimeError: no \\x1b[31mway; --debug shows where\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["list"], "which repository? Give --repository sqlite:///tasks.db or --app module:queue"),
        (["list", "--repository", "sqlite:tasks.db"], "use sqlite:///relative.db"),
        (["list", "--repository", "memory://"], "empty in this one"),
        (["list", "--repository", "foo://x"], "'foo://x' is not the URL of a repository"),
        (["list", "--repository", "sqlite:///x.db?mode=ro"], "unknown option mode"),
        (["list", "--app", "shop"], "write module:name, such as app:queue"),
        (["list", "--app", "no_such_module:queue"], "there is no module 'no_such_module'"),
        (["list", "--app", "json:loads"], "cannot be called without arguments"),
        (["list", "--app", "json:decoder"], "is not a queue"),
        (["list", "--app", "a:b", "--repository", "sqlite:///x"], "give only one of them"),
        (["lst"], "there is no command 'lst'; did you mean 'list'?"),
        (["zzzzzzz"], "there is no command 'zzzzzzz'; see taskx --help"),
        (["list", "--limt", "5"], "No such option"),
        (["--jsn", "list"], "No such option"),
        (["list", "--limit"], "requires an argument"),
        (["list", "--limit", "x"], "'x' is not a valid integer"),
        (["show"], "Missing argument 'ID'"),
    ],
)
def test_2_is_a_wrong_call(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(*args)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert said.err.startswith("taskx: ")
    assert said.err.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_3_is_not_found(url):
    for command in ("show", "why", "wait", "tail", "cancel", "requeue", "delete"):
        assert call(command, "nope", "--repository", url).code == 3


def test_4_is_a_conflict(url):
    assert call("submit", "email", "--id", "one", "--repository", url).code == 4
    assert call("requeue", "one", "--repository", url).code == 4


def test_5_is_a_repository_that_is_away(tmp_path, url):
    missing = f"sqlite:///{tmp_path}/missing.db"
    before = sorted(tmp_path.rglob("*"))
    for args in (
        ["list"],
        ["check"],
        ["why", "one"],
        ["submit", "email"],
        ["pause", "email"],
        ["schedules"],
        ["top"],
    ):
        said = call(*args, "--repository", missing)
        assert said.code == 5, args
        assert "there is no file" in said.err + said.out
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "other.db").write_text("this is no database, but it is long enough to look at")
    assert call("list", "--repository", f"sqlite:///{tmp_path}/other.db").code == 5


def test_the_program_of_a_mounted_command_may_make_its_file_afterwards(tmp_path):
    queue = Queue(SQLiteRepository(tmp_path / "tasks.db"))
    queue.declare("email")
    assert call("list", queue=queue).code == 5
    queue.submit("email", id="one")
    assert "one" in call("list", queue=queue).out
    queue.close()


def test_an_earlier_file_is_not_migrated(tmp_path):
    path = tmp_path / "tasks.db"
    kept = ROOT / "tests" / "storage" / "versions" / "version-1.sqlite"
    path.write_bytes(kept.read_bytes())
    said = call("list", "--repository", f"sqlite:///{path}")
    assert said.code == 5
    assert "has schema version 1" in said.err
    assert f"run `taskx migrate {path} NEW`" in said.err
    assert path.read_bytes() == kept.read_bytes()


def test_130_is_an_interrupt(url, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Queue, "stats", interrupt)
    said = call("stats", "--repository", url)
    assert (said.code, said.err) == (130, "taskx: interrupted\n")


@pytest.mark.process
def test_ctrl_c_ends_a_real_program_with_130(url):
    with program("tail", "one", "--repository", url, "--interval", "10ms") as tail:
        assert tail.stdout.readline() == "pending\n"
        tail.send_signal(signal.SIGINT)
        out, err = tail.communicate(timeout=PATIENCE)
    assert (tail.returncode, out, err) == (130, "", "taskx: interrupted\n")


@pytest.mark.process
def test_141_is_a_reader_that_has_gone_away(url, tmp_path):
    queue = Queue(SQLiteRepository(tmp_path / "tasks.db"))
    queue.declare("email")
    for _ in range(300):
        queue.submit("email", {"text": 500 * "x"})
    queue.close()
    with program("list", "--all", "--json", "--repository", url) as listing:
        listing.stdout.readline()
        listing.stdout.close()
        err = listing.stderr.read()
        assert (listing.wait(PATIENCE), err) == (141, "")


def test_debug_shows_the_traceback(url, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no way")

    monkeypatch.setattr(Queue, "stats", fail)
    from click.testing import CliRunner

    from taskx.programs.cli.app import make_group

    result = CliRunner().invoke(make_group(), ["stats", "--repository", url, "--debug"])
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("taskx: unexpected RuntimeError: no way; --debug shows where\n")


def documented() -> dict[int, str]:
    """Return the table of exit codes in the documentation."""
    page = (ROOT / "docs" / "command-line.rst").read_text(encoding="utf-8")
    table = page.partition(".. table:: Exit codes")[2].partition("An error is")[0]
    return {
        int(code): words for code, words in re.findall(r"^ +(\d+)  +(\S.*)$", table, re.MULTILINE)
    }


def test_the_exit_codes_are_documented_and_tested():
    names = (
        "OK",
        "FAILED",
        "USAGE",
        "NOT_FOUND",
        "CONFLICT",
        "AWAY",
        "RECYCLE",
        "INTERRUPTED",
        "CLOSED",
    )
    codes = {getattr(errors, name) for name in names}
    assert documented().keys() == codes
    assert {int(code) for code in re.findall(r"(\d+) [a-z]", EPILOG)} == codes - {errors.CLOSED}
    tests = [
        node.name for node in ast.parse(Path(__file__).read_text()).body if hasattr(node, "name")
    ]
    tested = {int(found[1]) for name in tests if (found := re.match(r"test_(\d+)_", name))}
    assert codes - tested == {errors.RECYCLE}  # tests/supervising has it


@pytest.mark.parametrize(
    "args",
    [
        ["prune", "--older", "999999999d", "--yes"],
        ["failures", "--since", "999999999d"],
        ["submit", "email", "--delay", "999999999d"],
        ["submit", "email", "--delay", "1d", "--expires", "999999999d"],
    ],
)
def test_a_duration_may_be_longer_than_the_calendar(url, args):
    said = call(*args, "--repository", url)
    assert (said.code, "unexpected" in said.err) == (0, False)


def test_a_file_may_be_named_by_its_path(url, tmp_path):
    path = url.removeprefix("sqlite:///")
    assert [row["id"] for row in call("list", "--json", "--repository", path).rows] == ["one"]
    assert [row["id"] for row in call("list", "--json", TASKX_REPOSITORY=path).rows] == ["one"]
    said = call("list", "--repository", f"{tmp_path}/missing.db")
    assert (said.code, said.err.startswith("taskx: there is no file ")) == (5, True)


@pytest.mark.process
def test_the_version_is_told_before_anything_else_is_imported():
    """So a script that asks for it need not wait, nor install the packages of the command line."""
    child = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "taskx", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert child.stdout == call("--version").out
    imported = {line.rpartition("|")[2].strip() for line in child.stderr.splitlines()}
    own = {name for name in imported if name.partition(".")[0] == "taskx"}
    assert own == {"taskx", "taskx.programs", "taskx.programs.cli"}
    assert not imported & {"attr", "click", "logging", "rich", "sqlite3"}


@pytest.mark.process
def test_the_command_works_without_its_packages_only_as_far_as_to_say_so(tmp_path):
    (tmp_path / "click.py").write_text("raise ModuleNotFoundError('no', name='click')")
    done = subprocess.run(
        [sys.executable, "-m", "taskx", "list"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "taskx: the command line needs the package click: pip install 'taskx-queue[cli]'\n"
    )
