"""The exit codes, and the way from an error to one line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from taskx.programs.cli.output import clean
from taskx.tasks.errors import (
    ConfigurationError,
    DuplicateTask,
    InvalidTransition,
    NodeNotFound,
    PayloadError,
    QueueFull,
    QueueStopped,
    RepositoryError,
    ScheduleNotFound,
    TaskNotFound,
    TaskxError,
    UnknownTaskType,
)

#: The exit codes, with their meaning.
OK, FAILED, USAGE, NOT_FOUND, CONFLICT, AWAY = range(6)
RECYCLE, INTERRUPTED, CLOSED = 75, 130, 141

_CODES: tuple[tuple[tuple[type[TaskxError], ...], int], ...] = (
    ((TaskNotFound, ScheduleNotFound, NodeNotFound), NOT_FOUND),
    ((DuplicateTask, InvalidTransition, QueueFull, QueueStopped), CONFLICT),
    ((RepositoryError,), AWAY),
    ((ConfigurationError, PayloadError, UnknownTaskType), USAGE),
)


class Failure(click.ClickException):
    """An error that ends the program with one line on stderr and an exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # a class variable there

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message, if there is one. A terminal cannot be harmed by it."""
        if self.message:
            click.echo(f"taskx: {clean(self.message)}", file=file or sys.stderr)


class Usage(Failure):
    """The call itself is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(message, USAGE)


def code_of(error: TaskxError) -> int:
    """Return the exit code of an error."""
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), FAILED)


@contextmanager
def one_line_errors(debug: Callable[[], bool]) -> Iterator[None]:
    """Turn every error inside into a :class:`Failure`.

    Args:
        debug: a function that returns True to show the traceback, too; it is called after an error.
    """
    try:
        yield
    except (click.exceptions.Exit, click.exceptions.NoArgsIsHelpError):
        raise
    except click.UsageError as error:
        message = error.format_message().rstrip(".")
        path = error.ctx.command_path if error.ctx is not None else "taskx"
        raise Usage(f"{message}; see {path} --help") from error
    except Failure as error:
        if debug() and error.__cause__ is not None:
            _show_traceback(error.__cause__)
        raise
    except BrokenPipeError:
        _quiet_stdout()
        raise click.exceptions.Exit(CLOSED) from None
    except (KeyboardInterrupt, click.Abort):
        raise Failure("interrupted", INTERRUPTED) from None
    except TaskxError as error:
        if debug():
            _show_traceback(error)
        raise Failure(str(error), code_of(error)) from error
    except Exception as error:
        if debug():
            _show_traceback(error)
        raise Failure(
            f"unexpected {type(error).__name__}: {error}; --debug shows where", FAILED
        ) from error


def _show_traceback(error: BaseException) -> None:
    import traceback

    click.echo(clean("".join(traceback.format_exception(error)), lines=True), err=True)


def _quiet_stdout() -> None:
    """Redirect stdout to nowhere, so that nothing more is written to the closed pipe."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # it is no file
        return
