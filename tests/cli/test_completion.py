"""Completion in the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class

from taskx import Queue, RepositoryUnavailable, SQLiteRepository, every
from taskx.programs.cli.app import make_group

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def complete(outside, monkeypatch):
    """A function that returns the words that are offered for the last word of a call."""
    monkeypatch.delenv("TASKX_REPOSITORY", raising=False)

    def run(*words: str, queue=outside) -> list[str]:
        shell = ShellComplete(make_group(queue), {}, "taskx", "_TASKX_COMPLETE")
        return [item.value for item in shell.get_completions([*words[:-1]], words[-1])]

    return run


@pytest.fixture
def tasks(outside):
    """Tasks of three types, one of them hostile."""
    outside.declare("email", "report", "$(reboot)")
    return [
        outside.submit("email", id="a-1"),
        outside.submit("report", id="a-2"),
        outside.submit("email", id="b-1"),
        outside.submit("$(reboot)", id="a-$(reboot)"),
        outside.submit("$(reboot)", id="a-\x1b[2J"),
    ]


def test_commands_and_options_are_completed(complete):
    assert complete("li") == ["list", "limits"]
    assert "--limit" in complete("list", "--li")


def test_ids_are_completed(tasks, complete):
    assert complete("show", "a") == ["a-2", "a-1"]
    assert set(complete("cancel", "a-1", "")) == {"a-1", "a-2", "b-1"}
    assert complete("show", "zzz") == []


def test_types_are_completed(tasks, complete):
    assert complete("pause", "") == ["email", "report"]
    assert complete("submit", "e") == ["email"]
    assert complete("failures", "--type", "r") == ["report"]


def test_filters_are_completed(tasks, complete):
    assert complete("list", "st") == ["status:"]
    assert complete("list", "status:f") == ["status:failed"]
    assert complete("list", "type:em") == ["type:email"]
    assert complete("cancel", "--where", "id:b") == ["id:b-1"]
    assert complete("list", "by:x") == []


def test_schedules_are_completed(outside, complete):
    outside.declare("email")
    outside.schedule("nightly", every(60), "email").store()
    assert complete("schedules", "p") == ["pause"]
    assert complete("schedules", "pause", "n") == ["nightly"]


def test_the_repository_is_the_one_in_the_line(tmp_path, complete):
    queue = Queue(SQLiteRepository(tmp_path / "tasks.db"))
    queue.declare("email")
    queue.submit("email", id="one")
    queue.close()
    url = f"sqlite:///{tmp_path}/tasks.db"
    assert complete("--repository", url, "show", "", queue=None) == ["one"]
    assert complete("show", "--repository", url, "", queue=None) == ["one"]


def test_a_failure_is_silent(complete, outside, monkeypatch, tmp_path, capfd):
    def away(*args, **kwargs):
        raise RepositoryUnavailable("away")

    assert complete("show", "", queue=None) == []
    assert complete("--repository", f"sqlite:///{tmp_path}/no.db", "show", "", queue=None) == []
    assert complete("--app", "no_such_module:queue", "show", "", queue=None) == []
    monkeypatch.setattr(outside, "list_tasks", away)
    assert complete("show", "") == []
    assert capfd.readouterr() == ("", "")
    assert [*tmp_path.iterdir()] == []


# Real shells


def source(shell: str) -> str:
    """Return the script that a user of a shell evaluates."""
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(make_group(), {}, "taskx", "_TASKX_COMPLETE").source()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_each_shell_gets_a_script(shell):
    script = source(shell)
    assert f"_TASKX_COMPLETE={shell}_complete" in script
    assert "_taskx_completion" in script


@pytest.mark.process
def test_bash_completes_words_with_colons(tmp_path):
    queue = Queue(SQLiteRepository(tmp_path / "tasks.db"))
    queue.declare("email")
    queue.submit("email", id="one")
    queue.close()
    program = tmp_path / "taskx"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m taskx "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(_TASKX_COMPLETE=bash_source taskx)"
        for COMP_LINE in "taskx show " "taskx list type:em"; do
            COMP_POINT=${#COMP_LINE}
            _taskx_completion taskx
            printf '%s\\n' "${COMPREPLY[@]}"
        done
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TASKX_REPOSITORY": f"sqlite:///{tmp_path}/tasks.db",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["one", "email"]  # bash keeps what is before the colon
    assert done.stderr == ""
