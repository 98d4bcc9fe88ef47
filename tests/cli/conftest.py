"""Fixtures for the command line: calls in this process, on a queue in memory or on a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from taskx import Queue
from taskx.programs.cli.app import make_group


@attrs.frozen
class Said:
    """The outcome of one call.

    Attributes:
        code: the exit code.
        out: stdout, as text.
        err: stderr, as text.
    """

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stdout."""
        return self.out.splitlines()

    @property
    def rows(self) -> list[Any]:
        """The JSON values of stdout, one a line."""
        return [json.loads(line) for line in self.lines]


Call = Callable[..., Said]


def call(*args: str, queue: Any = None, input: str | None = None, **env: str | None) -> Said:
    """Run the command line in this process."""
    settings = {"TASKX_REPOSITORY": None, "COLUMNS": None, **env}
    result = CliRunner().invoke(make_group(queue), [*args], input=input, env=settings)
    unexpected = result.exception
    if unexpected is not None and not isinstance(unexpected, SystemExit):
        raise unexpected
    assert "Traceback" not in result.stderr
    return Said(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def outside(make_queue: Callable[..., Queue]) -> Queue:
    """The queue of the command line, on the repository of the fixture ``queue``. It is never started."""
    return make_queue()


@pytest.fixture
def taskx(outside: Queue) -> Call:
    """Return a function that runs the command line on the queue ``outside``."""

    def run(*args: str, **settings: Any) -> Said:
        return call(*args, queue=outside, **settings)

    return run
