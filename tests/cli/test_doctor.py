"""``taskx doctor``."""

from __future__ import annotations

import pytest

from cli.conftest import call
from taskx.tasks.findings import fail, ok, warn


@pytest.fixture
def found(repository, monkeypatch):
    """The checks that the repository tells."""
    checks = [ok("file", "Fine."), warn("log", "It is \x1b[31mlarge.", "Look.")]
    monkeypatch.setattr(type(repository.house), "examine", lambda self: iter(checks))
    return checks


def test_each_check_is_a_line_with_its_level_and_its_advice(taskx, found):
    said = taskx("doctor")
    assert said.code == 0
    assert said.lines[1:3] == ["ok    file: Fine.", r"warn  log: It is \x1b[31mlarge. Look."]


def test_a_failure_is_exit_code_one(taskx, found):
    found.append(fail("disk", "It is full.", "Free some space."))
    said = taskx("doctor", "--json")
    assert said.code == 1
    assert [row["level"] for row in said.rows] == ["ok", "ok", "warn", "fail"]
    assert said.rows[-1]["sentence"] == "It is full."


def test_a_missing_file_is_named_and_not_created(tmp_path):
    said = call("doctor", "--repository", f"sqlite:///{tmp_path}/tasks.db")
    assert said.code == 1
    assert f"fail  file: There is no file {tmp_path}/tasks.db." in said.out
    assert list(tmp_path.iterdir()) == []
