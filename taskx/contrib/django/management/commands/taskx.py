"""The command ``manage.py taskx``: the whole command line of TaskX on the queue of a backend."""

from __future__ import annotations

import os
from argparse import REMAINDER
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from taskx.contrib.django.blocks import commit_implicit


class Command(BaseCommand):
    """See and steer the tasks of the site, and run them."""

    help = "See and steer the tasks of the site, and run them."
    requires_system_checks: tuple[str, ...] = ()

    def run_from_argv(self, argv: list[str]) -> None:
        """Run the words after ``manage.py taskx``, and exit with the code of the command."""
        group = _group()
        from taskx.programs.cli.output import prepare_streams

        prepare_streams()
        try:
            group.main(args=_without_settings(argv[2:]), prog_name=_program(argv[0]))
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            commit_implicit()
            connections.close_all()

    def print_help(self, prog_name: str, subcommand: str) -> None:
        """Print what ``manage.py help taskx`` asks for."""
        _group().main(args=["--help"], prog_name=_program(prog_name), standalone_mode=False)

    def add_arguments(self, parser: Any) -> None:
        """Take all words: ``call_command("taskx", "list", "status:failed")``."""
        parser.add_argument("args", nargs=REMAINDER)

    def handle(self, *args: Any, **options: Any) -> None:
        """Run a command for ``call_command``.

        Raises:
            CommandError: the command failed; its ``returncode`` is the exit code.
        """
        import click

        for stream in (self.stdout, self.stderr):
            stream.ending = ""  # lines have their ends already
        with redirect_stdout(self.stdout), redirect_stderr(self.stderr):
            try:
                code = _group().main([*map(str, args)], "manage.py taskx", standalone_mode=False)
            except click.ClickException as error:
                raise CommandError(error.format_message(), returncode=error.exit_code) from error
        if isinstance(code, int) and code:
            raise CommandError(f"taskx: exit code {code}", returncode=code)


def _group() -> Any:
    try:
        import rich  # noqa: F401

        from taskx.contrib.django.commandline import make_group
    except ImportError as error:
        raise CommandError(
            f"the command line needs the package {error.name}: pip install 'taskx-queue[cli]'"
        ) from error
    return make_group()


def _program(path: str) -> str:
    return f"{os.path.basename(path)} taskx"


def _without_settings(words: Sequence[str]) -> list[str]:
    """Return the words without Django's own options, which ``manage.py`` has used already."""
    left: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--settings", "--pythonpath"):
            next(rest, None)
        elif not word.startswith(("--settings=", "--pythonpath=")):
            left.append(word)
        if word == "--":
            break
    return [*left, *rest]
