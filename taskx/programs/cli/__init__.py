"""The command line: ``taskx``, or ``python -m taskx``. A thin skin on the public methods of ``Queue``.

It needs the packages click and rich: ``pip install 'taskx-queue[cli]'``. The modules hold no rules: a
command reads its arguments, calls a method, and prints the answer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import taskx


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit; the console script ``taskx`` calls this.

    Args:
        args: the words after the name of the program; those of this process by default.
    """
    if [*(sys.argv[1:] if args is None else args)] == ["--version"]:
        sys.stdout.write(
            f"taskx, version {taskx.__version__}\n"
        )  # click says it so, but imports much
        sys.exit()
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        sys.stderr.write(
            f"taskx: the command line needs the package {error.name}: pip install 'taskx-queue[cli]'\n"
        )
        sys.exit(2)
    from taskx.programs.cli.app import make_group
    from taskx.programs.cli.completion import use_own_bash
    from taskx.programs.cli.output import prepare_streams

    prepare_streams()
    use_own_bash()
    try:
        make_group().main(args=args, prog_name="taskx")
    except KeyboardInterrupt:
        sys.exit(130)
